"""The CUDA kernels on a GPU, compiled and launched by CuPy.

Memory, kernels and graphs belong to one stream, the same for all backends of a process, since CuPy
runs everything on the stream that was made current last. A step is recorded as a CUDA graph the
second time it is asked for; the first time runs eagerly, which compiles every kernel that it needs.
While one thread records, others wait: what they launched would become a part of its graph. A GPU
pauses for longer between two graphs than between a graph's launches, so steps in a row share one.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import cupy
import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import InputError
from ..kernels import OPTIONS, Tile, source
from .kernel_arguments import kernels
from .kernel_backend import KernelBackend

OLDEST = 75
"""The oldest compute capability that the kernels serve, times ten."""

OLDEST_TF32 = 80
SEVERAL = 8
"""Steps in a row that are one graph."""

NULL = np.uint64(0)
INSUFFICIENT_DRIVER = 35
"""cudaErrorInsufficientDriver: the driver is older than the runtime that CuPy was built with."""

NO_MEMORY = 2
"""cudaErrorMemoryAllocation: what asks for memory by itself, as a graph does, finds none."""


def _version(number: int) -> str:
    """12040 as 12.4."""
    return f"{number // 1000}.{number % 1000 // 10}"


class _UnusableError(Exception):
    """Why no GPU can run the kernels, in one line."""


def _check_device(precision: str) -> None:
    """Raises _UnusableError if no GPU can run the kernels."""
    runtime = cupy.cuda.runtime
    try:
        driver = runtime.driverGetVersion()
        if driver == 0:
            raise _UnusableError("no NVIDIA driver was found")
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if error.status == INSUFFICIENT_DRIVER:
            needed = _version(runtime.runtimeGetVersion())
            raise _UnusableError(
                f"the driver serves CUDA {_version(driver)}, the installed CuPy needs {needed}; "
                "update the driver or install minivae[cuda12]"
            ) from None
        raise _UnusableError(str(error)) from None
    if count == 0:
        raise _UnusableError("the driver found no GPU")
    capability = int(cupy.cuda.Device().compute_capability)
    oldest = OLDEST_TF32 if precision == "tf32" else OLDEST
    if capability < oldest:
        raise _UnusableError(
            f"the GPU has compute capability {capability / 10}, expected at least {oldest / 10} "
            f"for precision {precision}"
        )


@cache
def _stream(device: int) -> tuple[Any, threading.RLock]:
    """The stream of the present device, and the lock of those who use it."""
    try:
        return cupy.cuda.Stream(non_blocking=True), threading.RLock()
    except cupy.cuda.runtime.CUDARuntimeError as error:  # a GPU that is full or another's alone
        raise _UnusableError(str(error)) from None


class CudaBackend(KernelBackend):
    """The kernels on CuPy's arrays. Raises InputError without a GPU that can run them.

    What reads an array otherwise than through the backend calls `synchronize` before: steps that
    were asked for may not have been launched yet.
    """

    name = "cuda"

    def __init__(self, precision: str = "fp32") -> None:
        try:
            _check_device(precision)
            self.stream, self.lock = _stream(cupy.cuda.Device().id)
        except _UnusableError as error:
            raise InputError(f"device {self.name!r}: {error}") from None
        self._functions: dict[tuple[str, Tile], Any] = {}
        self.asked: _GraphedStep | None = None
        super().__init__(precision)

    def run(
        self,
        kernel: str,
        tile: Tile,
        grid: tuple[int, int, int],
        arguments: list[Any],
    ) -> None:
        function = self._functions.get((kernel, tile))
        if function is None:
            self.load(kernels()[kernel].stem, tile)
            function = self._functions[kernel, tile]
        passed = tuple(NULL if a is None else a for a in arguments)
        with self._on_stream():
            function(grid, (kernels()[kernel].threads,), passed)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with self.after_all_but(None):
            self.stream.use()  # each thread has a current stream of its own
            yield

    @contextmanager
    def after_all_but(self, step: "_GraphedStep | None") -> Iterator[None]:
        """Holds the lock, after what was asked of a captured step, unless it is this one, has been
        launched."""
        with self.lock:
            if self.asked is not None and self.asked is not step:
                self.asked.launch_asked()
                self.asked = None
            yield

    def load(self, stem: str, tile: Tile) -> None:
        """Compiles the kernels of a source, or takes them from CuPy's cache on the disk."""
        code = source(stem, tensor_cores=self.precision == "tf32", tile=tile)
        module = cupy.RawModule(code=code, options=OPTIONS)
        for name, kernel in kernels().items():
            if kernel.stem == stem:
                self._functions[name, tile] = module.get_function(name)

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> Any:
        with self._on_stream(), _one_line_out_of_memory(self.name):
            return cupy.zeros(shape, dtype)

    def asarray(self, array: NDArray) -> Any:
        with self._on_stream(), _one_line_out_of_memory(self.name):
            return cupy.array(array, order="C")

    def assign(self, array: Any, values: Any) -> None:
        with self._on_stream():
            array[...] = self.asarray(values) if isinstance(values, np.ndarray) else values

    def to_numpy(self, array: Any) -> NDArray:
        with self._on_stream():
            return cupy.asnumpy(array)

    def free_memory(self) -> int:
        free, _ = cupy.cuda.runtime.memGetInfo()
        return int(free) + int(cupy.get_default_memory_pool().free_bytes())

    def synchronize(self) -> None:
        with self._on_stream():
            self.stream.synchronize()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        return _GraphedStep(step, self)


class _GraphedStep:
    """A step that becomes a graph: eager at the first call, recorded at the second. From then on a
    call only asks for it: SEVERAL are launched as one graph, fewer one by one as soon as anything
    else is to run."""

    def __init__(self, step: Callable[[], None], backend: CudaBackend) -> None:
        self._step, self._backend = step, backend
        self._called = False
        self._graphs: dict[int, Any] = {}
        self._asked = 0

    def __call__(self) -> None:
        if not self._called:
            self._step()
            self._called = True
            return
        backend = self._backend
        with backend.after_all_but(self):
            if not self._graphs:
                self._graphs[1] = self._recorded(1)
            backend.asked = self
            self._asked += 1
            if self._asked == SEVERAL:
                backend.asked, self._asked = None, 0
                self._launch_several()

    def _launch_several(self) -> None:
        """Launches as one graph what was asked for, recorded the first time. If that fails, all but
        the last are launched, which its caller did not get."""
        if SEVERAL not in self._graphs:
            try:
                self._graphs[SEVERAL] = self._recorded(SEVERAL)
            except BaseException:
                self._asked = SEVERAL - 1
                self.launch_asked()
                raise
        self._graphs[SEVERAL].launch(self._backend.stream)

    def launch_asked(self) -> None:
        """Launches as many steps as were asked for."""
        while self._asked:
            self._asked -= 1
            self._graphs[1].launch(self._backend.stream)

    def _recorded(self, steps: int) -> Any:
        stream = self._backend.stream
        stream.use()
        with _one_line_out_of_memory(self._backend.name):
            stream.begin_capture()
            try:
                for _ in range(steps):
                    self._step()
            except BaseException:
                with suppress(cupy.cuda.runtime.CUDARuntimeError):
                    stream.end_capture()  # of a part of the step, which nobody may launch
                raise
            return stream.end_capture()


@contextmanager
def _one_line_out_of_memory(device: str) -> Iterator[None]:
    """CuPy's or CUDA's error about memory as an InputError."""
    try:
        yield
    except (cupy.cuda.memory.OutOfMemoryError, cupy.cuda.runtime.CUDARuntimeError) as error:
        if getattr(error, "status", NO_MEMORY) != NO_MEMORY:
            raise
        free, total = (size / 2**20 for size in cupy.cuda.runtime.memGetInfo())
        raise InputError(
            f"device {device!r}: out of memory, {free:.0f} of {total:.0f} MiB are free: {error}; "
            "use a smaller batch, or --accumulate to train on it in parts"
        ) from None
