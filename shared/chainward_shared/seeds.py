"""Every random choice of a run derives from its one seed by name, so that a part can be replayed alone.

Privacy noise and Poisson sampling must never come from here: they take entropy from the operating system.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the choice called `names`, e.g. ``derive_seed(7, "site-2", "lap", 0, "batches")``.

    The names are hashed (SHA-256) with their lengths, so ``("ab", "c")`` and ``("a", "bc")`` differ.
    """
    digest = hashlib.sha256(str(int(seed)).encode())
    for name in names:
        part = str(name).encode()
        digest.update(len(part).to_bytes(4, "big") + part)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator seeded for the choice called `names`."""
    import torch

    generator = torch.Generator()
    generator.manual_seed(derive_seed(seed, *names))
    return generator


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return a NumPy generator seeded for the choice called `names`."""
    return np.random.default_rng(derive_seed(seed, *names))
