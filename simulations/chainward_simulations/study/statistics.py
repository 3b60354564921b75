"""Spread over seeds, and paired differences between arms with bootstrap intervals over patients and seeds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from chainward_shared.evaluation.classification import DECISION
from chainward_shared.evaluation.localisation import METRICS as LOCALISATION
from chainward_shared.seeds import numpy_generator
from chainward_simulations.study.predictions import Predictions

Metric = Literal["balanced_accuracy", "macro_auc", "lift"]
COMPARED: tuple[Metric, ...] = ("balanced_accuracy", "macro_auc", "lift")
RESAMPLES = 1000
COVERAGE = 0.95


@dataclass(frozen=True)
class Spread:
    """One figure over the seeds; `sd` is that of a sample (n-1), None for a single seed."""

    mean: float
    sd: float | None
    least: float
    most: float
    seeds: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """Return mean and spread of those values that there are; None without any."""
    found = np.array([value for value in values if value is not None])
    if not len(found):
        return None
    return Spread(
        mean=float(found.mean()),
        sd=float(found.std(ddof=1)) if len(found) > 1 else None,
        least=float(found.min()),
        most=float(found.max()),
        seeds=len(found),
    )


@dataclass(frozen=True)
class Difference:
    """An arm minus the reference arm, on the same images.

    Attributes
    ----------
    per_seed : the difference of each seed
    mean : their mean
    low, high : bootstrap interval of the mean (percentiles, `COVERAGE`)
    """

    per_seed: dict[int, float]
    mean: float
    low: float
    high: float


class PairedBootstrap:
    """Differences between arms under the same resamples of patients and seeds.

    A resample draws patients with replacement, all images of a patient together, the same patients for every arm and
    for every seed in which they are in the test split; and it draws seeds with replacement. Its figure is the mean over
    the seeds drawn. So the interval holds both what other patients and what other seeds would change. With a handful of
    seeds it understates the latter: look at the differences of the seeds themselves, too.

    Parameters
    ----------
    reference : predictions of the reference arm, by seed
    """

    def __init__(self, reference: Mapping[int, Predictions], resamples: int = RESAMPLES) -> None:
        self.reference, self.resamples = dict(reference), resamples
        weights = patient_weights([one.group for one in reference.values()], resamples)
        self._weights = dict(zip(reference, weights, strict=True))
        self._of_reference = {seed: resampled_metrics(one, self._weights[seed]) for seed, one in reference.items()}

    def difference(self, arm: Mapping[int, Predictions], metric: Metric) -> Difference | None:
        """Return the arm's difference to the reference over the seeds that both have; None where there is none.

        Raises
        ------
        ValueError
            The two were not scored on the same images.
        """
        seeds = [seed for seed in self.reference if seed in arm]
        for seed in seeds:
            mine, its = arm[seed], self.reference[seed]
            if not (np.array_equal(mine.labels, its.labels) and np.array_equal(mine.group, its.group)):
                raise ValueError(f"seed {seed}: the arms were scored on different images")
        per_seed, resampled = {}, []
        for seed in seeds:
            gained = metric_of(arm[seed], metric) - metric_of(self.reference[seed], metric)
            if np.isnan(gained):
                continue
            per_seed[seed] = gained
            resampled.append(
                resampled_metrics(arm[seed], self._weights[seed])[metric] - self._of_reference[seed][metric]
            )
        if not per_seed:
            return None
        drawn = numpy_generator(0, "study", "bootstrap", "seeds").integers(
            len(resampled), size=(self.resamples, len(resampled))
        )
        figures = np.nanmean(np.stack(resampled)[drawn, np.arange(self.resamples)[:, None]], axis=1)
        low, high = np.nanquantile(figures, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
        return Difference(per_seed, float(np.mean(list(per_seed.values()))), float(low), float(high))


def patient_weights(groups: Sequence[np.ndarray], resamples: int) -> list[np.ndarray]:
    """Return how often each case is in each resample, float32 (n, resamples), one array per test set.

    Parameters
    ----------
    groups : the patient of each case, int64 (n,), one array per seed; a patient of several has one draw for all
    """
    everybody = np.unique(np.concatenate(groups)) if groups else np.empty(0, dtype=np.int64)
    count = len(everybody)
    generator = numpy_generator(0, "study", "bootstrap", "patients")
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples).T if count else np.empty((0, 0))
    return [drawn[np.searchsorted(everybody, group)].astype(np.float32) for group in groups]


def metric_of(predictions: Predictions, metric: Metric) -> float:
    """Return the mean over the models of one figure on all images; NaN where it is not defined."""
    if metric == "lift":
        localised = predictions.localised()
        return float("nan") if localised is None else localised["lift"]
    values = [getattr(scores, metric) for scores in predictions.pooled()]
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else float("nan")


def resampled_metrics(predictions: Predictions, weights: np.ndarray) -> dict[Metric, np.ndarray]:
    """Return each figure in each resample, mean over the models, float64 (resamples,); NaN where it is not defined.

    Parameters
    ----------
    weights : how often each case counts, float32 (n, resamples)
    """
    classes = predictions.probabilities.shape[2]
    labels = predictions.labels
    of_class = labels > 0.5 if labels.ndim == 2 else labels[:, None] == np.arange(classes)
    balanced, areas = [], []
    for probabilities in predictions.probabilities:
        balanced.append(_balanced_accuracy(probabilities, of_class, labels.ndim == 2, weights))
        areas.append(_mean_defined([_area(probabilities[:, k], of_class[:, k], weights) for k in range(classes)]))
    resampled: dict[Metric, np.ndarray] = {
        "balanced_accuracy": np.mean(balanced, axis=0),
        "macro_auc": np.mean(areas, axis=0),
    }
    if predictions.has_regions:
        lifts = predictions.localisation[:, LOCALISATION.index("lift")]
        scored = np.isfinite(lifts[0])
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled["lift"] = lifts[:, scored].mean(axis=0) @ weights[scored] / weights[scored].sum(axis=0)
    return resampled


def _balanced_accuracy(
    probabilities: np.ndarray, of_class: np.ndarray, multilabel: bool, weights: np.ndarray
) -> np.ndarray:
    if multilabel:
        found = probabilities >= DECISION
        sensitivity = _rate((found & of_class).T, of_class.T, weights)
        specificity = _rate((~found & ~of_class).T, (~of_class).T, weights)
        return _mean_defined(list((sensitivity + specificity) / 2))
    hit = np.eye(of_class.shape[1], dtype=bool)[probabilities.argmax(axis=1)] & of_class
    return _mean_defined(list(_rate(hit.T, of_class.T, weights)))


def _rate(hits: np.ndarray, cases: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted fraction of hits among cases, (classes, resamples); bool (classes, n), weights (n, resamples)."""
    total = cases.astype(np.float32) @ weights
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, (hits.astype(np.float32) @ weights) / total, np.nan).astype(np.float64)


def _area(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted area under the ROC curve in each resample, ties counted half; NaN without both kinds."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0]) if len(order) else np.empty(0, dtype=np.int64)
    ranked = weights[order]  # whole counts: float32 sums of them are exact up to 2^24
    positives = np.add.reduceat(np.where(positive[order, None], ranked, 0), starts, axis=0)
    negatives = np.add.reduceat(ranked, starts, axis=0) - positives
    below = np.cumsum(negatives, axis=0) - negatives
    won = np.einsum("gb,gb->b", positives.astype(np.float64), below + negatives / 2)
    pairs = positives.sum(axis=0, dtype=np.float64) * negatives.sum(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, won / pairs, np.nan)


def _mean_defined(rows: list[np.ndarray]) -> np.ndarray:
    """Return the mean over the rows that are not NaN, for each resample; NaN where all are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(np.stack(rows), axis=0))
