"""The CPU backend: BLAS for matrix products, and Numba kernels that pass once over memory between
them. float32 only: float64, which gradient checks use, goes to the reference.

BLAS owns the cores; every other kernel runs on one.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ops.activations import KINDS, Activation
from ..ops.conv import ConvGeometry
from ..ops.philox import Noise
from . import cpu_kernels as kernels
from .reference import ReferenceBackend

COLUMN_BYTES = 1 << 19
"""How large a block of columns may be, so that it stays in the second-level cache between the
pass that writes it and the one that reads it."""


def _is_float32(*arrays: NDArray) -> bool:
    return all(array.dtype == np.float32 for array in arrays)


def _code(activation: Activation) -> tuple[int, np.float32]:
    """An activation as the kernels take it."""
    return KINDS.index(activation.kind), np.float32(activation.slope)


def _flat(array: NDArray) -> NDArray:
    return array.reshape(-1)


def _rows(array: NDArray) -> NDArray:
    return array.reshape(-1, array.shape[-1])


def _noise_words(noise: Noise) -> tuple[np.uint64, np.uint64, np.uint64]:
    """(stream, low word, high word) of a noise's key, as the kernels take them."""
    words = (noise.stream, noise.seed & 0xFFFFFFFF, (noise.seed >> 32) & 0xFFFFFFFF)
    stream, low, high = (np.uint64(word) for word in words)
    return stream, low, high


class CpuBackend(ReferenceBackend):
    """NumPy's BLAS and Numba."""

    name = "cpu"

    def __init__(self) -> None:
        self._workspaces: dict[str, NDArray[np.float32]] = {}

    def _workspace(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Scratch memory of a shape, which grows on first use and is then kept."""
        size = int(np.prod(shape))
        if name not in self._workspaces or self._workspaces[name].size < size:
            self._workspaces[name] = np.empty(size, np.float32)
        return self._workspaces[name][:size].reshape(shape)

    def activation_forward(self, z: NDArray, y: NDArray, activation: Activation) -> None:
        if not _is_float32(z, y):
            return super().activation_forward(z, y, activation)
        kernels.activate(_flat(z), _flat(y), *_code(activation))

    def activation_backward(
        self, z: NDArray | None, y: NDArray, dy: NDArray, dz: NDArray, activation: Activation
    ) -> None:
        if not _is_float32(y, dy, dz):
            return super().activation_backward(z, y, dy, dz, activation)
        source = _flat(y if z is None else z)
        kernels.multiply_derivative(source, _flat(y), _flat(dy), _flat(dz), *_code(activation))

    def dense_forward(
        self, x: NDArray, w: NDArray, b: NDArray, y: NDArray, activation: Activation
    ) -> None:
        if not _is_float32(x, w, b, y):
            return super().dense_forward(x, w, b, y, activation)
        np.matmul(x, w, out=y)
        kernels.add_bias_and_activate(y, b, *_code(activation))

    def dense_input_gradient(
        self, dz: NDArray, w: NDArray, x: NDArray, dx: NDArray, activation: Activation
    ) -> None:
        if not _is_float32(dz, w, x, dx):
            return super().dense_input_gradient(dz, w, x, dx, activation)
        np.matmul(dz, w.T, out=dx)
        self._carry_through(x, dx, activation)

    def _carry_through(self, x: NDArray, dx: NDArray, activation: Activation) -> None:
        """dense.E4: dx times the derivative of the activation that made x."""
        if activation.kind != "identity":
            flat = _flat(dx)
            kernels.multiply_derivative(_flat(x), _flat(x), flat, flat, *_code(activation))

    def dense_weight_gradient(self, x: NDArray, dz: NDArray, dw: NDArray, db: NDArray) -> None:
        if not _is_float32(x, dz, dw, db):
            return super().dense_weight_gradient(x, dz, dw, db)
        np.matmul(x.T, dz, out=dw)
        kernels.sum_rows(dz, db)

    def _chunks(self, small: NDArray, w: NDArray) -> list[tuple[slice, NDArray]]:
        """Slices of the batch, each with memory (n, p, q, kh kw c) for its columns."""
        n, rows, positions, _ = small.shape
        taps = w.shape[0] * w.shape[1] * w.shape[2]
        images = max(1, COLUMN_BYTES // (4 * rows * positions * taps))
        chunks = (slice(first, min(first + images, n)) for first in range(0, n, images))
        return [
            (chunk, self._workspace("columns", (chunk.stop - chunk.start, rows, positions, taps)))
            for chunk in chunks
        ]

    def _correlate(
        self,
        large: NDArray,
        w: NDArray,
        small: NDArray,
        geometry: ConvGeometry,
        chunk: slice,
        columns: NDArray,
    ) -> None:
        """small = E1'(large) for a chunk of images (conv.E1')."""
        kernels.gather_columns(large[chunk], columns, *w.shape[:2], tuple(geometry))
        np.matmul(_rows(columns), w.reshape(-1, w.shape[3]), out=_rows(small[chunk]))

    def _scatter(
        self,
        small: NDArray,
        w: NDArray,
        large: NDArray,
        geometry: ConvGeometry,
        chunk: slice,
        columns: NDArray,
    ) -> None:
        """large = E2(small) for a chunk of images (conv.E2)."""
        np.matmul(_rows(small[chunk]), w.reshape(-1, w.shape[3]).T, out=_rows(columns))
        kernels.scatter_columns(columns, large[chunk], *w.shape[:2], tuple(geometry))

    def _correlate_weight(
        self, large: NDArray, small: NDArray, dw: NDArray, geometry: ConvGeometry
    ) -> None:
        """dw = E3(large, small)."""
        flat = dw.reshape(-1, dw.shape[3])
        part = self._workspace("weight", flat.shape)
        flat[...] = 0
        for chunk, columns in self._chunks(small, dw):
            kernels.gather_columns(large[chunk], columns, *dw.shape[:2], tuple(geometry))
            np.matmul(_rows(columns).T, _rows(small[chunk]), out=part)
            flat += part

    def conv2d_forward(
        self,
        x: NDArray,
        w: NDArray,
        b: NDArray,
        y: NDArray,
        geometry: ConvGeometry,
        activation: Activation,
    ) -> None:
        if not _is_float32(x, w, b, y):
            return super().conv2d_forward(x, w, b, y, geometry, activation)
        for chunk, columns in self._chunks(y, w):
            self._correlate(x, w, y, geometry, chunk, columns)
            kernels.add_bias_and_activate(_rows(y[chunk]), b, *_code(activation))

    def conv2d_input_gradient(
        self,
        dz: NDArray,
        w: NDArray,
        x: NDArray,
        dx: NDArray,
        geometry: ConvGeometry,
        activation: Activation,
    ) -> None:
        if not _is_float32(dz, w, x, dx):
            return super().conv2d_input_gradient(dz, w, x, dx, geometry, activation)
        for chunk, columns in self._chunks(dz, w):
            self._scatter(dz, w, dx, geometry, chunk, columns)
            self._carry_through(x[chunk], dx[chunk], activation)

    def conv2d_weight_gradient(
        self, x: NDArray, dz: NDArray, dw: NDArray, db: NDArray, geometry: ConvGeometry
    ) -> None:
        if not _is_float32(x, dz, dw, db):
            return super().conv2d_weight_gradient(x, dz, dw, db, geometry)
        self._correlate_weight(x, dz, dw, geometry)
        kernels.sum_rows(_rows(dz), db)

    def conv_transpose2d_forward(
        self,
        x: NDArray,
        w: NDArray,
        b: NDArray,
        y: NDArray,
        geometry: ConvGeometry,
        activation: Activation,
    ) -> None:
        if not _is_float32(x, w, b, y):
            return super().conv_transpose2d_forward(x, w, b, y, geometry, activation)
        for chunk, columns in self._chunks(x, w):
            self._scatter(x, w, y, geometry, chunk, columns)
            kernels.add_bias_and_activate(_rows(y[chunk]), b, *_code(activation))

    def conv_transpose2d_input_gradient(
        self,
        dz: NDArray,
        w: NDArray,
        x: NDArray,
        dx: NDArray,
        geometry: ConvGeometry,
        activation: Activation,
    ) -> None:
        if not _is_float32(dz, w, x, dx):
            return super().conv_transpose2d_input_gradient(dz, w, x, dx, geometry, activation)
        for chunk, columns in self._chunks(x, w):
            self._correlate(dz, w, dx, geometry, chunk, columns)
            self._carry_through(x[chunk], dx[chunk], activation)

    def conv_transpose2d_weight_gradient(
        self, x: NDArray, dz: NDArray, dw: NDArray, db: NDArray, geometry: ConvGeometry
    ) -> None:
        if not _is_float32(x, dz, dw, db):
            return super().conv_transpose2d_weight_gradient(x, dz, dw, db, geometry)
        self._correlate_weight(dz, x, dw, geometry)
        kernels.sum_rows(_rows(dz), db)

    def latent_forward(
        self, head: NDArray, z: NDArray, kl: NDArray, noise: Noise, state: NDArray
    ) -> None:
        if not _is_float32(head, z, kl):
            return super().latent_forward(head, z, kl, noise, state)
        kernels.latent_forward(head, z, kl, *_noise_words(noise), state, 0)

    def latent_backward(
        self,
        head: NDArray,
        dz: NDArray,
        kl_weight: NDArray,
        dhead: NDArray,
        noise: Noise,
        state: NDArray,
    ) -> None:
        if not _is_float32(head, dz, kl_weight, dhead):
            return super().latent_backward(head, dz, kl_weight, dhead, noise, state)
        kernels.latent_backward(head, dz, kl_weight, dhead, *_noise_words(noise), state, 0)

    def importance_latent_forward(
        self,
        head: NDArray,
        z: NDArray,
        log_ratio: NDArray,
        log_scale: float,
        noise: Noise,
        state: NDArray,
    ) -> None:
        if not _is_float32(head, z, log_ratio):
            return super().importance_latent_forward(head, z, log_ratio, log_scale, noise, state)
        words = _noise_words(noise)
        kernels.importance_latent_forward(
            head, z, log_ratio, np.float32(log_scale), *words, state, 0
        )

    def importance_latent_backward(
        self,
        head: NDArray,
        dz: NDArray,
        weights: NDArray,
        dhead: NDArray,
        scale: float,
        log_scale: float,
        noise: Noise,
        state: NDArray,
    ) -> None:
        if not _is_float32(head, dz, weights, dhead):
            arguments = (head, dz, weights, dhead, scale, log_scale, noise, state)
            return super().importance_latent_backward(*arguments)
        eps = self._workspace("noise", (dz.shape[1],))
        kernels.importance_latent_backward(
            *(head, dz, weights, dhead, np.float32(scale), np.float32(log_scale)),
            *(eps, *_noise_words(noise), state, 0),
        )

    def importance_loss(
        self,
        logits: NDArray,
        x: NDArray,
        log_ratio: NDArray,
        weights: NDArray,
        loss: NDArray,
        dlogits: NDArray,
        scale: float,
        importance: bool,
    ) -> None:
        arguments = (logits, x, log_ratio, weights, loss, dlogits)
        if not _is_float32(*arguments):
            return super().importance_loss(*arguments, scale, importance)
        kernels.importance_loss(*arguments, np.float32(scale), importance)

    def bernoulli_loss(
        self, logits: NDArray, x: NDArray, loss: NDArray, dlogits: NDArray, scale: float
    ) -> None:
        if not _is_float32(logits, x, loss, dlogits):
            return super().bernoulli_loss(logits, x, loss, dlogits, scale)
        kernels.bernoulli_loss(logits, x, loss, dlogits, np.float32(scale))

    def squared_error_loss(
        self,
        y: NDArray,
        x: NDArray,
        loss: NDArray,
        dz: NDArray,
        scale: float,
        weight: float,
        activation: Activation,
    ) -> None:
        if not _is_float32(y, x, loss, dz):
            return super().squared_error_loss(y, x, loss, dz, scale, weight, activation)
        kernels.squared_error_loss(
            *(y, x, loss, dz, np.float32(scale), np.float32(weight)), *_code(activation)
        )

    def calibrate_gaussian(self, loss: NDArray, dz: NDArray, variance: NDArray) -> None:
        if not _is_float32(loss, dz, variance):
            return super().calibrate_gaussian(loss, dz, variance)
        kernels.calibrate_gaussian(loss, dz, variance)

    def elbo_totals(
        self,
        reconstruction: NDArray,
        kl: NDArray,
        schedule: NDArray,
        state: NDArray,
        free_bits: float,
        kl_weight: NDArray,
        totals: NDArray,
    ) -> None:
        arguments: Any = (reconstruction, kl, schedule, state, free_bits, kl_weight, totals)
        if not _is_float32(reconstruction, kl, schedule, kl_weight):
            return super().elbo_totals(*arguments)
        kernels.elbo_totals(*arguments)

    def capacity_totals(
        self,
        reconstruction: NDArray,
        kl: NDArray,
        schedule: NDArray,
        state: NDArray,
        capacity: float,
        capacity_steps: int,
        kl_weight: NDArray,
        totals: NDArray,
    ) -> None:
        bounds: Any = (capacity, capacity_steps)
        arguments: Any = (reconstruction, kl, schedule, state, *bounds, kl_weight, totals)
        if not _is_float32(reconstruction, kl, schedule, kl_weight):
            return super().capacity_totals(*arguments)
        kernels.capacity_totals(*arguments)

    def adam_update(
        self,
        p: NDArray,
        g: NDArray,
        m: NDArray,
        v: NDArray,
        schedule: NDArray,
        state: NDArray,
        beta1: float,
        beta2: float,
        epsilon: float,
    ) -> None:
        arguments: Any = (p, g, m, v, schedule, state, beta1, beta2, epsilon)
        if not _is_float32(p, g, m, v, schedule):
            return super().adam_update(*arguments)
        kernels.adam_update(*arguments)

    def clip_gradient(self, g: NDArray, max_norm: float, norm: NDArray) -> None:
        if not _is_float32(g, norm):
            return super().clip_gradient(g, max_norm, norm)
        norm[0] = np.sqrt(kernels.sum_of_squares(g))
        if norm[0] > max_norm:
            kernels.scale_in_place(g, np.float32(max_norm / norm[0]))

    def gather_batch(
        self,
        data: NDArray,
        permutation: NDArray,
        state: NDArray,
        x: NDArray,
        binarization: str,
        noise: Noise,
    ) -> None:
        if not _is_float32(x) or data.dtype not in (np.uint8, np.float32):
            return super().gather_batch(data, permutation, state, x, binarization, noise)
        white = np.float32(255 if data.dtype == np.uint8 else 1)
        arguments: Any = (data, permutation, state, x, white)
        if binarization == "threshold":
            kernels.gather_thresholded(*arguments, 0)
        elif binarization == "stochastic":
            kernels.gather_stochastic(*arguments, *_noise_words(noise), 0)
        else:
            kernels.gather_scaled(*arguments, 0)

    def gather_labels(
        self, labels: NDArray, permutation: NDArray, state: NDArray, onehot: NDArray
    ) -> None:
        if not _is_float32(onehot):
            return super().gather_labels(labels, permutation, state, onehot)
        kernels.gather_labels(labels, permutation, state, onehot)

    def join_input_gradient(
        self, dy: NDArray, x: NDArray, dx: NDArray, activation: Activation
    ) -> None:
        if not _is_float32(dy, x, dx):
            return super().join_input_gradient(dy, x, dx, activation)
        dx[...] = dy[:, : x.shape[1]]
        self._carry_through(x, dx, activation)
