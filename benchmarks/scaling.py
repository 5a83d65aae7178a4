"""How a step's time and memory grow with batch, width and image size."""

import multiprocessing
import resource
from typing import Any

from minivae.train import Trainer

from .cases import Case, preset_case
from .measure import Candidate, interleaved

BATCHES = (16, 64, 256, 1024, 4096, 8192)
WIDTHS = (64, 256, 1024, 4096)
IMAGE_SIZES = (28, 64, 128)


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


def _measure(options: dict[str, Any], device: str, quick: bool) -> dict[str, Any]:
    """One size, in a process of its own, so that its peak memory is its own too."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case: Case = preset_case(**options)
    case.model.to(device)
    trainer = Trainer(case.model, case.splits, case.training)
    step = Candidate(trainer.step, case.model.backend.synchronize)
    rounds, seconds = (2, 0.01) if quick else (5, 0.3)
    times = interleaved({case.name: step}, rounds, seconds)[case.name]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "case": case.name,
        "milliseconds": times,
        "steps_per_second": float(f"{1e3 / times['median']:.4g}"),
        "images_per_second": float(f"{1e3 * case.training.batch_size / times['median']:.4g}"),
        "host_megabytes": round((after - before) / 1024, 1),
    }


def measure_scaling(device: str, quick: bool) -> list[dict[str, Any]]:
    """Every size of `_cases`, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = []
    for options in _cases(quick):
        with context.Pool(1) as pool:
            results.append(pool.apply(_measure, (options, device, quick)))
    return results
