"""Where the randomness of private training comes from: the operating system. Never a run's seed.

`torch.Generator.manual_seed` on the CPU keeps 32 bits of its seed, whatever it is given, and so does every generator
that is made that way: whoever receives a model could try all of its noises. Here the sampling takes its bits from the
system directly, PyTorch's generator gets its whole state, and the noise of every step comes from AES-256 in counter mode
with a fresh key: who sees a part of a step's noise (in a weight that no gradient reached) can't compute the rest from it, as
with a Mersenne twister, and it takes half the time of NumPy's generators. The noise of a training on a GPU is made on the
CPU, too, and copied: a GPU's own generator has a key of 64 bits.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor


class Entropy:
    """The operating system's entropy, for private training: it can't be replayed.

    Attributes
    ----------
    seeded : True where it can be, after all; what was trained with it is not private
    """

    seeded = False

    def uniform(self, n: int) -> np.ndarray:
        """Return `n` numbers in [0, 1), float64 (n,)."""
        bits = np.frombuffer(os.urandom(8 * n), dtype=np.uint64) >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53

    def normal(self, shapes: list[torch.Size], device: torch.device) -> list[Tensor]:
        """Return standard normal numbers, float32, one tensor for each shape."""
        sizes = [shape.numel() for shape in shapes]
        numbers = _secret_normal(sum(sizes)).to(device)
        return [part.view(shape) for part, shape in zip(numbers.split(sizes), shapes, strict=True)]

    def generator(self) -> torch.Generator:
        """Return a new CPU generator, of augmentations say."""
        generator = torch.Generator()
        generator.manual_seed(self.integer())
        state = generator.get_state()
        words = torch.from_numpy(np.frombuffer(os.urandom(4 * _WORDS), dtype=np.uint32).astype(np.int64))
        state[_STATE_START : _STATE_START + 8 * _WORDS] = words.view(torch.uint8)
        generator.set_state(state)
        return generator

    def integer(self) -> int:
        """Return a number below 2^63."""
        return int.from_bytes(os.urandom(8), "big") >> 1


class SeededForTests(Entropy):
    """Repeats itself. For tests only: the ledger marks what was trained with it, and the audit fails it."""

    seeded = True

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def uniform(self, n: int) -> np.ndarray:
        return self._generator.random(n)

    def normal(self, shapes: list[torch.Size], device: torch.device) -> list[Tensor]:
        return [
            torch.as_tensor(self._generator.standard_normal(tuple(shape), dtype=np.float32)).to(device)
            for shape in shapes
        ]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.integer())

    def integer(self) -> int:
        return int(self._generator.integers(2**63))


def _secret_normal(n: int) -> Tensor:
    """Return `n` standard normal numbers, float32: pairs by Box and Muller (1958), up to 6.7 standard deviations."""
    half = (n + 1) // 2
    cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
    numbers, nothing = torch.empty(2, half), bytes(8 * min(half, _BLOCK))
    for first, second in zip(numbers[0].split(_BLOCK), numbers[1].split(_BLOCK), strict=True):
        stream = bytearray(cipher.update(nothing[: 8 * len(first)]))
        bits = torch.frombuffer(stream, dtype=torch.int32) & 0x7FFFFFFF
        uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-31)  # within (0, 1]; small ones in full precision
        radius = uniform[: len(first)].log_().mul_(-2.0).sqrt_()
        angle = uniform[len(first) :].mul_(2.0 * math.pi)
        torch.mul(radius, angle.cos(), out=first)
        torch.mul(radius, angle.sin(), out=second)
    return numbers.flatten()[:n]


_BLOCK = 1 << 15
"""Pairs of normal numbers made at once: what is in between stays in the processor's cache."""

_WORDS = 624  # of the Mersenne twister; PyTorch keeps each in 8 bytes, behind 24 bytes of seed and counters
_STATE_START = 24
