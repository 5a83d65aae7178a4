"""NVRTC compiles every kernel, in every specialisation that a backend asks for, for every
architecture that it serves, without a driver; and what the machine code takes."""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import pytest

from minivae.backends.kernel_backend import BLOCK, DEPTH, WARP
from minivae.benchmarks.machine_code import ALL, Specialisation, compiled, slice_of, slices
from minivae.kernels import LARGE, MEDIUM, WITH_TILES

pytestmark = pytest.mark.toolchain


@pytest.fixture(autouse=True)
def nvrtc() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="the extra `cuda13` is not installed")


ARCHITECTURES = ("75", "80", "86", "89", "90", "100")


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
    log = compiled(specialisation, target).log
    return {
        name: Resources(int(registers), int(shared or 0), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers, shared in REPORT.findall(log)
    }


REGISTERS = 65536
"""Of a multiprocessor."""


class Bounds(NamedTuple):
    """How many blocks must find registers on a multiprocessor, so that one may wait for memory
    while another computes, and the bytes of shared memory that each may take: of an H100's or
    H200's 228 KiB, or of any GPU's 48."""

    blocks: int
    shared_bytes: int


BOUNDS = Bounds(3, 36 * 1024)
LARGE_BOUNDS = Bounds(2, 37 * 1024)


@pytest.mark.parametrize("specialisation", ALL, ids=str)
def test_kernels_compile_within_their_resources(specialisation: Any) -> None:
    served = [t for t in ARCHITECTURES if int(t) >= 80 or not specialisation.tensor_cores]
    bounds = LARGE_BOUNDS if specialisation.tile == LARGE else BOUNDS
    with ThreadPoolExecutor() as pool:
        found = dict(zip(served, pool.map(partial(resources, specialisation), served), strict=True))
    for target, kernels in found.items():
        assert kernels, target
        for name, used in kernels.items():
            where = f"{name} for sm_{target}"
            assert used.spilled_bytes == 0, f"{where} spills {used.spilled_bytes} bytes"
            block = BLOCK * -(-used.registers // 8) * 8  # they are handed out by eights
            assert bounds.blocks * block <= REGISTERS, f"{where} takes {used.registers} registers"
            assert used.shared_bytes <= bounds.shared_bytes, (
                f"{where} takes {used.shared_bytes} bytes"
            )


@pytest.mark.parametrize("specialisation", ALL, ids=str)
def test_no_float64_is_in_the_kernels_but_for_the_running_totals(specialisation: Any) -> None:
    ptx = compiled(specialisation, "90").ptx
    kernels = re.split(r"\.visible \.entry ", ptx)[1:]
    assert kernels
    for kernel in kernels:
        name = kernel.split("(")[0]
        if "elbo" not in name and "totals" not in name:  # a sum over a whole run, by its contract
            assert ".f64" not in kernel, kernel.splitlines()[0]


def test_only_the_totals_of_a_run_are_added_up_in_float64() -> None:
    for specialisation in ALL:
        for line in compiled(specialisation, "90").ptx.splitlines():
            if ".f64" in line:
                assert re.search(
                    r"add\.(rn\.)?f64|cvt\.(ftz\.)?f64\.f32|(ld|st)\.global\.f64|\.reg \.f64", line
                )


@pytest.mark.parametrize("specialisation", ALL, ids=str)
def test_tensor_cores_and_asynchronous_copies_are_where_they_were_asked_for(
    specialisation: Any,
) -> None:
    ptx = compiled(specialisation, "80").ptx
    assert ("mma.sync" in ptx) == specialisation.tensor_cores
    assert ("cp.async" in ptx) == (specialisation.stem in WITH_TILES)


def test_the_planted_spill_is_seen() -> None:
    log = (
        "ptxas info    : Compiling entry function 'f' for 'sm_90'\n    16 bytes stack frame, 12 "
        "bytes spill stores, 8 bytes spill loads\nptxas: Used 96 registers, 27649 bytes smem\n"
    )
    assert REPORT.findall(log) == [("f", "16", "12", "8", "96", "27649")]


MOST_INSTRUCTIONS = {
    Specialisation("gemm", True, MEDIUM): 170,
    Specialisation("weights", True, MEDIUM): 190,
    Specialisation("conv", True, MEDIUM): 265,
    Specialisation("gemm", False, MEDIUM): 790,
    Specialisation("weights", False, MEDIUM): 820,
    Specialisation("conv", False, MEDIUM): 900,
    Specialisation("gemm", True, LARGE): 240,
    Specialisation("weights", True, LARGE): 305,
    Specialisation("conv", True, LARGE): 420,
    Specialisation("gemm", False, LARGE): 1395,
    Specialisation("weights", False, LARGE): 1485,
    Specialisation("conv", False, LARGE): 1570,
}
"""Of a warp for a slice of a wide tile: some multiply, the others bring them their operands. A
tenth above what NVRTC 13.5 makes of it."""


def test_a_slice_takes_no_more_instructions_than_it_did() -> None:
    for (specialisation, kernel), found in slices().items():
        if most := MOST_INSTRUCTIONS.get(specialisation):
            assert found.instructions <= most, f"{specialisation} {kernel}: {found.instructions}"
            rows, columns = specialisation.tile
            at_once = 16 * 8 * 8 if specialisation.tensor_cores else WARP
            assert found.products == rows * columns * DEPTH // (BLOCK // WARP * at_once)


def test_the_way_of_aligned_operands_is_counted_and_inner_loops_as_often_as_they_run() -> None:
    code = """.L_x_1|BAR.SYNC|@P1 BRA `(.L_x_2)|IADD3|LDGSTS.E [R1]|BRA `(.L_x_3)|.L_x_2|
        LDGSTS.E.BYPASS.128 [R1]|IADD3|IADD3|.L_x_3|LDGDEPBAR|.L_x_4|LDS|FFMA|@P2 BRA `(.L_x_4)|
        @P0 BRA `(.L_x_1)|EXIT"""
    assert slice_of([line.strip() for line in code.split("|")]) == (2 + 3 + 1 + 4 * 3 + 1, 4)
