"""Timing that a shared, noisy machine cannot spoil: candidates take turns, and each figure is a
median with its 20th and 80th percentile."""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping
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
SECONDS_TO_SETTLE = 0.1
"""After which a library's threads no longer wait awake, on cores that the next process needs."""


class Candidate(NamedTuple):
    """Something to time: `run` does `calls` units of work, `wait` returns once the device has."""

    run: Callable[[], None]
    wait: Callable[[], None] = lambda: None
    calls: int = 1


class Turns:
    """Candidates that take turns of about `seconds` each."""

    def __init__(self, candidates: Mapping[str, Candidate], seconds: float) -> None:
        self._candidates, self._seconds = dict(candidates), seconds
        self._repeats: dict[str, int] = {}
        self._slow: list[str] = []
        self._taken = 0

    def take(self) -> dict[str, float]:
        """Milliseconds per unit of each candidate in its next turn. One whose single call takes
        longer than SLOW turns has only the first SLOW_TURNS."""
        if self._taken == SLOW_TURNS:
            for name in self._slow:
                del self._candidates[name]
        times = {name: self._turn(name) for name in self._candidates}
        if not self._taken:
            longest = SLOW * 1e3 * self._seconds
            self._slow = [n for n, t in times.items() if t * self._candidates[n].calls > longest]
        self._taken += 1
        return times

    def _turn(self, name: str) -> float:
        candidate = self._candidates[name]
        if name not in self._repeats:
            self._repeats[name] = _calibrated(candidate, self._seconds)
        repeats = self._repeats[name]
        started = time.perf_counter()
        for _ in range(repeats):
            candidate.run()
        candidate.wait()
        passed = time.perf_counter() - started
        return 1e3 * passed / (repeats * candidate.calls)


def collected(turns: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """Each candidate's times, from those of all candidates in each turn."""
    times: dict[str, list[float]] = {}
    for turn in turns:
        for name, milliseconds in turn.items():
            times.setdefault(name, []).append(milliseconds)
    return times


def times_as_fast(own: list[float], other: list[float]) -> float:
    """How many times as long `other` takes, in the median turn: what slows a machine down for
    longer than a turn slows both."""
    return float(f"{np.median([b / a for a, b in zip(own, other, strict=False)]):.3g}")


def _calibrated(candidate: Candidate, seconds: float) -> int:
    """How often to call a candidate in a turn, from calls that take half of one: after a pause a
    virtual machine may be slow for ten milliseconds, and a turn that is no longer would be too."""
    for _ in range(2):
        candidate.run()
    candidate.wait()
    calls, passed = 1, 0.0
    while passed < seconds / 2:
        started = time.perf_counter()
        for _ in range(calls):
            candidate.run()
        candidate.wait()
        passed = time.perf_counter() - started
        calls *= 2
    return max(1, round(calls / 2 * seconds / passed))


class OwnProcess:
    """A fresh process, whose threads and peak memory are its own. There a module's function
    prepares some work, which it returns as a callable, to be called when `ask` says so."""

    def __init__(self, prepare: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
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

    def ask(self, limit: float, *arguments: Any) -> Any:
        """What the work returns for these arguments. Raises what it raised, and as
        `wait_until_prepared`."""
        started = time.monotonic()
        self.wait_until_prepared(limit)
        self._connection.send(arguments)
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
    connection: Connection, prepare: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]
) -> None:
    try:
        work = prepare(*arguments)
        connection.send((None, None))
        while True:
            done = work(*connection.recv())
            time.sleep(SECONDS_TO_SETTLE)
            connection.send((done, None))
    except EOFError:  # nobody asks any more
        pass
    except Exception as error:
        connection.send((None, error))


def in_own_process(function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> Any:
    """What a module's function returns when called in a process of its own (OwnProcess)."""
    process = OwnProcess(partial, function, *arguments)
    try:
        return process.ask(limit)
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
