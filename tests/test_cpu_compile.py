"""How the CPU backend's kernels are compiled: once, by processes of their own, for every run."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core.compiler_lock import global_compiler_lock

from minivae.backends import cpu_compile, cpu_kernels
from minivae.backends.cpu_compile import Launch, Signature, compiled

NUMBERS = np.zeros(3, np.float32)

TRAIN = """
import hashlib, sys
from minivae import Training, fit, preset
model = preset("glyphs").model(hidden=(40,), latent=5)
fit(model, "glyphs", Training(steps=20), device="cpu", progress=False)
print(hashlib.sha256(model.parameters.flat["values"].tobytes()).hexdigest())
"""


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


def forbidden(*arguments: Any) -> int:
    raise AssertionError("another process for nothing")


def test_a_run_that_compiled_ends_with_the_bits_of_one_that_found_all_compiled(
    tmp_path: Path,
) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", TRAIN], env=environment, stdout=subprocess.PIPE, check=True
        )
        for _ in range(2)
    )
    assert first.stdout == second.stdout != b""


def test_the_functions_found_are_those_of_the_kernels(launches: list[Launch]) -> None:
    def plain(x: Any) -> None:
        x[0] -= 3

    found = compiled([*launches, (plain, launches[0][1])])
    for function, arguments in found:
        function(*arguments)
    assert [arguments[0][0] for _, arguments in found] == [-2, 0, -2]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it isn't safe to fork")
def test_this_process_compiles_nothing_where_others_can(launches: list[Launch]) -> None:
    compiled(launches)
    for kernel, _ in launches:
        assert kernel.stats.cache_hits.total() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it isn't safe to fork")
def test_a_process_leaves_every_kernel_in_the_cache(launches: list[Launch]) -> None:
    signatures = [each for launch in launches if (each := cpu_compile._signature(*launch))]
    os.waitpid(cpu_compile._compiling_process(signatures), 0)
    assert [cpu_compile._taken(*signature) for signature in signatures] == [True, True]


def test_other_processes_do_not_wait_for_a_thread_that_compiles_here(
    launches: list[Launch],
) -> None:
    def compile_for_a_while() -> None:
        with global_compiler_lock:
            begun.set()
            time.sleep(0.5)

    signatures = [each for launch in launches if (each := cpu_compile._signature(*launch))]
    begun = threading.Event()
    thread = threading.Thread(target=compile_for_a_while)
    thread.start()
    begun.wait()
    cpu_compile._fill_cache(signatures)
    thread.join()
    assert [cpu_compile._taken(*signature) for signature in signatures] == [True, True]


def test_the_second_process_is_over_when_the_first_is(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def asleep(signatures: Sequence[Signature]) -> int:
        process = os.fork()
        if not process:
            time.sleep(600 if started else 0)
            os._exit(1)
        started.append(process)
        return process

    monkeypatch.setattr(cpu_compile, "_compiling_process", asleep)
    compiled(launches)
    assert len(started) == 2
    for process in started:
        with pytest.raises(ChildProcessError):
            os.waitpid(process, 0)


def test_what_is_compiled_needs_no_other_process(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(launches)
    monkeypatch.setattr(cpu_compile, "_compiling_process", forbidden)
    compiled(launches)


def test_what_is_in_the_cache_needs_no_other_process(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(launches)
    monkeypatch.setattr(cpu_compile, "_compiling_process", forbidden)
    again = [cpu_kernels._compiled()(kernel.py_func) for kernel, _ in launches]
    compiled([(kernel, (NUMBERS.copy(),)) for kernel in again])
    assert all(kernel.stats.cache_hits.total() == 1 for kernel in again)


def test_a_system_without_room_for_another_process_compiles_alone(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> int:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(os, "fork", full)
    assert len(compiled(launches)) == len(launches)


def test_a_single_core_has_one_other_process(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Sequence[Signature]] = []
    monkeypatch.setattr(cpu_compile, "get_num_threads", lambda: 1)
    monkeypatch.setattr(
        cpu_compile, "_compiling_process", lambda signatures: started.append(signatures) or 0
    )
    compiled(launches)
    assert len(started) == 1
