"""Whole training steps of minivae and its peers: same model, weights, batch, data and optimizer,
taking turns. Losses are compared before the clock starts, PyTorch's by its model before
`torch.compile`, and must be lower after it stops. JAX draws each batch anew, the others go through
a permutation.

minivae has a process of its own, as at its users': beside PyTorch it would have PyTorch's OpenMP
library, whose threads wait awake for longer (`backends/cpu.py`)."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from minivae import backends
from minivae.environment import cores
from minivae.ops.philox import LATENT_STREAM, Noise, standard_normal
from minivae.train import Trainer

from .cases import Case, step_cases
from .cores import round_trip
from .measure import (
    LIMIT,
    ROUNDS,
    SECONDS_A_TURN,
    Candidate,
    OwnProcess,
    Turns,
    collected,
    reason,
    summary,
    times_as_fast,
)

LOSS_TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2}
QUICK_BATCH = 4
OWN = "minivae"
ROUND_TRIP = "a cache line between two cores"
SCAN = {"cpu": 8, "cuda": 64}
"""Steps of one call of JAX's scan: on a GPU so many that what a call costs is no part of a step."""

PEERS = (
    *("torch eager", "torch eager-nchw", "torch compile", "torch compile-max-autotune"),
    *("torch compile-graph", "torch graph", "torch graph-nchw", "jax jit", "jax scan"),
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

Ask = Callable[[str], Any]
"""A side of a case, or how to ask one in another process."""


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
        modes = ["eager", "compile"] if by_draws else ["eager", "eager-nchw", "compile"]
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
    model_pass = model.bind(len(images))
    model_pass.x[...] = model.backend.asarray(images.reshape(model_pass.x.shape))
    return model_pass.mean_loss(Noise(0, LATENT_STREAM))


def _peer_loss(name: str, peer: Any, images: np.ndarray, eps: np.ndarray) -> float:
    if name.startswith("torch"):
        import torch

        x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return float(peer.loss(x, torch.from_numpy(eps)))
    return float(peer.loss(images, eps))


def _label(case: Case, precision: str) -> str:
    return case.name if precision == "fp32" else f"{case.name} {precision}"


class Side:
    """What one process runs of a case: candidates that take turns of `seconds`; `losses`, each
    before all steps and as a function for afterwards; and why it has no others, `failures`."""

    def __init__(
        self,
        candidates: dict[str, Candidate],
        losses: dict[str, tuple[float, Callable[[], float]]],
        failures: dict[str, str],
        seconds: float,
    ) -> None:
        self._turns = Turns(candidates, seconds)
        self._losses, self._failures = losses, failures

    def begin(self) -> tuple[dict[str, float], dict[str, str]]:
        """The losses before the first turn, and the failures."""
        return {name: before for name, (before, _) in self._losses.items()}, self._failures

    def turn(self) -> dict[str, float]:
        """Milliseconds a step of each candidate, in another turn of it."""
        return self._turns.take()

    def end(self) -> None:
        """Raises RuntimeError if a loss is no lower than it was."""
        for name, (before, loss_now) in self._losses.items():
            now = loss_now()
            if not now < before:
                raise RuntimeError(f"after its steps {name} has loss {now}, before {before}")

    def __call__(self, task: str) -> Any:
        return {"begin": self.begin, "turn": self.turn, "end": self.end}[task]()


def _first_batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Images and noise of which all compare the loss."""
    images = case.model.unit_images(case.splits.train.images[: case.training.batch_size])
    shape = (len(images) * case.model.objective.samples, max(case.model.latent, 1))
    return images, standard_normal(shape, Noise(0, LATENT_STREAM), 0, np.float32)


def own_side(case: Case, device: str, precision: str, seconds: float) -> Side:
    """minivae's side of a case."""
    case.model.to(backends.get(device, precision))
    images, _ = _first_batch(case)
    synchronize = case.model.backend.synchronize
    loss_now = partial(_own_loss, case, images)
    losses = {OWN: (loss_now(), loss_now)}
    trainer = Trainer(case.model, case.splits, case.training)
    candidates = {OWN: Candidate(trainer.step, synchronize)}
    trip = round_trip()
    if device == "cpu" and trip is not None:
        candidates[ROUND_TRIP] = trip
    return Side(candidates, losses, {}, seconds)


def peers_side(
    case: Case, device: str, precision: str, without: Sequence[str], seconds: float
) -> Side:
    """The peers' side of a case, all of them compiled but those `without`."""
    set_peers_precision(precision)
    case.model.to("reference")
    images, eps = _first_batch(case)
    builders, missing = peers(case, device)
    failures = dict.fromkeys(missing, "not installed")
    candidates: dict[str, Candidate] = {}
    losses: dict[str, tuple[float, Callable[[], float]]] = {}
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
        candidates[name] = Candidate(peer.step, peer.synchronize, getattr(peer, "scan", 1))
        losses[name] = loss, partial(_peer_loss, name, peer, images, eps)
    return Side(candidates, losses, failures, seconds)


def measure_case(
    label: str, own: Ask, peers: Ask, rounds: int, precision: str = "fp32"
) -> dict[str, Any]:
    """Milliseconds a step over so many rounds, in each of which minivae and every peer have a turn,
    why a peer has none, and how far apart the cores were. Raises RuntimeError if a peer's loss
    differs from minivae's, or if what was timed has not lowered its loss."""
    (losses, _), (others, failures) = own("begin"), peers("begin")
    loss = losses[OWN]
    for name, other in others.items():
        if not abs(other - loss) <= LOSS_TOLERANCE[precision] * abs(loss):
            raise RuntimeError(f"{name} has loss {other}, minivae {loss}")
    times = collected({**own("turn"), **peers("turn")} for _ in range(rounds))
    for side in (own, peers):
        side("end")
    leads = [times_as_fast(times[OWN], times[name]) for name in others]
    trips = [1e6 * milliseconds for milliseconds in times.pop(ROUND_TRIP, [])]
    return {
        "case": label,
        "loss": float(f"{loss:.6g}"),
        **({"core_round_trip_nanoseconds": summary(trips)} if trips else {}),
        "milliseconds": {name: summary(values) for name, values in times.items()},
        "failures": failures,
        "times_as_fast_as_the_fastest_peer": min(leads, default=None),
    }


def _own_side(number: int, batch: int | None, *options: Any) -> Side:
    return own_side(step_cases(batch)[number], *options)


def _peers_side(number: int, batch: int | None, *options: Any) -> Side:
    return peers_side(step_cases(batch)[number], *options)


def measure_steps(
    device: str, quick: bool, measured: list[dict[str, Any]], without: Sequence[str] = ()
) -> Iterator[list[dict[str, Any]]]:
    """What is measured so far, after every case of `step_cases` that is not yet among `measured`:
    in two processes of its own, so that the threads of one case's peers do not disturb the next;
    on a GPU in float32 and in TF32; with `quick` at a tiny batch, a few short turns each; `without`
    some peers. A case that fails has a `failure` and no times, and is measured again by the next
    call."""
    rounds, seconds = (3, 0.02) if quick else (ROUNDS, SECONDS_OF.get(device, SECONDS_A_TURN))
    batch = QUICK_BATCH if quick else None
    measured = [case for case in measured if "failure" not in case]
    known = {case["case"] for case in measured}
    work = {
        _label(case, precision): (number, precision)
        for number, case in enumerate(step_cases(batch))
        for precision in (("fp32",) if device == "cpu" else backends.PRECISIONS)
        if _label(case, precision) not in known
    }
    at_once = min(AT_ONCE.get(device, 1), cores() or 1)
    for first in range(0, len(work), at_once):
        pairs = {}
        for label in [*work][first : first + at_once]:
            number, precision = work[label]
            case = number, batch, device, precision
            pairs[label] = _Pair(label, case, without, rounds, seconds)
        for found in _measured_in_turn(pairs):
            measured = [*measured, found]
            yield measured


class _Pair:
    """The two processes of a case."""

    def __init__(
        self,
        label: str,
        case: tuple[int, int | None, str, str],
        without: Sequence[str],
        rounds: int,
        seconds: float,
    ) -> None:
        self.label, self.rounds, self.precision = label, rounds, case[-1]
        self.processes = (
            OwnProcess(_own_side, *case, seconds),
            OwnProcess(_peers_side, *case, without, seconds),
        )

    def wait_until_prepared(self, limit: float) -> None:
        """As of each process."""
        end = time.monotonic() + limit
        for process in self.processes:
            process.wait_until_prepared(end - time.monotonic())

    def result(self) -> dict[str, Any]:
        """What `measure_case` finds."""
        own, peers = (partial(process.ask, LIMIT) for process in self.processes)
        return measure_case(self.label, own, peers, self.rounds, self.precision)

    def end(self) -> None:
        """Ends both processes."""
        for process in self.processes:
            process.end()


def _measured_in_turn(pairs: dict[str, _Pair]) -> Iterator[dict[str, Any]]:
    """The results of cases that were prepared at the same time."""
    end = time.monotonic() + LIMIT
    failures: dict[str, Exception] = {}
    try:
        for label, pair in pairs.items():
            try:
                pair.wait_until_prepared(end - time.monotonic())
            except Exception as error:  # the other cases are measured all the same
                failures[label] = error
                pair.end()
        for label, pair in pairs.items():
            try:
                if label in failures:
                    raise failures[label]
                found = pair.result() | {"prepared_at_once": len(pairs)}
            except Exception as error:
                found = {"case": label, "failure": reason(error)}
            yield found
            pair.end()
    finally:
        for pair in pairs.values():
            pair.end()
