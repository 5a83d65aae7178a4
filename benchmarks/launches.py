"""What a training step is on a GPU, counted without one: its launches, and the time of its matrix
products by the instructions of a stage and the estimate by which they are divided."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from minivae.backends.kernel_arguments import WARP, kernels
from minivae.backends.kernel_backend import KernelBackend, has_few_taps
from minivae.backends.tiling import (
    BLOCK,
    CYCLES_PER_MICROSECOND,
    MULTIPROCESSORS,
    Part,
    launch_cycles,
    stage_depth,
)
from minivae.kernels import WITH_TILES, Tile
from minivae.train import Trainer

from .cases import RANDOM, Case, step_cases
from .floor import Rates

H100 = {"fp32": Rates(3350, 67_000), "tf32": Rates(3350, 495_000)}
"""Its nominal rates: of memory, and of operations in float32 outside the tensor cores, or in TF32
on them."""

DENSE_JOB, CONV_JOB = 12, 23
"""Numbers of a Job in kernels/weights.cu and conv.cu."""

TILES_OF_JOB, SPLITS, SMALL_IMAGE, ROWS = 1, 2, 6, 9
"""Where a Job has its tiles and splits, a convolution's its small image (0 for a bias alone), and a
dense layer's its rows."""

FEW_START, FEW_TAP = 400, 60
"""Instructions of a warp of kernels/conv_few_channels.cu outside of its loop, and in it for each
tap of up to 32 filters to one channel: counted by eye in NVRTC's code for sm_90."""

FEW_POSITION = 33
"""Those of `multiply_few` in kernels/conv.cu for a position and up to 32 filters, counted alike."""


class Launch(NamedTuple):
    """A launch of a step, with its grid, and its sizes by name. One that makes matrix products in
    tiles has parts: its phases, or the layers of a group. `few` are the positions of layers of few
    taps, once for each 32 filters."""

    kernel: str
    tile: Tile
    grid: tuple[int, int, int]
    sizes: dict[str, int]
    parts: tuple[Part, ...]
    few: int

    @property
    def blocks(self) -> int:
        """Of all parts."""
        return sum(part.blocks for part in self.parts)

    @property
    def stages(self) -> float:
        """Of a block, in the mean."""
        return sum(part.blocks * part.stages for part in self.parts) / max(self.blocks, 1)

    def microseconds(self, precision: str, instructions: dict[tuple[str, str, Tile], int]) -> float:
        """Of products, estimated; 0 of a launch that makes none. `instructions` are those of a
        stage, by precision, kernel and tile."""
        cycles = 0.0
        if self.parts:
            stage = instructions[precision, self.kernel, self.tile]
            stem = kernels()[self.kernel].stem
            cycles = launch_cycles(precision, stem, self.tile, self.parts, stage)
        elif self.kernel.endswith("_few"):
            warps, s = math.prod(self.grid) * BLOCK // WARP, self.sizes
            taps = s["taps_h"] * s["taps_w"] / (s["stride_h"] * s["stride_w"])
            loop = FEW_TAP * s["channels"] * taps * -(-s["filters"] // WARP)
            cycles = warps * (FEW_START + loop) / (4 * MULTIPROCESSORS)
        cycles += self.few * FEW_POSITION / (4 * MULTIPROCESSORS)
        return cycles / CYCLES_PER_MICROSECOND


class Launches(KernelBackend):
    """Takes down the launches that it is asked for, and does nothing."""

    name = "launches"

    def __init__(self, precision: str) -> None:
        super().__init__(precision)
        self.found: list[Launch] = []

    def address(self, array: Any) -> int:
        return array.ctypes.data

    def run(
        self, kernel: str, tile: Tile, grid: tuple[int, int, int], arguments: list[Any]
    ) -> None:
        self.found.append(launch_of(kernel, tile, grid, arguments))


def launch_of(
    kernel: str, tile: Tile, grid: tuple[int, int, int], arguments: Sequence[Any]
) -> Launch:
    """A launch as `KernelBackend.run` has it, but that a table of jobs is NumPy's."""
    stem, parameters, _ = kernels()[kernel]
    sizes = {
        name: int(value)
        for (name, kind, is_pointer), value in zip(parameters, arguments, strict=True)
        if kind == "int" and not is_pointer
    }
    x, splits, _ = grid
    x -= kernel.endswith("_gradient_totals")  # the block of the totals
    divided, few = [], 0
    if kernel.startswith("conv_weight"):
        divided, few = _divided(arguments[0])
    elif kernel.startswith("dense_weight"):
        jobs = arguments[0].reshape(-1, DENSE_JOB)
        divided = jobs[:, [TILES_OF_JOB, SPLITS, ROWS]].tolist()
    elif stem in WITH_TILES:
        divided = [(x, splits, max(1, depth)) for depth in _depths(kernel, sizes)]
    parts = (
        Part(tiles, splits, -(-depth // (stage_depth(tile) * splits)))
        for tiles, splits, depth in divided
    )
    return Launch(kernel, tile, grid, sizes, tuple(parts), few)


def _divided(jobs: Any) -> tuple[list[tuple[int, int, int]], int]:
    """Tiles, splits and depth of each product in a table of Job (kernels/conv.cu), and the
    positions of those of few taps, for each 32 filters."""
    found, few = [], 0
    for job in jobs.reshape(-1, CONV_JOB).tolist():
        tiles, splits, small = job[TILES_OF_JOB], job[SPLITS], job[SMALL_IMAGE]
        images, _, _, channels, rows, columns, filters, taps_h, taps_w = job[10:19]
        if small and has_few_taps(taps_h, taps_w, channels):
            few += images * rows * columns * -(-filters // WARP)
        elif small:
            found.append((tiles, splits, images * rows * columns))
    return found, few


def _depths(kernel: str, size: dict[str, int]) -> list[int]:
    """How deep a matrix product's contraction is, or each phase's."""
    if kernel == "dense_latent_forward":
        return [size["d"]]
    if kernel.startswith("dense_input_gradient") or kernel == "dense_latent_backward":
        return [size["o"]]
    if kernel.startswith("dense"):
        return [size["i"]]
    if kernel.startswith(("conv2d_forward", "conv_transpose2d_input_gradient")):
        return [size["taps_h"] * size["taps_w"] * size["channels"]]
    down, across = (
        [-(-(size[f"taps_{axis}"] - first) // stride) for first in range(stride)]
        for axis in "hw"
        for stride in [size[f"stride_{axis}"]]
    )
    return [h * w * size["filters"] for h in down for w in across]


def step_launches(case: Case, precision: str = "fp32") -> list[Launch]:
    """The launches of a training step."""
    backend = Launches(precision)
    Trainer(case.model.to(backend), case.splits, case.training).step()
    return backend.found


def counted_cases(batch: int | None = None) -> list[Case]:
    """The steps that are timed, but once where only the images differ."""
    return [case for case in step_cases(batch, images=1) if RANDOM not in case.name]
