"""The objectives beside the plain ELBO: a calibrated variance, a capacity and a condition, from the
mathematics to the command line."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import DIFFERENCES, assert_close, central_differences, random_images
from numpy.typing import NDArray
from test_cuda import without_a_card as without_a_card  # the fixture

from minivae import (
    GELU,
    PRESETS,
    VAE,
    Adam,
    Autoencoder,
    Conv2d,
    Dense,
    Flatten,
    InputError,
    JoinLabel,
    Objective,
    ReLU,
    Sigmoid,
    Tanh,
    Training,
    fit,
)
from minivae import load as load_run
from minivae.checkpoint import CONFIG
from minivae.cli import main
from minivae.data import Dataset, Splits
from minivae.evaluate import evaluate
from minivae.export import EXPORTERS
from minivae.gradcheck import TOLERANCE, check_gradients
from minivae.layers import Layer
from minivae.models import model_from_config
from minivae.ops.activations import (
    DERIVATIVE_FROM_OUTPUT,
    IDENTITY,
    Activation,
    activation_forward,
)
from minivae.ops.calibration import calibrate_gaussian
from minivae.ops.capacity import capacity_totals
from minivae.ops.elbo import KL, LOSS, squared_error_loss
from minivae.ops.labels import gather_labels, join_forward, join_input_gradient
from minivae.ops.state import BETA, CAPACITY, FAILED, SCHEDULE_COLUMNS, new_state
from minivae.presets import conditional

SIZE = 6
IMAGE = (SIZE, SIZE, 1)
EXACT = 1e-12  # By norm, float64: the rounding of sums of tens.


def small_vae(*last: Layer, **objective: Any) -> VAE:
    encoder = [Flatten(), Dense(16), ReLU(), Dense(6)]
    decoder = [Dense(16), ReLU(), Dense(SIZE * SIZE), *(last or (Sigmoid(),))]
    return VAE(encoder, decoder, Objective(**{"likelihood": "gaussian", **objective}), IMAGE)


def splits() -> Splits:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (70, *IMAGE), dtype=np.uint8)
    labels = np.arange(70) % 3
    whole = Dataset(images, labels)
    return Splits("noise", whole.take(slice(50)), whole.take(slice(50, None)))


def train(model: Autoencoder, training: Training, **options: Any) -> list[dict[str, Any]]:
    return fit(model, splits(), training, device="cpu", progress=False, **options)


def command(folder: Path, *arguments: str) -> int:
    """Trains with the command line on tiny images with labels."""
    data = folder.parent / "data.npz"
    np.savez(data, images=splits().train.images, labels=splits().train.labels)
    options = ["--data", str(data), "--hidden", "8", "--batch-size", "15", "--epochs", "1"]
    return main(["train", "--device", "cpu", "--quiet", "--out", str(folder), *options, *arguments])


# The calibrated Gaussian


def calibrated(y: NDArray, x: NDArray, scale: float) -> tuple[NDArray, NDArray, float]:
    """The loss of each image, the gradient and the variance."""
    loss, dy, variance = np.empty(len(x)), np.empty(x.shape), np.empty(1)
    squared_error_loss(y, x, loss, dy, scale, 1.0, IDENTITY)
    calibrate_gaussian(loss, dy, variance)
    return loss, dy, float(variance[0])


def negative_log_density(y: NDArray, x: NDArray, variance: float) -> NDArray:
    """Of each image, by its definition."""
    density = np.exp(-((y - x) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    return -np.sum(np.log(density), axis=1)


def test_a_calibrated_loss_is_the_negative_log_density_at_its_variance() -> None:
    y, x = np.random.default_rng(0).random((2, 5, 7))
    loss, _, variance = calibrated(y, x, 1.0)
    assert_close(loss, negative_log_density(y, x, variance), EXACT)


@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01, 3.0])
def test_no_other_variance_has_a_lower_loss(factor: float) -> None:
    y, x = np.random.default_rng(0).random((2, 5, 7))
    loss, _, variance = calibrated(y, x, 1.0)
    assert np.sum(loss) < np.sum(negative_log_density(y, x, factor * variance))


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 7)], ids=str)
def test_a_calibrated_gradient_agrees_with_differences(shape: tuple[int, int]) -> None:
    y, x = np.random.default_rng(0).random((2, *shape))
    scale = 0.37
    _, dy, _ = calibrated(y, x, scale)
    numerical = central_differences(lambda: scale * float(np.sum(calibrated(y, x, 1.0)[0])), y)
    assert_close(dy, numerical, DIFFERENCES)


def test_a_batch_without_an_error_has_no_finite_density() -> None:
    x = np.ones((2, 3))
    with np.errstate(all="ignore"):
        loss, _, _ = calibrated(x.copy(), x, 1.0)
    assert not np.isfinite(loss).any()


@pytest.mark.parametrize("last", [Sigmoid(), GELU()], ids=["sigmoid", "gelu"])
def test_a_calibrated_model_s_gradients_agree_with_differences(last: Layer) -> None:
    for error in check_gradients(small_vae(last, likelihood="calibrated-gaussian", beta=0.7)):
        assert error.error < TOLERANCE, error


def test_a_calibrated_model_is_evaluated_with_the_sigma_of_training_images() -> None:
    model = small_vae(likelihood="calibrated-gaussian").to("cpu")
    train_images, test_images = random_images(model, 130), random_images(model, 30, seed=1)
    sigma = model.calibrate(train_images)
    squares = model.evaluate(train_images, objective=Objective("squared-error"))["reconstruction"]
    # Sigma is kept in float32.
    assert sigma == pytest.approx(math.sqrt(squares / SIZE**2), rel=1e-6)
    fixed = model.evaluate(test_images, objective=Objective("gaussian", sigma=sigma))
    assert model.evaluate(test_images) == pytest.approx(fixed, rel=1e-6)


def test_the_calibrated_sigma_has_the_highest_likelihood_of_the_training_images() -> None:
    model = small_vae(likelihood="calibrated-gaussian").to("reference", np.float64)
    images = random_images(model, 40)
    sigma = model.calibrate(images)
    losses = [
        model.evaluate(images, objective=Objective("gaussian", sigma=factor * sigma))["loss"]
        for factor in (1.0, 0.95, 1.05)
    ]
    assert losses[0] < min(losses[1:])


def test_evaluation_before_calibration_is_refused() -> None:
    model = small_vae(likelihood="calibrated-gaussian").to("cpu")
    with pytest.raises(InputError, match="sigma is not calibrated yet"):
        model.evaluate(random_images(model, 3))


def test_images_that_are_reproduced_exactly_have_no_most_likely_sigma() -> None:
    model = small_vae(likelihood="calibrated-gaussian").to("cpu")
    model.parameters.flat["values"][...] = 0  # sigmoid(0) = 0.5
    with pytest.raises(InputError, match="no sigma is most likely: the decoder reproduces the"):
        model.calibrate(np.full((5, *IMAGE), 0.5, np.float32))


def test_calibrating_another_likelihood_is_refused() -> None:
    with pytest.raises(InputError, match="likelihood is 'gaussian': nothing to calibrate"):
        small_vae().to("cpu").calibrate(splits().train.images)


def test_a_calibrated_loss_in_training_is_a_function_of_the_mean_squared_error() -> None:
    model = small_vae(likelihood="calibrated-gaussian")
    metrics = train(model, Training(epochs=1, batch_size=50, optimizer=Adam(lr=1e-12)))
    # One batch, and weights that stay: the loss of E3 is m / 2 (1 + log(2 pi v)).
    variance = float(model.bind(50).variance[0])
    expected = SIZE**2 / 2 * (1 + math.log(2 * math.pi * variance))
    assert metrics[0]["train"]["reconstruction"] == pytest.approx(expected, rel=1e-5)
    # And sigma, of the same images with other noise, is that of the batch but for the noise.
    assert float(model.tensors()["sigma"][0]) == pytest.approx(math.sqrt(variance), rel=0.02)


# The capacity


def totals_at(kl: NDArray, capacity: float) -> tuple[NDArray, NDArray]:
    """The totals of a batch without reconstruction error and the weights of its KL, beta 2.5."""
    schedule = np.full((1, SCHEDULE_COLUMNS), np.nan)
    schedule[0, BETA], schedule[0, CAPACITY] = 2.5, capacity
    kl_weight, totals = np.full(kl.shape[1], np.nan), np.zeros(3)
    capacity_totals(np.zeros(len(kl)), kl, schedule, new_state(), kl_weight, totals)
    return totals, kl_weight


@pytest.mark.parametrize("capacity", [0.1, 100.0], ids=["below the KL", "above the KL"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 7)], ids=str)
def test_the_kl_weight_is_the_gradient_of_the_distance_from_the_capacity(
    shape: tuple[int, int], capacity: float
) -> None:
    kl = np.random.default_rng(0).random(shape)
    _, kl_weight = totals_at(kl, capacity)
    numerical = central_differences(lambda: totals_at(kl, capacity)[0][LOSS] / len(kl), kl)
    assert_close(np.broadcast_to(kl_weight, shape), numerical, DIFFERENCES)


def test_the_distance_is_of_the_mean_over_images() -> None:
    # One image has 3 nats and one 1: their mean is at the capacity, though neither of them is.
    totals, kl_weight = totals_at(np.array([[2.0, 1.0], [0.5, 0.5]]), 2.0)
    assert totals[LOSS] == 0
    assert totals[KL] == 4
    np.testing.assert_array_equal(kl_weight, 0)


@pytest.mark.parametrize(("step", "expected"), [(0, 1), (1, 2), (3, 4), (4, 5), (5, 5), (99, 5)])
def test_the_capacity_rises_linearly_and_then_stays(step: int, expected: int) -> None:
    objective = Objective(capacity=5.0, capacity_steps=5)
    assert objective.capacity_at(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("capacity", [0.001, 50.0], ids=["below the KL", "above the KL"])
def test_a_model_with_capacity_has_gradients_that_agree_with_differences(capacity: float) -> None:
    for error in check_gradients(small_vae(capacity=capacity, beta=3.0)):
        assert error.error < TOLERANCE, error


def test_a_kl_that_is_not_finite_sets_the_latch() -> None:
    schedule, state, totals = np.ones((1, SCHEDULE_COLUMNS)), new_state(), np.zeros(3)
    kl = np.array([[np.nan, 1.0]])
    capacity_totals(np.zeros(1), kl, schedule, state, np.empty(2), totals)
    assert state[FAILED] == 1
    assert (totals == 0).all()


def test_training_brings_the_kl_to_the_capacity_from_either_side() -> None:
    training = Training(epochs=60, batch_size=10, optimizer=Adam(lr=3e-3))
    for capacity in (1.0, 12.0):
        kl = train(small_vae(capacity=capacity, beta=30.0), training)[-1]["train"]["kl"]
        # The sign flips around the capacity at the size of a step.
        assert kl == pytest.approx(capacity, rel=0.2)


def test_images_are_evaluated_with_the_final_capacity() -> None:
    model = small_vae(capacity=2.0, capacity_steps=10**6, beta=3.0).to("cpu")
    terms = model.evaluate(random_images(model, 20))
    expected = terms["reconstruction"] + 3 * abs(terms["kl"] - 2)
    assert terms["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_plain_autoencoder_has_no_capacity_to_reach() -> None:
    layers = [Flatten(), Dense(3)], [Dense(SIZE * SIZE)]
    model = Autoencoder(*layers, Objective("squared-error", capacity=5.0), IMAGE).to("cpu")
    terms = model.evaluate(random_images(model, 5))
    assert terms["loss"] == terms["reconstruction"]


def test_free_bits_and_capacity_exclude_each_other() -> None:
    with pytest.raises(InputError, match="free_bits and capacity exclude each other"):
        Objective(free_bits=0.1, capacity=5.0)


# The condition

CLASSES = 3


def conditional_vae(**objective: Any) -> VAE:
    return conditional(small_vae(**objective), CLASSES)


def joined(shape: tuple[int, int], classes: int) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape), np.eye(classes)[rng.integers(classes, size=shape[0])]


def test_a_label_is_one_in_its_own_column() -> None:
    onehot, state = np.full((3, 4), np.nan), new_state(first=1)
    gather_labels(np.array([3, 0, 1, 2]), np.array([0, 3, 0, 2]), state, onehot)
    np.testing.assert_array_equal(onehot, np.eye(4)[[2, 3, 1]])


@pytest.mark.parametrize("kind", DERIVATIVE_FROM_OUTPUT)
def test_the_gradient_through_a_join_agrees_with_differences(kind: str) -> None:
    z, onehot = joined((3, 5), 4)
    upstream = np.random.default_rng(1).standard_normal((3, 9))
    activation, x, y = Activation(kind, 0.2), np.empty((3, 5)), np.full((3, 9), np.nan)

    def loss() -> float:
        activation_forward(z, x, activation)
        join_forward(x, onehot, y)
        return float(np.sum(y * upstream))

    loss()
    dz = np.full((3, 5), np.nan)
    join_input_gradient(upstream, x, dz, activation)
    assert_close(dz, central_differences(loss, z), DIFFERENCES)


JOINS: dict[str, tuple[list[Layer], list[Layer]]] = {
    "before the first layer": (
        [Flatten(), JoinLabel(3), Dense(8), Tanh(), Dense(4)],
        [JoinLabel(3), Dense(8), Tanh(), Dense(36)],
    ),
    "after a fused activation": (
        [Conv2d(2, 3), Tanh(), Flatten(), JoinLabel(3), Dense(4)],
        [Dense(8), Tanh(), JoinLabel(3), Dense(36)],
    ),
    "after an activation of its own": (
        [Flatten(), Dense(5), GELU(), JoinLabel(3), Dense(4)],
        [Tanh(), JoinLabel(3), Dense(36)],
    ),
    "before an activation": (
        [Flatten(), Dense(5), JoinLabel(3), Tanh(), Dense(4)],
        [JoinLabel(3), Tanh(), JoinLabel(3), Dense(36)],
    ),
    "into the decoder only": ([Flatten(), Dense(4)], [JoinLabel(3), Dense(36)]),
    "as the head and the output": (
        [Flatten(), Dense(3), Tanh(), JoinLabel(3)],
        [Dense(33), Tanh(), JoinLabel(3)],
    ),
}


@pytest.mark.parametrize("layers", JOINS.values(), ids=JOINS)
def test_a_conditional_model_s_gradients_agree_with_differences(
    layers: tuple[list[Layer], list[Layer]],
) -> None:
    for error in check_gradients(VAE(*layers, Objective(), IMAGE)):
        assert error.error < TOLERANCE, error


def test_every_preset_of_a_vae_takes_a_condition() -> None:
    for name, preset in PRESETS.items():
        if preset.latent:
            assert preset.model(classes=10).classes == 10, name


def test_a_plain_preset_takes_no_condition() -> None:
    with pytest.raises(InputError, match="conditional: this preset is a plain autoencoder"):
        PRESETS["mnist-conv-ae"].model(classes=10)


def test_each_image_meets_its_own_label_in_training() -> None:
    # Each class is an image of its own, without noise: only with the right label at the right image
    # can a latent of one dimension, kept shut by its KL, be of so little use.
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=60)
    images = (rng.random((CLASSES, *IMAGE)) < 0.5)[labels].astype(np.uint8) * 255
    data = Dataset(images, labels)
    encoder, decoder = [Flatten(), JoinLabel(CLASSES), Dense(2)], [JoinLabel(CLASSES), Dense(36)]
    model = VAE(encoder, decoder, Objective(beta=20.0), IMAGE)
    training = Training(epochs=150, batch_size=12, optimizer=Adam(lr=0.03))
    fit(model, Splits("classes", data, data), training, device="cpu", progress=False)
    drawn = model.sample(2 * CLASSES, labels=np.arange(2 * CLASSES) % CLASSES)
    expected = np.stack([images[labels == c][0] / 255 for c in [*range(CLASSES)] * 2])
    assert np.abs(drawn - expected).max() < 0.1


def test_evaluation_reads_the_labels_of_its_images() -> None:
    model = conditional_vae().to("cpu")
    images, labels = random_images(model, 130), np.arange(130) % CLASSES
    order = np.random.default_rng(0).permutation(130)
    inside = model.evaluate(images, labels)
    assert model.evaluate(images, (labels + 1) % CLASSES)["loss"] != inside["loss"]
    bound = model.bind(30)
    np.testing.assert_array_equal(bound.onehot, np.eye(CLASSES)[((labels + 1) % CLASSES)[100:]])
    # One label for all is that label for each.
    assert model.evaluate(images[order], 2) == model.evaluate(images[order], np.full(130, 2))


def test_a_sample_without_labels_draws_each_class_in_turn() -> None:
    model = conditional_vae().to("cpu")
    expected = model.sample(7, labels=[0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(model.sample(7), expected)
    assert (model.sample(7, labels=1) != expected).any()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (None, "for each image, got none"),
        ([0, 1], r"for each of 4 images, got int64 of shape \(2,\)"),
        ([0.0, 1.0, 2.0, 0.0], "got float64"),
        ([0, 1, 2, 3], "of 0 to 2, got 0 to 3"),
        (-1, "of 0 to 2, got -1$"),
    ],
    ids=str,
)
def test_labels_that_do_not_fit_are_refused(labels: Any, expected: str) -> None:
    model = conditional_vae().to("cpu")
    with pytest.raises(InputError, match=expected):
        model.encode(random_images(model, 4), labels)


def test_a_model_that_is_not_conditional_does_not_look_at_labels() -> None:
    model = small_vae().to("cpu")
    images = random_images(model, 4)
    np.testing.assert_array_equal(model.reconstruct(images, "no labels"), model.reconstruct(images))


def test_labels_of_two_numbers_of_classes_in_one_model_are_refused() -> None:
    layers = [Flatten(), JoinLabel(2), Dense(4)], [JoinLabel(3), Dense(36)]
    with pytest.raises(InputError, match=r"JoinLabel of \[2, 3\] classes in one model"):
        VAE(*layers, Objective(), IMAGE)


def test_a_label_for_an_image_instead_of_a_vector_is_refused() -> None:
    with pytest.raises(InputError, match="a vector"):
        VAE([JoinLabel(2), Flatten(), Dense(4)], [Dense(36)], Objective(), IMAGE)


def test_labels_that_the_training_split_does_not_have_are_refused_by_their_splits_name() -> None:
    images = np.zeros((10, SIZE, SIZE, 1), np.uint8)
    train, test = (Dataset(images, np.arange(10) % classes) for classes in (2, 3))
    encoder, decoder = [Flatten(), JoinLabel(2), Dense(2)], [JoinLabel(2), Dense(SIZE * SIZE)]
    model = VAE(encoder, decoder, Objective(), IMAGE)
    with pytest.raises(InputError, match="mine, test labels: a conditional model takes"):
        fit(model, Splits("mine", train, test), Training(batch_size=5), progress=False)


def test_training_data_without_labels_are_refused() -> None:
    without = Splits("noise", *(Dataset(part.images, None) for part in splits()[1:3]))
    with pytest.raises(InputError, match="a conditional model takes an integer label"):
        fit(conditional_vae(), without, Training(epochs=1, batch_size=10), progress=False)


@pytest.mark.parametrize("to", EXPORTERS)
def test_a_conditional_model_is_not_exported_without_its_label(tmp_path: Path, to: str) -> None:
    with pytest.raises(InputError, match=r"encoder\.1: a conditional model has a label beside"):
        EXPORTERS[to](conditional_vae().to("cpu"), tmp_path / "model")


@pytest.fixture(scope="module")
def conditional_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert command(folder, "--conditional", "--latent", "2", "--picture-every", "3") == 0
    return folder


def test_a_conditional_run_draws_every_picture(conditional_run: Path) -> None:
    pictures = {path.stem for path in (conditional_run / "pictures").iterdir()}
    assert {"samples", "reconstructions", "traversals", "manifold", "step_000003"} <= pictures


def test_info_says_that_a_run_is_conditional(
    conditional_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(conditional_run)]) == 0
    assert "mean per image; given the label, of 3 classes\n" in capsys.readouterr().out


def test_sample_draws_the_class_asked_for(
    conditional_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[NDArray] = []
    monkeypatch.setattr("minivae.plots.sample_grid", lambda path, x, **_: drawn.append(x))
    arguments = ["sample", str(conditional_run), "--count", "4", "--device", "cpu"]
    assert main([*arguments, "--label", "2"]) == 0
    model = load_run(conditional_run, "cpu")
    np.testing.assert_array_equal(drawn[0], model.sample(4, labels=2))


@pytest.mark.parametrize("command_name", ["reconstruct", "encode", "plot"])
def test_a_conditional_run_is_read_by_the_command(
    conditional_run: Path, tmp_path: Path, command_name: str
) -> None:
    output = [] if command_name == "plot" else ["-o", str(tmp_path / "output.npz")]
    if command_name == "reconstruct":
        output = ["-o", str(tmp_path / "output.png")]
    assert main([command_name, str(conditional_run), *output]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "--label", "3"], "label of 0 to 2, got 3\n"),
        (["train", "--hidden", "8", "--latent", "2"], "would make another model than the run's"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_does_not_fit_a_conditional_run_is_named(
    conditional_run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    name, *options = arguments
    run = ["--resume", str(conditional_run)] if name == "train" else [str(conditional_run)]
    assert main([name, *run, *options]) == 2
    assert words in capsys.readouterr().err


def test_a_label_of_a_run_that_is_not_conditional_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_vae(), Training(epochs=1, batch_size=10), out=tmp_path)
    assert main(["sample", str(tmp_path), "--label", "1"]) == 2
    assert "is not conditional: it takes no --label" in capsys.readouterr().err


def test_a_condition_on_data_without_labels_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "bare.npz", images=splits().train.images)
    arguments = ["train", "--conditional", "--data", str(tmp_path / "bare.npz")]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert "--conditional: bare.npz has no labels" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Whole runs

MODELS: dict[str, Callable[[], VAE]] = {
    "calibrated": lambda: small_vae(likelihood="calibrated-gaussian"),
    "capacity": lambda: small_vae(capacity=3.0, capacity_steps=7, beta=2.0),
    "conditional": conditional_vae,
    "all at once": lambda: conditional_vae(
        likelihood="calibrated-gaussian", capacity=3.0, capacity_steps=7
    ),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


@each_model
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, build: Callable[[], VAE]
) -> None:
    training = Training(epochs=2, batch_size=16, keep_last=True, checkpoint_every=3)
    whole = train(build(), training, out=tmp_path / "whole")
    # Cut inside the second epoch.
    train(build(), Training(**{**vars(training), "steps": 6}), out=tmp_path / "cut")
    resumed = train(build(), training, out=tmp_path / "cut", resume=True)
    assert resumed[-1]["test"] == whole[-1]["test"]
    first, second = (load_run(tmp_path / name, "cpu").tensors() for name in ("whole", "cut"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.tobytes() == second[name].tobytes(), name


@each_model
def test_a_model_survives_its_configuration(build: Callable[[], VAE]) -> None:
    model = build()
    described = json.loads(json.dumps(model.config()))
    assert model_from_config(described).config() == model.config()


@each_model
def test_a_run_evaluates_the_same_when_loaded(tmp_path: Path, build: Callable[[], VAE]) -> None:
    metrics, test = train(build(), Training(epochs=1, batch_size=10), out=tmp_path), splits().test
    assert load_run(tmp_path, "cpu").evaluate(test.images, test.labels) == metrics[-1]["test"]


def losses(build: Callable[[], VAE], device: str) -> list[float]:
    """Of each step, over the end of an epoch whose last batch is a partial one."""
    training = Training(steps=5, batch_size=16, keep_last=True, log_every=1)
    metrics = fit(build(), splits(), training, device=device, progress=False)
    return [line["train"]["loss"] for line in metrics if "epoch" not in line]


@each_model
def test_a_model_trains_on_the_cuda_kernels_as_on_the_reference(build: Callable[[], VAE]) -> None:
    # float32 on both: five steps of Adam carry some roundings on.
    assert losses(build, "emulated") == pytest.approx(losses(build, "reference"), rel=1e-4)


@each_model
def test_a_step_recorded_once_holds_nothing_that_changes(
    build: Callable[[], VAE], without_a_card: Any
) -> None:
    without_a_card()
    assert losses(build, "cuda") == losses(build, "emulated")


def test_several_draws_of_an_image_share_its_label() -> None:
    encoder = [Flatten(), JoinLabel(CLASSES), Dense(8), Tanh(), Dense(6)]
    decoder = [JoinLabel(CLASSES), Dense(8), Tanh(), Dense(36)]
    model = VAE(encoder, decoder, Objective(estimator="importance", samples=3), IMAGE)
    for error in check_gradients(model):
        assert error.error < TOLERANCE, error
    bound = model.bind(4)
    bound.onehot[...] = np.eye(CLASSES)[[2, 0, 1, 2]]
    bound.decoder.forward()
    joined = bound.decoder.stages[0].y[:, -CLASSES:]
    np.testing.assert_array_equal(joined, np.repeat(bound.onehot, 3, axis=0))


@each_model
def test_an_evaluation_has_the_final_sigma_and_the_labels(
    tmp_path: Path, build: Callable[[], VAE]
) -> None:
    train(build(), Training(epochs=1, batch_size=10), out=tmp_path)
    model, test = load_run(tmp_path, "cpu"), splits().test
    found = evaluate(model, test, samples=200)
    assert found.objective == model.describe(model.final_objective)
    single = [model.evaluate(test.images, test.labels, seed=seed) for seed in range(50)]
    assert found.kl.mean == pytest.approx(single[0]["kl"], rel=1e-5)
    losses = np.array([terms["reconstruction"] for terms in single])
    error = np.std(losses, ddof=1) / math.sqrt(50)
    # 200 draws an image, beside 50 single ones.
    assert abs(found.reconstruction.mean - np.mean(losses)) < 4.5 * error


@pytest.mark.parametrize(
    ("arguments", "printed", "stored"),
    [
        (
            ["--likelihood", "calibrated-gaussian"],
            "Gaussian -log p(x|z) with sigma^2 = the batch's mean squared error, nats + 1 x KL",
            {"likelihood": "calibrated-gaussian"},
        ),
        (
            ["--likelihood", "gaussian", "--sigma", "0.2"],
            "Gaussian -log p(x|z) with sigma 0.2, nats + 1 x KL",
            {"likelihood": "gaussian", "sigma": 0.2},
        ),
        (
            ["--capacity", "25", "--capacity-steps", "9"],
            "Bernoulli -log p(x|z) on logits, nats + 1 x |KL - C|, C = 25 nats (linear over 9 "
            "steps)",
            {"capacity": 25, "capacity_steps": 9},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_prints_and_stores_what_is_minimised(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    printed: str,
    stored: dict[str, Any],
) -> None:
    monkeypatch.setattr("minivae.pictures.draw_run", lambda *run: [])
    assert command(tmp_path / "run", *arguments) == 0
    assert f"objective  {printed}; mean per image; binarization none\n" in capsys.readouterr().out
    objective = json.loads((tmp_path / "run" / CONFIG).read_text())["model"]["objective"]
    assert stored.items() <= objective.items()
    resume = ["train", "--resume", str(tmp_path / "run"), "--hidden", "8", "--quiet"]
    assert main([*resume, *arguments, "--epochs", "2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--likelihood", "gausian"], "likelihood is 'gausian', expected one of"),
        (["--likelihood", "gaussian", "--sigma", "0"], "sigma is 0.0, expected above 1e-9"),
        (["--capacity", "-1"], "capacity is -1.0, expected 0 or above"),
        (["--capacity", "1", "--free-bits", "1"], "free_bits and capacity exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_objective_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert command(tmp_path / "run", *arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", [Objective, Adam], ids=lambda kind: kind.__name__)
def test_a_setting_of_the_wrong_kind_is_refused_by_name(kind: type) -> None:
    bad = {"beta": "x", "free_bits": None, "beta_warmup_steps": 2.5, "likelihood": 3}
    if kind is Adam:
        bad = {"lr": "x", "clip_norm": None, "warmup_steps": 2.5, "schedule": 3}
    for name, value in bad.items():
        with pytest.raises(InputError, match=f"{name} is {value!r}, expected a"):
            kind(**{name: value})
