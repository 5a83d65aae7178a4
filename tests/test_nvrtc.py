"""NVRTC compiles every kernel for every architecture that it serves, without a driver."""

import re
from typing import Any

import pytest

from minivae.kernels import STEMS, source

pytestmark = pytest.mark.toolchain

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
CUPY_FLAGS = ("--std=c++17", "-ftz=true")


@pytest.fixture(scope="module")
def nvrtc() -> Any:
    return pytest.importorskip("cuda.bindings.nvrtc", reason="the extra `cuda13` is not installed")


def compiled(nvrtc: Any, stem: str, target: str, kind: str) -> bytes:
    """The PTX or CUBIN of a stem; fails with the compiler's log."""
    _, program = nvrtc.nvrtcCreateProgram(source(stem).encode(), f"{stem}.cu".encode(), 0, [], [])
    flags = [flag.encode() for flag in (f"--gpu-architecture={target}", *CUPY_FLAGS)]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    _, size = getattr(nvrtc, f"nvrtcGet{kind}Size")(program)
    content = b" " * size
    getattr(nvrtc, f"nvrtcGet{kind}")(program, content)
    return content


@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("stem", STEMS)
def test_the_kernels_compile_for_the_architecture(nvrtc: Any, stem: str, target: str) -> None:
    assert len(compiled(nvrtc, stem, target, "CUBIN")) > 1000


@pytest.mark.parametrize("stem", STEMS)
def test_no_float64_is_in_the_kernels_but_for_the_running_totals(nvrtc: Any, stem: str) -> None:
    ptx = compiled(nvrtc, stem, "compute_90", "PTX").decode()
    kernels = re.split(r"\.visible \.entry ", ptx)[1:]
    assert kernels
    for kernel in kernels:
        if not kernel.startswith("elbo_totals"):  # a sum over a whole run, by its contract
            assert ".f64" not in kernel, kernel.splitlines()[0]


@pytest.mark.parametrize("stem", STEMS)
def test_no_kernel_keeps_anything_in_local_memory(nvrtc: Any, stem: str) -> None:
    assert ".local " not in compiled(nvrtc, stem, "compute_90", "PTX").decode()
