"""Does a model look at the region that matters: attention maps scored against masks, per image and over sites.

No image's own value leaves a site: `LocalisationSums` carry what pooled means and their intervals need, and add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from pydantic import model_validator

from chainward_shared.errors import DataError
from chainward_shared.evaluation.intervals import Z
from chainward_shared.outside import Count, Figure, Record, Total

if TYPE_CHECKING:
    from torch import Tensor

METRICS: Final = ("lift", "pointing", "auprc", "iou")


@dataclass(frozen=True)
class LocalisationValues:
    """The scores of each image that could be scored, float64 (n,). Stays where the images are.

    Attributes
    ----------
    lift : attention mass inside the region over the region's share of the image: 1 by chance, at most 1 / share
    pointing : 1 where the map's maximum lies inside the region, else 0 (pointing game, Zhang et al. 2016); of several
        equal maxima, the fraction inside
    auprc : area under the precision-recall curve of the pixels (average precision); the region's share by chance
    iou : intersection over union of the region and as many pixels as it has, those with the highest values. Of equal
        values at the threshold each counts in part, as if drawn at random
    rows : int64 (n,), which images these are
    left_out : images that can't be scored: the region is empty, or all of the image
    """

    lift: np.ndarray
    pointing: np.ndarray
    auprc: np.ndarray
    iou: np.ndarray
    rows: np.ndarray
    left_out: int

    def __len__(self) -> int:
        return len(self.lift)

    @classmethod
    def joined(cls, parts: Iterable[LocalisationValues]) -> LocalisationValues:
        """Return the values of several sets of images as one; `rows` count on from set to set."""
        parts = list(parts)
        ends = np.cumsum([0, *(len(part) + part.left_out for part in parts)])
        lift, pointing, auprc, iou = (
            np.concatenate([np.zeros(0), *(getattr(part, metric) for part in parts)]) for metric in METRICS
        )
        rows = [np.zeros(0, dtype=np.int64), *(part.rows + start for part, start in zip(parts, ends, strict=False))]
        return cls(lift, pointing, auprc, iou, np.concatenate(rows), left_out=sum(part.left_out for part in parts))


def score_maps(maps: Tensor, masks: Tensor) -> LocalisationValues:
    """Score attention maps against regions of interest.

    A map of zeros, of a model that looks nowhere in particular, scores as chance does: it counts as the same everywhere.

    Parameters
    ----------
    maps : float (n, h, w), nowhere negative; see `chainward_shared.evaluation.attention_maps`
    masks : uint8 (n, h, w), 1 inside the region

    Raises
    ------
    DataError
        The masks don't have the maps' shape or hold other values than 0 and 1, or a map is negative or not finite.
    """
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise DataError(
            f"masks of shape {tuple(masks.shape)} can't be scored against attention maps of shape {tuple(maps.shape)}: "
            "bring each to the size of its image"
        )
    if masks.numel() and int(masks.max()) > 1:
        raise DataError(f"a mask holds the value {int(masks.max())}: masks are 1 inside the region and 0 outside")
    if not (maps >= 0).all() or not maps.isfinite().all():
        raise DataError("an attention map is negative or not finite: was the model trained to the end?")
    values = maps.detach().flatten(1).double().cpu().numpy()
    inside = masks.flatten(1).bool().cpu().numpy()
    area = inside.sum(axis=1)
    rows = np.flatnonzero((area > 0) & (area < inside.shape[1]))
    scored = [_score(values[row], inside[row]) for row in rows]
    lift, pointing, auprc, iou = np.array(scored, dtype=np.float64).reshape(len(rows), len(METRICS)).T
    return LocalisationValues(lift, pointing, auprc, iou, rows, left_out=len(values) - len(rows))


def _score(values: np.ndarray, inside: np.ndarray) -> tuple[float, float, float, float]:
    """Return the four metrics, in the order of `METRICS`, of one map and region, both (pixels,)."""
    from sklearn.metrics import average_precision_score

    area, share = int(inside.sum()), float(inside.mean())
    total = values.sum()
    lift = values[inside].sum() / total / share if total > 0 else 1.0
    pointing = inside[values == values.max()].mean()
    threshold = np.partition(values, -area)[-area]
    above, at = values > threshold, values == threshold
    shared = inside[above].sum() + (area - above.sum()) * inside[at].mean()
    return (
        float(lift),
        float(pointing),
        float(average_precision_score(inside, values)),
        float(shared / (2 * area - shared)),
    )


class Interval(Record):
    """A mean over images and its 95 % confidence interval; `low` and `high` are None where one image is all there is."""

    mean: Figure
    low: Figure | None
    high: Figure | None


class LocalisationScores(Record):
    """How well a model's attention finds the regions of interest; the metrics are those of `LocalisationValues`, None
    without images.

    Attributes
    ----------
    n : images scored
    left_out : images whose region is empty or all of the image
    lift, pointing, auprc, iou : means over images. Lift first: regions differ in size, and it alone allows for that
    """

    n: Count
    left_out: Count
    lift: Interval | None
    pointing: Interval | None
    auprc: Interval | None
    iou: Interval | None


class Moments(Record):
    """Sum and sum of squares of one metric over images."""

    sum: Total = 0.0
    squares: Total = 0.0

    @classmethod
    def of(cls, column: np.ndarray) -> Moments:
        """Return those of values, (n,)."""
        return cls(sum=float(column.sum()), squares=float((column**2).sum()))

    def __add__(self, other: Moments) -> Moments:
        return Moments(sum=self.sum + other.sum, squares=self.squares + other.squares)


class LocalisationSums(Record):
    """What a site says of its images' scores: enough for means and intervals, additive over sites.

    The figures of a site with one scored image are that image's.

    Attributes
    ----------
    n, left_out : as in `LocalisationScores`
    lift, pointing, auprc, iou : sums over the images

    Raises
    ------
    pydantic.ValidationError
        A sum is negative, not finite, or can't be that of `n` values.
    """

    n: Count = 0
    left_out: Count = 0
    lift: Moments = Moments()
    pointing: Moments = Moments()
    auprc: Moments = Moments()
    iou: Moments = Moments()

    @model_validator(mode="after")
    def _possible(self) -> LocalisationSums:
        for metric in METRICS:
            moments: Moments = getattr(self, metric)
            slack = 1e-6 * (1 + moments.squares * self.n)
            if metric != "lift" and moments.sum > self.n * (1 + 1e-6):
                raise ValueError(f"{metric} sums to {moments.sum:g} over {self.n} images, each at most 1")
            if moments.sum**2 > moments.squares * self.n + slack:
                raise ValueError(f"{metric}: sum {moments.sum:g} and squares {moments.squares:g} of {self.n} images")
        return self

    @classmethod
    def of(cls, values: LocalisationValues) -> LocalisationSums:
        """Return the sums over the images of one site."""
        moments = {metric: Moments.of(getattr(values, metric)) for metric in METRICS}
        return cls(n=len(values), left_out=values.left_out, **moments)

    def __add__(self, other: LocalisationSums) -> LocalisationSums:
        moments = {metric: getattr(self, metric) + getattr(other, metric) for metric in METRICS}
        return LocalisationSums(n=self.n + other.n, left_out=self.left_out + other.left_out, **moments)

    def scores(self) -> LocalisationScores:
        """Return means with intervals by the normal approximation, cut off at the ends of a metric's range.

        Every image counts the same, whichever its site. With few images (below some 30) the interval is too narrow.
        """
        intervals = {metric: self._interval(metric) for metric in METRICS}
        return LocalisationScores(n=self.n, left_out=self.left_out, **intervals)

    def _interval(self, metric: str) -> Interval | None:
        if self.n == 0:
            return None
        moments: Moments = getattr(self, metric)
        mean = moments.sum / self.n
        if self.n == 1:
            return Interval(mean=mean, low=None, high=None)
        variance = max(0.0, moments.squares - self.n * mean**2) / (self.n - 1)
        half = Z * math.sqrt(variance / self.n)
        top = math.inf if metric == "lift" else 1.0
        return Interval(mean=mean, low=max(0.0, mean - half), high=min(top, mean + half))


def pool_sums(parts: Iterable[LocalisationSums]) -> LocalisationSums:
    """Return the sums over the images of several sites."""
    return sum(parts, start=LocalisationSums())
