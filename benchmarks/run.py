"""The suite behind `minivae bench`, and the comparison of two of its result files."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minivae import backends
from minivae.data import load
from minivae.environment import environment
from minivae.errors import InputError, unknown

from .end_to_end import NOT_INSTALLED, measure_end_to_end
from .measure import write_result
from .primitives import measure_primitives
from .scaling import measure_scaling
from .startup import measure_start_up
from .steps import OWN, PEERS, measure_steps

SECTIONS = ("steps", "primitives", "scaling", "end-to-end", "start-up")
CASE_BY_CASE = ("steps", "scaling")


def run_suite(
    device: str,
    sections: list[str],
    output: Path,
    *,
    quick: bool = False,
    data: str = "mnist",
    resume: bool = False,
    without: Sequence[str] = (),
) -> None:
    """Measures the sections one after the other into one result file, which is written after every
    case of steps and scaling. With `resume` it goes on with that file, where a run was cut short:
    InputError if the file is of another machine, commit or version, and without `resume` if it
    exists. Raises RuntimeError at the end if a case failed.

    With `quick` everything runs at tiny sizes and for moments: a rehearsal, not a measurement.
    Steps are measured `without` some peers, such as "torch compile-max-autotune".
    """
    for section in sections:
        if section not in SECTIONS:
            raise unknown("section", section, SECTIONS)
    for peer in without:
        if peer not in PEERS:
            raise unknown("peer", peer, PEERS)
    backend = backends.get(device)
    device = backend.name if device == "auto" else device
    result: dict[str, Any] = {
        "environment": environment(device),
        "rehearsal": quick,
        "without": sorted(without),
    }
    if resume:
        result = _unfinished(output, result)
    measures: dict[str, Callable[[], Iterator[Any]]] = {
        "steps": lambda: measure_steps(device, quick, result.get("steps", []), without),
        "primitives": lambda: iter([measure_primitives(device, quick)]),
        "scaling": lambda: measure_scaling(device, quick, result.get("scaling", [])),
        "end-to-end": lambda: iter([measure_end_to_end(device, data, quick)]),
        "start-up": lambda: iter([measure_start_up(device, data, quick)]),
    }
    if {"end-to-end", "start-up"} & {*sections}:
        load(data)  # what is no data is told before a file is written
    if output.exists() and not resume:
        raise InputError(f"{output} exists: --resume goes on with it, or name another with -o")
    if not output.exists():
        write_result(output, result)  # what cannot be written is told before hours of measuring
    for section in sections:
        if section in result and section not in CASE_BY_CASE:
            continue
        print(f"measuring {section}", flush=True)
        for found in measures[section]():
            result[section] = found
            write_result(output, result)
            for line in IN_WORDS[section](found):
                print(f"  {line}", flush=True)
    print(output)
    cases = [case for section in CASE_BY_CASE for case in result.get(section, [])]
    failed = [f"{case['case']}: {case['failure']}" for case in cases if "failure" in case]
    failed += [
        f"{name}: {races['failure']}"
        for name, races in result.get("end-to-end", {}).items()
        if races.get("failure", NOT_INSTALLED) != NOT_INSTALLED
    ]
    if failed:
        raise RuntimeError("; ".join(failed))


def _last_step_in_words(cases: list[dict[str, Any]]) -> Iterator[str]:
    case = cases[-1]
    if "failure" in case:
        yield f"{case['case']:<24} failed: {case['failure']}"
        return
    times = [f"{name} {t['median']:.3g}" for name, t in case["milliseconds"].items()]
    times += [f"{name} {reason}" for name, reason in case["failures"].items()]
    lead = case["times_as_fast_as_the_fastest_peer"]
    words = f"; {lead:.2f} times as fast as the fastest peer" if lead else ""
    yield f"{case['case']:<24} ms a step: {', '.join(times)}{words}"


def _primitives_in_words(found: dict[str, Any]) -> Iterator[str]:
    rates = found["rates"]
    yield f"copies {rates['copy_gigabytes_per_second']:.3g} GB/s"
    yield f"matrix product of NumPy {rates['product_gigaflops']:.3g} GFLOP/s"
    for one in found["primitives"]:
        floor = f"{one['times_the_floor']:.3g} times the floor"
        yield f"{one['primitive']:<48} {one['milliseconds']['median']:.3g} ms, {floor}"


def _last_size_in_words(cases: list[dict[str, Any]]) -> Iterator[str]:
    case = cases[-1]
    if "failure" in case:
        yield f"{case['case']:<24} failed: {case['failure']}"
        return
    sides = [
        f"{name} {side['milliseconds']['median']:.3g} ms a step"
        for name, side in case.items()
        if isinstance(side, dict) and "milliseconds" in side
    ]
    sides += [f"{name} {reason}" for name, reason in case.get("failures", {}).items()]
    yield f"{case['case']:<24} {', '.join(sides)}; {case['times_the_floor']:.3g} times the floor"


def _races_in_words(found: dict[str, Any]) -> Iterator[str]:
    for name, runner in found.items():
        if "failure" in runner:
            yield f"{name:<24} {runner['failure']}"
            continue
        seconds = [f"{loss} in {time:.3g} s" for loss, time in runner["seconds_to"].items()]
        yield f"{name:<24} test loss {', '.join(seconds) or 'still above every target'}"


def _start_up_in_words(found: dict[str, Any]) -> Iterator[str]:
    for name, time in found.items():
        yield f"{name:<40} {time['median']:.2f} s"


IN_WORDS: dict[str, Callable[[Any], Iterator[str]]] = {
    "steps": _last_step_in_words,
    "primitives": _primitives_in_words,
    "scaling": _last_size_in_words,
    "end-to-end": _races_in_words,
    "start-up": _start_up_in_words,
}
"""What is said of a section as soon as it, or another case of it, is measured."""


def _unfinished(output: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """What a result file has, if it was measured under the same conditions."""
    beside = [name for name in expected if name != "environment"]
    try:
        found: dict[str, Any] = json.loads(output.read_text())
        present = {**found["environment"], **{name: found[name] for name in beside}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{output}: not a result file to go on with: {error}") from None
    wanted = {**expected["environment"], **{name: expected[name] for name in beside}}
    for name, value in wanted.items():
        if name != "date" and present.get(name) != value:
            raise InputError(
                f"{output}: measured with {name} {present.get(name)}, expected {value}"
            )
    return found


COMPARABLE = ("device", "machine")
"""What two result files must have in common, since a lead depends on it."""


def compare(old: Path, new: Path, tolerance: float = 1.15) -> list[str]:
    """The step cases whose lead over the fastest peer shrank by more than `tolerance`, or that have
    none any more, in words. Only peers that a case has in both files count.

    Ratios within one run are compared, never times: a machine's load differs. Raises InputError of
    files from different machines, and where no case has a lead to compare.
    """
    results = [_with_steps(path) for path in (old, new)]
    for name in COMPARABLE:
        before, now = (result["environment"].get(name) for result in results)
        if before != now:
            raise InputError(f"{new}: measured with {name} {now}, expected {before} as in {old}")
    before, now = ({case["case"]: case for case in result["steps"]} for result in results)
    slower, compared = [], 0
    for case, times in ((case, found.get("milliseconds", {})) for case, found in before.items()):
        others = now.get(case, {}).get("milliseconds", {})
        peers = [name for name in times if not name.startswith(OWN)]
        if not peers:
            continue
        compared += 1
        common = [name for name in peers if name in others]
        leads = [_lead(found, common or peers) for found in (times, others if common else times)]
        if not common:
            slower.append(f"{case}: {leads[0]:.2f} times as fast as the fastest peer, now alone")
        elif leads[1] * tolerance < leads[0]:
            words = f"{leads[0]:.2f} times as fast as the fastest peer, now {leads[1]:.2f}"
            slower.append(f"{case}: {words}")
    if not compared:
        raise InputError(f"{old}: no case has a peer, expected a lead to compare")
    return slower


def _with_steps(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["environment"] and found["steps"]:
            return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a result file with steps: {error}") from None
    raise InputError(f"{path}: not a result file with steps")


def _lead(milliseconds: dict[str, dict[str, float]], peers: list[str]) -> float:
    return min(milliseconds[name]["median"] for name in peers) / milliseconds[OWN]["median"]
