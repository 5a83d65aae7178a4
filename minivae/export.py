"""A model for other frameworks: PyTorch's names and layouts in safetensors, or ONNX graphs.

Both see images as N x C x H x W. Convolution weights therefore go from (kh, kw, c, k) to
(k, c, kh, kw), dense weights from (in, out) to (out, in), and a dense layer that reads a flattened
image, or whose output becomes one, has that axis reordered from H W C to C H W.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .files import replacing
from .layers import (
    ActivationLayer,
    Convolution,
    ConvTranspose2d,
    Dense,
    Flatten,
    JoinLabel,
    Layer,
    LeakyReLU,
    Reshape,
    Shape,
    WeightedLayer,
)
from .models import VAE, Autoencoder
from .network import VIEWS, Network

ACTIVATION_MODULES = {
    "relu": "ReLU",
    "leaky_relu": "LeakyReLU",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "softplus": "Softplus",
    "elu": "ELU",
    "gelu": "GELU",
    "silu": "SiLU",
}


class Module(NamedTuple):
    """One module of a torch.nn.Sequential: its class, constructor arguments and tensors."""

    name: str
    arguments: dict[str, Any]
    tensors: dict[str, NDArray]

    def __str__(self) -> str:
        arguments = ", ".join(
            str(value) if name.isdigit() else f"{name}={value}"
            for name, value in self.arguments.items()
        )
        return f"{self.name}({arguments})"


def _positional(*values: Any) -> dict[str, Any]:
    return {str(index): value for index, value in enumerate(values)}


def _channels_first(shape: Shape) -> NDArray[np.int64]:
    """For each element in C H W order, its index in H W C order."""
    return np.arange(math.prod(shape)).reshape(shape).transpose(2, 0, 1).reshape(-1)


def _image_shape_after(network: Network, index: int) -> Shape | None:
    """The image that the vector after layer `index` is reshaped to, if only activations and views
    lie between."""
    for follower in range(index + 1, len(network.layers)):
        layer, shape = network.layers[follower], network.shapes[follower + 1]
        if len(shape) == 3 and isinstance(layer, VIEWS):
            return shape
        if not isinstance(layer, (ActivationLayer, *VIEWS)):
            return None
    return None


def _image_shape_before(network: Network, index: int) -> Shape | None:
    """The image that the vector before layer `index` was flattened from, if only activations and
    views lie between."""
    for before in range(index - 1, -1, -1):
        layer, shape = network.layers[before], network.shapes[before]
        if len(shape) == 3 and isinstance(layer, VIEWS):
            return shape
        if not isinstance(layer, (ActivationLayer, *VIEWS)):
            return None
    return None


def modules(network: Network, values: dict[str, NDArray]) -> list[Module]:
    """The network as the modules of a torch.nn.Sequential.

    Args:
        values: the network's parameters by name, in minivae's layouts.

    Raises InputError for a reshape, or an output, that has no counterpart with channels first.
    """
    _check_output(network)
    result: list[Module] = []
    for index, layer in enumerate(network.layers):
        tensors = {}
        if isinstance(layer, WeightedLayer):
            prefix = f"{network.name}.{index}"
            tensors = {name: values[f"{prefix}.{name}"] for name in ("weight", "bias")}
        shapes = network.shapes[index : index + 2]
        if isinstance(layer, Dense):
            result.append(_dense(network, index, tensors))
        elif isinstance(layer, Convolution):
            result += _convolution(layer, shapes[0], shapes[1], tensors)
        else:
            result.append(_without_weights(network, index, layer))
    return result


def _check_output(network: Network) -> None:
    """Raises InputError if the output is a flattened image, whose order nobody could restore."""
    image = _image_shape_before(network, len(network.layers))
    if len(network.output_shape) == 1 and image and image[2] > 1 and image[0] * image[1] > 1:
        raise InputError(
            f"{network.name}: a flattened image {image} as output has no counterpart with channels "
            "first: leave out the last Flatten, or put a Dense after it"
        )


def _dense(network: Network, index: int, tensors: dict[str, NDArray]) -> Module:
    weight, bias = tensors["weight"], tensors["bias"]
    before, after = _image_shape_before(network, index), _image_shape_after(network, index)
    if before is not None:
        weight = weight[_channels_first(before)]
    if after is not None:
        order = _channels_first(after)
        weight, bias = weight[:, order], bias[order]
    return Module("Linear", _positional(*weight.shape), {"weight": weight.T, "bias": bias})


def _convolution(
    layer: Convolution, input_shape: Shape, output_shape: Shape, tensors: dict[str, NDArray]
) -> Iterator[Module]:
    transposed = isinstance(layer, ConvTranspose2d)
    large, small = (output_shape, input_shape) if transposed else (input_shape, output_shape)
    geometry = layer.geometry(large, small)
    kernel, stride, _ = zip(*layer.axes(), strict=True)
    before = (geometry.pad_top, geometry.pad_left)
    # What the last window reaches beyond the image; negative where it does not reach the edge.
    after = [
        (small[axis] - 1) * stride[axis] + kernel[axis] - large[axis] - before[axis]
        for axis in (0, 1)
    ]
    arguments = _positional(input_shape[2], output_shape[2], kernel)
    arguments["stride"] = stride
    weights = {"weight": tensors["weight"].transpose(3, 2, 0, 1), "bias": tensors["bias"]}
    # PyTorch pads both ends of an axis alike, which is too little if the end needs more.
    lopsided = any(last > first for first, last in zip(before, after, strict=True))
    edges = (before[1], after[1], before[0], after[0])
    if transposed and not lopsided:
        missing = tuple(first - last for first, last in zip(before, after, strict=True))
        extra = {"padding": before, "output_padding": missing}
        yield Module("ConvTranspose2d", arguments | extra, weights)
    elif transposed:
        # Pixels beyond the last window hold the bias: output_padding adds it, a zero pad would not.
        missing = tuple(max(-last, 0) for last in after)
        yield Module("ConvTranspose2d", arguments | {"output_padding": missing}, weights)
        yield Module("ZeroPad2d", _positional(tuple(-max(edge, 0) for edge in edges)), {})
    else:
        if lopsided:
            yield Module("ZeroPad2d", _positional(tuple(max(edge, 0) for edge in edges)), {})
        yield Module("Conv2d", arguments | ({} if lopsided else {"padding": before}), weights)


def _without_weights(network: Network, index: int, layer: Layer) -> Module:
    before, after = network.shapes[index : index + 2]
    if isinstance(layer, JoinLabel):
        raise InputError(
            f"{network.name}.{index}: a conditional model has a label beside its input, which "
            "cannot be exported"
        )
    if isinstance(layer, Flatten):
        return Module("Flatten", {}, {})
    if isinstance(layer, Reshape):
        if before == after:
            return Module("Identity", {}, {})
        image = _image_shape_before(network, index)
        if len(before) != 1 or (len(after) == 3 and image not in (None, after)):
            raise InputError(
                f"{network.name}.{index}: reshaping {image or before} to {after} has no "
                "counterpart with channels first"
            )
        shape = (after[2], after[0], after[1]) if len(after) == 3 else after
        return Module("Unflatten", _positional(1, shape), {})
    arguments = {"0": layer.slope} if isinstance(layer, LeakyReLU) else {}
    return Module(ACTIVATION_MODULES[layer.kind], arguments, {})


def _networks(model: Autoencoder) -> list[tuple[Network, list[Module]]]:
    values = {
        name: model.backend.to_numpy(value) for name, value in model.parameters.values.items()
    }
    if isinstance(model, VAE) and model.logvar_factor != 1:
        # Whoever reads the file expects a log-variance.
        head = f"encoder.{len(model.encoder.layers) - 1}"
        if f"{head}.weight" not in values:
            raise InputError(f"export: a {model.head} head must come from a dense layer")
        for name in (f"{head}.weight", f"{head}.bias"):
            values[name][..., model.latent :] *= model.logvar_factor
    shape = model.decoder.output_shape
    if len(shape) == 3 and shape != model.image_shape:
        raise InputError(
            f"decoder: an output of {shape} for images of {model.image_shape} has no counterpart "
            "with channels first"
        )
    return [(network, modules(network, values)) for network in (model.encoder, model.decoder)]


def to_torch(model: Autoencoder, path: Path) -> list[str]:
    """Writes a safetensors file for `load_state_dict` of a module whose members `encoder` and
    `decoder` are torch.nn.Sequential. Returns the file's name and the two definitions, which its
    metadata hold as well. A decoder for the Bernoulli likelihood ends in logits. Raises InputError
    for a layer without a counterpart in torch.nn.Sequential."""
    from safetensors.numpy import save

    tensors, definitions = {}, {}
    for network, sequence in _networks(model):
        listing = ", ".join(map(str, sequence))
        definitions[network.name] = f"Sequential({listing})"
        for index, module in enumerate(sequence):
            for name, tensor in module.tensors.items():
                tensors[f"{network.name}.{index}.{name}"] = np.ascontiguousarray(tensor)
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, definitions))
    return [str(path), *(f"{name} = {text}" for name, text in definitions.items())]


def to_onnx(model: Autoencoder, path: Path) -> list[str]:
    """Writes `NAME.encoder.onnx`, from images (n, c, h, w) to the encoder's output, and
    `NAME.decoder.onnx`, from codes to mean images, for a path `NAME.onnx`, both with a dynamic
    batch axis. Returns the two paths.

    Raises InputError if the package onnx is missing, the path is a folder, or a layer has no
    counterpart in ONNX with channels first.
    """
    try:
        import onnx
    except ImportError:
        raise InputError("--to onnx needs the package onnx: pip install 'minivae[onnx]'") from None
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file's name")
    written = []
    for network, sequence in _networks(model):
        if network is model.decoder and model.objective.likelihood == "bernoulli":
            sequence.append(Module("Sigmoid", {}, {}))
        target = path.with_name(f"{path.name.removesuffix('.onnx')}.{network.name}.onnx")
        with replacing(target) as temporary:
            temporary.write_bytes(_onnx_graph(network, sequence).SerializeToString())
        onnx.checker.check_model(str(target))
        written.append(str(target))
    return written


def _onnx_graph(network: Network, sequence: list[Module]) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, array: NDArray) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def tensor(name: str, array: NDArray) -> str:
        return constant(name, array.astype(np.float32))

    current = "input"
    for index, module in enumerate(sequence):
        name = f"{network.name}.{index}"
        output = "output" if index == len(sequence) - 1 else name
        inputs = [current, *(tensor(f"{name}.{k}", v) for k, v in module.tensors.items())]
        operator, attributes, operands = _onnx_operator(module)
        inputs += [constant(f"{name}.{k}", v) for k, v in operands.items()]
        if module.name == "SiLU":
            nodes.append(helper.make_node("Sigmoid", [current], [f"{name}.sigmoid"]))
            inputs.append(f"{name}.sigmoid")
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        current = output

    def value(name: str, shape: Shape) -> Any:
        shape = (shape[2], *shape[:2]) if len(shape) == 3 else shape
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape])

    graph = helper.make_graph(
        nodes,
        network.name,
        [value("input", network.input_shape)],
        [value("output", network.output_shape)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _onnx_operator(module: Module) -> tuple[str, dict[str, Any], dict[str, NDArray]]:
    """The operator, its attributes and its constant operands beside the module's tensors."""
    arguments = module.arguments
    if module.name == "Linear":
        return "Gemm", {"transB": 1}, {}
    if module.name in ("Conv2d", "ConvTranspose2d"):
        attributes = {"strides": arguments["stride"], "kernel_shape": arguments["2"]}
        attributes["pads"] = tuple(arguments.get("padding", (0, 0))) * 2
        if "output_padding" in arguments:
            attributes["output_padding"] = arguments["output_padding"]
        return ("Conv" if module.name == "Conv2d" else "ConvTranspose"), attributes, {}
    if module.name == "ZeroPad2d":
        left, right, top, bottom = arguments["0"]
        return "Pad", {}, {"pads": np.array([0, 0, top, left, 0, 0, bottom, right])}
    if module.name == "Unflatten":
        return "Reshape", {}, {"shape": np.array([0, *arguments["1"]])}
    if module.name == "LeakyReLU":
        return "LeakyRelu", {"alpha": arguments["0"]}, {}
    names = {"ReLU": "Relu", "ELU": "Elu", "GELU": "Gelu", "SiLU": "Mul"}
    return names.get(module.name, module.name), {}, {}


EXPORTERS: dict[str, Callable[[Autoencoder, Path], list[str]]] = {
    "torch": to_torch,
    "onnx": to_onnx,
}
