"""A batch: images gathered by the epoch's permutation, scaled to [0, 1], binarized if asked.

    E1    x = data[permutation[first + row]] / 255           uint8; float32 data as it is
    E2    thresholded:  x = 1 if x >= 1/2 else 0
    E3    stochastic:   x = 1 with probability x             (Salakhutdinov & Murray 2008)

Drawn anew each epoch, E3 is the literature's dynamic binarization; drawn once, the static one.

For uint8, E3 compares integers, word * 255 < pixel * 2^32 for a random 32-bit word (below in
float64, where both are exact), so that a white pixel stays white and a black one black; for float32
data it is word < pixel * 2^32, exact as well. The word is a function of (seed, epoch, image,
pixel): drawn afresh each epoch, and the same on every backend.
"""

import numpy as np
from numpy.typing import NDArray

from .philox import Noise, random_words
from .state import EPOCH, FIRST

BINARIZATIONS = ("none", "threshold", "stochastic")


def gather_batch(
    data: NDArray,
    permutation: NDArray,
    state: NDArray,
    x: NDArray,
    binarization: str,
    noise: Noise,
) -> None:
    """The batch that starts at `state[FIRST]`.

    Shapes: data (images, m) in uint8, or floating point in [0, 1], permutation (images,) in int64,
    state (5,), x (n, m). `binarization` is one of BINARIZATIONS.
    """
    first = int(state[FIRST])
    images = permutation[first : first + len(x)]
    pixels = data[images]
    white = 255 if data.dtype == np.uint8 else 1
    if binarization == "threshold":
        x[...] = 2 * pixels.astype(np.float32) >= white
    elif binarization == "stochastic":
        words = random_words(images, x.shape[1], noise, int(state[EPOCH]))
        x[...] = words.astype(np.float64) * white < pixels * 2.0**32
    else:
        np.divide(pixels, white, out=x, dtype=x.dtype)
