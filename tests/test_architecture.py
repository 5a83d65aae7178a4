"""The house's floors: imports point down only, and heavy packages load only when asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minivae"
FLOORS = [
    {"errors", "files"},
    {"ops"},
    {"backends"},
    {"params", "layers", "network", "optim"},
    {"models", "presets", "data"},
    {"checkpoint", "evaluate", "export", "gradcheck", "pictures", "plots", "tensorboard", "train"},
    {"cli"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The first name below the package: `ops`, `models`, ..."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    """Names below the package that a module imports, at its top or inside a function."""
    parts = path.relative_to(PACKAGE).parts
    units = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > len(parts) - 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            units |= {name.split(".")[0] for name in names}
    return units & set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    if unit(path) == "__init__":
        return
    floor = FLOOR_OF[unit(path)]
    above = {name for name in imported_units(path) if FLOOR_OF[name] > floor}
    assert not above


def test_every_module_has_a_floor() -> None:
    assert {unit(path) for path in MODULES} - {"__init__"} == set(FLOOR_OF)


@pytest.mark.parametrize("module", ["minivae", "minivae.cli"])
def test_importing_the_package_loads_no_heavy_package(module: str) -> None:
    heavy = "('numba', 'cupy', 'matplotlib', 'PIL', 'torch', 'tqdm', 'safetensors')"
    code = f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
