"""From the kernels of a step to their machine code.

Numba compiles on one core, for seconds a kernel. Where it must, two other processes do so, one from
the first kernel on and one from the last, until they meet. They leave the kernels in Numba's cache,
from which this process then takes all of them: a kernel has copies of the functions that it calls,
optimized once more than the functions themselves, and a process that had compiled both would run
the others, with other roundings than every later run.
"""

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from numba import get_num_threads
from numba.core.compiler_lock import global_compiler_lock
from numba.core.event import Event, Listener, install_listener
from numba.core.registry import CPUDispatcher

Launch = tuple[Callable[..., None], tuple[Any, ...]]
"""A kernel and its arguments."""

Signature = tuple[CPUDispatcher, tuple[Any, ...]]
"""A kernel and the types of its arguments."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: a signal to come when the parent ends."""


def compiled(launches: Sequence[Launch]) -> list[Launch]:
    """The launches, with the functions that Numba would find and call for their arguments."""
    signatures = [_signature(*launch) for launch in launches]
    _load([*dict.fromkeys(each for each in signatures if each)])
    return [
        (_entry_point(*signature) if signature else function, arguments)
        for (function, arguments), signature in zip(launches, signatures, strict=True)
    ]


def _signature(kernel: Callable[..., None], arguments: tuple[Any, ...]) -> Signature | None:
    if not isinstance(kernel, CPUDispatcher):
        return None
    return kernel, tuple(kernel.typeof_pyval(argument) for argument in arguments)


def _entry_point(kernel: CPUDispatcher, types: tuple[Any, ...]) -> Callable[..., None]:
    found: Any = kernel.overloads[types]
    return found.entry_point


def _load(signatures: Sequence[Signature]) -> None:
    """Takes kernels from the cache, in this order, once they are there."""
    complete = False
    for index, (kernel, types) in enumerate(signatures):
        if not complete and not _taken(kernel, types):
            _fill_cache(signatures[index:])
            complete = True
        kernel.compile(types)


class _NotInCacheError(Exception):
    """Numba would have to compile."""


class _Refusal(Listener):
    """Ends a compilation as it begins."""

    def on_start(self, event: Event) -> None:
        raise _NotInCacheError

    def on_end(self, event: Event) -> None:
        pass


def _taken(kernel: CPUDispatcher, types: tuple[Any, ...]) -> bool:
    """Whether the kernel is here, or was in the cache and is now."""
    try:
        with global_compiler_lock, install_listener("numba:compile", _Refusal()):
            kernel.compile(types)
    except _NotInCacheError:
        return False
    return True


def _fill_cache(signatures: Sequence[Signature]) -> None:
    """Compiles kernels in processes of their own. Where there are none, or one failed, what is not
    in the cache is left to this process."""
    ends = [signatures, signatures[::-1]][: get_num_threads()]
    # A process would wait for ever for a compiler that another thread has at this moment.
    with global_compiler_lock:
        processes = [process for process in map(_compiling_process, ends) if process]
    try:
        if processes:
            with suppress(ChildProcessError):  # whose end somebody else was told
                os.waitpid(processes[0], 0)  # it also looks for what the other has compiled
            del processes[0]
    finally:
        for process in processes:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def _compiling_process(signatures: Iterable[Signature]) -> int:
    """The number of a process that compiles the kernels in this order; 0 where there is none:
    elsewhere than on Linux it isn't safe to fork, and a system may have no room."""
    if sys.platform != "linux":
        return 0
    with warnings.catch_warnings():
        # Of locks that other threads may hold: the compiler's is ours.
        warnings.simplefilter("ignore")
        try:
            process = os.fork()
        except OSError:
            return 0
    if process:
        return process
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for kernel, types in signatures:
            kernel.compile(types)
    finally:
        os._exit(0)
