"""From the kernels of a step to their machine code.

Numba compiles on one core, for seconds a kernel. Where it must, other processes do so, each taking
the next kernel that no other has. They leave the kernels in Numba's cache, from which this process
then takes all of them: a kernel has copies of the functions that it calls, optimized once more than
the functions themselves, and a process that had compiled both would run the others, with other
roundings than every later run.
"""

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from numba.core.compiler_lock import global_compiler_lock
from numba.core.event import Event, Listener, install_listener
from numba.core.registry import CPUDispatcher

from .cpu_threads import CORES

Signature = tuple[CPUDispatcher, tuple[Any, ...]]
"""A kernel and the types of its arguments."""

MOST_PROCESSES = 8
"""Each takes some two hundred megabytes."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: a signal to come when the parent ends."""


def compile_all(signatures: Sequence[Signature]) -> None:
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
    tasks, given = os.pipe()
    # Those of matrix products take longest.
    order = sorted(range(len(signatures)), key=lambda i: not _is_product(signatures[i]))
    os.write(given, bytes(order))
    os.close(given)
    processes: list[int] = []
    try:
        # A child forked while another thread holds this lock would wait for it forever.
        with global_compiler_lock, _no_interrupts():
            for _ in range(min(CORES, len(signatures), MOST_PROCESSES)):
                processes += _compiling_process(signatures, tasks)
        while processes:
            with suppress(ChildProcessError):  # whose end somebody else was told
                os.waitpid(processes[-1], 0)
            processes.pop()
    finally:
        os.close(tasks)
        for process in processes:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def _is_product(signature: Signature) -> bool:
    return signature[0].py_func.__module__.endswith("products")


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Keeps Ctrl-C until later: a process that begins must not take it, nor be forgotten by it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _compiling_process(signatures: Sequence[Signature], tasks: int) -> list[int]:
    """The number of a process that compiles kernels whose numbers it reads from a pipe, a byte
    each; none where there is no such process: elsewhere than on Linux it isn't safe to fork, and a
    system may have no room."""
    if sys.platform != "linux":
        return []
    with warnings.catch_warnings():
        # Of locks that other threads may hold: the compiler's is ours.
        warnings.simplefilter("ignore")
        try:
            process = os.fork()
        except OSError:
            return []
    if process:
        return [process]
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while task := os.read(tasks, 1):
            kernel, types = signatures[task[0]]
            kernel.compile(types)
    finally:
        os._exit(0)
