"""The CPU backend's loops, compiled by Numba: one pass over memory each.

A kernel that begins with `part` and `parts` does one part of the work, and as many run side by side
(cpu_jobs.py); none holds the GIL. The transcendental functions are polynomials in float32, since
calls into the C library do not vectorise. `contract` allows fused multiply-adds; `reassoc`, which
vectorises sums, is only where a sum is. Neither assumes that values are finite.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from ..ops import philox
from ..ops.activations import KINDS
from ..ops.elbo import KL, LOSS, RECONSTRUCTION
from ..ops.state import BETA, CAPACITY, DECAY, EPOCH, FAILED, FIRST, INDEX, ROOT, STEP, STEP_SIZE
from .cpu_cache import inlined, kernel, sum_kernel

IDENTITY, RELU, LEAKY_RELU, TANH, SIGMOID, SOFTPLUS, ELU, GELU, SILU = range(len(KINDS))
"""The codes of the kinds, in the order of KINDS."""

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
TWO = np.float32(2)
SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal


@intrinsic
def bits_of_float(typing_context: Any, x: Any = None) -> Any:
    """The bits of a float32 as an int32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def float_of_bits(typing_context: Any, bits: Any = None) -> Any:
    """The float32 that has these bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@inlined
def share(n, part, parts):
    """The first of n that a part has, and the one after the last."""
    return n * part // parts, n * (part + 1) // parts


# Elementary functions: polynomials, and splits of ln 2 and pi / 2 into parts, of Cephes' single
# precision expf, logf, sinf and cosf (Moshier 1992)

LOG2_E = np.float32(1.4426950408889634)
ROUNDER = np.float32(1.5 * 2.0**23)
"""Added to a float32 of magnitude below 2^22 it leaves the nearest integer in the low bits."""
ROUNDER_BITS = np.int32(ROUNDER.view(np.int32))
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_MIN, EXP_MAX = np.float32(-104), np.float32(89)
EXPM1_MIN = np.float32(-25)
SQRT_HALF, SQRT_TWO = np.float32(math.sqrt(0.5)), np.float32(math.sqrt(2))
SQRT_HALF_BITS = np.int32(SQRT_HALF.view(np.int32))
INVERSE_SQRT_TWO_PI = np.float32(1 / math.sqrt(2 * math.pi))

TWO_OVER_PI = np.float32(2 / math.pi)
HALF_PI_HIGH, HALF_PI_MIDDLE = np.float32(1.5703125), np.float32(4.837512969970703125e-4)
HALF_PI_LOW = np.float32(7.549789948768648e-8)

M0, M1 = np.uint64(philox.M0), np.uint64(philox.M1)
W0, W1 = np.uint32(philox.W0), np.uint32(philox.W1)
THIRTY_TWO = np.uint64(32)


@kernel
def _power_of_two(n):
    """2^n for an integer n from -126 to 127."""
    return float_of_bits(np.int32((n + 127) << 23))


@kernel
def _expm1_reduced(r):
    """e^r - 1 for |r| <= ln(2) / 2: its Taylor series, economised."""
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r) * r + r


@kernel
def _reduce(x):
    """(n, r) with x = n ln 2 + r and |r| <= ln(2) / 2. Only r is NaN if x is."""
    shifted = x * LOG2_E + ROUNDER
    n = bits_of_float(shifted) - ROUNDER_BITS
    nearest = shifted - ROUNDER
    return n, (x - nearest * LN2_HIGH) - nearest * LN2_LOW


@kernel
def exp(x):
    """e^x = 2^n e^r. NaN stays NaN, since every comparison with it fails."""
    x = EXP_MAX if x > EXP_MAX else x
    x = EXP_MIN if x < EXP_MIN else x
    n, r = _reduce(x)
    # Two factors: 2^n itself may be out of range where e^x is not.
    half = n >> 1
    return (_expm1_reduced(r) + ONE) * _power_of_two(half) * _power_of_two(n - half)


@kernel
def expm1(x):
    """e^x - 1 = 2^n (e^r - 1 + 1 - 2^-n), precise near 0, where n = 0."""
    x = EXP_MAX if x > EXP_MAX else x
    x = EXPM1_MIN if x < EXPM1_MIN else x
    n, r = _reduce(x)
    half = n >> 1
    grown = _expm1_reduced(r) + (ONE - _power_of_two(-min(n, 126)))
    return grown * _power_of_two(half) * _power_of_two(n - half)


@kernel
def _log1p_reduced(f, n):
    """n ln 2 + ln(1 + f) for sqrt(1/2) - 1 <= f <= sqrt(2) - 1."""
    p = np.float32(7.0376836292e-2)
    p = p * f + np.float32(-1.1514610310e-1)
    p = p * f + np.float32(1.1676998740e-1)
    p = p * f + np.float32(-1.2420140846e-1)
    p = p * f + np.float32(1.4249322787e-1)
    p = p * f + np.float32(-1.6668057665e-1)
    p = p * f + np.float32(2.0000714765e-1)
    p = p * f + np.float32(-2.4999993993e-1)
    p = p * f + np.float32(3.3333331174e-1)
    square = f * f
    return n * LN2_HIGH + (f + (p * f * square + n * LN2_LOW - HALF * square))


@kernel
def log(x):
    """ln x for a finite normal x > 0."""
    bits: np.int32 = bits_of_float(x)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    mantissa = float_of_bits(np.int32(bits - (exponent << 23)))
    return _log1p_reduced(mantissa - ONE, np.float32(exponent))


@kernel
def log1p_of_fraction(e):
    """ln(1 + e) for 0 <= e <= 1."""
    large = e > SQRT_TWO - ONE
    f = HALF * e - HALF if large else e
    return _log1p_reduced(f, ONE if large else ZERO)


@kernel
def sigmoid(z):
    """1 / (1 + e^-z), from e^-|z|."""
    e = exp(-abs(z))
    return (e if z < ZERO else ONE) / (ONE + e)


@kernel
def tanh(z):
    """tanh z = -t / (t + 2) sign z with t = e^(-2 |z|) - 1."""
    t = expm1(-TWO * abs(z))
    magnitude = -t / (t + TWO)
    return -magnitude if z < ZERO else magnitude


@kernel
def softplus(z):
    """ln(1 + e^z) (activations.py)."""
    return (ZERO if z < ZERO else z) + log1p_of_fraction(exp(-abs(z)))


@kernel
def cos_and_sin(angle):
    """(cos, sin) of an angle from 0 to 2 pi = q pi/2 + r, |r| <= pi/4: the Taylor series of r,
    economised, with places and signs changed by the quadrant q."""
    shifted = angle * TWO_OVER_PI + ROUNDER
    q = bits_of_float(shifted) - ROUNDER_BITS
    nearest = shifted - ROUNDER
    r = ((angle - nearest * HALF_PI_HIGH) - nearest * HALF_PI_MIDDLE) - nearest * HALF_PI_LOW
    square = r * r
    s = np.float32(-1.9515295891e-4)
    s = s * square + np.float32(8.3321608736e-3)
    s = s * square + np.float32(-1.6666654611e-1)
    s = s * square * r + r
    c = np.float32(2.443315711809948e-5)
    c = c * square + np.float32(-1.388731625493765e-3)
    c = c * square + np.float32(4.166664568298827e-2)
    c = c * square * square + (ONE - HALF * square)
    cos, sin = (s, c) if q & 1 else (c, s)
    return -cos if (q + 1) & 2 else cos, -sin if q & 2 else sin


@kernel
def normal_cdf(z):
    """Phi(z), with the C library's erf."""
    return HALF * (ONE + np.float32(math.erf(z * SQRT_HALF)))


@kernel
def normal_density(z):
    """phi(z)."""
    return exp(-HALF * z * z) * INVERSE_SQRT_TWO_PI


# Activations. The branch on the kind stays outside of the loops, so that each vectorises.


@kernel
def activate(z, y, kind, slope):
    """y = f(z) (activations.py) on flat arrays; y may be z."""
    if kind == RELU:
        for i in range(z.size):
            y[i] = ZERO if z[i] < ZERO else z[i]
    elif kind == LEAKY_RELU:
        for i in range(z.size):
            y[i] = z[i] if z[i] > ZERO else slope * z[i]
    elif kind == TANH:
        for i in range(z.size):
            y[i] = tanh(z[i])
    elif kind == SIGMOID:
        for i in range(z.size):
            y[i] = sigmoid(z[i])
    elif kind == SOFTPLUS:
        for i in range(z.size):
            y[i] = softplus(z[i])
    elif kind == ELU:
        for i in range(z.size):
            y[i] = z[i] if z[i] > ZERO else expm1(z[i])
    elif kind == GELU:
        for i in range(z.size):
            y[i] = z[i] * normal_cdf(z[i])
    elif kind == SILU:
        for i in range(z.size):
            y[i] = z[i] * sigmoid(z[i])
    else:
        for i in range(z.size):
            y[i] = z[i]


@kernel
def multiply_derivative(z, y, dy, dz, kind, slope):
    """dz = dy f'(z) (activations.E1) on flat arrays; z is read where y is not. dz may be dy, but is
    then not vectorised."""
    if kind == RELU:
        for i in range(y.size):
            dz[i] = dy[i] * (ONE if y[i] > ZERO else ZERO)
    elif kind == LEAKY_RELU:
        for i in range(y.size):
            dz[i] = dy[i] * (ONE if y[i] > ZERO else slope)
    elif kind == TANH:
        for i in range(y.size):
            dz[i] = dy[i] * (ONE - y[i] * y[i])
    elif kind == SIGMOID:
        for i in range(y.size):
            dz[i] = dy[i] * (y[i] * (ONE - y[i]))
    elif kind == SOFTPLUS:
        for i in range(y.size):
            dz[i] = dy[i] * -expm1(-y[i])
    elif kind == ELU:
        for i in range(y.size):
            dz[i] = dy[i] * (ONE if y[i] > ZERO else y[i] + ONE)
    elif kind == GELU:
        for i in range(y.size):
            dz[i] = dy[i] * (normal_cdf(z[i]) + z[i] * normal_density(z[i]))
    elif kind == SILU:
        for i in range(y.size):
            s = sigmoid(z[i])
            dz[i] = dy[i] * (s + z[i] * s * (ONE - s))
    else:
        for i in range(y.size):
            dz[i] = dy[i]


# Rows of a matrix


@kernel
def sum_rows(dz, first, db):
    """db = sum of the rows of dz (dense.E3, conv.E4), from column `first` on."""
    db[:] = ZERO
    for row in range(dz.shape[0]):
        db += dz[row, first : first + db.size]


# Noise

COUNTERS = 128
"""Blocks of noise that are made at a time: enough to fill vectors, few enough to stay in the
L1 cache."""


@inlined
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four random words from a counter and a key (philox.E1), all uint32."""
    for _ in range(philox.ROUNDS):
        product0, product1 = np.uint64(c0) * M0, np.uint64(c2) * M1
        c0, c1 = np.uint32(product1 >> THIRTY_TWO) ^ c1 ^ k0, np.uint32(product1)
        c2, c3 = np.uint32(product0 >> THIRTY_TWO) ^ c3 ^ k1, np.uint32(product0)
        k0, k1 = np.uint32(k0 + W0), np.uint32(k1 + W1)
    return c0, c1, c2, c3


@kernel
def _uniform(word):
    """philox.E2."""
    return np.float32(word) * np.float32(2.0**-32) + np.float32(2.0**-33)


@kernel
def _box_muller(word0, word1):
    """philox.E3."""
    radius = np.sqrt(-TWO * log(_uniform(word0)))
    cos, sin = cos_and_sin(np.float32(2 * math.pi) * _uniform(word1))
    return radius * cos, radius * sin


@kernel
def standard_normal_rows(target, columns, first, end, step, stream, key_low, key_high):
    """The noise of the rows from `first` to `end` into the last `columns` columns of `target`. Many
    blocks, of whatever rows, go through the same operations at a time."""
    rows, left = end - first, target.shape[1] - columns
    blocks = (columns + 3) // 4
    row_of, block_of = np.empty(COUNTERS, np.uint32), np.empty(COUNTERS, np.uint32)
    normals = np.empty((4, COUNTERS), np.float32)
    words = np.empty((4, COUNTERS), np.uint32)
    step = np.uint32(step)
    row, block = 0, 0
    for begin in range(0, rows * blocks, COUNTERS):
        count = min(COUNTERS, rows * blocks - begin)
        for i in range(count):
            row_of[i], block_of[i] = first + row, block
            block += 1
            if block == blocks:
                row, block = row + 1, 0
        for i in range(count):
            four = philox4x32(block_of[i], row_of[i], step, stream, key_low, key_high)
            words[0, i], words[1, i], words[2, i], words[3, i] = four
        for i in range(count):
            normals[0, i], normals[1, i] = _box_muller(words[0, i], words[1, i])
            normals[2, i], normals[3, i] = _box_muller(words[2, i], words[3, i])
        for i in range(count):
            column = np.intp(4 * block_of[i])
            for lane in range(min(4, columns - column)):
                target[row_of[i], left + column + lane] = normals[lane, i]


# Latent


@kernel
def latent_forward(part, parts, head, z, kl, stream, key_low, key_high, state):
    """latent.E1 and latent.E2."""
    n, d = z.shape
    begin, end = share(n, part, parts)
    standard_normal_rows(z, d, begin, end, state[STEP], stream, key_low, key_high)
    for row in range(begin, end):
        mu, logvar, eps = head[row, :d], head[row, d:], z[row]
        for j in range(d):
            z[row, j] = mu[j] + exp(HALF * logvar[j]) * eps[j]
            kl[row, j] = HALF * (mu[j] * mu[j] + expm1(logvar[j]) - logvar[j])


@kernel
def latent_backward(part, parts, head, dz, kl_weight, dhead, stream, key_low, key_high, state):
    """latent.E3 and latent.E4."""
    n, d = dz.shape
    begin, end = share(n, part, parts)
    standard_normal_rows(dhead, d, begin, end, state[STEP], stream, key_low, key_high)
    for row in range(begin, end):
        mu, logvar = head[row, :d], head[row, d:]
        dmu, dlogvar = dhead[row, :d], dhead[row, d:]
        eps = dlogvar
        for j in range(d):
            through_z = dz[row, j] * eps[j] * exp(HALF * logvar[j])
            dmu[j] = dz[row, j] + kl_weight[j] * mu[j]
            dlogvar[j] = HALF * (through_z + kl_weight[j] * expm1(logvar[j]))


@sum_kernel
def _draw_row(mu, h, logvar_factor, z):
    """latent.E1 of one draw, whose noise z holds before, and importance.E1."""
    total = ZERO
    for j in range(z.size):
        eps, logvar = z[j], logvar_factor * h[j]
        z[j] = mu[j] + exp(HALF * logvar) * eps
        total += eps * eps - z[j] * z[j] + logvar
    return HALF * total


@kernel
def importance_latent_forward(
    part, parts, head, z, log_ratio, logvar_factor, stream, key_low, key_high, state
):
    """latent.E1 and importance.E1."""
    logvar_factor = np.float32(logvar_factor)
    (rows, d), draws = z.shape, z.shape[0] // head.shape[0]
    begin, end = share(rows, part, parts)
    standard_normal_rows(z, d, begin, end, state[STEP], stream, key_low, key_high)
    for row in range(begin, end):
        mu, h = head[row // draws, :d], head[row // draws, d:]
        log_ratio[row] = _draw_row(mu, h, logvar_factor, z[row])


@kernel
def importance_latent_backward(
    part,
    parts,
    head,
    dz,
    weights,
    dhead,
    scale,
    logvar_factor,
    eps,
    stream,
    key_low,
    key_high,
    state,
):
    """importance.E5 to E7; eps (n k, d) is scratch."""
    n, d = head.shape[0], dz.shape[1]
    draws = dz.shape[0] // n
    begin, end = share(n, part, parts)
    rows = begin * draws, end * draws
    standard_normal_rows(eps, d, *rows, state[STEP], stream, key_low, key_high)
    for image in range(begin, end):
        mu, h = head[image, :d], head[image, d:]
        dmu, dh = dhead[image, :d], dhead[image, d:]
        for j in range(d):
            dmu[j], dh[j] = ZERO, -scale
        for row in range(image * draws, (image + 1) * draws):
            weight = scale * weights[row]
            for j in range(d):
                offset = exp(HALF * logvar_factor * h[j]) * eps[row, j]
                g = dz[row, j] + weight * (mu[j] + offset)
                dmu[j] += g
                dh[j] += g * offset
        for j in range(d):
            dh[j] *= HALF * logvar_factor


# Objective


@sum_kernel
def bernoulli_row(logits, x, dlogits, scale):
    """elbo.E2 of one row, value and gradient in one pass."""
    total = ZERO
    for i in range(x.size):
        a = logits[i]
        e = exp(-abs(a))
        total += (ZERO if a < ZERO else a) + log1p_of_fraction(e) - x[i] * a
        probability = (e if a < ZERO else ONE) / (ONE + e)
        dlogits[i] = (probability - x[i]) * scale
    return total


@kernel
def importance_loss(part, parts, logits, x, log_ratio, weights, loss, dlogits, scale, importance):
    """importance.E2 to E4: the rows of an image are scaled while they are in the L1 cache."""
    scale, draws = np.float32(scale), logits.shape[0] // x.shape[0]
    for image in range(*share(x.shape[0], part, parts)):
        first, end = image * draws, (image + 1) * draws
        mean, largest = ZERO, -np.float32(np.inf)
        for row in range(first, end):
            log_weight = log_ratio[row] - bernoulli_row(logits[row], x[image], dlogits[row], ONE)
            weights[row] = log_weight
            mean += log_weight / np.float32(draws)
            # A NaN stays, to be seen by the latch: it is not even equal to itself.
            if largest == largest and not log_weight <= largest:
                largest = log_weight
        if importance:
            total = ZERO
            for row in range(first, end):
                weights[row] = exp(weights[row] - largest)
                total += weights[row]
            loss[image] = -(largest + log(total / np.float32(draws)))
            for row in range(first, end):
                weights[row] /= total
        else:
            loss[image] = -mean
            for row in range(first, end):
                weights[row] = ONE / np.float32(draws)
        for row in range(first, end):
            factor = scale * weights[row]
            for i in range(x.shape[1]):
                dlogits[row, i] *= factor


@kernel
def bernoulli_loss(part, parts, logits, x, loss, dlogits, scale):
    """elbo.E2."""
    for row in range(*share(x.shape[0], part, parts)):
        loss[row] = bernoulli_row(logits[row], x[row], dlogits[row], np.float32(scale))


@sum_kernel
def _squared_error_row(y, x, dy, scale):
    total = ZERO
    for i in range(x.size):
        error = y[i] - x[i]
        total += error * error
        dy[i] = TWO * scale * error
    return total


@kernel
def squared_error_loss(part, parts, y, x, loss, da, scale, weight, kind, slope):
    """elbo.E3; the derivative takes each row while it is in the L1 cache."""
    (n, m), scale, weight = x.shape, np.float32(scale), np.float32(weight)
    dy = np.empty(m, np.float32)
    for row in range(*share(n, part, parts)):
        loss[row] = weight * _squared_error_row(y[row], x[row], dy, weight * scale)
        multiply_derivative(y[row], y[row], dy, da[row], kind, slope)


@kernel
def calibrate_gaussian(loss, da, variance):
    """calibration.E2 to E4, with the sum over images in float64."""
    n, m = da.shape
    total = 0.0
    for row in range(n):
        total += loss[row]
    best = total / (n * m)
    variance[0] = best
    weight = np.float32(0.5 / best)
    constant = np.float32(0.5 * m * math.log(2 * math.pi * best))
    for row in range(n):
        loss[row] = weight * loss[row] + constant
        for i in range(m):
            da[row, i] *= weight


@kernel
def elbo_totals(reconstruction, kl, schedule, state, free_bits, kl_weight, totals):
    """elbo.E5 and elbo.E6, with sums in float64."""
    n, d = kl.shape
    beta = np.float64(schedule[state[INDEX], BETA])
    reconstruction_total = 0.0
    for row in range(n):
        reconstruction_total += reconstruction[row]
    kl_total, bounded_total = 0.0, 0.0
    for j in range(d):
        mean = 0.0
        for row in range(n):
            mean += kl[row, j]
        mean /= n
        kl_weight[j] = beta / n if mean > free_bits else 0.0
        kl_total += mean
        bounded_total += free_bits if mean < free_bits else mean
    loss_total = reconstruction_total + n * beta * bounded_total
    _add_to_totals(totals, state, loss_total, reconstruction_total, n * kl_total)


@kernel
def capacity_totals(reconstruction, kl, schedule, state, kl_weight, totals):
    """capacity.E1, E3 and E4, with sums in float64."""
    n, d = kl.shape
    beta = np.float64(schedule[state[INDEX], BETA])
    capacity = np.float64(schedule[state[INDEX], CAPACITY])
    reconstruction_total, mean_kl = 0.0, 0.0
    for row in range(n):
        reconstruction_total += reconstruction[row]
        for j in range(d):
            mean_kl += kl[row, j]
    mean_kl /= n
    weight = beta / n * np.sign(mean_kl - capacity)
    for j in range(d):
        kl_weight[j] = weight
    loss_total = reconstruction_total + n * beta * abs(mean_kl - capacity)
    _add_to_totals(totals, state, loss_total, reconstruction_total, n * mean_kl)


@kernel
def _add_to_totals(totals, state, loss, reconstruction, kl):
    """elbo.add_to_totals."""
    if not math.isfinite(loss):
        state[FAILED] = 1
    if not state[FAILED]:
        totals[LOSS] += loss
        totals[RECONSTRUCTION] += reconstruction
        totals[KL] += kl


# Optimizer

PARAMETERS = 1 << 13
"""How many one core updates at a time."""


@kernel
def adam(p, g, m, v, row, beta1, beta2, epsilon):
    """adam.E1 to adam.E4 in one pass, on a part of the parameters.

    Moments that fade away, as a dark pixel's do, become zero where they would be denormal, as on a
    GPU: some processors are many times slower with such numbers.
    """
    step_size, inverse_root, decay = row[STEP_SIZE], ONE / row[ROOT], row[DECAY]
    new1, new2 = np.float32(1 - beta1), np.float32(1 - beta2)
    epsilon = np.float32(epsilon)
    for i in range(p.size):
        mean = m[i] + new1 * (g[i] - m[i])
        variance = v[i] + new2 * (g[i] * g[i] - v[i])
        m[i] = ZERO if abs(mean) < SMALLEST_NORMAL else mean
        v[i] = ZERO if variance < SMALLEST_NORMAL else variance
        p[i] = p[i] * decay - step_size * m[i] / (np.sqrt(v[i]) * inverse_root + epsilon)


@kernel
def adam_update(part, parts, p, g, m, v, schedule, state, beta1, beta2, epsilon):
    """adam.E1 to adam.E4."""
    if state[FAILED]:
        return
    row = schedule[state[INDEX]]
    for chunk in range(*share((p.size + PARAMETERS - 1) // PARAMETERS, part, parts)):
        some = slice(chunk * PARAMETERS, (chunk + 1) * PARAMETERS)
        adam(p[some], g[some], m[some], v[some], row, beta1, beta2, epsilon)


@sum_kernel
def clip_gradient(g, max_norm, norm):
    """adam.E5, |g| in float64: to norm (1,)."""
    total = 0.0
    for i in range(g.size):
        total += np.float64(g[i]) * np.float64(g[i])
    norm[0] = np.float32(math.sqrt(total))
    if norm[0] > max_norm:
        factor = np.float32(max_norm / norm[0])
        for i in range(g.size):
            g[i] *= factor


@kernel
def advance_state(state, images):
    """state.advance_state."""
    if state[FAILED] == 0:
        state[STEP] += 1
        state[INDEX] += 1
        state[FIRST] += images


# Batch


@kernel
def gather_scaled(part, parts, data, permutation, state, x, white):
    """batch.E1."""
    for row in range(*share(x.shape[0], part, parts)):
        pixels = data[permutation[state[FIRST] + row]]
        for i in range(x.shape[1]):
            x[row, i] = np.float32(pixels[i]) / white


@kernel
def gather_thresholded(part, parts, data, permutation, state, x, white):
    """batch.E2."""
    for row in range(*share(x.shape[0], part, parts)):
        pixels = data[permutation[state[FIRST] + row]]
        for i in range(x.shape[1]):
            x[row, i] = ONE if TWO * np.float32(pixels[i]) >= white else ZERO


@kernel
def gather_stochastic(
    part, parts, data, permutation, state, x, white, words, stream, key_low, key_high
):
    """batch.E3, exact in float64; words (parts, m + 3) is scratch."""
    n, m = x.shape
    epoch = np.uint32(state[EPOCH])
    own = words[part]
    for row in range(*share(n, part, parts)):
        image = permutation[state[FIRST] + row]
        for block in range((m + 3) // 4):
            four = philox4x32(np.uint32(block), np.uint32(image), epoch, stream, key_low, key_high)
            at = 4 * block
            own[at], own[at + 1], own[at + 2], own[at + 3] = four
        for i in range(m):
            threshold = np.float64(data[image, i]) * 2.0**32
            x[row, i] = ONE if np.float64(own[i]) * white < threshold else ZERO


# Labels


@kernel
def gather_labels(labels, permutation, state, onehot):
    """labels.E2."""
    for row in range(onehot.shape[0]):
        onehot[row] = ZERO
        onehot[row, labels[permutation[state[FIRST] + row]]] = ONE


@kernel
def join_forward(v, onehot, u):
    """labels.E3."""
    (rows, m), draws = v.shape, v.shape[0] // onehot.shape[0]
    for row in range(rows):
        for j in range(m):
            u[row, j] = v[row, j]
        for j in range(onehot.shape[1]):
            u[row, m + j] = onehot[row // draws, j]


@kernel
def join_input_gradient(du, v, da, kind, slope):
    """labels.E4."""
    for row in range(v.shape[0]):
        multiply_derivative(v[row], v[row], du[row, : v.shape[1]], da[row], kind, slope)
