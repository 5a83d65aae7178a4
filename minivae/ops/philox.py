"""Noise as a function: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
SC 2011) turns a counter and a key into four random words, with no state in between.

The key (k0, k1) is the seed, low 32 bits first. The counter (c0, c1, c2, c3) is (block, row, step,
stream): element (row, column) of a step's noise is number column % 4, its lane, of the four that
block column // 4 yields. Each use of noise has its own stream, so the noise of any element, step
and use can be regenerated anywhere, in any order, on any backend.

One round, with hi and lo the upper and lower 32 bits of a 64-bit product and ^ bitwise xor,

    E1    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))

is applied ten times; between rounds (k0, k1) grows by (W0, W1), each modulo 2^32.

    E2    u = word 2^-32 + 2^-33                     uniform in (0, 1); float32 may round up to 1
    E3    e0 = sqrt(-2 ln u0) cos(2 pi u1)           Box-Muller: two independent normals
          e1 = sqrt(-2 ln u0) sin(2 pi u1)           from lanes (0, 1), two more from (2, 3)
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)

LATENT_STREAM = 0
BINARIZATION_STREAM = 1
EVALUATION_STREAM = 2
EVALUATION_BINARIZATION_STREAM = 3
STREAMS = 4
"""Stream s of part p of a batch is s + p STREAMS."""


class Noise(NamedTuple):
    """Which noise: the seed (64 bits, the key) and the stream, one for each use."""

    seed: int
    stream: int

    @property
    def word(self) -> int:
        """The key as one number of 64 bits."""
        return self.seed & 0xFFFFFFFFFFFFFFFF

    @property
    def key(self) -> tuple[int, int]:
        """Its low and high half."""
        return self.word & 0xFFFFFFFF, self.word >> 32


def philox4x32(counter: NDArray, key: tuple[int, int]) -> NDArray:
    """Four random words for each counter (E1). Shapes: counter and result (..., 4), uint32."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(ROUNDS):
        product0 = c0 * np.uint64(M0)
        product1 = c2 * np.uint64(M1)
        c0 = (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c1 = product1 & _LOW
        c2 = (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c3 = product0 & _LOW
        k0 = (k0 + W0) & 0xFFFFFFFF
        k1 = (k1 + W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random_words(rows: NDArray, columns: int, noise: Noise, step: int) -> NDArray:
    """The words of elements (row, 0..columns-1). Shapes: rows (n,), result (n, columns), uint32."""
    blocks = -(-columns // 4)
    counter = np.zeros((len(rows), blocks, 4), np.uint32)
    counter[..., 0] = np.arange(blocks)
    counter[..., 1] = rows[:, None]
    counter[..., 2] = step & 0xFFFFFFFF
    counter[..., 3] = noise.stream
    words = philox4x32(counter, noise.key)
    return words.reshape(len(rows), 4 * blocks)[:, :columns]


def standard_normal(shape: tuple[int, int], noise: Noise, step: int, dtype: type) -> NDArray:
    """Standard normal noise (E2, E3) of shape (n, columns), computed in `dtype`."""
    n, columns = shape
    words: NDArray = random_words(np.arange(n), 4 * -(-columns // 4), noise, step).astype(dtype)
    uniform = words * dtype(2.0**-32) + dtype(2.0**-33)
    radius = np.sqrt(dtype(-2) * np.log(uniform[:, 0::2]))
    angle = dtype(2 * np.pi) * uniform[:, 1::2]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return normal.reshape(n, -1)[:, :columns]
