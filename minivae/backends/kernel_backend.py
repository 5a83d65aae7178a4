"""The table as launches of the CUDA C++ kernels in `kernels/`, whoever runs them: the GPU (`cuda`)
or a compiler for the CPU (`emulated`).

Types, contiguity and the number of arguments are checked in one place, `launch`, against the
kernel's own declaration. float32 only: float64, which gradient checks use, is the reference's.
"""

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from ..kernels import LARGE, MEDIUM, SMALL, STEMS, TILES, WITH_TILES, Tile, source
from ..ops.activations import IDENTITY, KINDS, Activation
from ..ops.batch import BINARIZATIONS
from ..ops.conv import ConvGeometry
from ..ops.philox import Noise
from .reference import Call, ReferenceBackend

POINTERS = {
    "float": np.float32,
    "double": np.float64,
    "int": np.int32,
    "long long": np.int64,
    "unsigned char": np.uint8,
}
SCALARS = {
    "int": np.int32,
    "float": np.float32,
    "unsigned int": np.uint32,
    "unsigned long long": np.uint64,
}
WARP = 32
BLOCK = 128
"""Threads of a block, unless a kernel is in THREADS."""

THREADS = {
    "advance_state": 1,
    "calibrate_gaussian_variance": 512,
    "capacity_totals": 512,
    "elbo_totals": 512,
}

MULTIPROCESSORS = 132
"""Of an H100 or H200. A constant, so that sums are added up in the same order on every GPU."""

RESIDENT = {tile: 4 if tile == SMALL else 2 if tile == LARGE else 3 for tile in TILES}
"""Blocks that a multiprocessor has room for: BLOCKS of kernels/tile.cuh, which the compiler keeps
to."""

LARGEST_GRID = 1024
"""Blocks over a flat buffer, whose kernels stride: enough to fill any GPU."""

DEPTH = 16
"""DEPTH of kernels/tile.cuh."""

FAN = 12
"""FAN of kernels/tile.cuh."""

FETCHED = 18
"""FETCHED of kernels/tile.cuh."""

LEVELS = 3
"""Of the tree that adds up as many splits as there can be: FAN ** LEVELS are more."""

# What `tiles_of` weighs, in stages of a tile of 64 x 64: 717 instructions of each of four warps
# (counted: kernels/README.md), and 0.41 us at four a cycle and 1.755 GHz. One of TF32 is shorter,
# but divided alike: the order in which sums are added does not depend on the precision.

STAGE_TIME = {SMALL: 0.6, Tile(128, 16): 0.7, Tile(128, 32): 1.1, MEDIUM: 1, LARGE: 5 / 3}
"""What a stage of a tile takes: by its instructions in float32 and TF32 (kernels/README.md)."""

LONE = 1.45
"""How many times as long it takes where a block has a multiprocessor alone, and no other issues
while it waits. Estimated from the latencies of its loads and barriers."""

ARRIVED = 1.5
"""What it takes until the last block of some knows that it is. Estimated: 0.6 us for a fence, an
atomic addition and two barriers."""

TRIP = 1.35
"""What adding up as many results takes as a block asks for at once. Estimated: 0.55 us for the trip
to the second-level cache."""

PASSED = 1.8e-6
"""What a number takes of all blocks' time to pass the second-level cache: 4 bytes at 5.5 TB/s
(estimated)."""

EXPOSED = 1 / 3
"""The share of it that is not hidden behind multiplications: little in float32, most of it in TF32.
Estimated."""

LARGEST_FUSED_ROWS = 2**18
"""Images times columns of tiles up to which a loss is fused into the decoder's last layer."""

CLIP_PARTIALS = 256

FUSED_LOSSES = {
    ("dense_forward", "bernoulli_loss", "elbo_totals"): "dense_bernoulli_elbo",
    ("dense_forward", "squared_error_loss", "elbo_totals"): "dense_squared_error_elbo",
}

_DECLARATION = re.compile(
    r'extern "C" __global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(([^)]*)\)'
)


class Kernel(NamedTuple):
    """A kernel's source file, its parameters' (name, type, whether it is a pointer), and how many
    threads a block has."""

    stem: str
    parameters: tuple[tuple[str, str, bool], ...]
    threads: int


def declarations(text: str) -> dict[str, tuple[tuple[str, str, bool], ...]]:
    """The parameters of each kernel that a source declares."""
    found = {}
    for name, parameters in _DECLARATION.findall(text):
        parsed = []
        for parameter in parameters.split(","):
            words = parameter.replace("*", " * ").replace("__restrict__", " ").split()
            base = " ".join(word for word in words[:-1] if word not in ("const", "*"))
            parsed.append((words[-1], base, "*" in words))
        found[name] = tuple(parsed)
    return found


@cache
def kernels() -> dict[str, Kernel]:
    """Every kernel by its name."""
    return {
        name: Kernel(stem, parameters, THREADS.get(name, BLOCK))
        for stem in STEMS
        for name, parameters in declarations(source(stem)).items()
    }


def _blocks(threads: int) -> int:
    return -(-threads // BLOCK)


def _code(activation: Activation) -> tuple[int, float]:
    return KINDS.index(activation.kind), activation.slope


def _noise(noise: Noise) -> tuple[int, int]:
    return noise.seed & 0xFFFFFFFFFFFFFFFF, noise.stream


def _images(large: Any, small: Any, w: Any, geometry: ConvGeometry) -> tuple[int, ...]:
    """The sizes that every convolution kernel takes."""
    n, height, width, channels = large.shape
    _, rows, columns, filters = small.shape
    return (n, height, width, channels, rows, columns, filters, *w.shape[:2], *geometry)


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
    return max(LONE, -(-blocks // MULTIPROCESSORS))


def _tree_time(splits: int, at_once: int) -> float:
    """How long it takes to add up the splits' results, so many at once, over all levels."""
    if splits == 1:
        return 0
    trips = -(-min(splits, FAN) // at_once)
    return ARRIVED + TRIP * trips + _tree_time(-(-splits // FAN), at_once)


def adding_time(tile: Tile, blocks: int, splits: int) -> float:
    """What splitting costs: the adding up of a tile's results, and the way of all to and from the
    second-level cache."""
    if splits == 1:
        return 0
    at_once = FETCHED // -(-result_size(tile) // (4 * BLOCK))
    return _tree_time(splits, at_once) + PASSED * 2 * result_size(tile) * blocks


def most_splits(tile: Tile, tiles: int, depth: int) -> int:
    """Into how many parts a contraction of `depth` may be split: none is below 64 deep, and all
    blocks have room."""
    if tile == LARGE:
        return 1
    stages = -(-depth // stage_depth(tile))
    return max(1, min(stages * stage_depth(tile) // 64, RESIDENT[tile] * MULTIPROCESSORS // tiles))


def _count(tile: Tile, rows: int, columns: int) -> int:
    return -(-rows // tile.rows) * -(-columns // tile.columns)


class Tiles(NamedTuple):
    """How a launch's matrix products are divided: tile, number of tiles, splits of the
    contraction."""

    tile: Tile
    number: int
    splits: int


@cache
def _fastest(
    tiles: Sequence[Tile], products: Sequence[tuple[int, int]], depth: int
) -> tuple[float, Tiles]:
    found = []
    for tile in tiles:
        number = sum(_count(tile, *product) for product in products)
        stages = -(-depth // stage_depth(tile))
        passing = EXPOSED * PASSED * stage_size(tile) * number * stages
        for splits in range(1, most_splits(tile, max(number, 1), depth) + 1):
            blocks = number * splits
            multiplying = blocks_in_turn(blocks) * STAGE_TIME[tile] * -(-stages // splits)
            time = multiplying + passing + adding_time(tile, blocks, splits)
            found.append((time, Tiles(tile, number, splits)))
    return min(found)


def tiles_of(stem: str, products: Sequence[tuple[int, int]], depth: int) -> Tiles:
    """How a launch of `stem`, which makes matrices of these rows and columns, is divided: so that
    it takes least time by the estimate.

    Small tiles and splits occupy more multiprocessors. But small tiles bring more bytes for their
    multiplications, and the results of splits have to be added up.
    """
    return _fastest(WITH_TILES[stem], tuple(products), depth)[1]


class Product(NamedTuple):
    """The size of a matrix product."""

    rows: int
    columns: int
    depth: int


@cache
def _fastest_group(
    tiles: Sequence[Tile], products: Sequence[Product]
) -> tuple[float, Tile, tuple[int, ...]]:
    found = []
    for tile in tiles:
        numbers = [_count(tile, product.rows, product.columns) for product in products]
        stages = [-(-product.depth // stage_depth(tile)) for product in products]
        deepest = max(*stages, 1)
        brought = sum(n * s for n, s in zip(numbers, stages, strict=True)) * stage_size(tile)
        for parts in range(1, most_splits(tile, 1, deepest * stage_depth(tile)) + 1):
            longest = -(-deepest // parts)
            splits = tuple(max(1, -(-count // longest)) for count in stages)
            blocks = sum(n * s for n, s in zip(numbers, splits, strict=True))
            if max(splits) > 1 and blocks > RESIDENT[tile] * MULTIPROCESSORS:
                break
            multiplying = blocks_in_turn(blocks) * STAGE_TIME[tile] * longest
            adding = max(adding_time(tile, blocks, count) for count in splits)
            found.append((multiplying + EXPOSED * PASSED * brought + adding, tile, splits))
    return min(found)


def tiles_of_group(stem: str, products: Sequence[Product]) -> tuple[Tile, tuple[int, ...]]:
    """`tiles_of` for products of different depths, each of which is split by itself, so that all
    blocks take about as long: the tile, and each product's splits."""
    _, tile, splits = _fastest_group(WITH_TILES[stem], tuple(products))
    return tile, splits


class KernelBackend(ReferenceBackend):
    """The primitives as kernel launches. A subclass says how arrays are made and kernels run.

    `precision` is "fp32", or "tf32" for matrix products on tensor cores with operands rounded to
    TF32 (10 bits of mantissa) and sums in float32.
    """

    def __init__(self, precision: str = "fp32") -> None:
        self.precision = precision
        # A product that is split has no more blocks than have room.
        results = max(RESIDENT[tile] * result_size(tile) for tile in TILES if tile != LARGE)
        self._partials = self.zeros((MULTIPROCESSORS * results,))
        self._arrivals = self.zeros((LEVELS * MULTIPROCESSORS * max(RESIDENT.values()),), np.int32)
        # What the kernels that end in sums over the whole launch need.
        self._row_sums = self.zeros((LARGEST_FUSED_ROWS,))
        self._row_arrivals = self.zeros((1 + LARGEST_FUSED_ROWS,), np.int32)
        self._all_arrivals = self.zeros((1,), np.int32)
        self._norm_partials = self.zeros((CLIP_PARTIALS,))
        self._kept: list[Any] = []
        self._jobs: dict[tuple[int, ...], Any] = {}

    # What a subclass provides

    def run(
        self,
        kernel: str,
        tile: Tile,
        grid: tuple[int, int, int],
        block: int,
        arguments: list[Any],
    ) -> None:
        """Runs a kernel with arguments of the right types. `tile` picks the specialisation of a
        matrix product."""
        raise NotImplementedError

    def address(self, array: Any) -> int:
        """Where an array's first element is in the kernels' memory."""
        raise NotImplementedError

    def launch(
        self,
        kernel: str,
        grid: int | tuple[int, int] | tuple[int, int, int],
        *arguments: Any,
        tile: Tile = MEDIUM,
    ) -> None:
        """Checks the arguments against the kernel's declaration and runs it.

        Raises TypeError on an array of another type than declared, or one that is strided.
        """
        _, parameters, threads = kernels()[kernel]
        sizes = (grid,) if isinstance(grid, int) else tuple(grid)
        x, y, z = (*sizes, 1, 1)[:3]
        if min(x, y, z) < 1:
            return
        passed = [
            _checked_array(kernel, name, argument, POINTERS[kind])
            if is_pointer
            else SCALARS[kind](argument)
            for (name, kind, is_pointer), argument in zip(parameters, arguments, strict=True)
        ]
        self.run(kernel, tile, (x, y, z), threads, passed)

    # Sequences

    def sequence(self, *calls: Call) -> None:
        index = 0
        while index < len(calls):
            for length, fused in (
                (3, self._dense_elbo),
                (3, self._dense_importance_elbo),
                (2, self._dense_latent_backward),
            ):
                if fused(calls[index : index + length]):
                    index += length
                    break
            else:
                calls[index].run(self)
                index += 1

    def _dense_elbo(self, calls: Sequence[Call]) -> bool:
        """A dense layer, its loss and the totals in one launch; False if `calls` are not these."""
        names = tuple(call.primitive for call in calls)
        if names not in FUSED_LOSSES:
            return False
        (x, w, b, y, activation), loss_arguments, totals_arguments = (c.arguments for c in calls)
        output, target, loss, dz, *constants = loss_arguments
        if not self._fusable(x, w, (output, y), (totals_arguments[0], loss)):
            return False
        self._launch_loss(
            *(FUSED_LOSSES[names], x, w, b, y, activation, totals_arguments),
            *(target, loss, dz, *constants[:2]),
            sizes=(len(x),),
        )
        return True

    def _dense_importance_elbo(self, calls: Sequence[Call]) -> bool:
        """A dense layer, the loss of its draws and the totals in one launch, and one more that
        weighs the draws' gradients; False if `calls` are not these."""
        names = tuple(call.primitive for call in calls)
        if names != ("dense_forward", "importance_loss", "elbo_totals"):
            return False
        (x, w, b, y, activation), loss_arguments, totals_arguments = (c.arguments for c in calls)
        logits, target, log_ratio, weights, loss, dlogits, scale, importance = loss_arguments
        if not self._fusable(x, w, (logits, y), (totals_arguments[0], loss)):
            return False
        rows, columns = y.shape
        self._launch_loss(
            *("dense_importance_elbo", x, w, b, y, activation, totals_arguments),
            *(target, log_ratio, weights, loss, dlogits, importance),
            sizes=(len(target), rows // len(target)),
        )
        self.launch("importance_weigh", (rows, _blocks(columns)), dlogits, weights, scale, columns)
        return True

    def _fusable(self, x: Any, w: Any, *pairs: tuple[Any, Any]) -> bool:
        """Whether each pair is one array, and x w is small enough (LARGEST_FUSED_ROWS)."""
        tile = tiles_of("gemm", [(len(x), w.shape[1])], x.shape[1]).tile
        columns_of_tiles = -(-w.shape[1] // tile.columns)
        same = all(self.address(first) == self.address(second) for first, second in pairs)
        return same and len(x) * columns_of_tiles <= LARGEST_FUSED_ROWS

    def _launch_loss(
        self,
        kernel: str,
        x: Any,
        w: Any,
        b: Any,
        y: Any,
        activation: Activation,
        totals_arguments: Sequence[Any],
        *arguments: Any,
        sizes: tuple[int, ...],
    ) -> None:
        """A dense layer with its loss; sizes are those of the batch."""
        _, kl, schedule, state, free_bits, kl_weight, totals = totals_arguments
        (n, i), o = x.shape, w.shape[1]
        tiles = tiles_of("gemm", [(n, o)], i)
        self.launch(
            *(kernel, (tiles.number, tiles.splits)),
            *(x, w, b, y, *_code(activation), *arguments),
            *(kl, schedule, state, free_bits, kl_weight, totals),
            *(self._row_sums, self._row_arrivals, self._partials, self._arrivals),
            *(*sizes, i, o, kl.shape[1]),
            tile=tiles.tile,
        )

    def _dense_latent_backward(self, calls: Sequence[Call]) -> bool:
        """The input gradient of the decoder's first layer and the latent's in one launch; False if
        `calls` are not these."""
        names = tuple(call.primitive for call in calls)
        if names != ("dense_input_gradient", "latent_backward"):
            return False
        (dz, w, _, dx, activation), (head, upstream, kl_weight, dhead, noise, state) = (
            call.arguments for call in calls
        )
        if self.address(dx) != self.address(upstream) or activation != IDENTITY:
            return False
        (n, o), d = dz.shape, w.shape[0]
        self._launch_product(
            *("dense_latent_backward", tiles_of("gemm", [(n, d)], o), 1),
            *(dz, w, head, kl_weight, dhead, *_noise(noise), state, (n, d, o)),
        )
        return True

    # Activations

    def activation_forward(self, z: Any, y: Any, activation: Activation) -> None:
        self.launch("activation_forward", _blocks(z.size), z, y, *_code(activation), z.size)

    def activation_backward(
        self, z: Any | None, y: Any, dy: Any, dz: Any, activation: Activation
    ) -> None:
        code = _code(activation)
        self.launch("activation_backward", _blocks(y.size), z, y, dy, dz, *code, y.size)

    # Matrix products

    def _launch_product(self, kernel: str, tiles: Tiles, phases: int, *arguments: Any) -> None:
        """Launches a kernel whose arguments go on with partials, arrivals and sizes."""
        *operands, sizes = arguments
        self.launch(
            *(kernel, (tiles.number // phases, tiles.splits, phases), *operands),
            *(self._partials, self._arrivals, *sizes),
            tile=tiles.tile,
        )

    def dense_forward(self, x: Any, w: Any, b: Any, y: Any, activation: Activation) -> None:
        (n, i), o = x.shape, w.shape[1]
        tiles = tiles_of("gemm", [(n, o)], i)
        self._launch_product("dense_forward", tiles, 1, x, w, b, y, *_code(activation), (n, i, o))

    def dense_input_gradient(
        self, dz: Any, w: Any, x: Any, dx: Any, activation: Activation
    ) -> None:
        (n, o), i = dz.shape, w.shape[0]
        self._launch_product(
            *("dense_input_gradient", tiles_of("gemm", [(n, i)], o), 1),
            *(dz, w, x, dx, *_code(activation), (n, i, o)),
        )

    def dense_weight_gradient(
        self, x: Any, dz: Any, dw: Any, db: Any, weight: float = 1.0, accumulate: bool = False
    ) -> None:
        call = Call("dense_weight_gradient", (x, dz, dw, db))
        self._launch_group("dense_weight_gradient", [call], dw, dw, weight, accumulate)

    def _launch_group(
        self,
        kernel: str,
        calls: Sequence[Call],
        flat: Any,
        *operands: Any,
        sizes: tuple[int, ...] = (),
    ) -> None:
        """One launch for the dense layers among `calls`, whose gradients are views of `flat`."""
        dense = [call.arguments for call in calls if call.primitive == "dense_weight_gradient"]
        if not dense:
            return
        n = dense[0][0].shape[0]
        shapes = [dw.shape for _, _, dw, _ in dense]
        tile, number, splits = tiles_of("weights", shapes, n)
        table: list[int] = []
        for index, (x, dz, dw, db) in enumerate(dense):
            for name, array in (("x", x), ("dz", dz), ("dw", dw), ("db", db)):
                _checked_array(kernel, name, array, np.float32)
            table += [self.address(x), self.address(dz), _offset(self, dw, flat)]
            first_tile = sum(_count(tile, *shape) for shape in shapes[:index])
            table += [_offset(self, db, flat), x.shape[1], dz.shape[1], first_tile]
        self.launch(
            *(kernel, (number, splits), self._jobs_table(table), *operands),
            *(self._partials, self._arrivals, *sizes, len(dense), n),
            tile=tile,
        )

    def _correlate(
        self, kernel: str, large: Any, small: Any, w: Any, geometry: ConvGeometry, *operands: Any
    ) -> None:
        positions, depth = math.prod(small.shape[:3]), math.prod(w.shape[:3])
        tiles = tiles_of("conv", [(positions, w.shape[3])], depth)
        self._launch_product(kernel, tiles, 1, *operands, _images(large, small, w, geometry))

    def _scatter(
        self, kernel: str, large: Any, small: Any, w: Any, geometry: ConvGeometry, *operands: Any
    ) -> None:
        n, height, width, channels = large.shape
        stride_h, stride_w = geometry.stride_h, geometry.stride_w
        phases = stride_h * stride_w
        pixels = n * -(-height // stride_h) * -(-width // stride_w)
        taps = -(-w.shape[0] // stride_h) * -(-w.shape[1] // stride_w)
        tiles = tiles_of("conv", [(pixels, channels)] * phases, taps * w.shape[3])
        self._launch_product(kernel, tiles, phases, *operands, _images(large, small, w, geometry))

    def _launch_conv_group(
        self,
        kernel: str,
        calls: Sequence[Call],
        flat: Any,
        *operands: Any,
        sizes: tuple[int, ...] = (),
    ) -> None:
        """One launch for the convolutions among `calls`, whose gradients are views of `flat`."""
        conv = [call for call in calls if call.primitive.startswith("conv")]
        if not conv:
            return
        parts = [_conv_operands(kernel, call) for call in conv]
        products = [
            Product(math.prod(dw.shape[:3]), dw.shape[3], math.prod(small.shape[:3]))
            for _, small, dw, *_ in parts
        ]
        tile, splits = tiles_of_group("conv", products)
        jobs = _Jobs()
        for part, product, count in zip(parts, products, splits, strict=True):
            tiles = _count(tile, product.rows, product.columns)
            left = tiles * count * result_size(tile) if count > 1 else 0
            jobs.add(*self._tensors(part, flat), (tiles, count), left)
        for part in parts:
            if not part.bias_of_small:
                rows, columns = math.prod(part.large.shape[:3]), part.large.shape[3]
                groups = -(-columns // BLOCK)
                blocks = 2 * MULTIPROCESSORS  # one loads while the other adds
                runs = max(1, min(blocks // groups, rows // 64))
                jobs.add(*self._tensors(part, flat, sums=True), (groups, runs), runs * columns)
        table = self._jobs_table(jobs.table)
        self._grow_workspace(jobs.partials, jobs.arrivals)
        self.launch(
            *(kernel, jobs.blocks, table, *operands),
            *(self._partials, self._arrivals, *sizes, jobs.count),
            tile=tile,
        )

    def _tensors(
        self, part: "_ConvGradients", flat: Any, sums: bool = False
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a job says of its tensors: where they are, and their sizes. With `sums` it is the
        bias of the large image."""
        large, small, dw, db, geometry, bias_of_small = part
        where = (
            *(self.address(large), 0 if sums else self.address(small)),
            *(_offset(self, dw, flat), _offset(self, db, flat), int(bias_of_small)),
        )
        return where, _images(large, small, dw, geometry)

    def _jobs_table(self, table: list[int]) -> Any:
        """A table of jobs in the kernels' memory."""
        key = tuple(table)
        if key not in self._jobs:
            self._jobs[key] = self.asarray(np.array(table, np.int64))
        return self._jobs[key]

    def _grow_workspace(self, partials: int, arrivals: int) -> None:
        """Makes the workspaces at least so large; those before stay, since a step that was captured
        has their addresses."""
        if partials > self._partials.size or arrivals > self._arrivals.size:
            self._kept += [self._partials, self._arrivals]
            self._partials = self.zeros((max(partials, self._partials.size),))
            self._arrivals = self.zeros((max(arrivals, self._arrivals.size),), np.int32)

    def conv2d_forward(
        self, x: Any, w: Any, b: Any, y: Any, geometry: ConvGeometry, activation: Activation
    ) -> None:
        self._correlate("conv2d_forward", x, y, w, geometry, x, w, b, y, *_code(activation))

    def conv2d_input_gradient(
        self, dz: Any, w: Any, x: Any, dx: Any, geometry: ConvGeometry, activation: Activation
    ) -> None:
        code = _code(activation)
        self._scatter("conv2d_input_gradient", x, dz, w, geometry, dz, w, x, dx, *code)

    def conv2d_weight_gradient(
        self,
        x: Any,
        dz: Any,
        dw: Any,
        db: Any,
        geometry: ConvGeometry,
        weight: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        call = Call("conv2d_weight_gradient", (x, dz, dw, db, geometry))
        self._launch_conv_group("conv_weight_gradient", [call], dw, dw, weight, accumulate)

    def conv_transpose2d_forward(
        self, x: Any, w: Any, b: Any, y: Any, geometry: ConvGeometry, activation: Activation
    ) -> None:
        code = _code(activation)
        self._scatter("conv_transpose2d_forward", y, x, w, geometry, x, w, b, y, *code)

    def conv_transpose2d_input_gradient(
        self, dz: Any, w: Any, x: Any, dx: Any, geometry: ConvGeometry, activation: Activation
    ) -> None:
        code = _code(activation)
        self._correlate("conv_transpose2d_input_gradient", dz, x, w, geometry, dz, w, x, dx, *code)

    def conv_transpose2d_weight_gradient(
        self,
        x: Any,
        dz: Any,
        dw: Any,
        db: Any,
        geometry: ConvGeometry,
        weight: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        call = Call("conv_transpose2d_weight_gradient", (x, dz, dw, db, geometry))
        self._launch_conv_group("conv_weight_gradient", [call], dw, dw, weight, accumulate)

    # The latent and the losses

    def latent_forward(self, head: Any, z: Any, kl: Any, noise: Noise, state: Any) -> None:
        n, d = z.shape
        threads = _blocks(n * -(-d // 4))
        self.launch("latent_forward", threads, head, z, kl, *_noise(noise), state, n, d)

    def latent_backward(
        self, head: Any, dz: Any, kl_weight: Any, dhead: Any, noise: Noise, state: Any
    ) -> None:
        n, d = dz.shape
        self.launch(
            *("latent_backward", _blocks(n * -(-d // 4))),
            *(head, dz, kl_weight, dhead, *_noise(noise), state, n, d),
        )

    def importance_latent_forward(
        self, head: Any, z: Any, log_ratio: Any, logvar_factor: float, noise: Noise, state: Any
    ) -> None:
        rows, d = z.shape
        self.launch(
            *("importance_latent_forward", _blocks(WARP * rows), head, z, log_ratio, logvar_factor),
            *(*_noise(noise), state, len(head), rows, d),
        )

    def importance_latent_backward(
        self,
        head: Any,
        dz: Any,
        weights: Any,
        dhead: Any,
        scale: float,
        logvar_factor: float,
        noise: Noise,
        state: Any,
    ) -> None:
        n, d = len(head), dz.shape[1]
        self.launch(
            *("importance_latent_backward", _blocks(WARP * n * -(-d // 4))),
            *(head, dz, weights, dhead),
            *(scale, logvar_factor, *_noise(noise), state, n, len(dz) // n, d),
        )

    def importance_loss(
        self,
        logits: Any,
        x: Any,
        log_ratio: Any,
        weights: Any,
        loss: Any,
        dlogits: Any,
        scale: float,
        importance: bool,
    ) -> None:
        n, m = x.shape
        self.launch(
            *("importance_loss", n, logits, x, log_ratio, weights, loss, dlogits),
            *(scale, importance, len(logits) // n, m),
        )

    def bernoulli_loss(self, logits: Any, x: Any, loss: Any, dlogits: Any, scale: float) -> None:
        n, m = logits.shape
        self.launch("bernoulli_loss", n, logits, x, loss, dlogits, scale, n, m)

    def squared_error_loss(
        self,
        y: Any,
        x: Any,
        loss: Any,
        dz: Any,
        scale: float,
        weight: float,
        activation: Activation,
    ) -> None:
        n, m = y.shape
        code = _code(activation)
        self.launch("squared_error_loss", n, y, x, loss, dz, scale, weight, *code, n, m)

    def elbo_totals(
        self,
        reconstruction: Any,
        kl: Any,
        schedule: Any,
        state: Any,
        free_bits: float,
        kl_weight: Any,
        totals: Any,
    ) -> None:
        self.launch(
            *("elbo_totals", 1, reconstruction, kl, schedule, state),
            *(free_bits, kl_weight, totals, *kl.shape),
        )

    def calibrate_gaussian(self, loss: Any, dz: Any, variance: Any) -> None:
        n, m = dz.shape
        self.launch("calibrate_gaussian_variance", 1, loss, variance, n, m)
        self.launch("calibrate_gaussian", n, loss, dz, variance, n, m)

    def capacity_totals(
        self,
        reconstruction: Any,
        kl: Any,
        schedule: Any,
        state: Any,
        capacity: float,
        capacity_steps: int,
        kl_weight: Any,
        totals: Any,
    ) -> None:
        self.launch(
            *("capacity_totals", 1, reconstruction, kl, schedule, state),
            *(capacity, capacity_steps, kl_weight, totals, *kl.shape),
        )

    # The label

    def gather_labels(self, labels: Any, permutation: Any, state: Any, onehot: Any) -> None:
        blocks = _blocks(onehot.size)
        self.launch("gather_labels", blocks, labels, permutation, state, onehot, *onehot.shape)

    def join_forward(self, x: Any, onehot: Any, y: Any) -> None:
        (rows, m), (n, classes) = x.shape, onehot.shape
        sizes = (rows, rows // n, m, classes)
        self.launch("join_forward", _blocks(y.size), x, onehot, y, *sizes)

    def join_input_gradient(self, dy: Any, x: Any, dx: Any, activation: Activation) -> None:
        (rows, m), classes = x.shape, dy.shape[1] - x.shape[1]
        sizes = (rows, m, classes)
        arguments = (dy, x, dx, *_code(activation), *sizes)
        self.launch("join_input_gradient", _blocks(x.size), *arguments)

    # The optimizer

    def adam_update(
        self,
        p: Any,
        g: Any,
        m: Any,
        v: Any,
        schedule: Any,
        state: Any,
        beta1: float,
        beta2: float,
        epsilon: float,
    ) -> None:
        self.launch(
            *("adam_update", min(_blocks(p.size), LARGEST_GRID), p, g, m, v, schedule, state),
            *(1 - beta1, 1 - beta2, epsilon, p.size),
        )

    def clip_gradient(self, g: Any, max_norm: float, norm: Any) -> None:
        partials = self._norm_partials
        self.launch("clip_gradient_partials", CLIP_PARTIALS, g, partials, g.size)
        blocks = min(_blocks(g.size), LARGEST_GRID)
        self.launch("clip_gradient", blocks, g, max_norm, norm, partials, g.size)

    def weight_gradients(
        self, calls: Sequence[Call], g: Any, weight: float = 1.0, accumulate: bool = False
    ) -> None:
        """One launch for all dense layers, one for all convolutions."""
        self._launch_group("dense_weight_gradient", calls, g, g, weight, accumulate)
        self._launch_conv_group("conv_weight_gradient", calls, g, g, weight, accumulate)

    def optimizer_step(
        self,
        calls: Sequence[Call],
        p: Any,
        g: Any,
        m: Any,
        v: Any,
        schedule: Any,
        state: Any,
        beta1: float,
        beta2: float,
        epsilon: float,
        batch_size: int,
    ) -> None:
        """One launch for all convolutions, one for all dense layers; the last goes on to the next
        step. No gradient is written: the views of `g` only say where each tensor lies in the flat
        buffers."""
        adam = (p, m, v, schedule, state, 1 - beta1, 1 - beta2, epsilon, self._all_arrivals)
        dense = any(call.primitive == "dense_weight_gradient" for call in calls)
        sizes = (0 if dense else batch_size,)
        self._launch_conv_group("conv_weight_update", calls, g, *adam, sizes=sizes)
        self._launch_group("dense_weight_update", calls, g, *adam, sizes=(batch_size,))
        if not calls:
            self.advance_state(state, batch_size)

    # The batch and the state

    def gather_batch(
        self,
        data: Any,
        permutation: Any,
        state: Any,
        x: Any,
        binarization: str,
        noise: Noise,
    ) -> None:
        n, m = x.shape
        kernel = f"gather_batch_{np.dtype(data.dtype).name}"
        if kernel not in kernels():
            raise TypeError(f"data are {data.dtype}, expected uint8 or float32")
        kind = BINARIZATIONS.index(binarization)
        blocks = _blocks(n * -(-m // 4))
        self.launch(kernel, blocks, data, permutation, state, x, kind, *_noise(noise), n, m)

    def advance_state(self, state: Any, batch_size: int) -> None:
        self.launch("advance_state", 1, state, batch_size)


class _ConvGradients(NamedTuple):
    """The tensors of a convolution's gradients, and whether its bias is the small image's."""

    large: Any
    small: Any
    dw: Any
    db: Any
    geometry: ConvGeometry
    bias_of_small: bool


def _conv_operands(kernel: str, call: Call) -> _ConvGradients:
    x, dz, dw, db, geometry = call.arguments
    for name, array in (("x", x), ("dz", dz), ("dw", dw), ("db", db)):
        _checked_array(kernel, name, array, np.float32)
    if call.primitive == "conv2d_weight_gradient":
        return _ConvGradients(x, dz, dw, db, geometry, True)
    return _ConvGradients(dz, x, dw, db, geometry, False)


class _Jobs:
    """The table of a group of convolutions' gradients: Job of kernels/conv.cu."""

    def __init__(self) -> None:
        self.table: list[int] = []
        self.count = self.blocks = self.partials = self.arrivals = 0

    def add(
        self,
        tensors: Sequence[int],
        sizes: Sequence[int],
        division: tuple[int, int],
        partials: int,
    ) -> None:
        """A job of so many (tiles, splits), which leave so many numbers in the workspace."""
        self.table += [*tensors, self.blocks, *division, self.partials, self.arrivals, *sizes]
        self.count += 1
        blocks = math.prod(division)
        self.blocks += blocks
        self.partials += -(-partials // 4) * 4  # where a vector may begin
        self.arrivals += LEVELS * blocks


def _offset(backend: KernelBackend, tensor: Any, flat: Any) -> int:
    """The index in a flat buffer at which a view of it begins."""
    return (backend.address(tensor) - backend.address(flat)) // 4


def _checked_array(kernel: str, name: str, array: Any, dtype: DTypeLike) -> Any:
    if array is None:
        return None
    if array.dtype != dtype or not array.flags.c_contiguous:
        layout = "a C-contiguous" if array.flags.c_contiguous else "a strided"
        raise TypeError(
            f"{kernel}: {name} is {layout} array of {array.dtype}, shape {array.shape}; expected a "
            f"C-contiguous one of {np.dtype(dtype)}"
        )
    return array
