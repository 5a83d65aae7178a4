"""The dense layer y = f(z), z = x w + b, and its three gradients.

    E0    z[r, o]  = sum_i x[r, i] w[i, o] + b[o],      y = f(z)

for row r of the batch, input i and output o. By the chain rule, the gradient of an element of x, w
or b sums over every z[r, o] it enters, with the upstream gradient dz = dy * f'(z) (activations.E1):

    E1    dx[r, i] = sum_o dz[r, o] ∂z[r, o]/∂x[r, i] = sum_o dz[r, o] w[i, o]        dx = dz w^T
    E2    dw[i, o] = sum_r dz[r, o] ∂z[r, o]/∂w[i, o] = sum_r x[r, i] dz[r, o]        dw = x^T dz
    E3    db[o]    = sum_r dz[r, o]                                          (b enters every row)

The layer's input x is the output of the activation below it. E1 is therefore followed at once by
that activation's derivative, so that a gradient on its way down is always dz, never dy:

    E4    dz_below = (dz w^T) * f_below'

Gradient accumulation (Training.accumulate) saves memory: a batch goes through the model in parts,
one after another. The batch's mean loss is the sum of the parts' means, each times `fraction`, its
share of the batch. So is the gradient, with dz that of the part's own mean loss:

    E5    dw = dw + fraction x^T dz,    db = db + fraction sum_r dz[r]

A loss that is nonlinear in a batch mean (free bits, a capacity, a calibrated variance) uses each
part's own mean instead, so its gradient is not exactly that of the whole batch.
"""

import numpy as np
from numpy.typing import NDArray

from .activations import Activation, activation_backward, activation_forward


def dense_forward(x: NDArray, w: NDArray, b: NDArray, y: NDArray, activation: Activation) -> None:
    """y = f(x w + b) (E0). Shapes: x (n, i), w (i, o), b (o,), y (n, o)."""
    np.matmul(x, w, out=y)
    y += b
    activation_forward(y, y, activation)


def dense_input_gradient(
    dz: NDArray, w: NDArray, x: NDArray, dz_below: NDArray, below: Activation
) -> None:
    """dz_below = (dz w^T) * f_below' (E4), where x = f_below(z_below) is this layer's input.

    The derivative is read off x, so the kind of the activation `below` is one of
    DERIVATIVE_FROM_OUTPUT; with the identity the result is E1.
    Shapes: dz (n, o), w (i, o), x and dz_below (n, i).
    """
    np.matmul(dz, w.T, out=dz_below)
    activation_backward(None, x, dz_below, dz_below, below)


def dense_weight_gradient(
    x: NDArray,
    dz: NDArray,
    dw: NDArray,
    db: NDArray,
    fraction: float = 1.0,
    accumulate: bool = False,
) -> None:
    """dw = x^T dz (E2) and db = sum of dz over the batch (E3), times `fraction`, on top of what
    they hold if `accumulate` (E5).

    Shapes: x (n, i), dz (n, o), dw (i, o), db (o,).
    """
    if not accumulate:
        dw[...] = db[...] = 0
    dw += fraction * (x.T @ dz)
    db += fraction * np.sum(dz, axis=0)
