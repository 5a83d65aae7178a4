"""Whole training steps of minivae and its peers: same model, weights, batch, data and optimizer,
taking turns in one process. Losses are compared before the clock starts, PyTorch's by its model
before `torch.compile`, and must be lower after it stops. JAX draws each batch anew, the others go
through a permutation.

On a CPU that process has one OpenMP library, PyTorch's, whose threads wait awake for longer than
those of minivae by itself (`backends/cpu.py`)."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from minivae import backends
from minivae.environment import cores
from minivae.ops.philox import LATENT_STREAM, Noise, standard_normal
from minivae.train import Trainer

from .cases import Case, step_cases
from .measure import (
    LIMIT,
    ROUNDS,
    SECONDS_A_TURN,
    Candidate,
    OwnProcess,
    reason,
    summary,
    take_turns,
    times_as_fast,
)

LOSS_TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2}
QUICK_BATCH = 4
OWN = "minivae"
SEVERAL = 8
"""Steps of minivae that are one launch in `several_steps`."""

SCAN = {"cpu": 8, "cuda": 64}
"""Steps of one call of JAX's scan: on a GPU so many that what a call costs is no part of a step."""

PEERS = (
    *(f"torch {way}" for way in ("eager", "compile", "compile-max-autotune", "compile-graph")),
    *("torch graph", "torch graph-nchw", "jax jit", "jax scan"),
)
"""All that there can be."""

AT_ONCE = {"cuda": 16}
"""Cases that are prepared at the same time, on as many cores: what takes longest is to compile a
GPU's kernels. They are measured one after another. But what cuDNN and XLA choose by
trying, they chose while others were being prepared: a result says how many, `prepared_at_once`."""

SECONDS_OF = {"cuda": 0.05}
"""A turn's, where a step takes a tenth of the time."""

FIRST_STEPS = 3
"""Steps that a peer must take before it is timed; some do what they do once in the second."""


def peers(case: Case, device: str) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """What makes each peer that can run here, by name, and what is missing."""
    found: dict[str, Callable[[], Any]] = {}
    missing = []
    where = "cuda" if device == "cuda" else "cpu"
    try:
        if where == "cuda":
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # of AT_ONCE processes
        import torch

        from .paper_peer import PaperPeer
        from .torch_peer import CAPTURED, COMPILED, TorchPeer, is_convolutional

        torch.compiler.reset()  # of what was compiled for other cases
        by_draws = case.model.objective.by_draws
        maker = PaperPeer if by_draws else TorchPeer
        modes = ["eager", "compile"]
        if where == "cuda" and not by_draws:
            modes += [*COMPILED, *CAPTURED]
        for mode in dict.fromkeys(modes):
            if is_convolutional(case.model) or not mode.endswith("nchw"):
                found[f"torch {mode}"] = lambda mode=mode: maker(case, where, mode)
    except ImportError:
        missing.append("torch")
    try:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of a GPU for all
        import jax

        from .jax_peer import JaxPeer

        jax.config.update("jax_platforms", where)
        found["jax jit"] = lambda: JaxPeer(case)
        found["jax scan"] = lambda: JaxPeer(case, SCAN[where])
    except ImportError:
        missing.append("jax")
    return found, missing


def set_peers_precision(precision: str) -> None:
    """Lets PyTorch and JAX round the operands of matrix products to TF32, or forbids it; and lets
    PyTorch choose its convolutions by trying them, as JAX does."""
    tf32 = precision == "tf32"
    try:
        import torch

        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True
    except ImportError:
        pass
    try:
        import jax

        # JAX's own default on a GPU is TF32; asked for by name, it leaves XLA fewer kernels.
        jax.config.update("jax_default_matmul_precision", "default" if tf32 else "float32")
    except ImportError:
        pass


def _own_loss(case: Case, images: np.ndarray) -> float:
    """The loss of some images, with the noise of the first step."""
    model = case.model
    bound = model.bind(len(images))
    bound.x[...] = model.backend.asarray(images.reshape(bound.x.shape))
    return bound.mean_loss(Noise(0, LATENT_STREAM))


def _peer_loss(name: str, peer: Any, images: np.ndarray, eps: np.ndarray) -> float:
    if name.startswith("torch"):
        import torch

        x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return float(peer.loss(x, torch.from_numpy(eps)))
    return float(peer.loss(images, eps))


def several_steps(case: Case, count: int) -> Callable[[], None]:
    """`count` steps of minivae as one launch, which the engine would have if it were any faster."""
    whole = len(case.splits.train) // (count * case.training.batch_size) * count
    images = whole * case.training.batch_size
    trainer = Trainer(case.model, case.splits, replace(case.training, images=images))

    def steps() -> None:
        for _ in range(count):
            trainer._step(case.training.batch_size)

    launch = case.model.backend.capture(steps)

    def step() -> None:
        launch()
        trainer.finished_steps += count
        if trainer.finished_steps % whole == 0:
            trainer.check_loss()
            trainer._begin_epoch()

    return step


def _label(case: Case, precision: str) -> str:
    return case.name if precision == "fp32" else f"{case.name} {precision}"


def prepare_case(
    case: Case, device: str, precision: str = "fp32", without: Sequence[str] = ()
) -> Callable[[int, float], dict[str, Any]]:
    """What measures a case in so many rounds, in each of which minivae and every peer run for so
    many seconds, and returns milliseconds a step, and why a peer has none. All have been compiled
    by then but the peers `without`.

    Both raise RuntimeError: this if a peer's loss differs, the other if what was timed has not
    lowered a loss.
    """
    set_peers_precision(precision)
    case.model.to(backends.get(device, precision))
    images = case.model.unit_images(case.splits.train.images[: case.training.batch_size])
    shape = (len(images) * case.model.objective.samples, max(case.model.latent, 1))
    eps = standard_normal(shape, Noise(0, LATENT_STREAM), 0, np.float32)
    own = _own_loss(case, images)
    trainer = Trainer(case.model, case.splits, case.training)
    synchronize = case.model.backend.synchronize
    candidates = {OWN: Candidate(trainer.step, synchronize)}
    if device != "cpu":
        name = f"{OWN}, {SEVERAL} steps a launch"
        candidates[name] = Candidate(several_steps(case, SEVERAL), synchronize, SEVERAL)
    builders, missing = peers(case, device)
    failures = dict.fromkeys(missing, "not installed")
    losses: dict[str, Callable[[], float]] = {OWN: lambda: _own_loss(case, images)}
    for name, build in builders.items():
        if name in without:
            failures[name] = "left out"
            continue
        try:
            peer = build()
            loss = _peer_loss(name, peer, images, eps)
            for _ in range(FIRST_STEPS):
                peer.step()
            peer.synchronize()
        except Exception as error:  # a peer that cannot run is named, and the others are timed
            failures[name] = reason(error)
            continue
        if not abs(loss - own) <= LOSS_TOLERANCE[precision] * abs(own):
            raise RuntimeError(f"{case.name}: {name} has loss {loss}, minivae {own}")
        candidates[name] = Candidate(peer.step, peer.synchronize, getattr(peer, "scan", 1))
        losses[name] = partial(_peer_loss, name, peer, images, eps)

    def timed(rounds: int, seconds: float) -> dict[str, Any]:
        times = take_turns(candidates, rounds, seconds)
        for name, now in ((name, loss_now()) for name, loss_now in losses.items()):
            if not now < own:
                raise RuntimeError(
                    f"{case.name}: after its steps {name} has loss {now}, before {own}"
                )
        peer_times = [times[name] for name in times if not name.startswith(OWN)]
        leads = [times_as_fast(times[OWN], other) for other in peer_times]
        return {
            "case": _label(case, precision),
            "loss": float(f"{own:.6g}"),
            "milliseconds": {name: summary(values) for name, values in times.items()},
            "failures": failures,
            "times_as_fast_as_the_fastest_peer": min(leads, default=None),
        }

    return timed


def _prepare_numbered(
    number: int,
    batch: int | None,
    device: str,
    precision: str,
    without: Sequence[str],
    turns: tuple[int, float],
) -> Callable[[], dict[str, Any]]:
    return partial(prepare_case(step_cases(batch)[number], device, precision, without), *turns)


def measure_steps(
    device: str, quick: bool, measured: list[dict[str, Any]], without: Sequence[str] = ()
) -> Iterator[list[dict[str, Any]]]:
    """What is measured so far, after every case of `step_cases` that is not yet among `measured`:
    each in a process of its own, so that the threads of one case's peers do not disturb the next;
    on a GPU in float32 and in TF32; with `quick` at a tiny batch, a few short turns each; `without`
    some peers. A case that fails has a `failure` and no times, and is measured again by the next
    call."""
    turns = (3, 0.02) if quick else (ROUNDS, SECONDS_OF.get(device, SECONDS_A_TURN))
    batch = QUICK_BATCH if quick else None
    measured = [case for case in measured if "failure" not in case]
    known = {case["case"] for case in measured}
    work = {
        _label(case, precision): (number, batch, device, precision, without, turns)
        for number, case in enumerate(step_cases(batch))
        for precision in (("fp32",) if device == "cpu" else backends.PRECISIONS)
        if _label(case, precision) not in known
    }
    at_once = min(AT_ONCE.get(device, 1), cores() or 1)
    for first in range(0, len(work), at_once):
        labels = list(work)[first : first + at_once]
        for found in _measured_in_turn({label: work[label] for label in labels}):
            measured = [*measured, found]
            yield measured


def _measured_in_turn(work: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """The results of cases that were prepared at the same time."""
    end = time.monotonic() + LIMIT
    processes = {label: OwnProcess(_prepare_numbered, *case) for label, case in work.items()}
    failures: dict[str, Exception] = {}
    try:
        for label, process in processes.items():
            try:
                process.wait_until_prepared(end - time.monotonic())
            except Exception as error:  # the other cases are measured all the same
                failures[label] = error
                process.end()
        for label, process in processes.items():
            try:
                if label in failures:
                    raise failures[label]
                found = process.result(LIMIT) | {"prepared_at_once": len(work)}
            except Exception as error:
                found = {"case": label, "failure": reason(error)}
            yield found
            process.end()
    finally:
        for process in processes.values():
            process.end()
