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

DEPTH = 16
"""DEPTH of kernels/tile.cuh."""

FAN = 12
"""FAN of kernels/tile.cuh."""

FETCHED = 18
"""FETCHED of kernels/tile.cuh."""

LEVELS = 3
"""Of the tree that adds up as many splits as there can be: FAN ** LEVELS are more."""

# What `tiles_of` weighs, in stages of a tile of 64 x 64: 716 instructions of each of four warps
# (counted: kernels/README.md), and 0.41 us at four a cycle and 1.755 GHz. One of TF32 is shorter,
# but divided alike: the order in which sums are added does not depend on the precision.

STAGE_TIME = {SMALL: 0.6, Tile(128, 16): 0.7, Tile(128, 32): 1.1, MEDIUM: 1, LARGE: 5 / 3}
"""What a stage of a tile takes: by its instructions in float32 and TF32 (kernels/README.md)."""

LONE_SLOWDOWN = 1.45
"""How many times as long it takes where a block has a multiprocessor alone, and no other issues
while it waits. Estimated from the latencies of its loads and barriers."""

ARRIVAL_TIME = 1.5
"""What it takes until the last block of some knows that it is. Estimated: 0.6 us for a fence, an
atomic addition and two barriers."""

TRIP_TIME = 1.35
"""The time to add up as many results as a block has in flight. Estimated: 0.55 us for the trip to
the L2 cache."""

PASSING_TIME = 1.8e-6
"""A number's time through the L2 cache, shared by all blocks: 4 bytes at 5.5 TB/s
(estimated)."""

EXPOSED_SHARE = 1 / 3
"""The share of operands' PASSING_TIME not hidden behind multiplications: little in float32, most
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


def blocks_in_turn(blocks: int) -> float:
    """How many times as long a launch takes as each of its blocks would, were others to issue
    whenever it waits: all wait for the multiprocessor that has most blocks."""
    return max(LONE_SLOWDOWN, -(-blocks // MULTIPROCESSORS))


def _tree_time(splits: int, at_once: int) -> float:
    """How long it takes to add up the splits' results, so many at once, over all levels."""
    if splits == 1:
        return 0
    trips = -(-min(splits, FAN) // at_once)
    return ARRIVAL_TIME + TRIP_TIME * trips + _tree_time(-(-splits // FAN), at_once)


def adding_time(tile: Tile, blocks: int, splits: int) -> float:
    """What splitting costs: the adding up of a tile's results, and the way of all to and from the
    L2 cache."""
    if splits == 1:
        return 0
    at_once = FETCHED // -(-result_size(tile) // (4 * BLOCK))
    return _tree_time(splits, at_once) + PASSING_TIME * 2 * result_size(tile) * blocks


def most_splits(tile: Tile, stages: int) -> int:
    """Into how many parts a contraction of so many stages may be split: none is below 64 deep."""
    if tile == LARGE:
        return 1
    return max(1, min(stages * stage_depth(tile) // 64, RESIDENT[tile] * MULTIPROCESSORS))


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
    tiles: Sequence[Tile], products: Sequence[Product]
) -> tuple[float, Tile, tuple[int, ...]]:
    found = []
    for tile in tiles:
        numbers = [tile_count(tile, product.rows, product.columns) for product in products]
        stages = [-(-product.depth // stage_depth(tile)) for product in products]
        brought = sum(n * s for n, s in zip(numbers, stages, strict=True)) * stage_size(tile)
        deepest = max(*stages, 1)
        for parts in range(1, most_splits(tile, deepest) + 1):
            longest = -(-deepest // parts)
            splits = tuple(max(1, -(-count // longest)) for count in stages)
            blocks = sum(n * s for n, s in zip(numbers, splits, strict=True))
            if max(splits) > 1 and blocks > RESIDENT[tile] * MULTIPROCESSORS:
                break
            multiplying = blocks_in_turn(blocks) * STAGE_TIME[tile] * longest
            adding = max(adding_time(tile, blocks, count) for count in splits)
            bringing = EXPOSED_SHARE * PASSING_TIME * brought
            found.append((multiplying + bringing + adding, tile, splits))
    return min(found)


def tiles_of_group(stem: str, products: Sequence[Product]) -> tuple[Tile, tuple[int, ...]]:
    """How a launch of `stem`, which makes these products, is divided, so that it takes least time
    by the estimate: the tile, and each product's splits, with which all blocks take about as long.

    Small tiles and splits occupy more multiprocessors. But small tiles bring more bytes for their
    multiplications, and the results of splits have to be added up.
    """
    _, tile, splits = _fastest(WITH_TILES[stem], tuple(products))
    return tile, splits


class Tiles(NamedTuple):
    """How a launch's matrix products are divided: tile, number of tiles, splits of the
    contraction."""

    tile: Tile
    number: int
    splits: int


def tiles_of(stem: str, sizes: Sequence[tuple[int, int]], depth: int) -> Tiles:
    """`tiles_of_group` of matrices of these rows and columns, with contractions of one depth."""
    tile, splits = tiles_of_group(stem, [Product(*size, depth) for size in sizes])
    return Tiles(tile, sum(tile_count(tile, *size) for size in sizes), splits[0])
