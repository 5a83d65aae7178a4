"""Objectives of several draws: gradients against differences and PyTorch, the protocol of the
paper's presets, and exact resume."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from minivae.data import Dataset, Splits, load
from minivae.errors import InputError
from minivae.gradcheck import TOLERANCE, check_gradients
from minivae.layers import Dense, Flatten
from minivae.model_pass import INFERENCE_BATCH
from minivae.models import VAE, Autoencoder, Objective, model_from_config
from minivae.ops.importance import log_mean_exp
from minivae.ops.philox import LATENT_STREAM, Noise, standard_normal
from minivae.ops.state import SCHEDULE_COLUMNS, new_state
from minivae.optim import Adam
from minivae.presets import Training, preset, training_from_config
from minivae.train import Trainer, fit

NOISE = Noise(3, LATENT_STREAM)
SMALL: dict[str, Any] = {"hidden": (9, 7), "latent": 5}


def gradients(model: Autoencoder, rows: int = 3) -> tuple[float, dict[str, NDArray]]:
    """The loss and all parameter gradients of some random images, in float64."""
    model.to("reference", np.float64)
    bound = model.bind(rows)
    bound.x[...] = np.random.default_rng(1).random(bound.x.shape)
    totals, schedule = np.zeros(3), np.ones((1, SCHEDULE_COLUMNS))
    bound.backend.sequence(*bound.forward_calls(NOISE, schedule, new_state(), totals))
    bound.backward(NOISE, new_state())
    return totals[0] / rows, dict(model.parameters.gradients)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", ["iwae-paper-vae", "iwae-paper-iwae"])
def test_the_gradients_agree_with_differences(name: str, samples: int) -> None:
    model = preset(name).model(**SMALL, samples=samples)
    assert max(error.error for error in check_gradients(model)) < TOLERANCE


def test_with_one_draw_both_estimators_have_the_single_sample_elbos_gradient() -> None:
    found = [
        gradients(preset(name).model(**SMALL, samples=1))
        for name in ("iwae-paper-vae", "iwae-paper-iwae")
    ]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-14)
    for name, gradient in found[0][1].items():
        np.testing.assert_allclose(gradient, found[1][1][name], rtol=1e-12, atol=1e-16)


def test_a_tighter_bound_from_more_draws() -> None:
    losses = [
        gradients(preset("iwae-paper-iwae").model(**SMALL, samples=k), 40)[0] for k in (1, 5, 50)
    ]
    assert losses == sorted(losses, reverse=True)


def test_log_mean_exp_does_not_overflow() -> None:
    values = np.array([[1e4, 1e4 - 1], [-1e4, -1e4]])
    expected = [1e4 + math.log((1 + math.exp(-1)) / 2), -1e4]
    np.testing.assert_allclose(log_mean_exp(values), expected, rtol=1e-14)


@pytest.mark.peers
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("name", ["iwae-paper-vae", "iwae-paper-iwae"])
def test_loss_and_gradients_are_pytorchs(name: str, samples: int) -> None:
    import torch

    from minivae.benchmarks.paper_peer import negative_bound
    from minivae.benchmarks.torch_peer import TorchModel

    rows = 3
    model = preset(name).model(**SMALL, samples=samples)
    loss, derived = gradients(model, rows)
    peer = TorchModel(model).double()
    eps = torch.from_numpy(standard_normal((rows * samples, 5), NOISE, 0, np.float64))
    # PyTorch has the draws first, here the images are.
    draws = eps.reshape(rows, samples, 5).transpose(0, 1)
    x = torch.from_numpy(model.bind(rows).x.copy()).reshape(rows, 1, 28, 28)
    torch.distributions.Distribution.set_default_validate_args(False)  # grey pixels
    try:
        importance = model.objective.estimator == "importance"
        expected = negative_bound(peer, x, draws, importance) / rows
    finally:
        torch.distributions.Distribution.set_default_validate_args(True)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for parameter, value in peer.named_parameters():
        gradient = value.grad.numpy()
        exact = gradient.T if parameter.endswith("weight") else gradient
        np.testing.assert_allclose(derived[parameter], exact, rtol=1e-9, atol=1e-13)


# What may be asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0, expected 1 or above"),
        ({"samples": 5}, "samples is 5, expected 1 with estimator 'analytic'"),
        ({"estimator": "exact"}, "estimator is 'exact', expected one of"),
        ({"estimator": "importance", "beta": 2.0}, "'importance'. is for the Bernoulli likelihood"),
        ({"estimator": "importance", "likelihood": "gaussian"}, "is for the Bernoulli"),
    ],
)
def test_an_objective_that_has_no_derivation_is_bad_input(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Objective(**options)


def test_a_plain_autoencoder_draws_nothing() -> None:
    objective = Objective("bernoulli", estimator="importance")
    with pytest.raises(InputError, match="only a VAE draws its code"):
        Autoencoder([Flatten(), Dense(2)], [Dense(4)], objective, (2, 2, 1))


def test_inference_takes_no_more_memory_for_more_draws() -> None:
    model = preset("iwae-paper-iwae").model((4, 5, 1), samples=40).to("cpu")
    images = np.random.default_rng(0).random((150, 4, 5, 1), np.float32)
    model.encode(images)
    alone = model.evaluate(images)
    assert model._memory is not None
    assert model._memory.draws == INFERENCE_BATCH
    model.bind(20)
    assert model._memory.draws == 20 * 40
    assert model.evaluate(images) == alone


def test_a_log_sigma_head_is_for_the_estimators_by_draws() -> None:
    with pytest.raises(InputError, match="head is 'log-sigma', expected 'logvar'"):
        VAE([Flatten(), Dense(2)], [Dense(4)], Objective(), (2, 2, 1), head="log-sigma")


def test_a_log_sigma_head_is_half_the_log_variance() -> None:
    objective = Objective("bernoulli", estimator="importance")
    layers: Any = ([Flatten(), Dense(2)], [Dense(4)], objective, (2, 2, 1))
    images = np.random.default_rng(0).random((3, 2, 2, 1), np.float32)
    single, double = (VAE(*layers, head=head).encode(images) for head in ("logvar", "log-sigma"))
    np.testing.assert_allclose(double[0], single[0])
    np.testing.assert_allclose(double[1], 2 * single[1])


# The paper's protocol


def test_the_papers_model_is_its_description() -> None:
    model = preset("iwae-paper-iwae").model()
    assert [layer.kind for layer in model.encoder.layers] == [
        *("flatten", "dense", "tanh", "dense", "tanh", "dense")
    ]
    shapes = {name: value.shape for name, value in model.parameters.values.items()}
    assert shapes["encoder.1.weight"] == (784, 200)
    assert shapes["encoder.5.weight"] == (200, 100)
    assert shapes["decoder.4.weight"] == (200, 784)
    assert (model.head, model.initialization, model.objective.samples) == (
        "log-sigma",
        "glorot",
        50,
    )
    for name, value in model.parameters.values.items():
        if name.endswith("bias"):
            assert (value == 0).all()
    assert model_from_config(json.loads(json.dumps(model.config()))).config() == model.config()


def test_the_papers_training_is_its_description() -> None:
    training = preset("iwae-paper-vae").training
    assert (training.epochs, training.batch_size, training.images) == (3280, 20, 59_600)
    assert not training.shuffle
    adam, steps = training.optimizer, 59_600 // 20
    firsts = [0, 1, 4, 13, 40, 121, 364, 1093]
    rates = [adam.learning_rate(passes * steps, 0, steps) for passes in firsts]
    np.testing.assert_allclose(rates, [1e-3, 7.2e-4, 5.2e-4, 3.7e-4, 2.7e-4, 1.9e-4, 1.4e-4, 1e-4])
    assert adam.learning_rate(steps - 1, 0, steps) == pytest.approx(1e-3)
    assert adam.learning_rate(3280 * steps, 0, steps) == pytest.approx(1e-4)
    assert (adam.beta1, adam.beta2, adam.epsilon, adam.second_moment) == (
        0.99,
        0.999,
        5e-6,
        1 / 400,
    )


def test_epsilon_hat_is_outside_of_the_bias_correction() -> None:
    hat, usual = (Adam(epsilon_hat=value).schedule_rows(9, 1, 0)[0] for value in (True, False))
    assert hat[0] == pytest.approx(usual[0] * math.sqrt(1 - 0.999**10))
    assert (hat[1], usual[1]) == (1, pytest.approx(math.sqrt(1 - 0.999**10)))


def test_averaged_gradients_with_these_constants_are_summed_ones_with_the_authors() -> None:
    """Two steps of the authors' update, in NumPy, on 20 times the gradient."""
    training = preset("iwae-paper-vae").training.optimizer
    p, m, v = 0.3, 0.0, training.second_moment
    q, first, second = 0.3, 0.0, 1.0
    for step, gradient in enumerate((0.02, -0.01)):
        step_size, root = training.schedule_rows(0, 2, 0)[step][:2]
        m += (1 - training.beta1) * (gradient - m)
        v += (1 - training.beta2) * (gradient**2 - v)
        p -= step_size * m / (math.sqrt(v) / root + training.epsilon)
        first += (1 - 0.99) * (20 * gradient - first)
        second += (1 - 0.999) * ((20 * gradient) ** 2 - second)
        rate = 1e-3 * math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.99 ** (step + 1))
        q -= rate * first / (math.sqrt(second) + 1e-4)
    assert p == pytest.approx(q, rel=1e-12)


SHORT = dataclasses.replace(preset("iwae-paper-iwae").training, images=60, steps=4)


def test_a_run_starts_with_the_mean_image_and_the_second_moment() -> None:
    splits = load("glyphs")
    model = preset("iwae-paper-iwae").model(**SMALL, samples=2)
    fit(model, splits, dataclasses.replace(SHORT, steps=1, epochs=1), progress=False, device="cpu")
    begun = preset("iwae-paper-iwae").model(**SMALL, samples=2).to("cpu")
    Trainer(begun, splits, SHORT).begin()
    mean = np.clip(np.mean(splits.train.images[:60] / 255, axis=0).ravel(), 0.001, 0.999)
    bias = begun.parameters.values["decoder.4.bias"]
    np.testing.assert_allclose(1 / (1 + np.exp(-bias)), mean, rtol=1e-5)
    for moment in begun.parameters.second_moments.values():
        assert (moment == np.float32(1 / 400)).all()


def test_an_output_bias_needs_logits_from_a_dense_layer() -> None:
    training = Training(output_bias=True)
    with pytest.raises(InputError, match="output_bias: expected logits"):
        fit(preset("mnist-conv").model(), "glyphs", training, progress=False, device="cpu")


def test_without_shuffle_every_epoch_has_the_order_of_the_data() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(6, 1, 2, 1)
    data = Dataset(pixels, None)
    model = VAE([Flatten(), Dense(2)], [Dense(2)], Objective(), (1, 2, 1)).to("cpu")
    training = Training(batch_size=2, images=4, shuffle=False)
    trainer = Trainer(model, Splits("count", data, data), training)
    seen = []
    for _ in range(4):
        trainer.step()
        seen.append(np.round(255 * model.bind(2).x[:, 0]).astype(int).tolist())
    assert seen == [[0, 2], [4, 6]] * 2


def test_more_images_than_there_are_is_bad_input() -> None:
    with pytest.raises(InputError, match="images is 99999, expected at most the 20000 of glyphs"):
        fit(preset("glyphs").model(), "glyphs", Training(images=99_999), progress=False)


def test_a_run_stopped_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    def run(folder: Path, steps: int, resume: bool) -> bytes:
        model = preset("iwae-paper-iwae").model(**SMALL, samples=3)
        training = dataclasses.replace(SHORT, steps=steps)
        fit(model, "glyphs", training, out=folder, resume=resume, progress=False, device="cpu")
        return b"".join(tensor.tobytes() for tensor in model.tensors().values())

    whole = run(tmp_path / "whole", 5, False)
    run(tmp_path / "halves", 2, False)
    assert run(tmp_path / "halves", 5, True) == whole


def test_a_training_configuration_survives_its_file() -> None:
    training = preset("iwae-paper-vae").training
    assert training_from_config(json.loads(json.dumps(dataclasses.asdict(training)))) == training


def test_pieces_are_counted_in_epochs_of_however_many_steps() -> None:
    adam = Adam(lr=1.0, schedule="pieces", pieces=((1, 4.0), (2, 2.0), (1, 1.0)))
    rates = [[adam.learning_rate(step, 0, n) for step in range(4 * n)] for n in (1, 3)]
    assert rates == [[4, 2, 2, 1], [4] * 3 + [2] * 6 + [1] * 3]


def test_pieces_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(InputError, match=r"pieces is \(\(1,\),\), expected \(epochs, factor\)"):
        Adam(schedule="pieces", pieces=((1,),))  # type: ignore[arg-type]


def test_pieces_go_with_their_schedule() -> None:
    for options in ({"schedule": "pieces"}, {"pieces": ((3, 1.0),)}):
        with pytest.raises(InputError, match="pieces is"):
            Adam(**options)  # type: ignore[arg-type]
