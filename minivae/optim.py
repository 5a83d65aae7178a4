"""Optimizers and schedules: what the host decides about a step, as rows of a table (ops/state.py).

The table is computed in float64 and handed to the backend once an epoch; the update itself is
`ops/adam.py`.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, check_kinds, check_settings
from .ops.state import DECAY, ROOT, SCHEDULE_COLUMNS, STEP_SIZE

SCHEDULES = ("constant", "step", "cosine", "pieces")


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015); with `weight_decay` AdamW (Loshchilov & Hutter 2019).

    The learning rate is `lr` times a factor: linear from 1 / warmup_steps to 1 over the first
    `warmup_steps`, and then, by `schedule`, t steps after that,

        constant   1
        step       gamma^(t // step_every)
        cosine     (1 + cos(pi t / total)) / 2,  total the rest of the run
                   (Loshchilov & Hutter 2017)
        pieces     the factors of `pieces`, (epochs, factor) in order, the last to the run's end

    `clip_norm` bounds the global norm of the gradient; 0 means no clipping. With `epsilon_hat`,
    epsilon is added to sqrt(v) without its bias correction (adam.E3'). `second_moment` is the
    initial v.

    Raises InputError on a value out of its range.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    step_every: int = 1000
    gamma: float = 0.5
    clip_norm: float = 0.0
    pieces: tuple[tuple[int, float], ...] = ()
    epsilon_hat: bool = False
    second_moment: float = 0.0

    def __post_init__(self) -> None:
        check_kinds(self)
        checks = {
            "lr": (self.lr > 0, "above 0"),
            "beta1": (0 <= self.beta1 < 1, "in [0, 1)"),
            "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
            "epsilon": (self.epsilon > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "0 or above"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or above"),
            "step_every": (self.step_every >= 1, "1 or above"),
            "gamma": (0 < self.gamma <= 1, "above 0, at most 1"),
            "clip_norm": (self.clip_norm >= 0, "0 or above"),
            "second_moment": (self.second_moment >= 0, "0 or above"),
        }
        check_settings(self, checks)
        try:  # lists, where they come from a JSON file
            pieces = tuple((int(epochs), float(factor)) for epochs, factor in self.pieces)
            valid = all(epochs > 0 and 0 < factor < math.inf for epochs, factor in pieces)
        except (TypeError, ValueError):
            valid = False
        if not valid or bool(pieces) != (self.schedule == "pieces"):
            raise InputError(
                f"pieces is {self.pieces!r}, expected (epochs, factor) above 0 for schedule "
                "'pieces', and none for others"
            )
        object.__setattr__(self, "pieces", pieces)

    def learning_rate(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """The learning rate of `step` (counted from 0) of a run of `total_steps`; pieces last for
        epochs, of `steps_per_epoch` each."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        t = step - self.warmup_steps
        if self.schedule == "step":
            return self.lr * self.gamma ** (t // self.step_every)
        if self.schedule == "pieces":
            ends = itertools.accumulate(epochs * steps_per_epoch for epochs, _ in self.pieces)
            index = sum(end <= t for end in ends)
            return self.lr * self.pieces[min(index, len(self.pieces) - 1)][1]
        if self.schedule == "cosine":
            progress = t / max(total_steps - self.warmup_steps, 1)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        return self.lr

    def schedule_rows(self, first_step: int, steps: int, total_steps: int) -> NDArray[np.float64]:
        """The rows (steps, SCHEDULE_COLUMNS) of an epoch of so many steps, from `first_step` on,
        with the optimizer's columns of ops/state.py; the objective's are 0."""
        rows = np.zeros((steps, SCHEDULE_COLUMNS))
        for row, step in enumerate(range(first_step, first_step + steps)):
            lr = self.learning_rate(step, total_steps, steps)
            step_size = lr / (1 - self.beta1 ** (step + 1))
            root = math.sqrt(1 - self.beta2 ** (step + 1))
            rows[row, STEP_SIZE] = step_size * root if self.epsilon_hat else step_size
            rows[row, ROOT] = 1 if self.epsilon_hat else root
            rows[row, DECAY] = 1 - lr * self.weight_decay
        return rows
