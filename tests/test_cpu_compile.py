"""How the CPU backend's kernels are compiled: once, and where need be by two processes."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minivae.backends import cpu_compile, cpu_kernels
from minivae.backends.cpu_compile import Launch, compiled

NUMBERS = np.zeros(3, np.float32)


@pytest.fixture
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Of two kernels that were never compiled before, whose cache is empty."""
    monkeypatch.setattr(cpu_kernels, "CACHE_FOLDER", str(tmp_path))
    monkeypatch.setattr(cpu_compile, "get_num_threads", lambda: 2)

    def first(x: Any) -> None:
        x[0] += 1

    def last(x: Any) -> None:
        x[0] *= 2

    return [(cpu_kernels._compiled()(kernel), (NUMBERS.copy(),)) for kernel in (first, last)]


def forbidden(signatures: Sequence[Any]) -> int:
    raise AssertionError("a second process for nothing")


def test_the_functions_found_are_those_of_the_kernels(launches: list[Launch]) -> None:
    def plain(x: Any) -> None:
        x[0] -= 3

    found = compiled([*launches, (plain, launches[0][1])])
    for function, arguments in found:
        function(*arguments)
    assert [arguments[0][0] for _, arguments in found] == [-2, 0, -2]


def test_the_second_process_leaves_the_last_kernel_in_the_cache(launches: list[Launch]) -> None:
    kernel, arguments = launches[-1]
    signatures = [cpu_compile._signature(*launch) for launch in launches]
    os.waitpid(cpu_compile._helper([each for each in signatures if each]), 0)
    kernel(*arguments)
    stats = kernel.stats
    assert (stats.cache_hits.total(), stats.cache_misses.total()) == (1, 0)


def test_a_second_process_is_over_when_all_is_compiled(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def asleep(signatures: Sequence[Any]) -> int:
        process = os.fork()
        if not process:
            time.sleep(600)
            os._exit(1)
        started.append(process)
        return process

    monkeypatch.setattr(cpu_compile, "_helper", asleep)
    compiled(launches)
    (process,) = started
    with pytest.raises(ChildProcessError):
        os.waitpid(process, 0)


def test_what_is_compiled_needs_no_second_process(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(launches)
    monkeypatch.setattr(cpu_compile, "_helper", forbidden)
    compiled(launches)


def test_what_is_in_the_cache_needs_no_second_process(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(launches)
    monkeypatch.setattr(cpu_compile, "_helper", forbidden)
    again = [cpu_kernels._compiled()(kernel.py_func) for kernel, _ in launches]
    compiled([(kernel, (NUMBERS.copy(),)) for kernel in again])
    assert all(kernel.stats.cache_hits.total() == 1 for kernel in again)


def test_a_system_without_room_for_a_second_process_compiles_alone(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> int:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(os, "fork", full)
    assert len(compiled(launches)) == len(launches)


def test_a_single_core_compiles_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_compile, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "fork", forbidden)
    assert cpu_compile._helper([]) == 0
