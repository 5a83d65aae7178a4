"""Likelihood estimates beside the truth: a linear-Gaussian model, whose evidence has a closed form.

python -m minivae.benchmarks.truth [-o benchmarks/results/truth.json]
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minivae.data import Dataset
from minivae.environment import environment
from minivae.evaluate import DEFAULT_SAMPLES, evaluate
from minivae.layers import Dense, Flatten, Reshape
from minivae.models import VAE, Objective

from .measure import write_result
from .runs import RESULTS

PIXELS, LATENT, SIGMA = 12, 3, 0.6
IMAGE = (3, 4, 1)
REPEATS = 5


class LinearGaussian:
    """Probabilistic PCA (Tipping & Bishop 1999) x = W z + b + sigma n as a VAE, whose encoder is a
    posterior that is deliberately not the exact one."""

    def __init__(self, seed: int, posterior: str = "rough") -> None:
        rng = np.random.default_rng(seed)
        w = rng.standard_normal((LATENT, PIXELS)) * 0.5
        b = 0.5 + 0.1 * rng.standard_normal(PIXELS)
        z = rng.standard_normal((9, LATENT))
        x = z @ w + b + SIGMA * rng.standard_normal((9, PIXELS))
        # Images are in [0, 1]; the model takes what is there.
        self.x = np.clip(x, 0, 1).astype(np.float32).astype(np.float64)
        precision = np.eye(LATENT) + w @ w.T / SIGMA**2
        self.covariance = np.linalg.inv(precision)
        to_mean = w.T @ self.covariance / SIGMA**2
        self.means = (self.x - b) @ to_mean
        variances = 1 / np.diag(precision)
        objective = Objective("gaussian", sigma=SIGMA)
        self.model = VAE(
            *([Flatten(), Dense(2 * LATENT)], [Dense(PIXELS), Reshape(IMAGE)], objective, IMAGE)
        )
        self.model.to("reference", np.float64)
        if posterior == "rough":
            to_mean, variances = to_mean * 0.9, 1.3 * variances
        head = np.zeros((PIXELS, 2 * LATENT))
        head[:, :LATENT] = to_mean
        head_bias = np.concatenate([-b @ to_mean, np.log(variances)])
        values = self.model.parameters.values
        for name, value in (
            *(("encoder.1.weight", head), ("encoder.1.bias", head_bias)),
            *(("decoder.0.weight", w), ("decoder.0.bias", b)),
        ):
            values[name][...] = value
        marginal = w.T @ w + SIGMA**2 * np.eye(PIXELS)
        centred = self.x - b
        _, log_determinant = np.linalg.slogdet(2 * np.pi * marginal)
        quadratic = np.sum(centred @ np.linalg.inv(marginal) * centred, axis=1)
        self.log_evidence = -0.5 * (log_determinant + quadratic)
        self.posterior = (self.x @ to_mean - b @ to_mean, variances)

    @property
    def data(self) -> Dataset:
        return Dataset(self.x.reshape(-1, *IMAGE).astype(np.float32), None)

    def kl_to_posterior(self) -> NDArray:
        """KL(q(z|x) || p(z|x)) of each image, both normal."""
        means, variances = self.posterior
        inverse = np.linalg.inv(self.covariance)
        difference = self.means - means
        quadratic = np.sum(difference @ inverse * difference, axis=1)
        _, determinant = np.linalg.slogdet(self.covariance)
        trace = np.sum(np.diag(inverse) * variances)
        return 0.5 * (trace + quadratic - LATENT + determinant - np.sum(np.log(variances)))


def compare(seed: int = 0) -> dict[str, Any]:
    """The bounds of every k, each the mean over REPEATS evaluations with draws of their own and its
    standard error, beside the exact evidence; and the ELBO's gap beside KL(q(z|x) || p(z|x)). All
    in nats an image."""
    truth = LinearGaussian(seed)
    found = [evaluate(truth.model, truth.data, seed=repeat) for repeat in range(REPEATS)]
    bounds = {k: [one.bounds[k].mean for one in found] for k in found[0].bounds}
    evidence = float(np.mean(truth.log_evidence))
    return {
        "seed": seed,
        "samples": DEFAULT_SAMPLES,
        "bounds": {
            str(k): {
                "mean": statistics.fmean(each),
                "error": statistics.stdev(each) / math.sqrt(REPEATS),
            }
            for k, each in bounds.items()
        },
        "log_evidence": evidence,
        "elbo_gap": evidence + statistics.fmean(one.loss.mean for one in found),
        "kl_to_posterior": float(np.mean(truth.kl_to_posterior())),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare likelihood estimates with the truth.")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "truth.json")
    output = parser.parse_args().output
    write_result(output, {"environment": environment("reference"), "truth": compare()})


if __name__ == "__main__":
    main()
