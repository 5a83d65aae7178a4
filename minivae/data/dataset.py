"""Images with their labels, checked once where they enter."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..errors import InputError, check_is
from ..ops.batch import gather_batch
from ..ops.philox import EVALUATION_BINARIZATION_STREAM, Noise
from ..ops.state import new_state

HELD_OUT = 10
"""One image of so many is held out where a source has no test split."""

TEST_STREAM, VALIDATION_STREAM, SAMPLE_STREAM = 6, 8, 9
"""Random streams by which images are drawn: for the test or validation split, or as a sample."""

MOST_CHANNELS = 4


@dataclass(frozen=True)
class Dataset:
    """Images (n, h, w, c), uint8 or float32 in [0, 1], and labels (n,) if there are any. `of` makes
    a Dataset from other arrays. `origin` (n,), if known, says where in its source each image was:
    its index there, or its file."""

    images: NDArray
    labels: NDArray[np.int64] | None
    origin: NDArray | None = None

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
        images: ArrayLike, labels: ArrayLike | None = None, source: Path | str = "data"
    ) -> "Dataset":
        """A checked data set of images n x h x w or n x h x w x c with 1 to MOST_CHANNELS channels,
        in what `checked_pixels` takes, and integer labels (n,).

        Raises InputError, naming `source`, on another shape or type, values outside [0, 1] or not
        finite, or labels that do not fit.
        """
        array = as_array(images, f"{source}: images")
        if array.ndim == 3:
            array = array[..., None]
        if array.ndim != 4 or 0 in array.shape or array.shape[3] > MOST_CHANNELS:
            raise InputError(
                f"{source}: images have shape {np.shape(images)}, expected n x h x w, or "
                f"n x h x w x c with the channels last, at most {MOST_CHANNELS}"
            )
        pixels = np.ascontiguousarray(checked_pixels(array, source))
        return Dataset(pixels, _checked_labels(labels, len(pixels), source))

    def take(self, index: slice | NDArray) -> "Dataset":
        """The images and labels of an index."""
        labels, origin = (None if a is None else a[index] for a in (self.labels, self.origin))
        return Dataset(np.ascontiguousarray(self.images[index]), labels, origin)

    def sample(self, count: int) -> "Dataset":
        """A random sample of `count` images, since the data may be sorted by class: the same each
        time, in the order of the data; all images if there are no more."""
        return self.held_out(count, 0, SAMPLE_STREAM)[1] if count < len(self) else self

    def held_out(self, count: int, seed: int, stream: int) -> tuple["Dataset", "Dataset"]:
        """The data without `count` images, and these, drawn by (seed, stream). Both keep the order
        of the data."""
        order = np.random.default_rng([seed, stream]).permutation(len(self))
        drawn = np.isin(np.arange(len(self)), order[:count])
        return self.take(~drawn), self.take(drawn)

    def binarized(self, binarization: str, seed: int) -> "Dataset":
        """The images as float32, binarized once, as `Autoencoder.evaluate` does it."""
        flat = self.images.reshape(len(self), -1)
        x = np.empty(flat.shape, np.float32)
        noise = Noise(seed, EVALUATION_BINARIZATION_STREAM)
        gather_batch(flat, np.arange(len(flat)), new_state(), x, binarization, noise)
        return replace(self, images=x.reshape(self.images.shape))


class Splits(NamedTuple):
    """A data set's name, what is trained on, what is tested on, and what its classes are called, in
    order, if they have names."""

    name: str
    train: Dataset
    test: Dataset
    class_names: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """One more than the largest label of both splits; 0 without labels."""
        return max(self.train.classes, self.test.classes)

    def checked(self) -> "Splits":
        """The same by `Dataset.of`, which a data set need not have come from."""
        check_is("the name of the splits", self.name, str)
        for split in (self.train, self.test):
            hint = ": make one by Dataset.of"
            check_is(f"a split of {self.name}", split, Dataset, hint=hint)
        train, test = (
            replace(split, images=made.images, labels=made.labels)
            for split in (self.train, self.test)
            for made in [Dataset.of(split.images, split.labels, self.name)]
        )
        return Splits(self.name, train, test, self.class_names)

    def fingerprint(self) -> str:
        """A hash of all images and labels: two splits with the same one train the same model."""
        digest = hashlib.blake2b(digest_size=16)
        for split in (self.train, self.test):
            for array in (split.images, split.labels):
                if array is not None:
                    digest.update(f"{array.dtype} {array.shape}".encode())
                    digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def as_array(values: ArrayLike, what: str, dtype: DTypeLike | None = None) -> NDArray:
    """The values as an array, of any type or of `dtype`. Raises InputError, naming `what`, where
    they do not make one."""
    try:
        return np.asarray(values, dtype)
    except (TypeError, ValueError):
        raise InputError(f"{what}: expected an array, or values of one shape") from None


def called(classes: Iterable[int], names: Sequence[str]) -> list[str]:
    """The names of classes, as far as they are text, or the numbers of those that have none."""
    shown = (names[c] if c < len(names) else str(c) for c in classes)
    return [name.encode(errors="replace").decode() for name in shown]


def unit_pixels(images: NDArray) -> NDArray[np.float32]:
    """Images as float32 in [0, 1], from uint8 or as they are."""
    scale = 255 if images.dtype == np.uint8 else 1
    return np.asarray(images / np.float32(scale), np.float32)


def checked_pixels(images: NDArray, source: Path | str) -> NDArray:
    """Images of any shape as uint8 or float32, from uint8, bool (True is white) or floating point.

    Raises InputError, naming `source`, on another type or a value that is not finite or outside
    [0, 1].
    """
    if images.dtype == np.uint8:
        return images
    if images.dtype == np.bool_:
        return 255 * images.astype(np.uint8)
    if not np.issubdtype(images.dtype, np.floating):
        raise InputError(
            f"{source}: images are {images.dtype}, expected uint8, bool or floating point in [0, 1]"
        )
    with np.errstate(over="ignore"):
        images = images.astype(np.float32, copy=False)
    low, high = (float(f(images, initial=0.0)) for f in (np.min, np.max))  # NaN if one is
    if not np.isfinite([low, high]).all():
        raise InputError(f"{source}: images hold NaN or infinity, expected values in [0, 1]")
    if low < 0 or high > 1:
        raise InputError(
            f"{source}: images range from {low:g} to {high:g}, expected values in [0, 1], or uint8"
        )
    return images


def _checked_labels(
    given: ArrayLike | None, images: int, source: Path | str
) -> NDArray[np.int64] | None:
    if given is None:
        return None
    labels = as_array(given, f"{source}: labels")
    if labels.shape != (images,) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{source}: labels are {labels.dtype} of shape {labels.shape}, "
            f"expected one integer for each of {images} images"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < 2**63:
        raise InputError(
            f"{source}: labels range from {labels.min()} to {labels.max()}, expected 0 to 2^63 - 1"
        )
    return labels.astype(np.int64)


def hold_out(data: Dataset, source: Path, seed: int) -> tuple[Dataset, Dataset]:
    """The data split in two: the second part is a tenth, at least one image, drawn by `seed`, since
    sources may be sorted by class. Raises InputError on fewer than two images."""
    images = len(data)
    if images < 2:
        raise InputError(f"{source}: holds {images} image, expected at least 2")
    if data.origin is None:
        data = replace(data, origin=np.arange(images))
    return data.held_out(max(1, images // HELD_OUT), seed, TEST_STREAM)


def joined(first: Dataset, second: Dataset) -> Dataset:
    """Both as one, in the order of their origin if they have one."""

    def both(one: NDArray | None, other: NDArray | None) -> NDArray | None:
        return None if one is None or other is None else np.concatenate([one, other])

    data = Dataset(
        np.concatenate([first.images, second.images]),
        both(first.labels, second.labels),
        both(first.origin, second.origin),
    )
    return data if data.origin is None else data.take(np.argsort(data.origin))


def same_image_shape(train: Dataset, test: Dataset, source: Path | str) -> None:
    """Raises InputError if the splits' images differ in shape."""
    if train.image_shape != test.image_shape:
        raise InputError(
            f"{source}: test images are {test.image_shape}, training images {train.image_shape}"
        )
