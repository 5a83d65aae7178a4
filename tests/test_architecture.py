"""The house's floors: imports point down only, and heavy packages load only when asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minivae"
BESIDE = ("kernels", "benchmarks")
"""Subpackages whose folders lie beside that of the package."""
FLOORS = [
    {"environment", "errors", "files"},
    {"ops"},
    {"kernels"},
    {"backends"},
    {"params", "layers", "network", "objective", "optim"},
    {"model_pass", "models", "presets", "data"},
    {"checkpoint", "evaluate", "export", "gradcheck", "pictures", "plots", "tensorboard", "train"},
    {"cli", "benchmarks"},
    {"__main__"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path for name in ("minivae", *BESIDE) for path in (ROOT / name).rglob("*.py"))


def parts_of(path: Path) -> tuple[str, ...]:
    """Where a module is below the package: ("ops", "adam.py"), ("models.py",), ..."""
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).parts


def unit(path: Path) -> str:
    """The first name below the package: `ops`, `models`, ..."""
    return parts_of(path)[0].removesuffix(".py")


def imported_units(source: str, parts: tuple[str, ...]) -> set[str]:
    """Names below the package that a module imports, at its top or inside a function."""
    units = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom):
            continue
        package = ["minivae", *parts[:-1]][: len(parts) - node.level + 1] if node.level else []
        module = [*package, *node.module.split(".")] if node.module else package
        if module[0] == "minivae":
            units |= {module[1]} if module[1:] else {alias.name for alias in node.names}
    return units & set(FLOOR_OF)


@pytest.mark.parametrize(
    "line", ["from minivae.cli import main", "from ..cli import main", "from minivae import cli"]
)
def test_an_import_of_the_top_floor_is_seen(line: str) -> None:
    assert imported_units(f"def f():\n    {line}", ("ops", "adam.py")) == {"cli"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path: Path) -> None:
    if unit(path) == "__init__":
        return
    floor = FLOOR_OF[unit(path)]
    above = {
        name for name in imported_units(path.read_text(), parts_of(path)) if FLOOR_OF[name] > floor
    }
    assert not above


def test_every_module_has_a_floor() -> None:
    assert {unit(path) for path in MODULES} - {"__init__"} == set(FLOOR_OF)


BLAS = {"dot", "matmul", "einsum", "tensordot", "inner", "vdot", "linalg"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("backends/cpu*.py")), ids=lambda p: p.name)
def test_the_cpu_backend_calls_no_blas_whose_threads_would_compete_with_its_own(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    assert not [node for node in nodes if isinstance(node, ast.MatMult)]
    assert not {node.attr for node in nodes if isinstance(node, ast.Attribute)} & BLAS


def test_windows_is_told_what_to_use_instead() -> None:
    code = "import sys; sys.platform = 'win32'; import minivae"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("not run on Windows itself: use it in WSL")


@pytest.mark.parametrize("module", ["minivae", "minivae.cli"])
def test_importing_the_package_loads_no_heavy_package(module: str) -> None:
    heavy = "('numba', 'cupy', 'matplotlib', 'PIL', 'torch', 'tqdm', 'safetensors')"
    code = f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
