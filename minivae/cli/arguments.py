"""What the commands take."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..errors import InputError

DEFAULT_PRESET = "glyphs"


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
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive integers like 512,256")
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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command and its options; InputError on others."""
    parsed, others = parser().parse_known_args(arguments)
    if others:
        # argparse would name the help of minivae itself, which lists no command's options.
        raise InputError(
            f"unrecognized arguments: {' '.join(others)} (see minivae {parsed.command} --help)"
        )
    return parsed


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = _Parser(
        prog="minivae",
        description="Variational autoencoders with every gradient derived by hand.",
    )
    parser.add_argument("--version", action="version", version=f"minivae {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_run_commands(commands)
    _add_tools(commands)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model",
        description="Train a model and leave a run folder with its configuration, metrics, "
        "checkpoint and pictures. Without options: a dense VAE on embedded digits. "
        "What is not given comes from the preset.",
    )

    _add_model_options(train.add_argument_group("model and data"))
    _add_loop_options(train.add_argument_group("training"))
    _add_run_options(train.add_argument_group("run"))


def _option(group: Any, name: str, kind: Any, metavar: str, text: str) -> None:
    group.add_argument(name, type=kind, metavar=metavar, help=text)


def _add_model_options(group: Any) -> None:
    text = f"a model with its training, listed by minivae info; default: {DEFAULT_PRESET}"
    _option(group, "--preset", str, "NAME", text)
    _option(
        group,
        "--data",
        _name,
        "NAME|PATH",
        "glyphs, mnist, fashion-mnist, or a path: IDX files, .npy, .npz, a folder of images",
    )
    _option(group, "--latent", int, "N", "latent dimensions")
    _option(group, "--hidden", _positive_integers, "N,N", "units of the dense hidden layers")
    _option(group, "--k", int, "N", "draws of z for each image, for the iwae-paper presets")
    _option(
        group,
        "--likelihood",
        str,
        "KIND",
        "bernoulli, squared-error, gaussian, or calibrated-gaussian, whose sigma is fitted",
    )
    _option(group, "--sigma", float, "X", "standard deviation, for --likelihood gaussian")
    _option(group, "--beta", float, "X", "weight of the KL")
    _option(group, "--beta-warmup", int, "STEPS", "raise beta linearly over the first STEPS steps")
    _option(group, "--free-bits", float, "NATS", "no penalty on a dimension's mean KL below this")
    _option(group, "--capacity", float, "NATS", "penalise the KL's distance from this, not the KL")
    _option(group, "--capacity-steps", int, "STEPS", "raise it linearly over the first STEPS steps")
    group.add_argument(
        "--conditional",
        action="store_const",
        const=True,
        help="condition encoder and decoder on the labels",
    )
    _option(
        group,
        "--binarization",
        str,
        "KIND",
        "none, threshold or stochastic (dynamic: drawn anew in each epoch)",
    )


def _add_loop_options(group: Any) -> None:
    _option(group, "--images", int, "N", "train on the first N images only; 0: on all")
    _option(group, "--epochs", int, "N", "passes over the training data")
    _option(group, "--steps", int, "N", "stop after N steps, instead of --epochs")
    _option(group, "--batch-size", int, "N", "images per step")
    _option(group, "--accumulate", int, "N", "process a batch in N parts in turn, to save memory")
    _option(group, "--lr", float, "X", "learning rate; the iwae-paper presets start at 10 times X")
    _option(group, "--weight-decay", float, "X", "AdamW's decoupled weight decay")
    group.add_argument(
        "--schedule",
        choices=("constant", "step", "cosine"),
        metavar="KIND",
        help="constant, step or cosine",
    )
    _option(group, "--warmup", int, "STEPS", "raise lr linearly over the first STEPS steps")
    _option(group, "--step-every", int, "STEPS", "for --schedule step: steps between drops")
    _option(group, "--gamma", float, "X", "for --schedule step: factor of each drop")
    _option(group, "--clip-norm", float, "X", "clip the gradient to this global norm")
    _option(group, "--seed", _seed, "N", "seed of weights, noise, data order and held-out images")
    _option(group, "--patience", int, "EPOCHS", "stop EPOCHS epochs after the best validation loss")
    _option(group, "--validation", int, "N", "hold out N training images; keep the best checkpoint")
    group.add_argument(
        "--keep-last",
        action="store_const",
        const=True,
        help="train on the last partial batch of an epoch too",
    )


def _add_run_options(group: Any) -> None:
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, numba_cuda, emulated or reference; default: auto",
    )
    group.add_argument(
        "--precision",
        metavar="NAME",
        help="fp32 or, on a GPU, tf32; default: fp32, or that of the run",
    )
    _option(
        group,
        "--out",
        _folder,
        "FOLDER",
        "run folder; default: runs/PRESET, or runs/DATA without --preset, numbered if taken",
    )
    _option(group, "--resume", _folder, "RUN", "continue a run; a finished one with more --epochs")
    group.add_argument("--best", action="store_true", help="with --resume: the best checkpoint")
    _option(group, "--log-every", int, "STEPS", "also write metrics every STEPS steps")
    _option(group, "--picture-every", int, "STEPS", "draw samples or reconstructions this often")
    _option(group, "--checkpoint-every", int, "STEPS", "also save a checkpoint every STEPS steps")
    group.add_argument("--tensorboard", action="store_true", help="log to TensorBoard as well")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_run_commands(commands: Any) -> None:
    def run_command(name: str, text: str, data: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run", metavar="RUN", type=Path, help="a run folder")
        command.add_argument("--device", default="auto", metavar="NAME", help="default: auto")
        command.add_argument(
            "--best", action="store_true", help="the best checkpoint by validation, not the last"
        )
        if data:
            text = "as for train; default: the run's own data"
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
        "--label", metavar="NAME|N", help="class, if conditional; default: each in turn"
    )
    sample.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    output(sample, "samples.png", "the picture")
    encode = run_command("encode", "write the latent of each image")
    encode.add_argument(
        "--split", choices=("test", "train", "all"), default="test", help="default: test"
    )
    output(
        encode,
        None,
        "an .npz file of mu and logvar (or code), the labels, and where images came from",
    )
    evaluate = run_command("evaluate", "estimate likelihood and describe the posterior")
    text = "draws of z per image; default: 5000; at most 100 where the loss is no likelihood"
    evaluate.add_argument("--samples", type=int, default=5000, metavar="K", help=text)
    evaluate.add_argument("--images", type=int, metavar="N", help="default: the whole test split")
    evaluate.add_argument(
        "--binarization",
        metavar="KIND",
        help="none, threshold or stochastic (static: drawn once); default: that of the run",
    )
    text = "draws decoded at once, a multiple of 100; default: 1000"
    evaluate.add_argument("--chunk", type=int, default=1000, metavar="N", help=text)
    evaluate.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    evaluate.add_argument("--quiet", action="store_true", help="no progress bar")
    run_command("plot", "draw a run's pictures again")
    export = run_command("export", "write a run's model for another framework", data=False)
    export.add_argument("--to", required=True, choices=("torch", "onnx"), help="the framework")
    output(export, None, ".safetensors file, or NAME for NAME.encoder.onnx and NAME.decoder.onnx")


def _add_tools(commands: Any) -> None:
    gradcheck = commands.add_parser(
        "gradcheck",
        help="compare the hand-derived gradients with central differences",
        description="Compare, layer by layer, the hand-derived gradients with central "
        "differences in float64.",
    )
    gradcheck.add_argument("--preset", metavar="NAME", help="default: every preset")
    gradcheck.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    info = commands.add_parser(
        "info",
        help="show versions, devices and presets, or describe a run",
        description="Show versions, devices and presets, or describe a run.",
    )
    info.add_argument("run", metavar="RUN", type=Path, nargs="?", help="a run folder")
    _add_bench(commands)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="time minivae beside PyTorch and JAX",
        description="Time training steps, primitives, scaling and whole runs beside PyTorch and "
        "JAX (pip install 'minivae[peers]'), and write one result file.",
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
        "--resume", action="store_true", help="continue FILE, whose run was cut short"
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
        help="measure nothing: fail if the lead over the fastest peer shrank between two result "
        "files of one machine",
    )
    bench.add_argument(
        "-o", "--output", metavar="FILE", type=Path, default=Path("bench.json"), help="the result"
    )
