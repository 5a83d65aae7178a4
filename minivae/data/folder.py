"""A folder of image files; its subfolders, in alphabetical order, are the classes."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .dataset import Dataset, Splits, dataset, hold_out, same_image_shape

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SHUFFLE_STREAM = 6


def load_image_folder(folder: Path, seed: int) -> Splits:
    """The images below a folder. With subfolders `train` and `test` these are the splits, else a
    tenth, drawn by `seed`, is the test split.

    Raises InputError on a folder without images, images of mixed sizes, or an unreadable file.
    """
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = _read(folder / "train"), _read(folder / "test")
        same_image_shape(train, test, folder)
        return Splits(folder.name, train, test)
    data = _read(folder)
    order = np.random.default_rng([seed, SHUFFLE_STREAM]).permutation(len(data))
    return hold_out(data.take(order), folder.name, folder)


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _read(folder: Path) -> Dataset:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and _image_files(path))
    files = [(path, label) for label, part in enumerate(classes) for path in _image_files(part)]
    labels = np.array([label for _, label in files], np.int64) if classes else None
    if not classes:
        files = [(path, 0) for path in _image_files(folder)]
    if not files:
        raise InputError(
            f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}) or IDX files, found none"
        )
    images = [_read_image(path) for path, _ in files]
    for (path, _), image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise InputError(
                f"{path}: an image of {image.shape}, expected {images[0].shape} like {files[0][0]}"
            )
    return dataset(np.stack(images), labels, folder)


def _read_image(path: Path) -> NDArray[np.uint8]:
    """One image (h, w, c): grey stays one channel, everything else becomes three."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            grey = image.mode in ("1", "L", "LA", "I", "I;16", "F")
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image: {error}") from None
    return pixels.reshape(*pixels.shape[:2], -1)
