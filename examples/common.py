"""What the examples share: their options, and bad input answered in one line."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import minivae
from minivae.data import lasting_name, load
from minivae.models import Autoencoder
from minivae.pictures import draw_progress, draw_run


def options(description: str, name: str, data: str) -> argparse.ArgumentParser:
    """A parser with the data, the folder for the results and the seed."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", default=data, help=f"a name or a path; default: {data}")
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / f"example-{name}", help="results go here"
    )
    parser.add_argument("--epochs", type=int, help="instead of the example's own number")
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def chosen(training: minivae.Training, arguments: argparse.Namespace) -> minivae.Training:
    """The training with the seed, and the epochs or steps, that were asked for."""
    changes = {"seed": arguments.seed}
    if arguments.epochs is not None:
        changes |= {"epochs": arguments.epochs, "steps": 0}
    if arguments.steps is not None:
        changes["steps"] = arguments.steps
    return dataclasses.replace(training, **changes)


def run(main: Callable[[], None]) -> None:
    """Runs an example; bad input is one line and exit code 2, Ctrl-C one line and 130."""
    try:
        main()
    except minivae.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "stopped", file=sys.stderr)
        sys.exit(130)


def train_and_draw(
    name: str,
    description: str,
    data: str,
    build: Callable[[int], Autoencoder],
    training: minivae.Training,
) -> None:
    """Trains what `build` makes from a seed on the data, and leaves a run folder with pictures."""
    arguments = options(description, name, data).parse_args()
    training = chosen(training, arguments)
    splits = load(arguments.data, seed=arguments.seed)
    model = build(arguments.seed)
    pictures = arguments.out / "pictures"

    def on_step(step: int, model: Autoencoder) -> None:
        draw_progress(model, splits, training, pictures / f"step_{step:06d}.png", step)

    metrics = minivae.fit(
        *(model, splits, training),
        out=arguments.out,
        on_step=on_step,
        extra_config={"source": lasting_name(arguments.data)},
    )
    for path in draw_run(model, splits, training, metrics, pictures):
        print(path)
