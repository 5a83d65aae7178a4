"""Validation images, the best checkpoint, and warnings about the posterior."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minivae import train
from minivae.checkpoint import CONFIG, load
from minivae.cli import main
from minivae.data import Dataset, Splits
from minivae.data import load as load_data
from minivae.data.dataset import VALIDATION_STREAM
from minivae.errors import InputError
from minivae.layers import Dense, Flatten
from minivae.models import VAE, Autoencoder, Objective
from minivae.optim import Adam
from minivae.presets import Training
from minivae.train import Trainer, fit, symptom

IMAGE = (2, 3, 1)


def small_vae(latent: int = 2, **objective: Any) -> VAE:
    layers: Any = ([Flatten(), Dense(2 * latent)], [Dense(6)])
    return VAE(*layers, Objective("bernoulli", **objective), IMAGE)


def splits(images: int = 60) -> Splits:
    pixels = np.random.default_rng(0).integers(0, 256, (images + 10, *IMAGE)).astype(np.uint8)
    return Splits("random", Dataset(pixels[:images], None), Dataset(pixels[images:], None))


# Overfits: the validation loss falls, and then rises.
OVERFITTING = Training(epochs=60, batch_size=10, validation=20, optimizer=Adam(lr=0.05))


def validation_of(data: Splits, seed: int = 0) -> Dataset:
    return data.train.held_out(20, seed, VALIDATION_STREAM)[1]


def test_validation_images_are_not_trained_on() -> None:
    data = splits()
    trainer = Trainer(small_vae().to("cpu"), data, Training(batch_size=10, validation=20))
    assert trainer.validation is not None
    rest, held_out = data.train.held_out(20, 0, VALIDATION_STREAM)
    np.testing.assert_array_equal(trainer.validation.images, held_out.images)
    np.testing.assert_array_equal(trainer.data.reshape(-1, *IMAGE), rest.images)
    together = np.concatenate([trainer.validation.images, rest.images])
    assert sorted(map(bytes, together)) == sorted(map(bytes, data.train.images))
    assert trainer.steps_per_epoch == 4


def sorted_by_class() -> Splits:
    """Three classes, one after the other, the brighter the higher."""
    labels = np.repeat(np.arange(3), 40)
    images = np.full((120, *IMAGE), 50, np.uint8) * (1 + labels[:, None, None, None]).astype(
        np.uint8
    )
    images += np.random.default_rng(0).integers(0, 20, images.shape).astype(np.uint8)
    data = Dataset(images, labels)
    return Splits("sorted", data, data)


@pytest.mark.parametrize("seed", [0, 1])
def test_validation_images_are_of_all_classes(seed: int) -> None:
    training = Training(batch_size=10, validation=30, seed=seed)
    trainer = Trainer(small_vae().to("cpu"), sorted_by_class(), training)
    for part in (trainer.validation, trainer.train):
        assert part is not None
        assert part.labels is not None
        assert set(part.labels) == {0, 1, 2}


def test_images_that_stand_for_all_are_of_all_classes_in_order() -> None:
    data = sorted_by_class().train
    some = data.sample(20)
    assert some.labels is not None
    assert len(some) == 20
    assert some.labels.tolist() == sorted(some.labels)
    assert set(some.labels) == {0, 1, 2}
    np.testing.assert_array_equal(some.images, data.sample(20).images)
    assert data.sample(120) is data.sample(500) is data


def test_sigma_is_calibrated_on_images_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CALIBRATION_IMAGES", 30)
    objective = Objective("calibrated-gaussian")
    model = VAE([Flatten(), Dense(4)], [Dense(6)], objective, IMAGE).to("cpu")
    Trainer(model, sorted_by_class(), Training(batch_size=10)).check_model()
    of_30 = float(model.tensors()["sigma"][0])
    # The first 30 are all dark, far below the mean of all.
    assert of_30 == pytest.approx(model.calibrate(sorted_by_class().train.images), rel=0.2)


def test_sigma_is_calibrated_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Objective("calibrated-gaussian")
    model = VAE([Flatten(), Dense(4)], [Dense(6)], objective, IMAGE).to("cpu")
    trainer, calls = Trainer(model, splits(), Training(batch_size=10)), []
    monkeypatch.setattr(model, "calibrate", lambda *_, **__: calls.append(1) or 1.0)
    for steps in (1, 1, 2):
        while trainer.finished_steps < steps:
            trainer.step()
        trainer.check_model()
    assert len(calls) == 2


def test_a_checkpoint_within_an_epoch_has_the_sigma_of_its_weights(tmp_path: Path) -> None:
    objective = Objective("calibrated-gaussian")
    model = VAE([Flatten(), Dense(4)], [Dense(6)], objective, IMAGE)
    training = Training(epochs=9, batch_size=10, checkpoint_every=3, optimizer=Adam(lr=0.05))

    def stop(step: int, model: Autoencoder) -> None:
        if step == 9:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"out": tmp_path, "progress": False, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        fit(
            model, splits(), dataclasses.replace(training, picture_every=9), on_step=stop, **options
        )
    loaded = load(tmp_path, "cpu")
    found = float(loaded.tensors()["sigma"][0])
    assert found == pytest.approx(loaded.calibrate(splits().train.images), rel=1e-6)


def assert_equal_tensors(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name], err_msg=name)


def test_the_best_checkpoint_has_the_lowest_validation_loss(tmp_path: Path) -> None:
    metrics = fit(small_vae(), splits(), OVERFITTING, out=tmp_path, progress=False, device="cpu")
    losses = [line["validation"]["loss"] for line in metrics]
    assert np.argmin(losses) < len(losses) - 1
    best, last = load(tmp_path, "cpu", best=True), load(tmp_path, "cpu")
    for model, expected in ((best, min(losses)), (last, losses[-1])):
        found = model.evaluate(validation_of(splits()).images)
        assert found["loss"] == pytest.approx(expected, rel=1e-6)


def test_test_images_choose_nothing(tmp_path: Path) -> None:
    data = splits()
    other = data._replace(test=Dataset(255 - data.test.images, None))
    for name, used in (("a", data), ("b", other)):
        fit(small_vae(), used, OVERFITTING, out=tmp_path / name, progress=False, device="cpu")
    best = [load(tmp_path / name, "cpu", best=True).tensors() for name in ("a", "b")]
    assert_equal_tensors(*best)


def test_a_run_goes_on_from_its_best_checkpoint_as_it_went_on_then(tmp_path: Path) -> None:
    first = fit(small_vae(), splits(), OVERFITTING, out=tmp_path, progress=False, device="cpu")
    last = load(tmp_path, "cpu").tensors()
    options: dict[str, Any] = {"resume": True, "best": True, "progress": False, "device": "cpu"}
    again = fit(small_vae(), splits(), OVERFITTING, out=tmp_path, **options)
    assert_equal_tensors(load(tmp_path, "cpu").tensors(), last)
    for line in (*first, *again):
        line.pop("seconds")
    assert again == first


def test_a_run_from_its_best_checkpoint_that_is_stopped_at_once_can_go_on(tmp_path: Path) -> None:
    fit(small_vae(), splits(), OVERFITTING, out=tmp_path, progress=False, device="cpu")
    best = load(tmp_path, "cpu", best=True).tensors()

    def stop(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"out": tmp_path, "progress": False, "device": "cpu", "resume": True}
    with pytest.raises(KeyboardInterrupt):
        fit(small_vae(), splits(), OVERFITTING, best=True, on_metrics=stop, **options)
    assert_equal_tensors(load(tmp_path, "cpu").tensors(), best)


def test_a_run_in_a_folder_that_holds_none_any_more_has_no_best_checkpoint_of_the_old_one(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"out": tmp_path, "progress": False, "device": "cpu"}
    fit(small_vae(), splits(), OVERFITTING, **options)
    (tmp_path / CONFIG).unlink()
    fit(small_vae(), splits(), Training(epochs=1, batch_size=10), **options)
    with pytest.raises(InputError, match="no such checkpoint"):
        load(tmp_path, "cpu", best=True)


def test_a_run_without_validation_has_no_best_checkpoint(tmp_path: Path) -> None:
    training = Training(epochs=1, batch_size=10)
    fit(small_vae(), splits(), training, out=tmp_path, progress=False, device="cpu")
    with pytest.raises(InputError, match=r"best.safetensors: no such checkpoint; it is kept where"):
        load(tmp_path, "cpu", best=True)


def test_patience_without_validation_is_bad_input() -> None:
    with pytest.raises(InputError, match="patience is 3 without validation images"):
        Training(patience=3)


def test_more_validation_images_than_there_are_is_bad_input() -> None:
    with pytest.raises(InputError, match="validation is 60, expected below the 60 training images"):
        Trainer(small_vae().to("cpu"), splits(), Training(batch_size=10, validation=60))


def test_seconds_go_on_in_a_resumed_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path, "progress": False, "device": "cpu"}
    first = fit(small_vae(), splits(), Training(epochs=2, batch_size=10), **options)
    training = Training(epochs=4, batch_size=10)
    metrics = fit(small_vae(), splits(), training, resume=True, **options)
    seconds = [line["seconds"] for line in metrics]
    assert seconds == sorted(seconds)
    assert seconds[2] > first[-1]["seconds"]


# Symptoms


def test_a_collapsed_posterior_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(epochs=4, batch_size=64, optimizer=Adam(lr=0.01))
    model = VAE(
        *([Flatten(), Dense(20)], [Dense(784)], Objective("bernoulli", beta=100.0)), (28, 28, 1)
    )
    metrics = fit(model, load_data("glyphs"), training, progress=False, device="cpu")
    warned = [line for line in metrics if "warning" in line]
    assert [line["epoch"] for line in warned] == [2]
    assert "the posterior collapses" in warned[0]["warning"]
    assert warned[0]["active_units"] == 0


def test_a_posterior_in_use_is_not_warned_of() -> None:
    model = VAE([Flatten(), Dense(20)], [Dense(784)], Objective("bernoulli"), (28, 28, 1))
    metrics = fit(model, load_data("glyphs"), Training(epochs=3), progress=False, device="cpu")
    assert all("warning" not in line for line in metrics)
    assert metrics[-1]["active_units"] > 3


@pytest.mark.parametrize(
    ("kl", "active", "epoch", "step", "said"),
    [
        (21.0, 2, 1, 500, "the KL explodes"),
        (np.inf, 2, 1, 500, "the loss of the test images is not finite"),
        (0.0, 0, 1, 500, ""),
        (0.0, 0, 2, 1000, "collapses"),
        (0.0, 0, 2, 10, ""),
        (5.0, 2, 9, 5000, ""),
    ],
)
def test_a_symptom_follows_from_an_epochs_figures(
    kl: float, active: int, epoch: int, step: int, said: str
) -> None:
    line: dict[str, Any] = {"epoch": epoch, "step": step, "test": {"loss": 90 + kl}}
    line |= {"posterior_kl": kl, "active_units": active}
    found = symptom(line, small_vae())
    assert said in found
    assert bool(found) == bool(said)


@pytest.mark.parametrize(
    ("objective", "advice"),
    [
        ({"estimator": "monte-carlo"}, "try a smaller learning rate"),
        ({"capacity": 5.0, "capacity_steps": 900}, "try a larger --capacity"),
        ({}, "try --beta-warmup, --free-bits or a smaller --beta"),
    ],
)
def test_what_may_help_is_what_the_objective_takes(objective: dict[str, Any], advice: str) -> None:
    line = {"epoch": 2, "step": 1000, "test": {"loss": 9.0}, "posterior_kl": 0, "active_units": 0}
    assert symptom(line, small_vae(**objective)).endswith(advice)


def test_a_posterior_whose_capacity_still_rises_has_not_collapsed() -> None:
    line = {"epoch": 2, "step": 800, "test": {"loss": 9.0}, "posterior_kl": 0, "active_units": 0}
    assert symptom(line, small_vae(capacity=5.0, capacity_steps=900)) == ""


def test_a_plain_autoencoder_has_no_posterior_to_warn_of() -> None:
    model = Autoencoder([Flatten(), Dense(2)], [Dense(6)], Objective("squared-error"), IMAGE)
    assert symptom({"epoch": 9, "test": {"loss": 1.0}}, model) == ""


@pytest.mark.parametrize("estimator", ["analytic", "monte-carlo", "importance"])
def test_a_kl_that_explodes_is_named_whatever_the_estimator(estimator: str) -> None:
    objective = Objective("bernoulli", estimator=estimator)
    model = VAE([Flatten(), Dense(4)], [Dense(6)], objective, IMAGE)
    trainer = Trainer(model.to("cpu"), splits(), Training(batch_size=10))
    model.parameters.values["encoder.1.weight"][...] = 0
    model.parameters.values["encoder.1.bias"][:2] = 30.0
    found = trainer.held_out_metrics()
    assert found["posterior_kl"] == pytest.approx(2 * 30**2 / 2, rel=0.01)
    assert "the KL explodes" in symptom({"epoch": 1, **found}, model)


# The command


def test_the_commands_take_the_best_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = "--hidden 8 --latent 2 --epochs 2 --validation 100 --quiet --device cpu"
    main(["train", *options.split(), "--out", str(folder)])
    for command in ("sample", "reconstruct"):
        picture = tmp_path / f"{command}.png"
        main([command, str(folder), "--best", "--device", "cpu", "-o", str(picture)])
        assert picture.stat().st_size > 1000
    config = json.loads((folder / "config.json").read_text())
    assert config["training"]["validation"] == 100
    capsys.readouterr()
