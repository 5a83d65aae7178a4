"""minivae train: from what is given, over a preset or a stopped run, to a run folder."""

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import backends
from ..backends.reference import ReferenceBackend
from ..checkpoint import METRICS, best_epoch, read_config, read_metrics, read_model, read_training
from ..data import Splits, lasting_name
from ..data import load as load_data
from ..environment import environment
from ..errors import InputError, check_count
from ..evaluate import why_no_likelihood
from ..files import resolved
from ..models import Autoencoder
from ..presets import Preset, Training
from ..presets import preset as find_preset
from ..tensorboard import TensorBoard
from ..train import fit
from .arguments import DEFAULT_PRESET
from .runs import NO_LIKELIHOOD, data_source

MODEL_OPTIONS = ("latent", "hidden", "beta")
OBJECTIVE_OPTIONS = {
    "likelihood": "likelihood",
    "sigma": "sigma",
    "beta_warmup": "beta_warmup_steps",
    "free_bits": "free_bits",
    "capacity": "capacity",
    "capacity_steps": "capacity_steps",
}
OPTIMIZER_OPTIONS = {
    "lr": "lr",
    "weight_decay": "weight_decay",
    "schedule": "schedule",
    "warmup": "warmup_steps",
    "step_every": "step_every",
    "gamma": "gamma",
    "clip_norm": "clip_norm",
}
TRAINING_OPTIONS = (
    *(
        "images",
        "epochs",
        "steps",
        "batch_size",
        "accumulate",
        "binarization",
        "seed",
        "patience",
        "keep_last",
        "validation",
    ),
    *("log_every", "picture_every", "checkpoint_every"),
)


def train(arguments: argparse.Namespace) -> None:
    if arguments.resume is not None:
        _resume(arguments)
        return
    if arguments.best:
        raise InputError("--best changes nothing here: it is for --resume")
    name = arguments.preset or DEFAULT_PRESET
    preset = find_preset(name)
    training = _training(preset.training, arguments)
    # With MNIST's shape: what the preset has no use for is told before data are downloaded.
    _refuse_idle(arguments, _model(preset, arguments, (28, 28, 1), classes=1), training)
    source = arguments.data or preset.data
    splits = load_data(source, seed=training.seed)
    if arguments.conditional:
        _check_classes(splits, training.images)
    model = _model(preset, arguments, splits.train.image_shape, splits.classes)
    arguments.precision = arguments.precision or "fp32"
    extra = {"preset": name, "source": lasting_name(source), "precision": arguments.precision}
    if arguments.out is not None and resolved(arguments.out) == resolved(Path(extra["source"])):
        raise InputError(f"--out {arguments.out}: expected another folder than that of the data")
    folder = arguments.out or _new_folder(arguments.preset or Path(splits.name).stem or "data")
    try:
        _run_training(model, splits, training, folder, extra, arguments)
    except BaseException:
        if arguments.out is None:
            with contextlib.suppress(OSError):
                folder.rmdir()  # which takes no folder with anything in it
        raise


def _check_classes(splits: Splits, images: int) -> None:
    """Of the first so many training images, or all (0)."""
    if splits.train.labels is None:
        raise InputError(f"--conditional: {splits.name} has no labels")
    if splits.classes > len(splits.train):
        raise InputError(
            f"--conditional: the labels of {splits.name} reach {splits.classes - 1}, "
            f"expected 0, 1, 2, ..., no more classes than the {len(splits.train)} training images"
        )
    untrained = np.setdiff1d(np.arange(splits.classes), splits.train.labels[: images or None])
    if len(untrained):
        shown = ", ".join(map(str, untrained[:5])) + (", ..." if len(untrained) > 5 else "")
        print(f"warning    no training image has the label {shown}: samples of it mean nothing")


def _resume(arguments: argparse.Namespace) -> None:
    folder = arguments.resume
    if arguments.out is not None:
        raise InputError("--out and --resume exclude each other: a resumed run stays in its folder")
    config = read_config(folder)
    model, training = read_model(folder), read_training(folder)
    arguments.precision = arguments.precision or config.get("precision", "fp32")
    names = ("preset", "k", "conditional", *MODEL_OPTIONS, *OBJECTIVE_OPTIONS)
    given = _given(arguments, names)
    if given:
        name = arguments.preset or config.get("preset")
        if name is None:
            raise InputError(f"{folder} names no preset: give --preset, or no option of the model")
        preset = find_preset(name)
        # A run without classes is not what --conditional asks for, of however many.
        other = _model(preset, arguments, model.image_shape, model.classes or 1).config()
        if {**other, "seed": model.seed} != model.config():
            options = ", ".join(_option(name) for name in given)
            raise InputError(
                f"--resume {folder}: {options} would make another model than the run's; give all "
                "of its model options, or none"
            )
    training = _training(training, arguments)
    source = data_source(arguments, folder, config)
    splits = load_data(source, seed=training.seed)
    extra = {"source": lasting_name(source), "precision": arguments.precision}
    _run_training(model, splits, training, folder, extra, arguments)


def _run_training(
    model: Autoencoder,
    splits: Splits,
    training: Training,
    folder: Path,
    extra_config: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    resume = arguments.resume is not None
    model.to(_device(arguments))
    if not resume:
        extra_config = {**extra_config, "environment": environment(model.backend.name)}
    before = read_metrics(folder / METRICS) if resume else []
    _print_run(model, splits, training, folder)
    board = TensorBoard(folder / "tensorboard") if arguments.tensorboard else None

    def on_step(step: int, model: Autoencoder) -> None:
        from ..pictures import draw_progress

        path = folder / "pictures" / f"step_{step:06d}.png"
        draw_progress(model, splits, training, path, step)
        if board is not None:
            board.picture(path, step)

    with contextlib.closing(board) if board else contextlib.nullcontext():
        metrics = fit(
            model,
            splits,
            training,
            out=folder,
            resume=resume,
            best=arguments.best,
            progress=not arguments.quiet,
            on_step=on_step,
            on_metrics=None if board is None else board.record,
            extra_config=extra_config,
        )
    if metrics == before:
        patience = ", or a larger --patience," if training.patience else ""
        print(f"finished   already: give more --epochs or --steps{patience} to go on")
    _report_run(model, splits, training, metrics, folder)


def _device(arguments: argparse.Namespace) -> ReferenceBackend:
    """The backend that was asked for; for "auto", with a line on each better one that fails."""
    if arguments.device != "auto":
        return backends.get(arguments.device, arguments.precision)
    backend, reasons = backends.choose(arguments.precision)
    for reason in reasons:
        print(f"no GPU     {reason}")
    return backend


def _print_run(model: Autoencoder, splits: Splits, training: Training, folder: Path) -> None:
    print(f"model      {model.parameters.count:,} parameters on {model.backend.name}")
    print(
        f"data       {splits.name}: {len(splits.train):,} train, {len(splits.test):,} test images"
    )
    if splits.class_names:
        named = ", ".join(f"{label} {name}" for label, name in enumerate(splits.class_names))
        print(f"classes    {named}")
    print(f"objective  {model.describe(model.objective)}; binarization {training.binarization}")
    reason = why_no_likelihood(model, splits.test.images, training.binarization)
    if reason:
        print(f"           {NO_LIKELIHOOD}: {reason}")
    print(f"run        {folder}", flush=True)


def _report_run(
    model: Autoencoder,
    splits: Splits,
    training: Training,
    metrics: list[dict[str, Any]],
    folder: Path,
) -> None:
    """The last test's figures, and the pictures."""
    tested = [record for record in metrics if "test" in record]
    if not tested:
        raise InputError(f"{folder} has not been tested yet: --resume it with more --steps")
    last, best = tested[-1], best_epoch(metrics)
    if training.patience and best and last["epoch"] - best["epoch"] >= training.patience:
        print(f"stopped    after epoch {last['epoch']}: no better one since epoch {best['epoch']}")
    for split in (name for name in ("train", "validation", "test") if name in last):
        values = "  ".join(f"{name} {value:.2f}" for name, value in last[split].items())
        print(f"{split:<10} {values}")
    if best:
        loss = best["validation"]["loss"]
        print(f"best       epoch {best['epoch']}, validation loss {loss:.2f}: used with --best")
    from ..pictures import draw_run  # only now: matplotlib takes as long to load as many steps

    paths = draw_run(model, splits, training, metrics, folder / "pictures")
    print(f"pictures   {len(paths)} in {folder / 'pictures'}")


def _new_folder(name: str) -> Path:
    """A folder that is made here and now, so that no run that starts at the same time has it."""
    number = 1
    while True:
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise InputError(f"cannot make {folder}: {error.strerror}") from None


def _model(
    preset: Preset, arguments: argparse.Namespace, image_shape: tuple[int, ...], classes: int
) -> Autoencoder:
    """The model that the options ask for; a conditional one for labels of `classes`."""
    objective = {
        OBJECTIVE_OPTIONS[name]: value
        for name, value in _given(arguments, tuple(OBJECTIVE_OPTIONS)).items()
    }
    preset = dataclasses.replace(
        preset, objective=dataclasses.replace(preset.objective, **objective)
    )
    given = _given(arguments, (*MODEL_OPTIONS, "seed"))
    if arguments.conditional:
        given["classes"] = classes
    if arguments.k is not None:
        check_count("--k", arguments.k)
        if not preset.objective.by_draws:
            raise InputError("--k changes nothing here: it is for one of the presets iwae-paper-*")
        given["samples"] = arguments.k
    return preset.model(image_shape, **given)


def _training(training: Training, arguments: argparse.Namespace) -> Training:
    """The training with what is given instead."""
    optimizer = {
        OPTIMIZER_OPTIONS[name]: value
        for name, value in _given(arguments, tuple(OPTIMIZER_OPTIONS)).items()
    }
    if optimizer.get("schedule", "pieces") != "pieces":
        optimizer["pieces"] = ()
    return dataclasses.replace(
        training,
        optimizer=dataclasses.replace(training.optimizer, **optimizer),
        **_given_training(arguments),
    )


def _given_training(arguments: argparse.Namespace) -> dict[str, Any]:
    given = _given(arguments, TRAINING_OPTIONS)
    if "steps" in given:
        check_count("--steps", given["steps"])
        if "epochs" in given:
            raise InputError("--epochs and --steps exclude each other: both say when to end")
    elif "epochs" in given:
        # A preset that counts steps then counts epochs.
        given["steps"] = 0
    return given


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}


def _refuse_idle(arguments: argparse.Namespace, model: Autoencoder, training: Training) -> None:
    """Raises InputError for an option that would change nothing."""
    objective, optimizer = model.objective, training.optimizer
    of_the_kl = ("beta", "beta_warmup", "free_bits", "capacity", "capacity_steps")
    of_steps = ("step_every", "gamma")
    for names, effective, expected in (
        (of_the_kl, model.latent > 0, "a VAE, since a plain autoencoder has no KL"),
        (("sigma",), objective.likelihood == "gaussian", "--likelihood gaussian"),
        (("capacity_steps",), objective.capacity > 0, "--capacity"),
        (of_steps, optimizer.schedule == "step", "--schedule step"),
    ):
        for name in _given(arguments, names):
            if not effective:
                raise InputError(f"{_option(name)} changes nothing here: it is for {expected}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
