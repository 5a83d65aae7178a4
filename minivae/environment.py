"""What a figure depends on: machine, versions and commit, to be stored beside it."""

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

CPU_INFO = Path("/proc/cpuinfo")
CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("minivae", "numpy", "numba", "torch", "jax", "jaxlib", "cupy-cuda13x", "cupy-cuda12x")
ON_A_GPU = ("cuda", "numba_cuda")


def environment(device: str) -> dict[str, Any]:
    """Date, device (a backend's name), machine, cores, versions of packages, and of a GPU's driver
    and runtime, commit."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": device,
        "machine": _machine(device),
        "cores": cores(),
        "python": platform.python_version(),
        "versions": _versions() | (_cuda_versions() if device in ON_A_GPU else {}),
        "commit": _commit(),
    }


def cores() -> int | None:
    """How many cores this process may use; where the system does not say, how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _machine(device: str) -> str:
    if device in ON_A_GPU:
        import cupy

        number = cupy.cuda.Device().id
        return str(cupy.cuda.runtime.getDeviceProperties(number)["name"].decode())
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


def _cuda_versions() -> dict[str, str]:
    import cupy

    runtime = cupy.cuda.runtime
    numbers = {"driver": runtime.driverGetVersion(), "runtime": runtime.runtimeGetVersion()}
    return {
        f"CUDA {name}": f"{number // 1000}.{number % 1000 // 10}"
        for name, number in numbers.items()
    }


def _commit() -> str:
    # An installed copy may lie within a repository that is not minivae's.
    if not (CHECKOUT / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
