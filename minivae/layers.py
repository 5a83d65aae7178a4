"""Layers: what a user writes down. A layer is a description without state; a `Pass` (network.py)
gives it arrays.

Image shapes are (h, w, c) and vectors (m,), always without the batch. A layer with weights has
three calls into the backend, those of its `ops/` page: forward, input gradient, weight gradient.
"""

import dataclasses
import math
import numbers
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .backends.reference import Call
from .errors import InputError
from .ops.activations import DERIVATIVE_FROM_OUTPUT, Activation
from .ops.conv import ConvGeometry

Shape = tuple[int, ...]
Pair = int | tuple[int, ...]
Tensors = dict[str, Any]

INITIALIZATIONS = ("torch", "he", "glorot", "truncated-normal")


def _pair(value: Pair) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, tuple) else (value, value)


def _is_count(value: Any, least: int = 1) -> bool:
    """Whether `value` is an integer, and not below `least`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and int(value) >= least


def _is_pair(value: Any, least: int) -> bool:
    """Whether `value` is an integer or two of them, none below `least`."""
    sizes = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    return all(_is_count(size, least) for size in sizes)


def _check(holds: bool, layer: "Layer", expected: str) -> None:
    if not holds:
        raise InputError(f"{layer}: expected {expected}")


@dataclass(frozen=True)
class Layer:
    """What every layer answers. Its constructor raises InputError on settings out of range."""

    kind: ClassVar[str]

    def output_shape(self, input_shape: Shape) -> Shape:
        """The shape of the output for an input of `input_shape`; InputError if it does not fit."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The layer as plain data, for a run's readable configuration."""
        return {"layer": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Flatten(Layer):
    """(h, w, c) to (h w c,). No arithmetic: a view."""

    kind = "flatten"

    def output_shape(self, input_shape: Shape) -> Shape:
        return (math.prod(input_shape),)


@dataclass(frozen=True)
class Reshape(Layer):
    """To `shape`, of as many elements. No arithmetic: a view."""

    shape: Shape
    kind = "reshape"

    def __post_init__(self) -> None:
        valid = isinstance(self.shape, tuple) and all(map(_is_count, self.shape))
        _check(valid, self, "a tuple of sizes of at least 1")

    def output_shape(self, input_shape: Shape) -> Shape:
        fits = math.prod(self.shape) == math.prod(input_shape)
        _check(fits, self, f"an input of {math.prod(self.shape)} elements, got shape {input_shape}")
        return self.shape


@dataclass(frozen=True)
class ActivationLayer(Layer):
    """y = f(x), elementwise; derived in ops/activations.py.

    After a layer with weights, an activation whose derivative follows from its output is fused
    into that layer by the network.
    """

    @property
    def activation(self) -> Activation:
        """What the kernels know it by."""
        return Activation(self.kind, getattr(self, "slope", 0.0))

    @property
    def fusable(self) -> bool:
        """Whether the layer below can compute it: whether its derivative follows from y."""
        return self.kind in DERIVATIVE_FROM_OUTPUT

    def output_shape(self, input_shape: Shape) -> Shape:
        return input_shape


@dataclass(frozen=True)
class ReLU(ActivationLayer):
    """max(x, 0)."""

    kind = "relu"


@dataclass(frozen=True)
class LeakyReLU(ActivationLayer):
    """x if x > 0 else slope x."""

    slope: float = 0.01
    kind = "leaky_relu"

    def __post_init__(self) -> None:
        # A negative slope would make the output positive on both sides, and its sign useless.
        valid = isinstance(self.slope, int | float) and 0 <= self.slope < math.inf
        _check(valid, self, "a slope of 0 or above")


@dataclass(frozen=True)
class Tanh(ActivationLayer):
    """tanh x."""

    kind = "tanh"


@dataclass(frozen=True)
class Sigmoid(ActivationLayer):
    """1 / (1 + e^-x)."""

    kind = "sigmoid"


@dataclass(frozen=True)
class Softplus(ActivationLayer):
    """log(1 + e^x)."""

    kind = "softplus"


@dataclass(frozen=True)
class ELU(ActivationLayer):
    """x if x > 0 else e^x - 1."""

    kind = "elu"


@dataclass(frozen=True)
class GELU(ActivationLayer):
    """x Phi(x), the exact form with the normal distribution function."""

    kind = "gelu"


@dataclass(frozen=True)
class SiLU(ActivationLayer):
    """x sigmoid(x)."""

    kind = "silu"


@dataclass(frozen=True)
class WeightedLayer(Layer):
    """A layer with a weight and a bias, and the three primitives of its ops page."""

    def parameter_shapes(self, input_shape: Shape) -> dict[str, Shape]:
        """The shapes of `weight` and `bias`."""
        raise NotImplementedError

    def fans(self, weight_shape: Shape) -> tuple[int, int, int]:
        """(fan in, fan out, the fan in that PyTorch's default initialisation takes)."""
        raise NotImplementedError

    def initialize(
        self, shapes: dict[str, Shape], scheme: str, rng: np.random.Generator
    ) -> dict[str, NDArray[np.float64]]:
        """Initial weight and bias by `scheme`:

        torch             weight and bias uniform within 1 / sqrt(fan in) (PyTorch's default)
        he                normal of variance 2 / fan in, zero bias (He et al. 2015)
        glorot            uniform within sqrt(6 / (fan in + fan out)), zero bias
                          (Glorot & Bengio 2010)
        truncated-normal  normal of standard deviation 0.02, redrawn beyond ±0.04, zero bias
        """
        fan_in, fan_out, torch_fan_in = self.fans(shapes["weight"])
        bias = np.zeros(shapes["bias"])
        if scheme == "torch":
            bound = 1 / math.sqrt(torch_fan_in)
            weight = rng.uniform(-bound, bound, shapes["weight"])
            bias = rng.uniform(-bound, bound, shapes["bias"])
        elif scheme == "he":
            weight = rng.normal(0, math.sqrt(2 / fan_in), shapes["weight"])
        elif scheme == "glorot":
            bound = math.sqrt(6 / (fan_in + fan_out))
            weight = rng.uniform(-bound, bound, shapes["weight"])
        else:  # "truncated-normal"
            weight = rng.normal(0, 0.02, shapes["weight"])
            while (outside := np.abs(weight) > 0.04).any():
                weight[outside] = rng.normal(0, 0.02, outside.sum())
        return {"weight": weight, "bias": bias}

    def geometry_of(self, x: Any, y: Any) -> tuple[ConvGeometry, ...]:
        """What the layer's primitives take of the geometry between input and output: nothing."""
        return ()

    def forward(self, x: Any, values: Tensors, y: Any, activation: Activation) -> Call:
        """The call of y = activation(x w + b), in the layer's own sense of the product."""
        geometry = self.geometry_of(x, y)
        w, b = values["weight"], values["bias"]
        return Call(f"{self.kind}_forward", x, w, b, y, *geometry, activation)

    def input_gradient(
        self, dz: Any, values: Tensors, x: Any, dz_below: Any, below: Activation
    ) -> Call:
        """The call of dz_below from dz, carried through `below`, which made x (dense.E4)."""
        geometry = self.geometry_of(x, dz)
        return Call(
            f"{self.kind}_input_gradient", dz, values["weight"], x, dz_below, *geometry, below
        )

    def weight_gradient(self, x: Any, dz: Any, gradients: Tensors) -> Call:
        """The call of the gradients of weight and bias from dz."""
        geometry = self.geometry_of(x, dz)
        dw, db = gradients["weight"], gradients["bias"]
        return Call(f"{self.kind}_weight_gradient", x, dz, dw, db, *geometry)


@dataclass(frozen=True)
class Dense(WeightedLayer):
    """y = x w + b with w (inputs, units); derived in ops/dense.py."""

    units: int
    kind = "dense"

    def __post_init__(self) -> None:
        _check(_is_count(self.units), self, "at least 1 unit, as an int")

    def output_shape(self, input_shape: Shape) -> Shape:
        _check(len(input_shape) == 1, self, f"a vector (put Flatten before), got {input_shape}")
        return (self.units,)

    def parameter_shapes(self, input_shape: Shape) -> dict[str, Shape]:
        return {"weight": (input_shape[0], self.units), "bias": (self.units,)}

    def fans(self, weight_shape: Shape) -> tuple[int, int, int]:
        inputs, units = weight_shape
        return inputs, units, inputs


@dataclass(frozen=True)
class Convolution(WeightedLayer):
    """What a convolution and its transpose share: `channels` of output, kernel, stride, padding.

    `padding` is a number of pixels on each side (or one for height and one for width), or "same".
    """

    channels: int
    kernel: Pair
    stride: Pair = field(default=1, kw_only=True)
    padding: Pair | str = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        _check(_is_count(self.channels), self, "at least 1 channel, as an int")
        _check(_is_pair(self.kernel, 1), self, "a kernel of at least 1 x 1, as one int or two")
        _check(_is_pair(self.stride, 1), self, "a stride of at least 1, as one int or two")
        valid = self.padding == "same" or _is_pair(self.padding, 0)
        _check(valid, self, 'a padding of 0 or above, as one int or two, or "same"')

    def axes(self) -> list[tuple[int, int, int | str]]:
        """(kernel, stride, padding) of the height and of the width."""
        padding = self.padding
        paddings = (padding, padding) if isinstance(padding, str) else _pair(padding)
        return list(zip(_pair(self.kernel), _pair(self.stride), paddings, strict=True))

    def small_size(self, size: int, axis: int) -> int:
        """How many kernel windows `size` pixels of the large image have along `axis` (0 or 1)."""
        kernel, stride, padding = self.axes()[axis]
        if isinstance(padding, str):
            return -(-size // stride)
        return (size + 2 * padding - kernel) // stride + 1

    def geometry(self, large: Shape, small: Shape) -> ConvGeometry:
        """Strides, and the padding at top and left. `large` is the shape of a convolution's input
        or a transposed one's output, `small` of the other."""
        before = []
        for size, windows, (kernel, stride, padding) in zip(
            large, small, self.axes(), strict=False
        ):
            if isinstance(padding, str):
                padding = max((windows - 1) * stride + kernel - size, 0) // 2
            before.append(padding)
        return ConvGeometry(*_pair(self.stride), before[0], before[1])


@dataclass(frozen=True)
class Conv2d(Convolution):
    """2-D convolution with w (kh, kw, c, channels); derived in ops/conv.py.

    Padding "same" gives ceil(size / stride) pixels and puts the odd pixel at the bottom right.
    """

    kind = "conv2d"

    def output_shape(self, input_shape: Shape) -> Shape:
        _check(len(input_shape) == 3, self, f"an image (h, w, c), got {input_shape}")
        pixels = [self.small_size(input_shape[axis], axis) for axis in (0, 1)]
        _check(min(pixels) >= 1, self, f"a kernel that fits in an image of {input_shape}")
        return (*pixels, self.channels)

    def parameter_shapes(self, input_shape: Shape) -> dict[str, Shape]:
        return {
            "weight": (*_pair(self.kernel), input_shape[2], self.channels),
            "bias": (self.channels,),
        }

    def fans(self, weight_shape: Shape) -> tuple[int, int, int]:
        kh, kw, c, k = weight_shape
        return kh * kw * c, kh * kw * k, kh * kw * c

    def geometry_of(self, x: Any, y: Any) -> tuple[ConvGeometry, ...]:
        return (self.geometry(x.shape[1:], y.shape[1:]),)


@dataclass(frozen=True)
class ConvTranspose2d(Convolution):
    """2-D transposed convolution with w (kh, kw, channels, c); derived in ops/conv.py.

    The output has (size - 1) stride - 2 padding + kernel + output_padding pixels, or `output_size`
    where that is given; with padding "same", size times stride. A convolution of the same settings
    must map `output_size` back to the input's size.
    """

    output_padding: Pair = field(default=0, kw_only=True)
    output_size: Pair | None = field(default=None, kw_only=True)
    kind = "conv_transpose2d"

    def __post_init__(self) -> None:
        super().__post_init__()
        below_stride = _is_pair(self.output_padding, 0) and all(
            o < s for o, s in zip(_pair(self.output_padding), _pair(self.stride), strict=True)
        )
        _check(below_stride, self, "an output_padding of 0 or above and below the stride")
        sized = self.output_size is None or _is_pair(self.output_size, 1)
        _check(sized, self, "an output_size of at least 1, as one int or two")
        twice = max(_pair(self.output_padding)) > 0 and (
            self.output_size is not None or self.padding == "same"
        )
        _check(not twice, self, 'output_padding alone, without output_size or "same"')

    def output_shape(self, input_shape: Shape) -> Shape:
        _check(len(input_shape) == 3, self, f"an image (h, w, c), got {input_shape}")
        pixels = self._natural_size(input_shape)
        if self.output_size is not None:
            pixels = list(_pair(self.output_size))
        for axis, size in enumerate(pixels):
            fits = size >= 1 and self.small_size(size, axis) == input_shape[axis]
            _check(fits, self, f"an output size that fits an input of {input_shape}")
        return (*pixels, self.channels)

    def _natural_size(self, input_shape: Shape) -> list[int]:
        sizes = []
        extras = _pair(self.output_padding)
        for size, (k, s, p), extra in zip(input_shape, self.axes(), extras, strict=False):
            if isinstance(p, str):
                sizes.append(size * s)
            else:
                sizes.append((size - 1) * s - 2 * p + k + extra)
        return sizes

    def parameter_shapes(self, input_shape: Shape) -> dict[str, Shape]:
        return {
            "weight": (*_pair(self.kernel), self.channels, input_shape[2]),
            "bias": (self.channels,),
        }

    def fans(self, weight_shape: Shape) -> tuple[int, int, int]:
        # PyTorch takes axis 1 of its (in, out, kh, kw) weight for the fan in of a transposed
        # convolution too: the output channels.
        kh, kw, c, k = weight_shape
        return kh * kw * k, kh * kw * c, kh * kw * c

    def geometry_of(self, x: Any, y: Any) -> tuple[ConvGeometry, ...]:
        return (self.geometry(y.shape[1:], x.shape[1:]),)


@dataclass(frozen=True)
class JoinLabel(Layer):
    """(m,) to (m + classes,): the image's label joins as a one-hot vector; see ops/labels.py.

    In a model's encoder, decoder or both it makes the model conditional on the label.
    """

    classes: int
    kind = "join_label"

    def __post_init__(self) -> None:
        valid = _is_count(self.classes)
        _check(valid, self, "at least 1 class, as an int")

    def output_shape(self, input_shape: Shape) -> Shape:
        _check(len(input_shape) == 1, self, f"a vector (put Flatten before), got {input_shape}")
        return (input_shape[0] + self.classes,)

    def forward(self, x: Any, values: Tensors, y: Any, activation: Activation) -> Call:
        """y = (x, the batch's `onehot` of `values`)."""
        return Call("join_forward", x, values["onehot"], y)

    def input_gradient(
        self, dz: Any, values: Tensors, x: Any, dz_below: Any, below: Activation
    ) -> Call:
        """The call of dz_below from dz, carried through `below`, which made x (labels.E4)."""
        return Call("join_input_gradient", dz, x, dz_below, below)


LAYERS: dict[str, type[Layer]] = {
    layer.kind: layer
    for layer in (
        *(Dense, Conv2d, ConvTranspose2d, Flatten, Reshape, JoinLabel),
        *(ReLU, LeakyReLU, Tanh, Sigmoid, Softplus, ELU, GELU, SiLU),
    )
}


def layer_from_config(config: dict[str, Any]) -> Layer:
    """The layer that `Layer.config` described; InputError if the description is none."""
    fields = dict(config)
    kind = fields.pop("layer", None)
    if kind not in LAYERS:
        raise InputError(f"layer {kind!r} is not one of {', '.join(LAYERS)}")
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = tuple(value)
    try:
        return LAYERS[kind](**fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"layer {kind!r}: {error}") from None
