"""The training loop: epochs of steps, metrics, checkpoints, exact resume.

A run is a function of its configuration. Permutations depend on (seed, epoch) and noise on (seed,
step), so a checkpoint needs no generator's state, and a resumed run is the uninterrupted one.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .backends.reference import ReferenceBackend
from .checkpoint import (
    BEST,
    CHECKPOINT,
    CONFIG,
    METRICS,
    NOT_STARTED,
    Progress,
    best_epoch,
    read_checkpoint,
    read_config,
    read_metrics,
    read_training,
    write_checkpoint,
    write_config,
)
from .data import Dataset, Splits, lasting_name, load
from .data.batching import epoch_permutation
from .data.dataset import VALIDATION_STREAM
from .errors import InputError, check_is
from .evaluate import active_units
from .files import exists, held, replacing
from .model_pass import ModelPass
from .models import VAE, Autoencoder
from .ops.latent import kl_to_prior
from .ops.philox import BINARIZATION_STREAM, LATENT_STREAM, STREAMS, Noise
from .ops.state import BETA, CAPACITY, FAILED, INDEX, SCHEDULE_COLUMNS, STEP, new_state
from .presets import Training

DEFAULT_TRAINING = Training()
CALIBRATION_IMAGES = 10_000
"""How many training images calibrate a Gaussian's sigma, at each test and checkpoint."""
MAY_CHANGE = ("epochs", "steps", "patience", "picture_every", "checkpoint_every")
"""The settings in which a resumed run may differ from what it was."""
REMEDY = "try a smaller learning rate, or --clip-norm"


class NotFiniteError(Exception):
    """The loss, a parameter or sigma became NaN or infinite. The message names the step, where to
    look and a remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; {REMEDY}")


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal, after a checkpoint was written to `folder`, if given."""

    def __init__(self, number: int, step: int, folder: Path | None) -> None:
        self.number, self.step = number, step
        hint = "" if folder is None else f"; go on with --resume {folder}"
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}{hint}")


class Trainer:
    """Trains a model on the training split of some data, one call of `step` at a time.

    Everything that a step reads or writes is on the model's backend: data, permutation, schedule,
    state, running sums. `splits` are as `Splits.checked` leaves them. Raises InputError if the data
    does not fit the model or the batch.
    """

    def __init__(
        self,
        model: Autoencoder,
        splits: Splits,
        training: Training,
        progress: Progress = NOT_STARTED,
    ) -> None:
        self.model, self.training = model, training
        self.splits = splits
        for split in (splits.train, splits.test):
            if split.image_shape != model.image_shape:
                raise InputError(
                    f"{splits.name}: images are {split.image_shape}, the model takes "
                    f"{model.image_shape}"
                )
        train, self.validation = self._held_out(splits.train)
        self.train = train
        self.images = len(train)
        if training.batch_size > self.images:
            raise InputError(
                f"batch_size is {training.batch_size}, expected at most the {self.images} training "
                f"images of {splits.name} (--batch-size)"
            )
        labels = self._checked_labels("training", train)
        self._checked_labels("test", splits.test)
        whole, rest = divmod(self.images, training.batch_size)
        self.steps_per_epoch = whole + (1 if rest and training.keep_last else 0)
        self.total_steps = training.steps or training.epochs * self.steps_per_epoch
        self.binarization_noise = Noise(training.seed, BINARIZATION_STREAM)
        backend = model.backend
        self.data = backend.asarray(train.images.reshape(self.images, -1))
        self.labels = None if labels is None else backend.asarray(labels)
        self.gradient_norm = backend.zeros((1,), model.dtype)
        self.totals = backend.asarray(progress.totals)
        self.epoch_totals, self.logged_totals = progress.epoch_totals, progress.logged_totals
        self.finished_steps = progress.step
        # Filled anew each epoch but never moved, so that a captured step finds them.
        self.schedule = backend.zeros((self.steps_per_epoch, SCHEDULE_COLUMNS), model.dtype)
        self.state = backend.asarray(new_state())
        self.permutation = backend.zeros((self.images,), np.int64)
        self._parameters = model.parameters
        self._calibrated_at = -1
        self._captured: dict[int, Callable[[], None]] = {}
        # Bound here, so that a lack of memory is reported before a run begins; kept, since a
        # captured step still uses this memory if the model has allocated other memory since.
        self._passes = {
            rows: model.bind(rows // training.accumulate)
            for rows in (self._rows(0), self._rows(self.steps_per_epoch - 1))
        }
        self._begin_epoch()

    def _held_out(self, train: Dataset) -> tuple[Dataset, Dataset | None]:
        """What to train on, and the validation images if they are asked for."""
        training, held_out = self.training, self.training.validation
        available = len(train) - held_out
        if available < 1:
            raise InputError(
                f"validation is {held_out}, expected below the {len(train)} training images of "
                f"{self.splits.name}"
            )
        if training.images > available:
            raise InputError(
                f"images is {training.images}, expected at most the {available} of "
                f"{self.splits.name} that are there to train on (0: all)"
            )
        validation = None
        if held_out:
            train, validation = train.held_out(held_out, training.seed, VALIDATION_STREAM)
        return train.take(slice(training.images or available)), validation

    def _checked_labels(self, split: str, data: Dataset) -> NDArray[np.int64] | None:
        try:
            return self.model.checked_labels(data.labels, len(data))
        except InputError as error:
            raise InputError(f"{self.splits.name}, {split} labels: {error}") from None

    def begin(self) -> None:
        """Sets the initial moments and output bias of a new run; a resumed one has them from its
        checkpoint. Raises InputError if the decoder has no such bias to set."""
        model, training = self.model, self.training
        parameters, backend = model.parameters, model.backend
        backend.assign(parameters.flat["first_moments"], 0)
        for moment in parameters.second_moments.values():
            backend.assign(moment, training.optimizer.second_moment)
        if training.output_bias:
            images = model.unit_images(self.train.images)
            model.set_output_bias(np.asarray(np.mean(images, axis=0, dtype=np.float64)))

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.finished_steps // self.steps_per_epoch

    @property
    def progress(self) -> Progress:
        """Where the run stands, for a checkpoint."""
        totals = self.model.backend.to_numpy(self.totals)
        return Progress(self.finished_steps, totals, self.epoch_totals, self.logged_totals)

    def _begin_epoch(self) -> None:
        """Fills schedule, state and permutation. Raises NotFiniteError, with those of the last
        epoch in place, if the loss of one of its steps was not finite."""
        position = self.finished_steps % self.steps_per_epoch
        first_step = self.finished_steps - position
        objective, backend = self.model.objective, self.model.backend
        steps = self.steps_per_epoch
        rows = self.training.optimizer.schedule_rows(first_step, steps, self.total_steps)
        for row, step in zip(rows, range(first_step, first_step + steps), strict=True):
            row[BETA], row[CAPACITY] = objective.beta_at(step), objective.capacity_at(step)
        state = new_state(self.finished_steps, position * self.training.batch_size, self.epoch)
        state[INDEX] = position
        order = np.arange(self.images)
        if self.training.shuffle:
            order = epoch_permutation(self.images, self.training.seed, self.epoch)
        # This waits for a GPU, which worked on while the host computed these.
        self.check_loss()
        backend.assign(self.schedule, rows.astype(self.model.dtype))
        backend.assign(self.state, state)
        backend.assign(self.permutation, order)

    def step(self) -> None:
        """One optimizer step; at the end of an epoch, on to the next. Raises NotFiniteError there
        if the loss of a step was not finite, and InputError if the model has gone to another device
        since the trainer was made."""
        if self.model.parameters is not self._parameters:
            raise InputError("the model was put on a device after its trainer was made")
        rows = self._rows(self.finished_steps)
        if rows not in self._captured:
            self._captured[rows] = self.model.backend.capture(partial(self._step, rows))
        self._captured[rows]()
        self.finished_steps += 1
        if self.finished_steps % self.steps_per_epoch == 0:
            self._begin_epoch()

    def _rows(self, step: int) -> int:
        """Images in the batch of a step, counted from 0."""
        before = step % self.steps_per_epoch * self.training.batch_size
        return min(self.training.batch_size, self.images - before)

    def _noise(self, part: int) -> Noise:
        """The latent noise of a part of a batch, whose rows count from 0 again."""
        return Noise(self.training.seed, LATENT_STREAM + part * STREAMS)

    def _run_part(self, rows: int, part: int) -> ModelPass:
        """A part of a batch of `rows` images, from its pixels to the gradient at every layer."""
        model_pass = self._passes[rows]
        backend, noise = self.model.backend, self._noise(part)
        permutation = self.permutation[part * model_pass.rows :]
        binarization = self.training.binarization, self.binarization_noise
        backend.gather_batch(self.data, permutation, self.state, model_pass.x, *binarization)
        if self.labels is not None:
            backend.gather_labels(self.labels, permutation, self.state, model_pass.onehot)
        backend.sequence(
            *model_pass.forward_calls(noise, self.schedule, self.state, self.totals),
            *model_pass.input_gradient_calls(noise, self.state),
        )
        return model_pass

    def _step(self, rows: int) -> None:
        backend, optimizer = self.model.backend, self.training.optimizer
        flat = self.model.parameters.flat
        gradients, values = flat["gradients"], flat["values"]
        moments = flat["first_moments"], flat["second_moments"]
        batch_size, parts = self.training.batch_size, self.training.accumulate
        constants = optimizer.beta1, optimizer.beta2, optimizer.epsilon
        adam = (*moments, self.schedule, self.state, *constants)
        if parts == 1 and not optimizer.clip_norm:
            calls = self._run_part(rows, 0).weight_gradient_calls
            backend.optimizer_step(calls, values, gradients, *adam, batch_size)
            return
        for part in range(parts):
            calls = self._run_part(rows, part).weight_gradient_calls
            backend.weight_gradients(calls, gradients, 1 / parts, part > 0)
        if optimizer.clip_norm:
            backend.clip_gradient(gradients, optimizer.clip_norm, self.gradient_norm)
        backend.adam_update(values, gradients, *adam)
        backend.advance_state(self.state, batch_size)

    def check_loss(self) -> None:
        """Raises NotFiniteError if a step since the last check had a loss that was not finite."""
        state = self.model.backend.to_numpy(self.state)
        if not state[FAILED]:
            return
        # The latch kept parameters and state at the failed step, so the same batch comes again.
        failed = int(state[STEP])
        rows = self._rows(failed)
        for part in range(self.training.accumulate):
            for name, tensor in self._run_part(rows, part).named_tensors():
                if not np.isfinite(self.model.backend.to_numpy(tensor)).all():
                    raise NotFiniteError(f"the loss is not finite at step {failed + 1}: see {name}")
        raise NotFiniteError(f"the loss is not finite at step {failed + 1}: see the KL term")

    def check_model(self) -> None:
        """Calibrates sigma to the parameters, once a step where the likelihood needs it. Raises
        NotFiniteError if a parameter, since an update can overflow where the loss did not, or sigma
        is not finite; InputError if no sigma is most likely."""
        model, training = self.model, self.training
        for name, value in model.parameters.values.items():
            if not np.isfinite(model.backend.to_numpy(value)).all():
                raise NotFiniteError(f"{name} is not finite after step {self.finished_steps}")
        if model.objective.calibrated and self._calibrated_at != self.finished_steps:
            some = self.train.sample(CALIBRATION_IMAGES)
            options: Any = {"seed": training.seed, "binarization": training.binarization}
            if not math.isfinite(model.calibrate(some.images, some.labels, **options)):
                raise NotFiniteError(f"sigma is not finite after step {self.finished_steps}")
            self._calibrated_at = self.finished_steps

    def means_since(self, totals: NDArray, steps: int) -> dict[str, float]:
        """Means of loss, reconstruction and KL over the last `steps` steps, since `totals`."""
        now = self.model.backend.to_numpy(self.totals)
        first = self.finished_steps - steps
        images = sum(self._rows(step) for step in range(first, self.finished_steps))
        return self.model.means(now - totals, images)

    def held_out_metrics(self) -> dict[str, Any]:
        """Loss, reconstruction and KL of the test split and of any validation images; and of a VAE,
        on DESCRIBED validation images, or test images if there are none, the active units and the
        mean KL(q(z|x) || p(z)) in nats. Calls `check_model` first."""
        training, model = self.training, self.model
        self.check_model()
        options: Any = {"seed": training.seed, "binarization": training.binarization}
        splits = {"test": self.splits.test}
        if self.validation is not None:
            splits["validation"] = self.validation
        found: dict[str, Any] = {
            name: model.evaluate(split.images, split.labels, **options)
            for name, split in splits.items()
        }
        if isinstance(model, VAE):
            some = (self.validation or self.splits.test).sample(DESCRIBED)
            some = some.binarized(training.binarization, training.seed)
            mu, logvar = model.encode(some.images, some.labels)
            found["active_units"] = active_units(mu)
            found["posterior_kl"] = float(np.mean(np.sum(kl_to_prior(mu, logvar), axis=1)))
        return found


class _Run:
    """A trainer with its folder: what is written, and when."""

    def __init__(
        self, trainer: Trainer, folder: Path | None, metrics: list[dict[str, Any]]
    ) -> None:
        self.trainer, self.folder, self.metrics = trainer, folder, metrics
        before = metrics[-1]["seconds"] if metrics else 0.0
        self.started = time.perf_counter() - before

    def record(self, line: dict[str, Any]) -> dict[str, Any]:
        """Adds a line to the metrics."""
        line["seconds"] = round(time.perf_counter() - self.started, 3)
        self.metrics.append(line)
        if self.folder is not None:
            try:
                with open(self.folder / METRICS, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise InputError(
                    f"cannot write {self.folder / METRICS}: {error.strerror}"
                ) from error
        return line

    def log_steps(self) -> None:
        """A line with the means since the last such line."""
        trainer = self.trainer
        steps = trainer.training.log_every
        train = trainer.means_since(trainer.logged_totals, steps)
        self.record({"step": trainer.finished_steps, "train": train})
        trainer.logged_totals = trainer.progress.totals

    def log_epoch(self, epoch: int, steps: int) -> dict[str, Any]:
        """A line with the means of the epoch's `steps` and of the images held out; keeps the
        checkpoint if it is the best."""
        trainer = self.trainer
        line = {
            "epoch": epoch,
            "step": trainer.finished_steps,
            "train": trainer.means_since(trainer.epoch_totals, steps),
            **trainer.held_out_metrics(),
        }
        if trainer.training.optimizer.clip_norm:
            # Of the epoch's last step, before clipping.
            norm = trainer.model.backend.to_numpy(trainer.gradient_norm)
            line["gradient_norm"] = float(norm[0])
        warning = symptom(line, trainer.model)
        if warning and not any(record.get("warning") == warning for record in self.metrics):
            line["warning"] = warning
        if trainer.finished_steps % trainer.steps_per_epoch == 0:
            trainer.epoch_totals = trainer.progress.totals
        self.record(line)
        if self.folder is not None and best_epoch(self.metrics) is line:
            write_checkpoint(self.folder, trainer.model, trainer.progress, BEST)
        return line

    def checkpoint(self) -> None:
        """Saves the run, if it has a folder."""
        if self.folder is not None:
            self.trainer.check_model()
            write_checkpoint(self.folder, self.trainer.model, self.trainer.progress)

    def out_of_patience(self) -> bool:
        """Whether the best validation loss is at least `patience` epochs old."""
        patience, best = self.trainer.training.patience, best_epoch(self.metrics)
        return bool(patience and best) and self.trainer.epoch - best["epoch"] >= patience


DESCRIBED = 1000
"""How many images' posteriors an epoch's metrics describe."""

EARLY_STEPS = 200
"""Steps before which inactive latent dimensions are no warning sign."""

FEWEST_ACTIVE = 0.05
"""The share of active dimensions below which the posterior has collapsed."""

MOST_NATS = 10.0
"""The mean KL of a dimension above which it has exploded: e^10, some 22,000 values told apart in
each, is more than a set of images can need."""


def symptom(line: dict[str, Any], model: Autoencoder) -> str:
    """What an epoch's metrics say is wrong with the posterior, and what to try; empty if nothing
    is."""
    if not model.latent:
        return ""
    if not math.isfinite(line["test"]["loss"]):
        return f"the loss of the test images is not finite; {REMEDY}"
    nats = line["posterior_kl"] / model.latent
    if nats > MOST_NATS:
        return f"the KL explodes: over {MOST_NATS:g} nats in each latent dimension; {REMEDY}"
    objective, active = model.objective, line["active_units"]
    if (
        line["epoch"] >= 2
        and line["step"] >= max(EARLY_STEPS, objective.capacity_steps)
        and active is not None
        and active < FEWEST_ACTIVE * model.latent
    ):
        remedy = "--beta-warmup, --free-bits or a smaller --beta"
        if objective.by_draws:
            remedy = "a smaller learning rate"
        elif objective.capacity:
            remedy = "a larger --capacity"
        return (
            f"the posterior collapses: fewer than {FEWEST_ACTIVE:.0%} of the latent dimensions are "
            f"active; try {remedy}"
        )
    return ""


def fit(
    model: Autoencoder,
    data: Splits | str | Path,
    training: Training = DEFAULT_TRAINING,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    best: bool = False,
    device: str | ReferenceBackend | None = None,
    progress: bool = True,
    on_step: Callable[[int, Autoencoder], None] | None = None,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
    extra_config: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Trains `model` and returns its metrics, a record an epoch (and every `log_every` steps).

    Args:
        data: the splits, or a name or path that `minivae.data.load` takes.
        out: the run folder for configuration, metrics and checkpoints; none by default.
        resume: go on from the last checkpoint in `out`. `training` replaces the run's, and may
            differ from it only in the settings of MAY_CHANGE.
        best: with `resume`, go on from the best checkpoint instead.
        device: a name for `minivae.backends.get`, or a backend; by default where the model is, or
            the best that works.
        progress: show a progress bar.
        on_step: called with (step, model) every `training.picture_every` steps.
        on_metrics: called with each metrics record.
        extra_config: what else to keep in the run's configuration.

    Raises InputError on data or options that do not fit, if `out` has a run and `resume` is off, or
    a run on other data and `resume` is on; NotFiniteError when the loss, a parameter or sigma is no
    longer finite; Interrupted on SIGINT or SIGTERM, after saving to `out` if that is given.
    """
    check_is("model", model, Autoencoder)
    hint = "; of arrays minivae.data makes Splits(name, Dataset.of(train), Dataset.of(test))"
    check_is("data", data, Splits, str, Path, hint=hint)
    check_is("training", training, Training)
    check_is("out", out, str, Path, NoneType)
    if (resume and out is None) or (best and not resume):
        raise InputError("resume needs the run folder as out, and best needs resume")
    folder = None if out is None else Path(out)
    if folder is not None and not resume:
        _check_no_run(folder)
    source = {} if isinstance(data, Splits) else {"source": lasting_name(data)}
    splits = (data if isinstance(data, Splits) else load(data, seed=training.seed)).checked()
    extra = source | (extra_config or {})
    if device is not None:
        model.to(device, model.dtype)
    with ExitStack() as stack:
        if folder is not None and resume:
            read_config(folder)
            stack.enter_context(held(folder))
            run = _resumed_run(model, splits, training, folder, best, extra)
        else:
            # First: too little memory is told before there is a folder.
            trainer = Trainer(model, splits, training)
            trainer.begin()
            if folder is not None:
                stack.enter_context(_held_for_new_run(folder))
            run = _new_run(trainer, folder, extra)
        # A loss that is no longer finite is reported once, by the latch, not at each operation.
        pending = stack.enter_context(_pending_signal())
        stack.enter_context(np.errstate(all="ignore"))
        _loop(run, pending, progress, on_step, on_metrics or (lambda line: None))
    return run.metrics


def _check_no_run(folder: Path) -> None:
    if not exists(folder / CONFIG):
        return
    if "training" not in read_config(folder):
        raise InputError(f"{folder} holds a saved model: name another folder")
    raise InputError(
        f"{folder} already holds a run: go on with it (minivae train --resume {folder}, or "
        "resume=True), or name another folder"
    )


@contextmanager
def _held_for_new_run(folder: Path) -> Iterator[None]:
    """Makes and holds a folder. InputError if it has a run, also one that began meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}") from None
    with held(folder):
        _check_no_run(folder)
        yield


def _new_run(trainer: Trainer, folder: Path | None, extra_config: dict[str, Any]) -> _Run:
    run = _Run(trainer, folder, [])
    if folder is not None:
        config = {
            **extra_config,
            "version": __version__,
            "data": trainer.splits.name,
            "class_names": list(trainer.splits.class_names),
            "fingerprint": trainer.splits.fingerprint(),
            "model": trainer.model.config(),
            "training": dataclasses.asdict(trainer.training),
        }
        # The configuration last: a folder that has one can be resumed.
        run.checkpoint()
        (folder / BEST).unlink(missing_ok=True)
        (folder / METRICS).write_text("")
        write_config(folder, config)
    return run


def _resumed_run(
    model: Autoencoder,
    splits: Splits,
    training: Training,
    folder: Path,
    best: bool,
    extra_config: dict[str, Any],
) -> _Run:
    config = read_config(folder)
    _check_same_training(folder, training, read_training(folder))
    check_same_data(folder, splits)
    done = read_checkpoint(folder, model, BEST if best else CHECKPOINT)
    trainer = Trainer(model, splits, training, done)
    if trainer.total_steps < done.step:
        raise InputError(
            f"{folder} is at step {done.step}, expected to end no earlier than that, not at step "
            f"{trainer.total_steps}"
        )
    if best:
        write_checkpoint(folder, model, done)
    run = _Run(trainer, folder, _cut_metrics(folder / METRICS, trainer))
    write_config(folder, config | extra_config | {"training": dataclasses.asdict(training)})
    return run


def _check_same_training(folder: Path, training: Training, begun: Training) -> None:
    now, before = dataclasses.asdict(training), dataclasses.asdict(begun)
    for settings in (now, before):
        settings |= settings.pop("optimizer")
    for name, value in now.items():
        if value != before[name] and name not in MAY_CHANGE:
            raise InputError(f"{folder}: {name} is {value}, the run has {before[name]}")


def check_same_data(folder: Path, splits: Splits, hint: str = "") -> None:
    """Raises InputError, whose end is `hint`, if a run began with other images or labels."""
    config = read_config(folder)
    # Earlier versions kept no fingerprint.
    if config.get("fingerprint", "") not in ("", splits.fingerprint()):
        raise InputError(
            f"{folder}: the images or labels of {splits.name} differ from those that the run "
            f"began with ({config.get('source', 'given as arrays')}), expected the same{hint}"
        )


def _loop(
    run: _Run,
    pending: list[int],
    show_progress: bool,
    on_step: Callable[[int, Autoencoder], None] | None,
    on_metrics: Callable[[dict[str, Any]], None],
) -> None:
    from tqdm import tqdm

    trainer, training = run.trainer, run.trainer.training
    total, per_epoch = trainer.total_steps, trainer.steps_per_epoch
    started = trainer.finished_steps
    if started == total or run.out_of_patience():
        return
    bar = tqdm(total=total, initial=started, unit="step", disable=not show_progress)
    with bar:
        bar.set_postfix_str("preparing kernels, compiled at the first use")
        while trainer.finished_steps < total:
            trainer.step()
            step = trainer.finished_steps
            if step == started + 1:
                bar.set_postfix_str("", refresh=False)
            bar.update()
            logs = _every(training.log_every, step)
            draws = _every(training.picture_every, step)
            ended = step % per_epoch == 0 or step == total
            # Not after every step: on a GPU the host waits here for all steps so far.
            if logs or draws or ended:
                trainer.check_loss()
            if logs:
                run.log_steps()
                on_metrics(run.metrics[-1])
            if draws and on_step is not None:
                on_step(step, trainer.model)
            if ended:
                steps = (step - 1) % per_epoch + 1
                line = run.log_epoch(math.ceil(step / per_epoch), steps)
                _show(bar, line)
                on_metrics(line)
            stopped = bool(pending)
            if ended or stopped or _every(training.checkpoint_every, step):
                trainer.check_loss()
                run.checkpoint()
            if stopped:
                raise Interrupted(pending[0], step, run.folder)
            if ended and run.out_of_patience():
                break


def _show(bar: Any, line: dict[str, Any]) -> None:
    """An epoch's losses beside the bar, and its warning above it."""
    bar.set_postfix(
        epoch=line["epoch"],
        train=f"{line['train']['loss']:.2f}",
        test=f"{line['test']['loss']:.2f}",
    )
    if "warning" in line:
        bar.write(f"warning    epoch {line['epoch']}: {line['warning']}", file=sys.stderr)


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _cut_metrics(path: Path, trainer: Trainer) -> list[dict[str, Any]]:
    """The records up to the trainer's step, which then are all that the file holds; without that of
    a part of an epoch, if the epoch goes on."""
    step, per_epoch = trainer.finished_steps, trainer.steps_per_epoch
    records = [record for record in read_metrics(path) if record["step"] <= step]
    if step < trainer.total_steps:
        records = [r for r in records if "epoch" not in r or r["step"] % per_epoch == 0]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


@contextmanager
def _pending_signal() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that a step in flight is finished before the run stops; the
    second one has its usual effect."""
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return
    # A signal that is already ignored, as in a shell's background jobs, stays ignored.
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]

    def collect(number: int, frame: Any) -> None:
        pending.append(number)
        restore()
        # Not print, which may not interrupt itself.
        os.write(2, b"\nstopping after this step; interrupt again to stop at once\n")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, collect) for number in numbers}
    try:
        yield pending
    finally:
        restore()
