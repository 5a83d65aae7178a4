"""Images with their labels, checked once where they enter."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

HELD_OUT = 10
"""One image of so many is held out where a source has no test split."""


@dataclass(frozen=True)
class Dataset:
    """Images (n, h, w, c), uint8 or float32 in [0, 1], and labels (n,) if there are any. `of` makes
    one of other arrays."""

    images: NDArray
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(h, w, c)."""
        return self.images.shape[1:]

    @property
    def classes(self) -> int:
        """One more than the largest label; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @staticmethod
    def of(
        images: NDArray, labels: NDArray | None = None, source: Path | str = "data"
    ) -> "Dataset":
        """A checked data set of images n x h x w or n x h x w x c, uint8, bool (True is white) or
        floating point in [0, 1], and integer labels (n,).

        Raises InputError, naming `source`, on another shape or type, values outside [0, 1] or not
        finite, or labels that do not fit.
        """
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or 0 in images.shape:
            raise InputError(
                f"{source}: images have shape {images.shape}, expected n x h x w or n x h x w x c"
            )
        if images.dtype == np.bool_:
            images = 255 * images.astype(np.uint8)
        if np.issubdtype(images.dtype, np.floating):
            images = images.astype(np.float32, copy=False)
            check_unit_range(images, source)
        elif images.dtype != np.uint8:
            raise InputError(
                f"{source}: images are {images.dtype}, expected uint8, bool or floating point in "
                "[0, 1]"
            )
        return Dataset(np.ascontiguousarray(images), _checked_labels(labels, len(images), source))

    def take(self, index: slice | NDArray) -> "Dataset":
        """The images and labels of an index."""
        labels = None if self.labels is None else self.labels[index]
        return Dataset(np.ascontiguousarray(self.images[index]), labels)


class Splits(NamedTuple):
    """A data set's name, what is trained on and what is tested on."""

    name: str
    train: Dataset
    test: Dataset


def check_unit_range(images: NDArray, source: Path | str) -> None:
    """Raises InputError, naming `source`, if a value is not finite or outside [0, 1]."""
    low, high = (float(f(images, initial=0.0)) for f in (np.min, np.max))  # NaN if one is
    if not np.isfinite([low, high]).all():
        raise InputError(f"{source}: images hold NaN or infinity, expected values in [0, 1]")
    if low < 0 or high > 1:
        raise InputError(
            f"{source}: images range from {low:g} to {high:g}, expected values in [0, 1]"
        )


def _checked_labels(
    labels: NDArray | None, images: int, source: Path | str
) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    if labels.shape != (images,) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{source}: labels are {labels.dtype} of shape {labels.shape}, "
            f"expected one integer for each of {images} images"
        )
    if labels.size and labels.min() < 0:
        raise InputError(f"{source}: labels begin at {labels.min()}, expected 0 or above")
    return labels.astype(np.int64)


def hold_out(data: Dataset, name: str, source: Path | str) -> Splits:
    """The last tenth of the data, and at least one image, as the test split."""
    images = len(data)
    if images < 2:
        raise InputError(f"{source}: holds {images} image, expected at least 2")
    first = images - max(1, images // HELD_OUT)
    return Splits(name, data.take(slice(first)), data.take(slice(first, None)))


def same_image_shape(train: Dataset, test: Dataset, source: Path | str) -> None:
    """Raises InputError if the splits' images differ in shape."""
    if train.image_shape != test.image_shape:
        raise InputError(
            f"{source}: test images are {test.image_shape}, training images {train.image_shape}"
        )
