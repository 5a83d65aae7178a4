"""From the kernels of a step to their machine code.

Numba compiles on one core, for seconds a kernel. Where it must, a second process does so too, but
from the last kernel on: it leaves them in Numba's cache, where the first finds them when it comes
to them, so that they meet half-way.
"""

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from numba import get_num_threads
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
    _compile([each for each in signatures if each and each[1] not in each[0].overloads])
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


def _compile(signatures: Sequence[Signature]) -> None:
    """Compiles kernels, or takes them from the cache; with help once one was not there."""
    helper = 0
    try:
        for kernel, types in signatures:
            missed = len(kernel.stats.cache_misses)
            kernel.compile(types)
            if not helper and len(kernel.stats.cache_misses) > missed:
                helper = _helper(signatures)
    finally:
        if helper:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(helper, signal.SIGKILL)
                os.waitpid(helper, 0)


def _helper(signatures: Sequence[Signature]) -> int:
    """The number of a process that compiles the kernels from the last on; 0 where there is none:
    elsewhere than on Linux it isn't safe to fork, a single core has no time for it, and a system
    may have no room."""
    if sys.platform != "linux" or get_num_threads() == 1:
        return 0
    with warnings.catch_warnings():
        # Of locks that other threads may hold: a helper that waits for one is killed in the end.
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
        for kernel, types in reversed(signatures):
            kernel.compile(types)
    finally:
        os._exit(0)
