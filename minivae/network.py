"""A chain of layers, and the arrays that one batch size of it runs on.

`Network` is the description with its shapes; `NetworkBuffers` is all the memory that a batch needs,
taken once; a `NetworkPass` is the chain bound to views of that memory, and runs forward and
backward within it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .backends.reference import Call, ReferenceBackend
from .errors import check_is
from .layers import (
    ActivationLayer,
    Flatten,
    JoinLabel,
    Layer,
    Reshape,
    Shape,
    Tensors,
    WeightedLayer,
)
from .ops.activations import IDENTITY, Activation
from .params import Parameters

VIEWS = (Flatten, Reshape)
"""Layers that compute nothing: their output is their input's memory in another shape."""


class Network:
    """Layers in order, with the shapes between them. `name` begins its parameters' names, which
    number all layers: `encoder.0.weight`."""

    def __init__(self, name: str, layers: list[Layer], input_shape: Shape) -> None:
        self.name = name
        self.layers = layers
        self.shapes = [tuple(input_shape)]
        for index, layer in enumerate(layers):
            check_is(f"layer {index} of {name}", layer, Layer)
            self.shapes.append(layer.output_shape(self.shapes[-1]))

    @property
    def input_shape(self) -> Shape:
        return self.shapes[0]

    @property
    def output_shape(self) -> Shape:
        return self.shapes[-1]

    def activation(self, index: int) -> Activation:
        """The activation that layer `index` is; identity if it is none."""
        layer = self.layers[index]
        return layer.activation if isinstance(layer, ActivationLayer) else IDENTITY

    def fused(self, index: int) -> bool:
        """Whether layer `index` is an activation that the layer below computes."""
        layer = self.layers[index]
        return (
            index > 0
            and isinstance(layer, ActivationLayer)
            and layer.fusable
            and isinstance(self.layers[index - 1], WeightedLayer)
        )

    def parameter_shapes(self) -> dict[str, Shape]:
        """The shape of each parameter by its full name."""
        return {
            f"{self.name}.{index}.{name}": shape
            for index, layer in enumerate(self.layers)
            if isinstance(layer, WeightedLayer)
            for name, shape in layer.parameter_shapes(self.shapes[index]).items()
        }

    def initial_values(
        self, scheme: str, rng: np.random.Generator
    ) -> dict[str, NDArray[np.float64]]:
        """An initial value for each parameter."""
        values = {}
        for index, layer in enumerate(self.layers):
            if isinstance(layer, WeightedLayer):
                shapes = layer.parameter_shapes(self.shapes[index])
                for name, value in layer.initialize(shapes, scheme, rng).items():
                    values[f"{self.name}.{index}.{name}"] = value
        return values


class NetworkBuffers:
    """For each `Stage` to come, its output y and its dz, for up to `batch` rows."""

    def __init__(
        self, network: Network, backend: ReferenceBackend, batch: int, dtype: DTypeLike
    ) -> None:
        computing = [
            index
            for index, layer in enumerate(network.layers)
            if not isinstance(layer, VIEWS) and not network.fused(index)
        ]
        shapes = {index: (batch, *network.shapes[index + 1]) for index in computing}
        self.outputs: dict[int, Any] = {i: backend.zeros(s, dtype) for i, s in shapes.items()}
        self.gradients: dict[int, Any] = {i: backend.zeros(s, dtype) for i, s in shapes.items()}


@dataclass
class Stage:
    """A layer with its fused activation, bound to the arrays around it.

    `dz` is the gradient that the stage above leaves: before the activation if that is fused with a
    layer (dense.E4), else of y. `below` is the activation that made x, `dz_below` the gradient
    before it, None where nobody needs it.
    """

    name: str
    layer: Layer
    activation: Activation
    below: Activation
    x: Any
    y: Any
    dz_below: Any
    dz: Any
    values: Tensors
    gradients: Tensors

    def forward(self) -> Call:
        """y from x."""
        if isinstance(self.layer, WeightedLayer | JoinLabel):
            return self.layer.forward(self.x, self.values, self.y, self.activation)
        return Call("activation_forward", self.x, self.y, self.activation)

    def input_gradient(self) -> list[Call]:
        """dz_below from dz."""
        if isinstance(self.layer, WeightedLayer | JoinLabel):
            return [
                self.layer.input_gradient(self.dz, self.values, self.x, self.dz_below, self.below)
            ]
        dz_below = self.dz_below
        calls = [Call("activation_backward", self.x, self.y, self.dz, dz_below, self.activation)]
        if self.below != IDENTITY:
            calls.append(Call("activation_backward", None, self.x, dz_below, dz_below, self.below))
        return calls

    def weight_gradient(self) -> list[Call]:
        """The gradients of the layer's weight and bias from dz, if it has them."""
        if isinstance(self.layer, WeightedLayer):
            return [self.layer.weight_gradient(self.x, self.dz, self.gradients)]
        return []


class NetworkPass:
    """A network bound to its memory for the rows of `x`.

    `dz_below` receives the gradient before `below`, the activation that made the input; None where
    nobody needs it. `onehot` (n, classes) holds labels for a JoinLabel; if `x` has k n rows, each k
    consecutive ones share a label. `output` holds the result of `forward`; the caller writes the
    gradient before `output_activation`, the activation that made the output, into `output_gradient`
    and runs `input_gradient_calls`. `weight_gradient_calls` run after the input gradients of all
    networks, since a backend may update the weights in the same calls.
    """

    def __init__(
        self,
        network: Network,
        backend: ReferenceBackend,
        parameters: Parameters,
        buffers: NetworkBuffers,
        x: Any,
        dz_below: Any = None,
        below: Activation = IDENTITY,
        onehot: Any = None,
    ) -> None:
        self.stages: list[Stage] = []
        rows = x.shape[0]
        for index, layer in enumerate(network.layers):
            if network.fused(index):
                continue
            if isinstance(layer, VIEWS):
                shape = (rows, *network.shapes[index + 1])
                x = x.reshape(shape)
                dz_below = None if dz_below is None else dz_below.reshape(shape)
                continue
            y, dz = buffers.outputs[index][:rows], buffers.gradients[index][:rows]
            follower = index + 1
            fused = follower < len(network.layers) and network.fused(follower)
            name = f"{network.name}.{index}"
            values = _tensors(parameters.values, name)
            if isinstance(layer, JoinLabel):
                values["onehot"] = onehot
            self.stages.append(
                Stage(
                    name,
                    layer,
                    activation=network.activation(follower if fused else index),
                    below=below,
                    x=x,
                    y=y,
                    dz_below=dz_below,
                    dz=dz,
                    values=values,
                    gradients=_tensors(parameters.gradients, name),
                )
            )
            x, dz_below = y, dz
            below = network.activation(follower) if fused else IDENTITY
        self.output, self.output_gradient, self.output_activation = x, dz_below, below
        backwards = self.stages[::-1]
        self.forward_calls = [stage.forward() for stage in self.stages]
        self._forward = backend.capture(partial(backend.sequence, *self.forward_calls))
        self.input_gradient_calls = [
            call
            for stage in backwards
            if stage.dz_below is not None
            for call in stage.input_gradient()
        ]
        self.weight_gradient_calls = [
            call for stage in backwards for call in stage.weight_gradient()
        ]

    def output_gradient_calls(self) -> list[Call]:
        """The calls that turn the gradient of `output`, if that is what `output_gradient` holds,
        into the gradient before `output_activation`, in place."""
        if self.output_activation == IDENTITY:
            return []
        dz = self.output_gradient
        return [Call("activation_backward", None, self.output, dz, dz, self.output_activation)]

    def forward(self) -> None:
        """`output` from the input."""
        self._forward()


def _tensors(views: dict[str, Any], prefix: str) -> Tensors:
    names = ("weight", "bias")
    return {name: views[f"{prefix}.{name}"] for name in names if f"{prefix}.{name}" in views}
