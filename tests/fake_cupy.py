"""As much of CuPy as the `cuda` backend uses, on the CPU: arrays are NumPy's, kernels are run by
kernels/host.h, and a graph is the list of launches that were recorded, which launches them again.

It stands in for a GPU in the tests of what Python does around the kernels: arguments, streams, and
that a recorded step holds nothing that changes from step to step.
"""

from __future__ import annotations

import types
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np

from minivae.backends import emulated


class Array:
    """An array on the GPU: no more than CuPy's can does it know of NumPy's, which neither turn into
    each other nor are assigned to each other unasked."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape, self.dtype, self.size = array.shape, array.dtype, array.size
        self.ndim, self.nbytes, self.flags = array.ndim, array.nbytes, array.flags
        self.data = types.SimpleNamespace(ptr=array.ctypes.data)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, key: Any) -> Array:
        return Array(self.array[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, np.ndarray):
            raise TypeError("a NumPy array is assigned to one on the GPU")
        self.array[key] = value.array if isinstance(value, Array) else value

    def reshape(self, *shape: Any) -> Array:
        return Array(self.array.reshape(*shape))

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
        raise TypeError("an array on the GPU is turned into one of NumPy's unasked")


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class OutOfMemoryError(MemoryError):
    pass


def make(*, driver: int = 13000, capability: str = "90", devices: int = 1, memory: int = 2**30):
    """A module `cupy` for a machine with such a driver and GPU."""
    current: list[Stream] = []
    recording: list[Stream] = []
    launches: list[str] = []

    def device_count() -> int:
        if driver < 13000:
            raise CUDARuntimeError(35, "cudaErrorInsufficientDriver")
        return devices

    class Graph:
        def __init__(self, calls: list[Any]) -> None:
            self.calls = calls

        def launch(self, stream: Any = None) -> None:
            assert not recording, "a graph was launched while another was recorded"
            for call in self.calls:
                call()

    class Stream:
        ptr = 0

        def __init__(self, non_blocking: bool = False) -> None:
            self.calls: list[Any] = []

        def use(self) -> Stream:
            current[:] = [self]
            return self

        def synchronize(self) -> None:
            pass

        def begin_capture(self) -> None:
            assert not recording, "a graph was begun while another was recorded"
            self.calls = []
            recording.append(self)

        def end_capture(self) -> Graph:
            recording.remove(self)
            return Graph(self.calls)

    class RawModule:
        def __init__(self, *, code: str, options: tuple[str, ...]) -> None:
            self.module = emulated.build(code)

        def get_function(self, name: str) -> Any:
            def function(grid: Any, block: Any, arguments: tuple[Any, ...]) -> None:
                passed = [_plain(argument) for argument in arguments]

                def call() -> None:
                    launches.append(name)
                    emulated.call(self.module, name, grid, block[0], passed)

                # Launches go to the current stream, whichever one is recording.
                if current[-1] in recording:
                    current[-1].calls.append(call)
                else:
                    call()

            return function

    def to_numpy(array: Array) -> np.ndarray:
        assert not recording, "memory was copied while a graph was recorded"
        return np.array(array.array)

    def checked(array: np.ndarray) -> Array:
        assert not recording, "memory was asked for while a graph was recorded"
        if array.nbytes > memory:
            raise OutOfMemoryError("out of memory")
        return Array(array)

    cupy = types.ModuleType("cupy")
    cupy.__spec__ = ModuleSpec("cupy", None)  # by which one asks whether it is installed
    runtime = types.SimpleNamespace(
        driverGetVersion=lambda: driver,
        runtimeGetVersion=lambda: 13000,
        getDeviceCount=device_count,
        getDeviceProperties=lambda number: {"name": b"a stand-in"},
        memGetInfo=lambda: (memory, memory),
        CUDARuntimeError=CUDARuntimeError,
    )
    cupy.__dict__.update(
        cuda=types.SimpleNamespace(
            runtime=runtime,
            Stream=Stream,
            Device=lambda: types.SimpleNamespace(id=0, compute_capability=capability),
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        ),
        RawModule=RawModule,
        ndarray=Array,
        zeros=lambda shape, dtype: checked(np.zeros(shape, dtype)),
        array=lambda array, order: checked(np.array(array, order=order)),
        asnumpy=to_numpy,
        get_default_memory_pool=lambda: types.SimpleNamespace(free_bytes=lambda: 0),
        launches=launches,
    )
    return cupy


def _plain(argument: Any) -> Any:
    """An argument as `emulated.call` takes it; the null pointer is None."""
    if isinstance(argument, np.uint64) and argument == 0:
        return None
    return argument.array if isinstance(argument, Array) else argument
