"""The sum of a block's values, in Numba CUDA: the twin of common.cuh's, in shared memory alone, as
Numba's simulator has no warp shuffles.
"""

import numba
from numba import cuda

THREADS = 64


@cuda.jit(device=True)
def block_sum(value):
    """The sum of all threads' values, for all threads of a block of THREADS.

    A tree: 32 threads add the other 32's values to their own, then 16 of them, and so on. The
    order is always the same, so that a run repeats bit for bit.
    """
    partials = cuda.shared.array(THREADS, numba.float32)
    thread = cuda.threadIdx.x
    partials[thread] = value
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half:
            partials[thread] += partials[thread + half]
        cuda.syncthreads()
        half //= 2
    total = partials[0]
    cuda.syncthreads()  # before a next sum writes where this one is still read
    return total
