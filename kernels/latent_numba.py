"""The twin of latent.cu in Numba CUDA: equations of ops/latent.py, one thread per four columns.

Numbers are written as `numba.float32(...)`, since a bare 0.5 is a float64 and would make float64 of
everything that it touches.
"""

import math

import numba
from numba import cuda

from ..ops.state import STEP
from .philox_numba import normal4, random_words

HALF = numba.float32(0.5)
LANES = 4


@cuda.jit
def latent_forward(head, z, kl, seed, stream, state, n, d):
    """head (n, 2 d), z and kl (n, d), state (5,)."""
    blocks = (d + LANES - 1) // LANES
    thread = cuda.grid(1)
    if thread >= n * blocks:
        return
    row, block = thread // blocks, thread % blocks
    eps = normal4(random_words(block, row, state[STEP], seed, stream))
    for lane in range(LANES):
        j = block * LANES + lane
        if j < d:
            mu, logvar = head[row, j], head[row, d + j]
            z[row, j] = mu + math.exp(HALF * logvar) * eps[lane]  # E1
            kl[row, j] = HALF * (mu * mu + math.expm1(logvar) - logvar)  # E2


@cuda.jit
def latent_backward(head, dz, kl_weight, dhead, seed, stream, state, n, d):
    """head and dhead (n, 2 d), dz (n, d), kl_weight (d,), state (5,)."""
    blocks = (d + LANES - 1) // LANES
    thread = cuda.grid(1)
    if thread >= n * blocks:
        return
    row, block = thread // blocks, thread % blocks
    eps = normal4(random_words(block, row, state[STEP], seed, stream))
    for lane in range(LANES):
        j = block * LANES + lane
        if j < d:
            mu, logvar, c = head[row, j], head[row, d + j], kl_weight[j]
            through_z = dz[row, j] * eps[lane] * math.exp(HALF * logvar)
            dhead[row, j] = dz[row, j] + c * mu  # E3
            dhead[row, d + j] = HALF * (through_z + c * math.expm1(logvar))  # E4
