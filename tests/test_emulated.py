"""The shipped CUDA C++ kernels on the CPU, beyond every backend's cases in test_backends.py: orders
of threads, fused launches, training, and planted bugs, which must be caught."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import relative_error
from numpy.typing import NDArray
from test_backends import CASES, TOLERANCE, Case, Runner, check

from minivae import backends
from minivae.backends import emulated
from minivae.backends.emulated import EmulatedBackend
from minivae.backends.kernel_backend import kernels
from minivae.backends.reference import Call, ReferenceBackend
from minivae.data import load
from minivae.kernels import Tile, source
from minivae.ops.activations import IDENTITY, Activation
from minivae.ops.conv import ConvGeometry
from minivae.ops.philox import LATENT_STREAM, Noise
from minivae.ops.state import FAILED, SCHEDULE_COLUMNS, new_state
from minivae.presets import Training, preset
from minivae.train import Trainer, fit


class NotPlantedError(Exception):
    """A bug that is not in the kernels, and so could not be caught."""


class Shuffled(EmulatedBackend):
    """The kernels, with threads and blocks in an order that `seed` gives, or in their own if 0."""

    seed = 0

    def run(self, kernel: str, tile: Tile, *launch: Any) -> None:
        module = self.module(kernels()[kernel].stem, tile)
        module.shuffle(self.seed)
        super().run(kernel, tile, *launch)
        module.shuffle(0)


class Planted(Shuffled):
    """The kernels with one place of one source changed."""

    def __init__(self, stem: str, right: str, wrong: str, *flags: str, precision: str = "fp32"):
        super().__init__(precision)
        self.stem, self.right, self.wrong, self.flags = stem, right, wrong, flags

    def module(self, stem: str, tile: Tile) -> ctypes.CDLL:
        if stem != self.stem:
            return super().module(stem, tile)
        text = source(stem, tensor_cores=self.precision == "tf32", tile=tile)
        if text.count(self.right) != 1:
            raise NotPlantedError(f"{self.right!r} is {text.count(self.right)} times in {stem}")
        return emulated.build(text.replace(self.right, self.wrong), *self.flags)


def case_of(primitive: str, label: str = "") -> Case:
    return next(c for c in CASES if c.primitive == primitive and c.label.startswith(label))


DENSE = case_of("dense_forward", "128x784x400")
"""Split over several blocks, many slices deep."""


ORDERED = [
    DENSE,
    case_of("dense_weight_gradient", "128x784x400"),
    case_of("conv2d_weight_gradient", "6x28x28"),
    case_of("conv_transpose2d_forward", "6x28x28"),
    case_of("bernoulli_loss", "31x784"),
    case_of("elbo_totals"),
    case_of("calibrate_gaussian", "31x784"),
    case_of("capacity_totals", "127x50"),
    case_of("clip_gradient", "10007"),
]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("case", ORDERED, ids=lambda case: case.id)
def test_the_order_of_threads_and_blocks_changes_no_bit(case: Case) -> None:
    backend = Shuffled()
    run = Runner(backend, np.float32)
    expected = run(case)
    for backend.seed in range(1, 4):
        for actual, before in zip(run(case), expected, strict=True):
            assert actual.tobytes() == before.tobytes()


# The fused update


KERNEL_BACKENDS = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
GEOMETRY = ConvGeometry(2, 2, 1, 1)


def layers(backend: ReferenceBackend, views: list[Any]) -> list[Call]:
    """Two dense layers, a convolution and a transposed one, on arrays of `backend`."""
    rng = np.random.default_rng(4)

    def normal(*shape: int) -> Any:
        return backend.asarray(rng.standard_normal(shape, np.float32))

    n = 33
    # So dark that a tile of 8 columns has images without a lit number, and with one.
    images = backend.asarray(
        rng.standard_normal((n, 131), np.float32) * (rng.random((n, 131)) < 0.1)
    )
    return [
        Call("dense_weight_gradient", (images, normal(n, 67), *views[0:2])),
        Call("dense_weight_gradient", (normal(n, 7), normal(n, 5), *views[2:4])),
        Call(
            "conv2d_weight_gradient",
            (normal(n, 7, 7, 3), normal(n, 4, 4, 5), *views[4:6], GEOMETRY),
        ),
        Call(
            "conv_transpose2d_weight_gradient",
            (normal(n, 4, 4, 5), normal(n, 7, 7, 3), *views[6:8], GEOMETRY),
        ),
    ]


SHAPES = [(131, 67), (67,), (7, 5), (5,), (3, 3, 3, 5), (5,), (3, 3, 3, 5), (3,)]


def updated(
    backend: ReferenceBackend, fused: bool, *, steps: int = 1, failed: int = 0
) -> list[NDArray]:
    """Parameters and moments after updates of some layers."""
    sizes = [32 * -(-int(np.prod(shape)) // 32) for shape in SHAPES]
    rng = np.random.default_rng(7)
    p, m, v = (rng.random(sum(sizes), np.float32) for _ in range(3))
    g = backend.zeros((sum(sizes),))
    views = [
        g[sum(sizes[:index]) :][: int(np.prod(shape))].reshape(shape)
        for index, shape in enumerate(SHAPES)
    ]
    state = new_state()
    state[FAILED] = failed
    schedule = np.full((steps, SCHEDULE_COLUMNS), 0.3, np.float32)
    flat = [backend.asarray(array) for array in (p, m, v)]
    rest = (backend.asarray(schedule), backend.asarray(state), 0.9, 0.999, 1e-8)
    jobs = layers(backend, views)
    for _ in range(steps):
        if fused:
            backend.optimizer_step(jobs, flat[0], g, flat[1], flat[2], *rest, 0)
        else:
            backend.weight_gradients(jobs, g)
            backend.adam_update(flat[0], g, flat[1], flat[2], *rest)
            backend.advance_state(rest[1], 0)
    used = np.concatenate(
        [np.arange(int(np.prod(s))) + sum(sizes[:i]) for i, s in enumerate(SHAPES)]
    )
    return [backend.to_numpy(array)[used] for array in flat]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("precision", backends.PRECISIONS)
@pytest.mark.parametrize("name", KERNEL_BACKENDS)
def test_a_fused_update_has_the_bits_of_gradient_and_adam(name: str, precision: str) -> None:
    backend = backends.get(name, precision)
    for actual, expected in zip(
        updated(backend, True, steps=2), updated(backend, False, steps=2), strict=True
    ):
        assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["emulated", "cpu"])
def test_a_fused_update_is_the_references(name: str) -> None:
    expected = updated(backends.get("reference"), True)
    for actual, exact in zip(updated(backends.get(name), True), expected, strict=True):
        assert relative_error(actual, exact) < 1e-5  # Adam divides by roots of rounded squares


@pytest.mark.parametrize("name", ["emulated", "cpu"])
def test_a_fused_update_of_a_failed_step_changes_nothing(name: str) -> None:
    before, after = (updated(backends.get(name), True, steps=s, failed=1) for s in (0, 2))
    for first, last in zip(before, after, strict=True):
        assert first.tobytes() == last.tobytes()


# Fused sequences


def dense_elbo(
    rng: np.random.Generator, likelihood: str, n: int, i: int, o: int, d: int
) -> tuple[list[Any], Callable[[list[Any], Any, Any], list[Call]]]:
    """Arrays, and the calls on them: the decoder's last layer, its loss, the totals."""
    arrays: list[Any] = [
        *(rng.standard_normal((n, i)), rng.standard_normal((i, o)) / i**0.5, rng.random(o)),
        *(np.full((n, o), np.nan), rng.random((n, o)), np.full(n, np.nan), np.full((n, o), np.nan)),
        *(rng.random((n, d)), np.full((1, SCHEDULE_COLUMNS), 0.7), np.full(d, np.nan)),
    ]

    def calls(a: list[Any], state: Any, totals: Any) -> list[Call]:
        x, w, b, y, target, loss, dz, kl, schedule, kl_weight = a
        # The squared error's gradient goes through the activation, that of the logits does not.
        squared = likelihood == "squared_error"
        activation = Activation("sigmoid") if squared else Activation("leaky_relu", 0.2)
        scored = (y, target, loss, dz, 1 / n)
        extra = (0.5, activation) if squared else ()
        return [
            Call("dense_forward", (x, w, b, y, activation)),
            Call(f"{likelihood}_loss", (*scored, *extra)),
            Call("elbo_totals", (loss, kl, schedule, state, 0.45, kl_weight, totals)),
        ]

    return arrays, calls


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", KERNEL_BACKENDS)
@pytest.mark.parametrize("likelihood", ["bernoulli", "squared_error"])
@pytest.mark.parametrize(
    ("n", "i", "o", "d"),
    [(1, 1, 1, 1), (33, 7, 67, 5), (65, 31, 12, 0), (40, 50, 29, 6), (129, 400, 784, 33)],
)
def test_a_fused_loss_is_the_references(
    name: str, likelihood: str, n: int, i: int, o: int, d: int
) -> None:
    arrays, calls = dense_elbo(np.random.default_rng([n, i]), likelihood, n, i, o, d)
    found = []
    for backend, dtype in ((backends.get(name), np.float32), (backends.get("reference"), float)):
        own = [backend.asarray(a.astype(np.float32).astype(dtype)) for a in arrays]
        totals = backend.zeros((3,), np.float64)
        backend.sequence(*calls(own, backend.asarray(new_state()), totals))
        written = [*(own[index] for index in (3, 5, 6, 9)), totals]
        found.append([backend.to_numpy(array) for array in written])
    for actual, expected in zip(*found, strict=True):
        assert relative_error(actual, expected) < TOLERANCE[np.float32]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", KERNEL_BACKENDS)
@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize(
    ("n", "draws", "i", "o"), [(1, 1, 1, 1), (7, 5, 31, 67), (3, 33, 7, 12), (20, 50, 200, 784)]
)
def test_a_fused_bound_is_the_references(
    name: str, importance: bool, n: int, draws: int, i: int, o: int
) -> None:
    rng = np.random.default_rng([n, draws])
    rows = n * draws
    arrays = [
        *(rng.standard_normal((rows, i)), rng.standard_normal((i, o)) / i**0.5, rng.random(o)),
        *(np.full((rows, o), np.nan), rng.random((n, o)), rng.standard_normal(rows)),
        *(np.full(rows, np.nan), np.full(n, np.nan), np.full((rows, o), np.nan)),
        *(np.zeros((n, 0)), np.ones((1, SCHEDULE_COLUMNS)), np.zeros(0)),
    ]
    found = []
    for backend, dtype in ((backends.get(name), np.float32), (backends.get("reference"), float)):
        own = [backend.asarray(a.astype(np.float32).astype(dtype)) for a in arrays]
        x, w, b, y, target, log_ratio, weights, loss, dz, kl, schedule, kl_weight = own
        state, totals = backend.asarray(new_state()), backend.zeros((3,), np.float64)
        scored = (y, target, log_ratio, weights, loss, dz, 1 / n, importance)
        backend.sequence(
            Call("dense_forward", (x, w, b, y, IDENTITY)),
            Call("importance_loss", scored),
            Call("elbo_totals", (loss, kl, schedule, state, 0.0, kl_weight, totals)),
        )
        found.append([backend.to_numpy(a) for a in (y, weights, loss, dz, totals)])
    for actual, expected in zip(*found, strict=True):
        # A weight is the exponential of a difference of sums over all pixels.
        assert relative_error(actual, expected) < 10 * TOLERANCE[np.float32]


def test_a_fused_bound_that_is_not_finite_is_seen() -> None:
    backend = EmulatedBackend()
    x, w, b = np.ones((6, 3)), np.ones((3, 4)), np.zeros(4)
    x[4, 1] = np.nan
    x, w, b = (backend.asarray(a.astype(np.float32)) for a in (x, w, b))
    y, dz, target = (backend.zeros(shape) for shape in ((6, 4), (6, 4), (2, 4)))
    ratio, weights, loss = (backend.zeros((size,)) for size in (6, 6, 2))
    schedule, kl, kl_weight = (backend.zeros(s) for s in ((1, SCHEDULE_COLUMNS), (2, 0), (0,)))
    state, totals = backend.asarray(new_state()), backend.zeros((3,), np.float64)
    backend.sequence(
        Call("dense_forward", (x, w, b, y, IDENTITY)),
        Call("importance_loss", (y, target, ratio, weights, loss, dz, 0.5, True)),
        Call("elbo_totals", (loss, kl, schedule, state, 0.0, kl_weight, totals)),
    )
    assert state[FAILED] == 1
    assert not totals.any()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", KERNEL_BACKENDS)
@pytest.mark.parametrize(("n", "d", "o"), [(1, 1, 1), (33, 5, 67), (128, 20, 400), (129, 65, 7)])
def test_a_fused_latent_backward_is_the_references(name: str, n: int, d: int, o: int) -> None:
    rng = np.random.default_rng([n, d])
    shapes = ((n, o), (d, o), (n, d), (n, d), (n, 2 * d), (d,), (n, 2 * d))
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    found = []
    for backend, dtype in ((backends.get(name), np.float32), (backends.get("reference"), float)):
        dz, w, x, dx, head, weight, dhead = (backend.asarray(a.astype(dtype)) for a in arrays)
        noise, state = Noise(7, LATENT_STREAM), backend.asarray(new_state(step=9))
        backend.sequence(
            Call("dense_input_gradient", (dz, w, x, dx, IDENTITY)),
            Call("latent_backward", (head, dx, weight, dhead, noise, state)),
        )
        found.append(backend.to_numpy(dhead))
    assert relative_error(*found) < TOLERANCE[np.float32]


def test_calls_that_do_not_follow_from_each_other_are_not_fused() -> None:
    backend = EmulatedBackend()
    arrays, calls = dense_elbo(np.random.default_rng(0), "bernoulli", 5, 3, 4, 2)
    own = [backend.asarray(a.astype(np.float32)) for a in arrays]
    other = own[3].copy()
    own[3] = np.zeros_like(own[3])
    forward, loss, totals = calls(own, new_state(), np.zeros(3))
    elsewhere = Call("dense_forward", (*forward.arguments[:3], other, IDENTITY))
    backend.sequence(elsewhere, loss, totals)
    assert np.isfinite(other).all()
    np.testing.assert_allclose(own[6], (0.5 - own[4]) / 5, rtol=1e-6)


# Training


def losses(device: str, name: str, steps: int, **options: Any) -> list[float]:
    model = preset(name).model(**SMALL[name]).to(device)
    trainer = Trainer(model, load("glyphs"), Training(batch_size=32, **options))
    found = []
    for _ in range(steps):
        before = trainer.progress.totals
        trainer.step()
        found.append(trainer.means_since(before, 1)["loss"])
    return found


SMALL: dict[str, dict[str, Any]] = {
    "glyphs": {"hidden": (40,), "latent": 5},
    "mnist-conv": {"latent": 3},
}


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", SMALL)
def test_training_on_the_emulated_device_lands_on_the_cpus_losses(name: str) -> None:
    steps = 6 if name == "glyphs" else 2
    actual, expected = (losses(device, name, steps) for device in ("emulated", "cpu"))
    # Float32 sums in another order: the first losses agree to rounding, later ones drift.
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_a_run_stopped_on_one_device_goes_on_on_another(tmp_path: Path) -> None:
    model = preset("glyphs").model(**SMALL["glyphs"])
    options: dict[str, Any] = {"out": tmp_path, "progress": False}
    half, whole = (Training(steps=steps, batch_size=32, log_every=1) for steps in (3, 6))
    fit(model, "glyphs", half, device="emulated", **options)
    resumed = preset("glyphs").model(**SMALL["glyphs"])
    metrics = fit(resumed, "glyphs", whole, device="cpu", resume=True, **options)
    actual = [line["train"]["loss"] for line in metrics if "epoch" not in line]
    np.testing.assert_allclose(actual, losses("cpu", "glyphs", 6), rtol=1e-5)


def test_a_step_on_a_kernel_backend_allocates_nothing_after_the_first() -> None:
    model = preset("glyphs").model(**SMALL["glyphs"]).to("emulated")
    trainer = Trainer(model, load("glyphs"), Training(batch_size=32))
    trainer.step()
    before = dict(trainer.model.backend._jobs)
    trainer.step()
    assert trainer.model.backend._jobs == before


# Bad arguments


def test_a_strided_array_is_refused() -> None:
    backend = EmulatedBackend()
    x, w, b, y = (np.zeros(s, np.float32) for s in ((4, 6), (3, 2), (2,), (4, 2)))
    with pytest.raises(TypeError, match="dense_forward: x is a strided array"):
        backend.dense_forward(x[:, ::2], w, b, y, IDENTITY)


def test_an_array_of_another_type_is_refused() -> None:
    backend = EmulatedBackend()
    x, w, b, y = (np.zeros(s) for s in ((4, 3), (3, 2), (2,), (4, 2)))
    with pytest.raises(TypeError, match="x is a C-contiguous array of float64"):
        backend.dense_forward(x, w, b, y, IDENTITY)


# Planted bugs


def caught(backend: Shuffled, case: Case, tolerance: float = TOLERANCE[np.float32]) -> bool:
    """Whether the equivalence test fails, under some order of threads."""
    for backend.seed in range(5):
        try:
            check(Runner(backend, np.float32)(case), case, tolerance)
        except (AssertionError, RuntimeError):
            return True
    return False


PLANTED = {
    "a missing barrier": (
        "gemm",
        "    wait_copies<STAGES - 2>();\n    __syncthreads();",
        "    wait_copies<STAGES - 2>();",
        DENSE,
    ),
    "a missing wait for a copy": (
        "gemm",
        "    wait_copies<STAGES - 2>();\n",
        "",
        DENSE,
    ),
    "a wait for too few copies": (
        "gemm",
        "    wait_copies<STAGES - 2>();\n",
        "    wait_copies<STAGES - 1>();\n",
        DENSE,
    ),
    "a wrong epilogue": (
        "gemm",
        "activate(known.value, slope, z.lane[i] + bias.lane[i])",
        "activate(known.value, slope, z.lane[i]) + bias.lane[i]",
        case_of("dense_forward", "129x67x257"),
    ),
    "a tail without a guard": (
        "gemm",
        "count[t] = row[t] < rows ? columns - column[t] : 0;",
        "count[t] = row[t] < rows ? RUN : 0;",
        case_of("dense_forward", "7x13x17"),
    ),
    "a split left out": (
        "gemm",
        "other < count; other += 2",
        "other < count - 2; other += 2",
        DENSE,
    ),
    "a level of the tree left out": (
        "conv",
        "while (MAY_SPLIT && left > 1) {",
        "while (MAY_SPLIT && left == splits) {",
        case_of("conv2d_weight_gradient", "6x28x28"),
    ),
    "runs that lie elsewhere than they are read": (
        "gemm",
        "float* target = slice + Layout::at(run_outer(r), run_depth(r));\n      copy_async_16",
        "float* target = slice + Layout::at(run_outer(r) ^ 8, run_depth(r));\n      copy_async_16",
        case_of("dense_input_gradient", "128x784x400"),
    ),
    "a wrong phase": (
        "conv",
        "first_tap_h = (first_row + s.top) % s.stride_h;",
        "first_tap_h = first_row % s.stride_h;",
        case_of("conv2d_input_gradient", "6x28x28"),
    ),
    "a missing barrier in a sum": (
        "elbo",
        "if (lane == 0) sums[warp] = value;\n  __syncthreads();",
        "if (lane == 0) sums[warp] = value;",
        case_of("bernoulli_loss", "31x784"),
    ),
    "a wrong equation": (
        "latent",
        "z[row * d + j] = mu + expf(0.5f * logvar)",
        "z[row * d + j] = mu + expf(logvar)",
        case_of("latent_forward"),
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug: str) -> None:
    stem, right, wrong, case = PLANTED[bug]
    assert not caught(Shuffled(), case)
    assert caught(Planted(stem, right, wrong), case)


FRAGMENTS = {
    "rows by ldmatrix": (
        "gemm",
        "first + lane() % 16, k + lane() / 16 * 4",
        "first + lane() % 8, k + lane() / 16 * 4",
        case_of("dense_input_gradient", "128x784x400"),
    ),
    "columns by ldmatrix": (
        "gemm",
        "int column = lane() / 16 * 8 + lane() % 8;",
        "int column = lane() % 16;",
        DENSE,
    ),
    "rows by pairs": (
        "weights",
        "values[0] = low.x, values[1] = low.y,",
        "values[0] = low.y, values[1] = low.x,",
        case_of("dense_weight_gradient", "128x784x400"),
    ),
    "columns one by one": (
        "weights",
        "values[2 * j + 1] = source[4 * Layout::PITCH]",
        "values[2 * j + 1] = source[2 * Layout::PITCH]",
        case_of("dense_weight_gradient", "128x784x400"),
    ),
}


@pytest.mark.parametrize("bug", FRAGMENTS)
def test_a_planted_fragment_in_the_wrong_place_is_caught(bug: str) -> None:
    stem, right, wrong, case = FRAGMENTS[bug]
    assert not caught(Shuffled("tf32"), case, 1e-3)
    assert caught(Planted(stem, right, wrong, precision="tf32"), case, 1e-3)


def test_a_bug_that_is_not_planted_is_no_bug_caught() -> None:
    with pytest.raises(NotPlantedError, match="is 0 times in gemm"):
        caught(Planted("gemm", "not in the kernels", ""), DENSE)


def test_threads_that_reach_different_barriers_are_reported() -> None:
    backend = Planted("elbo", "  value = warp_sum(value);\n", "  if (warp == 1) return 0.0f;\n")
    with pytest.raises(RuntimeError, match="bernoulli_loss: threads of a block"):
        Runner(backend, np.float32)(case_of("bernoulli_loss", "31x784"))


# AddressSanitizer, in a process of its own, since its runtime must be loaded before Python's memory


SANITIZED = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_emulated import CASES, Planted, Runner
stem, right, wrong, *primitives = sys.argv[2:]
flags = ("-fsanitize=address", "--param=asan-stack=0")
backend = Planted(stem, right, wrong, *flags)
cases = [case for case in CASES if case.primitive in primitives]
for case in cases:
    Runner(backend, np.float32)(case)
print(len(cases), "clean")
"""


def sanitized(*arguments: str) -> subprocess.CompletedProcess:
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [sys.executable, "-c", SANITIZED, str(Path(__file__).parent), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


STEMS_AND_PRIMITIVES = {
    "gemm": ("dense_forward", "dense_input_gradient"),
    "weights": ("dense_weight_gradient",),
    "conv": tuple({case.primitive for case in CASES if case.primitive.startswith("conv")}),
    "latent": ("latent_forward", "latent_backward"),
    "elbo": ("bernoulli_loss", "squared_error_loss", "elbo_totals"),
    "adam": ("adam_update", "clip_gradient"),
    "batch": ("gather_batch", "advance_state"),
    "elementwise": ("activation_forward", "activation_backward"),
    "objectives": ("calibrate_gaussian", "capacity_totals"),
    "labels": ("gather_labels", "join_forward", "join_input_gradient"),
}


@pytest.mark.toolchain
@pytest.mark.parametrize("stem", STEMS_AND_PRIMITIVES)
def test_no_kernel_touches_memory_that_is_not_its_own(stem: str) -> None:
    anchor = "enum State { STEP"
    done = sanitized(stem, anchor, anchor, *STEMS_AND_PRIMITIVES[stem])
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" clean\n")
    assert not done.stdout.startswith("0 ")


@pytest.mark.toolchain
def test_a_planted_read_past_the_end_is_caught() -> None:
    bounds = "product(o, depths) : o), o < outers};"
    done = sanitized("gemm", bounds, "product(o, depths) : o), true};", "dense_forward")
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer: " in done.stderr
