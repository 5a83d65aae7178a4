"""The parameters of a model: one flat buffer each for values, gradients and Adam's two moments.

Every tensor is a named view into those buffers, so that the optimizer is one pass over memory, and
a checkpoint or a gradient check still speaks of `encoder.0.weight`.
"""

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .backends.reference import ReferenceBackend

ALIGNMENT = 32
"""Each tensor starts at a multiple of this many elements: 128 bytes of float32, a cache line or two
and a whole memory transaction on a GPU. The gaps hold zeros, which Adam leaves zero."""


class Parameters:
    """Named tensors in flat buffers. `values`, `gradients`, `first_moments` and `second_moments`
    map a name to its view; `flat` maps the same four words to the whole buffer."""

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], backend: ReferenceBackend, dtype: DTypeLike
    ) -> None:
        self.shapes = shapes
        offsets, size = {}, 0
        for name, shape in shapes.items():
            offsets[name] = size
            size += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
        if size > sys.maxsize // np.dtype(dtype).itemsize:
            raise MemoryError  # NumPy would raise ValueError
        kinds = ("values", "gradients", "first_moments", "second_moments")
        self.flat: dict[str, Any] = {kind: backend.zeros((size,), dtype) for kind in kinds}
        self.values, self.gradients, self.first_moments, self.second_moments = (
            {
                name: self.flat[kind][offsets[name] :][: math.prod(shape)].reshape(shape)
                for name, shape in shapes.items()
            }
            for kind in kinds
        )

    @property
    def count(self) -> int:
        """How many trainable numbers there are."""
        return sum(math.prod(shape) for shape in self.shapes.values())
