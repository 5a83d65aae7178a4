"""Kernels with their arguments, as the CPU backend's threads take them: for each a function that
reads the arguments from memory and calls the kernel.

A kernel whose first parameters are `part` and `parts` runs on all threads side by side; any other
on one, while the others wait.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

# What Numba's own dispatchers know the types of values by, within a microsecond
from numba._dispatcher import compute_fingerprint  # type: ignore[import-untyped]
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher, cpu_target
from numba.np.arrayobj import populate_array
from numpy.typing import NDArray

from .cpu_compile import Signature, compile_all
from .cpu_threads import FUNCTION, KERNELS, threads

Launch = tuple[Callable[..., None], tuple[Any, ...]]
"""A kernel and its arguments."""

WORD = ir.IntType(64)


class Job(NamedTuple):
    """`calls` (kernels, 2) has the address of each kernel's function and that of its arguments, for
    `Threads.run`; `kept` what has to live as long."""

    calls: NDArray[np.int64]
    kept: Any


_functions: dict[Signature, int] = {}
_signatures: dict[tuple[CPUDispatcher, bytes], Signature] = {}
_libraries: list[Any] = []
"""What was made: addresses, types by what tells them apart, and the libraries of the functions."""

_failed = np.zeros(1, np.int64)
"""Set by a function whose kernel failed."""


def job(launches: Sequence[Launch]) -> Job:
    """The kernels, compiled, and their arguments."""
    signatures = [_signature(*launch) for launch in launches]
    new = [*dict.fromkeys(each for each in signatures if each not in _functions)]
    if new:
        compile_all([*new, *KERNELS])
        with global_compiler_lock:
            _make_functions(new)
    words: list[int] = []
    places = []
    for _, arguments in launches:
        places.append(8 * len(words))
        words += _words(arguments)
    kept = np.array(words, np.int64)
    first = kept.ctypes.data
    calls = [(_functions[which], first + at) for which, at in zip(signatures, places, strict=True)]
    return Job(np.array(calls, np.int64), (launches, kept))


def run(job: Job, count: int) -> None:
    """Runs a job on so many threads. MemoryError if a kernel found no memory for itself."""
    threads(count).run(job.calls)
    if _failed[0]:
        _failed[0] = 0
        raise MemoryError("not enough memory for a kernel of the CPU backend")


def _shared(kernel: Any) -> bool:
    """Whether all threads run it."""
    return bool(kernel.py_func.__code__.co_varnames[:2] == ("part", "parts"))


def _signature(kernel: Any, arguments: tuple[Any, ...]) -> Signature:
    key = kernel, compute_fingerprint(arguments)
    if key not in _signatures:
        own = [kernel.typeof_pyval(argument) for argument in arguments]
        before = [types.int64, types.int64] if _shared(kernel) else []
        _signatures[key] = kernel, (*before, *own)
    return _signatures[key]


def _words(arguments: tuple[Any, ...]) -> list[int]:
    """The arguments as numbers of 64 bits: of an array its address, shape and strides."""
    words: list[int] = []
    for argument in arguments:
        if isinstance(argument, tuple):
            words += _words(argument)
        elif isinstance(argument, np.ndarray):
            words += [argument.ctypes.data, *argument.shape, *argument.strides]
        else:
            number = np.asarray(argument).tobytes()
            words.append(int.from_bytes(number, sys.byteorder, signed=True))
    return words


def _make_functions(signatures: Sequence[Signature]) -> None:
    """Makes a function for each compiled kernel, for arguments of these types."""
    context: Any = cpu_target.target_context
    library = context.codegen().create_library(f"jobs {len(_libraries)}")
    module = library.create_ir_module("jobs")
    names = [_emit(context, module, *signature) for signature in signatures]
    library.add_ir_module(module)
    library.finalize()
    _libraries.append(library)
    for signature, name in zip(signatures, names, strict=True):
        _functions[signature] = library.get_pointer_to_function(name)


def _emit(context: Any, module: Any, kernel: CPUDispatcher, kinds: tuple[Any, ...]) -> str:
    """The name of a function in a module that calls a kernel."""
    found: Any = kernel.overloads[kinds]
    name = f"job {found.fndesc.llvm_func_name}"
    function = ir.Function(module, FUNCTION, name)
    builder = ir.IRBuilder(function.append_basic_block())
    address, part, parts = function.args
    shared = _shared(kernel)
    with builder.if_then(ir.IntType(1)(1) if shared else builder.icmp_signed("==", part, WORD(0))):
        words = _read(builder, builder.inttoptr(address, WORD.as_pointer()))
        own = [_value(context, builder, kind, words) for kind in kinds[2 if shared else 0 :]]
        values = [part, parts, *own] if shared else own
        callee = context.declare_function(module, found.fndesc)
        status, _ = context.call_conv.call_function(builder, callee, types.none, kinds, values)
        with builder.if_then(status.is_error):
            builder.store(WORD(1), builder.inttoptr(WORD(_failed.ctypes.data), WORD.as_pointer()))
    builder.ret_void()
    return name


def _read(builder: Any, words: Any) -> Iterator[Any]:
    """One word after the other."""
    at = 0
    while True:
        yield builder.load(builder.gep(words, [WORD(at)]))
        at += 1


def _value(context: Any, builder: Any, kind: Any, words: Iterator[Any]) -> Any:
    """A value of a type from its words."""
    if isinstance(kind, types.BaseTuple):
        values = [_value(context, builder, each, words) for each in kind.types]  # type: ignore[attr-defined]
        return context.make_tuple(builder, kind, values)
    word = next(words)
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder)
        populate_array(
            array,
            data=builder.inttoptr(word, array.data.type),
            shape=[next(words) for _ in range(kind.ndim)],
            strides=[next(words) for _ in range(kind.ndim)],
            itemsize=context.get_abi_sizeof(context.get_data_type(kind.dtype)),
            meminfo=None,  # the job keeps the memory
        )
        return array._getvalue()
    layout = context.get_value_type(kind)
    if isinstance(layout, ir.IntType):
        return word if layout == WORD else builder.trunc(word, layout)
    if kind == types.float32:
        word = builder.trunc(word, ir.IntType(32))
    return builder.bitcast(word, layout)
