"""Seconds from the command line: an import, the help, a training's first step and a first run."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .end_to_end import CACHES
from .measure import summary

ROUNDS, FIRST_RUNS = 7, 3
POLL = 0.002
"""Seconds between two looks for a file."""


def measure_start_up(device: str, data: str, quick: bool) -> dict[str, dict[str, float]]:
    """Seconds by what is done: median, p20 and p80. Kernels are cached except in a first run, which
    is the whole of a training on the embedded digits."""
    runs: dict[str, tuple[int, Callable[[], float]]] = {
        "import minivae": (ROUNDS, lambda: _whole("-c", "import minivae")),
        "minivae --help": (ROUNDS, lambda: _whole("-m", "minivae", "--help")),
        "minivae train, to its first step": (ROUNDS, lambda: _first_step(device, data)),
        "minivae train, first run, to its end": (FIRST_RUNS, lambda: _first_run(device, quick)),
    }
    return {
        name: summary([run() for _ in range(1 if quick else rounds)])
        for name, (rounds, run) in runs.items()
    }


def _whole(*arguments: str, environment: dict[str, str] | None = None) -> float:
    started = time.perf_counter()
    command = [sys.executable, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - started


def _first_step(device: str, data: str) -> float:
    """Seconds until `minivae train` has written the metrics of a first step.

    Raises RuntimeError if it ends without.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ("--preset", "mnist-dense", "--data", data, "--device", device, "--quiet")
        run = ("--log-every", "1", "--out", folder)
        command = [sys.executable, "-m", "minivae", "train", *options, *run]
        metrics = Path(folder) / "metrics.jsonl"
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not metrics.exists() or not metrics.stat().st_size:
                if process.poll() is not None:
                    raise RuntimeError(f"minivae train ended with status {process.returncode}")
                time.sleep(POLL)
            passed = time.perf_counter() - started
            process.kill()
        return passed


def _first_run(device: str, quick: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        few = ("--steps", "2") if quick else ()
        arguments = ("train", "--device", device, "--quiet", *few, "--out", f"{folder}/run")
        environment = os.environ | dict.fromkeys(CACHES, folder)
        return _whole("-m", "minivae", *arguments, environment=environment)
