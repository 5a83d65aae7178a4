"""The twin of philox.cuh in Numba CUDA: random words and normals by the equations of ops/philox.py.

A word is kept in a uint64, as in the NumPy version: the product of two words fits, and the high
half is a shift away.
"""

import math

import numba
from numba import cuda

from ..ops import philox

if cuda.config.ENABLE_CUDASIM:

    def sincospi(x):
        """(sin, cos) of pi x, for the simulator, which has no libdevice."""
        return numba.float32(math.sin(math.pi * x)), numba.float32(math.cos(math.pi * x))

else:
    from numba.cuda.libdevice import sincospif as sincospi
    # math.cos would bring a reduction of angles above 10^5, in float64 and local memory.

M0, M1 = numba.uint64(philox.M0), numba.uint64(philox.M1)
W0, W1 = numba.uint64(philox.W0), numba.uint64(philox.W1)
LOW = numba.uint64(0xFFFFFFFF)
WORD_BITS = numba.uint64(32)

SPACING, FIRST = numba.float32(2.0**-32), numba.float32(2.0**-33)
TWO = numba.float32(2)


@cuda.jit(device=True)
def philox4x32(c0, c1, c2, c3, k0, k1):
    """The four words of a counter (E1)."""
    for _ in range(philox.ROUNDS):
        product0 = M0 * c0
        product1 = M1 * c2
        c0 = (product1 >> WORD_BITS) ^ c1 ^ k0
        c1 = product1 & LOW
        c2 = (product0 >> WORD_BITS) ^ c3 ^ k1
        c3 = product0 & LOW
        k0 = (k0 + W0) & LOW
        k1 = (k1 + W1) & LOW
    return c0, c1, c2, c3


@cuda.jit(device=True)
def random_words(block, row, step, seed, stream):
    """The words of elements (row, 4 block) to (row, 4 block + 3)."""
    return philox4x32(
        numba.uint64(block),
        numba.uint64(row) & LOW,
        numba.uint64(step) & LOW,
        numba.uint64(stream),
        numba.uint64(seed) & LOW,
        numba.uint64(seed) >> WORD_BITS,
    )


@cuda.jit(device=True)
def uniform(word):
    """A word as a number in (0, 1] (E2)."""
    return numba.float32(word) * SPACING + FIRST


@cuda.jit(device=True)
def normal4(words):
    """Four standard normals from four words (E3)."""
    radius0 = math.sqrt(-TWO * math.log(uniform(words[0])))
    radius1 = math.sqrt(-TWO * math.log(uniform(words[2])))
    sine0, cosine0 = sincospi(TWO * uniform(words[1]))
    sine1, cosine1 = sincospi(TWO * uniform(words[3]))
    return radius0 * cosine0, radius0 * sine0, radius1 * cosine1, radius1 * sine1
