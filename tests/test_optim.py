"""Schedules and the layout of parameters: what the host decides about a step, and where it goes."""

import math

import numpy as np
import pytest

from minivae.backends.reference import ReferenceBackend
from minivae.errors import InputError
from minivae.layers import Conv2d, Dense, Flatten, ReLU
from minivae.models import VAE, Objective
from minivae.ops.adam import adam_update, clip_gradient
from minivae.ops.philox import LATENT_STREAM, Noise
from minivae.ops.state import BETA, CAPACITY, DECAY, ROOT, STEP_SIZE, advance_state, new_state
from minivae.optim import Adam
from minivae.params import ALIGNMENT, Parameters

# The learning rate


def test_a_constant_schedule_keeps_its_rate() -> None:
    assert {Adam(lr=0.3).learning_rate(step, 100, 1) for step in (0, 1, 50, 99, 1000)} == {0.3}


def test_a_step_schedule_falls_by_gamma_every_so_many_steps() -> None:
    optimizer = Adam(lr=1.0, schedule="step", step_every=3, gamma=0.5)
    rates = [optimizer.learning_rate(step, 100, 1) for step in range(8)]
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_a_cosine_schedule_falls_from_its_rate_to_nothing() -> None:
    optimizer = Adam(lr=2.0, schedule="cosine")
    rates = [optimizer.learning_rate(step, 8, 1) for step in (0, 2, 4, 6, 8, 9)]
    half = math.sqrt(0.5)
    expected = [2, 1 + half, 1, 1 - half, 0, 0]
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
def test_a_warm_up_rises_in_a_line_to_the_rate_and_the_schedule_starts_after_it(
    schedule: str,
) -> None:
    plain = Adam(lr=0.4, schedule=schedule, step_every=2)
    warm = Adam(lr=0.4, schedule=schedule, step_every=2, warmup_steps=4)
    rising = [warm.learning_rate(step, 14, 1) for step in range(4)]
    assert rising == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-12)
    after = [warm.learning_rate(4 + step, 14, 1) for step in range(10)]
    assert after == [plain.learning_rate(step, 10, 1) for step in range(10)]


@pytest.mark.parametrize("total", [0, 3, 4])
def test_a_warm_up_as_long_as_the_run_or_longer_divides_by_nothing(total: int) -> None:
    optimizer = Adam(lr=0.4, schedule="cosine", warmup_steps=4)
    rates = [optimizer.learning_rate(step, total, 1) for step in range(6)]
    assert all(0 <= rate <= 0.4 for rate in rates)


# The rows of the schedule


def test_a_schedule_row_holds_what_its_columns_say() -> None:
    optimizer = Adam(lr=0.2, beta1=0.8, beta2=0.99, weight_decay=0.1)
    row = optimizer.schedule_rows(2, 1, 100)[0]
    # The third step: t = 3.
    assert row[STEP_SIZE] == pytest.approx(0.2 / (1 - 0.8**3), rel=1e-14)
    assert row[ROOT] == pytest.approx(math.sqrt(1 - 0.99**3), rel=1e-14)
    assert row[DECAY] == pytest.approx(1 - 0.02, rel=1e-14)
    assert row[BETA] == row[CAPACITY] == 0


def test_the_rows_of_an_epoch_are_rows_of_the_whole_run() -> None:
    optimizer = Adam(schedule="cosine", warmup_steps=5, weight_decay=0.01)
    whole = optimizer.schedule_rows(0, 20, 20)
    part = optimizer.schedule_rows(7, 6, 20)
    np.testing.assert_array_equal(part, whole[7:13])


def test_weight_decay_follows_the_scheduled_rate() -> None:
    optimizer = Adam(lr=0.2, schedule="step", step_every=1, gamma=0.5, weight_decay=0.1)
    decay = optimizer.schedule_rows(0, 3, 20)[:, DECAY]
    np.testing.assert_allclose(decay, [1 - 0.02, 1 - 0.01, 1 - 0.005], rtol=1e-14)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", 0.0),
        ("lr", -1e-3),
        ("lr", math.nan),
        ("lr", math.inf),
        ("beta1", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.0),
        ("epsilon", 0.0),
        ("weight_decay", -0.1),
        ("weight_decay", math.inf),
        ("schedule", "linear"),
        ("warmup_steps", -1),
        ("step_every", 0),
        ("gamma", 0.0),
        ("clip_norm", -1.0),
        ("clip_norm", math.nan),
    ],
)
def test_a_bad_setting_is_refused_by_name(argument: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{argument} is {value!r}, expected"):
        Adam(**{argument: value})  # type: ignore[arg-type]


def test_the_refusal_of_a_schedule_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="one of constant, step, cosine"):
        Adam(schedule="linear")


# The flat buffers

SHAPES = {"a": (3, 5), "b": (1,), "c": (ALIGNMENT,), "d": (2, 3, 4, 5), "e": (33,)}
KINDS = ("values", "gradients", "first_moments", "second_moments")


@pytest.fixture
def parameters() -> Parameters:
    return Parameters(SHAPES, ReferenceBackend(), np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_is_an_aligned_contiguous_view_of_its_flat_buffer(
    parameters: Parameters, kind: str
) -> None:
    flat = parameters.flat[kind]
    for name, view in getattr(parameters, kind).items():
        assert view.shape == SHAPES[name]
        assert view.flags.c_contiguous
        assert np.shares_memory(view, flat)
        offset = view.ctypes.data - flat.ctypes.data
        assert offset % (ALIGNMENT * flat.itemsize) == 0


def test_no_two_tensors_share_memory(parameters: Parameters) -> None:
    for number, view in enumerate(
        view for kind in KINDS for view in getattr(parameters, kind).values()
    ):
        assert (view == 0).all()
        view[...] = number + 1


def test_the_gaps_between_tensors_are_shorter_than_the_alignment(parameters: Parameters) -> None:
    total = sum(math.prod(shape) for shape in SHAPES.values())
    assert parameters.count == total
    flat = parameters.flat["values"]
    assert total <= flat.size < total + len(SHAPES) * ALIGNMENT
    assert flat.size % ALIGNMENT == 0


def test_the_gaps_stay_zero_through_clipped_and_decayed_steps() -> None:
    model = VAE(
        [Conv2d(3, 3), ReLU(), Flatten(), Dense(4)], [Dense(30)], Objective(), (6, 5, 1)
    ).to("reference")
    bound, flat = model.bind(4), model.parameters.flat
    bound.x[...] = np.random.default_rng(0).random(bound.x.shape)
    optimizer = Adam(lr=0.1, weight_decay=0.1)
    schedule, state = optimizer.schedule_rows(0, 3, 3).astype(np.float32), new_state()
    schedule[:, BETA] = 1
    for _ in range(3):
        bound.backend.sequence(
            *bound.forward_calls(Noise(0, LATENT_STREAM), schedule, state, np.zeros(3))
        )
        bound.backward(Noise(0, LATENT_STREAM), state)
        clip_gradient(flat["gradients"], 0.1, np.empty(1, np.float32))
        adam_update(
            *(flat[kind] for kind in ("values", "gradients", "first_moments", "second_moments")),
            *(schedule, state, optimizer.beta1, optimizer.beta2, optimizer.epsilon),
        )
        advance_state(state, 4)
    for kind in KINDS:
        assert np.abs(flat[kind]).max() > 0, kind
        for view in getattr(model.parameters, kind).values():
            view[...] = 0
        np.testing.assert_array_equal(flat[kind], 0, kind)


def test_moving_a_model_keeps_its_values_and_moments() -> None:
    model = VAE([Flatten(), Dense(4)], [Dense(30)], Objective(), (6, 5, 1)).to("reference")
    model.parameters.flat["first_moments"][...] = 1.5
    model.parameters.flat["second_moments"][...] = 2.5
    before = model.tensors()
    after = model.to("reference", np.float64).tensors()
    for name, tensor in before.items():
        assert after[name].dtype == np.float64
        np.testing.assert_array_equal(after[name], tensor, name)
