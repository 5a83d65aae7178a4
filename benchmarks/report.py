"""Draws the README's tables and the benchmark plots from the result files.

    python -m minivae.benchmarks.report [--check]

Each table stands between two comments that name it, so that no figure is typed by hand. With
--check nothing is written, and a README that differs is an error.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .runs import RESULTS

README = Path(__file__).resolve().parents[1] / "README.md"

PYTORCH_TEST_LOSS = {
    "mnist-dense": {3: 31.4, 20: 28.3},
    "fashion-dense": {3: 265.9, 20: 248.2},
    "mnist-conv": {1: 21.2, 5: 19.4, 30: 18.57},
    "mnist-conv-ae": {2: 2.6},
}
"""Test losses of PyTorch 2.13 on the same models, by preset and epoch."""


def _load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def runs_table() -> str:
    """Test loss of each preset after so many epochs, beside PyTorch's."""
    rows = []
    for run in _load("runs.json")["runs"]:
        published = PYTORCH_TEST_LOSS.get(run["preset"], {})
        last = len(run["epochs"])
        for epoch in sorted({*(e for e in published if e <= last), last}):
            record = run["epochs"][epoch - 1]
            own = f"{record['test']['loss']:.2f}"
            row = (run["preset"], run["training"]["seed"], epoch, own, published.get(epoch, "-"))
            rows.append([str(cell) for cell in row])
    unique = list(dict.fromkeys(map(tuple, rows)))
    header = ["preset", "seed", "epochs", "test loss", "PyTorch"]
    return _table(header, [list(row) for row in unique])


def steps_table() -> str:
    """Milliseconds a training step, minivae and its peers."""
    result = _load("steps-cpu.json")
    names = list(dict.fromkeys(n for case in result["steps"] for n in case["milliseconds"]))
    rows = []
    for case in result["steps"]:
        times = case["milliseconds"]
        cells = [f"{times[n]['median']:.3g}" if n in times else "-" for n in names]
        rows.append([case["case"], *cells, f"{case['times_as_fast_as_the_fastest_peer']:.2f}"])
    about = result["environment"]
    versions = ", ".join(f"{n} {v}" for n, v in about["versions"].items() if n != "minivae")
    table = _table(["step, ms", *names, "fastest peer / minivae"], rows)
    return (
        f"{table}\n\nMedian of turns taken within one process, {about['machine']}, "
        f"{about['cores']} cores, {versions}, commit {about['commit']}, {about['date']}."
    )


TABLES: dict[str, Callable[[], str]] = {"runs": runs_table, "steps": steps_table}


def redrawn(readme: str) -> str:
    """The README with every table drawn anew."""
    for name, draw in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", f"\n<!-- end: {name} -->"
        if begin not in readme:
            continue
        before, rest = readme.split(begin, 1)
        readme = before + begin + draw() + end + rest.split(end, 1)[1]
    return readme


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw the README's tables from result files.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args()
    present = README.read_text()
    wanted = redrawn(present)
    if arguments.check and wanted != present:
        print("README.md: a table differs from its result file; run minivae.benchmarks.report")
        return 1
    if not arguments.check:
        README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
