"""Images to train on: `load` takes a name or a path and gives a training and a test split."""

import difflib
from pathlib import Path

from ..errors import InputError, check_is, check_seed
from ..files import exists
from .dataset import Dataset, Splits

__all__ = ["BUILTIN", "Dataset", "Splits", "lasting_name", "load"]

BUILTIN = ("glyphs", "mnist", "fashion-mnist")
"""Data sets by name: the embedded digits, and two that are downloaded once."""

HERE = Path()


def load(source: str | Path, *, seed: int = 0) -> Splits:
    """The splits of a data set by name, or of a path.

    A path is a folder with MNIST's IDX files (gzipped or not), one IDX file of images, a `.npy` or
    `.npz` of images, or a folder of image files whose subfolders are classes. Where no test split
    is given, a tenth drawn by `seed` is held out.

    Raises InputError, naming the file and what was expected.
    """
    check_seed(seed)
    check_is("data", source, str, Path)
    try:
        return _load(source, seed)
    except OSError as error:
        where = error.filename or source
        raise InputError(f"{where}: cannot be read: {error.strerror or error}") from None


def _load(source: str | Path, seed: int) -> Splits:
    if source == "glyphs":
        from .glyphs import glyphs

        return glyphs(seed)
    if source in BUILTIN:
        from .download import CLASS_NAMES, find_or_download
        from .idx import load_idx_folder

        splits = load_idx_folder(find_or_download(source), source, seed)
        return splits._replace(class_names=CLASS_NAMES.get(source, ()))
    return _load_path(Path(source), seed)


def lasting_name(source: str | Path) -> str:
    """The `source` by which `load` finds the same data from any working directory."""
    return str(source) if source in BUILTIN else str(Path(source).absolute())


def _load_path(path: Path, seed: int) -> Splits:
    from .arrays import load_npy, load_npz
    from .folder import SUFFIXES, load_image_folder
    from .idx import has_idx_files, load_idx_file, load_idx_folder

    if not exists(path):
        near = difflib.get_close_matches(str(path), BUILTIN, 1, 0.4) if path.parent == HERE else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"data {str(path)!r} is neither a path nor one of {', '.join(BUILTIN)}{hint}"
        )
    if path.is_dir():
        if has_idx_files(path):
            return load_idx_folder(path, path.resolve().name, seed)
        return load_image_folder(path, seed)
    if path.suffix.lower() in SUFFIXES:
        raise InputError(f"{path}: one image, expected a folder of several")
    readers = {".npy": load_npy, ".npz": load_npz}
    return readers.get(path.suffix.lower(), load_idx_file)(path, seed)
