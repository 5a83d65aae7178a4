"""JAX as a peer: the same step under jit, alone or as a lax.scan over many steps."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from minivae.layers import ActivationLayer, Convolution, ConvTranspose2d, Dense
from minivae.network import Network

from .cases import Case, byte_images

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
}

UNROLLED = 8
"""Steps of a scan in a row: between two there is a branch, which a GPU waits at, and within a loop
on a CPU convolutions take several times as long. Dense layers do not."""


def _apply(network: Network, values: dict[str, Any], x: Any) -> Any:
    for index, layer in enumerate(network.layers):
        prefix = f"{network.name}.{index}"
        shape = (x.shape[0], *network.shapes[index + 1])
        if isinstance(layer, Dense):
            x = x @ values[f"{prefix}.weight"] + values[f"{prefix}.bias"]
        elif isinstance(layer, Convolution):
            x = _convolution(layer, x, shape, values[f"{prefix}.weight"])
            x += values[f"{prefix}.bias"]
        elif isinstance(layer, ActivationLayer):
            if layer.kind == "leaky_relu":
                x = jax.nn.leaky_relu(x, layer.activation.slope)
            else:
                x = ACTIVATIONS[layer.kind](x)
        else:
            x = x.reshape(shape)
    return x


def _convolution(layer: Convolution, x: Any, shape: tuple[int, ...], weight: Any) -> Any:
    dimensions = ("NHWC", "HWIO", "NHWC")
    strides = [stride for _, stride, _ in layer.axes()]
    transposed = isinstance(layer, ConvTranspose2d)
    large, small = (shape, x.shape) if transposed else (x.shape, shape)
    geometry = layer.geometry(large[1:], small[1:])
    padding = []
    for axis, first in enumerate((geometry.pad_top, geometry.pad_left)):
        kernel = weight.shape[axis]
        reach = (small[axis + 1] - 1) * strides[axis] + kernel
        last = reach - first - large[axis + 1]
        # The transpose pads the spread-out image by what the kernel reaches beyond its centre.
        padding.append((kernel - 1 - first, kernel - 1 - last) if transposed else (first, last))
    if not transposed:
        return lax.conv_general_dilated(x, weight, strides, padding, dimension_numbers=dimensions)
    flipped = weight[::-1, ::-1].transpose(0, 1, 3, 2)
    return lax.conv_general_dilated(
        x, flipped, (1, 1), padding, lhs_dilation=strides, dimension_numbers=dimensions
    )


class JaxPeer:
    """JAX's step under jit; with `scan` above 1, that many steps in one call."""

    def __init__(self, case: Case, scan: int = 1) -> None:
        self.case, self.scan = case, scan
        self.batch = case.training.batch_size
        self._lr = case.training.optimizer.learning_rate(0, 1, 1)
        model = case.model
        values = {
            name: jnp.asarray(model.backend.to_numpy(value))
            for name, value in model.parameters.values.items()
        }
        self.data = jnp.asarray(byte_images(case))
        # Every array of the carry is donated, so none may stand in it twice.
        second_moment = case.training.optimizer.second_moment
        copies = {n: jnp.array(v) for n, v in values.items()}
        moments = ({n: jnp.full_like(v, m) for n, v in values.items()} for m in (0, second_moment))
        self._carry = (copies, *moments, jnp.zeros((), jnp.int32), jax.random.key(0))
        self._run = jax.jit(self._many if scan > 1 else self._one, donate_argnums=0)
        self._compiled_loss = jax.jit(self._loss)

    def _bound_loss(self, values: dict[str, Any], x: Any, eps: Any) -> Any:
        """The mean of -bound (importance.E2) by the densities, whose constants cancel."""
        model = self.case.model
        objective, k = model.objective, model.objective.samples
        code = jnp.repeat(_apply(model.encoder, values, x), k, axis=0)
        mu, log_sigma = code[:, : model.latent], 0.5 * model.logvar_factor * code[:, model.latent :]
        z = mu + jnp.exp(log_sigma) * eps
        pixels = jnp.repeat(x.reshape(len(x), -1), k, axis=0)
        logits = _apply(model.decoder, values, z).reshape(pixels.shape)
        log_weights = jnp.sum(pixels * logits - jax.nn.softplus(logits), axis=1)
        log_weights += jnp.sum(0.5 * (eps**2 - z**2) + log_sigma, axis=1)
        log_weights = log_weights.reshape(-1, k)
        if objective.estimator == "importance":
            return jnp.log(k) - jnp.mean(jax.nn.logsumexp(log_weights, axis=1))
        return -jnp.mean(log_weights)

    def _loss(self, values: dict[str, Any], x: Any, eps: Any) -> Any:
        model = self.case.model
        objective = model.objective
        if objective.by_draws:
            return self._bound_loss(values, x, eps)
        code = _apply(model.encoder, values, x)
        divergence = 0.0
        if model.latent:
            mu, logvar = code[:, : model.latent], code[:, model.latent :]
            divergence = -0.5 * jnp.sum(1 + logvar - mu**2 - jnp.exp(logvar))
            code = mu + jnp.exp(0.5 * logvar) * eps
        output = _apply(model.decoder, values, code).reshape(x.shape)
        if objective.likelihood == "bernoulli":
            loss = jnp.sum(jax.nn.softplus(output) - x * output)
        else:
            loss = objective.error_weight * jnp.sum((output - x) ** 2)
        return (loss + objective.beta * divergence) / x.shape[0]

    def loss(self, x: np.ndarray, eps: np.ndarray) -> float:
        """The loss of given images (n, h, w, c) and noise with the present weights, compiled as
        what is timed."""
        return float(self._compiled_loss(self._carry[0], jnp.asarray(x), jnp.asarray(eps)))

    def _one(self, carry: Any, data: Any) -> Any:
        values, first, second, step, key = carry
        model, adam = self.case.model, self.case.training.optimizer
        key, noise_key, order_key, pixel_key = jax.random.split(key, 4)
        index = jax.random.randint(order_key, (self.batch,), 0, len(data))
        x = data[index].astype(jnp.float32) / 255
        if self.case.training.binarization == "stochastic":
            x = jax.random.bernoulli(pixel_key, x).astype(jnp.float32)
        shape = (self.batch * model.objective.samples, max(model.latent, 1))
        eps = jax.random.normal(noise_key, shape)
        gradients = jax.grad(self._loss)(values, x, eps)
        step = step + 1
        rate = self._lr / (1 - adam.beta1**step)
        root = jnp.sqrt(1 - adam.beta2**step)
        if adam.epsilon_hat:
            rate, root = rate * root, 1.0

        def update(p: Any, g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
            m = adam.beta1 * m + (1 - adam.beta1) * g
            v = adam.beta2 * v + (1 - adam.beta2) * g * g
            p = p * (1 - self._lr * adam.weight_decay)
            return p - rate * m / (jnp.sqrt(v) / root + adam.epsilon), m, v

        updated = {n: update(p, gradients[n], first[n], second[n]) for n, p in values.items()}
        values, first, second = ({n: t[i] for n, t in updated.items()} for i in range(3))
        return values, first, second, step, key

    def _many(self, carry: Any, data: Any) -> Any:
        convolutional = len(self.case.model.encoder.shapes[1]) == 3
        unroll = UNROLLED if convolutional or jax.default_backend() == "gpu" else 1

        def step(carry: Any, _: None) -> tuple[Any, None]:
            return self._one(carry, data), None

        return lax.scan(step, carry, None, self.scan, unroll=unroll)[0]

    def step(self) -> None:
        """One call: `scan` training steps."""
        self._carry = self._run(self._carry, self.data)

    def synchronize(self) -> None:
        """Waits for the device."""
        jax.block_until_ready(self._carry)
