"""The latent, ELBO and Adam kernels' Numba twins: the kernels to read first.

On a GPU they take the place of their CUDA C++ counterparts, on the same arrays and stream, and the
other primitives are those of `cuda`. With NUMBA_ENABLE_CUDASIM=1 in the environment before Numba is
imported they run in Numba's simulator: no GPU is needed, arrays are NumPy's, a debugger stops
inside a kernel, and the other primitives are the reference's.
"""

from typing import Any

import numpy as np
from numba import cuda

from ..kernels import adam_numba, elbo_numba, latent_numba
from ..kernels.block_numba import THREADS
from ..ops.activations import Activation
from ..ops.elbo import TOTALS_SIZE
from ..ops.philox import Noise
from .kernel_arguments import checked_array
from .kernel_backend import LARGEST_GRID
from .reference import ReferenceBackend

# A dense step's kernels are a few blocks each: that is their size, not an oversight, so Numba's
# warning about grids smaller than the GPU has nothing to say.
settings: Any = cuda.config
settings.CUDA_LOW_OCCUPANCY_WARNINGS = 0


def _blocks(threads: int, largest: int = 2**31 - 1) -> int:
    return min(-(-threads // THREADS), largest)


def _check(*arrays: Any, dtype: Any = np.float32) -> None:
    """Numba would compile a kernel anew, and silently, for any other type or layout."""
    for array in arrays:
        checked_array("numba_cuda", "an argument", array, dtype)


def _noise(noise: Noise) -> tuple[np.uint64, np.uint64]:
    """(seed, stream) as the kernels take them."""
    return np.uint64(noise.word), np.uint64(noise.stream)


def numba_cuda_backend(precision: str = "fp32") -> ReferenceBackend:
    """The twins over `cuda`, or in the simulator over the reference. Raises InputError where there
    is no GPU, ImportError without CuPy."""
    if settings.ENABLE_CUDASIM:
        return _SimulatedTwins()
    import cupy

    from .cuda import CudaBackend

    class NumbaCudaBackend(_Twins, CudaBackend):
        """The twins on CuPy's arrays and stream."""

        def __init__(self, precision: str) -> None:
            CudaBackend.__init__(self, precision)
            self._numba_stream = cuda.external_stream(self.stream.ptr)
            self._norm_squares = self.zeros((adam_numba.PARTIALS,))

        def _run_twin(self, kernel: Any, blocks: int, arguments: list[Any]) -> None:
            passed = [
                cuda.as_cuda_array(a, sync=False) if isinstance(a, cupy.ndarray) else a
                for a in arguments
            ]
            with self._on_stream():
                kernel[blocks, THREADS, self._numba_stream](*passed)

    return NumbaCudaBackend(precision)


class _Twins(ReferenceBackend):
    """The primitives that have a twin, each a launch of its own."""

    name: str = "numba_cuda"
    _norm_squares: Any

    # Else `cuda` would run its own kernels, fused with its matrix products, in the twins' place.
    sequence: Any = ReferenceBackend.sequence
    optimizer_step: Any = ReferenceBackend.optimizer_step

    def _run_twin(self, kernel: Any, blocks: int, arguments: list[Any]) -> None:
        """Runs a kernel on `blocks` blocks of THREADS."""
        raise NotImplementedError

    def _launch(self, kernel: Any, blocks: int, *arguments: Any) -> None:
        """The same for any arguments: a Python float goes as a float32."""
        self._run_twin(
            kernel, blocks, [np.float32(a) if isinstance(a, float) else a for a in arguments]
        )

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
        da: Any,
        scale: float,
        weight: float,
        activation: Activation,
    ) -> None:
        _check(y, x, loss, da)
        n, m = y.shape
        kind, slope = activation.code, float(activation.slope)
        self._launch(
            *(elbo_numba.squared_error_loss, n),
            *(y, x, loss, da, float(scale), float(weight), kind, slope, n, m),
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
            *(p, g, m, v, schedule, state, 1.0 - beta1, 1.0 - beta2, float(epsilon), p.size),
        )

    def clip_gradient(self, g: Any, max_norm: float, norm: Any) -> None:
        _check(g, norm)
        partials = self._norm_squares
        self._launch(*(adam_numba.clip_gradient_partials, adam_numba.PARTIALS, g, partials, g.size))
        self._launch(
            *(adam_numba.clip_gradient, _blocks(g.size, LARGEST_GRID)),
            *(g, float(max_norm), norm, partials, g.size),
        )


class _SimulatedTwins(_Twins):
    """The twins in Numba's simulator, on NumPy's arrays."""

    name = "numba_cuda, simulated"

    def __init__(self) -> None:
        self._norm_squares = self.zeros((adam_numba.PARTIALS,))

    def _run_twin(self, kernel: Any, blocks: int, arguments: list[Any]) -> None:
        kernel[blocks, THREADS](*arguments)
