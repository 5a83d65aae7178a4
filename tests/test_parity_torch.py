"""Parity with PyTorch: the same weights, data and noise give the same outputs, losses, gradients
and optimizer steps. PyTorch computes in float64 throughout; its autograd knows nothing of the
gradients derived here.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers import BoundNetwork, assert_close
from numpy.typing import NDArray

from minivae import export
from minivae.layers import (
    ELU,
    GELU,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Flatten,
    Layer,
    LeakyReLU,
    ReLU,
    Reshape,
    Shape,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)
from minivae.models import Autoencoder, Objective
from minivae.network import Network
from minivae.ops.activations import IDENTITY
from minivae.ops.adam import clip_gradient
from minivae.ops.elbo import bernoulli_loss, squared_error_loss
from minivae.ops.latent import latent_forward, split_head
from minivae.ops.philox import LATENT_STREAM, Noise, standard_normal
from minivae.ops.state import BETA, SCHEDULE_COLUMNS, STEP, new_state
from minivae.optim import Adam
from minivae.presets import PRESETS

pytestmark = pytest.mark.peers

DOUBLE = 1e-10  # By norm, float64: rounding of 1e-16 through sums of thousands, layer upon layer.
SINGLE = 1e-5  # By norm, float32: rounding of 6e-8 through sums of thousands, layer upon layer.

ANALYTIC = [name for name, chosen in PRESETS.items() if chosen.objective.estimator == "analytic"]
"""The others, by draws alone, are compared in test_importance.py."""

ACTIVATIONS: list[Layer] = [
    *(ReLU(), LeakyReLU(0.2), Tanh(), Sigmoid(), Softplus(), ELU(), GELU(), SiLU()),
]


@pytest.fixture(scope="module")
def torch() -> Iterator[Any]:
    torch = pytest.importorskip("torch", reason="the extra `peers` is not installed")
    # The engine's threads own the cores: two pools that wait for work in a loop would fight.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(before)


def channels_first(array: NDArray) -> NDArray:
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2)) if array.ndim == 4 else array


def sequential(network: Network, values: dict[str, NDArray], torch: Any) -> Any:
    """The network in PyTorch, in float64, with these weights."""
    names, listing = dict(vars(torch.nn)), export.modules(network, values)
    sequence = torch.nn.Sequential(*(eval(str(module), names) for module in listing)).double()
    with torch.no_grad():
        for theirs, ours in zip(sequence, listing, strict=True):
            for name, tensor in ours.tensors.items():
                getattr(theirs, name).copy_(torch.from_numpy(tensor.astype(np.float64)))
    return sequence


def pairs(
    network: Network, ours: dict[str, NDArray], theirs: Any, part: Callable[[Any], Any]
) -> Iterator[tuple[str, NDArray, NDArray]]:
    """Each parameter's name, its tensor in `ours`, and what `part` takes from it in `theirs`."""
    for index, module in enumerate(export.modules(network, ours)):
        for name, tensor in module.tensors.items():
            expected = part(getattr(theirs[index], name)).detach().numpy()
            yield f"{network.name}.{index}.{name}", tensor, expected


def gradient(tensor: Any) -> Any:
    return tensor.grad


# Layers

IMAGE = (7, 5, 2)
LAYERS: dict[str, tuple[list[Layer], Shape]] = {
    "dense": ([Dense(5)], (7,)),
    "dense, one by one": ([Dense(1)], (1,)),
    **{f"{layer.kind} alone": ([layer], IMAGE) for layer in ACTIVATIONS},
    **{f"dense and {layer.kind}": ([Dense(5), layer, Dense(3)], (7,)) for layer in ACTIVATIONS},
    **{
        f"conv2d and {layer.kind}": ([Conv2d(3, 3), layer, Conv2d(2, 2), layer], IMAGE)
        for layer in ACTIVATIONS
    },
    **{
        f"conv_transpose2d and {layer.kind}": (
            [ConvTranspose2d(3, 3, stride=2), layer, ConvTranspose2d(2, 2), layer],
            IMAGE,
        )
        for layer in ACTIVATIONS
    },
    **{
        str(layer): ([layer], IMAGE)
        for layer in (
            Conv2d(3, 1),
            Conv2d(3, 1, stride=2),
            Conv2d(3, 2, stride=3),
            Conv2d(3, 3, padding=1),
            Conv2d(3, 3, stride=2, padding=1),
            Conv2d(3, 5, stride=(2, 1), padding=2),
            Conv2d(3, (2, 5), stride=(1, 3), padding=(0, 2)),
            Conv2d(3, (7, 5)),
            Conv2d(3, 3, padding=3),
            Conv2d(3, 3, stride=1, padding="same"),
            Conv2d(3, 3, stride=2, padding="same"),
            Conv2d(3, (2, 4), stride=(1, 3), padding="same"),
            Conv2d(3, 1, stride=2, padding="same"),
            ConvTranspose2d(3, 1),
            ConvTranspose2d(3, 1, stride=3),
            ConvTranspose2d(3, 3, padding=1),
            ConvTranspose2d(3, 3, stride=2, padding=1),
            ConvTranspose2d(3, 3, stride=2, padding=1, output_padding=1),
            ConvTranspose2d(3, 5, stride=(3, 2), padding=(1, 2), output_padding=(2, 0)),
            ConvTranspose2d(3, (2, 5), stride=(1, 3), padding=(0, 2)),
            ConvTranspose2d(3, 2, stride=3, output_padding=2),
            ConvTranspose2d(3, 3, stride=2, padding=1, output_size=(14, 9)),
            ConvTranspose2d(3, 3, stride=2, padding="same"),
            ConvTranspose2d(3, 4, stride=1, padding="same"),
            ConvTranspose2d(3, (2, 5), stride=(3, 2), padding="same", output_size=(19, 10)),
        )
    },
    "image to vector to image": (
        [Conv2d(3, 3), Flatten(), Dense(24), Reshape((2, 3, 4)), ConvTranspose2d(2, 2)],
        IMAGE,
    ),
}


@pytest.mark.parametrize(("layers", "shape"), LAYERS.values(), ids=LAYERS)
def test_a_layer_has_the_output_and_every_gradient_of_pytorch(
    layers: list[Layer], shape: Shape, torch: Any
) -> None:
    ours = BoundNetwork(layers, shape, rows=3)
    theirs = sequential(ours.network, ours.parameters.values, torch)
    x = torch.from_numpy(channels_first(ours.x)).requires_grad_()
    output = theirs(x)
    assert_close(channels_first(ours.forward()), output.detach().numpy(), DOUBLE, "output")
    output.backward(torch.from_numpy(channels_first(ours.upstream)))
    gradients = ours.backward()
    assert_close(channels_first(gradients["x"]), x.grad.numpy(), DOUBLE, "input gradient")
    for name, derived, expected in pairs(ours.network, gradients, theirs, gradient):
        assert_close(derived, expected, DOUBLE, name)


# Losses


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_bernoulli_loss_is_pytorch_s_cross_entropy_with_logits(scale: float, torch: Any) -> None:
    rng = np.random.default_rng(0)
    logits, x = rng.standard_normal((3, 31)) * 5, rng.random((3, 31))
    loss, dlogits = np.empty(3), np.empty((3, 31))
    bernoulli_loss(logits, x, loss, dlogits, scale)
    theirs = torch.from_numpy(logits).requires_grad_()
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits
    terms = cross_entropy(theirs, torch.from_numpy(x), reduction="none").sum(dim=1)
    (scale * terms.sum()).backward()
    assert_close(loss, terms.detach().numpy(), DOUBLE)
    assert_close(dlogits, theirs.grad.numpy(), DOUBLE)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_squared_error_is_pytorch_s_mse_summed(weight: float, torch: Any) -> None:
    rng = np.random.default_rng(0)
    y, x, scale = rng.random((3, 31)), rng.random((3, 31)), 1 / 3
    loss, dy = np.empty(3), np.empty((3, 31))
    squared_error_loss(y, x, loss, dy, scale, weight, IDENTITY)
    theirs = torch.from_numpy(y).requires_grad_()
    terms = torch.nn.functional.mse_loss(theirs, torch.from_numpy(x), reduction="none").sum(dim=1)
    (scale * weight * terms.sum()).backward()
    assert_close(loss, weight * terms.detach().numpy(), DOUBLE)
    assert_close(dy, theirs.grad.numpy(), DOUBLE)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_a_gaussian_loss_is_pytorch_s_negative_log_density(sigma: float, torch: Any) -> None:
    rng = np.random.default_rng(0)
    y, x, loss, objective = *rng.random((2, 3, 31)), np.empty(3), Objective("gaussian", sigma=sigma)
    squared_error_loss(y, x, loss, np.empty((3, 31)), 1.0, objective.error_weight, IDENTITY)
    density = torch.distributions.Normal(torch.from_numpy(y), sigma)
    expected = -density.log_prob(torch.from_numpy(x)).sum(dim=1).numpy()
    assert_close(loss + objective.constant(31), expected, DOUBLE)


def test_the_kl_is_pytorch_s_kl_of_normals(torch: Any) -> None:
    head = np.random.default_rng(0).standard_normal((5, 14))
    kl = np.empty((5, 7))
    latent_forward(head, np.empty((5, 7)), kl, Noise(0, LATENT_STREAM), new_state())
    mu, logvar = (torch.from_numpy(part.copy()) for part in split_head(head))
    posterior = torch.distributions.Normal(mu, torch.exp(logvar / 2))
    prior = torch.distributions.Normal(torch.zeros_like(mu), 1.0)
    assert_close(kl, torch.distributions.kl_divergence(posterior, prior).numpy(), DOUBLE)


# Whole models

ROWS = 5
CLEAR = 1e-6  # Ten times float32's rounding of a sum of hundreds that comes out near 0.
NOISE = Noise(0xABCDEF, LATENT_STREAM)


class Twin:
    """A model here, and the same model in PyTorch with its loss."""

    def __init__(self, model: Autoencoder, torch: Any) -> None:
        self.model, self.torch = model, torch
        values = {
            name: model.backend.to_numpy(view) for name, view in model.parameters.values.items()
        }
        self.parts = [
            (network, sequential(network, values, torch))
            for network in (model.encoder, model.decoder)
        ]
        self.bound = model.bind(ROWS)
        self.state = new_state()

    def parameters(self) -> list[Any]:
        return [tensor for _, part in self.parts for tensor in part.parameters()]

    def put(self, images: NDArray) -> None:
        """The next batch, rounded to the model's type on both sides."""
        self.bound.x[...] = images
        rows = self.bound.x.reshape(ROWS, *self.model.image_shape).astype(np.float64)
        self.images = self.torch.from_numpy(channels_first(rows))

    def put_clear_of_kinks(self) -> None:
        """A batch for which no unit is so near its ReLU's kink that float32 may see it on the other
        side, where its gradient is another one."""
        torch, nearest = self.torch, []

        def look(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            nearest.append(float(inputs[0].detach().abs().min()))

        kinked = (torch.nn.ReLU, torch.nn.LeakyReLU)
        units = [unit for _, part in self.parts for unit in part if isinstance(unit, kinked)]
        hooks = [unit.register_forward_hook(look) for unit in units]
        for images in batches(self.model, 100):
            nearest.clear()
            self.put(images)
            self.their_loss(1.0)
            if min(nearest) > CLEAR:
                break
        else:
            pytest.fail("no batch without a unit near its kink")
        for hook in hooks:
            hook.remove()

    def our_loss(self, schedule: NDArray) -> dict[str, float]:
        """Also leaves the gradients of the batch."""
        totals = np.zeros(3)
        self.bound.backend.sequence(*self.bound.forward_calls(NOISE, schedule, self.state, totals))
        self.bound.backward(NOISE, self.state)
        return self.model.means(totals, ROWS)

    def their_loss(self, beta: float) -> dict[str, Any]:
        torch, objective = self.torch, self.model.objective
        (_, encoder), (_, decoder) = self.parts
        code = encoder(self.images)
        kl = torch.zeros((), dtype=torch.float64)
        if self.model.latent:
            mu, logvar = code.chunk(2, dim=1)
            dtype = self.model.dtype.type
            eps = standard_normal(tuple(mu.shape), NOISE, int(self.state[STEP]), dtype)
            code = mu + torch.exp(0.5 * logvar) * torch.from_numpy(eps.astype(np.float64))
            kl = -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp()) / ROWS
        output = decoder(code).reshape(self.images.shape)
        losses = torch.nn.functional
        if objective.likelihood == "bernoulli":
            loss = losses.binary_cross_entropy_with_logits(output, self.images, reduction="sum")
        else:
            loss = objective.weight * losses.mse_loss(output, self.images, reduction="sum")
        return {"reconstruction": loss / ROWS, "kl": kl, "loss": loss / ROWS + beta * kl}

    def values(self, ours: dict[str, NDArray]) -> Iterator[tuple[str, NDArray, NDArray]]:
        """Each parameter's name and value, from `ours` and in PyTorch."""
        for network, part in self.parts:
            yield from pairs(network, ours, part, lambda tensor: tensor)


def batches(model: Autoencoder, count: int) -> Iterator[NDArray]:
    rng = np.random.default_rng(3)
    for _ in range(count):
        yield rng.random((ROWS, model.pixels))


PRECISIONS = [
    pytest.param("reference", np.float64, DOUBLE, id="reference-float64"),
    pytest.param("reference", np.float32, SINGLE, id="reference-float32"),
    pytest.param("cpu", np.float32, SINGLE, id="cpu-float32"),
]


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", ANALYTIC)
def test_a_preset_has_the_loss_and_every_gradient_of_pytorch(
    name: str, device: str, dtype: type, tolerance: float, torch: Any
) -> None:
    twin = Twin(PRESETS[name].model().to(device, dtype), torch)
    twin.put_clear_of_kinks()
    schedule = np.zeros((1, SCHEDULE_COLUMNS), dtype)
    beta = schedule[0, BETA] = 1.5
    ours, theirs = twin.our_loss(schedule), twin.their_loss(beta)
    for term, number in ours.items():
        assert number == pytest.approx(theirs[term].item(), rel=tolerance), term
    theirs["loss"].backward()
    for network, part in twin.parts:
        gradients = twin.model.parameters.gradients
        for tensor, derived, expected in pairs(network, gradients, part, gradient):
            assert_close(derived, expected, tolerance, tensor)


class Steps:
    """An optimizer's steps of a model."""

    def __init__(self, model: Autoencoder, optimizer: Adam, count: int) -> None:
        self.model, self.optimizer, self.bound = model, optimizer, model.bind(ROWS)
        rows = optimizer.schedule_rows(0, count, count)
        rows[:, BETA] = model.objective.beta
        self.schedule, self.state = rows.astype(model.dtype), new_state()

    def step(self, images: NDArray) -> None:
        self.bound.x[...] = images
        self.bound.backend.sequence(
            *self.bound.forward_calls(NOISE, self.schedule, self.state, np.zeros(3))
        )
        self.bound.backward(NOISE, self.state)
        backend, flat, optimizer = self.model.backend, self.model.parameters.flat, self.optimizer
        backend.adam_update(
            *(flat[kind] for kind in ("values", "gradients", "first_moments", "second_moments")),
            *(self.schedule, self.state, optimizer.beta1, optimizer.beta2, optimizer.epsilon),
        )
        backend.advance_state(self.state, ROWS)


class TorchSteps:
    """The same steps of a model's twin in PyTorch."""

    def __init__(self, twin: Twin, optimizer: Adam, torch: Any) -> None:
        self.twin = twin
        kind = torch.optim.AdamW if optimizer.weight_decay else torch.optim.Adam
        betas = (optimizer.beta1, optimizer.beta2)
        self.optimizer = kind(
            twin.parameters(),
            lr=optimizer.lr,
            betas=betas,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        )

    def step(self, images: NDArray) -> None:
        self.twin.put(images)
        self.optimizer.zero_grad()
        self.twin.their_loss(1.0)["loss"].backward()
        self.optimizer.step()
        self.twin.state[STEP] += 1


each_optimizer = pytest.mark.parametrize(
    "optimizer", [Adam(), Adam(weight_decay=0.01)], ids=["Adam", "AdamW"]
)


@each_optimizer
@pytest.mark.parametrize("name", ANALYTIC)
def test_twenty_steps_in_float64_end_where_pytorch_s_end(
    name: str, optimizer: Adam, torch: Any
) -> None:
    model = PRESETS[name].model().to("reference", np.float64)
    twin = Twin(model, torch)
    ours, theirs = Steps(model, optimizer, 20), TorchSteps(twin, optimizer, torch)
    for images in batches(model, 20):
        theirs.step(images)
        ours.step(images)
    for tensor, value, expected in twin.values(model.parameters.values):
        assert_close(value, expected, DOUBLE, tensor)


@each_optimizer
@pytest.mark.parametrize("name", ANALYTIC)
def test_each_of_twenty_steps_in_float32_ends_where_pytorch_s_ends(
    name: str, optimizer: Adam, torch: Any
) -> None:
    # Each step starts where the float64 run stands. Left to themselves, float32 runs of models with
    # ReLU part by more than rounding, PyTorch's own from its float64 run by up to 2e-4: sooner or
    # later a unit within rounding of its kink falls on the other side.
    guide = PRESETS[name].model().to("reference", np.float64)
    twin = Twin(guide, torch)
    theirs = [Steps(guide, optimizer, 20), TorchSteps(twin, optimizer, torch)]
    ours = [
        Steps(PRESETS[name].model().to(device, np.float32), optimizer, 20)
        for device in ("reference", "cpu")
    ]
    for images in batches(guide, 20):
        for run in ours:
            run.model.set_tensors(guide.tensors())
        for run in (*ours, *theirs):
            run.step(images)
        for run in ours:
            _, *vectors = zip(*twin.values(run.model.parameters.values), strict=True)
            value, expected = (np.concatenate([np.ravel(part) for part in v]) for v in vectors)
            assert_close(value, expected, SINGLE, run.model.backend.name)


# Schedules and clipping


def torch_rates(torch: Any, count: int, make: Callable[[Any], Any]) -> list[float]:
    """The learning rates of `count` steps under the scheduler that `make` gives an optimizer."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler, rates = make(optimizer), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def our_rates(count: int, **settings: Any) -> list[float]:
    return [Adam(lr=0.3, **settings).learning_rate(step, count, 1) for step in range(count)]


def test_the_step_schedule_is_pytorch_s(torch: Any) -> None:
    schedulers = torch.optim.lr_scheduler
    expected = torch_rates(torch, 40, lambda optimizer: schedulers.StepLR(optimizer, 7, gamma=0.3))
    ours = our_rates(40, schedule="step", step_every=7, gamma=0.3)
    assert ours == pytest.approx(expected, rel=1e-12)


def test_the_cosine_schedule_is_pytorch_s(torch: Any) -> None:
    schedulers = torch.optim.lr_scheduler
    expected = torch_rates(torch, 40, lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 40))
    # PyTorch steps by a recursion, which rounds forty times.
    assert our_rates(40, schedule="cosine") == pytest.approx(expected, rel=1e-10)


def test_the_warm_up_is_pytorch_s_linear_one(torch: Any) -> None:
    schedulers = torch.optim.lr_scheduler

    def warm_up_then_cosine(optimizer: Any) -> Any:
        parts = [
            schedulers.LinearLR(optimizer, start_factor=1 / 10, total_iters=9),
            schedulers.CosineAnnealingLR(optimizer, 30),
        ]
        return schedulers.SequentialLR(optimizer, parts, milestones=[10])

    expected = torch_rates(torch, 40, warm_up_then_cosine)
    ours = our_rates(40, schedule="cosine", warmup_steps=10)
    assert ours == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_pytorch_s_clipping_by_global_norm(max_norm: float, torch: Any) -> None:
    g, norm = np.random.default_rng(0).standard_normal(1000) * 30, np.empty(1)
    parts = [torch.zeros(300, dtype=torch.float64), torch.zeros(700, dtype=torch.float64)]
    for part, start in zip(parts, (0, 300), strict=True):
        part.grad = torch.from_numpy(g[start : start + len(part)].copy())
    expected = torch.nn.utils.clip_grad_norm_(parts, max_norm)
    clip_gradient(g, max_norm, norm)
    assert norm[0] == pytest.approx(float(expected), rel=1e-12)
    # PyTorch divides by the norm + 1e-6, the norm being some 950.
    assert_close(g, np.concatenate([part.grad.numpy() for part in parts]), 2e-9)
