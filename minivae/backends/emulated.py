"""The CUDA kernels on a CPU: g++ builds the sources that a GPU runs, after kernels/host.h.

For proofs, not for speed: every CUDA thread is a fiber, one after another. The libraries are kept
in the user's cache folder, by the hash of their source.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..files import replacing
from ..kernels import FOLDER, Tile, source
from .kernel_arguments import declarations, kernels
from .kernel_backend import KernelBackend

FLAGS = ("-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-w")


def host_program(text: str) -> str:
    """A kernel source as a C++ program for the CPU, with a function `run_NAME` for each kernel that
    takes the grid and the block before the kernel's own arguments, and `shuffle(seed)`."""
    wrappers = ['extern "C" void shuffle(unsigned int seed) { host::shuffle_seed = seed; }']
    for name, parameters in declarations(text).items():
        declared = ", ".join(f"{kind}{' *' if p else ' '}{label}" for label, kind, p in parameters)
        passed = ", ".join(label for label, _, _ in parameters)
        wrappers.append(
            f'extern "C" bool run_{name}(unsigned grid_x, unsigned grid_y, '
            f"unsigned grid_z, unsigned block_x, {declared}) {{\n"
            f"  return host::run({{grid_x, grid_y, grid_z}}, {{block_x}}, "
            f"[=] {{ {name}({passed}); }});\n}}"
        )
    header = (FOLDER / "host.h").read_text()
    return "\n".join((header, "namespace {", text, "}", *wrappers, ""))


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise InputError("device 'emulated' needs the compiler g++, which was not found")
    return compiler


def build(text: str, *flags: str) -> ctypes.CDLL:
    """Compiles a kernel source for the CPU, or takes it from the cache, and loads it.

    Raises InputError if there is no compiler, or with its message.
    """
    from platformdirs import user_cache_path

    program = host_program(text)
    key = hashlib.sha256("\0".join((program, *FLAGS, *flags)).encode()).hexdigest()[:32]
    path = user_cache_path("minivae") / "emulated" / f"{key}.so"
    if not path.exists():
        compiler = _compiler()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            command = [compiler, *FLAGS, *flags, "-x", "c++", "-", "-o", str(temporary)]
            result = subprocess.run(command, input=program, text=True, capture_output=True)
            if result.returncode:
                raise InputError(f"{compiler} failed: {result.stderr.strip()}")
    return ctypes.CDLL(str(path))


@cache
def _module(stem: str, tensor_cores: bool, tile: Tile) -> ctypes.CDLL:
    return build(source(stem, tensor_cores=tensor_cores, tile=tile))


def call(
    kernels_of: ctypes.CDLL,
    kernel: str,
    grid: tuple[int, int, int],
    block: int,
    arguments: list[Any],
) -> None:
    """Runs a kernel of a module with arrays and NumPy scalars.

    Raises RuntimeError if the threads of a block passed different numbers of barriers.
    """
    passed = [
        ctypes.c_void_p(argument.ctypes.data if isinstance(argument, np.ndarray) else None)
        if argument is None or isinstance(argument, np.ndarray)
        else np.ctypeslib.as_ctypes_type(argument.dtype)(argument.item())
        for argument in arguments
    ]
    function = getattr(kernels_of, f"run_{kernel}")
    function.restype = ctypes.c_bool
    if not function(*(ctypes.c_uint(size) for size in (*grid, block)), *passed):
        raise RuntimeError(f"{kernel}: threads of a block passed different numbers of barriers")


class EmulatedBackend(KernelBackend):
    """The kernels, run by the CPU on NumPy arrays."""

    name = "emulated"

    def __init__(self, precision: str = "fp32") -> None:
        super().__init__(precision)
        _compiler()

    def run(
        self,
        kernel: str,
        tile: Tile,
        grid: tuple[int, int, int],
        arguments: list[Any],
    ) -> None:
        stem, _, threads = kernels()[kernel]
        call(self.module(stem, tile), kernel, grid, threads, arguments)

    def module(self, stem: str, tile: Tile) -> ctypes.CDLL:
        """The compiled kernels of a source, in the specialisation for `tile`."""
        return _module(stem, self.precision == "tf32", tile)

    def address(self, array: NDArray) -> int:
        return array.ctypes.data
