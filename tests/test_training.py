"""The training loop: it learns, it is deterministic, and stopping it anywhere changes nothing."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from minivae import (
    VAE,
    Adam,
    Autoencoder,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Flatten,
    InputError,
    Objective,
    ReLU,
    Reshape,
    Training,
    fit,
    load,
    save,
)
from minivae import train as train_module
from minivae.backends.reference import ReferenceBackend
from minivae.checkpoint import CHECKPOINT, CONFIG, METRICS, read_metrics
from minivae.data import Dataset, Splits
from minivae.layers import JoinLabel, Layer
from minivae.train import Interrupted, NotFiniteError, Trainer

IMAGES, TEST_IMAGES, SIZE = 50, 20, 6


def splits() -> Splits:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (IMAGES + TEST_IMAGES, SIZE, SIZE, 1), dtype=np.uint8)
    return Splits("noise", Dataset(images[:IMAGES], None), Dataset(images[IMAGES:], None))


def small_vae(seed: int = 0, **objective: Any) -> VAE:
    encoder = [Flatten(), Dense(16), ReLU(), Dense(6)]
    decoder = [Dense(16), ReLU(), Dense(SIZE * SIZE)]
    return VAE(encoder, decoder, Objective(**objective), (SIZE, SIZE, 1), seed=seed)


def train(
    model: VAE, training: Training, device: str = "cpu", **options: Any
) -> list[dict[str, Any]]:
    return fit(model, splits(), training, device=device, progress=False, **options)


def without_seconds(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in metrics]


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return load(folder, "cpu").tensors()


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.tobytes() == second[name].tobytes(), name


# Batches of 16 from 50 images: three whole ones and a partial one of 2.
BUSY = Training(
    epochs=4,
    batch_size=16,
    keep_last=True,
    binarization="stochastic",
    log_every=3,
    checkpoint_every=5,
    optimizer=Adam(lr=3e-3, weight_decay=0.01, schedule="cosine", warmup_steps=3, clip_norm=5),
)


def test_the_loss_falls() -> None:
    metrics = train(small_vae(), Training(epochs=30, batch_size=10))
    losses = [record["train"]["loss"] for record in metrics]
    # Noise cannot be learned, but its mean can.
    assert losses[-1] < losses[0] - 0.5


def test_an_epoch_record_has_the_documented_keys() -> None:
    record = train(small_vae(), Training(epochs=1, batch_size=16))[0]
    posterior = {"active_units", "posterior_kl"}
    assert set(record) == {"epoch", "step", "train", "test", "seconds"} | posterior
    assert set(record["train"]) == set(record["test"]) == {"loss", "reconstruction", "kl"}
    assert (record["epoch"], record["step"]) == (1, 3)


def test_the_loss_is_reconstruction_plus_beta_times_kl() -> None:
    for record in train(small_vae(beta=2.5), Training(epochs=2, batch_size=16)):
        for split in ("train", "test"):
            terms = record[split]
            expected = terms["reconstruction"] + 2.5 * terms["kl"]
            # Float32 sums over 36 pixels.
            assert terms["loss"] == pytest.approx(expected, rel=1e-5)


def test_one_seed_gives_the_same_bits_twice() -> None:
    first, second = small_vae(), small_vae()
    metrics = [train(model, BUSY) for model in (first, second)]
    assert_same_bits(first.tensors(), second.tensors())
    assert without_seconds(metrics[0]) == without_seconds(metrics[1])


def test_another_seed_gives_another_run() -> None:
    first = train(small_vae(seed=0), Training(epochs=1, batch_size=16, seed=0))
    second = train(small_vae(seed=0), Training(epochs=1, batch_size=16, seed=1))
    assert first[0]["train"]["loss"] != second[0]["train"]["loss"]


def test_the_last_partial_batch_is_dropped_unless_kept() -> None:
    dropped = train(small_vae(), Training(epochs=1, batch_size=16))
    kept = train(small_vae(), Training(epochs=1, batch_size=16, keep_last=True))
    assert (dropped[-1]["step"], kept[-1]["step"]) == (3, 4)


def test_the_train_loss_is_the_mean_over_images_whatever_the_batch_sizes() -> None:
    # With a vanishing learning rate the model stays the same, and only the noise differs.
    frozen = Adam(lr=1e-12)
    partial = train(
        small_vae(beta=0), Training(epochs=1, batch_size=48, keep_last=True, optimizer=frozen)
    )
    whole = train(small_vae(beta=0), Training(epochs=1, batch_size=50, optimizer=frozen))
    # Weighting the partial batch of two images as a whole one would shift the loss by far more.
    assert partial[0]["train"]["loss"] == pytest.approx(whole[0]["train"]["loss"], rel=5e-3)


def test_steps_end_a_run_inside_an_epoch() -> None:
    metrics = train(small_vae(), Training(epochs=9, batch_size=16, steps=5, log_every=2))
    assert [record["step"] for record in metrics] == [2, 3, 4, 5]
    assert metrics[-1]["epoch"] == 2


def test_step_records_average_to_the_epoch_record() -> None:
    metrics = train(small_vae(), Training(epochs=1, batch_size=10, log_every=1))
    steps = [record["train"]["loss"] for record in metrics if "epoch" not in record]
    assert len(steps) == 5
    # Sums in float64 of float32 losses.
    assert np.mean(steps) == pytest.approx(metrics[-1]["train"]["loss"], rel=1e-9)


class Watched(ReferenceBackend):
    """Counts the host's looks at the device."""

    looks = 0

    def to_numpy(self, array: Any) -> np.ndarray:
        self.looks += 1
        return super().to_numpy(array)

    def synchronize(self) -> None:
        self.looks += 1


def test_the_host_looks_at_the_device_as_often_as_it_logs_however_many_steps_are_between() -> None:
    looks = []
    _, train, test, _ = splits()
    many = Splits("many", Dataset(np.tile(train.images, (10, 1, 1, 1)), None), test)
    for interval in (3, 120):
        backend = Watched()
        training = Training(epochs=1, batch_size=2, images=4 * interval, log_every=interval)
        fit(small_vae(), many, training, device=backend, progress=False)
        looks.append(backend.looks)
    assert looks[0] == looks[1] > 0


def test_patience_ends_a_run_whose_validation_loss_rises() -> None:
    adam = Adam(lr=0.02)
    training = Training(epochs=500, batch_size=10, patience=3, validation=10, optimizer=adam)
    metrics = train(small_vae(), training)
    losses = [record["validation"]["loss"] for record in metrics]
    assert len(losses) < 500
    assert int(np.argmin(losses)) == len(losses) - 4


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that does not ignore SIGINT, as what a shell runs beside it does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 10, 15])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_by_a_signal_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, stop: int, number: signal.Signals
) -> None:
    def send_signal(step: int, model: Any) -> None:
        if step == stop:
            os.kill(os.getpid(), number)

    whole = train(small_vae(), BUSY, out=tmp_path / "whole")
    training = Training(**{**vars(BUSY), "picture_every": 1})
    with pytest.raises(Interrupted, match=f"at step {stop}"):
        train(small_vae(), training, out=tmp_path / "stopped", on_step=send_signal)
    resumed = train(small_vae(), training, out=tmp_path / "stopped", resume=True)
    assert_same_bits(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "stopped"))
    assert without_seconds(whole) == without_seconds(resumed)
    on_disk = read_metrics(tmp_path / "stopped" / METRICS)
    assert without_seconds(on_disk) == without_seconds(whole)


KILLED_RUN = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_training import BUSY, small_vae, train
from minivae import Training
def kill(step, model):
    if step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
training = Training(**{**vars(BUSY), "picture_every": 1})
train(small_vae(), training, out=sys.argv[2], on_step=kill, resume=len(sys.argv) > 4)
"""


def test_a_run_killed_at_random_steps_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    train(small_vae(), BUSY, out=tmp_path / "whole")
    steps = np.random.default_rng().choice(np.arange(1, 16), 3, replace=False)
    resume: list[str] = []
    for step in [*sorted(steps), 10**6]:
        arguments = [str(Path(__file__).parent), str(tmp_path / "killed"), str(step), *resume]
        done = subprocess.run([sys.executable, "-c", KILLED_RUN, *arguments], check=False)
        assert done.returncode == (0 if step == 10**6 else -signal.SIGKILL), steps
        resume = ["resume"]
    assert_same_bits(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "killed"))
    whole, killed = (read_metrics(tmp_path / name / METRICS) for name in ("whole", "killed"))
    assert without_seconds(whole) == without_seconds(killed), steps


def test_a_metrics_line_cut_off_while_being_written_is_dropped(tmp_path: Path) -> None:
    train(small_vae(), BUSY, out=tmp_path)
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"epoch": 9, "st')
    assert read_metrics(tmp_path / METRICS)[-1]["epoch"] == 4


@pytest.mark.parametrize(
    "line",
    ["3", '{"epoch": 1}', '{"step": 1, "seconds": 1, "train": {}}', '{"step": "1", "seconds": 1}'],
)
def test_a_line_that_is_no_record_of_metrics_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / METRICS
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=r"metrics.jsonl: line 1 is not a record of metrics"):
        read_metrics(path)


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(small_vae(), Training(batch_size=10, epochs=1), out=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="already holds a run"):
        train(small_vae(), Training(batch_size=10, epochs=1), out=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_another_began_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Trainer):
        def begin(self) -> None:
            monkeypatch.undo()
            train(small_vae(), Training(batch_size=10, epochs=1), out=tmp_path)
            before.update({path: path.read_bytes() for path in tmp_path.iterdir()})

    before: dict[Path, bytes] = {}
    monkeypatch.setattr("minivae.train.Trainer", Late)
    with pytest.raises(InputError, match="already holds a run"):
        train(small_vae(), Training(batch_size=5, epochs=1), out=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before != {}


@pytest.mark.parametrize(
    "other", [{"batch_size": 8}, {"optimizer": Adam(lr=3e-3)}, {"seed": 1}, {"keep_last": False}]
)
def test_a_run_is_not_resumed_by_another_training(tmp_path: Path, other: dict[str, Any]) -> None:
    train(small_vae(), BUSY, out=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"is .*, the run has "):
        train(small_vae(), Training(**{**vars(BUSY), **other}), out=tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_saved_model_is_not_a_run_that_could_be_resumed(tmp_path: Path) -> None:
    save(small_vae(), tmp_path)
    with pytest.raises(InputError, match="holds a saved model, not a run"):
        train(small_vae(), BUSY, out=tmp_path, resume=True)


def test_metrics_describe_the_posterior_of_the_images_as_they_are_binarized() -> None:
    # White and grey pixels alone: threshold makes all of them white.
    grey = np.full((IMAGES, SIZE, SIZE, 1), 200, np.uint8)
    data = Splits("grey", Dataset(grey, None), Dataset(grey, None))
    training = Training(epochs=1, batch_size=10, binarization="threshold")
    (line,) = fit(small_vae(), data, training, device="cpu", progress=False)
    # Of the same images, by two sums in float32.
    assert line["posterior_kl"] == pytest.approx(line["test"]["kl"], rel=1e-5)


def test_settings_may_be_numbers_of_numpy(tmp_path: Path) -> None:
    adam = Adam(lr=np.float32(0.25))  # type: ignore[arg-type]
    model = small_vae(seed=np.int64(3), beta=np.float32(0.5))  # type: ignore[arg-type]
    training = Training(epochs=np.int64(1), batch_size=10, optimizer=adam)  # type: ignore[arg-type]
    train(model, training, out=tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["training"]["optimizer"]["lr"], config["model"]["seed"]) == (0.25, 3)
    assert load(tmp_path, "cpu").config() == model.config()


def test_a_model_is_trained_where_and_as_it_is() -> None:
    model = small_vae().to("reference", np.float64)
    fit(model, splits(), Training(batch_size=10, epochs=1), progress=False)
    assert (model.backend.name, model.dtype) == ("reference", np.float64)


@pytest.mark.parametrize("clip_norm", [0.0, 1e-3])
def test_metrics_have_the_gradients_norm_where_it_is_clipped(clip_norm: float) -> None:
    training = Training(batch_size=10, epochs=1, optimizer=Adam(clip_norm=clip_norm))
    (line,) = train(small_vae(), training)
    # Of a loss of some tens of nats, far above the bound.
    assert line.get("gradient_norm", 0) > 0.1 if clip_norm else "gradient_norm" not in line


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("name", ["encoder.1.weight", "decoder.0.bias"])
def test_a_loss_that_is_not_finite_names_step_and_tensor_and_keeps_the_checkpoint(
    tmp_path: Path, name: str, device: str
) -> None:
    def poison(step: int, model: VAE) -> None:
        if step == 4:
            model.parameters.values[name].flat[3] = np.nan

    training = Training(epochs=5, batch_size=16, picture_every=1)
    with pytest.raises(NotFiniteError, match=f"at step 5: see {name}"):
        train(small_vae(), training, device, out=tmp_path, on_step=poison)
    kept = tensors_of(tmp_path)
    assert all(np.isfinite(tensor).all() for tensor in kept.values())


def test_parameters_survive_a_loss_that_is_not_finite() -> None:
    model = small_vae()
    model.to("cpu")
    model.parameters.values["decoder.2.bias"][0] = np.inf
    before = model.tensors()
    with pytest.raises(NotFiniteError):
        train(model, Training(epochs=1, batch_size=16))
    assert_same_bits(before, model.tensors())


def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_vae(), BUSY, out=tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(InputError, match="No space left on device"):
        train(small_vae(), Training(**{**vars(BUSY), "epochs": 6}), out=tmp_path, resume=True)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, CONFIG, METRICS}


def test_a_file_that_may_not_grow_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="no limits of a file's size on this system")
    code = f"""
import resource, signal, minivae
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
model = minivae.preset("glyphs").model().to("reference")
try:
    minivae.save(model, {str(tmp_path)!r})
except minivae.InputError as error:
    print(error)
"""
    # -B: or Python itself might leave a truncated file of bytecode.
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot write {tmp_path / CHECKPOINT}: File too large\n"


def test_a_second_run_of_a_model_begins_with_fresh_moments() -> None:
    model, fresh = small_vae(), small_vae()
    train(model, BUSY)
    values = {name: t for name, t in model.tensors().items() if "moment" not in name}
    fresh.to("cpu").set_tensors(values)
    train(model, BUSY)
    train(fresh, BUSY)
    assert_same_bits(model.tensors(), fresh.tensors())


def test_a_run_extended_from_inside_an_epoch_ends_as_the_whole_one(tmp_path: Path) -> None:
    whole = train(small_vae(), Training(batch_size=16, keep_last=True, steps=8))
    for steps, resume in ((6, False), (8, True)):
        training = Training(batch_size=16, keep_last=True, steps=steps)
        metrics = train(small_vae(), training, out=tmp_path, resume=resume)
    assert without_seconds(metrics) == without_seconds(whole)
    assert without_seconds(read_metrics(tmp_path / METRICS)) == without_seconds(whole)


def test_an_extended_run_keeps_its_new_length(tmp_path: Path) -> None:
    train(small_vae(), BUSY, out=tmp_path)
    longer = Training(**{**vars(BUSY), "epochs": 6})
    train(small_vae(), longer, out=tmp_path, resume=True)
    assert json.loads((tmp_path / CONFIG).read_text())["training"]["epochs"] == 6


def test_a_run_is_not_resumed_to_end_earlier_than_it_is(tmp_path: Path) -> None:
    train(small_vae(), BUSY, out=tmp_path)
    with pytest.raises(InputError, match=r"at step 16, expected to end no earlier .* at step 8"):
        train(small_vae(), Training(**{**vars(BUSY), "epochs": 2}), out=tmp_path, resume=True)


def test_a_run_names_the_data_that_it_was_given_by_path(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", splits().train.images)
    run = tmp_path / "run"
    options: dict[str, Any] = {"device": "cpu", "progress": False}
    fit(small_vae(), tmp_path / "images.npy", BUSY, out=run, **options)
    assert json.loads((run / CONFIG).read_text())["source"] == str(tmp_path / "images.npy")


@pytest.mark.parametrize("other", ["images", "labels"])
def test_a_run_is_not_resumed_on_other_data(tmp_path: Path, other: str) -> None:
    train(small_vae(), BUSY, out=tmp_path / "run")
    before = (tmp_path / "run" / METRICS).read_bytes()
    _, first, test, _ = splits()
    images = first.images.copy()
    images[-1, 0, 0, 0] ^= other == "images"
    labels = np.zeros(IMAGES, np.int64) if other == "labels" else None
    changed = Splits("changed", Dataset(images, labels), test)
    with pytest.raises(InputError, match="labels of changed differ from those"):
        fit(small_vae(), changed, BUSY, out=tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run" / METRICS).read_bytes() == before


def test_a_single_test_image_tells_nothing_of_active_units() -> None:
    _, first, test, _ = splits()
    one = Splits("one", first, test.take(slice(1)))
    metrics = fit(small_vae(), one, Training(epochs=3, batch_size=10), progress=False)
    assert [record["active_units"] for record in metrics] == [None] * 3
    assert not any("warning" in record for record in metrics)


def test_a_run_that_another_process_trains_is_not_resumed(tmp_path: Path) -> None:
    def resume(step: int, model: Any) -> None:
        with pytest.raises(InputError, match="another process is training this run"):
            train(small_vae(), training, out=tmp_path, resume=True)

    training = Training(epochs=1, batch_size=16, picture_every=2)
    assert train(small_vae(), training, out=tmp_path, on_step=resume)
    train(small_vae(), training, out=tmp_path, resume=True)


SECOND_INTERRUPT = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from test_training import BUSY, small_vae, train
from minivae import Training
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell runs beside it
def twice(step, model):
    os.kill(os.getpid(), signal.SIGINT)
    while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        time.sleep(0.001)  # two that are pending at once are one
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
train(small_vae(), Training(**{**vars(BUSY), "picture_every": 1}), on_step=twice)
"""


def test_a_trainer_does_not_go_on_with_a_model_that_has_gone_elsewhere() -> None:
    model = small_vae().to("cpu")
    trainer = Trainer(model, splits(), Training(batch_size=10))
    trainer.step()
    model.to("cpu")
    with pytest.raises(InputError, match="put on a device after its trainer was made"):
        trainer.step()


def test_a_second_interrupt_stops_at_once() -> None:
    command = [sys.executable, "-c", SECOND_INTERRUPT, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "stopping after this step; interrupt again to stop at once" in done.stderr
    assert done.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((splits(), small_vae()), "model is of type Splits, expected Autoencoder"),
        ((small_vae(), splits().train), "data is of type Dataset, expected Splits or str or Path"),
        (
            (small_vae(), Splits(splits().train, splits().test, "noise")),
            "the name of the splits is of type Dataset, expected str",
        ),
        ((small_vae(), splits(), Adam()), "training is of type Adam, expected Training"),
        (
            (small_vae(), splits()._replace(train=splits().train.images)),
            "a split of noise is of type ndarray, expected Dataset",
        ),
    ],
    ids=["model", "data", "order", "training", "splits"],
)
def test_fit_names_an_argument_of_the_wrong_kind(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        fit(*arguments, progress=False)


def test_a_data_set_that_was_never_checked_is_checked_before_training() -> None:
    grey = Dataset(np.full((40, SIZE, SIZE, 1), 200, np.float32), None)
    with pytest.raises(InputError, match="noise: images range from 0 to 200"):
        fit(small_vae(), splits()._replace(train=grey), progress=False)


def test_images_without_an_axis_of_channels_train_like_those_with_one() -> None:
    _, first, test, _ = splits()
    bare = Splits("noise", *(Dataset(split.images[..., 0], None) for split in (first, test)))
    training = Training(epochs=1, batch_size=10)
    found = [fit(small_vae(), data, training, progress=False) for data in (splits(), bare)]
    assert without_seconds(found[0]) == without_seconds(found[1])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("encoder.1.weight", np.int32, "tensor encoder.1.weight is int32, expected float32"),
        ("progress.step", np.array([1, 2]), "progress.step is not one number"),
        ("progress.step", np.array(-5), "the progress is of another shape, or below 0"),
        ("progress.totals", np.zeros(2), "the progress is of another shape, or below 0"),
    ],
)
def test_a_checkpoint_with_a_tensor_of_another_kind_is_refused(
    tmp_path: Path, name: str, value: Any, said: str
) -> None:
    fit(small_vae(), splits(), Training(epochs=1, batch_size=16), out=tmp_path, progress=False)
    path = tmp_path / CHECKPOINT
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[name] = value if isinstance(value, np.ndarray) else tensors[name].astype(value)
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match=re.escape(said)):
        load(tmp_path, "cpu")


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = small_vae()
    model.parameters.values["encoder.1.bias"][0] = np.nan
    save(model, tmp_path)
    with pytest.raises(InputError, match=r"tensor encoder\.1\.bias holds NaN or infinity"):
        load(tmp_path)


def test_a_signal_that_is_ignored_stops_no_run() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train_module._pending_signal() as pending:
            os.kill(os.getpid(), signal.SIGINT)
            assert not pending
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_metrics_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=f"{METRICS}: not readable as text"):
        read_metrics(tmp_path / METRICS)


@pytest.mark.parametrize("options", [{"resume": True}, {"best": True}])
def test_resuming_without_what_it_needs_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="resume needs the run folder"):
        train(small_vae(), BUSY, **options)


@pytest.mark.parametrize("when", [4, 6])
def test_an_update_that_is_not_finite_ends_the_run_before_it_is_saved(
    tmp_path: Path, when: int
) -> None:
    train(small_vae(), Training(epochs=1, batch_size=16), out=tmp_path)
    model = small_vae()

    def spoil(step: int, model: Autoencoder) -> None:
        model.parameters.values["decoder.2.bias"][0] = np.nan

    longer = Training(epochs=2, batch_size=16, picture_every=when, checkpoint_every=1)
    with pytest.raises(NotFiniteError, match=rf"decoder\.2\.bias is not finite after step {when}"):
        train(model, longer, out=tmp_path, resume=True, on_step=spoil)
    assert all(np.isfinite(tensor).all() for tensor in tensors_of(tmp_path).values())


def test_the_loss_of_a_model_that_is_not_finite_is_infinite() -> None:
    model = small_vae().to("cpu")
    model.parameters.values["decoder.2.bias"][0] = np.nan
    assert model.evaluate(splits().test.images) == dict.fromkeys(
        ("loss", "reconstruction", "kl"), np.inf
    )


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((2, 5, 6, 1), np.uint8), {}, r"shape \(2, 5, 6, 1\), the model takes"),
        (np.full((2, 6, 6, 1), 255.0), {}, "range from 0 to 255, expected values in"),
        (np.full((2, 6, 6, 1), np.nan), {}, "NaN or infinity"),
        (np.zeros((2, 6, 6, 1), np.uint8), {"binarization": "stocastic"}, "'stocastic', expected"),
    ],
    ids=["shape", "range", "nan", "binarization"],
)
def test_evaluation_refuses_what_it_cannot_take(
    images: np.ndarray, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        small_vae().to("cpu").evaluate(images, **options)


def test_test_images_of_another_size_are_refused_before_training() -> None:
    odd = Splits("odd", splits().train, Dataset(np.zeros((3, 5, 6, 1), np.uint8), None))
    with pytest.raises(InputError, match=r"odd: images are \(5, 6, 1\)"):
        fit(small_vae(), odd, BUSY, device="cpu", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epochs": "3"}, "epochs is '3'"), ({"batch_size": 16.0}, "batch_size is 16.0")],
)
def test_a_training_setting_of_the_wrong_kind_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Training(**options)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size is 51, expected at most the 50"):
        train(small_vae(), Training(epochs=1, batch_size=51))


def test_images_of_another_size_are_refused() -> None:
    model = VAE([Flatten(), Dense(4)], [Dense(64)], Objective(), (8, 8, 1))
    with pytest.raises(InputError, match=r"noise: images are \(6, 6, 1\)"):
        train(model, Training(epochs=1, batch_size=16))


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_recorded_step_does_what_the_step_does(clip_norm: float, conditional: bool) -> None:
    def trainer() -> Trainer:
        join: list[Layer] = [JoinLabel(3)] if conditional else []
        encoder = [Flatten(), *join, Dense(11), ReLU(), Dense(4)]
        model = VAE(encoder, [*join, Dense(SIZE * SIZE)], Objective(), (SIZE, SIZE, 1)).to("cpu")
        images = splits().train.images
        data = Dataset(images, np.arange(len(images)) % 3)
        training = Training(batch_size=16, optimizer=Adam(clip_norm=clip_norm))
        return Trainer(model, Splits("noise", data, data), training)

    recorded, called = trainer(), trainer()
    for _ in range(3):
        recorded.step()
        called._step(16)
    assert_same_bits(recorded.model.tensors(), called.model.tensors())


# A batch in parts


@pytest.mark.parametrize("device", ["reference", "cpu", "emulated"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.01])
def test_the_parts_of_a_batch_make_the_update_of_the_whole(device: str, clip_norm: float) -> None:
    # An epsilon that makes an update as smooth in the gradient as rounding needs it.
    optimizer = Adam(lr=0.1, epsilon=1.0, clip_norm=clip_norm)
    trained = []
    for accumulate in (1, 4):
        encoder = [Conv2d(5, 3, stride=2, padding=1), ReLU(), Flatten(), Dense(7)]
        decoder = [Dense(45), Reshape((3, 3, 5))]
        restore = ConvTranspose2d(1, 3, stride=2, padding=1, output_padding=1)
        model = Autoencoder(encoder, [*decoder, restore], Objective("gaussian"), (SIZE, SIZE, 1))
        training = Training(batch_size=16, optimizer=optimizer, accumulate=accumulate)
        trainer = Trainer(model.to(device), splits(), training)
        for _ in range(3):
            trainer.step()
        trained.append((model.tensors(), trainer.progress.totals))
    (whole, whole_totals), (parts, parts_totals) = trained
    np.testing.assert_allclose(parts_totals, whole_totals, rtol=1e-5)
    for name, tensor in whole.items():
        # Float32 sums of 16 images in another order.
        assert np.linalg.norm(parts[name] - tensor) <= 1e-5 * np.linalg.norm(tensor), name


def test_each_part_of_a_batch_has_noise_of_its_own() -> None:
    trainer = Trainer(small_vae().to("cpu"), splits(), Training(batch_size=16, accumulate=2))
    deviations = []
    for part in (0, 1):
        bound = trainer._run_part(16, part)
        mu, logvar = np.split(bound.encoder.output, 2, axis=1)
        deviations.append((bound.code - mu) / np.exp(0.5 * logvar))
    assert np.abs(deviations[0] - deviations[1]).min() > 1e-4


def test_a_run_in_parts_resumes_with_the_same_bits(tmp_path: Path) -> None:
    def training(epochs: int) -> Training:
        return Training(epochs=epochs, batch_size=16, accumulate=4)

    whole = small_vae()
    train(whole, training(4))
    train(small_vae(), training(2), out=tmp_path)
    resumed = small_vae()
    train(resumed, training(4), out=tmp_path, resume=True)
    assert_same_bits(resumed.tensors(), whole.tensors())


def test_a_loss_that_is_not_finite_is_found_in_whichever_part_it_is() -> None:
    grey = Dataset(np.full((IMAGES, SIZE, SIZE, 1), 0.5, np.float32), None)
    training = Training(batch_size=16, accumulate=4, shuffle=False)
    trainer = Trainer(small_vae().to("cpu"), splits()._replace(train=grey), training)
    trainer.data[6] = np.nan  # in the second part, neither the first nor the last to be looked at
    trainer.step()
    with pytest.raises(NotFiniteError, match="at step 1: see batch"):
        trainer.check_loss()


@pytest.mark.parametrize("options", [{"accumulate": 0}, {"accumulate": 3}, {"keep_last": True}])
def test_parts_that_are_not_equal_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"accumulate is [023], expected"):
        Training(**{"batch_size": 16, "accumulate": 2, **options})


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(small_vae(), BUSY, out=tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["model"]["encoder"][1]["units"] = 17
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{CHECKPOINT}: holds another model"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_checkpoint_is_refused_by_name(tmp_path: Path, keep: int) -> None:
    train(small_vae(), BUSY, out=tmp_path)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[:keep])
    with pytest.raises(InputError, match=f"{CHECKPOINT}: not a whole safetensors file"):
        load(tmp_path)


def test_a_saved_model_is_loaded_with_the_same_bits(tmp_path: Path) -> None:
    from minivae import save

    model = small_vae()
    train(model, BUSY)
    save(model, tmp_path / "saved")
    assert_same_bits(model.tensors(), tensors_of(tmp_path / "saved"))


def test_saving_a_model_over_a_run_is_refused(tmp_path: Path) -> None:
    from minivae import save

    model = small_vae()
    train(model, BUSY, out=tmp_path)
    before = tensors_of(tmp_path)
    with pytest.raises(InputError, match="holds a run, expected another folder"):
        save(small_vae(seed=1), tmp_path)
    assert_same_bits(before, tensors_of(tmp_path))
    assert "training" in json.loads((tmp_path / CONFIG).read_text())


def test_saving_a_model_over_a_saved_one_replaces_it(tmp_path: Path) -> None:
    from minivae import save

    save(small_vae(), tmp_path)
    save(small_vae(seed=1), tmp_path)
    assert load(tmp_path).seed == 1


def test_beta_warm_up_weighs_the_kl_step_by_step() -> None:
    objective = Objective(beta=4.0, beta_warmup_steps=4)
    assert [objective.beta_at(step) for step in range(6)] == [1, 2, 3, 4, 4, 4]


def test_a_warm_up_trains_each_step_with_its_own_beta() -> None:
    def trained(steps: int, **objective: Any) -> dict[str, np.ndarray]:
        model = small_vae(**objective)
        train(model, Training(steps=steps, batch_size=16))
        return model.tensors()

    warm = {"beta": 4.0, "beta_warmup_steps": 4}
    assert_same_bits(trained(1, **warm), trained(1, beta=1.0))
    second, constant = trained(2, **warm), trained(2, beta=1.0)
    assert second["encoder.3.weight"].tobytes() != constant["encoder.3.weight"].tobytes()


@pytest.mark.parametrize(
    "other",
    [
        Objective("squared-error"),
        Objective("bernoulli", estimator="monte-carlo"),
        Objective("bernoulli", estimator="importance", samples=5),
    ],
    ids=str,
)
def test_evaluation_by_an_objective_that_the_model_cannot_compute_is_refused(
    other: Objective,
) -> None:
    with pytest.raises(InputError, match="expected the model's estimator and samples"):
        small_vae().to("cpu").evaluate(splits().test.images, objective=other)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", np.int64), ("emulated", np.float64)])
def test_a_dtype_that_the_device_does_not_compute_in_is_refused(device: str, dtype: Any) -> None:
    with pytest.raises(InputError, match=f"dtype on {device} is '{np.dtype(dtype)}'"):
        small_vae().to(device, dtype)


def test_a_run_on_arrays_of_other_types_goes_on(tmp_path: Path) -> None:
    checked = splits()
    wide = [
        Dataset(split.images.astype(np.float64) / 255, split.labels)
        for split in (checked.train, checked.test)
    ]
    options: Any = {"out": tmp_path, "progress": False, "device": "cpu"}
    fit(small_vae(), Splits("wide", *wide), Training(epochs=1, batch_size=16), **options)
    going_on = Training(epochs=2, batch_size=16)
    metrics = fit(small_vae(), Splits("wide", *wide), going_on, resume=True, **options)
    assert [line["epoch"] for line in metrics] == [1, 2]


def test_evaluation_does_not_depend_on_the_training_batch() -> None:
    model = small_vae()
    model.to("cpu")
    images = splits().test.images
    model.bind(7)
    first = model.evaluate(images)
    model.bind(400)
    assert model.evaluate(images) == first


def test_images_of_wide_integers_are_refused() -> None:
    with pytest.raises(InputError, match="images are int64, expected uint8"):
        small_vae().encode(np.zeros((2, SIZE, SIZE), np.int64))
