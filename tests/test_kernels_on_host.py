"""The shipped CUDA C++ kernels, compiled by g++ with kernels/host.h and run on the CPU, against the
float64 mathematics: awkward sizes, random upstream gradients, guard words after every output."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from minivae.kernels import STEMS, source
from minivae.ops import activations, adam, batch, elbo, latent
from minivae.ops.activations import KINDS, Activation
from minivae.ops.philox import Noise
from minivae.ops.state import BETA, FAILED, SCHEDULE_COLUMNS, new_state

HOST = Path(__file__).parent.parent / "kernels" / "host.h"
SIZES = (1, 31, 32, 33, 127)
GUARD = 12345.0
# float32 sums of some hundred terms, against float64, by norm.
TOLERANCE = 2e-6
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(([^)]*)\)')
NOISE = Noise(seed=2**40 + 7, stream=1)
RNG = np.random.default_rng(0)


def wrapped(text: str) -> str:
    """The source with the host header before it, and for each kernel a function `run_NAME` that
    takes grid and block before the kernel's own arguments."""
    parts = [HOST.read_text(), text]
    for name, parameters in KERNEL.findall(text):
        names = ", ".join(p.split()[-1].lstrip("*") for p in parameters.split(","))
        parts.append(
            f'extern "C" bool run_{name}(unsigned int grid, unsigned int block, {parameters}) {{\n'
            f"  return host::run(grid, block, [=] {{ {name}({names}); }});\n}}\n"
        )
    parts.append('extern "C" void shuffle(unsigned int seed) { host::shuffle_seed = seed; }\n')
    return "\n".join(parts)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """Compiles a source for the CPU and loads it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("kernels")

    def compiled(text: str) -> ctypes.CDLL:
        stem = folder / f"kernel{len(list(folder.iterdir()))}"
        stem.with_suffix(".cpp").write_text(wrapped(text))
        flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
        files = ["-o", str(stem.with_suffix(".so")), str(stem.with_suffix(".cpp"))]
        subprocess.run([compiler, *flags, *files], check=True)
        return ctypes.CDLL(str(stem.with_suffix(".so")))

    return compiled


@pytest.fixture(scope="module")
def libraries(build: Callable[[str], ctypes.CDLL]) -> dict[str, ctypes.CDLL]:
    """Every stem, compiled."""
    return {stem: build(source(stem)) for stem in STEMS}


def run(library: ctypes.CDLL, name: str, grid: int, block: int, *arguments: Any) -> None:
    """Runs a kernel; floats go as float32, integers as int, arrays as pointers."""
    passed: list[Any] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            passed.append(ctypes.c_void_p(argument.ctypes.data))
        elif isinstance(argument, float):
            passed.append(ctypes.c_float(argument))
        else:
            passed.append(argument if argument is None else _integer(argument))
    function = getattr(library, f"run_{name}")
    function.restype = ctypes.c_bool
    assert function(grid, block, *passed), f"{name}: threads passed different numbers of barriers"


def _integer(value: Any) -> Any:
    return ctypes.c_ulonglong(value) if value > 2**31 else ctypes.c_int(value)


class Output:
    """An array of NaN with guard words behind it."""

    def __init__(self, *shape: int) -> None:
        size = int(np.prod(shape))
        self.memory = np.full(size + 16, GUARD, np.float32)
        self.array = self.memory[:size].reshape(shape)
        self.array[...] = np.nan

    def close_to(self, expected: NDArray) -> None:
        """Checks the values by norm, and that nothing behind them was written."""
        assert (self.memory[self.array.size :] == GUARD).all()
        error = np.linalg.norm(self.array - expected)
        assert error <= TOLERANCE * np.linalg.norm(expected) + 1e-30


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape, np.float32)


def blocks(threads: int, block: int = 64) -> int:
    return -(-threads // block)


@pytest.mark.parametrize("d", [1, 3, 4, 20, 33])
@pytest.mark.parametrize("n", [1, 5, 33])
def test_the_latent_is_drawn_as_the_reference_draws_it(
    libraries: dict[str, ctypes.CDLL], n: int, d: int
) -> None:
    head, state = normal(n, 2 * d), new_state(step=11)
    z, kl = Output(n, d), Output(n, d)
    run(
        *(libraries["latent"], "latent_forward", blocks(n * -(-d // 4)), 64, head, z.array),
        *(kl.array, NOISE.seed, NOISE.stream, state, n, d),
    )
    expected = np.empty((n, d)), np.empty((n, d))
    latent.latent_forward(head.astype(np.float64), *expected, NOISE, state)
    z.close_to(expected[0])
    kl.close_to(expected[1])


@pytest.mark.parametrize("d", [1, 3, 4, 20, 33])
@pytest.mark.parametrize("n", [1, 5, 33])
def test_the_latents_gradient_is_the_references(
    libraries: dict[str, ctypes.CDLL], n: int, d: int
) -> None:
    head, dz, weight, state = normal(n, 2 * d), normal(n, d), normal(d), new_state(step=11)
    dhead = Output(n, 2 * d)
    run(
        *(libraries["latent"], "latent_backward", blocks(n * -(-d // 4)), 64, head, dz, weight),
        *(dhead.array, NOISE.seed, NOISE.stream, state, n, d),
    )
    expected = np.empty((n, 2 * d))
    arrays = (array.astype(np.float64) for array in (head, dz, weight))
    latent.latent_backward(*arrays, expected, NOISE, state)
    dhead.close_to(expected)


@pytest.mark.parametrize("m", SIZES)
def test_the_bernoulli_loss_is_the_references(libraries: dict[str, ctypes.CDLL], m: int) -> None:
    n = 3
    logits, x = 4 * normal(n, m), RNG.random((n, m), np.float32)
    loss, dlogits = Output(n), Output(n, m)
    run(
        *(libraries["elbo"], "bernoulli_loss", n, 64, logits, x, loss.array, dlogits.array),
        *(1 / n, n, m),
    )
    expected = np.empty(n), np.empty((n, m))
    arrays = (array.astype(np.float64) for array in (logits, x))
    elbo.bernoulli_loss(*arrays, *expected, 1 / n)
    loss.close_to(expected[0])
    dlogits.close_to(expected[1])


@pytest.mark.parametrize("kind", activations.DERIVATIVE_FROM_OUTPUT)
@pytest.mark.parametrize("m", [1, 33, 127])
def test_the_squared_error_is_the_references(
    libraries: dict[str, ctypes.CDLL], m: int, kind: str
) -> None:
    n, activation = 3, Activation(kind, 0.25)
    y, x = 0.9 * np.tanh(normal(n, m)), RNG.random((n, m), np.float32)
    loss, dz = Output(n), Output(n, m)
    run(
        *(libraries["elbo"], "squared_error_loss", n, 64, y, x, loss.array, dz.array, 1 / n),
        *(0.5, KINDS.index(kind), 0.25, n, m),
    )
    expected = np.empty(n), np.empty((n, m))
    arrays = (array.astype(np.float64) for array in (y, x))
    elbo.squared_error_loss(*arrays, *expected, 1 / n, 0.5, activation)
    loss.close_to(expected[0])
    dz.close_to(expected[1])


@pytest.mark.parametrize("free_bits", [0.0, 0.4])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 0), (33, 20), (64, 50)])
def test_the_totals_and_weights_are_the_references(
    libraries: dict[str, ctypes.CDLL], n: int, d: int, free_bits: float
) -> None:
    reconstruction, kl = 100 * RNG.random(n, np.float32), RNG.random((n, d), np.float32)
    schedule, state = np.zeros((1, SCHEDULE_COLUMNS), np.float32), new_state()
    schedule[0, BETA] = 1.5
    weight, totals, expected_totals = Output(d), np.ones(3), np.ones(3)
    run(
        *(libraries["elbo"], "elbo_totals", 1, 512, reconstruction, kl, schedule, state),
        *(free_bits, weight.array, totals, n, d),
    )
    expected = np.empty(d)
    arrays = (array.astype(np.float64) for array in (reconstruction, kl, schedule))
    elbo.elbo_totals(*arrays, state, free_bits, expected, expected_totals)
    weight.close_to(expected)
    np.testing.assert_allclose(totals, expected_totals, rtol=TOLERANCE)


def test_a_loss_that_is_not_finite_is_latched_and_adds_nothing(
    libraries: dict[str, ctypes.CDLL],
) -> None:
    state, totals = new_state(), np.ones(3)
    kl, schedule = np.zeros((2, 1), np.float32), np.ones((1, SCHEDULE_COLUMNS), np.float32)
    losses = np.array([1, np.nan], np.float32)
    weight = np.zeros(1, np.float32)
    run(
        *(libraries["elbo"], "elbo_totals", 1, 512, losses, kl, schedule, state),
        *(0.0, weight, totals, 2, 1),
    )
    assert state[FAILED] == 1
    assert (totals == 1).all()


@pytest.mark.parametrize("failed", [0, 1])
@pytest.mark.parametrize("size", [1, 31, 128, 131])
def test_adam_updates_as_the_reference_unless_the_step_failed(
    libraries: dict[str, ctypes.CDLL], size: int, failed: int
) -> None:
    schedule = np.array([[0.01, 0.3, 0.999, 1]], np.float32)
    state = new_state()
    state[FAILED] = failed
    p, m, v = Output(size), Output(size), Output(size)
    start = normal(size), normal(size), RNG.random(size, np.float32)
    for output, value in zip((p, m, v), start, strict=True):
        output.array[...] = value
    g = normal(size)
    run(
        *(libraries["adam"], "adam_update", 2, 32, p.array, g, m.array, v.array, schedule, state),
        *(0.9, 0.999, 1e-8, size),
    )
    expected = [value.astype(np.float64) for value in start]
    arrays = (expected[0], g.astype(np.float64), expected[1], expected[2])
    adam.adam_update(*arrays, schedule.astype(np.float64), state, 0.9, 0.999, 1e-8)
    for output, value in zip((p, m, v), expected, strict=True):
        output.close_to(value)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("size", [1, 100, 1031])
def test_the_gradient_is_clipped_by_its_global_norm(
    libraries: dict[str, ctypes.CDLL], size: int, max_norm: float
) -> None:
    g, norm, partials = Output(size), Output(1), Output(256)
    g.array[...] = normal(size)
    expected, expected_norm = g.array.astype(np.float64), np.empty(1)
    adam.clip_gradient(expected, max_norm, expected_norm)
    library = libraries["adam"]
    run(library, "clip_gradient_partials", 256, 32, g.array, partials.array, size)
    run(library, "clip_gradient", 2, 64, g.array, max_norm, norm.array, partials.array, size)
    g.close_to(expected)
    norm.close_to(expected_norm)


@pytest.mark.parametrize("binarization", batch.BINARIZATIONS)
@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("m", [1, 31, 33])
def test_a_batch_is_gathered_as_the_reference_gathers_it(
    libraries: dict[str, ctypes.CDLL], m: int, kind: str, binarization: str
) -> None:
    n, images = 5, 12
    data = RNG.integers(0, 256, (images, m)).astype(np.uint8)
    if kind == "float32":
        data = data / np.float32(255)
    order, state = RNG.permutation(images), new_state(first=4, epoch=3)
    x = Output(n, m)
    run(
        *(libraries["batch"], f"gather_batch_{kind}", blocks(n * -(-m // 4)), 64, data, order),
        *(state, x.array, batch.BINARIZATIONS.index(binarization), NOISE.seed, NOISE.stream, n, m),
    )
    expected = np.empty((n, m), np.float32)
    batch.gather_batch(data, order, state, expected, binarization, NOISE)
    x.close_to(expected)


@pytest.mark.parametrize("failed", [0, 1])
def test_the_state_advances_unless_the_step_failed(
    libraries: dict[str, ctypes.CDLL], failed: int
) -> None:
    state = np.array([7, 2, 32, 1, failed])
    run(libraries["batch"], "advance_state", 1, 1, state, 16)
    expected = [7, 2, 32, 1, 1] if failed else [8, 3, 48, 1, 0]
    assert state.tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_an_activation_and_its_derivative_are_the_references(
    libraries: dict[str, ctypes.CDLL], kind: str
) -> None:
    size, activation, code = 133, Activation(kind, 0.25), KINDS.index(kind)
    z, dy, y, dz = 3 * normal(size), normal(size), Output(size), Output(size)
    library = libraries["elementwise"]
    run(library, "activation_forward", 3, 64, z, y.array, code, 0.25, size)
    run(library, "activation_backward", 3, 64, z, y.array, dy, dz.array, code, 0.25, size)
    wide, expected_y, expected_dz = z.astype(np.float64), np.empty(size), np.empty(size)
    activations.activation_forward(wide, expected_y, activation)
    activations.activation_backward(
        wide, expected_y, dy.astype(np.float64), expected_dz, activation
    )
    y.close_to(expected_y)
    dz.close_to(expected_dz)


def losses(library: ctypes.CDLL, seed: int) -> NDArray[np.float32]:
    """Two losses in a row in one launch, which share the block's memory, with threads shuffled."""
    library.shuffle(seed)
    rng = np.random.default_rng(5)
    logits, x = rng.standard_normal((8, 300), np.float32), rng.random((8, 300), np.float32)
    loss, dlogits = np.empty(8, np.float32), np.empty((8, 300), np.float32)
    run(library, "bernoulli_loss", 8, 128, logits, x, loss, dlogits, 1.0, 8, 300)
    library.shuffle(0)
    return loss


def test_the_order_of_threads_between_barriers_changes_no_bit(
    libraries: dict[str, ctypes.CDLL],
) -> None:
    expected = losses(libraries["elbo"], 0)
    for seed in range(1, 6):
        assert losses(libraries["elbo"], seed).tobytes() == expected.tobytes()


def planted(text: str, right: str, wrong: str) -> str:
    assert text.count(right) == 1, right
    return text.replace(right, wrong)


def test_a_planted_missing_barrier_is_caught(
    build: Callable[[str], ctypes.CDLL], libraries: dict[str, ctypes.CDLL]
) -> None:
    right = "if (lane == 0) sums[warp] = value;\n  __syncthreads();"
    library = build(planted(source("elbo"), right, right.replace("\n  __syncthreads();", "")))
    expected = losses(libraries["elbo"], 0)
    assert any(losses(library, seed).tobytes() != expected.tobytes() for seed in range(1, 20))


def test_a_planted_index_past_the_end_is_caught(build: Callable[[str], ctypes.CDLL]) -> None:
    text = planted(source("elementwise"), "if (i < size) y[i]", "if (i <= size) y[i]")
    z, y = normal(40), Output(33)
    run(build(text), "activation_forward", 1, 64, z, y.array, 0, 0.0, 33)
    with pytest.raises(AssertionError):
        y.close_to(z[:33].astype(np.float64))


def test_a_planted_wrong_equation_is_caught(build: Callable[[str], ctypes.CDLL]) -> None:
    text = planted(
        source("latent"),
        "z[row * d + j] = mu + expf(0.5f * logvar)",
        "z[row * d + j] = mu + expf(logvar)",
    )
    library = build(text)
    with pytest.raises(AssertionError):
        test_the_latent_is_drawn_as_the_reference_draws_it({"latent": library}, 5, 20)
