"""What a training step is on a GPU, counted without one: its launches, and the time of its matrix
products by the instructions of a stage and the estimate by which they are divided."""

from typing import Any, NamedTuple

from minivae.backends.kernel_arguments import WARP, kernels
from minivae.backends.kernel_backend import KernelBackend
from minivae.backends.tiling import (
    MULTIPROCESSORS,
    adding_time,
    blocks_in_turn,
    stage_depth,
)
from minivae.kernels import MEDIUM, WITH_TILES, Tile
from minivae.train import Trainer

from .cases import RANDOM, Case, step_cases
from .floor import Rates

H100 = Rates(3350, 67_000)
"""Its nominal rates: of memory, and of float32 operations outside the tensor cores."""

CYCLES_PER_MICROSECOND = H100.product_gigaflops * 1e3 / (MULTIPROCESSORS * 4 * WARP * 2)
"""At the clock of those operations, two for each lane of four instructions a cycle: 1983."""


JOB_NUMBERS = 23
"""Of a Job in kernels/conv.cu."""


class Part(NamedTuple):
    """Tiles of a launch, each in so many splits of so many stages."""

    tiles: int
    splits: int
    stages: int

    @property
    def blocks(self) -> int:
        """Of all tiles and splits."""
        return self.tiles * self.splits


class Launch(NamedTuple):
    """A launch of a step, with its sizes by name. One that makes matrix products has parts: its
    phases, or the layers of a group."""

    kernel: str
    tile: Tile
    sizes: dict[str, int]
    parts: tuple[Part, ...]

    @property
    def blocks(self) -> int:
        """Of all parts."""
        return sum(part.blocks for part in self.parts)

    @property
    def stages(self) -> float:
        """Of a block, in the mean."""
        return sum(part.blocks * part.stages for part in self.parts) / max(self.blocks, 1)

    def microseconds(self, instructions: dict[tuple[str, Tile], int]) -> float:
        """Of a matrix product, estimated: four warps issue a stage's instructions, at best four a
        cycle."""
        multiplying = blocks_in_turn(self.blocks) * self.stages
        adding = max(adding_time(self.tile, self.blocks, part.splits) for part in self.parts)
        cycles = multiplying * instructions[self.kernel, self.tile]
        return (cycles + adding * instructions["dense_forward", MEDIUM]) / CYCLES_PER_MICROSECOND


class Launches(KernelBackend):
    """Takes down the launches that it is asked for, and does nothing."""

    name = "launches"

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Launch] = []

    def address(self, array: Any) -> int:
        return array.ctypes.data

    def run(
        self,
        kernel: str,
        tile: Tile,
        grid: tuple[int, int, int],
        block: int,
        arguments: list[Any],
    ) -> None:
        stem, parameters, _ = kernels()[kernel]
        sizes = {
            name: int(value)
            for (name, kind, is_pointer), value in zip(parameters, arguments, strict=True)
            if kind == "int" and not is_pointer
        }
        x, splits, _ = grid
        x -= kernel == "dense_input_gradient_totals"  # the block of the totals
        if kernel.startswith("conv_weight"):
            divided = _divided(arguments[0])
        elif stem in WITH_TILES:
            divided = [(x, splits, depth) for depth in _depths(kernel, sizes)]
        else:
            divided = []
        parts = (
            Part(tiles, splits, -(-depth // (stage_depth(tile) * splits)))
            for tiles, splits, depth in divided
        )
        self.found.append(Launch(kernel, tile, sizes, tuple(parts)))


def _divided(jobs: Any) -> list[tuple[int, int, int]]:
    """Tiles, splits and depth of each product in a table of Job (kernels/conv.cu)."""
    found = []
    for job in jobs.reshape(-1, JOB_NUMBERS).tolist():
        _, small, _, _, _, _, tiles, splits, _, _, images, _, _, _, rows, columns, *_ = job
        if small:
            found.append((tiles, splits, images * rows * columns))
    return found


def _depths(kernel: str, size: dict[str, int]) -> list[int]:
    """How deep a matrix product's contraction is, or each phase's."""
    if kernel.startswith("dense_weight"):
        return [size["n"]]
    if kernel == "dense_latent_forward":
        return [size["d"]]
    if kernel.startswith("dense_input_gradient") or kernel == "dense_latent_backward":
        return [size["o"]]
    if kernel.startswith("dense"):
        return [size["i"]]
    if kernel in ("conv2d_forward", "conv_transpose2d_input_gradient"):
        return [size["taps_h"] * size["taps_w"] * size["channels"]]
    down, across = (
        [-(-(size[f"taps_{axis}"] - first) // stride) for first in range(stride)]
        for axis in "hw"
        for stride in [size[f"stride_{axis}"]]
    )
    return [h * w * size["filters"] for h in down for w in across]


def step_launches(case: Case) -> list[Launch]:
    """The launches of a training step."""
    backend = Launches()
    Trainer(case.model.to(backend), case.splits, case.training).step()
    return backend.found


def counted_cases(batch: int | None = None) -> list[Case]:
    """The steps that are timed, but once where only the images differ."""
    return [case for case in step_cases(batch, images=1) if RANDOM not in case.name]
