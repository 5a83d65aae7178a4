"""Collects finished runs on real data into one result file, which the README's table is drawn from.

python -m minivae.benchmarks.runs RUN [RUN ...] [-o benchmarks/results/runs.json]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from minivae.checkpoint import METRICS, read_config
from minivae.train import read_metrics

from .measure import environment

RESULTS = Path(__file__).resolve().parent / "results"


def collect(folder: Path) -> dict[str, Any]:
    """A run's preset, data, training settings and epochs."""
    config = read_config(folder)
    epochs = [record for record in read_metrics(folder / METRICS) if "epoch" in record]
    return {
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
    arguments = parser.parse_args()
    result = {"environment": environment("cpu"), "runs": [collect(run) for run in arguments.runs]}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
