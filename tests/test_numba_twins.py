"""The Numba twins: their arithmetic in Numba's simulator, their types in the PTX that they become.

Neither needs a GPU. The simulator proves indexing and arithmetic, not synchronization.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from numba import cuda, float32, float64, int64, types, uint64

from minivae.kernels import adam_numba, elbo_numba, latent_numba

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "kernels"


def test_in_the_simulator() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "simulated_twins.py"],
        cwd=TESTS,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def _array(scalar: Any, dimensions: int) -> types.Array:
    return types.Array(scalar, dimensions, "C")


VECTOR, MATRIX, STATE = _array(float32, 1), _array(float32, 2), _array(int64, 1)
TOTALS = _array(float64, 1)
NOISE, SIZES = (uint64, uint64), (int64, int64)

SIGNATURES = [
    (latent_numba, "latent_forward", (MATRIX, MATRIX, MATRIX, *NOISE, STATE, *SIZES)),
    (latent_numba, "latent_backward", (MATRIX, MATRIX, VECTOR, MATRIX, *NOISE, STATE, *SIZES)),
    (elbo_numba, "bernoulli_loss", (MATRIX, MATRIX, VECTOR, MATRIX, float32, *SIZES)),
    (
        *(elbo_numba, "squared_error_loss"),
        (MATRIX, MATRIX, VECTOR, MATRIX, float32, float32, int64, float32, *SIZES),
    ),
    (
        *(elbo_numba, "elbo_totals"),
        (VECTOR, MATRIX, MATRIX, STATE, float32, VECTOR, TOTALS, *SIZES),
    ),
    (
        *(adam_numba, "adam_update"),
        (VECTOR, VECTOR, VECTOR, VECTOR, MATRIX, STATE, float32, float32, float32, int64),
    ),
    (adam_numba, "clip_gradient_partials", (VECTOR, VECTOR, int64)),
    (adam_numba, "clip_gradient", (VECTOR, float32, VECTOR, VECTOR, int64)),
]
EACH_TWIN = pytest.mark.parametrize(
    ("module", "name", "signature"), SIGNATURES, ids=[name for _, name, _ in SIGNATURES]
)


def _ptx(monkeypatch: pytest.MonkeyPatch, kernel: Any, signature: tuple[Any, ...]) -> str:
    # Numba asks the current GPU for its architecture when it compiles a device function.
    card = SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr("numba.cuda.dispatcher.get_current_device", lambda: card)
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=(9, 0))
    return ptx


@pytest.mark.toolchain
@EACH_TWIN
def test_no_float64_and_no_local_memory_in_the_ptx(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, signature: tuple[Any, ...]
) -> None:
    ptx = _ptx(monkeypatch, getattr(module, name), signature)
    assert name in ptx
    assert ".local" not in ptx
    float64_operations = re.findall(r"^\s*(\w+)[.\w]*\.f64\b", ptx, re.MULTILINE)
    if name == "elbo_totals":
        # `totals` is float64 by its contract: three sums of a run, and nothing else.
        assert sorted(float64_operations) == sorted(["ld", "cvt", "add", "st"] * 3)
    else:
        assert ".f64" not in ptx


@EACH_TWIN
def test_names_and_argument_order_are_the_kernels(
    module: ModuleType, name: str, signature: tuple[Any, ...]
) -> None:
    stem = module.__name__.rpartition(".")[2].removesuffix("_numba")
    text = (KERNELS / f"{stem}.cu").read_text()
    found = re.search(rf"__global__[^;{{]*\b{name}\(([^)]*)\)", text)
    assert found, f"no kernel {name} in {stem}.cu"
    arguments = [argument.split()[-1].lstrip("*") for argument in found[1].split(",")]
    assert arguments == list(inspect.signature(getattr(module, name).py_func).parameters)
    assert len(arguments) == len(signature)
