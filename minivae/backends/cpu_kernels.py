"""The CPU backend's loops, compiled by Numba: one pass over memory each.

A kernel runs on one core and without the GIL. The transcendental functions are polynomials in
float32, since calls into the C library do not vectorise. `contract` allows fused multiply-adds;
`reassoc`, which vectorises sums, is only where a sum is. Neither assumes that values are finite.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ..ops import philox
from ..ops.activations import KINDS
from ..ops.state import BETA, DECAY, EPOCH, FAILED, FIRST, INDEX, ROOT, STEP, STEP_SIZE

kernel = njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
sum_kernel = njit(cache=True, nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy")

IDENTITY, RELU, LEAKY_RELU, TANH, SIGMOID, SOFTPLUS, ELU, GELU, SILU = range(len(KINDS))
assert KINDS == (
    *("identity", "relu", "leaky_relu", "tanh", "sigmoid", "softplus", "elu", "gelu", "silu"),
)

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
TWO = np.float32(2)


@intrinsic
def bits_of_float(typing_context, x):
    """The bits of a float32 as an int32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def float_of_bits(typing_context, bits):
    """The float32 that has these bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


# Elementary functions

LOG2_E = np.float32(1.4426950408889634)
ROUNDER = np.float32(1.5 * 2.0**23)
"""Added to a float32 of magnitude below 2^22 it leaves the nearest integer in the low bits."""
ROUNDER_BITS = np.int32(ROUNDER.view(np.int32))
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_MIN, EXP_MAX = np.float32(-104), np.float32(89)
EXPM1_MIN = np.float32(-25)
SQRT_HALF = np.float32(math.sqrt(0.5))


@kernel
def _power_of_two(n):
    """2^n for an integer n from -126 to 127."""
    return float_of_bits(np.int32((n + 127) << 23))


@kernel
def _expm1_reduced(r):
    """e^r - 1 for |r| <= ln(2) / 2: its Taylor series, economised."""
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r) * r + r


@kernel
def exp(x):
    """e^x: x = n ln 2 + r, e^x = 2^n e^r. NaN stays NaN, since every comparison with it fails."""
    x = EXP_MAX if x > EXP_MAX else x
    x = EXP_MIN if x < EXP_MIN else x
    shifted = x * LOG2_E + ROUNDER
    n = bits_of_float(shifted) - ROUNDER_BITS
    nearest = shifted - ROUNDER
    r = (x - nearest * LN2_HIGH) - nearest * LN2_LOW
    # Two factors: 2^n itself may be out of range where e^x is not.
    half = n >> 1
    return (_expm1_reduced(r) + ONE) * _power_of_two(half) * _power_of_two(n - half)
