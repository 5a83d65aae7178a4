"""Commands that train nothing: `gradcheck`, `info` and `bench`."""

import argparse
import platform
from pathlib import Path

import numpy as np

from .. import __version__, backends
from ..checkpoint import METRICS, best_epoch, load, read_config, read_metrics
from ..gradcheck import ENTRIES, TOLERANCE, check_gradients
from ..network import Network
from ..presets import PRESETS, preset


def gradcheck(arguments: argparse.Namespace) -> None:

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


def info(arguments: argparse.Namespace) -> None:
    if arguments.run is not None:
        _describe(arguments.run)
        return

    print(f"minivae {__version__}, Python {platform.python_version()}, NumPy {np.__version__}")
    print("devices")
    for name, status in backends.available().items():
        print(f"  {name:<12} {status}")
    print("presets")
    for name, known in PRESETS.items():
        print(f"  {name:<16} {known.summary} ({known.data})")


def bench(arguments: argparse.Namespace) -> None:
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


def _describe(folder: Path) -> None:
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
    best = best_epoch(epochs)
    if best:
        loss = best["validation"]["loss"]
        print(f"best       epoch {best['epoch']}, validation loss {loss:.2f}: used with --best")
