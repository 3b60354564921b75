"""Calibration and operating points, class by class, from the counts of validation images that sites send anyway.

A class's log-odds are those of its probability against all other classes together. `PredictionCounts` hold them in narrow
bins, so that thresholds, a temperature and reliability follow from sums over the sites, and no case leaves one.

Calibrated is each class for itself: its log-odds divided by one temperature for all of them (temperature scaling, Guo et al.
2017, one class against the rest as in Zadrozny & Elkan 2002). Of two classes, and multi-label, that is temperature scaling of the
logits; of more classes the calibrated probabilities of an image need not sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import Field

from chainward_shared.evaluation.classification import LOG_ODDS_RANGE, SCORE_BINS, PredictionCounts
from chainward_shared.evaluation.intervals import wilson
from chainward_shared.outside import Count, Figure, Fraction, Line, PerClass, Record

MIN_CASES = 10
"""Validation images of a class, and of all others, from which a threshold is chosen; test images below which a report warns."""

MIN_IMAGES = 30
"""Validation images from which a temperature is fitted."""

COLDEST, HOTTEST = 0.1, 10.0
"""Between these the temperature is looked for."""

RELIABILITY_BINS = 10
THRESHOLDS = tuple(step / 50 for step in range(1, 50))
"""Probabilities at which the net benefit of a decision curve is computed."""

Interval = tuple[float, float] | None


class Tally(Record):
    """How a yes-or-no decision about one class came out.

    Attributes
    ----------
    cases, others : images of the class, and of all others
    found : images of the class that were called so
    cleared : images of others that were not
    """

    cases: Count
    others: Count
    found: Count
    cleared: Count

    @property
    def sensitivity(self) -> float | None:
        """Return the share of the class's images that were found; None without any."""
        return self.found / self.cases if self.cases else None

    @property
    def specificity(self) -> float | None:
        """Return the share of the others that were cleared; None without any."""
        return self.cleared / self.others if self.others else None

    @property
    def sensitivity_interval(self) -> Interval:
        """Return the ends of its 95 % interval; see `wilson`."""
        return wilson(self.found, self.cases)

    @property
    def specificity_interval(self) -> Interval:
        """Return the ends of its 95 % interval; see `wilson`."""
        return wilson(self.cleared, self.others)

    @property
    def few(self) -> bool:
        """Return whether there are too few images to say anything."""
        return min(self.cases, self.others) < MIN_CASES


class OperatingPoint(Record):
    """From where on a class counts as found: where sensitivity + specificity is largest on validation images (Youden 1950).

    Attributes
    ----------
    log_odds : of the class against all others, from which on it is found; None where there is no point
    validation : what that gives on the validation images it was chosen on; None likewise
    missing : why there is none; None where there is one
    """

    log_odds: Figure | None = None
    validation: Tally | None = None
    missing: Line | None = None

    @property
    def threshold(self) -> float | None:
        """Return the same as a probability of the model."""
        return None if self.log_odds is None else 1 / (1 + math.exp(-self.log_odds))


class Calibration(Record):
    """The temperature by which log-odds are divided.

    Attributes
    ----------
    temperature : above 1: the model is more certain than it is right; None where none could be fitted
    images : validation images it was fitted on
    loss_before, loss_after : mean over images and classes of the negative log-likelihood of "is it of the class?", in nats
    missing : why there is none; None where there is one
    """

    temperature: float | None = Field(None, ge=COLDEST / 10, le=HOTTEST * 10)
    images: Count = 0
    loss_before: Figure | None = None
    loss_after: Figure | None = None
    missing: Line | None = None


class ReliabilityBin(Record):
    """Decisions "is it of the class?" whose probability is alike: how many, their mean probability, and how often it was so."""

    decisions: Count
    probability: Fraction
    share: Fraction


def summed(counts: Iterable[PredictionCounts]) -> np.ndarray:
    """Return the histograms of several sites as one, int64 (classes, 2, SCORE_BINS)."""
    total: np.ndarray = sum((part.histograms for part in counts), start=np.zeros((), dtype=np.int64))
    return total


def edge(index: int | np.ndarray) -> np.ndarray:
    """Return the log-odds at which bins of `PredictionCounts.histograms` begin."""
    found: np.ndarray = np.sinh((np.asarray(index) / SCORE_BINS * 2 - 1) * np.arcsinh(LOG_ODDS_RANGE))
    return found


def middles() -> np.ndarray:
    """Return the log-odds in the middle of every bin, float64 (SCORE_BINS,)."""
    return edge(np.arange(SCORE_BINS) + 0.5)


def fitted_temperature(histograms: np.ndarray) -> Calibration:
    """Return the temperature under which the validation images are most likely.

    Parameters
    ----------
    histograms : int64 (classes, 2, SCORE_BINS), see `PredictionCounts`
    """
    from scipy.optimize import minimize_scalar

    images = int(histograms[0].sum()) if histograms.ndim else 0
    if images < MIN_IMAGES:
        return Calibration(images=images, missing=_too_few(images, "validation images", MIN_IMAGES))

    def loss(temperature: float) -> float:
        scaled = middles() / temperature
        nats = histograms[:, 1] * np.logaddexp(0, -scaled) + histograms[:, 0] * np.logaddexp(0, scaled)
        return float(nats.sum() / histograms.sum())

    bounds = (math.log(COLDEST), math.log(HOTTEST))
    best = float(minimize_scalar(lambda log: loss(math.exp(log)), bounds=bounds, method="bounded").x)
    if min(best - bounds[0], bounds[1] - best) < 0.01:
        words = f"on {images} validation images no temperature between {COLDEST:g} and {HOTTEST:g} is best"
        return Calibration(images=images, missing=words)
    temperature = math.exp(best)
    return Calibration(temperature=temperature, images=images, loss_before=loss(1.0), loss_after=loss(temperature))


def operating_points(histograms: np.ndarray, classes: int) -> list[OperatingPoint]:
    """Return the operating point of every class; parameters as in `fitted_temperature`."""
    if not histograms.ndim:
        return [OperatingPoint(missing=_too_few(0, "validation images of the class", MIN_CASES))] * classes
    return [_operating_point(histogram) for histogram in histograms]


def _operating_point(histogram: np.ndarray) -> OperatingPoint:
    others, cases = (int(count) for count in histogram.sum(axis=1))
    for count, what in ((cases, "of the class"), (others, "of other classes")):
        if count < MIN_CASES:
            return OperatingPoint(missing=_too_few(count, f"validation images {what}", MIN_CASES))
    below = np.cumsum(histogram, axis=1)  # of bins up to this one: what a threshold at the next edge leaves out
    gain = below[0] * cases - below[1] * others  # whole numbers, so that equal is equal
    best = np.flatnonzero(gain == gain.max())
    ends = np.flatnonzero(np.diff(best) > 1)
    plateau = best[: ends[0] + 1] if len(ends) else best
    index = int(plateau[len(plateau) // 2]) + 1
    return OperatingPoint(log_odds=float(edge(index)), validation=tally_at(histogram, index))


def tally_at(histogram: np.ndarray, index: int) -> Tally:
    """Return how the decision "from bin `index` on" comes out; `histogram`: int (2, SCORE_BINS) of one class."""
    others, cases = (int(count) for count in histogram.sum(axis=1))
    return Tally(
        cases=cases, others=others, found=int(histogram[1, index:].sum()), cleared=int(histogram[0, :index].sum())
    )


def tallies_at(histograms: np.ndarray, points: Sequence[OperatingPoint]) -> list[Tally | None]:
    """Return how each class's images come out at its operating point; None where it has none, or nothing was counted."""
    if not histograms.any():
        return [None] * len(points)
    return [
        None if point.log_odds is None else tally_at(histogram, _index(point.log_odds))
        for histogram, point in zip(histograms, points, strict=True)
    ]


def tallies_decided(confusion: np.ndarray) -> list[Tally]:
    """Return how each class comes out as the model decides: by its largest probability, or multi-label at 0.5.

    Parameters
    ----------
    confusion : see `PredictionCounts`
    """
    if confusion.ndim == 3:
        return [
            Tally(cases=int(of[1].sum()), others=int(of[0].sum()), found=int(of[1, 1]), cleared=int(of[0, 0]))
            for of in confusion
        ]
    total, of_each = int(confusion.sum()), (confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal())
    return [
        Tally(cases=cases, others=total - cases, found=found, cleared=total - cases - (called - found))
        for cases, called, found in zip(*(counts.tolist() for counts in of_each), strict=True)
    ]


def reliability(histograms: np.ndarray, temperature: float = 1.0) -> list[ReliabilityBin]:
    """Return how often decisions of like probability are right, all classes together; empty bins are left out."""
    if not histograms.any():
        return []
    probability = 1 / (1 + np.exp(-np.clip(middles() / temperature, -500, 500)))
    bins = np.minimum((probability * RELIABILITY_BINS).astype(np.int64), RELIABILITY_BINS - 1)
    both, true = histograms.sum(axis=(0, 1)), histograms[:, 1].sum(axis=0)
    count, mean, hits = (np.bincount(bins, weights, RELIABILITY_BINS) for weights in (both, both * probability, true))
    return [
        ReliabilityBin(decisions=int(n), probability=float(m / n), share=float(h / n))
        for n, m, h in zip(count, mean, hits, strict=True)
        if n
    ]


def net_benefits(histograms: np.ndarray, temperature: float = 1.0) -> PerClass[list[float]]:
    """Return the net benefit of acting on each class's calibrated probability from each of `THRESHOLDS` on.

    Net benefit: true positives less false positives weighted by the odds of the threshold, per image (Vickers & Elkin 2006).
    """
    if not histograms.any():
        return []
    indices = [_index(temperature * math.log(at / (1 - at))) for at in THRESHOLDS]
    curves = []
    for histogram in histograms:
        images = int(histogram.sum())
        curve = []
        for at, index in zip(THRESHOLDS, indices, strict=True):
            true, false = (float(histogram[kind, index:].sum()) / images for kind in (1, 0))
            curve.append(true - false * at / (1 - at))
        curves.append(curve)
    return curves


def _index(log_odds: float) -> int:
    """Return the first bin from `log_odds` on; exact for those that `edge` gives."""
    position = (math.asinh(log_odds) / math.asinh(LOG_ODDS_RANGE) + 1) / 2 * SCORE_BINS
    return min(SCORE_BINS, max(0, math.ceil(position - 1e-6)))


def _too_few(count: int, what: str, wanted: int) -> str:
    counted = what.replace("images", "image", 1) if count == 1 else what
    return f"{count} {counted} whose scores may be seen; expected at least {wanted}"
