"""MNIST's IDX files, gzipped or not (LeCun, Cortes & Burges, "The MNIST database")."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .dataset import Dataset, Splits, hold_out, same_image_shape

UINT8 = 0x08
TRAIN, TEST = "train", "t10k"
GZIP_MAGIC = b"\x1f\x8b"


def file_name(split: str, axes: int) -> str:
    """The name of a split's images (3 axes) or labels (1 axis)."""
    return f"{split}-{'images' if axes == 3 else 'labels'}-idx{axes}-ubyte"


def find_file(folder: Path, split: str, axes: int) -> Path | None:
    """The file of that name in a folder, gzipped or not, or None."""
    name = file_name(split, axes)
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if path.is_file()), None)


def has_idx_files(folder: Path) -> bool:
    """Whether the folder holds the images of a training split."""
    return find_file(folder, TRAIN, 3) is not None


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """The array of unsigned bytes in an IDX file with so many axes.

    Raises InputError on a wrong magic number, a damaged gzip stream, or a size in the header that
    the file does not have. Reads no more than the header promises.
    """
    with open(path, "rb") as raw:
        zipped = raw.read(2) == GZIP_MAGIC
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            header = file.read(4 * (1 + axes))
            if len(header) < 4 * (1 + axes):
                raise InputError(
                    f"{path}: ends inside the header of an IDX file, expected .npy, .npz, an IDX "
                    "file or a folder"
                )
            magic, *shape = struct.unpack(f">{1 + axes}I", header)
            if magic != UINT8 << 8 | axes:
                raise InputError(
                    f"{path}: magic number {magic:#010x}, expected {UINT8 << 8 | axes:#010x} of an "
                    f"IDX file (unsigned bytes, {axes} axes), or .npy, .npz or a folder"
                )
            content = _read_at_most(file, math.prod(shape) + 1)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: damaged gzip file: {error}") from None
    if len(content) != math.prod(shape):
        more = "more" if len(content) > math.prod(shape) else f"{len(content)}"
        raise InputError(
            f"{path}: the header promises {' x '.join(map(str, shape))} bytes, the file has {more}"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_at_most(file: IO[bytes] | gzip.GzipFile, size: int) -> bytes:
    """Reads in blocks, so that a header that lies about its size costs no memory."""
    blocks, left = [], size
    while left and (block := file.read(min(left, 1 << 22))):
        blocks.append(block)
        left -= len(block)
    return b"".join(blocks)


def _read_split(folder: Path, split: str) -> Dataset | None:
    images, labels = find_file(folder, split, 3), find_file(folder, split, 1)
    if images is None:
        return None
    numbers = None if labels is None else read_idx(labels, 1)
    return Dataset.of(read_idx(images, 3), numbers, f"{folder}, {split} images")


def load_idx_folder(folder: Path, name: str, seed: int) -> Splits:
    """The splits of a folder with `train-images-idx3-ubyte`, and its labels and test files if they
    are there. Raises InputError on damaged files and on those that do not fit each other."""
    train, test = _read_split(folder, TRAIN), _read_split(folder, TEST)
    if train is None:
        raise InputError(f"{folder}: expected a file {file_name(TRAIN, 3)}[.gz]")
    if test is None:
        return Splits(name, *hold_out(train, folder, seed))
    same_image_shape(train, test, folder)
    return Splits(name, train, test)


def load_idx_file(path: Path, seed: int) -> Splits:
    """The images of one IDX file, without labels."""
    return Splits(path.name, *hold_out(Dataset.of(read_idx(path, 3), None, path), path, seed))
