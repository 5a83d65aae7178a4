"""Chooses the tile size of a launch of matrix products, and into how many splits to cut their
contractions, by an estimate of the time that each division takes (kernels/README.md)."""

from collections.abc import Sequence
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

FETCHED = 18
"""FETCHED of kernels/tile.cuh."""

LEVELS = 3
"""Of the tree that adds up as many splits as there can be: FAN ** LEVELS are more."""

# What `tiles_of` weighs, in cycles.

CYCLES_PER_MICROSECOND = 1983
"""At the clock of an H100's 67 TFLOP/s: of its 132 multiprocessors, 128 lanes each, with two
operations a cycle."""

STAGE_CYCLES = {
    ("fp32", "gemm"): {SMALL: 372, MEDIUM: 715, LARGE: 1266},
    ("fp32", "weights"): {SMALL: 408, MEDIUM: 729, LARGE: 1314},
    ("fp32", "conv"): {
        SMALL: 450,
        Tile(128, 16): 550,
        Tile(128, 32): 830,
        MEDIUM: 770,
        LARGE: 1370,
    },
    ("tf32", "gemm"): {SMALL: 114, MEDIUM: 148, LARGE: 219},
    ("tf32", "weights"): {SMALL: 132, MEDIUM: 172, LARGE: 244},
    ("tf32", "conv"): {SMALL: 195, Tile(128, 16): 255, Tile(128, 32): 280, MEDIUM: 215, LARGE: 335},
}
"""What a stage takes, by precision, source and tile: about as many as it has instructions
(kernels/README.md), for four warps issue four a cycle."""

LONE_SLOWDOWN = {"fp32": 1.45, "tf32": 2.5}
"""How many times as long it takes where a block has a multiprocessor alone, and no other issues
while it waits. Estimated from the latencies of its loads, products and barriers."""

ARRIVAL_CYCLES = 0.6 * CYCLES_PER_MICROSECOND
"""What it takes until the last block of some knows that it is: a fence, an atomic addition and two
barriers. Estimated."""

TRIP_CYCLES = 0.55 * CYCLES_PER_MICROSECOND
"""The time to add up as many results as a block has in flight: the trip to the L2 cache.
Estimated."""

PASSING_CYCLES = 4 / 5.5e6 * CYCLES_PER_MICROSECOND
"""A number's time through the L2 cache, shared by all blocks: 4 bytes at 5.5 TB/s. Estimated."""

EXPOSED_SHARE = {"fp32": 1 / 3, "tf32": 2 / 3}
"""The share of operands' PASSING_CYCLES not hidden behind multiplications: little in float32, most
in TF32. Estimated."""


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


def _tree_cycles(splits: int, at_once: int) -> float:
    """How long it takes to add up the splits' results, so many at once, over all levels."""
    if splits == 1:
        return 0
    trips = -(-min(splits, FAN) // at_once)
    return ARRIVAL_CYCLES + TRIP_CYCLES * trips + _tree_cycles(-(-splits // FAN), at_once)


def _adding_cycles(tile: Tile, blocks: int, splits: int) -> float:
    """What splitting costs: the adding up of a tile's results, and the way of all to and from the
    L2 cache."""
    if splits == 1:
        return 0
    at_once = FETCHED // -(-result_size(tile) // (4 * BLOCK))
    return _tree_cycles(splits, at_once) + PASSING_CYCLES * 2 * result_size(tile) * blocks


def launch_cycles(precision: str, tile: Tile, parts: Sequence[Part], stage_cycles: float) -> float:
    """How long a launch takes, estimated.

    It ends with the multiprocessor that has most blocks, which issue all their stages' instructions
    in turn, unless they are too few to issue while others wait. To the multiplications come the
    operands' way through the L2 cache, as far as nothing hides it, and the adding up of splits.
    """
    blocks = sum(part.blocks for part in parts)
    stages = sum(part.blocks * part.stages for part in parts)
    in_turn = -(-blocks // MULTIPROCESSORS) * stages / max(blocks, 1)
    at_once = max(in_turn / RESIDENT[tile], *(part.stages for part in parts))
    multiplying = max(in_turn, LONE_SLOWDOWN[precision] * at_once) * stage_cycles
    bringing = EXPOSED_SHARE[precision] * PASSING_CYCLES * stage_size(tile) * stages
    adding = max(_adding_cycles(tile, blocks, part.splits) for part in parts)
    return multiplying + bringing + adding


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


@cache
def _fastest(
    precision: str, stem: str, tiles: Sequence[Tile], products: Sequence[Product], taken: int
) -> tuple[float, Tile, tuple[int, ...]]:
    found = []
    for tile in tiles:
        room = RESIDENT[tile] * MULTIPROCESSORS - taken if taken else MOST_SPLIT
        numbers = [tile_count(tile, product.rows, product.columns) for product in products]
        stages = [max(1, -(-product.depth // stage_depth(tile))) for product in products]
        for most in range(1, most_splits(tile, max(stages)) + 1):
            longest = -(-max(stages) // most)
            parts = [
                Part(number, -(-count // longest), min(count, longest))
                for number, count in zip(numbers, stages, strict=True)
            ]
            splits = tuple(part.splits for part in parts)
            blocks = sum(part.blocks for part in parts)
            if max(splits) > 1 and blocks > room:
                break
            cycles = launch_cycles(precision, tile, parts, STAGE_CYCLES[precision, stem][tile])
            found.append((cycles, tile, splits))
    return min(found)


def tiles_of_group(
    precision: str, stem: str, products: Sequence[Product], taken: int = 0
) -> tuple[Tile, tuple[int, ...]]:
    """How a launch of `stem`, which makes these products, is divided, so that it takes least time
    by the estimate: the tile, and each product's splits, with which all blocks take about as long.

    Small tiles and splits occupy more multiprocessors. But small tiles bring more bytes for their
    multiplications, and the results of splits have to be added up. `taken` short blocks run beside
    those of the products, which leave them room.
    """
    _, tile, splits = _fastest(precision, stem, WITH_TILES[stem], tuple(products), taken)
    return tile, splits


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
