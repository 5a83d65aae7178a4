"""Likelihoods against the truth of a linear-Gaussian model (benchmarks/truth.py)."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from minivae import evaluate as evaluation
from minivae.benchmarks.truth import IMAGE, LATENT, PIXELS, LinearGaussian
from minivae.cli import main
from minivae.data import Dataset, load
from minivae.errors import InputError
from minivae.evaluate import Estimate, aggregate_posterior, evaluate, grouped_bound
from minivae.layers import Dense, Flatten
from minivae.models import VAE, Autoencoder, Objective
from minivae.ops import philox
from minivae.ops.philox import philox4x32
from minivae.presets import preset


def test_the_estimate_at_5000_draws_is_the_evidence_within_three_standard_errors() -> None:
    truth = LinearGaussian(0)
    repeats = [evaluate(truth.model, truth.data, samples=5000, seed=seed) for seed in range(5)]
    estimates = [-found.negative_log_likelihood.mean for found in repeats]  # type: ignore[union-attr]
    error = np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - np.mean(truth.log_evidence)) < 3 * error + 1e-9
    assert error < 0.01


def test_the_elbos_gap_is_the_posteriors_kl() -> None:
    truth = LinearGaussian(1)
    found = evaluate(truth.model, truth.data, samples=5000)
    gap = np.mean(truth.log_evidence) + found.loss.mean
    # The reconstruction is a mean over 5000 draws of each image; the KL is exact.
    assert gap == pytest.approx(np.mean(truth.kl_to_posterior()), abs=0.02)
    assert gap > 0.05


def test_the_mean_bound_does_not_fall_as_draws_grow() -> None:
    truth = LinearGaussian(2)
    bounds = evaluate(truth.model, truth.data, samples=5000).bounds
    assert list(bounds) == [1, 10, 100, 1000, 5000]
    means = [bound.mean for bound in bounds.values()]
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.05


def test_the_mean_bound_does_not_fall_where_each_has_draws_of_its_own() -> None:
    truth = LinearGaussian(2)
    means, errors = [], []
    for k in (1, 4, 64):
        runs = (evaluate(truth.model, truth.data, samples=k, seed=999 * k + i) for i in range(300))
        bounds = [run.bounds[k].mean for run in runs]
        means.append(np.mean(bounds))
        errors.append(np.std(bounds, ddof=1) / math.sqrt(len(bounds)))
    for low, high in ((0, 1), (1, 2)):
        assert means[high] - means[low] > 3 * math.hypot(errors[low], errors[high])


@pytest.mark.parametrize("device", ["reference", "cpu", "emulated"])
@pytest.mark.parametrize("samples", [70, 450])
def test_the_chunk_changes_nothing_but_rounding(device: str, samples: int) -> None:
    truth = LinearGaussian(3)
    truth.model.to(device)
    found = [
        evaluate(truth.model, truth.data, samples=samples, chunk=chunk).as_dict()
        for chunk in (100, 200, 500)
    ]
    for other in found[1:]:
        for k, bound in other["bounds"].items():
            assert bound["mean"] == pytest.approx(found[0]["bounds"][k]["mean"], rel=1e-5)


def test_few_draws_of_many_images_are_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    original = evaluation._Draws._decode

    def counting(draws: Any, rows: int) -> None:
        decoded.append(rows)
        original(draws, rows)

    monkeypatch.setattr(evaluation._Draws, "_decode", counting)
    truth = LinearGaussian(4)
    evaluate(truth.model, truth.data, samples=20, chunk=100)
    assert decoded == [100, 80]  # of nine images


def test_exactly_k_draws_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = evaluation.grouped_bound

    def counting(log_weights: NDArray, k: int) -> float:
        drawn.append(len(np.unique(log_weights)))
        return original(log_weights, k)

    monkeypatch.setattr(evaluation, "grouped_bound", counting)
    truth = LinearGaussian(4)
    evaluate(truth.model, truth.data, samples=257, chunk=100)
    assert set(drawn) == {257}


def test_devices_agree() -> None:
    model = preset("glyphs").model(hidden=(20,), latent=3)
    data = load("glyphs").test.take(slice(0, 4))
    found = [
        evaluate(model.to(device), data, samples=200, binarization="threshold")
        for device in ("cpu", "emulated")
    ]
    for k, bound in found[0].bounds.items():
        assert bound.mean == pytest.approx(found[1].bounds[k].mean, rel=1e-5)


def test_log_weights_beyond_the_range_of_exp_give_a_finite_bound() -> None:
    assert grouped_bound(np.array([-1000.0, -1001.0]), 2) == pytest.approx(
        -1000 + math.log((1 + math.exp(-1)) / 2)
    )


def test_an_estimates_error_is_that_of_a_mean() -> None:
    assert Estimate.of(np.array([1.0, 2.0, 3.0])) == Estimate(2.0, 1 / math.sqrt(3))


def test_a_single_image_has_no_standard_error() -> None:
    assert str(Estimate.of(np.array([2.0]))) == "2.00"


@pytest.mark.parametrize(
    "evaluated",
    [
        lambda model, images: evaluate(
            model, Dataset(images, None), samples=150, binarization="stochastic"
        ),
        lambda model, images: model.evaluate(images, binarization="stochastic"),
    ],
    ids=["evaluate", "VAE.evaluate"],
)
def test_no_word_both_binarizes_an_image_and_draws_a_latent(
    evaluated: Callable[[VAE, NDArray], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counters: list[NDArray] = []

    def recorded(counter: NDArray, key: tuple[int, int]) -> NDArray:
        counters.append(counter.reshape(-1, 4))
        return philox4x32(counter, key)

    monkeypatch.setattr(philox, "philox4x32", recorded)
    model = VAE([Flatten(), Dense(4)], [Dense(PIXELS)], Objective("bernoulli"), IMAGE)
    model.to("reference")
    evaluated(model, np.random.default_rng(0).random((3, *IMAGE), np.float32))
    used = np.concatenate(counters)
    assert len(np.unique(used, axis=0)) == len(used)


def test_a_matching_aggregate_posterior_has_no_mismatch() -> None:
    mu = np.array([[0.6], [-0.6]])
    found = aggregate_posterior(mu, np.log(np.full((2, 1), 0.64)))
    assert found["kl_to_prior"] == pytest.approx(0, abs=1e-12)


def test_the_mismatch_of_an_aggregate_posterior_is_that_of_a_normal() -> None:
    mu = np.array([[1.5, 0.0], [0.5, 0.0]])  # of mean 1 and variance 1/4, and of neither
    found = aggregate_posterior(mu, np.log(np.full((2, 2), 0.5)))
    expected = 0.5 * (0.75 + 1 - 1 - math.log(0.75)) + 0.5 * (0.5 - 1 - math.log(0.5))
    assert found["kl_to_prior"] == pytest.approx(expected)
    assert found["mean"] == pytest.approx([1, 0])
    assert found["variance"] == pytest.approx([0.75, 0.5])


def test_the_kl_of_a_dimension_and_the_active_units_are_those_of_the_posterior() -> None:
    truth = LinearGaussian(6)
    head = truth.model.parameters.values["encoder.1.weight"]
    spread = np.std(truth.x @ head[:, :LATENT], axis=0)
    head[:, :LATENT] *= np.array([0.09, 0.11, 1.0]) / spread  # 0.1 squared is the threshold
    mu, logvar = truth.model.encode(truth.data.images)
    found = evaluate(truth.model, truth.data, samples=1)
    assert found.active_units == 2
    expected = np.mean(0.5 * (mu**2 + np.exp(logvar) - 1 - logvar), axis=0)
    assert found.kl_per_dimension == pytest.approx(list(expected), rel=1e-6)


# What a likelihood is


@pytest.mark.parametrize(
    ("objective", "binarization", "reason"),
    [
        (Objective("bernoulli"), "none", "grey pixels under a Bernoulli"),
        (Objective("bernoulli"), "stochastic", ""),
        (Objective("gaussian"), "none", ""),
        (Objective("squared-error"), "none", "not a log-density"),
    ],
)
def test_a_figure_that_is_no_likelihood_is_a_loss(
    objective: Objective, binarization: str, reason: str
) -> None:
    layers: Any = ([Flatten(), Dense(4)], [Dense(784)])
    data = load("glyphs").test.take(slice(0, 3))
    model = VAE(*layers, objective, data.image_shape)
    found = evaluate(model, data, samples=100, binarization=binarization)
    assert (found.negative_log_likelihood is None) == bool(reason)
    assert bool(found.bounds) == (not reason)
    assert reason in found.why_no_likelihood


def test_binary_pixels_under_a_bernoulli_are_a_likelihood() -> None:
    rng = np.random.default_rng(0)
    images = (255 * rng.integers(0, 2, (3, *IMAGE))).astype(np.uint8)
    model = VAE([Flatten(), Dense(4)], [Dense(PIXELS)], Objective("bernoulli"), IMAGE)
    assert evaluate(model, Dataset(images, None), samples=100).why_no_likelihood == ""


def test_a_plain_autoencoder_has_a_reconstruction_only() -> None:
    model = Autoencoder([Flatten(), Dense(4)], [Dense(PIXELS)], Objective("squared-error"), IMAGE)
    images = np.random.default_rng(0).random((3, *IMAGE), np.float32)
    found = evaluate(model, Dataset(images, np.array([0, 1, 1])))
    assert found.bounds == {}
    assert found.kl_per_dimension == []


def test_the_likelihood_is_by_the_bound_of_all_draws() -> None:
    truth = LinearGaussian(5)
    found = evaluate(truth.model, truth.data, samples=257)
    likelihood = found.negative_log_likelihood
    assert likelihood is not None
    assert max(found.bounds) == 257
    assert likelihood == Estimate(-found.bounds[257].mean, found.bounds[257].error)
    # A density of brightness in [0, 1], whose 256 levels are 1/255 apart.
    bits = likelihood.mean / PIXELS / math.log(2) + math.log2(255)
    assert found.bits_per_dimension == pytest.approx(bits)


def test_binarized_pixels_under_a_gaussian_are_one_apart() -> None:
    truth = LinearGaussian(5)
    found = evaluate(truth.model, truth.data, samples=100, binarization="threshold")
    assert found.negative_log_likelihood is not None
    bits = found.negative_log_likelihood.mean / PIXELS / math.log(2)
    assert found.bits_per_dimension == pytest.approx(bits)


@pytest.mark.parametrize(
    "likelihood", ["squared-error", "bernoulli", "gaussian", "calibrated-gaussian"]
)
def test_a_plain_autoencoders_loss_has_a_standard_error_over_images(likelihood: str) -> None:
    model = Autoencoder([Flatten(), Dense(4)], [Dense(PIXELS)], Objective(likelihood), IMAGE)
    images = np.random.default_rng(0).random((130, *IMAGE), np.float32)
    model.to("cpu")
    if likelihood == "calibrated-gaussian":
        model.calibrate(images[:50])
    found = evaluate(model, Dataset(images, None)).loss
    alone = [model.evaluate(image[None])["loss"] for image in images]
    assert found.mean == pytest.approx(np.mean(alone), rel=1e-5)
    assert found.error == pytest.approx(np.std(alone, ddof=1) / math.sqrt(130), rel=1e-4)


def test_the_error_of_a_class_is_the_mean_square_over_its_pixels() -> None:
    model = Autoencoder([Flatten(), Dense(4)], [Dense(PIXELS)], Objective("squared-error"), IMAGE)
    images = np.random.default_rng(0).random((3, *IMAGE), np.float32)
    found = evaluate(model, Dataset(images, np.array([7, 1, 7])))
    squares = np.square(model.reconstruct(images) - images)
    assert found.error_per_class == {
        "1": pytest.approx(squares[1].mean()),
        "7": pytest.approx(squares[[0, 2]].mean()),
    }


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0, expected an integer of 1 to"),
        ({"samples": 2.5}, "samples is 2.5, expected an integer"),
        ({"samples": 1 << 20}, "samples is 1048576, expected 1 to 409600"),
        ({"chunk": "x"}, "chunk is 'x', expected an integer"),
        ({"chunk": 50}, "chunk is 50, expected a multiple of 100"),
        ({"binarization": "odd"}, "binarization is 'odd'"),
    ],
)
def test_a_wrong_option_is_bad_input(options: dict[str, Any], message: str) -> None:
    truth = LinearGaussian(0)
    with pytest.raises(InputError, match=message):
        evaluate(truth.model, truth.data, **options)


@pytest.mark.parametrize("labels", [np.zeros(3, np.int64), np.zeros(5)])
def test_labels_that_do_not_fit_the_images_are_bad_input(labels: NDArray) -> None:
    with pytest.raises(InputError, match="expected one integer for each of 5 images"):
        evaluate(LinearGaussian(0).model, Dataset(np.zeros((5, *IMAGE), np.uint8), labels))


@pytest.mark.parametrize(("network", "bias"), [("encoder", 1e4), ("decoder", np.inf)])
def test_a_loss_that_is_not_finite_is_bad_input(network: str, bias: float) -> None:
    model, data = LinearGaussian(0).model, LinearGaussian(0).data
    names = [name for name in model.parameters.values if name.startswith(network)]
    model.parameters.values[names[-1]][...] = bias
    with pytest.raises(InputError, match="the loss of image 0 is not finite"):
        evaluate(model, data, samples=100)


def test_images_of_another_size_are_bad_input() -> None:
    with pytest.raises(InputError, match=r"images are \(5, 5, 1\), the model takes \(3, 4, 1\)"):
        evaluate(LinearGaussian(0).model, Dataset(np.zeros((2, 5, 5, 1), np.uint8), None))


def test_a_chunk_that_does_not_fit_into_memory_is_bad_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = LinearGaussian(0).model, LinearGaussian(0).data
    monkeypatch.setattr(model.backend, "free_memory", lambda: 1 << 20)
    with pytest.raises(InputError, match=r"a chunk of 100000 draws .* more than the 1 MiB"):
        evaluate(model, data, samples=100_000, chunk=100_000)
    assert evaluate(model, data, samples=100, chunk=100_000).samples == 100


# The command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    options = "--hidden 20 --latent 3 --steps 3 --quiet --device cpu --binarization stochastic"
    assert main(["train", *options.split(), "--out", str(folder)]) in (None, 0)
    return folder


def test_the_command_writes_figures_protocol_and_pictures(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--samples", "100", "--images", "5", "--device", "cpu", "--quiet"]
    main(["evaluate", str(run), *options])
    printed = capsys.readouterr().out
    assert "NLL, k = 100" in printed
    written = json.loads((run / "evaluation.json").read_text())
    assert written["binarization"] == "stochastic"
    assert (written["images"], written["samples"], written["seed"]) == (5, 100, 0)
    assert set(written["bounds"]) == {"1", "10", "100"}
    assert {"device", "commit", "versions"} <= set(written["environment"])
    assert (written["run"], written["preset"], written["source"]) == ("run", "glyphs", "glyphs")
    assert (written["checkpoint"], written["step"]) == ("checkpoint.safetensors", 3)
    assert written["training"]["binarization"] == "stochastic"
    for name in ("evaluation_kl.png", "evaluation_bounds.png"):
        assert (run / "pictures" / name).stat().st_size > 1000


def test_the_command_says_where_a_figure_is_a_loss(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--images", "5", "--device", "cpu", "--quiet", "--binarization", "none"]
    main(["evaluate", str(run), *options])
    printed = capsys.readouterr().out
    assert "a loss, not a likelihood: grey pixels" in printed
    assert "NLL" not in printed
