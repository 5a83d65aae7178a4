"""Every example runs as its docstring says, and builds the model of the preset of its name."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import minivae
from minivae import preset

EXAMPLES = Path(__file__).parent.parent / "examples"
STEP = 1e-5
PRESETS = ("mnist_dense", "fashion_dense", "mnist_conv", "mnist_conv_ae", "mnist_class")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports an example by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred labelled glyphs."""
    from minivae.data.glyphs import glyphs

    splits = glyphs(0, 520, 100)
    path = tmp_path_factory.mktemp("data") / "glyphs.npz"
    np.savez(
        path,
        images=splits.train.images,
        labels=splits.train.labels,
        test_images=splits.test.images,
        test_labels=splits.test.labels,
    )
    return path


def run(
    name: str, *arguments: object, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", PRESETS)
def test_the_example_is_the_preset_of_its_name(example: Any, name: str) -> None:
    module, chosen = example(name), preset(name.replace("_", "-"))
    assert module.build().config() == chosen.model().config()
    assert chosen.training == module.TRAINING


@pytest.mark.parametrize("name", sorted(minivae.PRESETS))
def test_a_preset_takes_an_image_shape_as_a_list_too(name: str) -> None:
    chosen = preset(name)
    assert chosen.model([28, 28, 1]).config() == chosen.model((28, 28, 1)).config()


@pytest.mark.parametrize("name", PRESETS)
def test_the_example_trains_and_draws(name: str, data: Path, tmp_path: Path) -> None:
    done = run(name, "--data", data, "--out", tmp_path, "--epochs", 1, "--steps", 1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures" / "reconstructions.png").exists()


def test_too_few_images_are_told_before_training(tmp_path: Path) -> None:
    images = np.zeros((205, 28, 28), np.uint8)
    np.savez(tmp_path / "few.npz", images=images[:200], test_images=images[200:])
    done = run("stacked_autoencoder", "--data", tmp_path / "few.npz", "--out", tmp_path)
    assert done.returncode == 2
    assert "at least 128 training and 10 test images" in done.stderr


@pytest.mark.parametrize("name", ["why_variational", "stacked_autoencoder", "pixel_error"])
def test_the_study_leaves_its_picture(name: str, data: Path, tmp_path: Path) -> None:
    done = run(name, "--data", data, "--out", tmp_path, "--epochs", 1, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{name}.png").exists()


def test_the_run_of_an_example_names_its_data_from_anywhere(data: Path, tmp_path: Path) -> None:
    options = ("--data", data.name, "--out", tmp_path, "--steps", 1)
    done = run("mnist_dense", *options, folder=data.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "config.json").read_text())["source"] == str(data)


def test_a_shifted_digit_scores_worse_than_one_with_two_wrong_pixels(example: Any) -> None:
    from minivae.data.glyphs import glyphs

    study = example("pixel_error")
    images = glyphs(0, 10, 200).test.images / 255
    shifted = study.squared_error(images, study.shifted(images))
    damaged = study.squared_error(images, study.with_two_wrong_pixels(images))
    assert np.mean(shifted > damaged) > 0.99


@pytest.mark.parametrize(("first", "depth"), [(0, 1), (1, 2), (0, 2), (0, 3)])
def test_the_tied_gradient_is_that_of_central_differences(
    example: Any, first: int, depth: int
) -> None:
    stack = example("stacked_autoencoder").TiedStack((7, 5, 4, 3), 1, "reference", np.float64)
    x = np.random.default_rng(0).random((6, 7))
    stack.loss_and_gradient(x, first, depth)
    derived = {name: g.copy() for name, g in stack.parameters.gradients.items()}
    for name, value in stack.parameters.values.items():
        if not first <= int(name.split(".")[0]) < depth:
            continue
        numerical = np.zeros_like(value)
        for entry in np.ndindex(value.shape):
            start = value[entry]
            losses = []
            for shift in (STEP, -STEP):
                value[entry] = start + shift
                losses.append(stack.loss_and_gradient(x, first, depth))
            value[entry] = start
            numerical[entry] = (losses[0] - losses[1]) / (2 * STEP)
        # Central differences in float64: eight digits of a loss near one.
        np.testing.assert_allclose(derived[name], numerical, rtol=1e-5, atol=1e-8, err_msg=name)


def test_a_missing_file_is_one_line_with_exit_code_2(tmp_path: Path) -> None:
    done = run("pixel_error", "--data", tmp_path / "no.npz")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no.npz" in done.stderr
