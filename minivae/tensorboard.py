"""TensorBoard scalars and pictures, through tensorboardX (the extra `tensorboard`)."""

from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError


class TensorBoard:
    """Writes metrics records and pictures into a log folder. Raises InputError if tensorboardX is
    not installed or the folder cannot be made."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise InputError(
                "--tensorboard needs tensorboardX: pip install 'minivae[tensorboard]'"
            ) from None
        try:
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            raise InputError(f"{folder}: cannot be written: {error.strerror}") from None

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

    def close(self) -> None:
        """Writes out what is pending."""
        self._writer.close()
