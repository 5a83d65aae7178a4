"""2-D convolution and transposed convolution on NHWC images, and their gradients.

A convolution (as everywhere in deep learning, a cross-correlation) with stride s, padding t on
the top and left, and kernel w[i, j, c, k] (tap (i, j), input channel c, output channel k) is

    E1    y[n, p, q, k] = f( b[k] + sum_{i,j,c} x[n, p s + i - t, q s + j - t, c] w[i, j, c, k] )

where x is zero outside the image. Tap by tap, this is a sum of small matrix products: each tap
(i, j) multiplies the slice X_ij[n, p, q, c] = x[n, p s + i - t, q s + j - t, c] of the padded image
by the c x k matrix w_ij = w[i, j]:

    E1'   y = f( b + sum_ij X_ij w_ij )

Each term is a dense layer whose rows are the positions (n, p, q), so dense.E1 to dense.E3 hold for
each tap, with dz = dy * f'. A pixel lies in several slices, so its gradient sums over them. With
X_ij[n, p, q] a row vector, and dX_ij the same slice of the padded dx, which starts at zero:

    E2    dX_ij += dz w_ij^T,    that is  dx[n, u, v, c] = sum of dz[n, p, q, k] w[i, j, c, k] over
                                 all i, j, k, p, q with p s + i - t = u and q s + j - t = v
    E3    dw_ij  = sum_{n,p,q} X_ij[n, p, q]^T dz[n, p, q]
    E4    db     = sum_{n,p,q} dz[n, p, q]

A transposed convolution (Dumoulin & Visin 2016) is by definition the map of E2, from a small image
x to a large one, with b and f added: each tap adds x w_ij^T to the slice Y_ij of the large image.
With dY_ij the same slice of dz, dense.E1 and dense.E2 of each tap give

    E5    Y_ij += x w_ij^T,  then y = f( b + Y )                E2's map, of x instead of dz
    E6    dx    = sum_ij dY_ij w_ij                            E1' of dz, with neither b nor f
    E7    dw_ij = sum_{n,p,q} dY_ij[n, p, q]^T x[n, p, q]      E3, image and gradient exchanged

and db is E4 over the large image.

The weight keeps the shape (kh, kw, c, k) of the convolution that it transposes: c channels in the
large image, k in the small one. Only the top and left padding appear: the output's size says how
far the kernel extends past the bottom and right edges, so "same" padding and output padding need
no special case.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .activations import Activation, activation_backward, activation_forward


class ConvGeometry(NamedTuple):
    """Where the kernel meets the large image: strides and the padding before the first pixel."""

    stride_h: int
    stride_w: int
    pad_top: int
    pad_left: int


def _padded(large: NDArray, small: NDArray, w: NDArray, geometry: ConvGeometry) -> NDArray:
    """Zeros in the shape of `large` with its padding, as far as the last tap reaches."""
    n, height, width, channels = large.shape
    _, rows, columns, _ = small.shape
    kh, kw = w.shape[:2]
    stride_h, stride_w, top, left = geometry
    bottom_edge = max(top + height, (rows - 1) * stride_h + kh)
    right_edge = max(left + width, (columns - 1) * stride_w + kw)
    return np.zeros((n, bottom_edge, right_edge, channels), large.dtype)


def _inside(padded: NDArray, large: NDArray, geometry: ConvGeometry) -> NDArray:
    """The view of `padded` that is the image itself."""
    top, left = geometry.pad_top, geometry.pad_left
    return padded[:, top : top + large.shape[1], left : left + large.shape[2]]


def _slices(
    padded: NDArray, small: NDArray, w: NDArray, geometry: ConvGeometry
) -> Iterator[tuple[tuple[int, int], NDArray]]:
    """For each tap (i, j) the view X_ij (n, p, q, c) of the padded image."""
    _, rows, columns, _ = small.shape
    stride_h, stride_w = geometry.stride_h, geometry.stride_w
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            yield (i, j), padded[:, i::stride_h, j::stride_w][:, :rows, :columns]


def _correlate(large: NDArray, w: NDArray, small: NDArray, geometry: ConvGeometry) -> None:
    """small = sum_ij X_ij w_ij, the linear part of E1'."""
    padded = _padded(large, small, w, geometry)
    _inside(padded, large, geometry)[...] = large
    small[...] = 0
    for tap, pixels in _slices(padded, small, w, geometry):
        small += pixels @ w[tap]


def _scatter(small: NDArray, w: NDArray, large: NDArray, geometry: ConvGeometry) -> None:
    """large = sum_ij of small w_ij^T added into slice X_ij (E2)."""
    padded = _padded(large, small, w, geometry)
    for tap, pixels in _slices(padded, small, w, geometry):
        pixels += small @ w[tap].T
    large[...] = _inside(padded, large, geometry)


def _correlate_weight(
    large: NDArray, small: NDArray, dw: NDArray, geometry: ConvGeometry, fraction: float
) -> None:
    """dw_ij grows by `fraction` times the sum over all positions of X_ij^T small (E3)."""
    padded = _padded(large, small, dw, geometry)
    _inside(padded, large, geometry)[...] = large
    for tap, pixels in _slices(padded, small, dw, geometry):
        dw[tap] += fraction * np.tensordot(pixels, small, axes=((0, 1, 2), (0, 1, 2)))


def conv2d_forward(
    x: NDArray,
    w: NDArray,
    b: NDArray,
    y: NDArray,
    geometry: ConvGeometry,
    activation: Activation,
) -> None:
    """y = f(conv(x, w) + b) (E1).

    Shapes: x (n, h, w, c), w (kh, kw, c, k), b (k,), y (n, p, q, k).
    """
    _correlate(x, w, y, geometry)
    y += b
    activation_forward(y, y, activation)


def conv2d_input_gradient(
    dz: NDArray,
    w: NDArray,
    x: NDArray,
    dz_below: NDArray,
    geometry: ConvGeometry,
    below: Activation,
) -> None:
    """dz_below = E2(dz) * f_below', where x = f_below(z_below) is this layer's input (dense.E4).

    Shapes: dz (n, p, q, k), w (kh, kw, c, k), x and dz_below (n, h, w, c).
    """
    _scatter(dz, w, dz_below, geometry)
    activation_backward(None, x, dz_below, dz_below, below)


def conv2d_weight_gradient(
    x: NDArray,
    dz: NDArray,
    dw: NDArray,
    db: NDArray,
    geometry: ConvGeometry,
    fraction: float = 1.0,
    accumulate: bool = False,
) -> None:
    """dw by E3 and db by E4, times `fraction`, on top of what they hold if `accumulate` (dense.E5).

    Shapes: x (n, h, w, c), dz (n, p, q, k), dw (kh, kw, c, k), db (k,).
    """
    if not accumulate:
        dw[...] = db[...] = 0
    _correlate_weight(x, dz, dw, geometry, fraction)
    db += fraction * np.sum(dz, axis=(0, 1, 2))


def conv_transpose2d_forward(
    x: NDArray,
    w: NDArray,
    b: NDArray,
    y: NDArray,
    geometry: ConvGeometry,
    activation: Activation,
) -> None:
    """y = f(E2(x) + b) (E5). Shapes: x (n, p, q, k), w (kh, kw, c, k), b (c,), y (n, h, w, c)."""
    _scatter(x, w, y, geometry)
    y += b
    activation_forward(y, y, activation)


def conv_transpose2d_input_gradient(
    dz: NDArray,
    w: NDArray,
    x: NDArray,
    dz_below: NDArray,
    geometry: ConvGeometry,
    below: Activation,
) -> None:
    """dz_below = E6 * f_below', where x = f_below(z_below) is this layer's input (dense.E4).

    Shapes: dz (n, h, w, c), w (kh, kw, c, k), x and dz_below (n, p, q, k).
    """
    _correlate(dz, w, dz_below, geometry)
    activation_backward(None, x, dz_below, dz_below, below)


def conv_transpose2d_weight_gradient(
    x: NDArray,
    dz: NDArray,
    dw: NDArray,
    db: NDArray,
    geometry: ConvGeometry,
    fraction: float = 1.0,
    accumulate: bool = False,
) -> None:
    """dw by E7 and db by E4, times `fraction`, on top of what they hold if `accumulate` (dense.E5).

    Shapes: x (n, p, q, k), dz (n, h, w, c), dw (kh, kw, c, k), db (c,).
    """
    if not accumulate:
        dw[...] = db[...] = 0
    _correlate_weight(dz, x, dw, geometry, fraction)
    db += fraction * np.sum(dz, axis=(0, 1, 2))
