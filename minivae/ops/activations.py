"""Activations y = f(z), elementwise, and the derivative that carries a gradient through them.

    E1    dz = dy * f'(z)                                                     (chain rule)

Most derivatives can be written with the output y alone. Those activations are fused into the
layer below, which then never stores z:

    kind         f(z)                          f'(z) from y
    identity     z                             1
    relu         max(z, 0)                     1 if y > 0 else 0
    leaky_relu   z if z > 0 else slope * z     1 if y > 0 else slope     (slope >= 0)
    tanh         tanh z                        1 - y^2
    sigmoid      1 / (1 + e^-z)                y (1 - y)
    softplus     log(1 + e^z)                  1 - e^-y      (since e^y = 1 + e^z)
    elu          z if z > 0 else e^z - 1       1 if y > 0 else y + 1

by tanh' = 1 - tanh^2, sigmoid' = sigmoid (1 - sigmoid), softplus' = sigmoid and (e^z - 1)' = e^z;
in the piecewise kinds y > 0 exactly where z > 0. (Leaky ReLU: Maas, Hannun & Ng 2013; ELU: Clevert,
Unterthiner & Hochreiter 2016.)

GELU and SiLU are not monotonic, so y does not determine z, and their derivative needs z:

    gelu         z Phi(z)                      Phi(z) + z phi(z)   (Hendrycks & Gimpel 2016)
    silu         z sigmoid(z)                  s + z s (1 - s),  s = sigmoid(z)

by the product rule, with Phi the CDF of the standard normal and phi = Phi' its density.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DERIVATIVE_FROM_OUTPUT = ("identity", "relu", "leaky_relu", "tanh", "sigmoid", "softplus", "elu")
DERIVATIVE_FROM_INPUT = ("gelu", "silu")
KINDS = DERIVATIVE_FROM_OUTPUT + DERIVATIVE_FROM_INPUT

_erf = np.vectorize(math.erf, otypes=[np.float64])


class Activation(NamedTuple):
    """An activation by name; `slope` is the negative slope of `leaky_relu` and unused elsewhere."""

    kind: str = "identity"
    slope: float = 0.0

    @property
    def code(self) -> int:
        """The number by which compiled kernels know the kind."""
        return KINDS.index(self.kind)


IDENTITY = Activation()


def sigmoid(z: NDArray) -> NDArray:
    """1 / (1 + e^-z), without overflow for any finite z."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, e) / (1 + e)


def softplus(z: NDArray) -> NDArray:
    """log(1 + e^z) = max(z, 0) + log(1 + e^-|z|), without overflow for any finite z."""
    return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))


def _standard_normal_cdf(z: NDArray) -> NDArray:
    return (0.5 * (1 + _erf(z / math.sqrt(2)))).astype(z.dtype)


def activation_forward(z: NDArray, y: NDArray, activation: Activation) -> None:
    """y = f(z). Shapes: any, equal. `y` may be `z` itself where the derivative does not need z (the
    kinds in DERIVATIVE_FROM_OUTPUT). Raises ValueError on an unknown kind."""
    kind, slope = activation
    if kind == "identity":
        y[...] = z
    elif kind == "relu":
        np.maximum(z, 0, out=y)
    elif kind == "leaky_relu":
        y[...] = np.where(z > 0, z, slope * z)
    elif kind == "tanh":
        np.tanh(z, out=y)
    elif kind == "sigmoid":
        y[...] = sigmoid(z)
    elif kind == "softplus":
        y[...] = softplus(z)
    elif kind == "elu":
        y[...] = np.where(z > 0, z, np.expm1(np.minimum(z, 0)))
    elif kind == "gelu":
        y[...] = z * _standard_normal_cdf(z)
    elif kind == "silu":
        y[...] = z * sigmoid(z)
    else:
        raise ValueError(f"activation {kind!r} is not one of {', '.join(KINDS)}")


def activation_backward(
    z: NDArray | None, y: NDArray, dy: NDArray, dz: NDArray, activation: Activation
) -> None:
    """dz = dy * f'(z) (E1). Shapes: any, equal. `dz` may be `dy` itself.

    `z` is read only by the kinds in DERIVATIVE_FROM_INPUT, and may be None for the others. Raises
    ValueError on an unknown kind.
    """
    kind, slope = activation
    if kind == "identity":
        dz[...] = dy
    elif kind == "relu":
        np.multiply(dy, y > 0, out=dz)
    elif kind == "leaky_relu":
        dz[...] = np.where(y > 0, dy, slope * dy)
    elif kind == "tanh":
        np.multiply(dy, 1 - y * y, out=dz)
    elif kind == "sigmoid":
        np.multiply(dy, y * (1 - y), out=dz)
    elif kind == "softplus":
        np.multiply(dy, -np.expm1(-y), out=dz)
    elif kind == "elu":
        np.multiply(dy, np.where(y > 0, 1, y + 1), out=dz)
    elif kind == "gelu":
        assert z is not None
        density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        np.multiply(dy, _standard_normal_cdf(z) + z * density, out=dz)
    elif kind == "silu":
        assert z is not None
        s = sigmoid(z)
        np.multiply(dy, s + z * s * (1 - s), out=dz)
    else:
        raise ValueError(f"activation {kind!r} is not one of {', '.join(KINDS)}")
