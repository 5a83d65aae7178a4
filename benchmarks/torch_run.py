"""Trains a preset in PyTorch, for comparison:

    python -m minivae.benchmarks.torch_run --preset mnist-dense --epochs 20 --data mnist --out RUN

It starts from minivae's initial weights, or with --own-weights from PyTorch's; order, noise and
binarization are PyTorch's own, but for the IWAE paper's presets, whose order is fixed. The weights
of these are saved, for `minivae evaluate`.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from minivae import save
from minivae.data import load
from minivae.environment import environment
from minivae.presets import preset
from minivae.train import Trainer

from .cases import Case
from .measure import write_result
from .paper_peer import PaperPeer
from .runs import OWN_WEIGHTS, PEER, SAME_WEIGHTS
from .torch_peer import TorchPeer

CHUNK = 500


def test_loss(peer: PaperPeer | TorchPeer, images: torch.Tensor, noise: tuple[int, int]) -> float:
    """The mean over images (n, c, h, w), with `noise` (draws an image, dimensions)."""
    draws, latent = noise
    chunks = images.split(CHUNK)
    losses = [peer.loss(x, torch.randn(len(x) * draws, latent)) * len(x) for x in chunks]
    return sum(losses) / len(images)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a preset in PyTorch, for comparison.")
    parser.add_argument("--preset", default="mnist-dense", metavar="NAME")
    parser.add_argument("--k", type=int, metavar="N")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--data", default="mnist", metavar="NAME|PATH")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--own-weights", action="store_true")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN")
    arguments = parser.parse_args()

    chosen = preset(arguments.preset)
    own, training = chosen.model(samples=arguments.k, seed=arguments.seed), chosen.training
    splits = load(arguments.data)
    Trainer(own.to("reference"), splits, training).begin()
    case = Case(arguments.preset, own, training, splits)
    by_draws = own.objective.by_draws
    torch.manual_seed(arguments.seed)
    peer = PaperPeer(case) if by_draws else TorchPeer(case, "cpu", "eager")
    if arguments.own_weights:
        for layer in peer.model.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.modules.conv._ConvNd):
                layer.reset_parameters()
    test = torch.tensor(splits.test.images).permute(0, 3, 1, 2) / 255
    if training.binarization == "stochastic":
        test = torch.bernoulli(test)

    epochs: list[dict[str, Any]] = []
    started = time.perf_counter()
    steps = (training.images or len(splits.train)) // training.batch_size
    for epoch in range(1, (arguments.epochs or training.epochs) + 1):
        for _ in range(steps):
            peer.step()
        loss = test_loss(peer, test, (own.objective.samples, max(own.latent, 1)))
        seconds = round(time.perf_counter() - started, 1)
        epochs.append({"epoch": epoch, "test": {"loss": loss}, "seconds": seconds})
        print(epochs[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if isinstance(peer, PaperPeer):
        own.set_tensors(peer.weights())
        save(own, arguments.out)
    result = {
        "environment": environment("cpu"),
        "framework": OWN_WEIGHTS if arguments.own_weights else SAME_WEIGHTS,
        "preset": arguments.preset,
        "training": dataclasses.asdict(training),
        "objective": dataclasses.asdict(own.objective),
        "k": own.objective.samples,
        "seed": arguments.seed,
        "epochs": epochs,
    }
    write_result(arguments.out / PEER, result)


if __name__ == "__main__":
    main()
