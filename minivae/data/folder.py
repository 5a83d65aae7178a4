"""A folder of image files; its subfolders, in alphabetical order, are the classes."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .dataset import Dataset, Splits, hold_out, same_image_shape

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
GREY = ("1", "L", "LA")
"""Pillow's modes of grey images of 8 bits at most."""

MOST_GREY = 2**16 - 1
"""White in Pillow's modes I and I;16, which files of more than 8 bits have."""

VALIDATION = ("val", "valid", "validation")
"""What others call a split that is not for training."""


def load_image_folder(folder: Path, seed: int) -> Splits:
    """The images below a folder. With subfolders `train` and `test` these are the splits, and
    nothing else is read; else a tenth, drawn by `seed`, is the test split. Names that begin with a
    dot are passed over.

    Raises InputError on a folder without images, images beside subfolders of images, a subfolder of
    other files beside such, images of mixed sizes, an unreadable file, splits of different classes,
    or one of VALIDATION in place of `test`.
    """
    name = folder.resolve().name
    if (folder / "train").is_dir():
        if (folder / "test").is_dir():
            return _read_splits(folder, name)
        for other in VALIDATION:
            if (folder / other).is_dir():
                raise InputError(
                    f"{folder}: has folders train and {other}, expected train and test"
                )
    names = tuple(part.name for part in _classes(folder))
    return Splits(name, *hold_out(_read(folder, folder), folder, seed), names)


def _read_splits(folder: Path, name: str) -> Splits:
    names = [tuple(part.name for part in _classes(folder / split)) for split in ("train", "test")]
    if names[0] != names[1]:
        raise InputError(
            f"{folder}: train has the classes {[*names[0]]}, test {[*names[1]]}, expected the same"
        )
    train, test = (_read(folder / split, folder) for split in ("train", "test"))
    same_image_shape(train, test, folder)
    return Splits(name, train, test, names[0])


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.suffix.lower() in SUFFIXES]


def _classes(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir() and _image_files(path)]


def _read(folder: Path, root: Path) -> Dataset:
    """The images in a folder, or in its classes, whose origin is below `root`."""
    classes, loose = _classes(folder), _image_files(folder)
    if classes and loose:
        raise InputError(
            f"{folder}: holds images, such as {loose[0].name}, and subfolders of images, such as "
            f"{classes[0].name}: expected one or the other"
        )
    for part in _visible(folder) if classes else []:
        if part.is_dir() and part not in classes and (others := _visible(part)):
            raise InputError(
                f"{part}: holds no images that can be read, but {others[0].name}: expected "
                f"{', '.join(sorted(SUFFIXES))}, as in {classes[0].name}"
            )
    files = [(path, label) for label, part in enumerate(classes) for path in _image_files(part)]
    labels = np.array([label for _, label in files], np.int64) if classes else None
    files = files or [(path, 0) for path in loose]
    if not files:
        deeper = next((path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES), None)
        raise InputError(
            f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}), in it, in its subfolders "
            "or in those of both train and test, or IDX files, found "
            + ("none" if deeper is None else f"only deeper ones, such as {deeper}")
        )
    images = [_read_image(path) for path, _ in files]
    for (path, _), image in zip(files, images, strict=True):
        found, expected = (f"{i.shape} in {i.dtype}" for i in (image, images[0]))
        if found != expected:
            raise InputError(f"{path}: an image of {found}, expected {expected} like {files[0][0]}")
    origin = np.array([path.relative_to(root).as_posix() for path, _ in files])
    return replace(Dataset.of(np.stack(images), labels, folder), origin=origin)


def _read_image(path: Path) -> NDArray:
    """One image (h, w, c): grey stays one channel, everything else becomes three; what is
    transparent is white. Grey of more than 8 bits is float32: 16 bits scaled to [0, 1], floating
    point as it is."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
                raise ValueError("a TIFF of several pages, expected one")
            if image.mode.startswith("I"):
                pixels = np.asarray(image, np.float32) / MOST_GREY
            elif image.mode == "F":
                pixels = np.asarray(image)
            else:
                shown = _on_white(image) if image.has_transparency_data else image
                pixels = np.asarray(shown.convert("L" if image.mode in GREY else "RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers let whatever a damaged file causes pass
        raise InputError(f"{path}: not a readable image: {error}") from None
    return pixels.reshape(*pixels.shape[:2], -1)


def _on_white(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    drawn = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)
