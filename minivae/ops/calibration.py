"""A Gaussian likelihood with the variance that fits best (sigma-VAE; Rybkin, Daniilidis and Levine,
"Simple and Effective VAE Training with Calibrated Decoders", 2021).

One variance v = sigma^2 is shared by all m pixels of all n images of a batch. With S_i the sum of
squared errors (y - x)^2 of image i and S = sum_i S_i, elbo.E4, summed over an image's pixels and
averaged over the batch, is

    E1    R(y, v) = S / (2 n v) + (m / 2) log(2 pi v)                        nats per image

It grows without bound as v goes to 0 or to infinity, so it is least where its derivative is 0:

    E2    ∂R/∂v = -S / (2 n v^2) + m / (2 v) = 0     =>     v* = S / (n m)    (mean squared error)

Each image's negative log-density, and their mean:

    E3    l_i = S_i / (2 v*) + (m / 2) log(2 pi v*),    R = (m / 2) (1 + log(2 pi v*))

v* depends on y, but this adds nothing to the gradient (the envelope theorem):

    E4    dy = ∂R/∂y + ∂R/∂v ∂v*/∂y = ∂R/∂y = (y - x) / (n v*)               (∂R/∂v = 0 by E2)

and da = dy f'(a), as in elbo.E3. This is 1 / (2 v*) times the gradient of the batch-mean squared
error with w = 1: a weight recomputed at each step. A batch with S = 0 has v* = 0, and neither its
density nor its loss is finite.

E3 is the logarithm of a density only if v does not depend on the image being scored. Images are
therefore evaluated with one sigma, by E2 over training images (`Autoencoder.calibrate`).
"""

import math

import numpy as np
from numpy.typing import NDArray


def calibrate_gaussian(loss: NDArray, da: NDArray, variance: NDArray) -> None:
    """E2 to E4, in place on what `squared_error_loss` of weight 1 wrote.

    Shapes: loss (n,), in S_i, out l_i; da (n, m), the gradient; variance (1,), which gets v*.
    """
    n, m = da.shape
    variance[0] = best = np.sum(loss, dtype=np.float64) / (n * m)
    weight = 0.5 / best
    loss[...] = weight * loss + 0.5 * m * np.log(2 * math.pi * best)
    da *= weight
