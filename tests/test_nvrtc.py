"""NVRTC compiles every kernel, in every specialisation that a backend asks for, for every
architecture that it serves, without a driver."""

import re
from functools import cache
from typing import Any, NamedTuple

import pytest

from minivae.kernels import OPTIONS, STEMS, WITH_TILES, source

pytestmark = pytest.mark.toolchain

ARCHITECTURES = ("75", "80", "86", "89", "90", "100")
CUPY_FLAGS = (*OPTIONS, "-ftz=true")


class Specialisation(NamedTuple):
    stem: str
    tensor_cores: bool
    tile_columns: int

    def __str__(self) -> str:
        return "-".join(
            (self.stem, "tf32" if self.tensor_cores else "fp32", str(self.tile_columns))
        )


ALL = [
    Specialisation(stem, tensor_cores, columns)
    for stem in STEMS
    for tensor_cores in ((False, True) if stem in WITH_TILES else (False,))
    for columns in WITH_TILES.get(stem, (64,))
]


@cache
def compiled(specialisation: Specialisation, target: str) -> tuple[str, str]:
    """The PTX of a specialisation, and the assembler's report; fails with the compiler's log."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="the extra `cuda13` is not installed")
    stem, tensor_cores, columns = specialisation
    text = source(stem, tensor_cores=tensor_cores, tile_columns=columns)
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), f"{stem}.cu".encode(), 0, [], [])
    flags = (f"--gpu-architecture=sm_{target}", *CUPY_FLAGS, "--ptxas-options=-v")
    encoded = [flag.encode() for flag in flags]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    log = _text(nvrtc, program, "ProgramLog")
    assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, log
    return _text(nvrtc, program, "PTX"), log


def _text(nvrtc: Any, program: Any, kind: str) -> str:
    _, size = getattr(nvrtc, f"nvrtcGet{kind}Size")(program)
    content = b" " * size
    getattr(nvrtc, f"nvrtcGet{kind}")(program, content)
    return content.decode()


class Resources(NamedTuple):
    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int


REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)


def resources(specialisation: Specialisation, target: str) -> dict[str, Resources]:
    """What each kernel takes, by the assembler's report."""
    _, log = compiled(specialisation, target)
    return {
        name: Resources(int(registers), int(shared or 0), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers, shared in REPORT.findall(log)
    }


MOST_REGISTERS = 168
"""Of 65,536 on a multiprocessor: three blocks of 128 threads fit, so that one may wait for memory
while others compute."""

MOST_SHARED = 36 * 1024
"""Bytes a block: six blocks fit in the 228 KiB of an H100 or H200, and one in any GPU's 48."""


@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("specialisation", ALL, ids=str)
def test_kernels_compile_within_their_resources(specialisation: Any, target: str) -> None:
    if specialisation.tensor_cores and int(target) < 80:
        return  # served in float32 only
    found = resources(specialisation, target)
    assert found
    for name, used in found.items():
        assert used.spilled_bytes == 0, f"{name} spills {used.spilled_bytes} bytes"
        assert used.registers <= MOST_REGISTERS, f"{name} takes {used.registers} registers"
        assert used.shared_bytes <= MOST_SHARED, f"{name} takes {used.shared_bytes} bytes"


@pytest.mark.parametrize("specialisation", ALL, ids=str)
def test_no_float64_is_in_the_kernels_but_for_the_running_totals(specialisation: Any) -> None:
    ptx, _ = compiled(specialisation, "90")
    kernels = re.split(r"\.visible \.entry ", ptx)[1:]
    assert kernels
    for kernel in kernels:
        name = kernel.split("(")[0]
        if "elbo" not in name and "totals" not in name:  # a sum over a whole run, by its contract
            assert ".f64" not in kernel, kernel.splitlines()[0]


def test_only_the_totals_of_a_run_are_added_up_in_float64() -> None:
    for specialisation in ALL:
        for line in compiled(specialisation, "90")[0].splitlines():
            if ".f64" in line:
                assert re.search(
                    r"add\.(rn\.)?f64|cvt\.(ftz\.)?f64\.f32|(ld|st)\.global\.f64|\.reg \.f64", line
                )


@pytest.mark.parametrize("specialisation", ALL, ids=str)
def test_tensor_cores_and_asynchronous_copies_are_where_they_were_asked_for(
    specialisation: Any,
) -> None:
    ptx, _ = compiled(specialisation, "80")
    assert ("mma.sync" in ptx) == specialisation.tensor_cores
    assert ("cp.async" in ptx) == (specialisation.stem in WITH_TILES)


def test_the_planted_spill_is_seen() -> None:
    log = (
        "ptxas info    : Compiling entry function 'f' for 'sm_90'\n    16 bytes stack frame, 12 "
        "bytes spill stores, 8 bytes spill loads\nptxas: Used 96 registers, 27649 bytes smem\n"
    )
    assert REPORT.findall(log) == [("f", "16", "12", "8", "96", "27649")]
