"""Scores of a classifier at one site, and of several sites together without any case leaving its site.

A site sends counts, not cases: a confusion matrix, calibration bins, and histograms of the scores. They add up over the
sites, and the pooled accuracy, balanced accuracy and calibration error that follow are exact. The pooled area under the
ROC curve treats scores within one of `SCORE_BINS` bins as ties. The bins are equal in asinh of the log-odds, 0.004 wide
around even odds and wider towards the extremes, so that the scores of an overconfident model stay apart: from some
hundred cases on the area is within 0.002 of the exact one (tests compare); of few cases each tie weighs half a pair.

Labels (n,) are class indices; labels (n, classes) of 0 and 1 are multi-label, where every class is decided for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from chainward_shared.errors import WeightsError
from chainward_shared.evaluation.scores import Scores
from chainward_shared.outside import MAX_COUNT
from chainward_shared.task import Task

if TYPE_CHECKING:
    import torch
    from flwr.app import ArrayRecord

CALIBRATION_BINS = 15
SCORE_BINS = 4096
LOG_ODDS_RANGE = 700.0
DECISION = 0.5
"""Multi-label: from this probability on a finding counts as found."""

ClassScores = np.ndarray
"""float64 (n, classes): probabilities; rows sum to 1. Multi-label: that of each finding."""


def evaluate(probabilities: ClassScores, labels: np.ndarray) -> Scores:
    """Return the scores of one model on one set of cases, exactly.

    Parameters
    ----------
    probabilities : float (n, classes); rows sum to 1, but not if multi-label
    labels : int (n,), or 0 and 1 (n, classes) if multi-label
    """
    pooled = pool([PredictionCounts.of(probabilities, labels)])
    return pooled.model_copy(update={"macro_auc": _macro_auc(probabilities, labels)})


def _macro_auc(probabilities: ClassScores, labels: np.ndarray) -> float | None:
    """Return the mean area of the classes that divide the cases, each from the sum of its ranks (Hanley and McNeil, 1982).

    As `sklearn.metrics.roc_auc_score` of each class, whose checks of its input take longer than a small hospital's scores.
    """
    from scipy.stats import rankdata

    of_class = _of_class(labels, probabilities.shape[1])
    cases = of_class.sum(axis=0)
    others = len(labels) - cases
    divides = (cases > 0) & (others > 0)
    if not divides.any():
        return None
    ranks = np.where(of_class, rankdata(probabilities, axis=0), 0.0).sum(axis=0)
    won = ranks - cases * (cases + 1) / 2
    return float(np.mean(won[divides] / (cases * others)[divides]))


def _of_class(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return which cases are of which class, bool (n, classes)."""
    of_class: np.ndarray = labels > 0.5 if labels.ndim == 2 else labels[:, None] == np.arange(classes)
    return of_class


@dataclass(frozen=True)
class PredictionCounts:
    """Sums over cases from which pooled scores follow; those of two sites add up.

    Attributes
    ----------
    confusion : int64 (classes, classes), rows are labels, columns predictions; multi-label: (classes, 2, 2), that of each
        finding, absent before present
    calibration : float64 (CALIBRATION_BINS, 3): cases, sum of confidences, cases classified correctly; multi-label: of
        decisions instead of cases
    histograms : int64 (classes, 2, SCORE_BINS): cases by the score of each class; [k, 1] those of class k, [k, 0] others
    """

    confusion: np.ndarray
    calibration: np.ndarray
    histograms: np.ndarray

    @classmethod
    def of(cls, probabilities: ClassScores, labels: np.ndarray) -> PredictionCounts:
        """Count the predictions of one model at one site; shapes as in `evaluate`."""
        classes = probabilities.shape[1]
        of_class = _of_class(labels, classes)
        if labels.ndim == 2:
            decided = probabilities >= DECISION
            confusion = np.zeros((classes, 2, 2), dtype=np.int64)
            columns = np.broadcast_to(np.arange(classes), decided.shape)
            np.add.at(confusion, (columns, of_class.astype(np.int64), decided.astype(np.int64)), 1)
            confidence = np.where(decided, probabilities, 1 - probabilities).reshape(-1)
            correct = (decided == of_class).reshape(-1)
            of_others = 1 - probabilities
        else:
            predictions = probabilities.argmax(axis=1)
            confusion = np.zeros((classes, classes), dtype=np.int64)
            np.add.at(confusion, (labels, predictions), 1)
            confidence = probabilities.max(axis=1)
            correct = predictions == labels
            # Not 1 - p: that would lose what is left beside a class that is nearly certain.
            of_others = np.stack([np.delete(probabilities, k, axis=1).sum(axis=1) for k in range(classes)], axis=1)
        bins = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
        calibration = np.zeros((CALIBRATION_BINS, 3))
        np.add.at(calibration, bins, np.stack([np.ones_like(confidence), confidence, correct], axis=1))
        histograms = np.zeros((classes, 2, SCORE_BINS), dtype=np.int64)
        for k in range(classes):
            column = _score_bin(probabilities[:, k], of_others[:, k])
            for present in (0, 1):
                histograms[k, present] = np.bincount(column[of_class[:, k] == bool(present)], minlength=SCORE_BINS)
        return cls(confusion, calibration, histograms)


COUNT_FIELDS = tuple(field.name for field in fields(PredictionCounts))


def _score_bin(of_class: np.ndarray, of_others: np.ndarray) -> np.ndarray:
    """Return the bin of each score, int64 (n,), from the probability of the class and of all others."""
    tiny = np.finfo(np.float64).tiny
    log_odds = np.log(np.maximum(of_class, tiny)) - np.log(np.maximum(of_others, tiny))
    position = np.arcsinh(log_odds) / np.arcsinh(LOG_ODDS_RANGE)
    return ((position + 1) / 2 * SCORE_BINS).astype(np.int64).clip(0, SCORE_BINS - 1)


def pool(counts: Iterable[PredictionCounts]) -> Scores:
    """Return the scores over all cases that were counted."""
    parts = list(counts)
    confusion, calibration, histograms = (
        reduce(np.add, (getattr(part, name) for part in parts)) for name in COUNT_FIELDS
    )
    decisions = int(confusion.sum())
    if decisions == 0:
        return Scores(n=0, accuracy=None, balanced_accuracy=None, macro_auc=None, ece=None)
    per_class = confusion.sum(axis=-1)
    correct = np.diagonal(confusion, axis1=-2, axis2=-1)
    # Of a finding that every case has, or none, half of the balanced accuracy is undefined.
    judged = per_class > 0 if confusion.ndim == 2 else (per_class > 0).all(axis=1)
    recalls = correct[judged] / per_class[judged]
    calibrated = calibration[:, 0].sum()  # a site that adds noise sends its confusion matrix alone
    gaps = np.abs(calibration[:, 2] - calibration[:, 1]).sum() / max(calibrated, 1)
    areas = [area for area in map(_binned_auc, histograms) if not math.isnan(area)]
    return Scores(
        n=decisions if confusion.ndim == 2 else decisions // len(confusion),
        accuracy=float(correct.sum() / decisions),
        balanced_accuracy=float(recalls.mean()) if recalls.size else None,
        macro_auc=float(np.mean(areas)) if areas else None,
        ece=float(gaps) if calibrated else None,
    )


def check_scores(scores: Scores, counts: PredictionCounts, class_counts: Sequence[int] | None = None) -> None:
    """Check that a site's scores are those of the predictions that it counted, and these of the cases that it has.

    The area under the ROC curve is not compared: the binned counts give it only about, and of few cases badly.

    Parameters
    ----------
    scores, counts : what it says of a model
    class_counts : cases of each class that it has declared; multi-label: with each finding. Default: it has declared none

    Raises
    ------
    WeightsError
        They contradict each other.
    """
    counted = pool([counts])
    for name in ("n", "accuracy", "balanced_accuracy", "ece"):
        said, follows = getattr(scores, name), getattr(counted, name)
        if (said is None) != (follows is None) or (said is not None and not abs(said - follows) <= 1e-6):
            raise WeightsError(
                f"its {name.replace('_', ' ')} is {said}; {follows} follows from the predictions that it counted"
            )
    _check_totals(counts)
    if class_counts is not None:
        cases = counts.confusion.sum(axis=-1) if counts.confusion.ndim == 2 else counts.confusion[:, 1].sum(axis=-1)
        if cases.tolist() != list(class_counts):
            raise WeightsError(
                f"it counted {cases.tolist()} cases of the classes; it has declared {list(class_counts)}"
            )


def _check_totals(counts: PredictionCounts) -> None:
    """Check that calibration and histograms are of the cases in the confusion matrix, or (with noise) of none at all.

    They weigh a site's share in pooled figures, each for itself.

    Raises
    ------
    WeightsError
        They are of more or fewer.
    """
    decisions, single = int(counts.confusion.sum()), counts.confusion.ndim == 2
    calibrated = float(counts.calibration[:, 0].sum())
    if calibrated and abs(calibrated - decisions) > 0.5:
        raise WeightsError(f"its calibration is of {calibrated:g} decisions; it counted {decisions}")
    cases = decisions if single else decisions // len(counts.confusion)
    for scored in counts.histograms.sum(axis=(1, 2)).tolist():
        if scored not in (0, cases):
            raise WeightsError(f"its scores of a class are of {scored} cases; it counted {cases}")


def _binned_auc(histogram: np.ndarray) -> float:
    """Return the area under the ROC curve of one class, scores in one bin counted as ties; NaN without both kinds."""
    negatives, positives = histogram.astype(np.float64)
    pairs = negatives.sum() * positives.sum()
    if pairs == 0:
        return math.nan
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs)


def counts_to_state(counts: PredictionCounts) -> dict[str, torch.Tensor]:
    """Return the counts as tensors by name."""
    import torch

    return {name: torch.from_numpy(getattr(counts, name)) for name in COUNT_FIELDS}


def counts_to_arrays(counts: PredictionCounts) -> ArrayRecord:
    """Return the counts as Flower arrays."""
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(getattr(counts, name)) for name in COUNT_FIELDS})


def counts_from_arrays(arrays: ArrayRecord, classes: int, task: Task = "single") -> PredictionCounts:
    """Return the counts in `arrays`.

    Raises
    ------
    WeightsError
        Names, shapes, dtypes or values are not those of counts over `classes` classes in such a task.
    """
    from chainward_shared.weights import from_full_arrays

    return counts_from_state(from_full_arrays(arrays, counts_template(classes, task)))


def counts_template(classes: int, task: Task = "single") -> dict[str, torch.Tensor]:
    """Return names, shapes and dtypes of counts over `classes` classes."""
    import torch

    return {
        "confusion": torch.zeros((classes, classes) if task == "single" else (classes, 2, 2), dtype=torch.int64),
        "calibration": torch.zeros((CALIBRATION_BINS, 3), dtype=torch.float64),
        "histograms": torch.zeros((classes, 2, SCORE_BINS), dtype=torch.int64),
    }


def counts_from_state(state: Mapping[str, torch.Tensor]) -> PredictionCounts:
    """Return the counts in tensors of the names, shapes and dtypes of `counts_template`.

    Raises
    ------
    WeightsError
        A value can't be a count.
    """
    values = {name: state[name].numpy() for name in COUNT_FIELDS}
    for name, array in values.items():
        if not ((array >= 0) & (array <= MAX_COUNT)).all():
            raise WeightsError(f"counts of predictions: a value of '{name}' is not between 0 and {MAX_COUNT:,}")
    return PredictionCounts(**values)
