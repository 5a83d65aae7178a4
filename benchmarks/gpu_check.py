"""Everything that needs a GPU, in one command that writes one report:

    python -m minivae.benchmarks.gpu_check --output gpu-check.json

from a checkout: the tests marked `gpu`, and compute-sanitizer's memcheck and racecheck on the
kernels' equivalence tests, alone and as a step fuses them. First every kernel is compiled, on all
cores; then all parts run at the same time, for less than eight minutes in all. Exits non-zero if
one failed. `--device emulated` rehearses the tests where there is no GPU.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from minivae import backends
from minivae.environment import cores, environment
from minivae.errors import InputError
from minivae.kernels import MEDIUM, STEMS, WITH_TILES, Tile

from .measure import write_result

CHECKOUT = Path(__file__).parent.parent
PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"),
    *("--tb=short", "--maxfail=20"),
)
KERNELS = "test_equivalence and cuda- and not numba_cuda"
SHARED = f"{KERNELS} and (dense or conv or loss or totals or clip or calibrate)"
OTHER_TILES = "every_tile"
FUSED = f"test_a_fused and cuda and not {OTHER_TILES}"
LIMIT = 420
"""Seconds."""

TAIL = 20_000
"""Characters of a part's output that the report keeps."""


def load_kernels(specialisation: tuple[str, Tile, str]) -> None:
    """Compiles a source for the GPU here, so that it is in CuPy's cache on the disk."""
    stem, tile, precision = specialisation
    backend: Any = backends.get("cuda", precision)
    backend.load(stem, tile)


def compile_kernels() -> None:
    """Compiles all that the parts need, once, where each of them would compile it for itself."""
    specialisations = [
        (stem, tile, precision)
        for stem in STEMS
        for tile in WITH_TILES.get(stem, (MEDIUM,))
        for precision in (backends.PRECISIONS if stem in WITH_TILES else ("fp32",))
    ]
    with ProcessPoolExecutor(cores(), get_context("spawn")) as pool:
        list(pool.map(load_kernels, specialisations))


def parts(device: str) -> dict[str, list[str]]:
    """The commands by name."""
    marker = ["-m", "gpu"] if device == "cuda" else ["-m", "not peers and not toolchain"]
    files = {name: f"tests/test_{name}.py" for name in ("backends", "cuda", "emulated")}
    chosen = "(cuda or card) and not numba_cuda" if device == "cuda" else f"{device}-"
    found = {name: [*PYTEST, *marker, file, "-k", chosen] for name, file in files.items()}
    if device != "cuda":
        del found["cuda"]  # which has no others
        return found
    found["numba_cuda"] = [*PYTEST, *marker, *files.values(), "-k", "numba_cuda"]
    kernels = [*PYTEST, "-x", *marker, files["backends"], "-k"]
    fused = [*PYTEST, "-x", *marker, files["emulated"], "-k", FUSED]
    for tool, tests in (("memcheck", KERNELS), ("racecheck", SHARED)):
        for name, some in (
            (tool, f"not {OTHER_TILES}"),
            (f"{tool}, other tiles, fp32", f"{OTHER_TILES} and fp32"),
            (f"{tool}, other tiles, tf32", f"{OTHER_TILES} and tf32"),
        ):
            found[name] = [*sanitizer(tool), *kernels, f"{tests} and {some}"]
        found[f"{tool}, fused"] = [*sanitizer(tool), *fused]
    return found


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
        backends.get(arguments.device)
        report = {"environment": environment(arguments.device), "parts": {}}
    except InputError as error:
        raise SystemExit(str(error)) from None
    started = time.perf_counter()
    if arguments.device == "cuda":
        compile_kernels()
        report["seconds to compile"] = round(time.perf_counter() - started, 1)
    limit = LIMIT - round(time.perf_counter() - started)
    commands = parts(arguments.device)
    with ThreadPoolExecutor(len(commands)) as pool:
        running = {pool.submit(run, command, limit): name for name, command in commands.items()}
        for future in as_completed(running):
            name, result = running[future], future.result()
            report["parts"][name] = result
            print(f"{name:<28} status {result['status']}  {result['seconds']} s")
            print(result["output"][-600:], flush=True)
            # Written after each part, so that what is known survives an end of the lease.
            write_result(arguments.output, report)
    if any(part["status"] for part in report["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
