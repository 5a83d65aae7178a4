"""Exports compute the same numbers in PyTorch and in onnxruntime as the model does here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, random_images
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from minivae.errors import InputError
from minivae.export import to_onnx, to_torch
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
from minivae.models import VAE, Autoencoder, Objective
from minivae.ops.activations import sigmoid
from minivae.presets import PRESETS

ROWS = 3
TOLERANCE = 1e-5  # By norm: float32 sums of up to some thousand products, layer upon layer.
SQUARED = Objective("squared-error")
COLOUR = (9, 7, 3)

ACTIVATIONS: list[Layer] = [
    *(ReLU(), LeakyReLU(0.2), Tanh(), Sigmoid(), Softplus(), ELU(), GELU(), SiLU()),
]


def colour_vae(encoder: list[Layer], decoder: list[Layer], shape: Shape = COLOUR) -> VAE:
    """A VAE with two latent dimensions, the decoder beginning in a small image of two channels."""
    small = VAE([*encoder, Flatten(), Dense(4)], [Dense(int(np.prod(shape)))], SQUARED, shape)
    rows, columns, _ = small.encoder.shapes[len(encoder)]
    up: list[Layer] = [Dense(rows * columns * 2), Reshape((rows, columns, 2)), *decoder]
    return VAE(small.encoder.layers, up, SQUARED, shape)


def with_activation(activation: Layer) -> VAE:
    """Every place where an activation can stand."""
    encoder = [
        activation,
        Conv2d(4, 3, stride=2, padding=1),
        activation,
        Flatten(),
        activation,
        Dense(9),
    ]
    decoder = [
        Dense(60),
        activation,
        Reshape((5, 4, 3)),
        activation,
        ConvTranspose2d(3, 3, stride=2, padding=1),
    ]
    return VAE([*encoder, activation, Dense(4)], [*decoder, activation], SQUARED, COLOUR)


ODD_MODELS: dict[str, Autoencoder] = {
    "dense layers on colour images": VAE(
        [Flatten(), Dense(12), ReLU(), Dense(4)],
        [Dense(12), Tanh(), Dense(189), Sigmoid(), Reshape(COLOUR)],
        SQUARED,
        COLOUR,
    ),
    "one dense layer from image to image": Autoencoder(
        [Conv2d(2, 3), Tanh()],
        [Flatten(), Dense(189), Tanh(), Reshape(COLOUR)],
        SQUARED,
        COLOUR,
    ),
    "views of vectors in between": VAE(
        [Flatten(), Reshape((189,)), Flatten(), Dense(4)],
        [Dense(189), Reshape((189,)), Tanh(), Flatten(), Reshape(COLOUR)],
        SQUARED,
        COLOUR,
    ),
    "reshapes to the shape that is": Autoencoder(
        [Reshape(COLOUR), Conv2d(2, 3), Reshape((7, 5, 2))],
        [ConvTranspose2d(3, 3), Reshape(COLOUR)],
        SQUARED,
        COLOUR,
    ),
    "an image flattened and put back": Autoencoder(
        [Conv2d(2, 3), Flatten(), Tanh(), Reshape((7, 5, 2))],
        [ConvTranspose2d(3, 3)],
        SQUARED,
        COLOUR,
    ),
    "same padding": colour_vae(
        [
            Conv2d(4, 3, stride=2, padding="same"),
            ReLU(),
            Conv2d(5, (2, 4), stride=(1, 3), padding="same"),
        ],
        [
            ConvTranspose2d(4, (2, 4), stride=(1, 3), padding="same", output_size=(5, 4)),
            ReLU(),
            ConvTranspose2d(3, 3, stride=2, padding="same", output_size=(9, 7)),
        ],
    ),
    "same padding on even sizes": colour_vae(
        [Conv2d(4, 3, stride=2, padding="same"), ReLU(), Conv2d(5, 2, stride=2, padding="same")],
        [
            ConvTranspose2d(4, 2, stride=2, padding="same"),
            ReLU(),
            ConvTranspose2d(3, 3, stride=2, padding="same"),
        ],
        (12, 8, 3),
    ),
    "same padding with a kernel below the stride": colour_vae(
        [Conv2d(4, 1, stride=2, padding="same"), Conv2d(4, (2, 1), stride=(3, 2), padding="same")],
        [
            ConvTranspose2d(4, (2, 1), stride=(3, 2), padding="same", output_size=(5, 4)),
            ConvTranspose2d(3, 1, stride=2, padding="same", output_size=(9, 7)),
        ],
    ),
    "same padding lopsided along one axis": colour_vae(
        [
            Conv2d(4, (2, 3), stride=1, padding="same"),
            ELU(),
            Conv2d(4, (3, 1), stride=(1, 2), padding="same"),
        ],
        [
            ConvTranspose2d(4, (4, 1), stride=(1, 2), padding="same", output_size=(9, 7)),
            ConvTranspose2d(3, (1, 4), stride=1, padding="same"),
        ],
    ),
    "same padding lopsided along one axis, windows that miss the edge of the other": colour_vae(
        [Conv2d(4, 3, stride=(1, 2), padding="same"), ReLU()],
        [ConvTranspose2d(3, (4, 1), stride=(1, 2), padding="same")],
        (9, 8, 3),
    ),
    "integer padding, windows that miss the edge, output padding": colour_vae(
        [Conv2d(4, (2, 5), stride=(3, 1), padding=(0, 2)), ELU(), Conv2d(2, 1, stride=2)],
        [
            ConvTranspose2d(4, 1, stride=2),
            Softplus(),
            ConvTranspose2d(3, (2, 5), stride=(3, 1), padding=(0, 2), output_padding=(1, 0)),
        ],
    ),
    "an image as the code": Autoencoder(
        [Conv2d(4, 3, stride=2, padding=1), LeakyReLU(0.1)],
        [ConvTranspose2d(3, 3, stride=2, padding=1)],
        SQUARED,
        COLOUR,
    ),
    "colour logits": VAE([Flatten(), Dense(4)], [Dense(189), Reshape(COLOUR)], Objective(), COLOUR),
    "logits as a vector": VAE([Flatten(), Dense(4)], [Dense(63)], Objective(), (9, 7, 1)),
}
MODELS: dict[str, Callable[[], Autoencoder]] = {
    **{name: preset.model for name, preset in PRESETS.items()},
    **{
        f"{activation.kind} everywhere": lambda activation=activation: with_activation(activation)
        for activation in ACTIVATIONS
    },
    **{name: lambda model=model: model for name, model in ODD_MODELS.items()},
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)

Function = Callable[[NDArray], NDArray]


def channels_first(images: NDArray) -> NDArray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if images.ndim == 4 else images


def assert_same_numbers(model: Autoencoder, encoder: Function, decoder: Function) -> None:
    """`encoder` and `decoder` take and give arrays with channels first; `decoder` mean images."""
    model.to("reference")
    images = random_images(model, ROWS)
    codes = model.encode(images)
    codes = np.concatenate(codes, axis=1) if isinstance(model, VAE) else codes
    assert_close(encoder(channels_first(images)), channels_first(codes), TOLERANCE, "codes")
    rng = np.random.default_rng(1)
    codes = rng.standard_normal((ROWS, *model.code_shape)).astype(np.float32)
    expected = model.decode(codes)
    decoded = decoder(channels_first(codes))
    if decoded.ndim == 2:
        decoded = decoded.reshape(ROWS, *model.image_shape).transpose(0, 3, 1, 2)
    assert_close(decoded, channels_first(expected), TOLERANCE, "images")


# PyTorch


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="the extra `peers` is not installed")


def assert_torch_computes_the_same(model: Autoencoder, module: Any, torch: Any) -> None:
    def function(part: Any) -> Function:
        def call(array: NDArray) -> NDArray:
            with torch.no_grad():
                return part(torch.from_numpy(array)).numpy()

        return call

    def mean_images(codes: NDArray) -> NDArray:
        output = function(module.decoder)(codes)
        return sigmoid(output) if model.objective.likelihood == "bernoulli" else output

    assert_same_numbers(model, function(module.encoder), mean_images)


def module_of(torch: Any, encoder: Any, decoder: Any) -> Any:
    module = torch.nn.Module()
    module.encoder, module.decoder = encoder, decoder
    return module


def load_into(module: Any, path: Path, torch: Any) -> None:
    tensors = {name: torch.from_numpy(tensor) for name, tensor in load_file(path).items()}
    module.load_state_dict(tensors, strict=True)


@pytest.mark.peers
@each_model
def test_the_sequential_that_the_file_defines_computes_the_same(
    build: Callable[[], Autoencoder], tmp_path: Path, torch: Any
) -> None:
    model, path = build(), tmp_path / "model.safetensors"
    to_torch(model.to("reference"), path)
    with safe_open(path, "np") as file:
        definitions = file.metadata()
    assert set(definitions) == {"encoder", "decoder"}
    names = dict(vars(torch.nn))
    parts = (eval(definitions[part], names) for part in ("encoder", "decoder"))
    module = module_of(torch, *parts)
    load_into(module, path, torch)
    assert_torch_computes_the_same(model, module, torch)


@pytest.mark.peers
def test_a_sequential_of_the_same_layers_loads_the_conv_vae(tmp_path: Path, torch: Any) -> None:
    nn, model, path = torch.nn, PRESETS["mnist-conv"].model(), tmp_path / "model.safetensors"
    to_torch(model.to("reference"), path)
    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(7 * 7 * 64, 32),
    )
    decoder = nn.Sequential(
        nn.Linear(16, 7 * 7 * 64),
        nn.Unflatten(1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 64, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 3, padding=1),
        nn.Sigmoid(),
    )
    module = module_of(torch, encoder, decoder)
    load_into(module, path, torch)
    assert_torch_computes_the_same(model, module, torch)


@pytest.mark.peers
def test_a_sequential_of_the_same_layers_loads_the_dense_vae(tmp_path: Path, torch: Any) -> None:
    nn, model, path = torch.nn, PRESETS["fashion-dense"].model(), tmp_path / "model.safetensors"
    to_torch(model.to("reference"), path)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 20))
    decoder = nn.Sequential(
        nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 784), nn.Unflatten(1, (1, 28, 28))
    )
    module = module_of(torch, encoder, decoder)
    load_into(module, path, torch)
    assert_torch_computes_the_same(model, module, torch)


def test_a_lopsided_same_padding_is_a_zero_pad_of_its_own(tmp_path: Path) -> None:
    model = ODD_MODELS["same padding on even sizes"].to("reference")
    _, encoder, decoder = to_torch(model, tmp_path / "model.safetensors")
    assert encoder.startswith("encoder = Sequential(ZeroPad2d((0, 1, 0, 1)), Conv2d(3, 4, (3, 3)")
    assert decoder.endswith("ZeroPad2d((0, -1, 0, -1)))")


# What has no counterpart with channels first


def test_a_version_in_the_name_of_an_onnx_file_stays(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    model = PRESETS["glyphs"].model(latent=2, hidden=(8,))
    for name in ("vae-0.1", "vae-0.2.onnx"):
        to_onnx(model, tmp_path / name)
    parts = {path.name for path in tmp_path.iterdir()}
    assert parts == {f"vae-0.{i}.{part}.onnx" for i in (1, 2) for part in ("encoder", "decoder")}


@pytest.mark.parametrize("export", [to_torch, to_onnx])
@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        ([Reshape((189,)), Dense(4)], [Dense(189)]),
        ([Reshape((7, 9, 3)), Flatten(), Dense(4)], [Dense(189)]),
        ([Flatten(), Reshape((7, 9, 3)), Flatten(), Dense(4)], [Dense(189)]),
        ([Conv2d(2, 3), Flatten()], [Dense(189)]),
        ([Flatten(), Dense(4)], [Dense(189), Reshape(COLOUR), Flatten()]),
        ([Flatten(), Dense(4)], [Dense(189), Reshape((3, 21, 3))]),
    ],
    ids=["to a vector", "reshaped", "flattened and reshaped", "code", "output", "other image"],
)
def test_an_order_of_elements_that_channels_first_lacks_is_refused(
    encoder: list[Layer], decoder: list[Layer], export: Callable[..., object], tmp_path: Path
) -> None:
    if export is to_onnx:
        pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    model = Autoencoder(encoder, decoder, SQUARED, COLOUR).to("reference")
    with pytest.raises(InputError, match="no counterpart with channels first"):
        export(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


# ONNX


@pytest.fixture(scope="module")
def runtime() -> Any:
    pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    return pytest.importorskip("onnxruntime", reason="the extra `test` is not installed")


@each_model
def test_onnxruntime_computes_the_same(
    build: Callable[[], Autoencoder], tmp_path: Path, runtime: Any
) -> None:
    def function(path: str) -> Function:
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda array: session.run(None, {"input": array})[0]

    model = build().to("reference")
    written = to_onnx(model, tmp_path / "model.onnx")
    assert written == [str(tmp_path / f"model.{part}.onnx") for part in ("encoder", "decoder")]
    assert_same_numbers(model, *map(function, written))


def test_a_float64_model_is_an_onnx_graph_in_float32(tmp_path: Path, runtime: Any) -> None:
    model = with_activation(Tanh()).to("reference", np.float64)
    path, _ = to_onnx(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = random_images(model, ROWS)
    expected = np.concatenate(model.encode(images), axis=1)
    assert_close(session.run(None, {"input": channels_first(images)})[0], expected, TOLERANCE)


def test_an_onnx_graph_takes_any_number_of_rows(tmp_path: Path, runtime: Any) -> None:
    model = ODD_MODELS["same padding"].to("reference")
    path, _ = to_onnx(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (1, 7):
        images = channels_first(random_images(model, rows))
        assert session.run(None, {"input": images})[0].shape == (rows, 4)
