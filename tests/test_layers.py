"""Layers and networks: shapes, errors, initial weights, fusion, and the gradients of whole models
against central differences."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import DIFFERENCES, BoundNetwork, assert_close, central_differences
from numpy.typing import NDArray

from minivae.errors import InputError
from minivae.gradcheck import TOLERANCE, check_gradients
from minivae.layers import (
    ELU,
    GELU,
    INITIALIZATIONS,
    LAYERS,
    ActivationLayer,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Flatten,
    JoinLabel,
    Layer,
    LeakyReLU,
    ReLU,
    Reshape,
    Shape,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
    WeightedLayer,
    layer_from_config,
)
from minivae.models import VAE, Autoencoder, Objective
from minivae.network import Network
from minivae.ops.philox import LATENT_STREAM, Noise
from minivae.ops.state import BETA, SCHEDULE_COLUMNS, new_state
from minivae.presets import PRESETS

EXACT = 1e-13  # By norm: float64, the same products in the same order or nearly so.

ACTIVATIONS: list[ActivationLayer] = [
    *(ReLU(), LeakyReLU(0.2), Tanh(), Sigmoid(), Softplus(), ELU(), GELU(), SiLU()),
]
FUSABLE = [layer for layer in ACTIVATIONS if layer.fusable]


def kind(layer: Layer) -> str:
    return layer.kind


# Shapes


@pytest.mark.parametrize(
    ("layer", "input_shape", "expected"),
    [
        (Dense(5), (7,), (5,)),
        (Flatten(), (3, 4, 2), (24,)),
        (Flatten(), (6,), (6,)),
        (Reshape((2, 3, 4)), (24,), (2, 3, 4)),
        (Reshape((24,)), (2, 3, 4), (24,)),
        (Tanh(), (3, 4, 2), (3, 4, 2)),
        (Conv2d(6, 3), (9, 7, 2), (7, 5, 6)),
        (Conv2d(6, 3, stride=2, padding=1), (28, 29, 1), (14, 15, 6)),
        (Conv2d(6, (2, 5), stride=(3, 1), padding=(0, 2)), (8, 7, 2), (3, 7, 6)),
        (Conv2d(6, 3, stride=2, padding="same"), (28, 29, 1), (14, 15, 6)),
        (Conv2d(6, 5, padding="same"), (3, 2, 1), (3, 2, 6)),
        (ConvTranspose2d(6, 3), (7, 5, 2), (9, 7, 6)),
        (ConvTranspose2d(6, 3, stride=2, padding=1), (14, 7, 2), (27, 13, 6)),
        (ConvTranspose2d(6, 3, stride=2, padding=1, output_padding=1), (14, 7, 2), (28, 14, 6)),
        (ConvTranspose2d(6, 3, stride=2, padding=1, output_padding=(1, 0)), (4, 4, 2), (8, 7, 6)),
        (ConvTranspose2d(6, 3, stride=2, padding=1, output_size=(28, 13)), (14, 7, 2), (28, 13, 6)),
        (ConvTranspose2d(6, 3, stride=2, padding=1, output_size=8), (4, 4, 2), (8, 8, 6)),
        (ConvTranspose2d(6, 3, stride=2, padding="same"), (14, 7, 2), (28, 14, 6)),
        (
            ConvTranspose2d(6, 3, stride=2, padding="same", output_size=(27, 13)),
            (14, 7, 2),
            (27, 13, 6),
        ),
    ],
    ids=str,
)
def test_a_layer_has_the_shape_that_its_definition_gives(
    layer: Layer, input_shape: Shape, expected: Shape
) -> None:
    assert layer.output_shape(input_shape) == expected


# TensorFlow's rule: ceil(size / stride) windows; of the padding that they need, half before the
# first pixel, rounded down, and the rest after the last.
SAME_PADDING = {
    # (size, kernel, stride): (windows, before, after)
    (28, 3, 2): (14, 0, 1),
    (7, 3, 2): (4, 1, 1),
    (5, 2, 1): (5, 0, 1),
    (6, 4, 1): (6, 1, 2),
    (6, 5, 3): (2, 1, 1),
    (7, 5, 3): (3, 2, 2),
    (8, 5, 3): (3, 1, 2),
    (5, 1, 2): (3, 0, 0),
    (6, 2, 3): (2, 0, 0),
}


@pytest.mark.parametrize(("sizes", "expected"), SAME_PADDING.items(), ids=str)
def test_same_padding_puts_the_odd_pixel_at_the_bottom_right(
    sizes: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    (size, kernel, stride), (windows, before, after) = sizes, expected
    same = BoundNetwork([Conv2d(3, kernel, stride=stride, padding="same")], (size, size, 2))
    padded_size = before + size + after
    explicit = BoundNetwork([Conv2d(3, kernel, stride=stride)], (padded_size, padded_size, 2))
    explicit.x[...] = np.pad(same.x, ((0, 0), (before, after), (before, after), (0, 0)))
    output = same.forward()
    assert output.shape[1:3] == (windows, windows)
    assert_close(output, explicit.forward(), EXACT)


@pytest.mark.parametrize(("size", "kernel", "stride"), list(SAME_PADDING), ids=str)
def test_a_transposed_same_convolution_is_the_adjoint_of_the_same_convolution(
    size: int, kernel: int, stride: int
) -> None:
    back = BoundNetwork([Conv2d(3, kernel, stride=stride, padding="same")], (size, size, 2))
    small = back.network.output_shape
    forth = BoundNetwork(
        [ConvTranspose2d(2, kernel, stride=stride, padding="same", output_size=size)], small, seed=1
    )
    weight = "network.0.weight"
    forth.parameters.values[weight][...] = back.parameters.values[weight]
    for bound in (back, forth):
        bound.parameters.values["network.0.bias"][...] = 0
    y, x = back.forward(), forth.forward()
    terms = np.sum(np.abs(y * forth.x)) + np.sum(np.abs(x * back.x))
    np.testing.assert_allclose(np.sum(y * forth.x), np.sum(x * back.x), rtol=0, atol=EXACT * terms)


# Bad arguments


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: Dense(0), "at least 1 unit"),
        (lambda: Dense(2.0), "at least 1 unit"),  # type: ignore[arg-type]
        (lambda: Reshape((-4, -5)), "sizes of at least 1"),
        (lambda: Conv2d(0, 3), "at least 1 channel"),
        (lambda: Conv2d(4, 0), "a kernel of at least 1 x 1"),
        (lambda: Conv2d(4, (3, 0)), "a kernel of at least 1 x 1"),
        (lambda: Conv2d(4, (3,)), "a kernel of at least 1 x 1, as one int or two"),
        (lambda: Conv2d(4, (3, 3, 3)), "a kernel of at least 1 x 1, as one int or two"),
        (lambda: Conv2d(4, 3.5), "a kernel of at least 1 x 1"),  # type: ignore[arg-type]
        (lambda: Conv2d(4, "3"), "a kernel of at least 1 x 1"),  # type: ignore[arg-type]
        (lambda: Conv2d(1.5, 3), "at least 1 channel"),  # type: ignore[arg-type]
        (lambda: Conv2d(4, 3, padding=(1, 1, 1)), "a padding of 0 or above"),
        (lambda: ConvTranspose2d(4, 3, output_size=(0, 5)), "an output_size of at least 1"),
        (lambda: ConvTranspose2d(4, 3, stride=2, output_padding=(1,)), "below the stride"),
        (lambda: Conv2d(4, 3, stride=0), "a stride of at least 1"),
        (lambda: Conv2d(4, 3, padding=-1), "a padding of 0 or above"),
        (lambda: Conv2d(4, 3, padding=(1, -1)), "a padding of 0 or above"),
        (lambda: Conv2d(4, 3, padding="valid"), 'or "same"'),
        (lambda: ConvTranspose2d(4, 3, stride=2, output_padding=2), "below the stride"),
        (lambda: ConvTranspose2d(4, 3, stride=2, output_padding=-1), "0 or above"),
        (
            lambda: ConvTranspose2d(4, 3, stride=2, output_padding=1, output_size=8),
            "without output_size",
        ),
        (
            lambda: ConvTranspose2d(4, 3, stride=2, output_padding=1, padding="same"),
            "without output_size",
        ),
        (lambda: LeakyReLU(-0.1), "a slope of 0 or above"),
        (lambda: LeakyReLU(math.nan), "a slope of 0 or above"),
        (lambda: LeakyReLU(math.inf), "a slope of 0 or above"),
    ],
)
def test_a_bad_argument_is_refused_with_what_was_expected(
    build: Callable[[], Layer], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        build()


@pytest.mark.parametrize(
    ("layer", "input_shape", "expected"),
    [
        (Dense(5), (3, 4, 2), "a vector \\(put Flatten before\\), got \\(3, 4, 2\\)"),
        (Reshape((5, 5, 1)), (24,), "an input of 25 elements, got shape \\(24,\\)"),
        (Conv2d(4, 3), (24,), "an image \\(h, w, c\\), got \\(24,\\)"),
        (Conv2d(4, 5), (4, 9, 1), "a kernel that fits in an image of \\(4, 9, 1\\)"),
        (ConvTranspose2d(4, 3), (24,), "an image \\(h, w, c\\), got \\(24,\\)"),
        (ConvTranspose2d(4, 3, stride=2, padding=1, output_size=29), (14, 14, 1), "output size"),
        (ConvTranspose2d(4, 3, stride=2, padding=1, output_size=26), (14, 14, 1), "output size"),
        (ConvTranspose2d(4, 1, padding=1), (2, 2, 1), "output size"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(
    layer: Layer, input_shape: Shape, expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        layer.output_shape(input_shape)


# Configuration


CONFIGURED = [
    *(Dense(7), Flatten(), Reshape((2, 3, 4)), LeakyReLU(0.3), JoinLabel(10)),
    *(Conv2d(4, 3), Conv2d(4, (3, 5), stride=(2, 1), padding=(1, 0)), Conv2d(4, 2, padding="same")),
    *(
        ConvTranspose2d(4, 3, stride=2, padding=1, output_padding=1),
        ConvTranspose2d(4, 3, stride=2, output_size=(9, 8)),
    ),
    *(layer for layer in ACTIVATIONS if not isinstance(layer, LeakyReLU)),
]


@pytest.mark.parametrize("layer", CONFIGURED, ids=str)
def test_a_layer_s_configuration_as_json_gives_the_layer_back(layer: Layer) -> None:
    assert layer_from_config(json.loads(json.dumps(layer.config()))) == layer


def test_every_layer_is_configured_in_a_test() -> None:
    assert {layer.kind for layer in CONFIGURED} == set(LAYERS)


@pytest.mark.parametrize(
    "config",
    [
        {"layer": "dens", "units": 3},
        {"units": 3},
        {"layer": "dense"},
        {"layer": "dense", "units": 3, "bias": False},
    ],
)
def test_a_configuration_that_is_no_layer_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(InputError, match="layer"):
        layer_from_config(config)


# Initial weights: (layer, input shape, fan in, fan out, the fan in that PyTorch takes)

FANS: list[tuple[WeightedLayer, Shape, int, int, int]] = [
    (Dense(400), (300,), 300, 400, 300),
    (Conv2d(64, (3, 5)), (9, 9, 32), 480, 960, 480),
    # A transposed convolution's k small channels feed its c large ones; PyTorch counts the latter.
    (ConvTranspose2d(32, (3, 5)), (9, 9, 64), 960, 480, 480),
]


def initial(layer: WeightedLayer, input_shape: Shape, scheme: str, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return layer.initialize(layer.parameter_shapes(input_shape), scheme, rng)


def assert_moments(array: np.ndarray, deviation: float, fourth: float) -> None:
    """Mean 0, `deviation`, and a fourth moment of `fourth` times its fourth power (uniform: 9/5,
    normal: 3). 30 000 draws or more: standard errors of the deviation below 0.5%, of the fourth
    moment below 2%; the bounds are 5 of them."""
    assert abs(np.mean(array)) < 5 * deviation / math.sqrt(array.size)
    assert np.std(array) == pytest.approx(deviation, rel=0.025)
    assert np.mean((array / deviation) ** 4) == pytest.approx(fourth, rel=0.1)


@pytest.mark.parametrize(("layer", "shape", "fan_in", "fan_out", "torch_fan_in"), FANS)
def test_torch_initialisation_is_uniform_within_one_over_root_fan_in(
    layer: WeightedLayer, shape: Shape, fan_in: int, fan_out: int, torch_fan_in: int
) -> None:
    values, bound = initial(layer, shape, "torch"), 1 / math.sqrt(torch_fan_in)
    assert_moments(values["weight"], bound / math.sqrt(3), 9 / 5)
    # Of n uniform numbers the largest misses the bound by one part in n.
    assert 0.999 * bound < np.abs(values["weight"]).max() <= bound
    assert 0.8 * bound < np.abs(values["bias"]).max() <= bound


@pytest.mark.parametrize(("layer", "shape", "fan_in", "fan_out", "torch_fan_in"), FANS)
def test_he_initialisation_is_normal_of_variance_two_over_fan_in(
    layer: WeightedLayer, shape: Shape, fan_in: int, fan_out: int, torch_fan_in: int
) -> None:
    assert_moments(initial(layer, shape, "he")["weight"], math.sqrt(2 / fan_in), 3)


@pytest.mark.parametrize(("layer", "shape", "fan_in", "fan_out", "torch_fan_in"), FANS)
def test_glorot_initialisation_is_uniform_by_both_fans(
    layer: WeightedLayer, shape: Shape, fan_in: int, fan_out: int, torch_fan_in: int
) -> None:
    weight, bound = initial(layer, shape, "glorot")["weight"], math.sqrt(6 / (fan_in + fan_out))
    assert_moments(weight, bound / math.sqrt(3), 9 / 5)
    assert np.abs(weight).max() <= bound


@pytest.mark.parametrize("layer", [fans[0] for fans in FANS], ids=kind)
def test_truncated_normal_initialisation_ends_at_two_deviations(layer: WeightedLayer) -> None:
    shape = next(fans[1] for fans in FANS if fans[0] is layer)
    weight = initial(layer, shape, "truncated-normal")["weight"]
    # The normal cut off at 2 has the variance 1 - 4 phi(2) / (2 Phi(2) - 1) = 0.7737 and the
    # fourth moment 3 variance - 16 phi(2) / (2 Phi(2) - 1) = 1.4161.
    assert_moments(weight, 0.02 * math.sqrt(0.7737), 1.4161 / 0.7737**2)
    assert np.abs(weight).max() <= 0.04


@pytest.mark.parametrize("scheme", ["he", "glorot", "truncated-normal"])
def test_other_initialisations_have_zero_biases(scheme: str) -> None:
    np.testing.assert_array_equal(initial(Dense(7), (5,), scheme)["bias"], 0)


@pytest.mark.parametrize("scheme", INITIALIZATIONS)
def test_initial_weights_are_a_function_of_the_seed(scheme: str) -> None:
    first, again, other = (
        VAE(
            [Flatten(), Dense(4)],
            [Dense(9)],
            Objective(),
            (3, 3, 1),
            initialization=scheme,
            seed=seed,
        )
        .to("reference")
        .tensors()["encoder.1.weight"]
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_an_unknown_initialisation_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'xavier', expected one of torch, he, glorot"):
        VAE([Flatten(), Dense(4)], [Dense(9)], Objective(), (3, 3, 1), initialization="xavier")


# Networks

WEIGHTED: dict[str, tuple[WeightedLayer, Shape]] = {
    "dense": (Dense(6), (5,)),
    "conv2d": (Conv2d(3, 3, stride=2, padding=1), (5, 4, 2)),
    "conv_transpose2d": (ConvTranspose2d(3, 3, stride=2, padding=1), (3, 2, 2)),
}


@pytest.mark.parametrize("weighted", WEIGHTED.values(), ids=WEIGHTED)
@pytest.mark.parametrize("activation", FUSABLE, ids=kind)
def test_a_fused_activation_equals_one_of_its_own(
    activation: ActivationLayer, weighted: tuple[WeightedLayer, Shape]
) -> None:
    layer, shape = weighted
    between = layer.output_shape(shape)
    # A reshape to the same shape changes nothing, but keeps the activation out of the layer; a
    # second layer on top carries the gradient through it.
    top = (Flatten(), Dense(3))
    fused = BoundNetwork([layer, activation, *top], shape)
    apart = BoundNetwork([layer, Reshape(between), activation, *top], shape)
    assert len(apart.bound.stages) == len(fused.bound.stages) + 1
    for theirs, ours in zip(
        apart.parameters.values.values(), fused.parameters.values.values(), strict=True
    ):
        theirs[...] = ours
    np.testing.assert_array_equal(apart.x, fused.x)
    assert_close(fused.forward(), apart.forward(), EXACT)
    gradients = zip(fused.backward().items(), apart.backward().values(), strict=True)
    for (name, ours), theirs in gradients:
        assert_close(ours, theirs, EXACT, name)


NETWORKS: dict[str, tuple[list[Layer], Shape]] = {
    "an activation alone": ([Tanh()], (4, 3, 2)),
    "an activation before all layers": ([GELU(), Dense(3)], (5,)),
    "two activations in a row": ([Dense(4), Sigmoid(), Softplus(), Dense(3)], (5,)),
    "a fused one, then GELU, then SiLU": ([Dense(4), Tanh(), GELU(), SiLU(), Dense(3)], (5,)),
    "GELU, then a fusable one": ([Dense(4), GELU(), ELU(), Dense(3)], (5,)),
    "SiLU last": ([Dense(4), SiLU()], (5,)),
    "an activation behind a flatten": ([Conv2d(2, 2), Flatten(), Sigmoid(), Dense(3)], (4, 3, 2)),
    "a fused one behind two views": (
        [Conv2d(2, 2), Tanh(), Flatten(), Reshape((2, 6)), Flatten(), Dense(3)],
        (4, 3, 2),
    ),
    "views first and last": ([Flatten(), Dense(6), Softplus(), Reshape((1, 2, 3))], (2, 2, 1)),
    "a flattened vector": ([Flatten(), Flatten(), Dense(4), Flatten(), Dense(2)], (5,)),
    "an image from a vector and back": (
        [
            *(
                Dense(12),
                Reshape((2, 2, 3)),
                ConvTranspose2d(2, 3, stride=2, padding="same"),
                ELU(),
            ),
            *(Conv2d(3, 3, stride=2, padding="same"), SiLU(), Flatten(), Dense(3)),
        ],
        (5,),
    ),
    **{
        f"conv2d and {activation.kind}": (
            [Conv2d(3, 3, stride=2, padding=1), activation, Conv2d(2, 2), activation],
            (7, 5, 2),
        )
        for activation in ACTIVATIONS
    },
    **{
        f"conv_transpose2d and {activation.kind}": (
            [
                ConvTranspose2d(2, 3, stride=2, padding=1),
                activation,
                ConvTranspose2d(1, 2),
                activation,
            ],
            (3, 2, 2),
        )
        for activation in ACTIVATIONS
    },
}


@pytest.mark.parametrize(("layers", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_a_network_s_gradients_agree_with_differences(layers: list[Layer], shape: Shape) -> None:
    network = BoundNetwork(layers, shape)
    gradients = network.backward()
    arrays = {"x": network.x, **network.parameters.values}
    for name, derived in gradients.items():
        assert_close(derived, central_differences(network.loss, arrays[name]), DIFFERENCES, name)


def test_a_view_is_memory_of_the_layer_below() -> None:
    network = BoundNetwork([Dense(6), Reshape((1, 2, 3))], (5,))
    assert np.shares_memory(network.bound.output, network.bound.stages[0].y)


def test_a_pass_that_is_not_asked_for_the_input_gradient_does_not_compute_it() -> None:
    model = VAE([Flatten(), Dense(4)], [Dense(9)], Objective(), (3, 3, 1)).to("reference")
    assert model.bind(2).encoder.stages[0].dz_below is None


def test_a_network_numbers_all_its_layers() -> None:
    network = Network("decoder", [Dense(6), ReLU(), Reshape((1, 2, 3)), Conv2d(1, 1)], (4,))
    assert list(network.parameter_shapes()) == [
        *("decoder.0.weight", "decoder.0.bias", "decoder.3.weight", "decoder.3.bias"),
    ]


# Whole models


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_s_gradients_agree_with_differences(name: str) -> None:
    for error in check_gradients(PRESETS[name].model()):
        assert error.error < TOLERANCE, error


def colour_model(activation: ActivationLayer, objective: Objective) -> VAE:
    """Odd-sized colour images, "same" padding, one activation throughout."""
    encoder: list[Layer] = [
        *(Conv2d(2, 3, stride=2, padding="same"), activation),
        *(Conv2d(3, (2, 5), stride=(3, 2), padding="same"), activation),
        *(Flatten(), Dense(4)),
    ]
    decoder: list[Layer] = [
        *(Dense(5 * 8 * 2), activation, Reshape((5, 8, 2))),
        *(ConvTranspose2d(2, (2, 5), stride=(3, 2), padding="same", output_size=(15, 16)),),
        activation,
        ConvTranspose2d(3, 3, stride=2, padding="same", output_size=(29, 31)),
    ]
    if objective.likelihood != "bernoulli":
        decoder.append(Sigmoid())
    return VAE(encoder, decoder, objective, (29, 31, 3))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=kind)
@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective("squared-error", weight=0.5, beta=3.0),
        Objective("gaussian", sigma=0.3, free_bits=0.01),
    ],
    ids=lambda objective: objective.likelihood,
)
def test_a_model_of_odd_colour_images_has_gradients_that_agree_with_differences(
    activation: ActivationLayer, objective: Objective
) -> None:
    for error in check_gradients(colour_model(activation, objective)):
        assert error.error < TOLERANCE, error


SMALL = (5, 4, 1)
ODD_MODELS: dict[str, Callable[[], Autoencoder]] = {
    "a head with an activation": lambda: VAE(
        [Flatten(), Dense(4), Tanh()], [Dense(20)], Objective(), SMALL
    ),
    "a head with GELU": lambda: VAE([Flatten(), Dense(4), GELU()], [Dense(20)], Objective(), SMALL),
    "a head reshaped": lambda: VAE(
        [Flatten(), Dense(4), Tanh(), Reshape((2, 2)), Flatten()], [Dense(20)], Objective(), SMALL
    ),
    "logits through an activation": lambda: VAE(
        [Flatten(), Dense(4)], [Dense(20), Tanh(), Reshape(SMALL)], Objective(), SMALL
    ),
    "logits through GELU": lambda: VAE(
        [Flatten(), Dense(4)], [Dense(20), GELU()], Objective(), SMALL
    ),
    "squared error of GELU": lambda: VAE(
        [Flatten(), Dense(4)], [Dense(20), GELU()], Objective("squared-error"), SMALL
    ),
    "an activation behind the output's reshape": lambda: VAE(
        [Flatten(), Dense(4)],
        [Dense(20), Reshape(SMALL), Sigmoid()],
        Objective("squared-error"),
        SMALL,
    ),
    "a decoder that begins with an activation": lambda: VAE(
        [Flatten(), Dense(4)], [ReLU(), Dense(20)], Objective(), SMALL
    ),
    "a code with an activation": lambda: Autoencoder(
        [Conv2d(2, 2), Tanh()], [ConvTranspose2d(1, 2)], Objective(), SMALL
    ),
    "a flattened code with an activation": lambda: Autoencoder(
        [Conv2d(2, 2), Tanh(), Flatten()], [Dense(20)], Objective(), SMALL
    ),
    "a code with GELU and a decoder with another": lambda: Autoencoder(
        [Flatten(), Dense(3), GELU()], [SiLU(), Dense(20), Sigmoid()], Objective("gaussian"), SMALL
    ),
    "a decoder of views only": lambda: Autoencoder(
        [Flatten(), Dense(6), Tanh(), Dense(20), Sigmoid()],
        [Reshape(SMALL)],
        Objective("squared-error"),
        SMALL,
    ),
    "an encoder of views only": lambda: Autoencoder(
        [Flatten()], [Dense(6), Tanh(), Dense(20)], Objective(), SMALL
    ),
    "one pixel, one latent dimension": lambda: VAE(
        [Flatten(), Dense(2)], [Dense(1)], Objective(), (1, 1, 1)
    ),
    "free bits": lambda: VAE(
        [Flatten(), Dense(8)], [Dense(20)], Objective(free_bits=0.05, beta=2.0), SMALL
    ),
    "no KL": lambda: VAE([Flatten(), Dense(8)], [Dense(20)], Objective(beta=0.0), SMALL),
}


@pytest.mark.parametrize("build", ODD_MODELS.values(), ids=ODD_MODELS)
def test_an_odd_model_s_gradients_agree_with_differences(build: Callable[[], Autoencoder]) -> None:
    for error in check_gradients(build()):
        assert error.error < TOLERANCE, error


def test_the_gradient_check_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from minivae.backends.reference import ReferenceBackend

    def wrong(x: NDArray, dz: NDArray, dw: NDArray, db: NDArray, *_: Any) -> None:
        dw[...] = 1.001 * (x.T @ dz)
        db[...] = dz.sum(axis=0)

    monkeypatch.setattr(ReferenceBackend, "dense_weight_gradient", staticmethod(wrong))
    model = VAE([Flatten(), Dense(4)], [Dense(20)], Objective(), SMALL)
    errors = {error.name: error.error for error in check_gradients(model)}
    wrong_ones = {name for name, error in errors.items() if not error < TOLERANCE}
    assert wrong_ones == {"encoder.1.weight", "decoder.0.weight"}


def test_the_gradient_check_sees_a_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    from minivae.backends.reference import ReferenceBackend

    def wrong(x: NDArray, dz: NDArray, dw: NDArray, db: NDArray, *_: Any) -> None:
        dw[...] = x.T @ dz
        db[...] = np.nan

    monkeypatch.setattr(ReferenceBackend, "dense_weight_gradient", staticmethod(wrong))
    model = VAE([Flatten(), Dense(4)], [Dense(20)], Objective(), SMALL)
    errors = {error.name: error.error for error in check_gradients(model)}
    assert not errors["decoder.0.bias"] < TOLERANCE


# Objectives


@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.5])
def test_a_gaussian_loss_with_its_constant_is_the_negative_log_density(sigma: float) -> None:
    objective, rng = Objective("gaussian", sigma=sigma), np.random.default_rng(0)
    x, y = rng.random(7), rng.random(7)
    loss = objective.error_weight * np.sum((y - x) ** 2) + objective.constant(7)
    density = np.exp(-((x - y) ** 2) / (2 * sigma**2)) / math.sqrt(2 * math.pi * sigma**2)
    assert loss == pytest.approx(-np.sum(np.log(density)), rel=1e-12)


@pytest.mark.parametrize("likelihood", ["bernoulli", "squared-error", "gaussian"])
def test_the_loss_is_the_mean_over_images_of_reconstruction_plus_beta_kl(likelihood: str) -> None:
    objective = Objective(likelihood, weight=0.7, sigma=0.4)
    model = VAE([Flatten(), Dense(4)], [Dense(20)], objective, SMALL).to("reference", np.float64)
    bound = model.bind(3)
    bound.x[...] = np.random.default_rng(0).random(bound.x.shape)
    schedule, totals = np.zeros((1, SCHEDULE_COLUMNS)), np.zeros(3)
    schedule[0, BETA] = 2.0
    bound.backend.sequence(
        *bound.forward_calls(Noise(0, LATENT_STREAM), schedule, new_state(), totals)
    )
    means = model.means(totals, 3)
    y = bound.decoder.output
    per_image = {
        "bernoulli": np.logaddexp(0, y) - bound.x * y,
        "squared-error": 0.7 * (y - bound.x) ** 2,
        "gaussian": (y - bound.x) ** 2 / 0.32 + 0.5 * math.log(2 * math.pi * 0.16),
    }[likelihood].sum(axis=1)
    assert means["reconstruction"] == pytest.approx(np.mean(per_image), rel=1e-12)
    assert means["kl"] == pytest.approx(np.mean(bound.kl.sum(axis=1)), rel=1e-12)
    assert means["loss"] == pytest.approx(means["reconstruction"] + 2 * means["kl"], rel=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"likelihood": "bernouli"},
        {"weight": 0.0},
        {"sigma": -1.0},
        {"beta": -0.1},
        {"beta": math.nan},
        {"beta": math.inf},
        {"beta_warmup_steps": -1},
        {"free_bits": -1.0},
    ],
    ids=str,
)
def test_a_bad_objective_is_refused_by_name(arguments: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(arguments))} is .*expected"):
        Objective(**arguments)


# Models that do not fit together


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (
            lambda: VAE([Flatten(), Dense(3)], [Dense(20)], Objective(), SMALL),
            "expected \\(2 d,\\)",
        ),
        (lambda: VAE([Conv2d(2, 2)], [Dense(20)], Objective(), SMALL), "expected \\(2 d,\\)"),
        (
            lambda: VAE([Flatten(), Dense(4)], [Dense(19)], Objective(), SMALL),
            "the decoder makes \\(19,\\), expected the 20 numbers",
        ),
        (lambda: VAE([], [Dense(20)], Objective(), SMALL), "at least one layer"),
        (
            lambda: VAE([Reshape((20,)), Flatten()], [Dense(20)], Objective(), SMALL),
            "the encoder computes nothing",
        ),
        (lambda: VAE([Flatten(), Dense(4)], [], Objective(), SMALL), "at least one layer"),
        (lambda: VAE([Flatten(), Dense(4)], [Dense(20)], Objective(), (5, 4)), "image_shape"),
        (
            lambda: VAE([Flatten(), Dense(4)], [Dense(20), Sigmoid()], Objective(), SMALL),
            "takes logits",
        ),
        (
            lambda: VAE(
                [Flatten(), Dense(4)], [Dense(20), Reshape(SMALL), Sigmoid()], Objective(), SMALL
            ),
            "takes logits",
        ),
        (
            lambda: VAE(
                [Flatten(), Dense(4)],
                [Dense(20), Sigmoid(), Reshape(SMALL)],
                Objective(),
                SMALL,
            ),
            "takes logits",
        ),
    ],
)
def test_a_model_that_does_not_fit_together_is_refused(
    build: Callable[[], Autoencoder], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        build()
