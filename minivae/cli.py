"""The command line. Heavy modules load inside the commands, so that help answers at once."""

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .errors import InputError, check_count

if TYPE_CHECKING:
    from .backends.reference import ReferenceBackend
    from .data import Dataset, Splits
    from .evaluate import Evaluation
    from .models import Autoencoder
    from .presets import Preset, Training

DEFAULT_PRESET = "glyphs"
BAD_INPUT, NOT_FINITE = 2, 1


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage above them."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _positive_integers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers like 512,256")
    return values


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a name or a path, got nothing")
    return text


def _folder(text: str) -> Path:
    return Path(_name(text))


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of 0 to 2^64 - 1")
    return int(text)


def _parser() -> _Parser:
    parser = _Parser(
        prog="minivae",
        description="Variational autoencoders with every gradient derived by hand.",
    )
    parser.add_argument("--version", action="version", version=f"minivae {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)

    def run_command(name: str, text: str, data: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run", metavar="RUN", type=Path, help="a run folder")
        command.add_argument("--device", default="auto", metavar="NAME", help="default: auto")
        command.add_argument(
            "--best", action="store_true", help="the best checkpoint by validation, not the last"
        )
        if data:
            text = "default: the data of the run"
            command.add_argument("--data", type=_name, metavar="NAME|PATH", help=text)
        return command

    def output(command: argparse.ArgumentParser, default: str | None, text: str) -> None:
        command.add_argument(
            "-o",
            "--output",
            metavar="FILE",
            type=Path,
            default=None if default is None else Path(default),
            required=default is None,
            help=text if default is None else f"{text}; default: {default}",
        )

    reconstruct = run_command("reconstruct", "draw test images above their reconstructions")
    reconstruct.add_argument("--count", type=int, default=10, metavar="N", help="default: 10")
    output(reconstruct, "reconstructions.png", "the picture")
    sample = run_command("sample", "draw samples from the prior", data=False)
    sample.add_argument("--count", type=int, default=25, metavar="N", help="default: 25")
    sample.add_argument(
        "--label", type=int, metavar="N", help="of a conditional model; default: each in turn"
    )
    sample.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    output(sample, "samples.png", "the picture")
    encode = run_command("encode", "write the latent of each image")
    encode.add_argument(
        "--split", choices=("test", "train", "all"), default="test", help="default: test"
    )
    output(encode, None, "an .npz file of mu and logvar (or code) and the labels")
    evaluate = run_command("evaluate", "estimate likelihood and describe the posterior")
    text = "draws for each image; default: 5000; of a loss that is no likelihood at most 100"
    evaluate.add_argument("--samples", type=int, default=5000, metavar="K", help=text)
    evaluate.add_argument("--images", type=int, metavar="N", help="default: the whole test split")
    evaluate.add_argument(
        "--binarization",
        metavar="KIND",
        help="none, threshold or stochastic (static: drawn once); default: that of the run",
    )
    evaluate.add_argument(
        "--chunk", type=int, default=1000, metavar="N", help="default: 1000 draws"
    )
    evaluate.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    evaluate.add_argument("--quiet", action="store_true", help="no progress bar")
    run_command("plot", "draw a run's pictures again")
    export = run_command("export", "write a run's model for another framework", data=False)
    export.add_argument("--to", required=True, choices=("torch", "onnx"), help="the framework")
    output(export, None, "a .safetensors file, or the .onnx file of encoder and decoder")

    gradcheck = commands.add_parser(
        "gradcheck",
        help="compare the hand-derived gradients with central differences",
        description="Compare, layer by layer, the hand-derived gradients with central "
        "differences in float64.",
    )
    gradcheck.add_argument("--preset", metavar="NAME", help="default: every preset")
    gradcheck.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    _add_bench(commands)
    info = commands.add_parser(
        "info",
        help="show versions, devices and presets, or describe a run",
        description="Show versions, devices and presets, or describe a run.",
    )
    info.add_argument("run", metavar="RUN", type=Path, nargs="?", help="a run folder")
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model",
        description="Train a model and leave a run folder with its configuration, metrics, "
        "checkpoint and pictures. Without options: a dense VAE on embedded digits. "
        "What is not given comes from the preset.",
    )

    def option(group: Any, name: str, kind: Any, metavar: str, text: str) -> None:
        group.add_argument(name, type=kind, metavar=metavar, help=text)

    source = train.add_argument_group("model and data")
    option(source, "--preset", str, "NAME", f"default: {DEFAULT_PRESET}; see minivae info")
    option(
        source,
        "--data",
        _name,
        "NAME|PATH",
        "glyphs, mnist, fashion-mnist, or a path: IDX files, .npy, .npz, a folder of images",
    )
    option(source, "--latent", int, "N", "latent dimensions")
    option(source, "--hidden", _positive_integers, "N,N", "units of the dense hidden layers")
    option(source, "--k", int, "N", "draws of z for each image, for the iwae-paper presets")
    option(
        *(source, "--likelihood", str, "KIND"),
        "bernoulli, squared-error, gaussian, or calibrated-gaussian, whose sigma is found",
    )
    option(source, "--sigma", float, "X", "likelihood gaussian: its standard deviation")
    option(source, "--beta", float, "X", "weight of the KL")
    option(source, "--beta-warmup", int, "STEPS", "beta rises linearly from 0 over these steps")
    option(source, "--free-bits", float, "NATS", "KL below this is free, for each dimension")
    option(source, "--capacity", float, "NATS", "beta weighs the KL's distance from this")
    option(source, "--capacity-steps", int, "STEPS", "the capacity rises linearly over these steps")
    source.add_argument(
        "--conditional",
        action="store_const",
        const=True,
        help="the images' labels join encoder and decoder",
    )
    option(
        *(source, "--binarization", str, "KIND"),
        "none, threshold or stochastic (dynamic: drawn anew in each epoch)",
    )
    loop = train.add_argument_group("training")
    option(loop, "--images", int, "N", "only the first N training images; 0: all")
    option(loop, "--epochs", int, "N", "passes over the training data")
    option(loop, "--steps", int, "N", "end after this many steps instead")
    option(loop, "--batch-size", int, "N", "images in a step")
    option(loop, "--accumulate", int, "N", "a batch in N parts, one after another, to save memory")
    option(loop, "--lr", float, "X", "learning rate; of the iwae-paper presets the last of eight")
    option(loop, "--weight-decay", float, "X", "AdamW's decoupled weight decay")
    loop.add_argument(
        "--schedule",
        choices=("constant", "step", "cosine"),
        metavar="KIND",
        help="constant, step or cosine",
    )
    option(loop, "--warmup", int, "STEPS", "the learning rate rises linearly over these steps")
    option(loop, "--step-every", int, "STEPS", "schedule step: steps between two falls")
    option(loop, "--gamma", float, "X", "schedule step: factor of each fall")
    option(loop, "--clip-norm", float, "X", "bound the gradient's global norm")
    option(loop, "--seed", _seed, "N", "of weights, noise and order")
    option(loop, "--patience", int, "EPOCHS", "stop when validation has not improved for these")
    option(loop, "--validation", int, "N", "hold out the last N training images, keep the best")
    loop.add_argument(
        "--keep-last",
        action="store_const",
        const=True,
        help="train on the last partial batch of an epoch too",
    )
    run = train.add_argument_group("run")
    run.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, numba_cuda or emulated; default: auto",
    )
    run.add_argument(
        "--precision",
        metavar="NAME",
        help="fp32 or, on a GPU, tf32; default: fp32, or that of the run",
    )
    option(
        *(run, "--out", _folder, "FOLDER"),
        "the run folder; default: runs/PRESET, or runs/DATA where only that is given, numbered",
    )
    option(run, "--resume", _folder, "RUN", "go on with a run that was stopped")
    run.add_argument("--best", action="store_true", help="resume from the best checkpoint")
    option(run, "--log-every", int, "STEPS", "metrics every so many steps as well")
    option(run, "--picture-every", int, "STEPS", "a picture of samples or reconstructions")
    option(run, "--checkpoint-every", int, "STEPS", "checkpoints between epochs as well")
    run.add_argument("--tensorboard", action="store_true", help="log to TensorBoard as well")
    run.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="time minivae beside PyTorch and JAX",
        description="Time training steps, primitives, scaling and whole runs beside PyTorch and "
        "JAX (the extra peers), and write one result file.",
    )
    bench.add_argument(
        "sections",
        metavar="SECTION",
        nargs="*",
        help="steps, primitives, scaling, end-to-end, start-up; default: steps and primitives",
    )
    bench.add_argument("--device", default="cpu", metavar="NAME", help="default: cpu")
    bench.add_argument(
        "--data", default="mnist", metavar="NAME|PATH", help="for end-to-end and start-up"
    )
    bench.add_argument("--quick", action="store_true", help="a rehearsal at tiny sizes")
    bench.add_argument(
        "--resume", action="store_true", help="go on with FILE, where a run was cut short"
    )
    bench.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="PEER",
        help="leave a peer out of the steps, such as 'torch compile-max-autotune', which compiles "
        "for minutes",
    )
    bench.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("OLD", "NEW"),
        help="instead: fail where the lead over the fastest peer shrank between two result files",
    )
    bench.add_argument(
        "-o", "--output", metavar="FILE", type=Path, default=Path("bench.json"), help="the result"
    )


NO_LIKELIHOOD = "a loss, not a likelihood"

LESS_MEMORY = {
    "train": "a smaller model or --batch-size, or --accumulate",
    "evaluate": "a smaller --chunk",
}
"""What helps a command that ran out of it."""

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


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}


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


def _training(training: "Training", arguments: argparse.Namespace) -> "Training":
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


def _refuse_idle(arguments: argparse.Namespace, model: "Autoencoder", training: "Training") -> None:
    """Raises InputError for an option that would change nothing."""
    objective, optimizer = model.objective, training.optimizer
    of_the_kl = ("beta", "beta_warmup", "free_bits", "capacity", "capacity_steps")
    of_steps = ("step_every", "gamma")
    for names, effective, expected in (
        (of_the_kl, model.latent > 0, "a VAE, since a plain autoencoder has no KL"),
        (("sigma",), objective.likelihood == "gaussian", "--likelihood gaussian"),
        (("capacity_steps",), objective.capacity > 0, "--capacity"),
        (of_steps, optimizer.schedule == "step", "--schedule step"),
        (("k",), objective.by_draws, "one of the presets iwae-paper-*"),
    ):
        for name in _given(arguments, names):
            if not effective:
                raise InputError(f"{_option(name)} changes nothing here: it is for {expected}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _model(
    preset: "Preset", arguments: argparse.Namespace, image_shape: tuple[int, ...], classes: int
) -> "Autoencoder":
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
        given["samples"] = arguments.k
    return preset.model(image_shape, **given)


def _load_data(name: str, seed: int) -> "Splits":
    from .data import load

    return load(name, seed=seed)


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


def _train(arguments: argparse.Namespace) -> None:
    from .data import lasting_name
    from .presets import preset as find_preset

    if arguments.resume is not None:
        _resume(arguments)
        return
    if arguments.best:
        raise InputError("--best changes nothing here: it is for --resume")
    name = arguments.preset or DEFAULT_PRESET
    preset = find_preset(name)
    training = _training(preset.training, arguments)
    source = arguments.data or preset.data
    splits = _load_data(source, training.seed)
    if arguments.conditional:
        _check_classes(splits)
    model = _model(preset, arguments, splits.train.image_shape, splits.train.classes)
    _refuse_idle(arguments, model, training)
    arguments.precision = arguments.precision or "fp32"
    extra = {"preset": name, "source": lasting_name(source), "precision": arguments.precision}
    if arguments.out is not None and arguments.out.absolute() == Path(extra["source"]):
        raise InputError(f"--out {arguments.out}: expected another folder than that of the data")
    folder = arguments.out or _new_folder(arguments.preset or Path(splits.name).stem or "data")
    try:
        _run_training(model, splits, training, folder, False, extra, arguments)
    except BaseException:
        if arguments.out is None:
            with contextlib.suppress(OSError):
                folder.rmdir()  # which takes no folder with anything in it
        raise


def _check_classes(splits: "Splits") -> None:
    if splits.train.labels is None:
        raise InputError(f"--conditional: {splits.name} has no labels")
    if splits.train.classes > len(splits.train):
        raise InputError(
            f"--conditional: the labels of {splits.name} reach {splits.train.classes - 1}, "
            f"expected numbers below that of the {len(splits.train)} training images, from 0 on"
        )


def _resume(arguments: argparse.Namespace) -> None:
    from .checkpoint import read_config, read_model, read_training
    from .data import lasting_name
    from .presets import preset as find_preset

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
                f"--resume {folder}: the run trains another model than {options} asks; give all of "
                "its model's options, or none"
            )
    training = _training(training, arguments)
    source = _source(arguments, folder, config)
    splits = _load_data(source, training.seed)
    extra = {"source": lasting_name(source), "precision": arguments.precision}
    _run_training(model, splits, training, folder, True, extra, arguments)


def _run_training(
    model: "Autoencoder",
    splits: "Splits",
    training: "Training",
    folder: Path,
    resume: bool,
    extra_config: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    from .checkpoint import METRICS
    from .environment import environment
    from .train import fit, read_metrics

    model.to(_device(arguments))
    if not resume:
        extra_config = {**extra_config, "environment": environment(model.backend.name)}
    before = read_metrics(folder / METRICS) if resume else []
    _print_run(model, splits, training, folder)
    board = _tensorboard(folder) if arguments.tensorboard else None

    def on_step(step: int, model: "Autoencoder") -> None:
        from .pictures import draw_progress

        path = folder / "pictures" / f"step_{step:06d}.png"
        draw_progress(model, splits, path, step)
        if board is not None:
            board.picture(path, step)

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
        print(f"finished   before: more --epochs or --steps{patience} go on")
    _report_run(model, splits, training, metrics, folder)
    if board is not None:
        board.close()


def _print_run(model: "Autoencoder", splits: "Splits", training: "Training", folder: Path) -> None:
    from .evaluate import why_no_likelihood

    print(f"model      {model.parameters.count:,} parameters on {model.backend.name}")
    print(
        f"data       {splits.name}: {len(splits.train):,} train, {len(splits.test):,} test images"
    )
    print(f"objective  {model.describe(model.objective)}; binarization {training.binarization}")
    reason = why_no_likelihood(model, splits.test.images, training.binarization)
    if reason:
        print(f"           {NO_LIKELIHOOD}: {reason}")
    print(f"run        {folder}", flush=True)


def _report_run(
    model: "Autoencoder",
    splits: "Splits",
    training: "Training",
    metrics: list[dict[str, Any]],
    folder: Path,
) -> None:
    """The last test's figures, and the pictures."""
    tested = [record for record in metrics if "test" in record]
    if not tested:
        raise InputError(f"{folder} has not been tested yet: --resume it with more --steps")
    last = tested[-1]
    for split in (name for name in ("train", "validation", "test") if name in last):
        values = "  ".join(f"{name} {value:.2f}" for name, value in last[split].items())
        print(f"{split:<10} {values}")
    from .pictures import draw_run  # only now: matplotlib takes as long to load as many steps

    paths = draw_run(model, splits, training, metrics, folder / "pictures")
    print(f"pictures   {len(paths)} in {folder / 'pictures'}")


def _device(arguments: argparse.Namespace) -> "ReferenceBackend":
    """The backend that was asked for; for "auto", with a line on each better one that fails."""
    from . import backends

    if arguments.device != "auto":
        return backends.get(arguments.device, arguments.precision)
    backend, reasons = backends.choose(arguments.precision)
    for reason in reasons:
        print(f"no GPU     {reason}")
    return backend


def _tensorboard(folder: Path) -> Any:
    from .tensorboard import TensorBoard

    return TensorBoard(folder / "tensorboard")


def _open_run(arguments: argparse.Namespace) -> tuple["Autoencoder", "Splits"]:
    """The run's model, and the data that was asked for or that it was trained on."""
    from .checkpoint import load, read_config

    config = read_config(arguments.run)
    model = load(arguments.run, arguments.device, best=arguments.best)
    return model, _run_data(arguments, config)


def _run_data(arguments: argparse.Namespace, config: dict[str, Any]) -> "Splits":
    """The data that was asked for, or that the run was trained on, as it was then."""
    from .train import check_same_data

    source = _source(arguments, arguments.run, config)
    splits = _load_data(source, config.get("training", {}).get("seed", 0))
    if arguments.data is None:
        check_same_data(arguments.run, splits, ", or --data for others")
    return splits


def _run_training_settings(folder: Path) -> "Training":
    """The run's training; of a saved model the default."""
    from .checkpoint import read_config, read_training
    from .presets import Training

    return read_training(folder) if "training" in read_config(folder) else Training()


def _source(arguments: argparse.Namespace, folder: Path, config: dict[str, Any]) -> str:
    """The data that was asked for or that a run was trained on."""
    source: str | None = arguments.data or config.get("source")
    if source is None:
        raise InputError(f"{folder} names no data: give --data")
    return source


def _reconstruct(arguments: argparse.Namespace) -> None:
    from .pictures import draw_reconstructions

    check_count("--count", arguments.count)
    model, splits = _open_run(arguments)
    training = _run_training_settings(arguments.run)
    some = splits.test.take(slice(arguments.count))
    some = some.binarized(training.binarization, training.seed)
    draw_reconstructions(model, some, arguments.output)
    print(arguments.output)


def _sample(arguments: argparse.Namespace) -> None:
    from . import plots
    from .checkpoint import load
    from .models import VAE

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


def _encode(arguments: argparse.Namespace) -> None:
    import numpy as np

    from .files import replacing
    from .models import VAE

    model, splits = _open_run(arguments)
    names = ("train", "test") if arguments.split == "all" else (arguments.split,)
    parts = [getattr(splits, name) for name in names]
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


def _evaluate(arguments: argparse.Namespace) -> None:
    import json

    import numpy as np

    from . import plots
    from .checkpoint import BEST, CHECKPOINT, load_at_step, read_config
    from .environment import environment
    from .evaluate import evaluate
    from .files import replacing

    config = read_config(arguments.run)
    training = config.get("training", {})
    model, step = load_at_step(arguments.run, arguments.device, best=arguments.best)
    splits = _run_data(arguments, config)
    found = evaluate(
        model,
        _first_images(splits, arguments.images),
        samples=arguments.samples,
        binarization=arguments.binarization or training.get("binarization", "none"),
        seed=arguments.seed,
        chunk=arguments.chunk,
        progress=not arguments.quiet,
    )
    _print_evaluation(found)
    document = {
        "run": arguments.run.name,
        "preset": config.get("preset"),
        "data": splits.name,
        "source": _source(arguments, arguments.run, config),
        "checkpoint": BEST if arguments.best else CHECKPOINT,
        "step": step,
        "training": training,
        **found.as_dict(),
        "environment": environment(model.backend.name),
    }
    path = arguments.run / "evaluation.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
    pictures = arguments.run / "pictures"
    if found.kl_per_dimension:
        plots.kl_per_dimension(pictures / "evaluation_kl.png", np.array(found.kl_per_dimension))
    bounds = {k: (bound.mean, bound.error or 0.0) for k, bound in found.bounds.items()}
    if bounds:
        plots.importance_bounds(pictures / "evaluation_bounds.png", bounds)
    else:
        (pictures / "evaluation_bounds.png").unlink(missing_ok=True)
    print(f"written    {path}, pictures in {pictures}")


def _first_images(splits: "Splits", count: int | None) -> "Dataset":
    """So many of the test split, or all."""
    if count is None:
        return splits.test
    check_count("--images", count)
    if count > len(splits.test):
        raise InputError(
            f"--images is {count}, expected at most the {len(splits.test)} test images of "
            f"{splits.name}"
        )
    return splits.test.take(slice(count))


def _print_evaluation(found: "Evaluation") -> None:
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
    for name, estimate in rows:
        print(f"  {name:<19} {estimate}")
    if found.bits_per_dimension is not None:
        print(f"  {'bits per dimension':<19} {found.bits_per_dimension:.4f}")
    if found.kl_per_dimension:
        mismatch = found.aggregate_posterior["kl_to_prior"]
        if found.active_units is not None:
            print(f"  {'active units':<19} {found.active_units} of {len(found.kl_per_dimension)}")
        largest = sorted(found.kl_per_dimension, reverse=True)
        print(f"  {'KL by dimension':<19} {' '.join(f'{nats:.2f}' for nats in largest)}, sorted")
        print(f"  {'KL of aggregate':<19} {mismatch:.3f} nats to the prior, as one normal")
    for label, error in found.error_per_class.items():
        print(f"  squared error of {label:<2} {error:.5f} a pixel")


def _plot(arguments: argparse.Namespace) -> None:
    from .checkpoint import METRICS
    from .pictures import draw_run
    from .train import read_metrics

    model, splits = _open_run(arguments)
    metrics = read_metrics(arguments.run / METRICS)
    training = _run_training_settings(arguments.run)
    for path in draw_run(model, splits, training, metrics, arguments.run / "pictures"):
        print(path)


def _export(arguments: argparse.Namespace) -> None:
    from . import export
    from .checkpoint import load

    model = load(arguments.run, arguments.device, best=arguments.best)
    for path in export.EXPORTERS[arguments.to](model, arguments.output):
        print(path)


def _gradcheck(arguments: argparse.Namespace) -> None:
    from .gradcheck import ENTRIES, TOLERANCE, check_gradients
    from .presets import PRESETS, preset

    names = list(PRESETS) if arguments.preset is None else [arguments.preset]
    wrong = []
    for name in names:
        print(f"{name}: {preset(name).summary}; largest errors of {ENTRIES} entries each")
        for tensor in check_gradients(preset(name).model(), arguments.seed):
            right = tensor.error < TOLERANCE
            if not right:
                wrong.append(f"{name} {tensor.name}")
            print(
                f"  {tensor.name:<18} {tensor.layer:<17} {tensor.error:9.1e}"
                f"  {'ok' if right else 'WRONG'}"
            )
    if wrong:
        raise SystemExit(f"gradients differ from central differences in {', '.join(wrong)}")


def _info(arguments: argparse.Namespace) -> None:
    if arguments.run is not None:
        _describe_run(arguments.run)
        return
    import platform

    import numpy as np

    from . import backends
    from .presets import PRESETS

    print(f"minivae {__version__}, Python {platform.python_version()}, NumPy {np.__version__}")
    print("devices")
    for name, status in backends.available().items():
        print(f"  {name:<12} {status}")
    print("presets")
    for name, preset in PRESETS.items():
        print(f"  {name:<16} {preset.summary} ({preset.data})")


def _describe_run(folder: Path) -> None:
    from .checkpoint import METRICS, load, read_config
    from .network import Network
    from .train import read_metrics

    config = read_config(folder)
    model = load(folder, "cpu")
    print(f"{folder}: {config.get('preset', model.kind)} on {config.get('data', 'no data named')}")
    print(f"objective  {model.describe(model.objective)}")

    def describe(network: Network) -> None:
        print(f"{network.name:<10} {'x'.join(map(str, network.input_shape))}")
        for index, layer in enumerate(network.layers):
            shape = "x".join(map(str, network.shapes[index + 1]))
            print(f"  {index:<3} {layer.kind:<17} {shape}")

    describe(model.encoder)
    describe(model.decoder)
    print(f"parameters {model.parameters.count:,}")
    epochs = [record for record in read_metrics(folder / METRICS) if "epoch" in record]
    if epochs:
        last = epochs[-1]
        print(f"epoch {last['epoch']}    test loss {last['test']['loss']:.2f}")


def _bench(arguments: argparse.Namespace) -> None:
    from minivae.benchmarks.run import compare, run_suite

    if arguments.compare is not None:
        slower = compare(*arguments.compare)
        if slower:
            raise SystemExit("\n".join(slower))
        return
    sections = arguments.sections or ["steps", "primitives"]
    options = {name: getattr(arguments, name) for name in ("quick", "data", "resume", "without")}
    try:
        run_suite(arguments.device, sections, arguments.output, **options)
    except RuntimeError as error:  # of a case that failed, when all others are measured
        raise SystemExit(f"minivae: error: {error}") from None


COMMANDS = {
    "train": _train,
    "reconstruct": _reconstruct,
    "sample": _sample,
    "encode": _encode,
    "evaluate": _evaluate,
    "plot": _plot,
    "export": _export,
    "gradcheck": _gradcheck,
    "bench": _bench,
    "info": _info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        parsed = _parser().parse_args(arguments)
        COMMANDS[parsed.command](parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads what the interpreter would flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except InputError as error:
        print(f"minivae: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except MemoryError:
        less = LESS_MEMORY.get(parsed.command)
        hint = f"; {less}, needs less" if less else ""
        print(f"minivae: error: out of memory{hint}", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:
        return _report(error)
    except KeyboardInterrupt as interrupt:
        print(f"minivae: {str(interrupt) or 'stopped'}", file=sys.stderr)
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    return 0


def _report(error: Exception) -> int:
    from .train import NotFiniteError

    if not isinstance(error, NotFiniteError):
        raise error
    print(f"minivae: error: {error}", file=sys.stderr)
    return NOT_FINITE
