"""The flaw of pixel losses: shifting a digit by one pixel scores worse than two wrong pixels.

    python examples/pixel_error.py --data mnist

A reader sees the shifted digit as the same digit, and the two wrong pixels as damage. A sum over
pixels sees the opposite, for every digit with a sharp edge: moving an edge by one pixel changes
every pixel along it. This is why a small squared error does not make a good picture, and why the
same loss makes an uncertain decoder blur.
"""

import numpy as np
from common import options, run
from numpy.typing import NDArray

from minivae import InputError, plots
from minivae.data import load
from minivae.data.dataset import unit_pixels

SHOWN = 8


def shifted(images: NDArray) -> NDArray:
    """Images (n, h, w, c) moved one pixel to the right; the column that enters is black."""
    result = np.zeros_like(images)
    result[:, :, 1:] = images[:, :, :-1]
    return result


def with_two_wrong_pixels(images: NDArray) -> NDArray:
    """Images with two black corner pixels turned white."""
    result = images.copy()
    result[:, 2, 2] = 1
    result[:, -3, -3] = 1
    return result


def squared_error(images: NDArray, others: NDArray) -> NDArray:
    """The sum over pixels, for each image (n,)."""
    return np.sum((images - others) ** 2, axis=(1, 2, 3))


def main() -> None:
    """Prints the errors and draws the digits."""
    arguments = options(__doc__, "pixel-error", "glyphs").parse_args()
    images = unit_pixels(load(arguments.data, seed=arguments.seed).test.images)
    if len(images) < SHOWN or min(images.shape[1:3]) < 6:
        raise InputError(f"expected at least {SHOWN} test images of at least 6 x 6 pixels")
    moved, damaged = shifted(images), with_two_wrong_pixels(images)
    errors = squared_error(images, moved), squared_error(images, damaged)
    print(f"shifted by one pixel   squared error per image {errors[0].mean():6.2f}")
    print(f"two wrong pixels       squared error per image {errors[1].mean():6.2f}")
    print(
        f"the shift scores worse for {np.mean(errors[0] > errors[1]):.1%} of {len(images)} images"
    )
    kinds = {
        "original": images,
        f"shifted: error {errors[0].mean():.1f}": moved,
        f"two wrong pixels: {errors[1].mean():.1f}": damaged,
    }
    shape = (SHOWN // 2, 2, *images.shape[1:])
    columns = {name: group[:SHOWN].reshape(shape) for name, group in kinds.items()}
    path = arguments.out / "pixel_error.png"
    plots.compare_grids(path, columns, title="Which one is the better reconstruction?")
    print(path)


if __name__ == "__main__":
    run(main)
