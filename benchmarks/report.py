"""Draws the READMEs' tables and the benchmark plots from the result files and from counts.

    python -m minivae.benchmarks.report [--check]

Each table stands between two comments that name it, so that no figure is typed by hand. With
--check nothing is written, and a README that differs is an error.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from minivae.backends import PRECISIONS
from minivae.errors import InputError
from minivae.kernels import LARGE, MEDIUM, SMALL, TILES, Tile

from .end_to_end import TARGETS
from .figures import SWEEPS, primitives_figure, scaling_figure
from .floor import step_counts
from .launches import H100, counted_cases, step_launches
from .run import CASE_BY_CASE
from .runs import OWN_WEIGHTS, RESULTS, SAME_WEIGHTS

ROOT = Path(__file__).resolve().parents[1]
READMES = (ROOT / "README.md", ROOT / "kernels" / "README.md")
DOCS = ROOT / "docs"

COUNTED = (
    *("dense_forward", "dense_input_gradient", "dense_weight_update"),
    *("conv2d_forward", "conv2d_input_gradient", "conv_weight_update"),
)
"""The kernels whose instructions kernels/README.md shows."""

LARGE_BATCH = 4096
"""At which kernels/README.md counts every step once more."""

LARGE_SHARE = 0.1
"""Of the time of a step's products, from which on it names one."""

WITH_LAUNCHES = (
    *(("dense-784-400-20 b128", precision) for precision in PRECISIONS),
    (f"dense-784-400-20 b{LARGE_BATCH}", "fp32"),
    *(("mnist-conv b128", precision) for precision in PRECISIONS),
)
"""The steps whose launches it names."""

EPOCHS = {
    "mnist-dense": (3, 20),
    "fashion-dense": (3, 20, 100),
    "mnist-conv": (1, 5, 30),
    "mnist-conv-ae": (2,),
    "mnist-class": (5, 30),
    "mnist-bernoulli": (3, 7, 10),
}
"""After how many epochs the README shows a preset's test loss."""

PAPER_LIKELIHOODS = {
    ("iwae-paper-vae", 1): 86.76,
    ("iwae-paper-vae", 5): 86.47,
    ("iwae-paper-vae", 50): 86.35,
    ("iwae-paper-iwae", 5): 85.54,
    ("iwae-paper-iwae", 50): 84.78,
}
"""Burda et al. 2016, Table 1, MNIST, one stochastic layer: NLL in nats by preset and k."""

PAPER_PASSES = 3280
"""Passes over the training images behind each of them."""

OWN = "minivae"
FRAMEWORKS = {OWN: OWN, SAME_WEIGHTS: "PyTorch, the same weights", OWN_WEIGHTS: OWN_WEIGHTS}
"""Whose runs the table has, and the heads of their columns."""


def _load(name: str) -> Any:
    """A result file. Raises InputError if it is a rehearsal's or has a case that failed."""
    result = json.loads((RESULTS / name).read_text())
    cases = [case for section in CASE_BY_CASE for case in result.get(section, [])]
    if result.get("rehearsal") or any("failure" in case for case in cases):
        raise InputError(f"{RESULTS / name}: a rehearsal, or with a failed case: not a result")
    return result


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _estimate(values: list[float], form: str) -> str:
    """The mean, with its standard error and how many values there are if there are several."""
    if len(values) < 2:
        return form.format(values[0]) if values else "not run"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{form.format(statistics.fmean(values))} ± {error:.2f} ({len(values)})"


def runs_table() -> str:
    """Test losses of each preset after so many epochs, the mean over seeds, beside PyTorch's."""
    found: dict[tuple[str, int, str], dict[int, float]] = defaultdict(dict)
    for run in _load("runs.json")["runs"]:
        framework, name = run.get("framework", OWN), run["preset"]
        seed = run["seed"] if "seed" in run else run["training"]["seed"]
        for record in run["epochs"]:
            losses = found[name, record["epoch"], framework]
            assert seed not in losses, f"runs.json: {framework}'s {name} of seed {seed} twice"
            losses[seed] = record["test"]["loss"]
    rows = []
    for name, epochs in EPOCHS.items():
        for epoch in epochs:
            losses = {framework: found[name, epoch, framework] for framework in FRAMEWORKS}
            own, peer = losses[OWN], losses[SAME_WEIGHTS]
            apart = [100 * (own[seed] / peer[seed] - 1) for seed in own.keys() & peer.keys()]
            cells = [_estimate([*by_seed.values()], "{:.2f}") for by_seed in losses.values()]
            rows.append([name, str(epoch), *cells, _estimate(apart, "{:+.2f}")])
    return _table(["preset", "epochs", *FRAMEWORKS.values(), "% apart, seed by seed"], rows)


def paper_table() -> str:
    """Negative log-likelihoods beside those of Burda et al. 2016: whole runs, and truncated ones
    here and in PyTorch."""
    found: dict[tuple[str, int, str], str] = {}
    columns = []
    for run in _load("paper.json")["runs"]:
        nll, framework = run["evaluation"]["negative_log_likelihood"], run.get("framework")
        passes = len(run["epochs"])
        column = f"{framework or 'minivae'}, {passes} passes"
        columns.append(column)
        k = run["k"] if framework else run["objective"]["samples"]
        found[run["preset"], k, column] = f"{nll['mean']:.2f} ± {nll['error']:.2f}"
    columns = [*dict.fromkeys([f"minivae, {PAPER_PASSES} passes", *columns])]
    rows = [
        [f"`{preset} --k {k}`", f"{paper:.2f}"]
        + [found.get((preset, k, column), "not run") for column in columns]
        for (preset, k), paper in PAPER_LIKELIHOODS.items()
    ]
    return _table(["NLL, nats", f"paper, {PAPER_PASSES} passes", *columns], rows)


def truth_table() -> str:
    """Bounds by k beside the exact evidence, and the ELBO's gap beside the posterior's KL."""
    found = _load("truth.json")["truth"]
    bounds = {f"bound, k = {k}": b for k, b in found["bounds"].items()}
    cells = [f"{bound['mean']:.4f} ± {bound['error']:.4f}" for bound in bounds.values()]
    exact = [found[name] for name in ("log_evidence", "elbo_gap", "kl_to_posterior")]
    head = [*bounds, "log p(x), exact", "gap of the ELBO", "its posterior's KL, exact"]
    return _table(head, [[*cells, *(f"{value:.4f}" for value in exact)]])


def steps_table() -> str:
    """Milliseconds a training step, minivae and its peers, and their ratio on a second machine."""
    result, other = _load("steps-cpu.json"), _load("steps-cpu-xeon.json")
    again = _load("steps-cpu-again.json")
    names = list(dict.fromkeys(n for case in result["steps"] for n in case["milliseconds"]))
    others = {case["case"]: case for case in other["steps"]}
    agains = {case["case"]: case for case in again["steps"]}
    lead = "times_as_fast_as_the_fastest_peer"
    rows = []
    for case in result["steps"]:
        name, times = case["case"], case["milliseconds"]
        cells = [f"{times[n]['median']:.3g}" if n in times else "-" for n in names]
        fastest = min((n for n in times if n != OWN), key=lambda n: times[n]["median"])
        elsewhere = others.get(name, {"milliseconds": {}})
        # Without the fastest peer a lead is another figure.
        on_xeon = elsewhere[lead] if fastest in elsewhere["milliseconds"] else None
        leads = [case[lead], agains[name][lead], on_xeon]
        trip = case["core_round_trip_nanoseconds"]
        rows.append(
            [
                *(name, *cells, *(f"{ratio:.2f}" if ratio else "-" for ratio in leads)),
                f"{trip['median']:.0f} ({trip['p20']:.0f} to {trip['p80']:.0f})",
            ]
        )
    heads = ["speed-up over the fastest peer", "another run's", "on a Xeon", "cores apart, ns"]
    return (
        f"{_table(['step, ms', *names, *heads], rows)}\n\nMedians over turns; a speed-up is taken "
        "within each turn. In brackets the 20th and the 80th percentile. "
        f"{_where(result)} The other run: commit {again['environment']['commit']}. On a Xeon: "
        f"{_where(other)}"
    )


def costs_table() -> str:
    """A step beside its floor and beside PyTorch's, and how it grows with its sizes."""
    result = _load("scaling-cpu.json")
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in result["scaling"]:
        sweep, _, _ = case["case"].rpartition(" ")
        kinds[sweep if sweep in SWEEPS else case["case"]].append(case)
    rows = []
    for kind, cases in kinds.items():
        first, last = cases[0], cases[-1]
        grown = len(cases) > 1
        own = [case[OWN]["milliseconds"]["median"] for case in cases]
        pairs = [(case[OWN], case["torch eager"]) for case in cases if "torch eager" in case]
        faster = [b["milliseconds"]["median"] / a["milliseconds"]["median"] for a, b in pairs]
        smaller = [a["host_megabytes"] / b["host_megabytes"] for a, b in pairs]
        growth = last["floor_milliseconds"] / first["floor_milliseconds"], own[-1] / own[0]
        sizes = " to ".join(case["case"].rpartition(" ")[2] for case in (first, last))
        rows.append(
            [
                f"{kind} {sizes}" if grown else kind,
                *(f"{ratio:.3g}" if grown else "-" for ratio in growth),
                _span([case["times_the_floor"] for case in cases]),
                _span(faster),
                _span(smaller),
            ]
        )
    head = ["a step", "floor grows", "step grows", "times its floor"]
    table = _table([*head, "times as fast as PyTorch eager", "share of its memory"], rows)
    return f"{table}\n\n{_where(result)}"


def _range(numbers: Iterable[int]) -> str:
    low, high = min(found := list(numbers)), max(found)
    return f"{low}" if low == high else f"{low} to {high}"


def _span(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def start_up_table() -> str:
    """Seconds from the command line."""
    result = _load("start-up-cpu.json")
    rows = [[f"`{n}`", f"{t['median']:.2f}"] for n, t in result["start-up"].items()]
    return f"{_table(['seconds', 'median'], rows)}\n\n{_where(result)}"


def _where(result: dict[str, Any]) -> str:
    about = result["environment"]
    used = ("numpy", "numba", "torch", "jax")
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in used)
    return (
        f"{about['machine']}, {about['cores']} cores, {versions}, commit {about['commit']}, "
        f"{about['date']}."
    )


def end_to_end_table() -> str:
    """Seconds from a cold start to each test loss."""
    result = _load("end-to-end-cpu.json")
    targets = [f"{target:g}" for target in TARGETS]
    rows = [
        [name, *(_median_of_races(found["races"], target) for target in targets)]
        for name, found in result["end-to-end"].items()
    ]
    table = _table(["seconds to a test loss of", *targets], rows)
    races = len(result["end-to-end"]["minivae"]["races"])
    return f"{table}\n\nMedians of {races} races each, the fastest to the slowest. {_where(result)}"


def _median_of_races(races: list[dict[str, Any]], target: str) -> str:
    seconds = [race["seconds_to"][target] for race in races if target in race["seconds_to"]]
    if len(seconds) < len(races) or not seconds:
        return "-"
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


def instructions_table() -> str:
    """What a stage of a tile of a matrix product takes, in float32 and in TF32."""
    result = _load("machine-code.json")
    counts = {
        (row["kernel"], f"{row['precision']}, {row['tile']}"): str(row["instructions"])
        for row in result["stages"]
    }
    tiles = SMALL, MEDIUM, LARGE
    heads = [f"{precision}, {tile}" for precision in ("fp32", "tf32") for tile in tiles]
    rows = [[f"`{name}`", *(counts[name, head] for head in heads)] for name in COUNTED]
    where = f"{result['compiler']}, {result['target']}"
    return _table([f"instructions a stage, {where}", *heads], rows)


def _instructions() -> dict[tuple[str, str, Tile], int]:
    """Of a stage, by precision, kernel and tile."""
    tiles = {str(tile): tile for tile in TILES}
    return {
        (row["precision"], row["kernel"], tiles[row["tile"]]): row["instructions"]
        for row in _load("machine-code.json")["stages"]
    }


def counts_table() -> str:
    """What each step launches, moves and computes, its floors on an H100, and its products."""
    instructions, rows = _instructions(), []
    for case in (*counted_cases(), *counted_cases(LARGE_BATCH)):
        counts, cells = step_counts(case), []
        for precision in PRECISIONS:
            launches = step_launches(case, precision)
            products = sum(each.microseconds(precision, instructions) for each in launches)
            floor = 1e3 * H100[precision].milliseconds(counts.moved, counts.operations)
            cells += [f"{products:.0f}", f"{products / floor:.1f}"]
            if precision == "fp32":
                number = len(launches)
        floors = [
            1e3 * H100["fp32"].milliseconds(*counted)
            for counted in ((counts.moved, 0), (0, counts.operations))
        ]
        rows.append(
            [
                *(f"`{case.name}`", str(number)),
                *(f"{counts.moved / 1e6:.0f}", f"{counts.operations / 1e9:.2f}"),
                *(f"{time:.0f}" for time in floors),
                *cells,
            ]
        )
    head = ["a step", "launches", "MB", "GFLOP", "µs for the bytes", "µs for the operations"]
    estimates = ["µs for products, estimated", "of the larger floor"]
    return _table([*head, *estimates, "the same in TF32", "of its larger floor"], rows)


def launches_table() -> str:
    """The products that take most of three steps, by the estimate."""
    instructions, rows = _instructions(), []
    cases = {case.name: case for case in (*counted_cases(), *counted_cases(LARGE_BATCH))}
    for name, precision in WITH_LAUNCHES:
        launches = step_launches(cases[name], precision)
        times = [launch.microseconds(precision, instructions) for launch in launches]
        for launch, time in zip(launches, times, strict=True):
            if time >= LARGE_SHARE * sum(times):
                number = sum(part.tiles for part in launch.parts)
                tiles = f"{number} of {launch.tile}"
                split = [_range(part.splits for part in launch.parts), str(launch.blocks)]
                cells = [tiles, *split, f"{launch.stages:.3g}", f"{time:.1f}"]
                rows.append([f"`{name}`, {precision}", f"`{launch.kernel}`", *cells])
    head = ["a step", "launch", "tiles", "splits", "blocks", "stages of each", "µs, estimated"]
    return _table(head, rows)


def launch_times_table() -> str:
    """What every step's launches took on a GPU, and of the larger of its floors on an H100."""
    result = _load("launches-cuda.json")
    measured = {(step["case"], step["precision"]): step for step in result["steps"]}
    rows = []
    for case in (*counted_cases(), *counted_cases(LARGE_BATCH)):
        counts, cells = step_counts(case), []
        for precision in PRECISIONS:
            launches = measured[case.name, precision]["launches"]
            total = sum(launch["microseconds"] for launch in launches)
            floor = 1e3 * H100[precision].milliseconds(counts.moved, counts.operations)
            longest = max(launches, key=lambda launch: launch["microseconds"])
            cells += [f"{total:.0f}", f"{total / floor:.1f}"]
            cells.append(f"`{longest['kernel']}` {longest['microseconds']:.0f}")
        rows.append([f"`{case.name}`", *cells])
    heads = ["a step", "fp32, µs", "of its floor", "longest launch"]
    heads += ["TF32, µs", "of its floor", "longest launch"]
    environment = result["environment"]
    note = f"{environment['machine']}, commit {environment['commit']}, {environment['date']}."
    return f"{_table(heads, rows)}\n\n{note}"


def steps_on_gpu_table() -> str:
    """Microseconds a training step on a GPU, minivae and its peers."""
    result = _load("steps-cuda.json")
    names = list(dict.fromkeys(n for case in result["steps"] for n in case["milliseconds"]))
    rows = [
        [
            case["case"],
            *(f"{1e3 * case['milliseconds'][name]['median']:.0f}" for name in names),
            f"{case['times_as_fast_as_the_fastest_peer']:.2f}",
        ]
        for case in result["steps"]
    ]
    heads = ["step, µs", *names, "speed-up over the fastest peer"]
    return f"{_table(heads, rows)}\n\n{_where(result)}"


TABLES: dict[str, Callable[[], str]] = {
    "runs": runs_table,
    "truth": truth_table,
    "paper": paper_table,
    "steps": steps_table,
    "costs": costs_table,
    "start-up": start_up_table,
    "end-to-end": end_to_end_table,
    "instructions": instructions_table,
    "counts": counts_table,
    "launches": launches_table,
    "launch-times": launch_times_table,
    "steps-on-gpu": steps_on_gpu_table,
}


def tables_of(readme: str) -> list[str]:
    """The names of its tables, in order."""
    return re.findall(r"<!-- table: (\S+) -->\n.*?\n<!-- end: \1 -->", readme, re.DOTALL)


def redrawn(readme: str) -> str:
    """The README with every table drawn anew."""
    for name in tables_of(readme):
        draw, begin, end = TABLES[name], f"<!-- table: {name} -->\n", f"\n<!-- end: {name} -->"
        before, rest = readme.split(begin, 1)
        readme = before + begin + draw() + end + rest.split(end, 1)[1]
    return readme


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw the READMEs' tables from result files.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args()
    found = sorted(name for path in READMES for name in tables_of(path.read_text()))
    if found != sorted(TABLES):
        print(f"the READMEs have the tables {found}, expected each of {sorted(TABLES)} once")
        return 1
    for path in READMES:
        present = path.read_text()
        wanted = redrawn(present)
        if arguments.check and wanted != present:
            name = path.relative_to(ROOT)
            print(f"{name}: a table differs from its source; run minivae.benchmarks.report")
            return 1
        if not arguments.check:
            path.write_text(wanted)
    if not arguments.check:
        scaling_figure(DOCS / "scaling.png", _load("scaling-cpu.json"))
        primitives_figure(DOCS / "primitives.png", _load("primitives-cpu.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
