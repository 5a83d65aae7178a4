"""The hand-derived gradients of a whole model against central differences, in float64.

For a loss L and one entry t of a parameter,

    dL/dt = (L(t + h) - L(t - h)) / (2 h) + O(h^2)

A large h may step over the kink of a ReLU; with a small one, rounding swamps the difference. Each
entry is tried with several h and its best agreement counts: a wrong gradient agrees with none.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .models import Autoencoder, model_from_config
from .ops.philox import LATENT_STREAM, Noise
from .ops.state import new_state

STEPS = (1e-4, 1e-5, 1e-6, 1e-7)
ENTRIES = 12
ROWS = 3
TOLERANCE = 1e-4


class GradientError(NamedTuple):
    """One parameter tensor's largest relative error among the entries tried."""

    name: str
    layer: str
    error: float


def _entry_error(
    loss: Callable[[], float], value: NDArray, entry: int, derived: NDArray, floor: float
) -> float:
    start = value[entry]
    errors = []
    for step in STEPS:
        value[entry] = start + step
        above = loss()
        value[entry] = start - step
        below = loss()
        value[entry] = start
        numerical = (above - below) / (2 * step)
        size = max(abs(derived[entry]), abs(numerical), floor)
        errors.append(abs(derived[entry] - numerical) / size)
    # A NaN in any of them is no agreement: np.min keeps it.
    return float(np.min(errors))


def check_gradients(model: Autoencoder, seed: int = 0) -> Iterator[GradientError]:
    """Yields each parameter's error for a copy of `model` with initial weights. `seed` is that of
    the random images and labels, the latent noise and the entries tried.

    The error of an entry is |hand-derived - numerical| over the larger of the two, or over a
    tenth of the tensor's largest gradient where both are smaller: below that the difference
    quotient has no digits left.
    """
    model = model_from_config(model.config()).to("reference", np.float64)
    rng = np.random.default_rng(seed)
    model_pass = model.bind(ROWS)
    model_pass.x[...] = rng.random(model_pass.x.shape)
    if model.classes:
        model_pass.onehot[...] = np.eye(model.classes)[rng.integers(model.classes, size=ROWS)]
    noise = Noise(seed, LATENT_STREAM)
    model_pass.mean_loss(noise)
    model_pass.backward(noise, new_state())
    for name, value in model.parameters.values.items():
        derived = model.parameters.gradients[name].reshape(-1)
        entries = rng.choice(value.size, min(ENTRIES, value.size), replace=False)
        floor = max(1e-1 * float(np.abs(derived).max()), np.finfo(np.float64).tiny)
        errors = [
            _entry_error(
                lambda: model_pass.mean_loss(noise), value.reshape(-1), entry, derived, floor
            )
            for entry in entries
        ]
        part, index = name.split(".")[:2]
        network = model.encoder if part == "encoder" else model.decoder
        yield GradientError(name, network.layers[int(index)].kind, float(np.max(errors)))
