"""What a privileged teacher sees of a case's image, beside what it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

Read = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Returns the vectors of a modality, float32 (n, d), and which cases have it, bool (n,)."""


class SeenImages(Protocol):
    """The images of the cases, as teachers see them: `chainward_client.training.passes.StartImages`."""

    @property
    def key(self) -> list[str]:
        """What decides the vectors."""

    def vectors(self) -> np.ndarray:
        """Return a vector of each image, of this image alone: float32 (n, d)."""


def beside(image: SeenImages, read: Read) -> tuple[np.ndarray, np.ndarray]:
    """Return what `read` returns, with the images' vectors before its own."""
    vectors, available = read()
    return np.concatenate([image.vectors(), vectors], axis=1), available
