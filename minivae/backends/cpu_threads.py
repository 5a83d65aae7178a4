"""The CPU backend's threads. They go through a list of kernels together, each with its own part of
every one; between two kernels they wait for one another without falling asleep, which takes tenths
of a microsecond.

They are Python's threads, in code that does not hold the GIL. Numba has threads of its own, but
wakes them anew for every kernel, and compiles one for them five times.
"""

import ctypes
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from queue import SimpleQueue
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray

from .cpu_cache import inlined, kernel, settings
from .cpu_tiles import emitted

CORES: int = settings.NUMBA_NUM_THREADS
"""That this process may use, unless the environment says how many."""

LINE = 16
"""Numbers that lie so far apart share no line of a cache."""

NUMBER, JOB, COUNT, YIELD = range(4)
"""The first of the cache lines that threads share: the number of the last job, on which all spin;
that job's address and its number of functions; and the address of sched_yield."""

BARRIER, STATE = 0, LINE
LINES = 2
"""Each thread's own lines: the number of the last barrier that it reached; and its state."""

AWAKE, CALLED, ASLEEP = range(3)
"""States of a thread: it looks out for a job; a job is coming, so that it must not fall asleep; it
has to be woken."""

PATIENCE = 1 << 6
"""How often a waiting thread looks before it yields its core: for a few microseconds."""

LONGEST_WATCH = 1 << 12
"""How often a thread looks for a job before it falls asleep: for a millisecond or two."""

PERIOD, TRIAL = 800, 4
"""Of every PERIOD runs of a job the first 2 TRIAL are timed: TRIAL with the present number of
threads, and TRIAL with a neighbouring one."""

CLEARLY_FASTER = 0.9
"""The fraction of the time that another number of threads must not exceed to be taken."""

INTEGER = ir.IntType(64)
FUNCTION = ir.FunctionType(ir.VoidType(), [INTEGER] * 3)
"""What threads run: from the address of its arguments, the number of a part and how many there are.
"""

X86 = ("x86_64", "AMD64")
"""What systems call such a machine."""


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """The address of numbers[at], the first two arguments."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return cgutils.gep(builder, array.data, arguments[1])


@emitted
def read(typing_context: Any, numbers: Any, at: Any) -> Any:
    """numbers[at]. What its writer wrote before can then be read as well."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments)
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(numbers, types.intp), generate


@emitted
def write(typing_context: Any, numbers: Any, at: Any, value: Any) -> Any:
    """numbers[at] = value, for `read`."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments)
        builder.store_atomic(arguments[2], place, "release", 8)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, types.int64), generate


@emitted
def exchange(typing_context: Any, numbers: Any, at: Any, value: Any) -> Any:
    """numbers[at] = value. Returns what was there."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments)
        return builder.atomic_rmw("xchg", place, arguments[2], "seq_cst")

    return types.int64(numbers, types.intp, types.int64), generate


@emitted
def replace(typing_context: Any, numbers: Any, at: Any, old: Any, new: Any) -> Any:
    """numbers[at] = new if it is old. Returns whether it was."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments)
        found = builder.cmpxchg(place, *arguments[2:], "seq_cst", "seq_cst")
        return builder.extract_value(found, 1)

    return types.boolean(numbers, types.intp, types.int64, types.int64), generate


@emitted
def _call(typing_context: Any, job: Any, i: Any, part: Any, parts: Any) -> Any:
    """Calls the i-th function of a job."""

    def generate(context, builder, signature, values):
        job, i, *parts = values
        pairs = builder.inttoptr(job, INTEGER.as_pointer())
        two = (builder.add(builder.mul(i, INTEGER(2)), INTEGER(which)) for which in (0, 1))
        function, arguments = (builder.load(builder.gep(pairs, [at])) for at in two)
        function = builder.inttoptr(function, FUNCTION.as_pointer())
        builder.call(function, [arguments, *parts])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@emitted
def _let_others(typing_context: Any, function: Any) -> Any:
    """Calls `int function(void)`."""

    def generate(context, builder, signature, values):
        layout = ir.FunctionType(ir.IntType(32), [])
        builder.call(builder.inttoptr(values[0], layout.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@emitted
def _pause(typing_context: Any) -> Any:
    """Tells the core, where one listens, that this thread waits."""

    def generate(context, builder, signature, values):
        if platform.machine() in X86:
            layout = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, layout, name), [])
        return context.get_dummy_value()

    return types.void(), generate


@kernel
def _wait(shared, looks):
    """Pauses, or after PATIENCE looks in vain yields the core."""
    if looks < PATIENCE:
        _pause()
    else:
        _let_others(shared[YIELD])


@inlined
def _own(part):
    """Where a thread's own lines begin."""
    return LINE * (1 + LINES * part)


@kernel
def _barrier(shared, part, parts, number):
    """Waits until all threads have reached the barrier of this number."""
    write(shared, _own(part) + BARRIER, number)
    for other in range(parts):
        looks = 0
        while read(shared, _own(other) + BARRIER) < number:
            _wait(shared, looks)
            looks += 1


@kernel
def _take_part(shared, part, parts):
    """One thread's part of the last job."""
    job, barrier = shared[JOB], shared[_own(part) + BARRIER]
    for i in range(shared[COUNT]):
        _call(job, i, part, parts)
        barrier += 1
        _barrier(shared, part, parts, barrier)


@kernel
def _serve(shared, part, parts, jobs):
    """Takes part in every job after the first so many, until none has come for a while. Returns how
    many there have been."""
    state = _own(part) + STATE
    while True:
        looks = 0
        while read(shared, NUMBER) == jobs:
            _wait(shared, looks)
            looks += 1
            if looks > LONGEST_WATCH:
                if replace(shared, state, AWAKE, ASLEEP):
                    return jobs
                looks = 0
        jobs += 1
        write(shared, state, AWAKE)
        _take_part(shared, part, parts)


@kernel
def _call_up(shared, parts, asleep):
    """Tells the others that a job is coming. Returns whether some are asleep: those have to be
    woken."""
    some = False
    for part in range(1, parts):
        if exchange(shared, _own(part) + STATE, CALLED) == ASLEEP:
            asleep[part] = True
        some |= asleep[part]
    return some


@kernel
def _call_off(shared, parts):
    """Tells the others that no job is coming."""
    for part in range(1, parts):
        replace(shared, _own(part) + STATE, CALLED, AWAKE)


@kernel
def _lead(shared, job, count, parts):
    """Gives all a job, and takes part in it."""
    shared[JOB], shared[COUNT] = job, count
    write(shared, NUMBER, shared[NUMBER] + 1)
    # Not a literal, for which Numba would compile it all once more.
    _take_part(shared, np.int64(0), parts)


_LINES, _NUMBER = types.int64[::1], types.int64
KERNELS: Sequence[tuple[Any, tuple[Any, ...]]] = [
    (_serve, (_LINES, _NUMBER, _NUMBER, _NUMBER)),
    (_lead, (_LINES, _NUMBER, _NUMBER, _NUMBER)),
    (_call_up, (_LINES, _NUMBER, types.boolean[::1])),
    (_call_off, (_LINES, _NUMBER)),
]
"""What threads run of their own, and the types of its arguments."""


_system = ctypes.CDLL(None)


def _yield_function() -> int:
    """The address of the system's `int function(void)` that leaves the core to others."""
    return ctypes.cast(_system.sched_yield, ctypes.c_void_p).value or 0


def _core() -> int | None:
    """The core that this thread is on; None where the system does not tell."""
    return _system.sched_getcpu() if sys.platform == "linux" else None


class Threads:
    """So many threads: the one that calls, and others."""

    def __init__(self, count: int, one_caller: threading.Lock) -> None:
        self.count, self._one_caller = count, one_caller
        self._shared = np.zeros(LINE * (1 + LINES * count), np.int64)
        self._shared[YIELD] = _yield_function()
        self._asleep = np.zeros(count, np.bool_)
        self._bells: list[SimpleQueue[None]] = [SimpleQueue() for _ in range(count)]
        self._cores: list[int | None] = [None] * count
        for part in range(1, count):
            threading.Thread(target=self._work, args=(part,), daemon=True).start()

    def _work(self, part: int) -> None:
        jobs = 0
        while True:
            self._leave_core_of_others(part)
            jobs = _serve(self._shared, part, self.count, jobs)
            self._cores[part] = None
            self._bells[part].get()

    def _leave_core_of_others(self, part: int) -> None:
        """Linux may wake a thread on the core of its waker, which stays busy, and then takes
        milliseconds to part them."""
        core = _core()
        if core is None:
            return
        taken = {other for i, other in enumerate(self._cores) if i != part}
        everywhere = os.sched_getaffinity(0)
        if core in taken and everywhere - taken:
            with suppress(OSError):  # where a system forbids it
                os.sched_setaffinity(0, everywhere - taken)
                os.sched_setaffinity(0, everywhere)
        self._cores[part] = _core()

    def run(self, calls: NDArray[np.int64]) -> None:
        """Runs functions one after the other, each as `count` parts side by side. `calls`
        (functions, 2) has the address of each, a FUNCTION, and that of its arguments."""
        with self._one_caller:
            try:
                if _call_up(self._shared, self.count, self._asleep):
                    self._cores[0] = _core()
                    # What an interrupt leaves undone here the next call does.
                    for part in np.flatnonzero(self._asleep):
                        self._bells[part].put(None)
                        self._asleep[part] = False
                _lead(self._shared, calls.ctypes.data, len(calls), self.count)
            except BaseException:
                _call_off(self._shared, self.count)
                raise


@lru_cache
def _of_process(process: int) -> tuple[threading.Lock, dict[int, Threads]]:
    return threading.Lock(), {}


def threads(count: int) -> Threads:
    """The threads of this process, which has none of those that it was forked from. Only one job
    runs at a time, whoever runs it: two might write to the same scratch."""
    one_caller, made = _of_process(os.getpid())
    with one_caller:
        if count not in made:
            made[count] = Threads(count, one_caller)
        return made[count]


class Tuner:
    """Finds the number of threads on which something is fastest: cores that are far apart, or
    busy with other work, can make a small step slower than fewer cores would. It tries half as
    many and twice as many now and then, since that changes."""

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._counts = sorted({most, *(2**i for i in range(most.bit_length()) if 2**i < most)})
        self._chosen = self._tried = len(self._counts) - 1
        self._step, self._runs = 1, 2 * TRIAL
        self._clock = clock
        self._seconds: list[float] = []

    def run(self, work: Callable[[int], None]) -> None:
        """Calls `work` with a number of threads."""
        if self._runs < 2 * TRIAL:
            self._measure(work)
        else:
            work(self._counts[self._chosen])
        self._runs = (self._runs + 1) % PERIOD

    def _measure(self, work: Callable[[int], None]) -> None:
        """First with as many threads as before, then with others."""
        if self._runs == TRIAL:
            self._tried = self._neighbour()
        started = self._clock()
        work(self._counts[self._tried])
        self._seconds.append(self._clock() - started)
        if len(self._seconds) == 2 * TRIAL:
            # The shortest: others are of a core that was late, or had first to get the data.
            before, after = min(self._seconds[:TRIAL]), min(self._seconds[TRIAL:])
            if after < CLEARLY_FASTER * before:
                self._chosen = self._tried
            self._tried = self._chosen
            self._seconds.clear()

    def _neighbour(self) -> int:
        """The next number of threads on one side, in turns."""
        last = len(self._counts) - 1
        self._step = -self._step
        if not 0 <= self._chosen + self._step <= last:
            self._step = -self._step
        return min(last, max(0, self._chosen + self._step))
