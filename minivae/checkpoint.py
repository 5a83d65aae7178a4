"""A run folder: `config.json`, readable, and `checkpoint.safetensors`, exact.

The checkpoint holds every parameter and moment by name, what the training loop needs to go on as
if it had never stopped, and the model's description once more, so that weights of one model are
never read into another. Nothing is ever unpickled.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, check_is
from .files import exists, replacing
from .models import Autoencoder, model_from_config
from .ops.elbo import TOTALS_SIZE
from .presets import Training, training_from_config

CONFIG, METRICS = "config.json", "metrics.jsonl"
CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"
"""The last checkpoint, and that with the lowest loss on validation images."""

EXPECTED: dict[str, tuple[type, str]] = {
    "training": (dict, "an object"),
    "class_names": (list, "a list"),
    **dict.fromkeys(("source", "preset", "precision", "data", "fingerprint"), (str, "a string")),
}
"""What a configuration holds beside its model, where it does."""


class Progress(NamedTuple):
    """Where a run stands: finished steps, and the running sums of `elbo_totals` since the run
    began, when the epoch began and when metrics were last logged; each (3,)."""

    step: int
    totals: NDArray[np.float64]
    epoch_totals: NDArray[np.float64]
    logged_totals: NDArray[np.float64]


NOT_STARTED = Progress(0, *(np.zeros(TOTALS_SIZE) for _ in range(3)))


def _json(config: dict[str, Any], **options: Any) -> str:
    """As JSON, with NumPy's numbers as numbers."""
    return json.dumps(config, default=np.generic.item, **options)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes the run's description."""
    with replacing(folder / CONFIG) as path:
        path.write_text(_json(config, indent=2) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """The run's description; InputError if `folder` is not a run."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is not a run folder: it has no {CONFIG}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict) or "model" not in config:
        raise InputError(f'{path}: expected a JSON object with the key "model"')
    for key, (kind, expected) in EXPECTED.items():
        if not isinstance(config.get(key, kind()), kind):
            raise InputError(f'{path}: expected {expected} under the key "{key}"')
    if not all(isinstance(name, str) for name in config.get("class_names", [])):
        raise InputError(f'{path}: expected strings under the key "class_names"')
    return config


def read_model(folder: Path) -> Autoencoder:
    """The model that the run's description has, with initial weights."""
    with _of_config(folder):
        return model_from_config(read_config(folder)["model"])


def read_training(folder: Path) -> Training:
    """The training that the run's description has; InputError if it is a saved model's, which has
    none."""
    config = read_config(folder)
    if "training" not in config:
        raise InputError(f"{folder} holds a saved model, not a run that could be resumed")
    with _of_config(folder):
        return training_from_config(config["training"])


@contextmanager
def _of_config(folder: Path) -> Iterator[None]:
    """Errors that name the configuration."""
    try:
        yield
    except InputError as error:
        where = "" if CONFIG in str(error) else f"{folder / CONFIG}: "
        raise InputError(f"{where}{error}") from None


def write_checkpoint(
    folder: Path, model: Autoencoder, progress: Progress, name: str = CHECKPOINT
) -> None:
    """Writes the checkpoint beside the old one, syncs it and renames it."""
    from safetensors.numpy import save as as_bytes

    tensors = {name: np.ascontiguousarray(t) for name, t in model.tensors().items()}
    tensors |= {f"progress.{key}": np.asarray(value) for key, value in progress._asdict().items()}
    metadata = {"format": "minivae", "model": _json(model.config())}
    with replacing(folder / name) as path:
        # Not save_file, which does not raise OSError on a full disk.
        path.write_bytes(as_bytes(tensors, metadata))


def _describes(text: str, model: Autoencoder) -> bool:
    """Whether a description is that of a model, options that it does not name at their defaults."""
    try:
        return model_from_config(json.loads(text)).config() == model.config()
    except (ValueError, TypeError, RecursionError, InputError):
        return False


def read_checkpoint(folder: Path, model: Autoencoder, name: str = CHECKPOINT) -> Progress:
    """Puts the checkpoint's tensors into the model and returns where its run stands.

    Raises InputError, and leaves the model as it was, if the file is missing, damaged, of another
    model, or holds a parameter that is not a finite float32.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / name
    if not path.is_file():
        hint = "; it is kept where a run has validation images" if name == BEST else ""
        raise InputError(f"{path}: no such checkpoint{hint}")
    try:
        path.open("rb").close()  # safetensors calls whatever cannot be read missing
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from None
    if metadata.get("format") != "minivae":
        raise InputError(f"{path}: not a checkpoint of minivae")
    if not _describes(metadata.get("model", ""), model):
        raise InputError(f"{path}: holds another model than {folder / CONFIG} describes")
    try:
        progress = Progress(
            int(tensors.pop("progress.step")),
            *(tensors.pop(f"progress.{name}") for name in Progress._fields[1:]),
        )
    except KeyError as error:
        raise InputError(f"{path}: expected the tensor {error}") from None
    except TypeError:
        raise InputError(f"{path}: progress.step is not one number") from None
    if progress.step < 0 or any(t.shape != (TOTALS_SIZE,) for t in progress[1:]):
        raise InputError(f"{path}: the progress is of another shape, or below 0")
    for name, tensor in tensors.items():
        if tensor.dtype.kind != "f":
            raise InputError(f"{path}: tensor {name} is {tensor.dtype}, expected float32")
        if name in model.parameters.values and not np.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name} holds NaN or infinity")
    try:
        model.set_tensors(tensors)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return progress


def save(model: Autoencoder, folder: str | Path) -> None:
    """Writes the model into a folder that `load` reads.

    Raises InputError if the folder holds a run, which would lose its training.
    """
    check_is("model", model, Autoencoder)
    check_is("folder", folder, str, Path)
    folder = Path(folder)
    if exists(folder / CONFIG) and "training" in read_config(folder):
        raise InputError(f"{folder} holds a run, expected another folder for the model alone")
    write_checkpoint(folder, model, NOT_STARTED)
    write_config(folder, {"model": model.config()})


def load(folder: str | Path, device: str = "auto", *, best: bool = False) -> Autoencoder:
    """The model of a run folder, or of one that `save` wrote, on a device: from the last
    checkpoint, or the best by validation loss.

    Raises InputError if the folder, its configuration or its checkpoint is missing or damaged.
    """
    check_is("folder", folder, str, Path)
    return load_at_step(Path(folder), device, best=best)[0]


def load_at_step(folder: Path, device: str, *, best: bool) -> tuple[Autoencoder, int]:
    """The same, and after how many steps the checkpoint was written."""
    model = read_model(folder).to(device)
    return model, read_checkpoint(folder, model, BEST if best else CHECKPOINT).step


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, without a last line that was cut off while being written.
    InputError if another is not a record."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not readable as text: {error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            record = None
        if not _is_metrics(record):
            raise InputError(f"{path}: line {number} is not a record of metrics")
        records.append(record)
    return records


def best_epoch(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The record with the lowest validation loss, the first of several; empty if there is none."""
    validated = [record for record in metrics if "validation" in record]
    return min(validated, key=lambda record: float(record["validation"]["loss"]), default={})


def _is_metrics(record: Any) -> bool:
    """Whether this is what training records of a step or an epoch."""
    if not isinstance(record, dict):
        return False
    needed = ("train", "test") if "epoch" in record else ("train",)
    splits = [record[name] for name in ("train", "test", "validation") if name in record]
    return (
        all(isinstance(record.get(name), int | float) for name in ("step", "seconds"))
        and all(name in record for name in needed)
        and all(isinstance(means, dict) and "loss" in means for means in splits)
        and all(isinstance(mean, int | float) for means in splits for mean in means.values())
    )
