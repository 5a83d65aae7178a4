"""A step's time and memory beside PyTorch's, and its time as a multiple of its floor: of the
presets, and as batch, width and image size grow."""

import ctypes
import gc
import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from minivae.presets import preset
from minivae.train import Trainer

from .cases import IMAGES, PRESETS, Case, preset_case
from .cores import round_trip
from .floor import QUICK_SECONDS, Counter, Floor, RateMeter, median_rates, step_counts
from .measure import (
    LIMIT,
    ROUNDS,
    SECONDS_A_TURN,
    Candidate,
    OwnProcess,
    Turns,
    collected,
    in_own_process,
    reason,
    summary,
)
from .steps import OWN, ROUND_TRIP, set_peers_precision

BATCHES = (16, 64, 256, 1024, 4096, 8192)
WIDTHS = (64, 256, 1024, 4096)
IMAGE_SIZES = (28, 64, 128)
METER = "rates"
LINUX = sys.platform == "linux"
FEW_IMAGES = 1024
"""So few that the memory of a data set is small beside a step's. Not for small images on a GPU,
where an epoch's end would take longer than its steps."""


def _cases(quick: bool) -> list[dict[str, Any]]:
    batches, widths, sizes = ((16,), (64,), (28,)) if quick else (BATCHES, WIDTHS, IMAGE_SIZES)
    own_batch = {"batch": 16} if quick else {}
    return [
        {"name": "glyphs", "label": "dense-784-400-20", **own_batch},
        *({"name": name, "label": name, **own_batch} for name in PRESETS[: 0 if quick else None]),
        *({"name": "glyphs", "label": f"dense batch {n}", "batch": n} for n in batches),
        *({"name": "glyphs", "label": f"dense width {w}", "hidden": (w,)} for w in widths),
        *(
            {
                "name": "mnist-conv",
                "label": f"conv image {size}",
                "batch": 2 if quick else 32,
                "image_shape": (size, size, 1),
            }
            for size in sizes
        ),
    ]


def _case(options: dict[str, Any], device: str) -> Case:
    few = device != "cuda" or "image_shape" in options
    return preset_case(**options, images=FEW_IMAGES if few else IMAGES)


def _candidate(framework: str, case: Case, device: str) -> Candidate:
    if framework == OWN:
        trainer = Trainer(case.model.to(device), case.splits, case.training)
        return Candidate(trainer.step, case.model.backend.synchronize)
    from .torch_peer import TorchPeer

    set_peers_precision("fp32")
    case.model.to("reference")
    where = "cuda" if device == "cuda" else "cpu"
    peer = TorchPeer(case, where, framework.removeprefix("torch "))
    return Candidate(peer.step, peer.synchronize)


def _peer(device: str) -> str:
    return f"torch {'graph' if device == 'cuda' else 'eager'}"


def _megabytes(kind: str) -> float:
    """This process's memory, as it is ("VmRSS") or was at its peak ("VmHWM"); NaN where the system
    is not Linux."""
    if not LINUX:
        return math.nan
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(kind))
    return int(kilobytes) / 1024


def _give_back() -> None:
    """Gives back all memory that is free, which else would hide what is allocated in it, and lets
    the peak begin anew."""
    gc.collect()
    if LINUX:
        with suppress(AttributeError):  # of a C library that keeps nothing
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # of a sandbox
            Path("/proc/self/clear_refs").write_text("5")


def _device_megabytes(framework: str) -> float:
    """What a framework has taken of a GPU's memory."""
    if framework == OWN:
        import cupy

        return float(cupy.get_default_memory_pool().total_bytes() / 2**20)
    import torch

    return float(torch.cuda.max_memory_reserved() / 2**20)


class _Size:
    """A size in a process of its own, so that its peak memory is its own too: what its steps take
    beyond the process once it has taken a step of the same kind at a tiny size."""

    def __init__(
        self, framework: str, options: dict[str, Any], device: str, seconds: float
    ) -> None:
        tiny = preset_case(options["name"], batch=2, images=FEW_IMAGES)
        # Kept, so that none of its memory is found again by the size.
        self._tiny = _candidate(framework, tiny, device)
        self._tiny.run()
        del tiny  # PyTorch has weights of its own
        _give_back()
        self._before = _megabytes("VmRSS")
        self._framework, self._device = framework, device
        candidates = {framework: _candidate(framework, _case(options, device), device)}
        trip = round_trip() if framework == OWN and device == "cpu" else None
        if trip is not None:
            candidates[ROUND_TRIP] = trip
        _give_back()
        self._turns = Turns(candidates, seconds)

    def __call__(self, task: str) -> Any:
        return {"turn": self._turns.take, "end": self._memory}[task]()

    def _memory(self) -> dict[str, float]:
        taken = _megabytes("VmHWM") - self._before
        found = {"host_megabytes": round(taken, 1)} if LINUX else {}
        if self._device == "cuda":
            found["device_megabytes"] = round(_device_megabytes(self._framework), 1)
        return found


def _rates(milliseconds: dict[str, float], options: dict[str, Any]) -> dict[str, Any]:
    """A step's time, and as many steps and images a second."""
    batch = options.get("batch", preset(options["name"]).training.batch_size)
    steps = 1e3 / milliseconds["median"]
    return {
        "milliseconds": milliseconds,
        "steps_per_second": float(f"{steps:.4g}"),
        "images_per_second": float(f"{batch * steps:.4g}"),
    }


def _counts(options: dict[str, Any], device: str) -> Counter:
    return step_counts(_case(options, device))


def _measured(options: dict[str, Any], frameworks: list[str], device: str, quick: bool) -> Any:
    """Times and memory of each framework, in turns with each other and with the machine's rates,
    and a step's floor."""
    rounds, seconds = (2, QUICK_SECONDS) if quick else (ROUNDS, SECONDS_A_TURN)
    counts = in_own_process(_counts, options, device)
    processes = {}
    try:
        for name in frameworks:
            processes[name] = OwnProcess(_Size, name, options, device, seconds)
            processes[name].wait_until_prepared(LIMIT)
        processes[METER] = OwnProcess(RateMeter, device, quick)
        processes[METER].wait_until_prepared(LIMIT)  # else it does so in the first turn of others
        turns, rates = [], []
        for _ in range(rounds):
            turn: dict[str, float] = {}
            for name in frameworks:
                turn |= processes[name].ask(LIMIT, "turn")
            turns.append(turn)
            rates.append(processes[METER].ask(LIMIT))
        times = collected(turns)
        trips = [1e6 * milliseconds for milliseconds in times.pop(ROUND_TRIP, [])]
        floor = Floor.of(counts, times[OWN], rates)
        return {
            **({"core_round_trip_nanoseconds": summary(trips)} if trips else {}),
            "rates": median_rates(rates),
            "floor_milliseconds": floor.milliseconds,
            "times_the_floor": floor.times_the_floor,
            **{
                name: {
                    **_rates(summary(times[name]), options),
                    **processes[name].ask(LIMIT, "end"),
                }
                for name in frameworks
            },
        }
    finally:
        for process in processes.values():
            process.end()


def _measure_all(options: dict[str, Any], device: str, quick: bool) -> dict[str, Any]:
    frameworks, failures = [OWN, _peer(device)], {}
    if importlib.util.find_spec("torch") is None:
        failures[frameworks.pop()] = "not installed"
    result: dict[str, Any] = {"case": options["label"], "failures": failures}
    try:
        return result | _measured(options, frameworks, device, quick)
    except Exception as error:  # the other sizes are measured all the same
        return {**result, "failure": reason(error)}


def measure_scaling(
    device: str, quick: bool, measured: list[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """What is measured so far, after every size of `_cases` that is not yet among `measured`: in
    minivae and, if it is there, PyTorch, in turns of two fresh processes, with the machine's rates
    behind its floor. A size that fails has a `failure` beside what was measured, and is measured
    again by the next call."""
    measured = [size for size in measured if "failure" not in size]
    for options in _cases(quick):
        if options["label"] not in {known["case"] for known in measured}:
            measured = [*measured, _measure_all(options, device, quick)]
            yield measured
