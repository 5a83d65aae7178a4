"""How a step's time and memory grow with batch, width and image size, beside PyTorch's; and its
time as a multiple of its floor."""

import importlib.util
import resource
from collections.abc import Callable, Iterator
from typing import Any

from minivae.train import Trainer

from .cases import Case, preset_case
from .floor import Rates, machine_rates, step_floor
from .measure import Candidate, in_own_process, interleaved, reason
from .steps import set_peers_precision

BATCHES = (16, 64, 256, 1024, 4096, 8192)
WIDTHS = (64, 256, 1024, 4096)
IMAGE_SIZES = (28, 64, 128)
FEW_IMAGES = 1024
"""So few that the memory of a data set is small beside a step's."""


def _cases(quick: bool) -> list[dict[str, Any]]:
    batches, widths, sizes = ((16,), (64,), (28,)) if quick else (BATCHES, WIDTHS, IMAGE_SIZES)
    return [
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


def _minivae(case: Case, device: str) -> Candidate:
    trainer = Trainer(case.model.to(device), case.splits, case.training)
    return Candidate(trainer.step, case.model.backend.synchronize)


def _torch(case: Case, device: str) -> Candidate:
    from .torch_peer import TorchPeer

    set_peers_precision("fp32")
    peer = TorchPeer(case, "cuda" if device == "cuda" else "cpu", "eager")
    return Candidate(peer.step, peer.synchronize)


FRAMEWORKS: dict[str, Callable[[Case, str], Candidate]] = {
    "minivae": _minivae,
    "torch eager": _torch,
}


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _device_megabytes(framework: str) -> float:
    """What a framework has taken of a GPU's memory."""
    if framework == "minivae":
        import cupy

        return float(cupy.get_default_memory_pool().total_bytes() / 2**20)
    import torch

    return float(torch.cuda.max_memory_reserved() / 2**20)


def _measure(framework: str, options: dict[str, Any], device: str, quick: bool) -> dict[str, Any]:
    """One size, in a process of its own, so that its peak memory is its own too: what it takes
    beyond the process once it has taken a step of the same kind at a tiny size."""
    build = FRAMEWORKS[framework]
    build(preset_case(options["name"], batch=2), device).run()
    before = _peak_megabytes()
    case = preset_case(**options, images=FEW_IMAGES)
    step = build(case, device)
    rounds, seconds = (2, 0.01) if quick else (5, 0.3)
    times = interleaved({case.name: step}, rounds, seconds)[case.name]
    result = {
        "milliseconds": times,
        "steps_per_second": float(f"{1e3 / times['median']:.4g}"),
        "images_per_second": float(f"{1e3 * case.training.batch_size / times['median']:.4g}"),
        "host_megabytes": round(_peak_megabytes() - before, 1),
    }
    if device == "cuda":
        result["device_megabytes"] = round(_device_megabytes(framework), 1)
    return result


def _floor(options: dict[str, Any], rates: Rates) -> float:
    return step_floor(preset_case(**options, images=FEW_IMAGES), rates)


def _measure_all(
    frameworks: list[str], options: dict[str, Any], device: str, quick: bool, rates: Rates
) -> dict[str, Any]:
    result: dict[str, Any] = {"case": options["label"]}
    try:
        for framework in frameworks:
            result[framework] = in_own_process(_measure, framework, options, device, quick)
        floor = in_own_process(_floor, options, rates)
    except Exception as error:  # the other sizes are measured all the same
        return {**result, "failure": reason(error)}
    own = result["minivae"]["milliseconds"]["median"]
    result["floor_milliseconds"] = float(f"{floor:.4g}")
    result["times_the_floor"] = float(f"{own / floor:.3g}")
    return result


def measure_scaling(
    device: str, quick: bool, measured: list[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """What is measured so far, after every size of `_cases` that is not yet among `measured`: in
    minivae and, if it is there, PyTorch, each in a fresh process. A size that fails has a `failure`
    beside what was measured, and is measured again by the next call."""
    # Not in this process: a child's peak memory begins at its parent's.
    rates = in_own_process(machine_rates, device, quick)
    frameworks = [*FRAMEWORKS] if importlib.util.find_spec("torch") else ["minivae"]
    measured = [size for size in measured if "failure" not in size]
    for options in _cases(quick):
        if options["label"] not in {known["case"] for known in measured}:
            measured = [*measured, _measure_all(frameworks, options, device, quick, rates)]
            yield measured
