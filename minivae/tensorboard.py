"""TensorBoard scalars and pictures, through tensorboardX (the extra `tensorboard`)."""

import importlib.util
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError


class TensorBoard:
    """Writes metrics records and pictures into a log folder, which the first of them makes. Raises
    InputError if tensorboardX is not installed, and then if the folder cannot be made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if importlib.util.find_spec("tensorboardX") is None:
            raise InputError("--tensorboard needs tensorboardX: pip install 'minivae[tensorboard]'")

    @cached_property
    def _writer(self) -> Any:
        from tensorboardX import SummaryWriter

        try:
            return SummaryWriter(str(self._folder))
        except OSError as error:
            raise InputError(f"{self._folder}: cannot be written: {error.strerror}") from None

    def record(self, record: dict[str, Any]) -> None:
        """A metrics record, one scalar for each number of each split."""
        for split in ("train", "validation", "test"):
            for name, value in record.get(split, {}).items():
                self._writer.add_scalar(f"{name}/{split}", value, record["step"])
        self._writer.flush()

    def picture(self, path: Path, step: int) -> None:
        """A picture file that the run has drawn."""
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image("progress", pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Writes out what is pending."""
        if "_writer" in vars(self):
            self._writer.close()
