"""The CPU backend: Numba kernels, which share rows, tiles or parameters among all cores.
float32 only: float64, which gradient checks use, goes to the reference.

Nothing here calls BLAS, whose threads would compete with ours for the cores.
"""

import math
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, wraps
from inspect import signature
from itertools import groupby
from typing import Any, TypeVar, cast

import numpy as np
from numba.core.registry import CPUDispatcher
from numpy.typing import DTypeLike, NDArray

from ..ops.activations import Activation
from ..ops.conv import ConvGeometry
from ..ops.philox import Noise
from . import cpu_kernels as kernels
from . import cpu_products as products
from .cpu_jobs import Launch, job, run
from .cpu_threads import CORES, Tuner
from .cpu_windows import Windows, weight_tiles, windows
from .reference import Call, ReferenceBackend

CACHE_BYTES = 1 << 19
"""How much memory a kernel goes through again and again: half of a L2 cache."""

STREAM_BYTES = 1 << 21
"""The same, where the order is one that the hardware prefetcher follows."""

STILL = ConvGeometry(1, 1, 0, 0)
POINT = windows((1, 1), (1, 1), (1, 1), STILL, False)
"""The window of a dense layer."""

MOST_IMAGES = 1024
"""A sum in float32 over more images than this is less precise than one of parts."""

PARTIAL_SUMS = 16
"""Into how many sums, whatever the number of cores, the sum of all pixels is split."""


def _zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
    """Zeros on fresh pages. These take no memory until written to, which gradients that go
    straight to Adam never are, and are aligned to cache lines: a vector across two lines is loaded
    twice."""
    count = math.prod(shape)
    size = max(1, count * np.dtype(dtype).itemsize)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"an array of {size} bytes") from error
    return np.frombuffer(pages, dtype, count).reshape(shape)


def _is_float32(*arrays: NDArray) -> bool:
    return all(array.dtype == np.float32 for array in arrays)


Arrays = tuple[NDArray, ...]

Primitive = TypeVar("Primitive", bound=Callable[..., None])


def float32_only(primitive: Primitive) -> Primitive:
    """The primitive where all arrays of floating point but `totals`, float64 by their contract, are
    float32; elsewhere that of the reference."""
    reference = getattr(ReferenceBackend, primitive.__name__)
    names = list(signature(reference).parameters)

    @wraps(primitive)
    def run(self: "CpuBackend", *arguments: Any) -> None:
        arrays = [
            argument
            for argument, parameter in zip(arguments, names, strict=False)
            if isinstance(argument, np.ndarray) and argument.dtype.kind == "f"
            if parameter != "totals"
        ]
        if _is_float32(*arrays):
            primitive(self, *arguments)
        else:
            self._run(reference, *arguments)

    return cast(Primitive, run)


def _of_one_kernel(kernel: Any) -> Callable[..., None]:
    """The primitive that is a kernel of the same name, with the same arguments."""

    def primitive(self: "CpuBackend", *arguments: Any) -> None:
        self._run(kernel, *(part for argument in arguments for part in _lowered(argument)))

    primitive.__name__ = kernel.__name__
    return float32_only(primitive)


def _lowered(argument: Any) -> tuple[Any, ...]:
    """An argument as the kernels take it."""
    if isinstance(argument, Activation):
        return _code(argument)
    if isinstance(argument, Noise):
        return _noise_words(argument)
    return (argument,)


def _code(activation: Activation) -> tuple[int, np.float32]:
    return activation.code, np.float32(activation.slope)


def _slope(activation: Activation) -> tuple[np.float32, bool]:
    """(what an activation multiplies negative numbers by, whether it does more than that)."""
    slopes = {"identity": 1.0, "relu": 0.0, "leaky_relu": activation.slope}
    return np.float32(slopes.get(activation.kind, 1.0)), activation.kind not in slopes


def _flat(array: NDArray) -> NDArray:
    if not array.flags.c_contiguous:
        raise TypeError("a strided array, expected a C-contiguous one")
    return array.reshape(-1)


def _pixels(images: NDArray) -> NDArray:
    """(n, h, w, c) as (n, h w, c)."""
    return images.reshape(len(images), -1, images.shape[3])


def _taps(w: NDArray) -> NDArray:
    """(kh, kw, c, k) as (kh kw, c, k)."""
    return w.reshape(-1, *w.shape[2:])


def _points(vectors: NDArray) -> NDArray:
    """(n, m) as images of one pixel, (n, 1, 1, m): a dense layer is a convolution of these."""
    return vectors[:, None, None]


def _windows(
    large: NDArray, small: NDArray, w: NDArray, geometry: ConvGeometry, back: bool = False
) -> Windows:
    return windows(large.shape[1:3], small.shape[1:3], w.shape[:2], geometry, back)


def _images_at_a_time(images: int, most: int) -> int:
    """How many images to take at a time, `most` or fewer, so that shares are equal."""
    return -(-images // -(-images // max(1, most)))


def _images_in_cache(x: NDArray, y: NDArray) -> int:
    """How many images to take at a time, so that they stay in the cache."""
    return _images_at_a_time(len(x), CACHE_BYTES // (x[0].nbytes + y[0].nbytes))


def _places(part: NDArray, whole: NDArray, others: Iterable[NDArray]) -> tuple[NDArray, ...]:
    """Where `part` lies in the flat array `whole`, in `others` of the same length."""
    first = (part.ctypes.data - whole.ctypes.data) // whole.itemsize
    return tuple(other[first : first + part.size] for other in others)


def _noise_words(noise: Noise) -> tuple[np.uint32, np.uint32, np.uint32]:
    """The stream, and the low and high word of the key."""
    low, high = noise.key
    return np.uint32(noise.stream), np.uint32(low), np.uint32(high)


class CpuBackend(ReferenceBackend):
    """Numba's kernels on every core, or on so many at most."""

    name = "cpu"

    def __init__(self, cores: int = CORES) -> None:
        self._cores = cores
        self._workspaces: dict[str, NDArray[np.float32]] = {}
        self._plans = threading.local()

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray:
        """A new array, filled with zeros, that begins where a cache line does."""
        return _zeros(shape, dtype)

    def _run(self, kernel: Callable[..., None], *arguments: Any) -> None:
        planned = getattr(self._plans, "launches", None)
        if planned is not None:
            planned.append((kernel, arguments))
        elif isinstance(kernel, CPUDispatcher):
            run(job([(kernel, arguments)]), self._cores)
        else:
            kernel(*arguments)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """The kernels that `step` would run, with the arrays that it would give them: what Python
        does between them costs as much as a small kernel."""
        program: list[Callable[[], None]] = []

        def replay() -> None:
            if not program:
                # Whole before it is kept: an interrupt may come while it is compiled.
                program.extend([*self._program(self._planned(step))])
            for section in program:
                section()

        return replay

    def _program(self, launches: Sequence[Launch]) -> Iterator[Callable[[], None]]:
        """The launches as functions to call one after the other: one for all kernels in a row."""
        for compiled, some in groupby(
            launches, lambda launch: isinstance(launch[0], CPUDispatcher)
        ):
            if compiled:
                yield partial(Tuner(self._cores).run, partial(run, job([*some])))
            else:
                yield from (partial(function, *arguments) for function, arguments in some)

    def _planned(self, step: Callable[[], None]) -> list[Launch]:
        """What `step` would launch."""
        launches: list[Launch] = []
        self._plans.launches = launches
        try:
            step()
        finally:
            self._plans.launches = None
        return launches

    def _workspace(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Scratch memory of a shape, which grows on first use and is then kept."""
        size = int(np.prod(shape))
        if name not in self._workspaces or self._workspaces[name].size < size:
            self._workspaces[name] = _zeros((size,), np.float32)
        return self._workspaces[name][:size].reshape(shape)

    @float32_only
    def activation_forward(self, z: NDArray, y: NDArray, activation: Activation) -> None:
        self._run(kernels.activate, _flat(z), _flat(y), *_code(activation))

    @float32_only
    def activation_backward(
        self, z: NDArray | None, y: NDArray, dy: NDArray, dz: NDArray, activation: Activation
    ) -> None:
        flat = [_flat(array) for array in (y if z is None else z, y, dy, dz)]
        self._run(kernels.multiply_derivative, *flat, *_code(activation))

    def _oriented(self, w: NDArray, outputs: int) -> tuple[NDArray, bool]:
        """w (kh, kw, c, k) for a product that makes c or k numbers, whichever axis `outputs` is, 2
        or 3: as (t, inputs, outputs), or by columns, (t, outputs, inputs), and which."""
        taps = _taps(w)
        by_columns = w.shape[outputs] <= products.FEW
        if by_columns == (outputs == 2):
            return taps, by_columns
        transposed = self._workspace("transposed", (len(taps), w.shape[3], w.shape[2]))
        self._run(products.transpose_taps, taps, transposed)
        return transposed, by_columns

    def _scratch(self, x: NDArray, y: NDArray) -> NDArray:
        """For each core, memory for the pixels of as many images y as stay in its cache."""
        shape = (self._cores, _images_in_cache(x, y), y.shape[1] * y.shape[2], y.shape[3])
        return self._workspace("scratch", shape)

    def _forward(
        self,
        x: NDArray,
        w: NDArray,
        by_columns: bool,
        b: NDArray,
        y: NDArray,
        seen: Windows,
        activation: Activation,
    ) -> None:
        """y = activation(b + the windows of x times w), w as from `_oriented`."""
        arguments = (_pixels(x), w, b, _pixels(y), seen, by_columns)
        self._run(products.window_forward, *arguments, self._scratch(x, y), *_code(activation))

    def _input_gradient(
        self,
        dz: NDArray,
        w: NDArray,
        by_columns: bool,
        x: NDArray,
        dz_below: NDArray,
        seen: Windows,
        below: Activation,
    ) -> None:
        """dz_below = (the windows of dz times w) f'(x), w as from `_oriented`."""
        arguments = (_pixels(dz), w, _pixels(x), _pixels(dz_below), seen, by_columns)
        scratch = self._scratch(dz, dz_below)
        self._run(products.window_input_gradient, *arguments, scratch, *_code(below))

    def _weight_gradient(
        self,
        large: NDArray,
        small: NDArray,
        dw: NDArray,
        geometry: ConvGeometry,
        *added: np.float32 | bool,
    ) -> None:
        """dw by dense.E2, conv.E3 or conv.E7, added as dense.E5 says."""
        sizes = (large.shape[1:3], small.shape[1:3], dw.shape[:2], geometry)
        seen, tiles = windows(*sizes, False), weight_tiles(*sizes, dw.shape[2])
        images = _images_in_cache(large, small)
        self._run(
            products.window_weight_gradient,
            *(_pixels(large), _pixels(small), _taps(dw), seen, tiles, images),
            *added,
        )

    def _panels(self, depth: int) -> NDArray[np.float32]:
        """For each core, memory for the columns of a product's right factor that it is at."""
        return self._workspace("panels", (self._cores, depth, products.DENSE_WIDTH))

    def _dense_update(
        self, x: NDArray, dz: NDArray, sums: Arrays, weight: Arrays, bias: Arrays, *adam: Any
    ) -> None:
        """Adam on a dense layer, with the gradient of as many images at a time as stay in the cache
        and make a precise sum."""
        n = _images_at_a_time(len(dz), min(MOST_IMAGES, STREAM_BYTES // dz[0].nbytes))
        blocks = self._workspace("blocks", (n * (dz.shape[1] + products.DENSE_WIDTH),))
        # One row more: the last is stored with BAND's idle lanes.
        bands = self._workspace("bands", (self._cores, (n + 1) * products.ROWS))
        lists = self._workspace("lists of images", (self._cores, n)).view(np.int32)
        for first in range(0, len(dz), n):
            some_x, some_dz = x[first : first + n], dz[first : first + n]
            packed = min(*some_x.shape, dz.shape[1]) > products.FEW_ROWS
            if packed:
                self._run(products.pack_blocks, some_dz, blocks)
            factors = (some_x, some_dz, packed, blocks, bands, lists)
            stage = (first > 0, first + n >= len(dz))
            self._run(products.dense_weight_update, *factors, sums, weight, bias, *adam, stage)

    def _bias_gradient(self, dz: NDArray, db: NDArray, *added: np.float32 | bool) -> None:
        """db by dense.E3 or conv.E4, added as dense.E5 says."""
        rows = dz.reshape(-1, dz.shape[2] * dz.shape[3])
        sums = self._workspace("sums", (PARTIAL_SUMS, rows.shape[1]))
        self._run(products.partial_sums, rows, sums)
        self._run(products.bias_gradient, sums, db, *added)

    @float32_only
    def dense_forward(
        self, x: NDArray, w: NDArray, b: NDArray, y: NDArray, activation: Activation
    ) -> None:
        if not len(x):
            return
        if y.shape[1] <= products.FEW:
            oriented = self._oriented(w[None, None], 3)
            return self._forward(_points(x), *oriented, b, _points(y), POINT, activation)
        tiles = -(-len(x) // products.ROWS)
        lists = self._workspace("lists", (tiles, x.shape[1] + 2 + products.AHEAD)).view(np.int32)
        self._run(products.list_first_columns, x, lists)
        self._run(products.list_other_columns, x, lists)
        slope, is_more = _slope(activation)
        self._run(products.dense_forward, x, w, b, y, lists, self._panels(x.shape[1]), slope)
        if is_more:
            self._run(products.activate_tiles, y, *_code(activation))

    @float32_only
    def dense_input_gradient(
        self, dz: NDArray, w: NDArray, x: NDArray, dz_below: NDArray, below: Activation
    ) -> None:
        if dz_below.shape[1] <= products.FEW:
            oriented = self._oriented(w[None, None], 2)
            points = (_points(x), _points(dz_below))
            return self._input_gradient(_points(dz), *oriented, *points, POINT, below)
        slope, is_more = _slope(below)
        panels = self._panels(w.shape[1])
        self._run(products.dense_input_gradient, dz, w, x, dz_below, panels, slope)
        if is_more:
            self._run(products.derive_tiles, x, dz_below, *_code(below))

    @float32_only
    def dense_weight_gradient(
        self,
        x: NDArray,
        dz: NDArray,
        dw: NDArray,
        db: NDArray,
        fraction: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        added = (np.float32(fraction), accumulate)
        self._weight_gradient(_points(x), _points(dz), dw[None, None], STILL, *added)
        self._bias_gradient(_points(dz), db, *added)

    @float32_only
    def conv2d_forward(
        self,
        x: NDArray,
        w: NDArray,
        b: NDArray,
        y: NDArray,
        geometry: ConvGeometry,
        activation: Activation,
    ) -> None:
        seen = _windows(x, y, w, geometry)
        self._forward(x, *self._oriented(w, 3), b, y, seen, activation)

    @float32_only
    def conv2d_input_gradient(
        self,
        dz: NDArray,
        w: NDArray,
        x: NDArray,
        dz_below: NDArray,
        geometry: ConvGeometry,
        below: Activation,
    ) -> None:
        seen = _windows(x, dz, w, geometry, back=True)
        self._input_gradient(dz, *self._oriented(w, 2), x, dz_below, seen, below)

    @float32_only
    def conv2d_weight_gradient(
        self,
        x: NDArray,
        dz: NDArray,
        dw: NDArray,
        db: NDArray,
        geometry: ConvGeometry,
        fraction: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        added = (np.float32(fraction), accumulate)
        self._weight_gradient(x, dz, dw, geometry, *added)
        self._bias_gradient(dz, db, *added)

    @float32_only
    def conv_transpose2d_forward(
        self,
        x: NDArray,
        w: NDArray,
        b: NDArray,
        y: NDArray,
        geometry: ConvGeometry,
        activation: Activation,
    ) -> None:
        seen = _windows(y, x, w, geometry, back=True)
        self._forward(x, *self._oriented(w, 2), b, y, seen, activation)

    @float32_only
    def conv_transpose2d_input_gradient(
        self,
        dz: NDArray,
        w: NDArray,
        x: NDArray,
        dz_below: NDArray,
        geometry: ConvGeometry,
        below: Activation,
    ) -> None:
        seen = _windows(dz, x, w, geometry)
        self._input_gradient(dz, *self._oriented(w, 3), x, dz_below, seen, below)

    @float32_only
    def conv_transpose2d_weight_gradient(
        self,
        x: NDArray,
        dz: NDArray,
        dw: NDArray,
        db: NDArray,
        geometry: ConvGeometry,
        fraction: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        added = (np.float32(fraction), accumulate)
        self._weight_gradient(dz, x, dw, geometry, *added)
        self._bias_gradient(dz, db, *added)

    latent_forward = _of_one_kernel(kernels.latent_forward)
    latent_backward = _of_one_kernel(kernels.latent_backward)
    bernoulli_loss = _of_one_kernel(kernels.bernoulli_loss)
    squared_error_loss = _of_one_kernel(kernels.squared_error_loss)
    calibrate_gaussian = _of_one_kernel(kernels.calibrate_gaussian)
    importance_latent_forward = _of_one_kernel(kernels.importance_latent_forward)
    importance_loss = _of_one_kernel(kernels.importance_loss)
    elbo_totals = _of_one_kernel(kernels.elbo_totals)
    capacity_totals = _of_one_kernel(kernels.capacity_totals)
    adam_update = _of_one_kernel(kernels.adam_update)
    clip_gradient = _of_one_kernel(kernels.clip_gradient)
    gather_labels = _of_one_kernel(kernels.gather_labels)
    join_forward = _of_one_kernel(kernels.join_forward)
    join_input_gradient = _of_one_kernel(kernels.join_input_gradient)
    advance_state = _of_one_kernel(kernels.advance_state)

    @float32_only
    def importance_latent_backward(
        self,
        head: NDArray,
        dz: NDArray,
        weights: NDArray,
        dhead: NDArray,
        scale: float,
        logvar_factor: float,
        noise: Noise,
        state: NDArray,
    ) -> None:
        eps = self._workspace("noise", dz.shape)
        self._run(
            kernels.importance_latent_backward,
            *(head, dz, weights, dhead, np.float32(scale), np.float32(logvar_factor)),
            *(eps, *_noise_words(noise), state),
        )

    def optimizer_step(
        self,
        calls: Sequence[Call],
        p: NDArray,
        g: NDArray,
        m: NDArray,
        v: NDArray,
        schedule: NDArray,
        state: NDArray,
        beta1: float,
        beta2: float,
        epsilon: float,
        batch_size: int,
    ) -> None:
        """`ReferenceBackend.optimizer_step`; gradients of dense layers stay in the cache, unless
        the batch is too large for it."""
        flat, adam = (p, m, v), (schedule, state, beta1, beta2, epsilon)
        for call in calls:
            x, dz, dw, db, *_ = call.arguments
            weight, bias = (_places(gradient, g, flat) for gradient in (dw, db))
            if call.primitive == "dense_weight_gradient" and _is_float32(x, dz, dw, p):
                numbers = (beta1, beta2, epsilon)
                layer = ((_flat(dw), db), weight, bias)
                self._dense_update(x, dz, *layer, schedule, state, numbers)
                continue
            call.run(self)
            for (p_part, m_part, v_part), gradient in ((weight, dw), (bias, db)):
                self.adam_update(p_part, _flat(gradient), m_part, v_part, *adam)
        self.advance_state(state, batch_size)

    @float32_only
    def gather_batch(
        self,
        data: NDArray,
        permutation: NDArray,
        state: NDArray,
        x: NDArray,
        binarization: str,
        noise: Noise,
    ) -> None:
        white = np.float32(255 if data.dtype == np.uint8 else 1)
        arguments: Any = (data, permutation, state, x, white)
        if binarization == "threshold":
            self._run(kernels.gather_thresholded, *arguments)
        elif binarization == "stochastic":
            words = self._workspace("words", (self._cores, x.shape[1] + 3)).view(np.uint32)
            self._run(kernels.gather_stochastic, *arguments, words, *_noise_words(noise))
        else:
            self._run(kernels.gather_scaled, *arguments)
