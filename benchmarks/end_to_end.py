"""Seconds from a cold start to a test loss on MNIST with dense 784-400-20, interpreter, imports and
data included. minivae compiles its kernels in its first run, as JAX does in every one; later ones
find them."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from .measure import reason
from .steps import SCAN

TARGETS = (110.0, 107.0, 105.5)
MOST_EPOCHS = 15
QUICK_IMAGES = 256
ROUNDS = 3
NOT_INSTALLED = "not installed"
CACHES = ("NUMBA_CACHE_DIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH")
"""The variables that say where compiled kernels are kept."""

MINIVAE = """
import json, sys
from minivae import fit, preset, Training
def report(record):
    print(json.dumps(record["test"]["loss"]), flush=True)
data, epochs, device, mode, images, seed = sys.argv[1:]
training = Training(epochs=int(epochs), images=int(images), seed=int(seed))
model = preset("glyphs").model(seed=int(seed))
fit(model, data, training, device=device, progress=False, on_metrics=report)
"""
PEER = """
import json, sys
from minivae import preset, Training
from minivae.benchmarks.cases import Case
from minivae.data import load
data, epochs, device, mode, images, seed = sys.argv[1:]
splits = load(data)
training = Training(epochs=int(epochs))
model = preset("glyphs").model(seed=int(seed)).to("reference")
case = Case("mnist", model, training, splits)
test = splits.test.images.astype("float32") / 255
"""
TRAINING = """
for epoch in range(training.epochs):
    for _ in range((int(images) or len(splits.train)) // training.batch_size // calls):
        peer.step()
    parts = [loss(test[first : first + 100]) for first in range(0, len(test), 100)]
    print(json.dumps(sum(parts) / len(parts)), flush=True)
"""
TORCH = f"""{PEER}
import torch
from minivae.benchmarks.torch_peer import TorchPeer
torch.manual_seed(int(seed))
peer, calls = TorchPeer(case, "cuda" if device == "cuda" else "cpu", mode), 1
test = torch.from_numpy(test).permute(0, 3, 1, 2).to(peer.device)
def loss(x):
    return peer.loss(x, torch.randn(len(x), 20))
{TRAINING}"""
JAX = f"""{PEER}
import jax
import numpy as np
jax.config.update("jax_platforms", "cuda" if device == "cuda" else "cpu")
from minivae.benchmarks.jax_peer import JaxPeer
calls = int(mode)
peer, rng = JaxPeer(case, calls), np.random.default_rng(int(seed))
def loss(x):
    return peer.loss(x, rng.standard_normal((len(x), 20)).astype("float32"))
{TRAINING}"""


def _race(
    program: str, data: str, device: str, mode: str, quick: bool, seed: int, caches: str | None
) -> dict[str, Any]:
    """Runs a program that prints a test loss an epoch, and times when each target is reached; with
    compiled kernels kept in the folder `caches`, if that is given. `mode` is a peer's.

    Raises RuntimeError if it fails.
    """
    environment = os.environ | (dict.fromkeys(CACHES, caches) if caches else {})
    started = time.perf_counter()
    reached: dict[str, float] = {}
    losses = []
    epochs, images = (1, QUICK_IMAGES) if quick else (MOST_EPOCHS, 0)
    arguments = [data, str(epochs), device, mode, str(images), str(seed)]
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            losses.append(float(json.loads(line)))
            passed = round(time.perf_counter() - started, 2)
            for target in TARGETS:
                if losses[-1] <= target:
                    reached.setdefault(f"{target:g}", passed)
            if len(reached) == len(TARGETS):
                process.kill()
    if process.returncode and len(reached) < len(TARGETS):
        raise RuntimeError(f"a race on {data} ended with exit status {process.returncode}")
    return {"seconds_to": reached, "test_losses": [float(f"{loss:.5g}") for loss in losses]}


def measure_end_to_end(device: str, data: Path | str, quick: bool) -> dict[str, Any]:
    """Races of minivae (with kernels to compile, and with cached ones), PyTorch and JAX, in turns,
    one seed a turn. For each its races, the median seconds to the targets that all of them reach,
    and why one failed.
    """
    torch_mode, scan = "graph" if device == "cuda" else "eager", SCAN.get(device, SCAN["cpu"])
    runners = {
        "minivae, first run": ("numpy", MINIVAE, ""),
        "minivae": ("numpy", MINIVAE, ""),
        f"torch {torch_mode}": ("torch", TORCH, torch_mode),
        "jax scan": ("jax", JAX, str(scan)),
    }
    races: dict[str, list[dict[str, Any]]] = {name: [] for name in runners}
    failures = {
        name: NOT_INSTALLED
        for name, (package, _, _) in runners.items()
        if importlib.util.find_spec(package) is None
    }
    for seed in range(1 if quick else ROUNDS):
        for name, (_, program, mode) in runners.items():
            if name in failures:
                continue
            with tempfile.TemporaryDirectory() as folder:
                caches = folder if name.endswith("first run") else None
                try:
                    race = _race(program, str(data), device, mode, quick, seed, caches)
                    races[name].append(race)
                except RuntimeError as error:  # the others go on
                    failures[name] = reason(error)
    return {
        name: {
            "seconds_to": {
                target: median(race["seconds_to"][target] for race in runs)
                for target in (f"{target:g}" for target in TARGETS)
                if runs and all(target in race["seconds_to"] for race in runs)
            },
            "races": runs,
            **({"failure": failures[name]} if name in failures else {}),
        }
        for name, runs in races.items()
    }
