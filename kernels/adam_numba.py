"""The twin of adam.cu in Numba CUDA: equations of ops/adam.py.

The grid may be smaller than the buffer: each thread strides over it.
"""

import math

import numba
from numba import cuda

from ..ops.state import DECAY, FAILED, INDEX, ROOT, STEP_SIZE
from .block_numba import THREADS, block_sum

PARTIALS = 16
ZERO = numba.float32(0)


@cuda.jit
def adam_update(p, g, m, v, schedule, state, new1, new2, epsilon, size):
    """p, g, m and v (size,), schedule (steps, 5), state (5,); new1 is 1 - beta1, new2 1 - beta2."""
    if state[FAILED] != 0:
        return
    row = state[INDEX]
    step_size, root, decay = schedule[row, STEP_SIZE], schedule[row, ROOT], schedule[row, DECAY]
    for i in range(cuda.grid(1), size, cuda.gridsize(1)):
        gradient = g[i]
        mean = m[i] + new1 * (gradient - m[i])  # E1
        variance = v[i] + new2 * (gradient * gradient - v[i])  # E2
        m[i] = mean
        v[i] = variance
        # E4, then E3
        p[i] = decay * p[i] - step_size * mean / (math.sqrt(variance) / root + epsilon)


@cuda.jit
def clip_gradient_partials(g, partials, size):
    """g (size,), partials (PARTIALS,): a sum of squares for each of PARTIALS blocks."""
    partial = ZERO
    for i in range(cuda.grid(1), size, cuda.gridsize(1)):
        partial += g[i] * g[i]
    total = block_sum(partial)
    if cuda.threadIdx.x == 0:
        partials[cuda.blockIdx.x] = total


@cuda.jit
def clip_gradient(g, max_norm, norm, partials, size):
    """g (size,), norm (1,), partials (PARTIALS,), which every block adds up again by itself."""
    partial = ZERO
    for i in range(cuda.threadIdx.x, PARTIALS, THREADS):
        partial += partials[i]
    total = math.sqrt(block_sum(partial))
    if cuda.grid(1) == 0:
        norm[0] = total
    if total > max_norm:
        scale = max_norm / total
        for i in range(cuda.grid(1), size, cuda.gridsize(1)):
            g[i] *= scale  # E5
