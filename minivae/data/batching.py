"""The order of an epoch."""

import numpy as np
from numpy.typing import NDArray

SHUFFLE_STREAM = 5


def epoch_permutation(images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits the images: a function of (seed, epoch), drawn on the host
    for every backend, so that a resumed run needs no generator's state."""
    return np.random.default_rng([seed, SHUFFLE_STREAM, epoch]).permutation(images)
