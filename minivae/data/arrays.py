"""Images in NumPy's own files. Arrays of objects, which would have to be unpickled, are refused."""

import difflib
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, unknown
from .dataset import Dataset, Splits, hold_out, same_image_shape

KEYS = {
    "images": ("images", "x_train"),
    "labels": ("labels", "y_train"),
    "test_images": ("test_images", "x_test"),
    "test_labels": ("test_labels", "y_test"),
}
"""For each part of an .npz the key it has here, and the one that Keras gives it."""


def _damaged(path: Path, error: Exception) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "Object arrays" in reason:
        reason = "it holds Python objects, expected plain arrays"
    elif "allow_pickle" in reason:  # what NumPy says of any content that it does not know
        reason = "it begins with something else"
    return InputError(f"{path}: not a whole {path.suffix} file: {reason}")


READ_ERRORS = (
    *(ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, MemoryError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
"""Of a file whose content is not what it says, size and encryption included."""


def _load(path: Path) -> dict[str, NDArray]:
    """The arrays of the file by name; the one of an .npy is called images."""
    # Opened here, since NumPy leaves a file open that it cannot read.
    with open(path, "rb") as file:
        try:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"images": loaded}
            return {key: loaded[key] for key in loaded}
        except READ_ERRORS as error:
            raise _damaged(path, error) from None


def load_npy(path: Path, seed: int) -> Splits:
    """Images n x h x w or n x h x w x c of an .npy file, without labels. Raises InputError on
    any other file or array."""
    images = Dataset.of(_load(path)["images"], None, path)
    return Splits(path.name, *hold_out(images, path, seed))


def load_npz(path: Path, seed: int) -> Splits:
    """The arrays `images`, and if they are there `labels`, `test_images` and `test_labels`, or
    `x_train`, `y_train`, `x_test` and `y_test`, of an .npz file. Raises InputError on any other
    file or arrays."""
    arrays = _load(path)
    parts = {
        part: next((arrays[key] for key in keys if key in arrays), None)
        for part, keys in KEYS.items()
    }
    known = [key for keys in KEYS.values() for key in keys]
    for key in arrays.keys() - {*known}:
        if difflib.get_close_matches(key, known, 1, 0.8):
            raise InputError(f"{path}: {unknown('array', key, known)}")
    images, test_images = parts["images"], parts["test_images"]
    if images is None:
        found = ", ".join(arrays)
        raise InputError(f'{path}: expected an array "images" or "x_train", found {found}')
    train = Dataset.of(images, _flat(parts["labels"]), path)
    if test_images is None:
        if parts["test_labels"] is not None:
            raise InputError(f"{path}: has labels of test images, expected the images as well")
        return Splits(path.name, *hold_out(train, path, seed))
    test = Dataset.of(test_images, _flat(parts["test_labels"]), f"{path}, test images")
    same_image_shape(train, test, path)
    return Splits(path.name, train, test)


def _flat(labels: NDArray | None) -> NDArray | None:
    """Keras writes some labels as a column."""
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:
        return labels[:, 0]
    return labels
