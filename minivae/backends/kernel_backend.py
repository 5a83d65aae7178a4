"""The table as launches of the CUDA C++ kernels in `kernels/`, whoever runs them: the GPU (`cuda`)
or a compiler for the CPU (`emulated`).

float32 only: float64, which gradient checks use, is the reference's.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..kernels import MEDIUM, TILES, Tile
from ..ops.activations import IDENTITY, Activation
from ..ops.batch import BINARIZATIONS
from ..ops.conv import ConvGeometry
from ..ops.philox import Noise
from .kernel_arguments import LARGEST_INT, WARP, checked_arguments, checked_array, kernels
from .reference import Call, ReferenceBackend
from .tiling import (
    BLOCK,
    LEVELS,
    MOST_SPLIT,
    MULTIPROCESSORS,
    RESIDENT,
    Product,
    Tiles,
    result_size,
    tile_count,
    tiles_of,
    tiles_of_group,
)

LARGEST_GRID = 1024
"""Blocks over a flat buffer, whose kernels stride: enough to fill any GPU."""

LARGEST_FUSED_ROWS = 2**19
"""Images times columns of tiles up to which a loss is fused into the decoder's last layer."""

LARGEST_FUSED_DRAWS = 256
"""Draws of an image up to which a bound's loss is too: MOST_WEIGHED of kernels/importance.cu."""

LARGEST_FUSED_LATENT = 64
"""Dimensions up to which z is drawn within the decoder's first layer, by each column of tiles: the
contraction of so few is not split."""

MOST_DRAWN_ANEW = 2**19
"""Numbers that all columns of tiles may draw together: a microsecond of a GPU's instructions, half
of what the launch that they save takes (both estimated)."""

FEW_CHANNELS, PIXEL_TEAM, PIXELS_OF_A_TEAM = 4, 8, 4
"""FEW_CHANNELS, TEAM and PIXELS of kernels/conv_few_channels.cu."""

FEW_TAPS, FEW_FILTERS, POSITIONS_AT_ONCE = 3, 32, 64
"""FEW_TAPS of kernels/conv.cu, the most FEW_FILTERS there, and the positions that a block asks for
before it multiplies."""

CLIP_PARTIALS = 256

FUSED_LOSSES = {
    ("dense_forward", loss, "elbo_totals"): kernel
    for loss, kernel in (
        ("bernoulli_loss", "dense_bernoulli_loss"),
        ("importance_loss", "dense_bernoulli_loss"),
        ("squared_error_loss", "dense_squared_error_loss"),
    )
}
"""Calls that are fused, and the kernel that makes the output and its loss."""


def _primitives(calls: Sequence[Call]) -> tuple[str, ...]:
    return tuple(call.primitive for call in calls)


def has_few_taps(taps_h: int, taps_w: int, channels: int) -> bool:
    """Whether a window is so small that threads have it in registers: has_few_taps of
    kernels/conv.cu."""
    return taps_h <= FEW_TAPS and taps_w * channels <= FEW_TAPS


def _blocks(threads: int) -> int:
    return -(-threads // BLOCK)


def _code(activation: Activation) -> tuple[int, float]:
    return activation.code, activation.slope


def _noise(noise: Noise) -> tuple[int, int]:
    return noise.word, noise.stream


def _images(large: Any, small: Any, w: Any, geometry: ConvGeometry) -> tuple[int, ...]:
    """The sizes that every convolution kernel takes. Raises InputError of more pixels than an int
    counts."""
    n, height, width, channels = large.shape
    _, rows, columns, filters = small.shape
    pixels = n * max(height * width, rows * columns)
    if pixels > LARGEST_INT:
        raise InputError(
            f"a batch has {pixels} pixels in a convolution, expected at most {LARGEST_INT}: use a "
            "smaller one, or --accumulate"
        )
    return (n, height, width, channels, rows, columns, filters, *w.shape[:2], *geometry)


class KernelBackend(ReferenceBackend):
    """The primitives as kernel launches. A subclass says how arrays are made and kernels run.

    `precision` is "fp32", or "tf32" for matrix products on tensor cores with operands rounded to
    TF32 (10 bits of mantissa) and sums in float32. What has few channels or taps stays float32.
    """

    dtypes = ("float32",)

    def __init__(self, precision: str = "fp32") -> None:
        self.precision = precision
        self._partials = self.zeros((MOST_SPLIT * max(map(result_size, TILES)),))
        self._arrivals = self.zeros((LEVELS * MOST_SPLIT,), np.int32)
        # What one launch leaves for the next to add up.
        self._row_sums = self.zeros((LARGEST_FUSED_ROWS,))
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
        arguments: list[Any],
    ) -> None:
        """Runs a kernel with arguments of the right types, in blocks of its threads. `tile` picks
        the specialisation of a matrix product."""
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
        """Runs a kernel; raises what `checked_arguments` does."""
        sizes = (grid,) if isinstance(grid, int) else tuple(grid)
        x, y, z = (*sizes, 1, 1)[:3]
        if min(x, y, z) < 1:
            return
        passed = checked_arguments(kernel, arguments)
        self.run(kernel, tile, (x, y, z), passed)

    # Sequences

    def sequence(self, *calls: Call) -> None:
        left = list(calls)
        while left:
            count = (
                self._dense_loss(left)
                or self._dense_latent_forward(left)
                or self._dense_latent_backward(left)
                or self._conv_totals(left)
            )
            if not count:
                left[0].run(self)
                count = 1
            left = left[count:]

    def _dense_latent_forward(self, calls: Sequence[Call]) -> int:
        """The latent and the decoder's first layer in one launch, if `calls` begin with these and z
        is not drawn too often (LARGEST_FUSED_LATENT, MOST_DRAWN_ANEW). Returns how many calls it
        ran."""
        if _primitives(calls[:2]) != ("latent_forward", "dense_forward"):
            return 0
        (head, z, kl, noise, state), (x, w, b, y, activation) = (c.arguments for c in calls[:2])
        (n, d), o = z.shape, w.shape[1]
        tiles = tiles_of(self.precision, "gemm", [(n, o)], d)
        drawn = n * d * -(-o // tiles.tile.columns)
        if (
            self.address(z) != self.address(x)
            or d > LARGEST_FUSED_LATENT
            or drawn > MOST_DRAWN_ANEW
        ):
            return 0
        self._launch_product(
            *("dense_latent_forward", tiles, 1, head, z, kl, *_noise(noise), state),
            *(w, b, y, *_code(activation), (n, d, o)),
        )
        return 2

    def _dense_loss(self, calls: Sequence[Call]) -> int:
        """A dense layer with its loss in one launch and the totals in another, fused with an input
        gradient if one follows; a launch between them weighs the gradients of several draws. Only
        if `calls` begin with these, within LARGEST_FUSED_ROWS and LARGEST_FUSED_DRAWS. Returns
        how many calls it ran."""
        names = _primitives(calls[:3])
        if names not in FUSED_LOSSES:
            return 0
        (x, w, b, y, activation), scored, totals = (call.arguments for call in calls[:3])
        by_draws = "importance_loss" in names
        if by_draws:
            output, target, log_ratio, weights, loss, dz, scale, importance = scored
            constants = [1.0]
        else:
            output, target, loss, dz, *constants = scored
        (n, i), o, images = x.shape, w.shape[1], len(target)
        tiles = tiles_of(self.precision, "gemm", [(n, o)], i)
        columns_of_tiles, draws = -(-o // tiles.tile.columns), n // images
        if n * columns_of_tiles > LARGEST_FUSED_ROWS or draws > LARGEST_FUSED_DRAWS:
            return 0
        if (self.address(output), self.address(loss)) != (self.address(y), self.address(totals[0])):
            return 0
        self._launch_product(
            *(FUSED_LOSSES[names], tiles, 1, x, w, b, y, *_code(activation)),
            *(target, dz, *constants[:2], self._row_sums, (draws, n, i, o)),
        )
        if by_draws:
            self.launch(
                *("importance_weigh", (images, _blocks(o)), dz, self._row_sums, log_ratio),
                *(weights, loss, scale, importance, columns_of_tiles, images, draws, o),
            )
            columns_of_tiles = 0
        if _primitives(calls[3:4]) == ("dense_input_gradient",):
            self._input_gradient_beside_totals(calls[3].arguments, totals, columns_of_tiles)
            return 4
        if columns_of_tiles:
            sums = (self._row_sums, *totals, columns_of_tiles, *totals[1].shape)
            self.launch("elbo_totals_of_tiles", 1, *sums)
        else:
            self.elbo_totals(*totals)
        return 3

    def _input_gradient_beside_totals(
        self, gradient: Sequence[Any], totals: Sequence[Any], columns_of_tiles: int
    ) -> None:
        """`dense_input_gradient` and `elbo_totals` in one launch, which adds up the images' losses
        that columns of tiles left, or finds them added up if `columns_of_tiles` is 0."""
        dz, w, x, dz_below, below = gradient
        loss, kl, *others = totals
        (n, o), i = dz.shape, w.shape[0]
        tiles = tiles_of(self.precision, "gemm", [(n, i)], o)
        self._launch_product(
            *("dense_input_gradient_totals", tiles._replace(number=1 + tiles.number), 1),
            *(dz, w, x, dz_below, *_code(below), self._row_sums, loss, kl, *others),
            (columns_of_tiles, *kl.shape, n, i, o),
        )

    def _conv_totals(self, calls: Sequence[Call]) -> int:
        """The totals and the input gradient of a decoder that ends in a convolution in one launch,
        if `calls` begin with these. Returns how many calls it ran."""
        if _primitives(calls[:2]) != ("elbo_totals", "conv_transpose2d_input_gradient"):
            return 0
        (loss, kl, *others), (dz, w, x, dz_below, geometry, below) = (
            call.arguments for call in calls[:2]
        )
        tiles = self._correlation_tiles(x, w)
        self._launch_product(
            *("conv_transpose2d_input_gradient_totals", tiles._replace(number=1 + tiles.number), 1),
            *(dz, w, x, dz_below, *_code(below), loss, kl, *others),
            (*kl.shape, *_images(dz, x, w, geometry)),
        )
        return 2

    def _dense_latent_backward(self, calls: Sequence[Call]) -> int:
        """The input gradient of the decoder's first layer and the latent's in one launch, if
        `calls` begin with these. Returns how many calls it ran."""
        if _primitives(calls[:2]) != ("dense_input_gradient", "latent_backward"):
            return 0
        (dz, w, _, dz_below, below), (head, upstream, kl_weight, dhead, noise, state) = (
            call.arguments for call in calls[:2]
        )
        if self.address(dz_below) != self.address(upstream) or below != IDENTITY:
            return 0
        (n, o), d = dz.shape, w.shape[0]
        self._launch_product(
            *("dense_latent_backward", tiles_of(self.precision, "gemm", [(n, d)], o), 1),
            *(dz, w, head, kl_weight, dhead, *_noise(noise), state, (n, d, o)),
        )
        return 2

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
        tiles = tiles_of(self.precision, "gemm", [(n, o)], i)
        self._launch_product("dense_forward", tiles, 1, x, w, b, y, *_code(activation), (n, i, o))

    def dense_input_gradient(
        self, dz: Any, w: Any, x: Any, dz_below: Any, below: Activation
    ) -> None:
        (n, o), i = dz.shape, w.shape[0]
        self._launch_product(
            *("dense_input_gradient", tiles_of(self.precision, "gemm", [(n, i)], o), 1),
            *(dz, w, x, dz_below, *_code(below), (n, i, o)),
        )

    def dense_weight_gradient(
        self, x: Any, dz: Any, dw: Any, db: Any, fraction: float = 1.0, accumulate: bool = False
    ) -> None:
        call = Call("dense_weight_gradient", x, dz, dw, db)
        self._launch_group("dense_weight_gradient", [call], dw, dw, fraction, accumulate)

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
        products = [Product(x.shape[1], dz.shape[1], len(x)) for x, dz, _, _ in dense]
        tile, splits = tiles_of_group(self.precision, "weights", products)
        jobs = _Jobs(tile)
        for layer, (i, o, n), parts in zip(dense, products, splits, strict=True):
            for name, array in zip(("x", "dz", "dw", "db"), layer, strict=True):
                checked_array(kernel, name, array, np.float32)
            x, dz, dw, db = layer
            offsets = _offset(self, dw, flat), _offset(self, db, flat)
            where = self.address(x), self.address(dz), *offsets, n, i, o
            jobs.add((tile_count(tile, i, o), parts), where)
        self._launch_jobs(kernel, jobs, *operands, sizes=sizes)

    def _launch_jobs(
        self, kernel: str, jobs: "_Jobs", *operands: Any, sizes: tuple[int, ...]
    ) -> None:
        """Launches a kernel of the jobs' blocks, with workspaces that are large enough."""
        table = self._jobs_table(jobs.table)
        self._grow_workspace(jobs.partials, jobs.arrivals)
        self.launch(
            *(kernel, jobs.blocks, table, *operands),
            *(self._partials, self._arrivals, *sizes, jobs.count),
            tile=jobs.tile,
        )

    def _correlate(
        self, kernel: str, large: Any, small: Any, w: Any, geometry: ConvGeometry, *operands: Any
    ) -> None:
        tiles = self._correlation_tiles(small, w)
        self._launch_product(kernel, tiles, 1, *operands, _images(large, small, w, geometry))

    def _correlation_tiles(self, small: Any, w: Any) -> Tiles:
        positions, depth = math.prod(small.shape[:3]), math.prod(w.shape[:3])
        return tiles_of(self.precision, "conv", [(positions, w.shape[3])], depth)

    def _scatter(
        self, kernel: str, large: Any, small: Any, w: Any, geometry: ConvGeometry, *operands: Any
    ) -> None:
        n, height, width, channels = large.shape
        stride_h, stride_w = geometry.stride_h, geometry.stride_w
        phases, sizes = stride_h * stride_w, _images(large, small, w, geometry)
        lines, across = n * -(-height // stride_h), -(-width // stride_w)
        if channels <= FEW_CHANNELS:
            blocks = _blocks(PIXEL_TEAM * lines * -(-across // PIXELS_OF_A_TEAM))
            self.launch(f"{kernel}_few", (blocks, 1, phases), *operands, *sizes)
            return
        taps = -(-w.shape[0] // stride_h) * -(-w.shape[1] // stride_w)
        tiles = tiles_of(
            self.precision, "conv", [(lines * across, channels)] * phases, taps * w.shape[3]
        )
        self._launch_product(kernel, tiles, phases, *operands, sizes)

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
        tile, divisions = _divided(self.precision, parts)
        jobs = _Jobs(tile)
        for part, division in zip(parts, divisions, strict=True):
            jobs.add(division, self._tensors(part, flat))
        for part in parts:
            if not part.bias_of_small:
                rows, columns = math.prod(part.large.shape[:3]), part.large.shape[3]
                groups = -(-columns // BLOCK)
                blocks = 2 * MULTIPROCESSORS  # one loads while the other adds
                runs = max(1, min(blocks // groups, rows // _rows_at_once(columns)))
                jobs.add((groups, runs), self._tensors(part, flat, sums=True), runs * columns)
        self._launch_jobs(kernel, jobs, *operands, sizes=sizes)

    def _tensors(self, part: "_ConvGradients", flat: Any, sums: bool = False) -> tuple[int, ...]:
        """What a job says of its tensors: where they are, and their sizes. With `sums` it is the
        bias of the large image."""
        large, small, dw, db, geometry, bias_of_small = part
        return (
            *(self.address(large), 0 if sums else self.address(small)),
            *(_offset(self, dw, flat), _offset(self, db, flat), int(bias_of_small)),
            *_images(large, small, dw, geometry),
        )

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
        self, dz: Any, w: Any, x: Any, dz_below: Any, geometry: ConvGeometry, below: Activation
    ) -> None:
        code = _code(below)
        self._scatter("conv2d_input_gradient", x, dz, w, geometry, dz, w, x, dz_below, *code)

    def conv2d_weight_gradient(
        self,
        x: Any,
        dz: Any,
        dw: Any,
        db: Any,
        geometry: ConvGeometry,
        fraction: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        call = Call("conv2d_weight_gradient", x, dz, dw, db, geometry)
        self._launch_conv_group("conv_weight_gradient", [call], dw, dw, fraction, accumulate)

    def conv_transpose2d_forward(
        self, x: Any, w: Any, b: Any, y: Any, geometry: ConvGeometry, activation: Activation
    ) -> None:
        code = _code(activation)
        self._scatter("conv_transpose2d_forward", y, x, w, geometry, x, w, b, y, *code)

    def conv_transpose2d_input_gradient(
        self, dz: Any, w: Any, x: Any, dz_below: Any, geometry: ConvGeometry, below: Activation
    ) -> None:
        code = _code(below)
        self._correlate(
            "conv_transpose2d_input_gradient", dz, x, w, geometry, dz, w, x, dz_below, *code
        )

    def conv_transpose2d_weight_gradient(
        self,
        x: Any,
        dz: Any,
        dw: Any,
        db: Any,
        geometry: ConvGeometry,
        fraction: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        call = Call("conv_transpose2d_weight_gradient", x, dz, dw, db, geometry)
        self._launch_conv_group("conv_weight_gradient", [call], dw, dw, fraction, accumulate)

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
        da: Any,
        scale: float,
        weight: float,
        activation: Activation,
    ) -> None:
        n, m = y.shape
        code = _code(activation)
        self.launch("squared_error_loss", n, y, x, loss, da, scale, weight, *code, n, m)

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

    def calibrate_gaussian(self, loss: Any, da: Any, variance: Any) -> None:
        n, m = da.shape
        self.launch("calibrate_gaussian_variance", 1, loss, variance, n, m)
        self.launch("calibrate_gaussian", n, loss, da, variance, n, m)

    def capacity_totals(
        self,
        reconstruction: Any,
        kl: Any,
        schedule: Any,
        state: Any,
        kl_weight: Any,
        totals: Any,
    ) -> None:
        self.launch(
            *("capacity_totals", 1, reconstruction, kl, schedule, state),
            *(kl_weight, totals, *kl.shape),
        )

    # The label

    def gather_labels(self, labels: Any, permutation: Any, state: Any, onehot: Any) -> None:
        blocks = _blocks(onehot.size)
        self.launch("gather_labels", blocks, labels, permutation, state, onehot, *onehot.shape)

    def join_forward(self, v: Any, onehot: Any, u: Any) -> None:
        (rows, m), (n, classes) = v.shape, onehot.shape
        sizes = (rows, rows // n, m, classes)
        self.launch("join_forward", _blocks(u.size), v, onehot, u, *sizes)

    def join_input_gradient(self, du: Any, v: Any, da: Any, below: Activation) -> None:
        (rows, m), classes = v.shape, du.shape[1] - v.shape[1]
        sizes = (rows, m, classes)
        arguments = (du, v, da, *_code(below), *sizes)
        self.launch("join_input_gradient", _blocks(v.size), *arguments)

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
        self, calls: Sequence[Call], g: Any, fraction: float = 1.0, accumulate: bool = False
    ) -> None:
        """One launch for all dense layers, one for all convolutions."""
        self._launch_group("dense_weight_gradient", calls, g, g, fraction, accumulate)
        self._launch_conv_group("conv_weight_gradient", calls, g, g, fraction, accumulate)

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

    @property
    def product(self) -> Product:
        """The weight's gradient as a matrix product."""
        *window, filters = self.dw.shape
        return Product(math.prod(window), filters, math.prod(self.small.shape[:3]))

    @property
    def has_few_taps(self) -> bool:
        """Whether threads have all of a window in registers."""
        return has_few_taps(*self.dw.shape[:3])


def _conv_operands(kernel: str, call: Call) -> _ConvGradients:
    x, dz, dw, db, geometry = call.arguments
    for name, array in (("x", x), ("dz", dz), ("dw", dw), ("db", db)):
        checked_array(kernel, name, array, np.float32)
    if call.primitive == "conv2d_weight_gradient":
        return _ConvGradients(x, dz, dw, db, geometry, True)
    return _ConvGradients(dz, x, dw, db, geometry, False)


def _divided(precision: str, parts: Sequence[_ConvGradients]) -> tuple[Tile, list[tuple[int, int]]]:
    """The tile of a group of convolutions' gradients, and of each its tiles and splits. Those of
    few taps have together about one block for each multiprocessor, which runs beside those of the
    others, or if there are none, as many as there is room for."""
    others = [part.product for part in parts if not part.has_few_taps]
    work = sum(part.dw.shape[3] * part.product.depth for part in parts if part.has_few_taps)
    taken = MULTIPROCESSORS if work else 0
    tile, splits = tiles_of_group(precision, "conv", others, taken) if others else (MEDIUM, ())
    blocks = MULTIPROCESSORS * (1 if others else RESIDENT[tile])
    left, divisions = iter(splits), []
    for part in parts:
        rows, filters, depth = part.product
        if part.has_few_taps:
            tiles = -(-filters // min(tile.columns, FEW_FILTERS))
            share = blocks * filters * depth // (work * tiles)
            divisions.append((tiles, max(1, min(share, depth // POSITIONS_AT_ONCE))))
        else:
            divisions.append((tile_count(tile, rows, filters), next(left)))
    return tile, divisions


def _rows_at_once(columns: int) -> int:
    """How many rows a block asks for before it adds the first: `add_rows` of kernels/conv.cu."""
    lanes = 4 if columns % 4 == 0 else 1
    return 8 * (BLOCK // -(-min(columns, BLOCK) // lanes))


class _Jobs:
    """The table of a group of gradients with one tile: Job of kernels/conv.cu or weights.cu, which
    begins with Division of tile.cuh."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        self.table: list[int] = []
        self.count = self.blocks = self.partials = self.arrivals = 0

    def add(
        self, division: tuple[int, int], tensors: Sequence[int], left: int | None = None
    ) -> None:
        """A job of so many (tiles, splits), which leave as many numbers in the workspace as their
        results have, unless it says how many."""
        blocks = math.prod(division)
        self.table += [self.blocks, *division, self.partials, self.arrivals, *tensors]
        self.count += 1
        self.blocks += blocks
        if left is None:
            left = blocks * result_size(self.tile) if division[1] > 1 else 0
        self.partials += -(-left // 4) * 4  # where a vector may begin
        self.arrivals += LEVELS * blocks


def _offset(backend: KernelBackend, tensor: Any, flat: Any) -> int:
    """The index in a flat buffer at which a view of it begins."""
    return (backend.address(tensor) - backend.address(flat)) // 4
