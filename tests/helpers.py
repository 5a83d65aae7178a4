"""What several test modules share: errors by norm, central differences, a network on its own."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from minivae.backends.reference import ReferenceBackend
from minivae.kernels import WITH_TILES, Tile
from minivae.layers import Layer, Shape
from minivae.models import Autoencoder
from minivae.network import Network, NetworkBuffers, NetworkPass
from minivae.params import Parameters

STEP = 1e-5
DIFFERENCES = 1e-8
"""Tolerance, by norm, of a float64 gradient against central differences with STEP: what they cut
off is of the order of STEP^2 = 1e-10, what they round off of 2^-53 / STEP = 1e-11, both times
derivatives and sums of some hundred terms."""


def relative_error(actual: NDArray, expected: NDArray) -> float:
    """|actual - expected| / |expected| by norm; NaN, which no bound admits, unless both arrays hold
    finite numbers only."""
    assert actual.shape == expected.shape
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("nan")
    difference = np.linalg.norm(np.ravel(actual).astype(np.float64) - np.ravel(expected))
    size = np.linalg.norm(np.ravel(expected).astype(np.float64))
    return float(difference / size) if size else float(difference)


def assert_close(actual: NDArray, expected: NDArray, tolerance: float, what: str = "") -> None:
    error = relative_error(np.asarray(actual), np.asarray(expected))
    assert error <= tolerance, f"{what or 'array'}: off by {error:.2g} of the norm"


def central_differences(function: Callable[[], float], array: NDArray) -> NDArray:
    """The derivative of `function` with respect to each entry of `array`, which it reads."""
    assert array.dtype == np.float64
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        start = array[index]
        values = []
        for step in (STEP, -STEP):
            array[index] = start + step
            values.append(function())
        array[index] = start
        gradient[index] = (values[0] - values[1]) / (2 * STEP)
    return gradient


class BoundNetwork:
    """A network by itself, with random weights and a random input of `rows` rows."""

    def __init__(
        self,
        layers: Sequence[Layer],
        input_shape: Shape,
        rows: int = 2,
        *,
        seed: int = 0,
        backend: ReferenceBackend | None = None,
        dtype: DTypeLike = np.float64,
    ) -> None:
        self.backend = backend = backend or ReferenceBackend()
        self.rng = np.random.default_rng(seed)
        self.network = Network("network", list(layers), input_shape)
        self.parameters = Parameters(self.network.parameter_shapes(), backend, dtype)
        for name, value in self.network.initial_values("torch", self.rng).items():
            self.parameters.values[name][...] = value
        self.x = self.rng.standard_normal((rows, *input_shape)).astype(dtype)
        self.dx = np.full_like(self.x, np.nan)
        buffers = NetworkBuffers(self.network, backend, rows, dtype)
        self.bound = NetworkPass(self.network, backend, self.parameters, buffers, self.x, self.dx)
        self.upstream = self.rng.standard_normal(self.bound.output.shape).astype(dtype)

    def forward(self) -> NDArray:
        self.bound.forward()
        return self.bound.output

    def loss(self) -> float:
        """A loss whose gradient at the output is `upstream`."""
        return float(np.sum(self.forward() * self.upstream))

    def backward(self) -> dict[str, NDArray]:
        """The gradients of `loss` with respect to the input ("x") and to each parameter."""
        self.forward()
        self.backend.activation_backward(
            None,
            self.bound.output,
            self.upstream,
            self.bound.output_gradient,
            self.bound.output_activation,
        )
        calls = (*self.bound.input_gradient_calls, *self.bound.weight_gradient_calls)
        self.backend.sequence(*calls)
        return {"x": self.dx, **self.parameters.gradients}


def random_images(model: Autoencoder, rows: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((rows, *model.image_shape), np.float32)


def give_all_products(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """This tile, where their source has it, whatever their size."""
    for stem, tiles in WITH_TILES.items():
        if tile in tiles:
            monkeypatch.setitem(WITH_TILES, stem, (tile,))
