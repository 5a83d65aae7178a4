"""Commands on what a training left, and what they share with `train` and `evaluate`."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import (
    BEST,
    CHECKPOINT,
    CONFIG,
    METRICS,
    load,
    read_config,
    read_metrics,
    read_training,
)
from ..data import Splits
from ..data import load as load_data
from ..data.dataset import joined
from ..errors import InputError, check_count, unknown
from ..export import EXPORTERS
from ..files import exists, replacing, resolved
from ..models import VAE, Autoencoder
from ..presets import Training
from ..train import check_same_data

NO_LIKELIHOOD = "a loss, not a likelihood"
"""What such a figure is called wherever it is printed."""


def open_run(arguments: argparse.Namespace) -> tuple[Autoencoder, Splits]:
    """The run's model, and the data that was asked for or that it was trained on."""
    config = read_config(arguments.run)
    model = load(arguments.run, arguments.device, best=arguments.best)
    return model, run_data(arguments, config, model)


def run_data(arguments: argparse.Namespace, config: dict[str, Any], model: Autoencoder) -> Splits:
    """The data that was asked for, or that the run was trained on, as it was then."""
    source = data_source(arguments, arguments.run, config)
    splits = load_data(source, seed=config.get("training", {}).get("seed", 0))
    if arguments.data is None:
        check_same_data(arguments.run, splits, ", or --data for others")
    elif model.classes:
        if splits.test.labels is None:
            raise InputError(f"{splits.name} has no labels, and the model is conditional")
        _check_same_classes(arguments.run, splits, config.get("class_names", []))
    return splits


def _check_same_classes(run: Path, splits: Splits, names: list[str]) -> None:
    """Raises InputError where labels mean other classes than those that a conditional model was
    trained with."""
    found = list(splits.class_names)
    if names and found and found != names:
        raise InputError(
            f"{splits.name}: the classes are {', '.join(found)}; expected those of {run}, whose "
            f"model is conditional: {', '.join(names)}"
        )


def _training(folder: Path) -> Training:
    """The run's training; of a saved model the default."""
    return read_training(folder) if "training" in read_config(folder) else Training()


def data_source(arguments: argparse.Namespace, folder: Path, config: dict[str, Any]) -> str:
    """The data that was asked for or that a run was trained on."""
    source: str | None = arguments.data or config.get("source")
    if source is None:
        raise InputError(f"{folder} names no data: give --data")
    return source


def _check_output(arguments: argparse.Namespace) -> None:
    """Raises InputError if the output would replace a file of the run, or of the data."""
    output = resolved(arguments.output)
    run = [resolved(arguments.run / name) for name in (CONFIG, METRICS, CHECKPOINT, BEST)]
    sources = [getattr(arguments, "data", None), read_config(arguments.run).get("source")]
    data = [resolved(Path(source)) for source in sources if source is not None]
    if output in [*run, *data] or ({*output.parents} & {*data} and exists(output)):
        raise InputError(f"-o {arguments.output}: a file of the run or its data, expected another")


def reconstruct(arguments: argparse.Namespace) -> None:
    from ..pictures import draw_reconstructions

    check_count("--count", arguments.count)
    _check_output(arguments)
    model, splits = open_run(arguments)
    training = _training(arguments.run)
    some = splits.test.sample(arguments.count)
    some = some.binarized(training.binarization, training.seed)
    draw_reconstructions(model, some, arguments.output)
    print(arguments.output)


def sample(arguments: argparse.Namespace) -> None:
    from .. import plots

    check_count("--count", arguments.count)
    _check_output(arguments)
    model = load(arguments.run, arguments.device, best=arguments.best)
    if not isinstance(model, VAE):
        raise InputError(f"{arguments.run} is a plain autoencoder: it has no prior to sample from")
    names: list[str] = read_config(arguments.run).get("class_names", [])
    title, label, classes = "Samples from the prior", None, model.classes
    if arguments.label is not None:
        if not model.classes:
            raise InputError(f"{arguments.run} is not conditional: it takes no --label")
        label, classes = _label(arguments, names), 0
        title = f"Samples of class {arguments.label}"
    images = model.sample(arguments.count, seed=arguments.seed, labels=label)
    plots.sample_grid(arguments.output, images, title=title, classes=classes, names=names)
    print(arguments.output)


def _label(arguments: argparse.Namespace, names: list[str]) -> int:
    """The number of the class that --label names or counts."""
    if arguments.label in names:
        return names.index(arguments.label)
    try:
        return int(arguments.label)
    except ValueError:
        raise unknown("class", arguments.label, names or ["a number"]) from None


def encode(arguments: argparse.Namespace) -> None:
    _check_output(arguments)
    model, splits = open_run(arguments)
    training = _training(arguments.run)
    if arguments.split == "all":
        data = joined(splits.train, splits.test)
    else:
        data = getattr(splits, arguments.split)
    data = data.binarized(training.binarization, training.seed)
    code = model.encode(data.images, data.labels)
    if isinstance(model, VAE):
        arrays = dict(zip(("mu", "logvar"), code, strict=True))
    else:
        arrays = {"code": code}
    beside = {"labels": data.labels, "origin": data.origin}
    arrays |= {name: array for name, array in beside.items() if array is not None}
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
    _check_output(arguments)
    model = load(arguments.run, arguments.device, best=arguments.best)
    for path in EXPORTERS[arguments.to](model, arguments.output):
        print(path)
