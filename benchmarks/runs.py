"""Collects finished runs on real data into a result file, which the README's tables are drawn from.

    python -m minivae.benchmarks.runs RUN [RUN ...] [-o benchmarks/results/runs.json]

A run may be one of PyTorch's (torch_run.py); what `minivae evaluate` found in a run goes with it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from minivae.checkpoint import METRICS, read_config, read_metrics
from minivae.environment import environment

from .measure import write_result

EVALUATION = "evaluation.json"
EVALUATED = (
    *("checkpoint", "step", "images", "samples", "seed", "binarization", "objective"),
    *("loss", "kl", "bounds", "negative_log_likelihood", "active_units", "environment"),
)
"""What the result file keeps of an evaluation."""

PEER = "peer.json"
"""The record of a run in PyTorch (torch_run.py), whose weights lie beside it."""

SAME_WEIGHTS, OWN_WEIGHTS = "PyTorch", "PyTorch, its own weights"
"""The framework of a run in PyTorch that began at minivae's initial weights, or at its own."""

RESULTS = Path(__file__).resolve().parent / "results"


def rounded(value: Any) -> Any:
    """Numbers within lists and objects to seven digits, all that float32 has."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def collect(folder: Path) -> dict[str, Any]:
    """A run's preset, settings, epochs and evaluation."""
    peer = folder / PEER
    run = json.loads(peer.read_text()) if peer.exists() else _own(folder)
    run["epochs"] = rounded(run["epochs"])
    if (folder / EVALUATION).exists():
        evaluation = json.loads((folder / EVALUATION).read_text())
        run["evaluation"] = {name: evaluation[name] for name in EVALUATED}
    return run


def _own(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    epochs = [record for record in read_metrics(folder / METRICS) if "epoch" in record]
    return {
        "environment": config.get("environment"),
        "preset": config["preset"],
        "data": config["data"],
        "training": config["training"],
        "objective": config["model"]["objective"],
        "epochs": [
            {"epoch": e["epoch"], "train": e["train"], "test": e["test"], "seconds": e["seconds"]}
            for e in epochs
        ],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Collect finished runs into a result file.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "runs.json")
    parser.add_argument("--append", action="store_true", help="to the runs that are in the file")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"environment": environment("cpu"), "runs": []}
    if arguments.append:
        result = json.loads(arguments.output.read_text())
    result["runs"] += [collect(run) for run in arguments.runs]
    write_result(arguments.output, result)


if __name__ == "__main__":
    main()
