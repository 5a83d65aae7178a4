"""NVRTC compiles every kernel, in every specialisation that a backend asks for, for every
architecture that it serves, without a driver; and what the machine code takes."""

import json
import math
import re
from typing import NamedTuple
from unittest.mock import MagicMock

import pytest

from minivae.backends.kernel_arguments import WARP, kernels
from minivae.backends.tiling import BLOCK, stage_depth, tiles_of
from minivae.benchmarks.machine_code import (
    ALL,
    CUPY_FLAGS,
    Resources,
    Specialisation,
    compiled,
    reported,
    resource_table,
    resources,
    stage_of,
    stage_rows,
    stages,
)
from minivae.benchmarks.runs import RESULTS
from minivae.kernels import LARGE, OPTIONS, SMALL, WITH_TILES

pytestmark = pytest.mark.toolchain
RECORDED = json.loads((RESULTS / "machine-code.json").read_text())


@pytest.fixture(autouse=True)
def nvrtc() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="the extra `cuda13` is not installed")


REGISTERS = 65536
"""Of a multiprocessor."""

SLACK = 1.1
"""How far a count may be above the recorded one, since compilers differ: what NVRTC 13.0 makes of
the kernels has up to an eighth more registers than what 13.5 does, and in no case of 886 more than
a tenth above it, rounded up by eights."""


def by_eights(registers: float) -> int:
    """The registers that a thread is given."""
    return 8 * math.ceil(registers / 8)


class Bounds(NamedTuple):
    """How many blocks must find registers on a multiprocessor, so that one may wait for memory
    while another computes, and the bytes of shared memory that each may take: of an H100's or
    H200's 228 KiB, or of any GPU's 48."""

    blocks: int
    shared_bytes: int


BOUNDS = Bounds(3, 36 * 1024)
BOUNDS_OF = {
    SMALL: Bounds(4, 36 * 1024),
    LARGE: Bounds(2, 37 * 1024),
}


@pytest.mark.parametrize("specialisation", ALL, ids=str)
def test_kernels_compile_within_their_resources(specialisation: Specialisation) -> None:
    bounds = BOUNDS_OF.get(specialisation.tile, BOUNDS)
    declared = {n for n, kernel in kernels().items() if kernel.stem == specialisation.stem}
    for target, found in resources(specialisation).items():
        assert found.keys() == declared, target
        for name, used in found.items():
            where, threads = f"{name} for sm_{target}", kernels()[name].threads
            assert used.spilled_bytes == 0, f"{where} spills {used.spilled_bytes} bytes"
            blocks = bounds.blocks if threads == BLOCK else 1  # the others are launches of one
            if name == "conv_weight_gradient":  # GRADIENT_BLOCKS
                blocks = min(blocks, 3)
            together = blocks * threads * by_eights(used.registers)
            assert together <= REGISTERS, f"{where} takes {used.registers} registers"
            assert used.shared_bytes <= bounds.shared_bytes, (
                f"{where} takes {used.shared_bytes} bytes"
            )


@pytest.mark.parametrize("specialisation", ALL, ids=str)
def test_kernels_take_no_more_than_is_recorded(specialisation: Specialisation) -> None:
    found, recorded = resource_table(specialisation), RECORDED["resources"][str(specialisation)]
    assert found.keys() == recorded.keys()
    for name, used in found.items():
        before = recorded[name]
        assert used["threads"] == before["threads"], name
        assert used["shared_bytes"] <= before["shared_bytes"], name
        for target, registers in used["registers"].items():
            most = by_eights(SLACK * before["registers"][target])
            assert registers <= most, f"{name} for sm_{target} takes {registers} registers"


def test_the_compiler_knows_of_blocks_of_more_threads_than_most_have() -> None:
    for name, kernel in kernels().items():
        if kernel.threads > BLOCK:
            specialisation = next(s for s in ALL if s.stem == kernel.stem)
            _, declared = compiled(specialisation, "90").ptx.split(f".entry {name}(")
            assert f".maxntid {kernel.threads}" in declared.split("{")[0], name


@pytest.mark.parametrize("stem", WITH_TILES)
def test_every_tile_that_a_product_may_have_is_compiled_in_both_precisions(stem: str) -> None:
    sizes = [(rows, columns) for rows in (1, 784, 2**20) for columns in (1, 16, 32, 448, 784)]
    tiles = {
        tiles_of("fp32", stem, [size], depth).tile for size in sizes for depth in (16, 400, 2**14)
    }
    for tensor_cores in (False, True):
        assert {s.tile for s in ALL if s[:2] == (stem, tensor_cores)} == tiles


def test_the_flags_are_those_that_cupy_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = pytest.importorskip("cupy.cuda.compiler")
    program = MagicMock(name="program")
    program.return_value.compile.side_effect = InterruptedError
    monkeypatch.setattr(compiler, "_NVRTCProgram", program)
    for name in ("function", "_preprocess", "_get_arch_for_options_for_nvrtc"):  # they ask a GPU
        monkeypatch.setattr(compiler, name, MagicMock(return_value=("-arch=sm_90", "cubin")))
    with pytest.raises(InterruptedError):
        compiler._compile_module_with_cache("", OPTIONS, arch="90")
    flags, *_ = program.return_value.compile.call_args.args
    assert set(flags) == {"-arch=sm_90", *CUPY_FLAGS}


COMPILED = [
    pytest.param(specialisation, target, id=f"{specialisation}-sm_{target}")
    for specialisation in ALL
    for target in specialisation.architectures
]
SUM_OF_A_RUN = r"add\.(rn\.)?f64|cvt\.(ftz\.)?f64\.f32|(ld|st)\.global\.f64|\.reg \.f64"


@pytest.mark.parametrize(("specialisation", "target"), COMPILED)
def test_no_float64_is_in_the_kernels_but_for_the_running_totals(
    specialisation: Specialisation, target: str
) -> None:
    found = re.split(r"\.visible \.entry ", compiled(specialisation, target).ptx)[1:]
    assert found
    for kernel in found:
        name = kernel.split("(")[0]
        adds_up = "elbo" in name or "totals" in name
        for line in kernel.splitlines():
            if ".f64" in line:
                assert adds_up, f"{name}: {line}"
                assert re.search(SUM_OF_A_RUN, line), f"{name}: {line}"


@pytest.mark.parametrize("specialisation", ALL, ids=str)
def test_tensor_cores_and_asynchronous_copies_are_where_they_were_asked_for(
    specialisation: Specialisation,
) -> None:
    ptx = compiled(specialisation, "80").ptx
    assert ("mma.sync" in ptx) == specialisation.tensor_cores
    assert ("cp.async" in ptx) == (specialisation.stem in WITH_TILES)


def test_the_planted_spill_is_seen() -> None:
    log = (
        "ptxas info    : Compiling entry function 'f' for 'sm_90'\n    16 bytes stack frame, 12 "
        "bytes spill stores, 8 bytes spill loads\nptxas: Used 96 registers, 27649 bytes smem\n"
    )
    assert reported(log) == {"f": Resources(96, 27649, 20)}


def test_a_stage_takes_no_more_instructions_than_are_recorded() -> None:
    for row, before in zip(stage_rows(), RECORDED["stages"], strict=True):
        assert row["instructions"] <= SLACK * before["instructions"], row
        assert row | {"instructions": 0} == before | {"instructions": 0}


def test_a_stage_multiplies_all_of_its_operands_and_nothing_twice() -> None:
    for (specialisation, kernel), found in stages().items():
        at_once = 16 * 8 * 8 if specialisation.tensor_cores else WARP
        tile = specialisation.tile
        a_stage = tile.rows * tile.columns * stage_depth(tile)
        assert found.products * at_once * BLOCK // WARP == a_stage, f"{specialisation} {kernel}"


def test_the_way_of_aligned_operands_is_counted_and_inner_loops_as_often_as_they_run() -> None:
    code = """.L_x_1|BAR.SYNC|@P1 BRA `(.L_x_2)|IADD3|LDGSTS.E [R1]|BRA `(.L_x_3)|.L_x_2|
        LDGSTS.E.BYPASS.128 [R1]|IADD3|IADD3|.L_x_3|LDGDEPBAR|.L_x_4|LDS|FFMA|@P2 BRA `(.L_x_4)|
        @P0 BRA `(.L_x_1)|EXIT"""
    assert stage_of([line.strip() for line in code.split("|")]) == (2 + 3 + 1 + 4 * 3 + 1, 4)
