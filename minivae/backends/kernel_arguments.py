"""The kernels of `kernels/` as their sources declare them, and the check of arguments against that:
their number, types and contiguity, in one place for whoever launches a kernel."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from ..errors import InputError
from ..kernels import STEMS, source
from .tiling import BLOCK

POINTERS = {
    "float": np.float32,
    "double": np.float64,
    "int": np.int32,
    "long long": np.int64,
    "unsigned char": np.uint8,
}
SCALARS = {
    "int": np.int32,
    "float": np.float32,
    "unsigned int": np.uint32,
    "unsigned long long": np.uint64,
}
WARP = 32
THREADS = {
    "advance_state": 1,
    "calibrate_gaussian_variance": 512,
    "capacity_totals": 512,
    "elbo_totals": 512,
    "elbo_totals_of_tiles": 512,
}

LARGEST_INT = 2**31 - 1

COUNTED_IN_INTS = ("latent", "labels", "objectives")
"""Source files whose kernels count the numbers of all their arrays in ints; others count rows."""

_DECLARATION = re.compile(
    r'extern "C" __global__ void (?:__launch_bounds__\(.*?\)\s)?(\w+)\(([^)]*)\)'
)


class Kernel(NamedTuple):
    """A kernel's source file, its parameters' (name, type, whether it is a pointer), and how many
    threads a block has."""

    stem: str
    parameters: tuple[tuple[str, str, bool], ...]
    threads: int


def declarations(text: str) -> dict[str, tuple[tuple[str, str, bool], ...]]:
    """The parameters of each kernel that a source declares."""
    found = {}
    for name, parameters in _DECLARATION.findall(text):
        parsed = []
        for parameter in parameters.split(","):
            words = parameter.replace("*", " * ").replace("__restrict__", " ").split()
            base = " ".join(word for word in words[:-1] if word not in ("const", "*"))
            parsed.append((words[-1], base, "*" in words))
        found[name] = tuple(parsed)
    return found


@cache
def kernels() -> dict[str, Kernel]:
    """Every kernel by its name."""
    return {
        name: Kernel(stem, parameters, THREADS.get(name, BLOCK))
        for stem in STEMS
        for name, parameters in declarations(source(stem)).items()
    }


def checked_arguments(kernel: str, arguments: Sequence[Any]) -> list[Any]:
    """The arguments in the types that the kernel declares.

    Raises TypeError on an array of another type than declared, or one that is strided, and
    InputError on a size that the kernels cannot count to.
    """
    stem, parameters, _ = kernels()[kernel]
    passed = [
        checked_array(kernel, name, argument, POINTERS[kind])
        if is_pointer
        else _checked_scalar(kernel, name, argument, kind)
        for (name, kind, is_pointer), argument in zip(parameters, arguments, strict=True)
    ]
    if stem in COUNTED_IN_INTS:
        for (name, *_), argument in zip(parameters, arguments, strict=True):
            _checked_scalar(kernel, f"the size of {name}", getattr(argument, "size", 0), "int")
    return passed


def _checked_scalar(kernel: str, name: str, value: Any, kind: str) -> Any:
    """The number in the kernel's type; InputError of an int that is beyond it."""
    if kind == "int" and abs(int(value)) > LARGEST_INT:
        raise InputError(
            f"{kernel}: {name} is {value}, expected at most {LARGEST_INT}: use a smaller batch, or "
            "--accumulate to train on it in parts"
        )
    return SCALARS[kind](value)


def checked_array(kernel: str, name: str, array: Any, dtype: DTypeLike) -> Any:
    """The array, for a kernel that would read any other type or layout as numbers of `dtype` in a
    row; TypeError if it is of another."""
    if array is None:
        return None
    if array.dtype != dtype or not array.flags.c_contiguous:
        layout = "a C-contiguous" if array.flags.c_contiguous else "a strided"
        raise TypeError(
            f"{kernel}: {name} is {layout} array of {array.dtype}, shape {array.shape}; expected a "
            f"C-contiguous one of {np.dtype(dtype)}"
        )
    return array
