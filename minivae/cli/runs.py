"""Commands on what a training left, and what they share with `train` and `evaluate`."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import METRICS, load, read_config, read_training
from ..data import Splits
from ..data import load as load_data
from ..errors import InputError, check_count
from ..export import EXPORTERS
from ..files import replacing
from ..models import VAE, Autoencoder
from ..presets import Training
from ..train import check_same_data, read_metrics

NO_LIKELIHOOD = "a loss, not a likelihood"
"""What such a figure is called wherever it is printed."""


def open_run(arguments: argparse.Namespace) -> tuple[Autoencoder, Splits]:
    """The run's model, and the data that was asked for or that it was trained on."""
    config = read_config(arguments.run)
    model = load(arguments.run, arguments.device, best=arguments.best)
    return model, run_data(arguments, config)


def run_data(arguments: argparse.Namespace, config: dict[str, Any]) -> Splits:
    """The data that was asked for, or that the run was trained on, as it was then."""
    source = data_source(arguments, arguments.run, config)
    splits = load_data(source, seed=config.get("training", {}).get("seed", 0))
    if arguments.data is None:
        check_same_data(arguments.run, splits, ", or --data for others")
    return splits


def _training(folder: Path) -> Training:
    """The run's training; of a saved model the default."""
    return read_training(folder) if "training" in read_config(folder) else Training()


def data_source(arguments: argparse.Namespace, folder: Path, config: dict[str, Any]) -> str:
    """The data that was asked for or that a run was trained on."""
    source: str | None = arguments.data or config.get("source")
    if source is None:
        raise InputError(f"{folder} names no data: give --data")
    return source


def reconstruct(arguments: argparse.Namespace) -> None:
    from ..pictures import draw_reconstructions

    check_count("--count", arguments.count)
    model, splits = open_run(arguments)
    training = _training(arguments.run)
    some = splits.test.take(slice(arguments.count))
    some = some.binarized(training.binarization, training.seed)
    draw_reconstructions(model, some, arguments.output)
    print(arguments.output)


def sample(arguments: argparse.Namespace) -> None:
    from .. import plots

    check_count("--count", arguments.count)
    model = load(arguments.run, arguments.device, best=arguments.best)
    if not isinstance(model, VAE):
        raise InputError(f"{arguments.run} is a plain autoencoder: it has no prior to sample from")
    title = "Samples from the prior"
    if arguments.label is not None:
        if not model.classes:
            raise InputError(f"{arguments.run} is not conditional: it takes no --label")
        title = f"Samples of class {arguments.label}"
    images = model.sample(arguments.count, seed=arguments.seed, labels=arguments.label)
    plots.sample_grid(arguments.output, images, title=title)
    print(arguments.output)


def encode(arguments: argparse.Namespace) -> None:
    model, splits = open_run(arguments)
    training = _training(arguments.run)
    names = ("train", "test") if arguments.split == "all" else (arguments.split,)
    parts = [
        getattr(splits, name).binarized(training.binarization, training.seed) for name in names
    ]
    labels = None
    if all(part.labels is not None for part in parts):
        labels = np.concatenate([part.labels for part in parts])
    code = model.encode(np.concatenate([part.images for part in parts]), labels)
    if isinstance(model, VAE):
        arrays = dict(zip(("mu", "logvar"), code, strict=True))
    else:
        arrays = {"code": code}
    if labels is not None:
        arrays["labels"] = labels
    with replacing(arguments.output) as path, open(path, "wb") as file:
        np.savez(file, **arrays)
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    print(f"{arguments.output}: {shapes}")


def plot(arguments: argparse.Namespace) -> None:
    from ..pictures import draw_run

    model, splits = open_run(arguments)
    metrics = read_metrics(arguments.run / METRICS)
    training = _training(arguments.run)
    for path in draw_run(model, splits, training, metrics, arguments.run / "pictures"):
        print(path)


def export(arguments: argparse.Namespace) -> None:
    model = load(arguments.run, arguments.device, best=arguments.best)
    for path in EXPORTERS[arguments.to](model, arguments.output):
        print(path)
