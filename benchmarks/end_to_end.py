"""Seconds from a cold start to a test loss, on MNIST with dense 784-400-20: interpreter, imports,
data and compilation included. minivae's caches are those that an earlier run left."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TARGETS = (110.0, 107.0, 105.5)
MOST_EPOCHS = 15
MINIVAE = """
import json, sys
from minivae import fit, preset, Training
def report(record):
    print(json.dumps(record["test"]["loss"]), flush=True)
chosen = preset("glyphs")
fit(chosen.model(), sys.argv[1], Training(epochs=int(sys.argv[2])), device=sys.argv[3],
    progress=False, on_metrics=report)
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
peer = TorchPeer(Case("mnist", model, training, splits), device, "eager")
test = torch.from_numpy(splits.test.images.copy()).permute(0, 3, 1, 2).to(device).float() / 255
for epoch in range(training.epochs):
    for _ in range(len(splits.train) // training.batch_size):
        peer.step()
    parts = [peer.loss(x, torch.randn(len(x), 20)) for x in test.split(100)]
    print(json.dumps(sum(parts) / len(parts)), flush=True)
"""


def _race(program: str, data: str, device: str, epochs: int) -> dict[str, Any]:
    """Runs a program that prints a test loss an epoch, and times when each target is reached.

    Raises RuntimeError if it fails.
    """
    started = time.perf_counter()
    reached: dict[str, float] = {}
    losses = []
    command = [sys.executable, "-c", program, data, str(epochs), device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
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
    """minivae's race and PyTorch's, one after the other."""
    epochs = 1 if quick else MOST_EPOCHS
    results = {"minivae": _race(MINIVAE, str(data), device, epochs)}
    try:
        import torch  # noqa: F401
    except ImportError:
        return results
    results["torch eager"] = _race(TORCH, str(data), device, epochs)
    return results
