"""Everything that needs a GPU, in one command that writes one report:

    python -m minivae.benchmarks.gpu_check --output gpu-check.json

from a checkout: the tests marked `gpu`, and compute-sanitizer's memcheck and racecheck on the
kernels' equivalence tests. Each part has a limit of its own, all together less than eight minutes.
Exits non-zero if a part failed. `--device emulated` rehearses the tests where there is no GPU.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from minivae.errors import InputError

from .measure import environment, write_result

CHECKOUT = Path(__file__).parent.parent
PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"),
    *("--tb=short", "--maxfail=20"),
)
KERNELS = "test_equivalence and cuda- and not numba_cuda"
SHARED = f"{KERNELS} and (dense or conv or loss or totals or clip)"
TAIL = 20_000
"""Characters of a part's output that the report keeps."""


def parts(device: str) -> dict[str, tuple[int, list[str]]]:
    """The commands by name, each with its limit in seconds."""
    marker = ["-m", "gpu"] if device == "cuda" else ["-m", "not peers and not toolchain"]
    files = ["tests/test_backends.py", "tests/test_cuda.py", "tests/test_emulated.py"]
    tests = [*PYTEST, *marker, *files, "-k"]
    if device != "cuda":
        return {"tests": (200, [*tests, f"{device}-"])}
    kernels = [*PYTEST, "-x", *marker, "tests/test_backends.py", "-k"]
    return {
        "tests": (220, [*tests, "(cuda or card) and not numba_cuda"]),
        "numba_cuda": (60, [*tests, "numba_cuda"]),
        "memcheck": (95, [*sanitizer("memcheck"), *kernels, KERNELS]),
        "racecheck": (95, [*sanitizer("racecheck"), *kernels, SHARED]),
    }


def sanitizer(tool: str) -> list[str]:
    """The command that runs another under compute-sanitizer."""
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [path, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    # CuPy asks an event whether it is done, and the answer "not yet" is an error of the API.
    return [*command, *(("--report-api-errors", "no") if tool == "memcheck" else ())]


def run(command: list[str], limit: int) -> dict[str, Any]:
    """Runs a command in the checkout; its exit status, seconds and the end of its output."""
    start = time.perf_counter()
    try:
        status, output = _finished(command, limit)
    except FileNotFoundError as error:
        status, output = 127, str(error)
    return {
        "command": " ".join(Path(word).name if os.sep in word else word for word in command),
        "status": status,
        "seconds": round(time.perf_counter() - start, 1),
        "output": output[-TAIL:],
    }


def _finished(command: list[str], limit: int) -> tuple[int, str]:
    process = subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=os.environ | {"MINIVAE_NO_SKIPS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except BaseException as error:  # the limit, or Ctrl-C, which does not reach another session
        os.killpg(process.pid, signal.SIGKILL)  # a sanitizer's child would go on by itself
        output, _ = process.communicate(timeout=10)
        if isinstance(error, subprocess.TimeoutExpired):
            return 124, f"{output}\nstopped after {limit} s"
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"), metavar="FILE")
    parser.add_argument("--device", default="cuda", metavar="NAME")
    arguments = parser.parse_args()
    if not (CHECKOUT / "tests").is_dir():
        raise SystemExit(f"{CHECKOUT}: no tests there; run this from a checkout, installed with -e")
    try:
        report = {"environment": environment(arguments.device), "parts": {}}
    except InputError as error:
        raise SystemExit(str(error)) from None
    for name, (limit, command) in parts(arguments.device).items():
        result = report["parts"][name] = run(command, limit)
        print(f"{name:<10} status {result['status']}  {result['seconds']} s")
        print(result["output"][-600:], flush=True)
        # Written after each part, so that what is known survives an end of the lease.
        write_result(arguments.output, report)
    if any(part["status"] for part in report["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
