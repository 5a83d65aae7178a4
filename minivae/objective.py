"""What is minimised: the pages of ops/ that make a loss, chosen and weighted."""

import math
from dataclasses import dataclass

from .errors import InputError, check_kinds, check_settings

LIKELIHOODS = ("bernoulli", "squared-error", "gaussian", "calibrated-gaussian")
ESTIMATORS = ("analytic", "monte-carlo", "importance")
SMALLEST_SIGMA = 1e-9


@dataclass(frozen=True)
class Objective:
    """What is minimised: reconstruction + beta KL, a sum over pixels and latent dimensions and a
    mean over images (elbo.E5).

    `likelihood` is one of

        bernoulli            -log p(x|logits), in nats; the decoder ends in logits (elbo.E2)
        squared-error        weight * sum of (y - x)^2 (elbo.E3)
        gaussian             -log N(x; y, sigma^2), in nats, constant included (elbo.E4)
        calibrated-gaussian  the same with the sigma^2 that fits the batch best (calibration.E3);
                             images are evaluated with the sigma of `Autoencoder.calibrate`

    With `estimator` "analytic" the KL is latent.E2, with one draw of z per image. The others use
    log w = log p(x|z) + log p(z) - log q(z|x) of `samples` draws per image (importance.E2):
    "monte-carlo" the mean of log w, again the ELBO; "importance" the log of the mean of w, the
    tighter bound of the IWAE. Both need the Bernoulli likelihood, beta 1, no free bits and no
    capacity, and in training report the loss alone, without its terms.

    `beta` rises linearly to its value over the first `beta_warmup_steps`; `free_bits` is lambda of
    elbo.E5, in nats a dimension. With a `capacity` above 0, in nats an image, beta weighs the KL's
    distance from it instead (capacity.E3); it rises linearly over `capacity_steps`.

    Raises InputError on a value out of its range, and on settings that exclude each other.
    """

    likelihood: str = "bernoulli"
    weight: float = 1.0
    sigma: float = 1.0
    beta: float = 1.0
    beta_warmup_steps: int = 0
    free_bits: float = 0.0
    estimator: str = "analytic"
    samples: int = 1
    capacity: float = 0.0
    capacity_steps: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        checks = {
            "likelihood": (self.likelihood in LIKELIHOODS, f"one of {', '.join(LIKELIHOODS)}"),
            "weight": (self.weight > 0, "above 0"),
            "sigma": (SMALLEST_SIGMA < self.sigma < 1e9, "above 1e-9 and below 1e9"),
            "beta": (self.beta >= 0, "0 or above"),
            "beta_warmup_steps": (self.beta_warmup_steps >= 0, "0 or above"),
            "free_bits": (self.free_bits >= 0, "0 or above"),
            "estimator": (self.estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
            "samples": (self.samples >= 1, "1 or above"),
            "capacity": (self.capacity >= 0, "0 or above"),
            "capacity_steps": (self.capacity_steps >= 0, "0 or above"),
        }
        check_settings(self, checks)
        if self.free_bits and self.capacity:
            raise InputError("free_bits and capacity exclude each other: both set the KL's level")
        if not self.by_draws and self.samples != 1:
            raise InputError(
                f"samples is {self.samples}, expected 1 with estimator {self.estimator!r}"
            )
        plain = (self.likelihood, self.beta, self.beta_warmup_steps, self.free_bits, self.capacity)
        if self.by_draws and plain != ("bernoulli", 1.0, 0, 0.0, 0.0):
            raise InputError(
                f"a bound by draws (estimator {self.estimator!r}) is for the Bernoulli likelihood "
                "with beta 1, no free bits and no capacity"
            )

    @property
    def error_weight(self) -> float:
        """The weight w of elbo.E3; 1 where calibration.E4 finds it afterwards."""
        if self.likelihood == "gaussian":
            return 0.5 / self.sigma**2
        return self.weight if self.likelihood == "squared-error" else 1.0

    @property
    def calibrated(self) -> bool:
        """Whether the likelihood's variance is calibrated."""
        return self.likelihood == "calibrated-gaussian"

    @property
    def by_draws(self) -> bool:
        """Whether the bound comes from draws alone (importance.py), without an analytic KL."""
        return self.estimator != "analytic"

    def constant(self, pixels: int) -> float:
        """The part of a fixed Gaussian's -log p(x|z) that the loss on the device leaves out
        (elbo.E4), in nats per image; 0 for other likelihoods."""
        if self.likelihood != "gaussian":
            return 0.0
        return 0.5 * pixels * math.log(2 * math.pi * self.sigma**2)

    def beta_at(self, step: int) -> float:
        """The weight of the KL at `step`, counted from 0 (elbo.E7)."""
        return _risen(self.beta, step, self.beta_warmup_steps)

    def capacity_at(self, step: int) -> float:
        """The KL's capacity in nats at `step`, counted from 0 (capacity.E2)."""
        return _risen(self.capacity, step, self.capacity_steps)

    @property
    def reconstruction_in_words(self) -> str:
        """What the reconstruction term is, and its unit."""
        return {
            "bernoulli": "Bernoulli -log p(x|z) on logits, nats",
            "squared-error": f"{self.weight:g} x sum of squared error",
            "gaussian": f"Gaussian -log p(x|z) with sigma {self.sigma:g}, nats",
            "calibrated-gaussian": "Gaussian -log p(x|z) with sigma^2 = the batch's mean squared "
            "error, nats",
        }[self.likelihood]

    def __str__(self) -> str:
        if self.by_draws:
            bound = "log mean w" if self.estimator == "importance" else "mean log w"
            return (
                f"-({bound}), log w = log p(x|z) + log p(z) - log q(z|x), of {self.samples} draws; "
                "Bernoulli on logits, nats; mean per image"
            )
        warmup = f" (linear over {self.beta_warmup_steps} steps)" if self.beta_warmup_steps else ""
        if self.capacity:
            rise = f" (linear over {self.capacity_steps} steps)" if self.capacity_steps else ""
            target = f"|KL - C|, C = {self.capacity:g} nats{rise}"
            return (
                f"{self.reconstruction_in_words} + {self.beta:g}{warmup} x {target}; mean per image"
            )
        floor = f", at least {self.free_bits:g} nats a dimension" if self.free_bits else ""
        return f"{self.reconstruction_in_words} + {self.beta:g}{warmup} x KL{floor}; mean per image"


def _risen(value: float, step: int, steps: int) -> float:
    """How far `value` has risen at `step`, linearly over the first `steps`."""
    return value * (step + 1) / steps if step < steps else value
