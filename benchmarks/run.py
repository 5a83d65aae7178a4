"""The suite behind `minivae bench`, and the comparison of two of its result files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minivae.errors import InputError
from minivae.files import replacing

from .end_to_end import measure_end_to_end
from .measure import environment
from .primitives import measure_primitives
from .scaling import measure_scaling
from .steps import measure_steps

SECTIONS = ("steps", "primitives", "scaling", "end-to-end")


def run_suite(
    device: str, sections: list[str], output: Path, *, quick: bool = False, data: str = "mnist"
) -> None:
    """Measures the sections one after the other and writes one result file.

    With `quick` everything runs at tiny sizes and for moments: a rehearsal, not a measurement.
    """
    measures: dict[str, Callable[[], Any]] = {
        "steps": lambda: measure_steps(device, quick),
        "primitives": lambda: measure_primitives(device, quick),
        "scaling": lambda: measure_scaling(device, quick),
        "end-to-end": lambda: measure_end_to_end(device, data, quick),
    }
    result: dict[str, Any] = {"environment": environment(device), "rehearsal": quick}
    for section in sections:
        if section not in measures:
            raise InputError(f"unknown section {section!r}, expected {', '.join(SECTIONS)}")
    for section in sections:
        print(f"measuring {section}", flush=True)
        result[section] = measures[section]()
        with replacing(output) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(output)


def compare(old: Path, new: Path, tolerance: float = 1.15) -> list[str]:
    """The step cases whose lead over the fastest peer shrank by more than `tolerance`, in words.

    Ratios within one run are compared, never times: machines and their load differ.
    """
    leads = []
    for path in (old, new):
        try:
            steps = json.loads(path.read_text())["steps"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not a result file with steps: {error}") from None
        leads.append({c["case"]: c["times_as_fast_as_the_fastest_peer"] for c in steps})
    return [
        f"{case}: {before:.2f} times as fast as the fastest peer before, {leads[1][case]:.2f} now"
        for case, before in leads[0].items()
        if before and leads[1].get(case) and leads[1][case] * tolerance < before
    ]
