"""minivae evaluate: a table, a document and pictures."""

import argparse
import json
from collections.abc import Sequence

import numpy as np

from .. import plots
from ..checkpoint import BEST, CHECKPOINT, load_at_step, read_config
from ..data import Dataset, Splits
from ..data.dataset import called
from ..environment import environment
from ..errors import InputError, check_count
from ..evaluate import Evaluation
from ..evaluate import evaluate as estimate
from ..files import replacing
from .runs import NO_LIKELIHOOD, data_source, run_data


def evaluate(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.run)
    training = config.get("training", {})
    model, step = load_at_step(arguments.run, arguments.device, best=arguments.best)
    splits = run_data(arguments, config, model)
    found = estimate(
        model,
        _some_images(splits, arguments.images),
        samples=arguments.samples,
        binarization=arguments.binarization or training.get("binarization", "none"),
        seed=arguments.seed,
        chunk=arguments.chunk,
        progress=not arguments.quiet,
    )
    document = {
        "run": arguments.run.name,
        "preset": config.get("preset"),
        "data": splits.name,
        "source": data_source(arguments, arguments.run, config),
        "checkpoint": BEST if arguments.best else CHECKPOINT,
        "step": step,
        "training": training,
        **found.as_dict(),
        "environment": environment(model.backend.name),
    }
    path = arguments.run / "evaluation.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
    _print_evaluation(found, splits.class_names)
    pictures = arguments.run / "pictures"
    if found.kl_per_dimension:
        plots.kl_per_dimension(pictures / "evaluation_kl.png", np.array(found.kl_per_dimension))
    bounds = {k: (bound.mean, bound.error or 0.0) for k, bound in found.bounds.items()}
    if bounds:
        plots.importance_bounds(pictures / "evaluation_bounds.png", bounds)
    else:
        (pictures / "evaluation_bounds.png").unlink(missing_ok=True)
    print(f"written    {path}, pictures in {pictures}")


def _some_images(splits: Splits, count: int | None) -> Dataset:
    """So many that stand for the test split, or all."""
    if count is None:
        return splits.test
    check_count("--images", count)
    if count > len(splits.test):
        raise InputError(
            f"--images is {count}, expected at most the {len(splits.test)} test images of "
            f"{splits.name}"
        )
    return splits.test.sample(count)


def _print_evaluation(found: Evaluation, names: Sequence[str]) -> None:
    print(f"objective  {found.objective}")
    print(f"data       {found.images:,} test images, binarization {found.binarization}")
    if found.why_no_likelihood:
        print(f"{NO_LIKELIHOOD}: {found.why_no_likelihood}")
    if found.samples:
        print(f"draws      {found.samples:,} of z for each image")
    terms = [
        ("reconstruction + KL" if found.why_no_likelihood else "-ELBO", found.loss),
        ("reconstruction", found.reconstruction),
        ("KL", found.kl),
    ]
    rows = [
        *(terms if found.kl_per_dimension else terms[1:2]),
        *((f"bound, k = {k}", bound) for k, bound in found.bounds.items()),
    ]
    if found.negative_log_likelihood is not None:
        rows.append((f"NLL, k = {found.samples}", found.negative_log_likelihood))
    for name, value in rows:
        print(f"  {name:<19} {value}")
    if found.bits_per_dimension is not None:
        print(f"  {'bits per dimension':<19} {found.bits_per_dimension:.4f}")
    if found.kl_per_dimension:
        mismatch = found.aggregate_posterior["kl_to_prior"]
        if found.active_units is not None:
            print(f"  {'active units':<19} {found.active_units} of {len(found.kl_per_dimension)}")
        largest = sorted(found.kl_per_dimension, reverse=True)
        print(f"  {'KL by dimension':<19} {' '.join(f'{nats:.2f}' for nats in largest)}, sorted")
        print(f"  {'KL of aggregate':<19} {mismatch:.3f} nats to the prior, by a fitted Gaussian")
    classes = called(map(int, found.error_per_class), names)
    for name, error in zip(classes, found.error_per_class.values(), strict=True):
        print(f"  {f'squared error of {name}':<19} {error:.5f} a pixel")
