"""The mathematics: every primitive of `ops/` against central differences in float64 with a random
upstream gradient, against loops that spell out its definition, and the sampler by distribution.

Philox's known answers, and every other backend, are in test_backends.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from helpers import DIFFERENCES, assert_close, central_differences
from numpy.typing import NDArray

from minivae.ops.activations import (
    DERIVATIVE_FROM_INPUT,
    DERIVATIVE_FROM_OUTPUT,
    IDENTITY,
    KINDS,
    Activation,
    activation_backward,
    activation_forward,
)
from minivae.ops.adam import adam_update, clip_gradient
from minivae.ops.batch import gather_batch
from minivae.ops.conv import (
    ConvGeometry,
    conv2d_forward,
    conv2d_input_gradient,
    conv2d_weight_gradient,
    conv_transpose2d_forward,
    conv_transpose2d_input_gradient,
    conv_transpose2d_weight_gradient,
)
from minivae.ops.dense import dense_forward, dense_input_gradient, dense_weight_gradient
from minivae.ops.elbo import KL, LOSS, RECONSTRUCTION, bernoulli_loss, elbo_totals
from minivae.ops.elbo import squared_error_loss as squared_error
from minivae.ops.latent import latent_backward, latent_forward, split_head
from minivae.ops.philox import (
    BINARIZATION_STREAM,
    EVALUATION_STREAM,
    LATENT_STREAM,
    Noise,
    standard_normal,
)
from minivae.ops.state import BETA, EPOCH, FAILED, FIRST, INDEX, STEP, advance_state, new_state

EXACT = 1e-13  # By norm: float64 sums of some hundred products, in another order.

FUSABLE = [Activation(kind) for kind in DERIVATIVE_FROM_OUTPUT if kind != "leaky_relu"]
FUSABLE += [Activation("leaky_relu", slope) for slope in (0.0, 0.01, 0.2, 1.5)]
ACTIVATIONS = FUSABLE + [Activation(kind) for kind in DERIVATIVE_FROM_INPUT]
FLAT_SHAPES = [(1, 1), (3, 31), (7, 2, 3, 5)]


def name(activation: Activation) -> str:
    kind, slope = activation
    return f"{kind}-{slope}" if kind == "leaky_relu" else kind


def normal(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def activated(z: NDArray, activation: Activation) -> NDArray:
    y = np.full_like(z, np.nan)
    activation_forward(z, y, activation)
    return y


# Activations

DEFINITIONS: dict[str, Callable[[float], float]] = {
    "identity": lambda z: z,
    "relu": lambda z: z if z > 0 else 0.0,
    "tanh": lambda z: (math.exp(z) - math.exp(-z)) / (math.exp(z) + math.exp(-z)),
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "softplus": lambda z: math.log(1 + math.exp(z)),
    "elu": lambda z: z if z > 0 else math.exp(z) - 1,
    "gelu": lambda z: z * math.erfc(-z / math.sqrt(2)) / 2,
    "silu": lambda z: z / (1 + math.exp(-z)),
}


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_an_activation_is_its_definition(kind: str) -> None:
    z = np.append(normal(50) * 3, 0.0)
    expected = np.array([DEFINITIONS[kind](float(number)) for number in z])
    np.testing.assert_allclose(activated(z, Activation(kind)), expected, rtol=1e-12, atol=1e-15)


def test_leaky_relu_multiplies_negative_numbers_by_its_slope() -> None:
    z = np.array([-2.0, -0.5, 0.0, 3.0])
    np.testing.assert_array_equal(activated(z, Activation("leaky_relu", 0.2)), [-0.4, -0.1, 0, 3])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name)
@pytest.mark.parametrize("shape", FLAT_SHAPES, ids=str)
def test_an_activation_gradient_agrees_with_differences(
    activation: Activation, shape: tuple[int, ...]
) -> None:
    z, dy = normal(*shape, seed=1) * 2, normal(*shape, seed=2)
    y, dz = activated(z, activation), np.full_like(z, np.nan)
    needs_input = activation.kind in DERIVATIVE_FROM_INPUT
    activation_backward(z if needs_input else None, y, dy, dz, activation)
    expected = central_differences(lambda: np.sum(activated(z, activation) * dy), z)
    assert_close(dz, expected, DIFFERENCES)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name)
def test_an_activation_may_work_in_place(activation: Activation) -> None:
    z, dy = normal(5, 7), normal(5, 7, seed=1)
    y, dz = activated(z, activation), np.empty_like(z)
    activation_backward(z, y, dy, dz, activation)
    overwritten, gradient = z.copy(), dy.copy()
    activation_forward(overwritten, overwritten, activation)
    activation_backward(z, y, gradient, gradient, activation)
    np.testing.assert_array_equal(overwritten, y)
    np.testing.assert_array_equal(gradient, dz)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_activation_and_its_derivative_are_finite_far_out(
    activation: Activation, dtype: type
) -> None:
    z = np.array([-1e4, -100, -40, 0, 40, 100, 1e4], dtype)
    y = activated(z, activation)
    dz = np.full_like(z, np.nan)
    activation_backward(z, y, np.ones_like(z), dz, activation)
    assert np.isfinite(y).all()
    assert np.isfinite(dz).all()
    assert y.dtype == dz.dtype == dtype


def test_an_unknown_activation_is_refused_by_name() -> None:
    z = normal(3)
    with pytest.raises(ValueError, match="'swish' is not one of identity, relu"):
        activation_forward(z, z, Activation("swish"))
    with pytest.raises(ValueError, match="'swish' is not one of identity, relu"):
        activation_backward(z, z, z, z, Activation("swish"))


def test_every_kind_is_tested() -> None:
    assert {activation.kind for activation in ACTIVATIONS} == set(KINDS)


# Dense

DENSE_SHAPES = [(1, 1, 1), (3, 7, 5), (5, 1, 4), (2, 31, 1)]


@pytest.mark.parametrize("shape", DENSE_SHAPES, ids=str)
def test_a_dense_layer_is_its_sum(shape: tuple[int, int, int]) -> None:
    n, i, o = shape
    x, w, b, y = normal(n, i), normal(i, o), normal(o), np.full((n, o), np.nan)
    dense_forward(x, w, b, y, Activation("tanh"))
    for row, column in np.ndindex(n, o):
        z = b[column] + sum(x[row, k] * w[k, column] for k in range(i))
        assert y[row, column] == pytest.approx(math.tanh(z), rel=1e-12)


@pytest.mark.parametrize("activation", FUSABLE, ids=name)
@pytest.mark.parametrize("shape", DENSE_SHAPES, ids=str)
def test_dense_gradients_agree_with_differences(
    shape: tuple[int, int, int], activation: Activation
) -> None:
    n, i, o = shape
    # The input is itself the output of an activation, of z_below.
    z_below, w, b, dy = normal(n, i), normal(i, o), normal(o), normal(n, o, seed=3)
    y = np.full((n, o), np.nan)

    def loss() -> float:
        dense_forward(activated(z_below, activation), w, b, y, activation)
        return float(np.sum(y * dy))

    loss()
    x = activated(z_below, activation)
    dz, dx, dw, db = (np.full(array.shape, np.nan) for array in (dy, x, w, b))
    activation_backward(None, y, dy, dz, activation)
    dense_input_gradient(dz, w, x, dx, activation)
    dense_weight_gradient(x, dz, dw, db)
    for derived, array in ((dx, z_below), (dw, w), (db, b)):
        assert_close(derived, central_differences(loss, array), DIFFERENCES)


# Convolution and its transpose


class Windows(NamedTuple):
    """Sizes and geometry of a convolution from a large image to a small one."""

    large: tuple[int, int]
    small: tuple[int, int]
    kernel: tuple[int, int]
    geometry: ConvGeometry
    channels: tuple[int, int] = (2, 3)

    def tensors(self, seed: int = 0) -> tuple[NDArray, NDArray, NDArray]:
        """A large image, a weight and a small image, random."""
        c, k = self.channels
        shapes = ((2, *self.large, c), (*self.kernel, c, k), (2, *self.small, k))
        large, w, small = (normal(*shape, seed=seed + i) for i, shape in enumerate(shapes))
        return large, w, small


WINDOWS = {
    "1x1": Windows((3, 4), (3, 4), (1, 1), ConvGeometry(1, 1, 0, 0)),
    "1x1 stride 2": Windows((5, 6), (3, 3), (1, 1), ConvGeometry(2, 2, 0, 0)),
    "2x2": Windows((4, 5), (3, 4), (2, 2), ConvGeometry(1, 1, 0, 0)),
    "2x2 padded after": Windows((4, 5), (4, 5), (2, 2), ConvGeometry(1, 1, 0, 0)),
    "2x2 padded before": Windows((4, 5), (4, 5), (2, 2), ConvGeometry(1, 1, 1, 1)),
    "3x3": Windows((5, 4), (3, 2), (3, 3), ConvGeometry(1, 1, 0, 0)),
    "3x3 padded": Windows((5, 4), (5, 4), (3, 3), ConvGeometry(1, 1, 1, 1)),
    "3x3 stride 2 even": Windows((6, 4), (3, 2), (3, 3), ConvGeometry(2, 2, 1, 1)),
    "3x3 stride 2 odd": Windows((7, 5), (4, 3), (3, 3), ConvGeometry(2, 2, 1, 1)),
    "3x3 stride 2 padded after": Windows((6, 4), (3, 2), (3, 3), ConvGeometry(2, 2, 0, 0)),
    "3x3 stride 3": Windows((7, 8), (3, 3), (3, 3), ConvGeometry(3, 3, 1, 0)),
    "5x5 padded": Windows((5, 6), (5, 6), (5, 5), ConvGeometry(1, 1, 2, 2), (1, 2)),
    "5x5 larger than the image": Windows((3, 2), (3, 2), (5, 5), ConvGeometry(1, 1, 2, 2), (2, 1)),
    "5x5 stride 3": Windows((8, 7), (3, 2), (5, 5), ConvGeometry(3, 3, 1, 0), (1, 2)),
    "2x3 strides 1 and 2": Windows((4, 7), (3, 4), (2, 3), ConvGeometry(1, 2, 0, 1)),
    "3x1 strides 2 and 3": Windows((6, 7), (3, 3), (3, 1), ConvGeometry(2, 3, 1, 0)),
    "1x5 strides 3 and 1": Windows((4, 5), (2, 5), (1, 5), ConvGeometry(3, 1, 0, 2)),
    "2x2 stride 3 with pixels between": Windows((8, 7), (3, 2), (2, 2), ConvGeometry(3, 3, 0, 1)),
    "padding wider than the kernel": Windows((3, 3), (8, 7), (2, 2), ConvGeometry(1, 1, 3, 2)),
    "one channel": Windows((5, 5), (3, 3), (3, 3), ConvGeometry(2, 2, 1, 1), (1, 1)),
}
each_window = pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)


def naive_pairs(windows: Windows, tap: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """(row, column) in the large image and in the small one that meet at a tap (conv.E1)."""
    geometry, (height, width), (rows, columns) = windows.geometry, windows.large, windows.small
    pairs = []
    for p, q in np.ndindex(rows, columns):
        row = p * geometry.stride_h + tap[0] - geometry.pad_top
        column = q * geometry.stride_w + tap[1] - geometry.pad_left
        if 0 <= row < height and 0 <= column < width:
            pairs.append((row, column, p, q))
    return pairs


@each_window
def test_a_convolution_is_its_sum_over_windows(windows: Windows) -> None:
    x, w, small = windows.tensors()
    b, y = normal(w.shape[3]), np.full_like(small, np.nan)
    conv2d_forward(x, w, b, y, windows.geometry, IDENTITY)
    expected = np.zeros_like(small) + b
    for tap in np.ndindex(*windows.kernel):
        for row, column, p, q in naive_pairs(windows, tap):
            expected[:, p, q] += x[:, row, column] @ w[tap]
    assert_close(y, expected, EXACT)


@each_window
def test_a_transposed_convolution_adds_each_pixel_times_the_kernel(windows: Windows) -> None:
    large, w, x = windows.tensors()
    b, y = normal(w.shape[2]), np.full_like(large, np.nan)
    conv_transpose2d_forward(x, w, b, y, windows.geometry, IDENTITY)
    expected = np.zeros_like(large) + b
    for tap in np.ndindex(*windows.kernel):
        for row, column, p, q in naive_pairs(windows, tap):
            expected[:, row, column] += x[:, p, q] @ w[tap].T
    assert_close(y, expected, EXACT)


@each_window
def test_a_transposed_convolution_is_the_adjoint_of_the_convolution(windows: Windows) -> None:
    x, w, y = windows.tensors(seed=5)
    small, large = np.full_like(y, np.nan), np.full_like(x, np.nan)
    conv2d_forward(x, w, np.zeros(w.shape[3]), small, windows.geometry, IDENTITY)
    conv_transpose2d_forward(y, w, np.zeros(w.shape[2]), large, windows.geometry, IDENTITY)
    # The two inner products may cancel to little; what rounds is the size of their terms.
    terms = np.sum(np.abs(small * y)) + np.sum(np.abs(x * large))
    np.testing.assert_allclose(np.sum(small * y), np.sum(x * large), rtol=0, atol=EXACT * terms)


@each_window
@pytest.mark.parametrize("activation", [IDENTITY, Activation("tanh")], ids=name)
def test_convolution_gradients_agree_with_differences(
    windows: Windows, activation: Activation
) -> None:
    z_below, w, dy = windows.tensors(seed=1)
    b, y = normal(w.shape[3]), np.full_like(dy, np.nan)

    def loss() -> float:
        conv2d_forward(activated(z_below, activation), w, b, y, windows.geometry, activation)
        return float(np.sum(y * dy))

    loss()
    x = activated(z_below, activation)
    dz, dx, dw, db = (np.full(array.shape, np.nan) for array in (dy, x, w, b))
    activation_backward(None, y, dy, dz, activation)
    conv2d_input_gradient(dz, w, x, dx, windows.geometry, activation)
    conv2d_weight_gradient(x, dz, dw, db, windows.geometry)
    for derived, array in ((dx, z_below), (dw, w), (db, b)):
        assert_close(derived, central_differences(loss, array), DIFFERENCES)


@each_window
@pytest.mark.parametrize("activation", [IDENTITY, Activation("tanh")], ids=name)
def test_transposed_convolution_gradients_agree_with_differences(
    windows: Windows, activation: Activation
) -> None:
    dy, w, z_below = windows.tensors(seed=1)
    b, y = normal(w.shape[2]), np.full_like(dy, np.nan)

    def loss() -> float:
        x = activated(z_below, activation)
        conv_transpose2d_forward(x, w, b, y, windows.geometry, activation)
        return float(np.sum(y * dy))

    loss()
    x = activated(z_below, activation)
    dz, dx, dw, db = (np.full(array.shape, np.nan) for array in (dy, x, w, b))
    activation_backward(None, y, dy, dz, activation)
    conv_transpose2d_input_gradient(dz, w, x, dx, windows.geometry, activation)
    conv_transpose2d_weight_gradient(x, dz, dw, db, windows.geometry)
    for derived, array in ((dx, z_below), (dw, w), (db, b)):
        assert_close(derived, central_differences(loss, array), DIFFERENCES)


# Losses

LOSS_SHAPES = [(1, 1), (3, 7), (5, 31)]


@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=str)
def test_bernoulli_loss_is_the_negative_log_likelihood(shape: tuple[int, int]) -> None:
    logits, x = normal(*shape) * 3, np.random.default_rng(1).random(shape)
    loss = np.full(shape[0], np.nan)
    bernoulli_loss(logits, x, loss, np.empty(shape), 1.0)
    p = 1 / (1 + np.exp(-logits))
    expected = -np.sum(x * np.log(p) + (1 - x) * np.log(1 - p), axis=1)
    assert_close(loss, expected, EXACT)


@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=str)
def test_bernoulli_gradient_agrees_with_differences(shape: tuple[int, int]) -> None:
    logits, x, scale = normal(*shape) * 3, np.random.default_rng(1).random(shape), 0.37
    loss, dlogits, ignored = np.empty(shape[0]), np.full(shape, np.nan), np.empty(shape)

    def total() -> float:
        bernoulli_loss(logits, x, loss, ignored, scale)
        return float(scale * np.sum(loss))

    bernoulli_loss(logits, x, loss, dlogits, scale)
    assert_close(dlogits, central_differences(total, logits), DIFFERENCES)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bernoulli_loss_of_extreme_logits_is_finite_and_right(dtype: type) -> None:
    logits = np.array([[1e4, -1e4, 1e4, -1e4]], dtype).T
    x = np.array([[1, 0, 0, 1]], dtype).T
    loss, dlogits = np.full(4, np.nan, dtype), np.full((4, 1), np.nan, dtype)
    bernoulli_loss(logits, x, loss, dlogits, 0.5)
    np.testing.assert_array_equal(loss, [0, 0, 1e4, 1e4])
    np.testing.assert_array_equal(dlogits[:, 0], [0, 0, 0.5, -0.5])


@pytest.mark.parametrize("activation", FUSABLE, ids=name)
@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=str)
def test_squared_error_gradient_agrees_with_differences(
    shape: tuple[int, int], activation: Activation
) -> None:
    z, x, scale, weight = normal(*shape), normal(*shape, seed=1), 0.37, 1.7
    loss, dz, ignored = np.empty(shape[0]), np.full(shape, np.nan), np.empty(shape)

    def total() -> float:
        y = activated(z, activation)
        squared_error(y, x, loss, ignored, scale, weight, activation)
        return float(scale * np.sum(loss))

    squared_error(activated(z, activation), x, loss, dz, scale, weight, activation)
    assert_close(dz, central_differences(total, z), DIFFERENCES)


def test_squared_error_is_the_weighted_sum_of_squares_of_each_image() -> None:
    y, x, loss = np.array([[1.0, 2.0], [0.5, 0.0]]), np.array([[0.0, 4.0], [0.5, 3.0]]), np.empty(2)
    squared_error(y, x, loss, np.empty((2, 2)), 1.0, 0.5, IDENTITY)
    np.testing.assert_array_equal(loss, [2.5, 4.5])


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 7)], ids=str)
def test_latent_gradient_agrees_with_differences(shape: tuple[int, int]) -> None:
    n, d = shape
    head, dz, kl_weight = normal(n, 2 * d), normal(n, d, seed=1), normal(d, seed=2)
    z, kl, dhead = np.empty(shape), np.empty(shape), np.full((n, 2 * d), np.nan)
    noise, state = Noise(7, LATENT_STREAM), new_state(step=3)

    def loss() -> float:
        latent_forward(head, z, kl, noise, state)
        return float(np.sum(z * dz) + np.sum(kl * kl_weight))

    latent_backward(head, dz, kl_weight, dhead, noise, state)
    assert_close(dhead, central_differences(loss, head), DIFFERENCES)


def elbo_case(n: int, d: int, free_bits: float) -> tuple[NDArray, NDArray, Callable[[], NDArray]]:
    """Random KLs, the buffer of their weights, and a function that gives the batch's totals."""
    rng = np.random.default_rng([n, d])
    # Means of KL over the batch far from free_bits = 0.5, on both sides of it.
    kl = rng.random((n, d)) * np.where(np.arange(d) % 2, 0.2, 3.0)
    reconstruction, kl_weight = rng.random(n) * 100, np.full(d, np.nan)
    schedule, state = np.zeros((2, 4)), new_state()
    state[INDEX], schedule[1, BETA] = 1, 2.5

    def totals() -> NDArray:
        result = np.zeros(3)
        elbo_totals(reconstruction, kl, schedule, state, free_bits, kl_weight, result)
        return result

    return kl, kl_weight, totals


@pytest.mark.parametrize("free_bits", [0.0, 0.5])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 2), (5, 7)])
def test_kl_weight_is_the_gradient_of_the_loss_with_free_bits(
    n: int, d: int, free_bits: float
) -> None:
    kl, kl_weight, totals = elbo_case(n, d, free_bits)
    totals()
    expected = central_differences(lambda: totals()[LOSS] / n, kl)
    assert_close(np.broadcast_to(kl_weight, kl.shape), expected, DIFFERENCES)


def test_a_dimension_below_its_free_bits_has_no_weight() -> None:
    _, kl_weight, totals = elbo_case(5, 4, 0.5)
    totals()
    np.testing.assert_allclose(kl_weight, [2.5 / 5, 0, 2.5 / 5, 0], rtol=1e-15)


@pytest.mark.parametrize("free_bits", [0.0, 0.5])
def test_totals_are_sums_over_images_with_the_true_kl(free_bits: float) -> None:
    kl, _, totals = elbo_case(5, 4, free_bits)
    loss, reconstruction, total_kl = (totals()[index] for index in (LOSS, RECONSTRUCTION, KL))
    assert total_kl == pytest.approx(np.sum(kl), rel=1e-12)
    counted = 5 * np.sum(np.maximum(np.mean(kl, axis=0), free_bits))
    assert loss == pytest.approx(reconstruction + 2.5 * counted, rel=1e-12)


def test_totals_of_a_plain_autoencoder_are_its_reconstruction() -> None:
    totals = np.ones(3)
    elbo_totals(
        np.array([1.0, 2.0]),
        np.empty((2, 0)),
        np.ones((1, 4)),
        new_state(),
        0.0,
        np.empty(0),
        totals,
    )
    np.testing.assert_array_equal(totals, [4, 4, 1])


# The step that fails


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["reconstruction", "kl"])
def test_a_loss_that_is_not_finite_latches_and_adds_nothing(bad: float, where: str) -> None:
    tensors = {"reconstruction": np.ones(3), "kl": np.ones((3, 2))}
    state, totals = new_state(), np.array([5.0, 6.0, 7.0])

    def batch() -> None:
        schedule, kl_weight = np.ones((1, 4)), np.empty(2)
        elbo_totals(*tensors.values(), schedule, state, 0.0, kl_weight, totals)

    tensors[where].flat[1] = bad
    batch()
    assert state[FAILED] == 1
    tensors[where].flat[1] = 1.0
    batch()
    assert state[FAILED] == 1
    np.testing.assert_array_equal(totals, [5, 6, 7])


def test_after_a_failure_neither_parameters_nor_state_move() -> None:
    state = new_state(step=4, first=8)
    state[FAILED] = 1
    p, m, v = normal(5), normal(5, seed=1), np.abs(normal(5, seed=2))
    before = [array.copy() for array in (p, m, v, state)]
    adam_update(p, normal(5, seed=3), m, v, np.ones((1, 4)), state, 0.9, 0.999, 1e-8)
    advance_state(state, 32)
    for array, old in zip((p, m, v, state), before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_a_state_advances_by_a_step_a_row_and_a_batch() -> None:
    state = new_state(step=4, first=64, epoch=2)
    advance_state(state, 32)
    assert [state[i] for i in (STEP, INDEX, FIRST, EPOCH, FAILED)] == [5, 1, 96, 2, 0]


# The sampler, by its distribution


class Statistics(NamedTuple):
    """Statistics of a sampler, each in standard errors from what the head promises."""

    mean: float
    variance: float
    kl: float


def sampled_statistics(sampler: Callable[..., None], dtype: type = np.float64) -> Statistics:
    """How far the draws of a sampler are from N(mu, exp(logvar)): their mean, their variance, and
    the Monte-Carlo estimate of the KL, the mean of log q(z) - log p(z), from the closed form."""
    n = 40_000
    mu, logvar = np.array([0.0, -1.5, 2.0, 0.3]), np.array([0.0, -2.0, 0.7, -4.0])
    head = np.tile(np.concatenate([mu, logvar]), (n, 1)).astype(dtype)
    z, kl = np.full((n, 4), np.nan, dtype), np.full((n, 4), np.nan, dtype)
    sampler(head, z, kl, Noise(11, LATENT_STREAM), new_state(step=5))
    variance = np.exp(logvar)
    log_q = -0.5 * (np.log(2 * np.pi) + logvar + (z - mu) ** 2 / variance)
    log_p = -0.5 * (np.log(2 * np.pi) + z**2)
    estimates = log_q - log_p
    error = np.std(estimates, axis=0) / math.sqrt(n)
    # Where the posterior is the prior, each estimate is 0 and so is its standard error.
    kl_gap = np.abs(np.mean(estimates, axis=0) - np.mean(kl, axis=0)) / np.maximum(error, 1e-6)
    mean_gap = np.abs(np.mean(z, axis=0) - mu) / np.sqrt(variance / n)
    variance_gap = np.abs(np.var(z, axis=0) / variance - 1) / math.sqrt(2 / n)
    return Statistics(*(float(np.max(gap)) for gap in (mean_gap, variance_gap, kl_gap)))


# Twelve statistics, each beyond 4.5 standard errors with probability 7e-6; the seed is fixed.
FAR = 4.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_draws_have_the_mean_the_variance_and_the_kl_of_the_posterior(dtype: type) -> None:
    for statistic, gap in sampled_statistics(latent_forward, dtype)._asdict().items():
        assert gap < FAR, statistic


def with_variance_for_deviation(
    head: NDArray, z: NDArray, kl: NDArray, noise: Noise, state: NDArray
) -> None:
    """The planted bug: exp(logvar) where the deviation exp(logvar / 2) belongs."""
    latent_forward(head, z, kl, noise, state)
    mu, logvar = split_head(head)
    z[...] = mu + np.exp(logvar) * (z - mu) / np.exp(0.5 * logvar)


def with_halves_exchanged(
    head: NDArray, z: NDArray, kl: NDArray, noise: Noise, state: NDArray
) -> None:
    """The planted bug: log-variances first, then the means."""
    mu, logvar = split_head(head)
    latent_forward(np.concatenate([logvar, mu], axis=1), z, kl, noise, state)


def with_uniform_noise(
    head: NDArray, z: NDArray, kl: NDArray, noise: Noise, state: NDArray
) -> None:
    """The planted bug: noise of the right mean, but of the variance 1/3."""
    latent_forward(head, z, kl, noise, state)
    mu, logvar = split_head(head)
    z[...] = mu + np.exp(0.5 * logvar) * np.random.default_rng(0).uniform(-1, 1, z.shape)


@pytest.mark.parametrize(
    ("planted", "caught_by"),
    [
        (with_variance_for_deviation, {"variance", "kl"}),
        (with_halves_exchanged, {"mean", "variance", "kl"}),
        (with_uniform_noise, {"variance", "kl"}),
    ],
)
def test_the_statistics_catch_a_planted_bug(
    planted: Callable[..., None], caught_by: set[str]
) -> None:
    gaps = sampled_statistics(planted)._asdict()
    assert {statistic for statistic, gap in gaps.items() if not gap < FAR} == caught_by


def test_a_gradient_check_does_not_see_a_variance_taken_for_a_deviation() -> None:
    # Why the distribution is tested: the bug is differentiated as faithfully as the truth.
    head, dz = normal(3, 4), normal(3, 2, seed=1)
    z, kl = np.empty((3, 2)), np.empty((3, 2))
    noise, state = Noise(0, LATENT_STREAM), new_state()

    def loss() -> float:
        with_variance_for_deviation(head, z, kl, noise, state)
        return float(np.sum(z * dz))

    eps = standard_normal((3, 2), noise, 0, np.float64)
    derived = np.concatenate([dz, dz * eps * np.exp(head[:, 2:])], axis=1)
    assert_close(derived, central_differences(loss, head), DIFFERENCES)


def test_kl_is_zero_for_the_prior_and_positive_elsewhere() -> None:
    head = np.concatenate([np.zeros((1, 6)), normal(50, 6)])
    z, kl = np.empty((51, 3)), np.full((51, 3), np.nan)
    latent_forward(head, z, kl, Noise(0, LATENT_STREAM), new_state())
    np.testing.assert_array_equal(kl[0], 0)
    assert (kl[1:] > 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("deviations", [1, 2, 3])
def test_noise_falls_within_some_deviations_as_often_as_a_normal(
    deviations: int, dtype: type
) -> None:
    eps = standard_normal((20_000, 5), Noise(3, LATENT_STREAM), 9, dtype)
    expected = math.erf(deviations / math.sqrt(2))
    error = math.sqrt(expected * (1 - expected) / eps.size)
    assert abs(np.mean(np.abs(eps) < deviations) - expected) < FAR * error


def test_noise_of_another_seed_stream_step_row_or_column_is_unrelated() -> None:
    def draw(seed: int, stream: int, step: int) -> NDArray:
        return standard_normal((10_000, 6), Noise(seed, stream), step, np.float64)

    first = draw(1, LATENT_STREAM, 0)
    others = {
        "seed": draw(2, LATENT_STREAM, 0),
        "high word of the seed": draw(1 + 2**32, LATENT_STREAM, 0),
        "stream": draw(1, EVALUATION_STREAM, 0),
        "step": draw(1, LATENT_STREAM, 1),
        "row": np.roll(first, 1, axis=0),
        "column": np.roll(first, 1, axis=1),
        "squared column": np.roll(first, 1, axis=1) ** 2 - 1,
    }
    for what, other in others.items():
        correlation = np.mean(first * other) / np.std(other)
        assert abs(correlation) < FAR / math.sqrt(first.size), what


def test_noise_of_a_row_does_not_depend_on_the_batch() -> None:
    noise = Noise(1, LATENT_STREAM)
    whole, part = (standard_normal((rows, 7), noise, 2, np.float64) for rows in (9, 4))
    np.testing.assert_array_equal(whole[:4], part)


# Adam

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def adam_by_the_book(p: float, gradients: list[float], lr: float, decay: float) -> float:
    """The algorithms of the two papers, as they are printed, on one number."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        corrected_m, corrected_v = m / (1 - BETA1**t), v / (1 - BETA2**t)
        p = p - lr * decay * p - lr * corrected_m / (math.sqrt(corrected_v) + EPSILON)
    return p


def adam_steps(p: NDArray, gradients: NDArray, lr: float, decay: float) -> NDArray:
    p, m, v = p.copy(), np.zeros_like(p), np.zeros_like(p)
    state = new_state()
    ts = range(1, len(gradients) + 1)
    schedule = np.array(
        [[lr / (1 - BETA1**t), math.sqrt(1 - BETA2**t), 1 - lr * decay, 0] for t in ts]
    )
    for g in gradients:
        adam_update(p, g, m, v, schedule, state, BETA1, BETA2, EPSILON)
        advance_state(state, 1)
    return p


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_adam_steps_as_its_paper_says(steps: int, decay: float) -> None:
    p, gradients = normal(7), normal(steps, 7, seed=1)
    expected = [
        adam_by_the_book(float(p[i]), [float(g) for g in gradients[:, i]], 0.1, decay)
        for i in range(7)
    ]
    np.testing.assert_allclose(adam_steps(p, gradients, 0.1, decay), expected, rtol=1e-12)


def test_adam_moves_by_the_learning_rate_in_its_first_step() -> None:
    moved = adam_steps(np.zeros(2), np.array([[3.0, -0.02]]), 0.1, 0.0)
    # Up to epsilon over the gradient.
    np.testing.assert_allclose(moved, [-0.1, 0.1], rtol=1e-6)


def test_adam_leaves_a_zero_without_gradient_zero() -> None:
    np.testing.assert_array_equal(adam_steps(np.zeros(3), np.zeros((4, 3)), 0.1, 0.01), 0)


def test_a_gradient_above_the_bound_is_scaled_to_it() -> None:
    g, norm = normal(31) * 10, np.empty(1)
    before = g.copy()
    clip_gradient(g, 2.0, norm)
    assert norm[0] == pytest.approx(np.linalg.norm(before), rel=1e-12)
    assert np.linalg.norm(g) == pytest.approx(2.0, rel=1e-12)
    assert_close(g * norm[0] / 2, before, EXACT)


def test_a_gradient_within_the_bound_is_left_as_it_is() -> None:
    g, norm = normal(31), np.empty(1)
    before = g.copy()
    clip_gradient(g, 1e3, norm)
    np.testing.assert_array_equal(g, before)
    assert norm[0] == pytest.approx(np.linalg.norm(before), rel=1e-12)


# Batches


def gathered(
    data: NDArray,
    binarization: str,
    *,
    rows: int | None = None,
    permutation: NDArray | None = None,
    first: int = 0,
    epoch: int = 0,
    seed: int = 0,
    dtype: type = np.float32,
) -> NDArray:
    images = len(data)
    permutation = np.arange(images) if permutation is None else permutation
    x = np.full((rows or images, data.shape[1]), np.nan, dtype)
    noise = Noise(seed, BINARIZATION_STREAM)
    gather_batch(data, permutation, new_state(0, first, epoch), x, binarization, noise)
    return x


def bytes_data(images: int, pixels: int) -> NDArray[np.uint8]:
    return np.random.default_rng([images, pixels]).integers(0, 256, (images, pixels), np.uint8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_batch_is_the_permutation_s_images_scaled_to_one(dtype: type) -> None:
    data, permutation = bytes_data(9, 5), np.random.default_rng(0).permutation(9)
    x = gathered(data, "none", rows=4, permutation=permutation, first=3, dtype=dtype)
    # Division rounds once.
    expected = data[permutation[3:7]].astype(dtype) / dtype(255)
    np.testing.assert_array_equal(x, expected)


def test_float_data_enters_a_batch_as_it_is() -> None:
    data = np.random.default_rng(0).random((4, 5), np.float32)
    np.testing.assert_array_equal(gathered(data, "none"), data)


@pytest.mark.parametrize(
    "pixels",
    [
        np.array([[0, 127, 128, 255]], np.uint8),
        np.array([[0, np.nextafter(np.float32(0.5), np.float32(0)), 0.5, 1]], np.float32),
    ],
    ids=["uint8", "float32"],
)
def test_a_threshold_is_one_from_a_half_on(pixels: NDArray) -> None:
    np.testing.assert_array_equal(gathered(pixels, "threshold"), [[0, 0, 1, 1]])


@pytest.mark.parametrize("level", [1, 77, 128, 254])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_stochastic_pixel_is_one_as_often_as_its_grey_says(level: int, dtype: type) -> None:
    data = np.full((300, 301), level, np.uint8)
    if dtype is np.float32:
        data = (data / np.float32(255)).astype(np.float32)
    x = gathered(data, "stochastic")
    p = level / 255
    assert set(np.unique(x)) == {0, 1}
    assert abs(np.mean(x) - p) < FAR * math.sqrt(p * (1 - p) / x.size)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("full", [0, 1])
def test_a_stochastic_white_pixel_stays_white_and_a_black_one_black(full: int, dtype: type) -> None:
    white = 255 if dtype is np.uint8 else 1
    data = np.full((500, 1000), full * white, dtype)
    np.testing.assert_array_equal(gathered(data, "stochastic"), full)


def test_a_stochastic_pixel_depends_on_its_image_and_not_on_the_batch() -> None:
    data, rng = bytes_data(40, 13), np.random.default_rng(1)
    alone = gathered(data, "stochastic", epoch=3)
    permutation = rng.permutation(40)
    x = gathered(data, "stochastic", rows=11, permutation=permutation, first=17, epoch=3)
    np.testing.assert_array_equal(x, alone[permutation[17:28]])


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}], ids=["epoch", "seed"])
def test_stochastic_pixels_are_drawn_afresh(other: dict[str, int]) -> None:
    data = np.full((40, 50), 128, np.uint8)
    same = np.mean(gathered(data, "stochastic") == gathered(data, "stochastic", **other))
    assert abs(same - 0.5) < FAR * 0.5 / math.sqrt(data.size)
