"""PyTorch's step of the presets of Burda et al. 2016, by the authors' own protocol.

Gradients are summed over the batch and Adam has the authors' constants for sums, where minivae
averages and has the constants for averages.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from .cases import Case, byte_images
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
    """Adam as the authors' code has it, with epsilon outside of the bias correction: PyTorch's with
    as much more inside, and a second moment that begins elsewhere."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._adam = torch.optim.Adam(parameters, betas=(BETA1, BETA2), fused=True)
        for parameter in parameters:
            self._adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.full_like(parameter, FIRST_SECOND_MOMENT),
            }
        self._steps = 0

    def step(self, lr: float) -> None:
        """One update from the parameters' gradients, which it then clears."""
        self._steps += 1
        (group,) = self._adam.param_groups
        group["lr"], group["eps"] = lr, EPSILON / math.sqrt(1 - BETA2**self._steps)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)


class PaperPeer:
    """PyTorch's step of the paper's presets, eager or with its bound compiled."""

    def __init__(self, case: Case, device: str = "cpu", mode: str = "eager") -> None:
        torch.distributions.Distribution.set_default_validate_args(False)
        objective, self.training = case.model.objective, case.training
        self.importance, self.samples = objective.estimator == "importance", objective.samples
        self.latent = case.model.latent
        self.device = torch.device(device)
        self.model = TorchModel(case.model).to(self.device)
        self._bound: Callable[..., torch.Tensor] = negative_bound
        if mode == "compile":
            self._bound = torch.compile(negative_bound)
        self.optimizer = PaperAdam(list(self.model.parameters()))
        images = torch.tensor(byte_images(case)[: self.training.images or None])
        self.images = images.permute(0, 3, 1, 2).to(self.device) / 255
        self.steps = 0

    def loss(self, x: torch.Tensor, eps: torch.Tensor) -> float:
        """The batch's mean loss for given images and noise (n k, d)."""
        by_draws = eps.reshape(len(x), self.samples, -1).transpose(0, 1).to(self.device)
        with torch.no_grad():
            total = negative_bound(self.model, x.to(self.device), by_draws, self.importance)
        return float(total) / len(x)

    def step(self) -> None:
        """One training step on the next batch, in the order of the images."""
        size = self.training.batch_size
        per_epoch = len(self.images) // size
        first = self.steps % per_epoch * size
        x = torch.bernoulli(self.images[first : first + size])
        eps = torch.randn(self.samples, len(x), self.latent, device=self.device)
        loss = self._bound(self.model, x, eps, self.importance)
        loss.backward()
        self.optimizer.step(self.training.optimizer.learning_rate(self.steps, 0, per_epoch))
        self.steps += 1

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def weights(self) -> dict[str, Any]:
        """The weights under minivae's names: dense weights are (inputs, outputs) there."""
        return {
            name: (value.T if name.endswith("weight") else value).detach().cpu().numpy().copy()
            for name, value in self.model.named_parameters()
        }
