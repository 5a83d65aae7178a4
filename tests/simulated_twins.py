"""The Numba twins in Numba's simulator. test_numba_twins.py runs this file in a Python of its own,
since the simulator must be chosen before Numba is imported:

    NUMBA_ENABLE_CUDASIM=1 pytest tests/simulated_twins.py

The cases and most of the tests are those of every backend, with a `backend` fixture of this file.
"""

from typing import Any

import numpy as np
import pytest
from numba import cuda
from test_backends import (
    CASES,
    KNOWN_ANSWERS,
    TOLERANCE,
    Case,
    Runner,
    _words,
    reference,
    relative_error,
    test_a_loss_that_is_not_finite_sets_the_latch,
    test_after_the_latch_nothing_changes,
    test_bernoulli_loss_of_confident_logits,
    test_kl_of_numbers_that_are_not_finite,
    test_losses_of_numbers_that_are_not_finite,
    test_noise_is_the_reference_noise,
    test_totals_of_a_good_step,
)

from minivae.backends.emulated import EmulatedBackend
from minivae.backends.numba_cuda import THREADS, _Twins, numba_cuda_backend
from minivae.backends.reference import PRIMITIVES, ReferenceBackend
from minivae.data.dataset import Dataset, Splits
from minivae.kernels import adam_numba, philox_numba
from minivae.layers import Dense, Flatten, ReLU
from minivae.models import VAE, Objective
from minivae.ops.elbo import LOSS
from minivae.optim import Adam
from minivae.presets import Training
from minivae.train import Trainer

__all__ = [
    "test_a_loss_that_is_not_finite_sets_the_latch",
    "test_after_the_latch_nothing_changes",
    "test_bernoulli_loss_of_confident_logits",
    "test_kl_of_numbers_that_are_not_finite",
    "test_losses_of_numbers_that_are_not_finite",
    "test_noise_is_the_reference_noise",
    "test_totals_of_a_good_step",
]

# A thread of the simulator is a thread of Python, which does not inherit the caller's np.errstate.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

TWINS = {
    name for name in PRIMITIVES if getattr(_Twins, name) is not getattr(ReferenceBackend, name)
}
SLOW = ("31x784", "10007", "clip_gradient-31", "clip_gradient-32", "clip_gradient-33")
"""Seconds of simulation each, for tails that other sizes have too."""

TWIN_CASES = [
    case for case in CASES if case.primitive in TWINS and not any(slow in case.id for slow in SLOW)
]


@pytest.fixture(scope="module")
def backend() -> ReferenceBackend:
    assert cuda.config.ENABLE_CUDASIM, "set NUMBA_ENABLE_CUDASIM=1"
    return numba_cuda_backend()


def test_the_twins_are_these() -> None:
    assert {
        *("latent_forward", "latent_backward", "bernoulli_loss", "squared_error_loss"),
        *("elbo_totals", "adam_update", "clip_gradient"),
    } == TWINS
    assert {case.primitive for case in TWIN_CASES} == TWINS


@pytest.mark.parametrize("case", TWIN_CASES, ids=lambda case: case.id)
def test_equivalence(backend: ReferenceBackend, case: Case) -> None:
    actual, expected = Runner(backend, np.float32)(case), reference(case)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = relative_error(a, e)
        assert error < TOLERANCE[np.float32], f"written array {index}: relative error {error:.1e}"


@pytest.mark.parametrize(
    "case", {case.primitive: case for case in TWIN_CASES}.values(), ids=lambda case: case.id
)
def test_same_call_same_bits(backend: ReferenceBackend, case: Case) -> None:
    run = Runner(backend, np.float32)
    for first, second in zip(run(case), run(case), strict=True):
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    words = [np.uint64(word) for word in _words(counter) + _words(key)]
    assert list(philox_numba.philox4x32.fn(*words)) == _words(answer)


def test_other_types_and_layouts_are_refused(backend: ReferenceBackend) -> None:
    x = backend.zeros((4, 6))
    with pytest.raises(TypeError, match=r"float64, shape \(4, 6\)"):
        backend.bernoulli_loss(x.astype(np.float64), x, backend.zeros((4,)), x.copy(), 1.0)
    with pytest.raises(TypeError, match="a strided array"):
        backend.bernoulli_loss(backend.zeros((6, 4)).T, x, backend.zeros((4,)), x.copy(), 1.0)


class TwinsOverKernels(_Twins, EmulatedBackend):
    """The twins in the place of CUDA C++ kernels, as on a GPU."""

    def __init__(self) -> None:
        EmulatedBackend.__init__(self)
        self._norm_squares = self.zeros((adam_numba.PARTIALS,))
        self.launched: set[str] = set()

    def _run_twin(self, kernel: Any, blocks: int, arguments: list[Any]) -> None:
        self.launched.add(kernel.fn.__name__)
        kernel[blocks, THREADS](*arguments)


def _trained(backend: ReferenceBackend, steps: int, clip_norm: float = 1.0) -> Trainer:
    pixels = np.random.default_rng(5).integers(0, 256, (24, 5, 5, 1), np.uint8)
    split = Dataset(pixels, None)
    model = VAE(
        [Flatten(), Dense(7), ReLU(), Dense(6)],
        [Dense(7), ReLU(), Dense(25)],
        Objective(free_bits=0.05),
        (5, 5, 1),
    ).to(backend)
    optimizer = Adam(lr=1e-2, weight_decay=0.1, clip_norm=clip_norm)
    training = Training(batch_size=8, steps=steps, optimizer=optimizer, binarization="stochastic")
    trainer = Trainer(model, Splits("noise", split, split), training)
    for _ in range(steps):
        trainer.step()
    return trainer


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_over_the_cuda_kernels_a_step_runs_every_twin_that_it_has_a_use_for(
    clip_norm: float,
) -> None:
    backend = TwinsOverKernels()
    actual, expected = (_trained(b, 1, clip_norm) for b in (backend, ReferenceBackend()))
    clipping = {"clip_gradient", "clip_gradient_partials"} if clip_norm else set()
    assert backend.launched == clipping | {
        *("latent_forward", "latent_backward", "bernoulli_loss", "elbo_totals", "adam_update")
    }
    np.testing.assert_allclose(actual.progress.totals, expected.progress.totals, rtol=1e-6)


def test_a_model_trains_to_the_references_parameters(backend: ReferenceBackend) -> None:
    actual, expected = (_trained(b, 3) for b in (backend, ReferenceBackend()))
    tensors = expected.model.tensors()
    for name, tensor in actual.model.tensors().items():
        # Three steps of Adam, which divides by the gradient's size, carry some roundings on.
        np.testing.assert_allclose(tensor, tensors[name], rtol=1e-4, atol=1e-6, err_msg=name)
    losses = [trainer.progress.totals[LOSS] for trainer in (actual, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
