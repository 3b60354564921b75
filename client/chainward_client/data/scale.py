"""One scale of grey for all images of more than 8 bits: which value becomes black and which white in a whole data set.

A scale of each image's own would show the same tissue bright in one image and dark in the next. It is declared in the data file
(`image.scale`; for DICOM also `dicom.window`), or measured once over the data set, always alike for the same files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

PERCENTILES = (0.5, 99.5)
"""What becomes black and white where no scale is declared, in percent of the values of the measured images together."""

MOST_IMAGES = 256
"""Images that are measured: all that have more than 8 bits, or so many of them, drawn always alike."""

_VALUES_PER_IMAGE = 1024
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Scale:
    """Which value becomes black (`low`, and less) and which white (`high`, and more).

    Attributes
    ----------
    low, high : the two values; `low` is below `high`
    images : how many images were measured; 0: declared
    values : float32 sorted, what they held, the same number from each; empty: declared
    """

    low: float
    high: float
    images: int = 0
    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32), compare=False)

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Return float64, 0 for black to 1 for white."""
        shown: np.ndarray = np.clip((values.astype(np.float64) - self.low) / (self.high - self.low), 0.0, 1.0)
        return shown

    def eight_bits(self, values: np.ndarray) -> np.ndarray:
        """Return uint8, 0 for black to 255 for white."""
        return np.floor(self.unit(values) * 255 + 0.5).astype(np.uint8)

    @property
    def note(self) -> str:
        """Return what a person should know of it where it was measured."""
        return (
            f"more than 8 bits: {self.low:g} is shown black and {self.high:g} white in all images (percentiles "
            f"{PERCENTILES[0]:g} and {PERCENTILES[1]:g} of {self.images} images, measured here); image.scale: "
            f"[{self.low:g}, {self.high:g}] declares it, for all hospitals alike"
        )

    def histogram(self, bars: int = 16) -> str:
        """Return the measured values as a line of bars from the smallest to the largest, between the two; else an empty text.

        A bar's height goes with the square root of its count, so that tissue is seen beside a black background.
        """
        if not len(self.values):
            return ""
        counts, edges = np.histogram(self.values, bars)
        heights = np.ceil(np.sqrt(counts / counts.max()) * (len(_BARS) - 1)).astype(int)
        return f"{edges[0]:g} |{''.join(_BARS[height] for height in heights)}| {edges[-1]:g}"


def measure(count: int, deep_values: Callable[[int], np.ndarray | None]) -> Scale:
    """Return the scale of a data set's images of more than 8 bits; the same images give the same scale.

    Parameters
    ----------
    count : images of the data set
    deep_values : the values of the image at a position that a scale is needed for; None where it needs none or can't be read

    Each measured image counts alike, whatever its size: it gives as many quantiles as any other.
    """
    order = np.random.default_rng(0).permutation(count).tolist()
    found: list[np.ndarray] = []
    chunk = 64
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, count, chunk):
            of_chunk = pool.map(lambda position: _quantiles(deep_values(position)), order[start : start + chunk])
            found += [values for values in of_chunk if values is not None]
            if len(found) >= MOST_IMAGES:
                break
    found = found[:MOST_IMAGES]
    if not found:
        return Scale(0.0, 255.0, 1)
    pooled = np.sort(np.concatenate(found))
    low, high = (float(edge) for edge in np.percentile(pooled, PERCENTILES))
    if not low < high:
        low, high = float(pooled[0]), float(pooled[-1])
    return Scale(low, high if low < high else low + 1.0, len(found), pooled.astype(np.float32))


def _quantiles(values: np.ndarray | None) -> np.ndarray | None:
    """Return as many of the values as of any other image, sorted: those in the middle of equal parts."""
    if values is None or not values.size:
        return None
    flat = values.reshape(-1)
    if flat.size > 65536:
        flat = flat[:: flat.size // 65536]
    places = ((np.arange(_VALUES_PER_IMAGE) + 0.5) / _VALUES_PER_IMAGE * flat.size).astype(np.int64)
    return np.sort(flat)[places].astype(np.float64)


class ScaleOfSet:
    """The scale of a data set, measured when the first image asks for it.

    Parameters
    ----------
    declared : values that become black and white; None: measured
    measured : measures the scale
    """

    def __init__(self, declared: tuple[float, float] | None, measured: Callable[[], Scale]) -> None:
        self._lock = threading.Lock()
        self._measure = measured
        self._found = None if declared is None else Scale(*declared)

    def __call__(self) -> Scale:
        """Return the scale."""
        with self._lock:
            if self._found is None:
                self._found = self._measure()
            return self._found

    def forget(self) -> None:
        """Be as before the first image asked."""
        self._found = None

    @property
    def measured(self) -> Scale | None:
        """Return the scale if it was measured; None where no image asked for it, or it is declared."""
        return self._found if self._found is not None and self._found.images else None
