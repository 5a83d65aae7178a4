"""The CPU backend's threads: each does its part of every kernel, after all of the one before."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from minivae.backends import cpu, cpu_threads
from minivae.backends.cpu_cache import kernel
from minivae.backends.cpu_jobs import Launch, job
from minivae.backends.cpu_jobs import run as run_job
from minivae.backends.cpu_threads import (
    ASLEEP,
    LINE,
    LINES,
    PERIOD,
    STATE,
    TRIAL,
    Threads,
    Tuner,
    _call_up,
    read,
    threads,
)


@kernel
def count_parts(part, parts, counts):
    counts[part] += parts


@kernel
def move_on(part, parts, x, y):
    """Each takes the number of its neighbour."""
    y[part] = x[(part + 1) % parts]


@kernel
def count_alone(counts):
    counts[0] += 1


@kernel
def add_up(part, parts, matrix, numbers, pair, yes, total):
    if part == 0:
        small, large = numbers
        (a, b), unsigned = pair
        total[0] = small + large + a + b + np.float64(unsigned)
        total[1] = matrix[1, 2] if yes else matrix[0, 0]
        total[2] = matrix.shape[0] * 10 + matrix.shape[1]


@kernel
def wait_for(flag):
    while not read(flag, 0):
        pass


@kernel
def fail_at(part, parts, failing, done):
    if part == failing:
        raise ValueError
    done[part] += 1


def run(some: Threads, *launches: Launch) -> None:
    run_job(job(launches), some.count)


@pytest.fixture(params=[1, 2, 5])
def some(request: pytest.FixtureRequest) -> Threads:
    """More threads than cores as well."""
    return threads(request.param)


def asleep(some: Threads) -> bool:
    """Whether all threads but the caller's fall asleep within ten seconds."""
    states = some._shared[LINE + STATE :: LINES * LINE][1:]
    end = time.monotonic() + 10
    while time.monotonic() < end and not np.all(states == ASLEEP):
        time.sleep(0.01)
    return bool(np.all(states == ASLEEP))


def test_every_part_is_done_once(some: Threads) -> None:
    counts = np.zeros(some.count, np.int64)
    for _ in range(50):
        run(some, (count_parts, (counts,)))
    np.testing.assert_array_equal(counts, 50 * some.count)


def test_a_kernel_sees_all_that_the_one_before_did(some: Threads) -> None:
    x, y = np.arange(some.count), np.zeros(some.count, np.int64)
    turns = 100 * some.count
    # Twice a turn, from x to y and back: after as many as there are threads all is as before.
    run(some, *[(move_on, (x, y)), (move_on, (y, x))] * turns)
    np.testing.assert_array_equal(x, np.arange(some.count))


def test_a_kernel_without_parts_runs_once(some: Threads) -> None:
    counts = np.zeros(1, np.int64)
    run(some, *[(count_alone, (counts,))] * 30)
    assert counts[0] == 30


@pytest.mark.parametrize("matrix", [np.arange(12.0).reshape(3, 4), np.arange(12.0).reshape(4, 3).T])
def test_arguments_of_all_kinds_arrive(matrix: NDArray) -> None:
    total = np.zeros(3)
    numbers, pair = (np.float32(0.5), -3), ((1.25, np.int32(-7)), np.uint32(2**32 - 1))
    run(threads(2), (add_up, (matrix, numbers, pair, True, total)))
    np.testing.assert_array_equal(total, [0.5 - 3 + 1.25 - 7 + 2**32 - 1, matrix[1, 2], 34])


def test_idle_threads_fall_asleep_and_wake(some: Threads) -> None:
    counts = np.zeros(some.count, np.int64)
    for _ in range(3):
        assert asleep(some)
        run(some, (count_parts, (counts,)))
    np.testing.assert_array_equal(counts, 3 * some.count)


def test_a_thread_that_an_interrupt_left_asleep_is_woken_by_the_next_call(some: Threads) -> None:
    assert asleep(some)
    _call_up(some._shared, some.count, some._asleep)
    counts = np.zeros(some.count, np.int64)
    run(some, (count_parts, (counts,)))
    np.testing.assert_array_equal(counts, some.count)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system has the last word")
def test_a_thread_that_wakes_on_the_core_of_another_leaves_it() -> None:
    everywhere = os.sched_getaffinity(0)
    if len(everywhere) == 1:
        pytest.skip("there is but one core")
    some = Threads(1, threading.Lock())  # none that could move at the same time
    left = 0
    for _ in range(100):
        before = cpu_threads._core()
        some._cores = [before, None]
        some._leave_core_of_others(1)
        left += some._cores[1] != before
    # Not every time: where other work is, the system may move it back before it is noted.
    assert left > 50
    assert os.sched_getaffinity(0) == everywhere


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system has the last word")
def test_a_thread_stays_where_it_is_if_no_core_is_free() -> None:
    everywhere, some = os.sched_getaffinity(0), Threads(1, threading.Lock())
    os.sched_setaffinity(0, {min(everywhere)})
    try:
        some._cores = [min(everywhere), None]
        some._leave_core_of_others(1)
        assert some._cores[1] == min(everywhere)
    finally:
        os.sched_setaffinity(0, everywhere)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system has the last word")
def test_a_thread_stays_where_it_is_if_the_system_forbids_it_to_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbid(*arguments: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", forbid)
    some = Threads(1, threading.Lock())
    some._cores = [cpu_threads._core(), None]
    some._leave_core_of_others(1)
    assert some._cores[1] is not None


def test_threads_that_were_called_fall_asleep_where_an_interrupt_keeps_the_job_away(
    some: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    counts = np.zeros(some.count, np.int64)
    run(some, (count_parts, (counts,)))
    with monkeypatch.context() as patch:
        patch.setattr(cpu_threads, "_lead", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(some, (count_parts, (counts,)))
    assert asleep(some)
    run(some, (count_parts, (counts,)))
    np.testing.assert_array_equal(counts, 2 * some.count)


def test_a_kernel_that_finds_no_memory_ends_the_job_with_an_error(some: Threads) -> None:
    last, done = some.count - 1, np.zeros(some.count, np.int64)
    with pytest.raises(MemoryError, match="not enough memory for a kernel of the CPU backend"):
        run(some, (fail_at, (last, done)))
    run(some, (fail_at, (some.count, done)))
    np.testing.assert_array_equal(done, [2] * last + [1])


def test_a_job_waits_for_one_on_another_number_of_threads() -> None:
    flag, counts = np.zeros(1, np.int64), np.zeros(1, np.int64)
    jobs = job([(wait_for, (flag,))]), job([(count_alone, (counts,))])
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run_job, made, count) for made, count in zip(jobs, (1, 2), strict=True)]
        time.sleep(0.2)
        early = counts[0]
        flag[0] = 1
        for each in both:
            each.result()
    assert (early, counts[0]) == (0, 1)


def test_a_step_whose_compilation_is_interrupted_is_recorded_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(launches: Any) -> None:
        raise KeyboardInterrupt

    counts, called = np.zeros(1, np.int64), []
    backend = cpu.CpuBackend()

    def step() -> None:
        backend._run(called.append, "another")
        backend._run(count_alone, counts)

    replay = backend.capture(step)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "job", interrupt)
        with pytest.raises(KeyboardInterrupt):
            replay()
    replay()
    assert (called, counts[0]) == (["another"], 1)


def test_callers_side_by_side_take_turns(some: Threads) -> None:
    def count_often(counts: Any) -> None:
        for _ in range(100):
            run(some, (count_parts, (counts,)), (count_alone, (counts,)))

    each = [np.zeros(some.count, np.int64) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count_often, each))
    for counts in each:
        assert counts[0] == 100 * (some.count + 1)
        np.testing.assert_array_equal(counts[1:], 100 * some.count)


@pytest.mark.parametrize(
    ("most", "fastest"), [(1, 1), (2, 1), (2, 2), (6, 1), (6, 4), (6, 6), (64, 1), (64, 8)]
)
def test_a_job_ends_up_with_the_number_of_threads_that_is_fastest(most: int, fastest: int) -> None:
    now, ran = [0.0], []

    def work(count: int) -> None:
        ran.append(count)
        late = 50.0 if len(ran) % TRIAL == 0 else 0.0
        now[0] += 1 + abs(np.log2(count / fastest)) + late

    tuner = Tuner(most, clock=lambda: now[0])
    for _ in range(15 * PERIOD):
        tuner.run(work)
    assert ran[0] == most
    chosen = ran[-PERIOD:]
    assert chosen.count(fastest) >= PERIOD - TRIAL
    assert len(chosen) - chosen.count(fastest) <= TRIAL


def test_a_tuner_follows_what_changes() -> None:
    now, slower, ran = [0.0], [1], []

    def work(count: int) -> None:
        ran.append(count)
        now[0] += 2 if count == slower[0] else 1

    tuner = Tuner(2, clock=lambda: now[0])
    for count in (1, 2, 1):
        slower[0] = count
        for _ in range(2 * PERIOD):
            tuner.run(work)
        assert ran[-PERIOD // 2 :].count(count) <= TRIAL


def test_a_difference_that_may_be_chance_changes_nothing() -> None:
    now, ran = [0.0], []

    def work(count: int) -> None:
        ran.append(count)
        now[0] += 0.95 if count == 1 else 1

    tuner = Tuner(2, clock=lambda: now[0])
    for _ in range(4 * PERIOD):
        tuner.run(work)
    assert ran.count(1) == 4 * TRIAL


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it isn't safe to fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    counts = np.zeros(2, np.int64)
    run(threads(2), (count_parts, (counts,)))
    process = os.fork()
    if not process:
        run(threads(2), (count_parts, (counts,)))
        os._exit(int(counts.tolist() != [4, 4]))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
