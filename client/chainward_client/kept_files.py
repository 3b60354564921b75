"""Large arrays that a site computes once and keeps in files: how they are opened, and how one hears of their making."""

from __future__ import annotations

import logging
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike
from rich.progress import Progress
from torch import Tensor

from chainward_shared.console import PlainConsole

logger = logging.getLogger("chainward.client")

PROGRESS_SECONDS = 20.0


def mapped(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> Tensor:
    """Return the array in a file as a tensor that takes memory only where it is looked at.

    Copy-on-write, since PyTorch wants memory that it may write to; the file never changes.
    """
    return torch.from_numpy(np.memmap(path, dtype=dtype, mode="c", shape=shape))


def installed(package: str) -> str | None:
    """Return the version of a package; None where it isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Making:
    """Says how far the making of something has come: a line every 20 s, on a terminal a bar.

    Parameters
    ----------
    what : "images", "features"
    total : how many there will be
    done : how many there are already
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.begun_at = what, total, done
        self.started = self.told = time.monotonic()
        self.bar = Progress(console=PlainConsole(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self.task = self.bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> Making:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def done(self, count: int) -> None:
        """Note that there are `count` now."""
        self.bar.update(self.task, completed=count)
        now = time.monotonic()
        if now - self.told > PROGRESS_SECONDS and count > self.begun_at:
            self.told = now
            left = (now - self.started) / (count - self.begun_at) * (self.total - count)
            logger.info("%s: %d of %d, about %.0f s left", self.what, count, self.total, left)
