"""The runs of Burda et al. 2016 in PyTorch, by the authors' own protocol, for comparison:

    python -m minivae.benchmarks.paper_peer --preset iwae-paper-iwae --k 5 --passes 121 --out RUN

It starts from minivae's initial weights and takes the batches in the same order; everything else is
PyTorch's: autograd, noise, binarization. Gradients are summed over the batch and Adam has the
authors' constants for sums, where minivae averages and has the constants for averages. The result
is a folder that `minivae evaluate` takes.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from minivae import save
from minivae.data import load
from minivae.presets import preset
from minivae.train import Trainer

from .cases import Case
from .measure import environment
from .runs import PEER
from .torch_peer import TorchModel

BETA1, BETA2, EPSILON = 0.99, 0.999, 1e-4
FIRST_SECOND_MOMENT = 1.0


def negative_bound(
    model: TorchModel, x: torch.Tensor, eps: torch.Tensor, importance: bool
) -> torch.Tensor:
    """The sum over the batch of -bound (importance.E2), by the densities written out, with noise
    (k, n, d)."""
    mu, log_sigma = model.encoder(x).chunk(2, dim=1)
    posterior = torch.distributions.Normal(mu, log_sigma.exp())
    z = mu + log_sigma.exp() * eps
    prior = torch.distributions.Normal(0.0, 1.0)
    logits = model.decoder(z.flatten(0, 1)).reshape(*z.shape[:2], -1)
    likelihood = torch.distributions.Bernoulli(logits=logits).log_prob(x.flatten(1))
    log_weights = likelihood.sum(2) + prior.log_prob(z).sum(2) - posterior.log_prob(z).sum(2)
    if importance:
        return -(torch.logsumexp(log_weights, 0) - math.log(len(eps))).sum()
    return -log_weights.mean(0).sum()


class PaperAdam:
    """Adam as the authors' code has it: epsilon outside of the bias correction."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.parameters = parameters
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.full_like(p, FIRST_SECOND_MOMENT) for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the parameters' gradients, which it then clears."""
        self.steps += 1
        gradients = [p.grad for p in self.parameters]
        torch._foreach_lerp_(self.first, gradients, 1 - BETA1)
        torch._foreach_mul_(self.second, BETA2)
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - BETA2)
        divisors = torch._foreach_sqrt(self.second)
        torch._foreach_add_(divisors, EPSILON)
        step_size = lr * math.sqrt(1 - BETA2**self.steps) / (1 - BETA1**self.steps)
        torch._foreach_addcdiv_(self.parameters, self.first, divisors, -step_size)
        for parameter in self.parameters:
            parameter.grad = None


class PaperPeer:
    """PyTorch's step of the paper's presets."""

    def __init__(self, case: Case) -> None:
        # Steps this small only wait for a second thread.
        torch.set_num_threads(1)
        torch.distributions.Distribution.set_default_validate_args(False)
        objective, self.training = case.model.objective, case.training
        self.importance, self.samples = objective.estimator == "importance", objective.samples
        self.latent = case.model.latent
        self.model = TorchModel(case.model)
        self.optimizer = PaperAdam(list(self.model.parameters()))
        images = torch.tensor(case.splits.train.images[: self.training.images or None])
        self.images = images.permute(0, 3, 1, 2) / 255
        self.steps, self.total = 0, torch.zeros(())

    def loss(self, x: torch.Tensor, eps: torch.Tensor) -> float:
        """The batch's mean loss for given images and noise (n k, d)."""
        by_draws = eps.reshape(len(x), self.samples, -1).transpose(0, 1)
        with torch.no_grad():
            return float(negative_bound(self.model, x, by_draws, self.importance)) / len(x)

    def step(self) -> None:
        """One training step on the next batch, in the order of the images."""
        size = self.training.batch_size
        first = self.steps % (len(self.images) // size) * size
        x = torch.bernoulli(self.images[first : first + size])
        eps = torch.randn(self.samples, len(x), self.latent)
        loss = negative_bound(self.model, x, eps, self.importance)
        loss.backward()
        self.optimizer.step(self.training.optimizer.learning_rate(self.steps, 0))
        self.total += loss.detach()
        self.steps += 1

    def synchronize(self) -> None:
        """Nothing to wait for on a CPU."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="iwae-paper-vae", metavar="NAME")
    parser.add_argument("--k", type=int, default=1, metavar="N")
    parser.add_argument("--passes", type=int, default=121, metavar="N")
    parser.add_argument("--data", default="mnist", metavar="NAME|PATH")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN")
    arguments = parser.parse_args()

    chosen = preset(arguments.preset)
    own = chosen.model(samples=arguments.k, seed=arguments.seed)
    splits = load(arguments.data)
    Trainer(own.to("reference"), splits, chosen.training).begin()
    peer = PaperPeer(Case(arguments.preset, own, chosen.training, splits))
    torch.manual_seed(arguments.seed)
    curve, started = [], time.perf_counter()
    for epoch in range(arguments.passes):
        peer.total.zero_()
        for _ in range(len(peer.images) // chosen.training.batch_size):
            peer.step()
        curve.append({"epoch": epoch + 1, "train": float(peer.total) / len(peer.images)})
        print(curve[-1], round(time.perf_counter() - started), flush=True)
    own.set_tensors(_tensors(peer.model))
    save(own, arguments.out)
    result: dict[str, Any] = {
        "environment": environment("cpu"),
        "framework": "PyTorch",
        "preset": arguments.preset,
        "k": arguments.k,
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "epochs": curve,
    }
    (arguments.out / PEER).write_text(json.dumps(result, indent=1) + "\n")


def _tensors(peer: TorchModel) -> dict[str, Any]:
    """PyTorch's weights under minivae's names: dense weights are (inputs, outputs) there."""
    return {
        f"{name}": (value.T if name.endswith("weight") else value).detach().numpy().copy()
        for name, value in peer.named_parameters()
    }


if __name__ == "__main__":
    main()
