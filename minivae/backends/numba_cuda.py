"""The Numba CUDA backend: the CUDA table with the latent, ELBO and Adam kernels' Numba twins, the
kernels to read first.

With NUMBA_ENABLE_CUDASIM=1 in the environment before Numba is imported, the twins run in Numba's
simulator: no GPU, arrays are NumPy's, a debugger stops inside a kernel, and the remaining
primitives are the reference's.
"""

import functools
from typing import Any

import numpy as np
from numba import config, cuda

from ..kernels import adam_numba, elbo_numba, latent_numba
from ..kernels.block_numba import THREADS
from ..ops.activations import KINDS, Activation
from ..ops.elbo import TOTALS_SIZE
from ..ops.philox import Noise
from .reference import ReferenceBackend

# A dense step's kernels are a few blocks each: that is their size, not an oversight, so Numba's
# warning about grids smaller than the GPU has nothing to say.
config.CUDA_LOW_OCCUPANCY_WARNINGS = 0

LARGEST_GRID = 1024
"""Blocks over a flat buffer, whose kernels stride: enough to fill any GPU."""


def _blocks(threads: int, largest: int = 2**31 - 1) -> int:
    return min(-(-threads // THREADS), largest)


def _check(*arrays: Any, dtype: Any = np.float32) -> None:
    """Numba would compile a kernel anew, and silently, for any other type or layout."""
    for array in arrays:
        if array.dtype != dtype or not array.flags.c_contiguous:
            layout = "C-contiguous" if array.flags.c_contiguous else "strided"
            raise TypeError(
                f"expected a C-contiguous array of {np.dtype(dtype)}, found a {layout} one of "
                f"{array.dtype}, shape {array.shape}"
            )


def _noise(noise: Noise) -> tuple[np.uint64, np.uint64]:
    """(seed, stream) as the kernels take them."""
    return np.uint64(noise.seed & 0xFFFFFFFFFFFFFFFF), np.uint64(noise.stream)


class _Twins(ReferenceBackend):
    """The primitives that have a twin, over the table that comes next."""

    name = "numba_cuda"

    def __init__(self) -> None:
        super().__init__()
        self._partials = self.zeros((adam_numba.PARTIALS,))

    def _launch(self, kernel: Any, blocks: int, *arguments: Any) -> None:
        """Runs a kernel on `blocks` blocks of THREADS. A Python float goes as a float32."""
        passed = [np.float32(a) if isinstance(a, float) else self._wrap(a) for a in arguments]
        kernel[blocks, THREADS, self._numba_stream()](*passed)

    def _wrap(self, argument: Any) -> Any:
        """A kernel argument as Numba takes it."""
        return argument

    def _numba_stream(self) -> Any:
        return 0

    def latent_forward(self, head: Any, z: Any, kl: Any, noise: Noise, state: Any) -> None:
        _check(head, z, kl)
        n, d = z.shape
        self._launch(
            *(latent_numba.latent_forward, _blocks(n * -(-d // latent_numba.LANES))),
            *(head, z, kl, *_noise(noise), state, n, d),
        )

    def latent_backward(
        self, head: Any, dz: Any, kl_weight: Any, dhead: Any, noise: Noise, state: Any
    ) -> None:
        _check(head, dz, kl_weight, dhead)
        n, d = dz.shape
        self._launch(
            *(latent_numba.latent_backward, _blocks(n * -(-d // latent_numba.LANES))),
            *(head, dz, kl_weight, dhead, *_noise(noise), state, n, d),
        )

    def bernoulli_loss(self, logits: Any, x: Any, loss: Any, dlogits: Any, scale: float) -> None:
        _check(logits, x, loss, dlogits)
        n, m = logits.shape
        self._launch(elbo_numba.bernoulli_loss, n, logits, x, loss, dlogits, float(scale), n, m)

    def squared_error_loss(
        self,
        y: Any,
        x: Any,
        loss: Any,
        dz: Any,
        scale: float,
        weight: float,
        activation: Activation,
    ) -> None:
        _check(y, x, loss, dz)
        n, m = y.shape
        kind, slope = KINDS.index(activation.kind), float(activation.slope)
        self._launch(
            *(elbo_numba.squared_error_loss, n),
            *(y, x, loss, dz, float(scale), float(weight), kind, slope, n, m),
        )

    def elbo_totals(
        self,
        reconstruction: Any,
        kl: Any,
        schedule: Any,
        state: Any,
        free_bits: float,
        kl_weight: Any,
        totals: Any,
    ) -> None:
        _check(reconstruction, kl, schedule, kl_weight)
        _check(totals, dtype=np.float64)
        assert totals.size == TOTALS_SIZE
        n, d = kl.shape
        self._launch(
            *(elbo_numba.elbo_totals, 1),
            *(reconstruction, kl, schedule, state, float(free_bits), kl_weight, totals, n, d),
        )

    def adam_update(
        self,
        p: Any,
        g: Any,
        m: Any,
        v: Any,
        schedule: Any,
        state: Any,
        beta1: float,
        beta2: float,
        epsilon: float,
    ) -> None:
        _check(p, g, m, v, schedule)
        self._launch(
            *(adam_numba.adam_update, _blocks(p.size, LARGEST_GRID)),
            *(p, g, m, v, schedule, state, float(beta1), float(beta2), float(epsilon), p.size),
        )

    def clip_gradient(self, g: Any, max_norm: float, norm: Any) -> None:
        _check(g, norm)
        partials = self._partials
        self._launch(*(adam_numba.clip_gradient_partials, adam_numba.PARTIALS, g, partials, g.size))
        self._launch(
            *(adam_numba.clip_gradient, _blocks(g.size, LARGEST_GRID)),
            *(g, float(max_norm), norm, partials, g.size),
        )


if config.ENABLE_CUDASIM:

    class NumbaCudaBackend(_Twins):
        """The twins in Numba's simulator, on NumPy's arrays, over the reference."""

else:
    import cupy

    from .cuda import CudaBackend

    @functools.lru_cache(maxsize=1024)
    def _device_array(pointer: int, shape: tuple[int, ...], dtype: str) -> Any:
        """What Numba calls an array: a description, which neither owns nor keeps the memory, and so
        serves whichever CuPy array of this shape has it."""
        interface = {"data": (pointer, False), "shape": shape, "typestr": dtype, "version": 3}
        return cuda.from_cuda_array_interface(interface, owner=None, sync=False)

    _stream = functools.lru_cache(maxsize=16)(cuda.external_stream)

    class NumbaCudaBackend(_Twins, CudaBackend):  # type: ignore[no-redef]
        """The twins on a GPU, over the CUDA C++ kernels."""

        name = "numba_cuda"

        def _wrap(self, argument: Any) -> Any:
            if not isinstance(argument, cupy.ndarray):
                return argument
            return _device_array(argument.data.ptr, argument.shape, argument.dtype.str)

        def _numba_stream(self) -> Any:
            return _stream(cupy.cuda.get_current_stream().ptr)
