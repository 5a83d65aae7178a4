"""The reference table: every primitive as `ops/` writes it, in NumPy, in float32 or float64.

A backend is a class with this table. It overrides the primitives that it does better and inherits
the rest, with the same names, the same arguments and the same meaning.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..ops import (
    activations,
    adam,
    batch,
    calibration,
    capacity,
    conv,
    dense,
    elbo,
    importance,
    labels,
    latent,
    state,
)


class Call:
    """A primitive's name and the arguments that it is to be called with."""

    def __init__(self, primitive: str, *arguments: Any) -> None:
        self.primitive, self.arguments = primitive, arguments

    def run(self, backend: "ReferenceBackend") -> None:
        getattr(backend, self.primitive)(*self.arguments)


class ReferenceBackend:
    """NumPy, one equation a line. Gradient checks run on it in float64."""

    name = "reference"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float64")
    """What it computes in."""

    activation_forward = staticmethod(activations.activation_forward)
    activation_backward = staticmethod(activations.activation_backward)
    dense_forward = staticmethod(dense.dense_forward)
    dense_input_gradient = staticmethod(dense.dense_input_gradient)
    dense_weight_gradient = staticmethod(dense.dense_weight_gradient)
    conv2d_forward = staticmethod(conv.conv2d_forward)
    conv2d_input_gradient = staticmethod(conv.conv2d_input_gradient)
    conv2d_weight_gradient = staticmethod(conv.conv2d_weight_gradient)
    conv_transpose2d_forward = staticmethod(conv.conv_transpose2d_forward)
    conv_transpose2d_input_gradient = staticmethod(conv.conv_transpose2d_input_gradient)
    conv_transpose2d_weight_gradient = staticmethod(conv.conv_transpose2d_weight_gradient)
    latent_forward = staticmethod(latent.latent_forward)
    latent_backward = staticmethod(latent.latent_backward)
    bernoulli_loss = staticmethod(elbo.bernoulli_loss)
    squared_error_loss = staticmethod(elbo.squared_error_loss)
    calibrate_gaussian = staticmethod(calibration.calibrate_gaussian)
    importance_latent_forward = staticmethod(importance.importance_latent_forward)
    importance_latent_backward = staticmethod(importance.importance_latent_backward)
    importance_loss = staticmethod(importance.importance_loss)
    elbo_totals = staticmethod(elbo.elbo_totals)
    capacity_totals = staticmethod(capacity.capacity_totals)
    adam_update = staticmethod(adam.adam_update)
    clip_gradient = staticmethod(adam.clip_gradient)
    gather_batch = staticmethod(batch.gather_batch)
    gather_labels = staticmethod(labels.gather_labels)
    join_forward = staticmethod(labels.join_forward)
    join_input_gradient = staticmethod(labels.join_input_gradient)
    advance_state = staticmethod(state.advance_state)

    def sequence(self, *calls: Call) -> None:
        """Runs calls one after another. A backend may run neighbours as one; what they write for
        each other alone need then not be written."""
        for call in calls:
            call.run(self)

    def weight_gradients(
        self, calls: Sequence[Call], g: Any, fraction: float = 1.0, accumulate: bool = False
    ) -> None:
        """The weight gradients of a batch or of a part of it (dense.E5), all of them views of the
        flat buffer `g`. `calls` go without `fraction` and `accumulate`."""
        for call in calls:
            Call(call.primitive, *call.arguments, fraction, accumulate).run(self)

    def optimizer_step(
        self,
        calls: Sequence[Call],
        p: Any,
        g: Any,
        m: Any,
        v: Any,
        schedule: Any,
        state: Any,
        beta1: float,
        beta2: float,
        epsilon: float,
        batch_size: int,
    ) -> None:
        """The weight gradients of a step, `adam_update` with them on the flat buffers, and
        `advance_state`. A backend that fuses them need not write `g`."""
        self.weight_gradients(calls, g)
        self.adam_update(p, g, m, v, schedule, state, beta1, beta2, epsilon)
        self.advance_state(state, batch_size)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray:
        """A new array of the backend, filled with zeros."""
        return np.zeros(shape, dtype)

    def asarray(self, array: NDArray) -> Any:
        """The backend's copy of a NumPy array."""
        return np.array(array, order="C")

    def assign(self, array: Any, values: Any) -> None:
        """Copies `values` (NumPy's array, the backend's, or one number) into the backend's array,
        broadcast as NumPy does."""
        array[...] = values

    def to_numpy(self, array: Any) -> NDArray:
        """A NumPy copy of the backend's array."""
        return np.array(array)

    def free_memory(self) -> int:
        """Bytes available for new arrays: of the host (file cache included) or of the GPU."""
        import psutil

        return int(psutil.virtual_memory().available)

    def synchronize(self) -> None:
        """Returns once the work that was asked for is done."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """What to call instead of `step`, which does the same each time: a backend that records
        its work once and replays it returns the replay."""
        return step


PRIMITIVES = tuple(
    name for name, value in vars(ReferenceBackend).items() if isinstance(value, staticmethod)
)
