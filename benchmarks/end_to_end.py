"""Seconds from a cold start to a test loss on MNIST with dense 784-400-20, interpreter, imports and
data included. minivae compiles its kernels in its first run; later ones find them."""

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

TARGETS = (110.0, 107.0, 105.5)
MOST_EPOCHS = 15
QUICK_IMAGES = 256
ROUNDS = 3
CACHES = ("NUMBA_CACHE_DIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH")
"""The variables that say where compiled kernels are kept."""

MINIVAE = """
import json, sys
from minivae import fit, preset, Training
def report(record):
    print(json.dumps(record["test"]["loss"]), flush=True)
chosen = preset("glyphs")
training = Training(epochs=int(sys.argv[2]), images=int(sys.argv[5]))
fit(chosen.model(), sys.argv[1], training, device=sys.argv[3], progress=False, on_metrics=report)
"""
TORCH = """
import json, sys
import torch
from minivae.benchmarks.cases import Case
from minivae.benchmarks.torch_peer import TorchPeer
from minivae import preset, Training
from minivae.data import load
splits = load(sys.argv[1])
training = Training(epochs=int(sys.argv[2]))
device = "cuda" if sys.argv[3] == "cuda" else "cpu"
model = preset("glyphs").model().to("reference")
peer = TorchPeer(Case("mnist", model, training, splits), device, sys.argv[4])
test = torch.from_numpy(splits.test.images.copy()).permute(0, 3, 1, 2).to(device).float() / 255
for epoch in range(training.epochs):
    for _ in range((int(sys.argv[5]) or len(splits.train)) // training.batch_size):
        peer.step()
    parts = [peer.loss(x, torch.randn(len(x), 20)) for x in test.split(100)]
    print(json.dumps(sum(parts) / len(parts)), flush=True)
"""


def _race(
    program: str, data: str, device: str, mode: str, quick: bool, caches: str | None
) -> dict[str, Any]:
    """Runs a program that prints a test loss an epoch, and times when each target is reached; with
    compiled kernels kept in the folder `caches`, if that is given. `mode` is PyTorch's.

    Raises RuntimeError if it fails.
    """
    environment = os.environ | (dict.fromkeys(CACHES, caches) if caches else {})
    started = time.perf_counter()
    reached: dict[str, float] = {}
    losses = []
    epochs, images = (1, QUICK_IMAGES) if quick else (MOST_EPOCHS, 0)
    command = [sys.executable, "-c", program, data, str(epochs), device, mode, str(images)]
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
    """minivae's races, with kernels that it must compile and with those that it finds, and
    PyTorch's, in turns. For each the races, and the median seconds to the targets that all reach,
    or why it has none.
    """
    rounds = 1 if quick else ROUNDS
    mode = "graph" if device == "cuda" else "eager"
    programs = {"minivae, first run": MINIVAE, "minivae": MINIVAE, f"torch {mode}": TORCH}
    missing = {}
    if importlib.util.find_spec("torch") is None:
        del programs[f"torch {mode}"]
        missing[f"torch {mode}"] = {"seconds_to": {}, "races": [], "failure": "not installed"}
    races: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            with tempfile.TemporaryDirectory() as folder:
                caches = folder if name.endswith("first run") else None
                races[name].append(_race(program, str(data), device, mode, quick, caches))
    return {
        name: {
            "seconds_to": {
                target: median(race["seconds_to"][target] for race in runs)
                for target in (f"{target:g}" for target in TARGETS)
                if all(target in race["seconds_to"] for race in runs)
            },
            "races": runs,
        }
        for name, runs in races.items()
    } | missing
