"""The objectives beside the plain ELBO against PyTorch's autograd, which knows nothing of the
gradients derived here: the same weights, images and noise, PyTorch in float64."""

import math
from typing import Any

import numpy as np
import pytest
from helpers import assert_close
from test_parity_torch import DOUBLE, NOISE, PRECISIONS, ROWS, Twin, batches, gradient, pairs
from test_parity_torch import torch as torch  # the fixture

from minivae import VAE, Dense, Flatten, JoinLabel, Objective, Sigmoid, Tanh
from minivae.ops.philox import standard_normal
from minivae.ops.state import BETA, CAPACITY, SCHEDULE_COLUMNS, STEP, new_state

pytestmark = pytest.mark.peers

IMAGE = (5, 4, 1)


def smooth_vae(**objective: Any) -> VAE:
    """Without a kink that float32 could see from the other side."""
    encoder = [Flatten(), Dense(7), Tanh(), Dense(6)]
    decoder = [Dense(7), Tanh(), Dense(20), Sigmoid()]
    return VAE(encoder, decoder, Objective(**{"likelihood": "gaussian", **objective}), IMAGE)


class DistributionsTwin(Twin):
    """The loss written with PyTorch's distributions."""

    def posterior(self, head: Any) -> tuple[Any, Any]:
        """A draw from the posterior, and the KL of each image."""
        torch, distributions = self.torch, self.torch.distributions
        mu, logvar = head.chunk(2, dim=1)
        dtype = self.model.dtype.type
        eps = standard_normal(tuple(mu.shape), NOISE, int(self.state[STEP]), dtype)
        posterior = distributions.Normal(mu, torch.exp(logvar / 2))
        prior = distributions.Normal(torch.zeros_like(mu), 1.0)
        kl = distributions.kl_divergence(posterior, prior).sum(dim=1)
        return mu + posterior.scale * torch.from_numpy(eps.astype(np.float64)), kl

    def their_loss(self, beta: float) -> dict[str, Any]:
        (_, encoder), (_, decoder) = self.parts
        z, kl = self.posterior(encoder(self.images))
        return self.combined(decoder(z).reshape(self.images.shape), kl, beta)

    def combined(self, output: Any, kl: Any, beta: float) -> dict[str, Any]:
        torch, objective = self.torch, self.model.objective
        sigma = objective.sigma
        if objective.calibrated:
            # The variance stays in the graph: autograd takes the way through it that E4 proves 0.
            sigma = torch.sqrt(torch.mean((output - self.images) ** 2))
        density = torch.distributions.Normal(output, sigma).log_prob(self.images)
        reconstruction, mean_kl = -density.sum() / ROWS, kl.mean()
        distance = torch.abs(mean_kl - objective.capacity) if objective.capacity else mean_kl
        loss = reconstruction + beta * distance
        return {"reconstruction": reconstruction, "kl": mean_kl, "loss": loss}


def assert_parity(twin: Twin, beta: float, tolerance: float) -> None:
    """The losses and every gradient of one batch."""
    twin.put(next(batches(twin.model, 1)))
    schedule = np.zeros((1, SCHEDULE_COLUMNS), twin.model.dtype)
    schedule[0, BETA], schedule[0, CAPACITY] = beta, twin.model.objective.capacity
    ours, theirs = twin.our_loss(schedule), twin.their_loss(beta)
    for term, number in theirs.items():
        assert ours[term] == pytest.approx(number.item(), rel=tolerance), term
    theirs["loss"].backward()
    for network, part in twin.parts:
        gradients = twin.model.parameters.gradients
        for tensor, derived, expected in pairs(network, gradients, part, gradient):
            assert_close(derived, expected, tolerance, tensor)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("likelihood", ["gaussian", "calibrated-gaussian"])
def test_a_gaussian_has_the_loss_and_every_gradient_of_pytorch(
    likelihood: str, device: str, dtype: type, tolerance: float, torch: Any
) -> None:
    model = smooth_vae(likelihood=likelihood, sigma=0.3).to(device, dtype)
    assert_parity(DistributionsTwin(model, torch), 1.5, tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("capacity", [0.01, 20.0], ids=["below the KL", "above the KL"])
def test_a_capacity_has_the_loss_and_every_gradient_of_pytorch(
    capacity: float, device: str, dtype: type, tolerance: float, torch: Any
) -> None:
    model = smooth_vae(capacity=capacity).to(device, dtype)
    assert_parity(DistributionsTwin(model, torch), 1.5, tolerance)


def test_the_calibrated_sigma_is_pytorch_s_root_of_the_mean_squared_error(torch: Any) -> None:
    model = smooth_vae(likelihood="calibrated-gaussian").to("reference", np.float64)
    twin = DistributionsTwin(model, torch)
    twin.put(next(batches(model, 1)))
    twin.our_loss(np.zeros((1, SCHEDULE_COLUMNS)))
    y = torch.from_numpy(twin.bound.decoder.output.reshape(twin.images.shape))
    expected = math.sqrt(torch.nn.functional.mse_loss(y, twin.images).item())
    assert math.sqrt(twin.bound.variance[0]) == pytest.approx(expected, rel=DOUBLE)


CLASSES = 3


class ConditionalTwin(DistributionsTwin):
    """A conditional VAE of dense layers with tanh, its decoder ending in a sigmoid, written out
    with the label concatenated."""

    def __init__(self, model: VAE, torch: Any) -> None:
        self.model, self.torch, self.parts = model, torch, []
        self.bound, self.state = model.bind(ROWS), new_state()
        self.onehot = np.eye(CLASSES)[[2, 0, 1, 1, 2]]
        self.bound.onehot[...] = self.onehot
        self.tensors = {
            name: torch.from_numpy(view.astype(np.float64)).requires_grad_()
            for name, view in model.parameters.values.items()
        }

    def their_loss(self, beta: float) -> dict[str, Any]:
        torch, onehot = self.torch, self.torch.from_numpy(self.onehot)

        def dense(name: str, v: Any) -> Any:
            return v @ self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

        x = self.images.reshape(ROWS, -1)
        h = torch.tanh(dense("encoder.2", torch.cat([x, onehot], dim=1)))
        z, kl = self.posterior(dense("encoder.4", h))
        h = torch.tanh(dense("decoder.1", torch.cat([z, onehot], dim=1)))
        # The label joins a second time, behind a fused activation.
        y = torch.sigmoid(dense("decoder.4", torch.cat([h, onehot], dim=1)))
        return self.combined(y.reshape(self.images.shape), kl, beta)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("likelihood", ["gaussian", "calibrated-gaussian"])
def test_a_conditional_model_has_the_loss_and_every_gradient_of_pytorch(
    likelihood: str, device: str, dtype: type, tolerance: float, torch: Any
) -> None:
    join = JoinLabel(CLASSES)
    encoder = [Flatten(), join, Dense(7), Tanh(), Dense(6)]
    decoder = [join, Dense(7), Tanh(), join, Dense(20), Sigmoid()]
    model = VAE(encoder, decoder, Objective(likelihood), IMAGE).to(device, dtype)
    twin = ConditionalTwin(model, torch)
    assert_parity(twin, 1.5, tolerance)
    for name, tensor in twin.tensors.items():
        assert_close(model.parameters.gradients[name], tensor.grad.numpy(), tolerance, name)
