"""The twin of elbo.cu in Numba CUDA: equations of ops/elbo.py.

One block sums one image: every thread adds up its own pixels, and then the block its threads.
"""

import math

import numba
from numba import cuda

from ..ops.activations import KINDS
from ..ops.elbo import KL, LOSS, RECONSTRUCTION
from ..ops.state import BETA, FAILED, INDEX
from .block_numba import THREADS, block_sum

ZERO, ONE, TWO = numba.float32(0), numba.float32(1), numba.float32(2)
IDENTITY, RELU, LEAKY_RELU, TANH, SIGMOID, SOFTPLUS, ELU = range(7)
assert KINDS[:7] == ("identity", "relu", "leaky_relu", "tanh", "sigmoid", "softplus", "elu")


@cuda.jit(device=True)
def activation_derivative(y, kind, slope):
    """f'(z) from y = f(z): the table of ops/activations.py."""
    if kind == RELU:
        return ONE if y > ZERO else ZERO
    if kind == LEAKY_RELU:
        return ONE if y > ZERO else slope
    if kind == TANH:
        return ONE - y * y
    if kind == SIGMOID:
        return y * (ONE - y)
    if kind == SOFTPLUS:
        return -math.expm1(-y)
    if kind == ELU:
        return ONE if y > ZERO else y + ONE
    return ONE


@cuda.jit
def bernoulli_loss(logits, x, loss, dlogits, scale, n, m):
    """logits, x and dlogits (n, m), loss (n,). Grid: a block for each of the n images."""
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    partial = ZERO
    for j in range(thread, m, THREADS):
        a, pixel = logits[row, j], x[row, j]
        e = math.exp(-abs(a))
        sigmoid = (ONE if a >= ZERO else e) / (ONE + e)
        partial += max(a, ZERO) - pixel * a + math.log1p(e)  # E2
        dlogits[row, j] = (sigmoid - pixel) * scale
    total = block_sum(partial)
    if thread == 0:
        loss[row] = total


@cuda.jit
def squared_error_loss(y, x, loss, da, scale, weight, kind, slope, n, m):
    """y, x and da (n, m), loss (n,). Grid: a block for each of the n images."""
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    partial = ZERO
    for j in range(thread, m, THREADS):
        output = y[row, j]
        error = output - x[row, j]
        partial += error * error
        derivative = activation_derivative(output, kind, slope)
        da[row, j] = TWO * weight * scale * error * derivative  # E3
    total = block_sum(partial)
    if thread == 0:
        loss[row] = weight * total


@cuda.jit
def elbo_totals(reconstruction, kl, schedule, state, free_bits, kl_weight, totals, n, d):
    """reconstruction (n,), kl (n, d), schedule (steps, 5), state (5,), kl_weight (d,), totals (3,)
    in float64. Grid: one block, striding over the dimensions."""
    thread = cuda.threadIdx.x
    images = numba.float32(n)
    beta = schedule[state[INDEX], BETA]
    reconstruction_sum = ZERO
    for row in range(thread, n, THREADS):
        reconstruction_sum += reconstruction[row]
    kl_sum, bounded_sum = ZERO, ZERO
    for j in range(thread, d, THREADS):
        mean_kl = ZERO
        for row in range(n):
            mean_kl += kl[row, j]
        mean_kl /= images
        kl_weight[j] = beta / images if mean_kl > free_bits else ZERO  # E6
        kl_sum += mean_kl
        # This way round a mean that is NaN stays NaN.
        bounded_sum += free_bits if mean_kl < free_bits else mean_kl
    reconstruction_sum = block_sum(reconstruction_sum)
    kl_sum = block_sum(kl_sum)
    bounded_sum = block_sum(bounded_sum)
    if thread == 0:
        loss = reconstruction_sum + images * beta * bounded_sum  # E5
        if not math.isfinite(loss):
            state[FAILED] = 1
        if state[FAILED] == 0:
            # The only float64 of these kernels: running sums of a whole run.
            totals[LOSS] += loss
            totals[RECONSTRUCTION] += reconstruction_sum
            totals[KL] += images * kl_sum
