"""Timing that a shared, noisy machine cannot spoil: candidates take turns within one process run,
and each figure is a median with its 20th and 80th percentile."""

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivae.files import replacing

ROUNDS = 15
SECONDS_A_TURN = 0.15
SLOW, SLOW_TURNS = 10, 3
LINE = 240
LIMIT, SECONDS_TO_END = 600, 10
CPU_INFO = Path("/proc/cpuinfo")
CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("minivae", "numpy", "numba", "torch", "jax", "jaxlib", "cupy-cuda13x", "cupy-cuda12x")


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


def in_own_process(function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> Any:
    """What a module's function returns when called in a fresh process, whose threads and peak
    memory are its own. Raises TimeoutError after `limit` seconds."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context)
    try:
        return pool.submit(function, *arguments).result(limit)
    finally:
        children = multiprocessing.active_children()
        pool.shutdown(wait=False)
        for child in children:
            child.join(SECONDS_TO_END)
            child.kill()  # what hangs with a framework's threads, or with a device


def reason(error: Exception) -> str:
    """An error in a line, for the result file."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def summary(values: list[float]) -> dict[str, float]:
    """Median, p20 and p80, to four digits."""
    low, middle, high = np.percentile(values, (20, 50, 80))
    digits = {"median": middle, "p20": low, "p80": high}
    return {name: float(f"{value:.4g}") for name, value in digits.items()}


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on: machine, versions and commit."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": device,
        "machine": _machine(device),
        "cores": cores(),
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
    }


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


def cores() -> int | None:
    """How many cores this process may use, where the system tells it, as Linux does."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _machine(device: str) -> str:
    if device in ("cuda", "numba_cuda"):
        import cupy

        return str(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    # An installed copy may lie within a repository that is not minivae's.
    if not (CHECKOUT / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
