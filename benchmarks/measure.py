"""Timing that a shared, noisy machine cannot spoil: candidates take turns within one process run,
and each figure is a median with its 20th and 80th percentile."""

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivae.files import replacing

ROUNDS = 15
SECONDS_A_TURN = 0.15
SLOW, SLOW_TURNS = 10, 3
LINE = 240
LIMIT, SECONDS_TO_END = 600, 10


class Candidate(NamedTuple):
    """Something to time: `run` does `calls` units of work, `wait` returns once the device has."""

    run: Callable[[], None]
    wait: Callable[[], None] = lambda: None
    calls: int = 1


def take_turns(
    candidates: Mapping[str, Candidate], rounds: int = ROUNDS, seconds: float = SECONDS_A_TURN
) -> dict[str, list[float]]:
    """Milliseconds a unit of each candidate in each of `rounds` turns, in which it runs for about
    `seconds`; one that takes SLOW times as long for a single call has only the first few turns."""
    repeats = {name: _calibrated(candidate, seconds) for name, candidate in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name, candidate in candidates.items():
            slow = times[name] and times[name][0] * candidate.calls > SLOW * 1e3 * seconds
            if slow and turn >= SLOW_TURNS:
                continue
            started = time.perf_counter()
            for _ in range(repeats[name]):
                candidate.run()
            candidate.wait()
            passed = time.perf_counter() - started
            times[name].append(1e3 * passed / (repeats[name] * candidate.calls))
    return times


def interleaved(
    candidates: Mapping[str, Candidate], rounds: int = ROUNDS, seconds: float = SECONDS_A_TURN
) -> dict[str, dict[str, float]]:
    """Milliseconds a unit of each candidate, over its turns: median, p20 and p80."""
    times = take_turns(candidates, rounds, seconds)
    return {name: summary(values) for name, values in times.items()}


def times_as_fast(own: list[float], other: list[float]) -> float:
    """How many times as long `other` takes, in the median turn: what slows a machine down for
    longer than a turn slows both."""
    return float(f"{np.median([b / a for a, b in zip(own, other, strict=False)]):.3g}")


def _calibrated(candidate: Candidate, seconds: float) -> int:
    """How often to call a warmed-up candidate in a turn."""
    for _ in range(2):
        candidate.run()
    candidate.wait()
    started = time.perf_counter()
    candidate.run()
    candidate.wait()
    return max(1, round(seconds / max(time.perf_counter() - started, 1e-6)))


class OwnProcess:
    """A fresh process, whose threads and peak memory are its own. There a module's function
    prepares some work, which it returns as a callable, to be done when `result` is asked for."""

    def __init__(self, prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_prepare_and_work, args=(theirs, prepare, arguments))
        self._process.start()
        theirs.close()
        self._prepared = False

    def wait_until_prepared(self, limit: float) -> None:
        """Raises what the preparation raised, TimeoutError after `limit` seconds, RuntimeError if
        the process died."""
        if not self._prepared:
            self._received(limit)
            self._prepared = True

    def result(self, limit: float) -> Any:
        """What the work returns. Raises what it raised, and as `wait_until_prepared`."""
        started = time.monotonic()
        self.wait_until_prepared(limit)
        self._connection.send(None)
        return self._received(limit - (time.monotonic() - started))

    def _received(self, limit: float) -> Any:
        if not self._connection.poll(max(limit, 0)):
            raise TimeoutError(f"a process was not done after {limit:.0f} s")
        try:
            value, error = self._connection.recv()
        except EOFError:
            self._process.join()
            status = self._process.exitcode
            raise RuntimeError(f"a process ended with exit status {status}") from None
        if error is not None:
            raise error
        return value

    def end(self) -> None:
        """Ends the process, be it done or not."""
        self._connection.close()
        self._process.join(SECONDS_TO_END if self._prepared else 0)
        self._process.kill()  # what hangs with a framework's threads, or with a device
        self._process.join()


def _prepare_and_work(
    connection: Connection, prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]
) -> None:
    try:
        work = prepare(*arguments)
        connection.send((None, None))
        connection.recv()
        connection.send((work(), None))
    except EOFError:  # nobody asks for the result any more
        pass
    except Exception as error:
        connection.send((None, error))


def in_own_process(function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> Any:
    """What a module's function returns when called in a process of its own (OwnProcess)."""
    process = OwnProcess(partial, function, *arguments)
    try:
        return process.result(limit)
    finally:
        process.end()


def reason(error: Exception) -> str:
    """An error in a line, for the result file."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def summary(values: list[float]) -> dict[str, float]:
    """Median, p20 and p80, to four digits."""
    low, middle, high = np.percentile(values, (20, 50, 80))
    digits = {"median": middle, "p20": low, "p80": high}
    return {name: float(f"{value:.4g}") for name, value in digits.items()}


def write_result(path: Path, result: Any) -> None:
    """`result` as JSON, every list and object that fits on a line of LINE characters on one."""
    with replacing(path) as temporary:
        temporary.write_text(_json(result) + "\n")


def _json(value: Any, depth: int = 0) -> str:
    flat = json.dumps(value)
    if depth + len(flat) <= LINE or not isinstance(value, dict | list):
        return flat
    if isinstance(value, dict):
        items = [f"{json.dumps(name)}: {_json(item, depth + 1)}" for name, item in value.items()]
    else:
        items = [_json(item, depth + 1) for item in value]
    begin, end = flat[0], flat[-1]
    return begin + ",".join("\n" + " " * (depth + 1) + i for i in items) + "\n" + " " * depth + end
