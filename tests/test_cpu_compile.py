"""How the CPU backend's kernels are compiled: once, by processes of their own, for every run."""

import os
import signal
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

from minivae.backends import cpu_cache, cpu_compile
from minivae.backends.cpu_compile import Signature, compile_all
from minivae.files import alone

NUMBERS = np.zeros(3, np.float32)

TRAIN = """
import hashlib, sys
from minivae import Training, fit, preset
model = preset("glyphs").model(hidden=(40,), latent=5)
fit(model, "glyphs", Training(steps=20), device="cpu", progress=False)
print(hashlib.sha256(model.parameters.flat["values"].tobytes()).hexdigest())
"""


@pytest.fixture
def signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Signature]:
    """Of three kernels that were never compiled before, whose cache is empty."""
    monkeypatch.setattr(cpu_cache, "CACHE_FOLDER", str(tmp_path))
    monkeypatch.setattr(cpu_compile, "CORES", 2)

    def first(x: Any) -> None:
        x[0] += 1

    def second(x: Any) -> None:
        x[0] *= 2

    def third(x: Any) -> None:
        x[0] -= 3

    made = [cpu_cache._compiled()(kernel) for kernel in (first, second, third)]
    return [(kernel, (kernel.typeof_pyval(NUMBERS),)) for kernel in made]


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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it isn't safe to fork")
def test_this_process_compiles_nothing_where_others_can(signatures: list[Signature]) -> None:
    compile_all(signatures)
    for kernel, _ in signatures:
        assert kernel.stats.cache_hits.total() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it isn't safe to fork")
def test_a_process_leaves_the_kernels_that_it_is_given_in_the_cache(
    signatures: list[Signature],
) -> None:
    tasks, given = os.pipe()
    os.write(given, bytes([2, 0]))
    os.close(given)
    (process,) = cpu_compile._compiling_process(signatures, tasks)
    os.waitpid(process, 0)
    os.close(tasks)
    assert [cpu_compile._taken(*signature) for signature in signatures] == [True, False, True]


def test_other_processes_do_not_wait_for_a_thread_that_compiles_here(
    signatures: list[Signature],
) -> None:
    def compile_for_a_while() -> None:
        with global_compiler_lock:
            begun.set()
            time.sleep(0.5)

    begun = threading.Event()
    thread = threading.Thread(target=compile_for_a_while)
    thread.start()
    begun.wait()
    cpu_compile._fill_cache(signatures)
    thread.join()
    assert all(cpu_compile._taken(*signature) for signature in signatures)


def test_an_interrupt_ends_all_processes(
    signatures: list[Signature], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def asleep(signatures: Sequence[Signature], tasks: int) -> list[int]:
        process = os.fork()
        if not process:
            time.sleep(600)
            os._exit(1)
        started.append(process)
        # Comes as soon as both have begun.
        signal.raise_signal(signal.SIGINT)
        return [process]

    monkeypatch.setattr(cpu_compile, "_compiling_process", asleep)
    # A run in the background of a shell ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            cpu_compile._fill_cache(signatures)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(started) == 2
    for process in started:
        with pytest.raises(ChildProcessError):
            os.waitpid(process, 0)


def test_processes_save_one_after_the_other_what_they_compiled(
    signatures: list[Signature], tmp_path: Path
) -> None:
    """Numba itself would give two signatures of a kernel, saved at a time, one number."""
    kernel, types = signatures[0]
    folder = Path(kernel._cache.cache_path)
    with alone(folder):
        thread = threading.Thread(target=kernel.compile, args=(types,))
        thread.start()
        thread.join(1)
        assert thread.is_alive()
        assert not list(folder.glob("*.nbc"))
    thread.join()
    assert len(list(folder.glob("*.nbc"))) == 1


def test_what_is_compiled_needs_no_other_process(
    signatures: list[Signature], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_all(signatures)
    monkeypatch.setattr(cpu_compile, "_compiling_process", forbidden)
    compile_all(signatures)


def test_what_is_in_the_cache_needs_no_other_process(
    signatures: list[Signature], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_all(signatures)
    monkeypatch.setattr(cpu_compile, "_compiling_process", forbidden)
    again = [(cpu_cache._compiled()(kernel.py_func), types) for kernel, types in signatures]
    compile_all(again)
    assert all(kernel.stats.cache_hits.total() == 1 for kernel, _ in again)


def test_a_system_without_room_for_another_process_compiles_alone(
    signatures: list[Signature], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> int:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(os, "fork", full)
    compile_all(signatures)
    assert all(types in kernel.overloads for kernel, types in signatures)


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 2), (64, 3)])
def test_there_are_no_more_processes_than_cores_or_kernels(
    signatures: list[Signature], monkeypatch: pytest.MonkeyPatch, cores: int, processes: int
) -> None:
    started = []
    monkeypatch.setattr(cpu_compile, "CORES", cores)
    monkeypatch.setattr(
        cpu_compile, "_compiling_process", lambda *arguments: started.append(arguments) or []
    )
    compile_all(signatures)
    assert len(started) == processes
