"""Chooses the tile size of a launch of matrix products, and into how many splits to cut their
contractions, by an estimate of the time that each division takes (kernels/README.md)."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from ..kernels import LARGE, MEDIUM, SMALL, TILES, WITH_TILES, Tile

BLOCK = 128
"""Threads of a block: THREADS of kernels/tile.cuh."""

MULTIPROCESSORS = 132
"""Of an H100 or H200. A constant, so that sums are added up in the same order on every GPU."""

RESIDENT = {tile: 4 if tile == SMALL else 2 if tile == LARGE else 3 for tile in TILES}
"""Blocks that a multiprocessor has room for: BLOCKS of kernels/tile.cuh, which the compiler keeps
to."""

MOST_SPLIT = 4 * MULTIPROCESSORS
"""Blocks of a launch whose products are split, at the most: their results have to fit in a
workspace."""

DEPTH = 16
"""DEPTH of kernels/tile.cuh."""

FAN = 12
"""FAN of kernels/tile.cuh."""

LEVELS = 3
"""Of the tree that adds up as many splits as there can be: FAN ** LEVELS are more."""

# What `division` weighs, in cycles. What is neither counted nor called estimated was fitted to the
# times of launches on an H200 (kernels/README.md).

CYCLES_PER_MICROSECOND = 1983
"""At the clock of an H100's 67 TFLOP/s: of its 132 multiprocessors, 128 lanes each, with two
operations a cycle."""

STAGE_INSTRUCTIONS = {
    ("fp32", "gemm"): {SMALL: 347, MEDIUM: 690, LARGE: 1239},
    ("fp32", "weights"): {SMALL: 385, MEDIUM: 733, LARGE: 1307},
    ("fp32", "conv"): {
        Tile(128, 16): 552,
        Tile(128, 32): 837,
        SMALL: 439,
        MEDIUM: 772,
        LARGE: 1394,
    },
    ("tf32", "gemm"): {SMALL: 93, MEDIUM: 135, LARGE: 205},
    ("tf32", "weights"): {SMALL: 113, MEDIUM: 164, LARGE: 239},
    ("tf32", "conv"): {Tile(128, 16): 255, Tile(128, 32): 278, SMALL: 168, MEDIUM: 210, LARGE: 337},
}
"""What a warp executes for a stage, by precision, source and tile, about (kernels/README.md)."""

PACE = {"fp32": (1.6, 0.9), "tf32": (3.9, 0.7)}
"""Cycles that an instruction of a stage takes where a multiprocessor has one block, and how many
more with each further one: mostly waits."""

FINISH_CYCLES = {"gemm": 500, "weights": 1000, "conv": 600}
"""What each of a thread's runs takes in the epilogue."""

FINISH_SHARE = 0.2
"""How much longer that is with each further block of a multiprocessor, compared to one."""

LAUNCH_CYCLES = 2.2 * CYCLES_PER_MICROSECOND
"""From a launch's start to its first product, and from its end to the start of the next."""

LEAVE_CYCLES, SPLIT_CYCLES = 250, 360
"""What splitting costs on each level of the tree: for each of a thread's runs in a result, and for
each result that is added up."""

PASSING_CYCLES = 4 / 5.5e6 * CYCLES_PER_MICROSECOND
"""A number's time through the L2 cache, shared by all blocks: 4 bytes at an estimated 5.5 TB/s."""

EXPOSED_SHARE = {"fp32": 1 / 2, "tf32": 1 / 3}
"""The share of operands' PASSING_CYCLES not hidden behind multiplications."""


def stage_depth(tile: Tile) -> int:
    """How deep a stage of a tile is: STAGE_DEPTH of kernels/tile.cuh."""
    return 2 * DEPTH if tile == SMALL else DEPTH


def stage_size(tile: Tile) -> int:
    """Numbers that a stage brings: STAGE of kernels/tile.cuh."""
    return (tile.rows + tile.columns) * stage_depth(tile)


def result_size(tile: Tile) -> int:
    """Numbers that a split of a tile leaves for the others: RESULT of kernels/tile.cuh."""
    return (tile.rows + 1) * tile.columns


class Part(NamedTuple):
    """Tiles of a launch, each in so many splits of so many stages."""

    tiles: int
    splits: int
    stages: int

    @property
    def blocks(self) -> int:
        """Of all tiles and splits."""
        return self.tiles * self.splits


def _runs(numbers: int) -> int:
    """How many of these numbers' runs of four a thread has."""
    return -(-numbers // (4 * BLOCK))


def _adding_cycles(tile: Tile, splits: int) -> float:
    """How long it takes to add up the splits' results, over all levels."""
    if splits == 1:
        return 0
    level = LEAVE_CYCLES * _runs(result_size(tile)) + SPLIT_CYCLES * min(splits, FAN)
    return level + _adding_cycles(tile, -(-splits // FAN))


def launch_cycles(
    precision: str, stem: str, tile: Tile, parts: Sequence[Part], instructions: float
) -> float:
    """How long a launch of `stem` takes, estimated from a stage's instructions.

    It ends with the multiprocessor that has most blocks, as many at once as it has room for. Each
    scheduler issues the stages of its warps, the faster the more of them there are, and then the
    epilogues. To these come the operands' way through the L2 cache, as far as nothing hides it, and
    the adding up of splits.
    """
    blocks = sum(part.blocks for part in parts)
    stages = sum(part.blocks * part.stages for part in parts)
    busiest = -(-blocks // MULTIPROCESSORS)
    together = max(1, min(busiest, RESIDENT[tile]))
    alone, further = PACE[precision]
    pace = alone + further * (together - 1)
    in_turn = busiest * stages / max(blocks, 1) / together * pace
    longest = alone * max(part.stages for part in parts)
    runs = -(-busiest // together) * _runs(tile.rows * tile.columns)
    finishing = FINISH_CYCLES[stem] * runs * (1 + FINISH_SHARE * (together - 1))
    bringing = EXPOSED_SHARE[precision] * PASSING_CYCLES * stage_size(tile) * stages
    adding = max(_adding_cycles(tile, part.splits) for part in parts)
    return LAUNCH_CYCLES + max(in_turn, longest) * instructions + finishing + bringing + adding


def most_splits(tile: Tile, stages: int) -> int:
    """Into how many parts a contraction of so many stages may be split: none is below 64 deep."""
    return max(1, min(stages * stage_depth(tile) // 64, MOST_SPLIT))


def tile_count(tile: Tile, rows: int, columns: int) -> int:
    """How many tiles a matrix takes."""
    return -(-rows // tile.rows) * -(-columns // tile.columns)


class Product(NamedTuple):
    """The size of a matrix product."""

    rows: int
    columns: int
    depth: int


class Division(NamedTuple):
    """How a launch of products is divided: its tile, and the tiles, splits and stages of each."""

    tile: Tile
    parts: tuple[Part, ...]


def divisions(
    tiles: Sequence[Tile], products: Sequence[Product], taken: int, most: int
) -> Iterator[Division]:
    """The ways to divide a launch of products, with up to `most` splits of the deepest, so that all
    blocks take about as long. If there are splits, all blocks find room at once beside `taken`
    others, or their results in the workspace."""
    for tile in tiles:
        room = RESIDENT[tile] * MULTIPROCESSORS - taken if taken else MOST_SPLIT
        numbers = [tile_count(tile, product.rows, product.columns) for product in products]
        stages = [max(1, -(-product.depth // stage_depth(tile))) for product in products]
        for splits in range(1, min(most, most_splits(tile, max(stages))) + 1):
            longest = -(-max(stages) // splits)
            parts = tuple(
                Part(number, -(-count // min(count, longest)), min(count, longest))
                for number, count in zip(numbers, stages, strict=True)
            )
            if splits > 1 and sum(part.blocks for part in parts) > room:
                break
            yield Division(tile, parts)


@cache
def division(
    precision: str, stem: str, tiles: Sequence[Tile], products: Sequence[Product], taken: int
) -> Division:
    """That of `divisions` which takes least time by the estimate."""

    def cycles(divided: Division) -> float:
        instructions = STAGE_INSTRUCTIONS[precision, stem][divided.tile]
        return launch_cycles(precision, stem, divided.tile, divided.parts, instructions)

    return min(divisions(tiles, products, taken, MOST_SPLIT), key=cycles)


def tiles_of_group(
    precision: str, stem: str, products: Sequence[Product], taken: int = 0
) -> tuple[Tile, tuple[int, ...]]:
    """How a launch of `stem`, which makes these products, is divided: the tile, and each product's
    splits.

    Small tiles and splits occupy more multiprocessors. But small tiles bring more bytes for their
    multiplications, and the results of splits have to be added up. `taken` short blocks run beside
    those of the products, which leave them room.
    """
    tile, parts = division(precision, stem, WITH_TILES[stem], tuple(products), taken)
    return tile, tuple(part.splits for part in parts)


class Tiles(NamedTuple):
    """How a launch's matrix products are divided: tile, number of tiles, splits of the
    contraction."""

    tile: Tile
    number: int
    splits: int


def tiles_of(precision: str, stem: str, sizes: Sequence[tuple[int, int]], depth: int) -> Tiles:
    """`tiles_of_group` of matrices of these rows and columns, with contractions of one depth."""
    tile, splits = tiles_of_group(precision, stem, [Product(*size, depth) for size in sizes])
    return Tiles(tile, sum(tile_count(tile, *size) for size in sizes), splits[0])
