"""The scores where an image may have several findings: against scikit-learn, at one site and pooled from counts."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from chainward_shared.errors import WeightsError
from chainward_shared.evaluation.classification import (
    PredictionCounts,
    counts_from_arrays,
    counts_to_arrays,
    evaluate,
    pool,
)
from chainward_shared.evaluation.scores import Scores

NOTHING = Scores(n=0, accuracy=None, balanced_accuracy=None, macro_auc=None, ece=None)


def problem(seed: int, n: int, classes: int = 4, confidence: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are right more often than not, and 0/1 labels of findings from common to rare."""
    generator = np.random.default_rng(seed)
    labels = (generator.random((n, classes)) < np.linspace(0.5, 0.1, classes)).astype(np.float32)
    logits = confidence * (generator.normal(size=(n, classes)) + 2 * labels - 1)
    return 1 / (1 + np.exp(-logits)), labels


def in_parts(probabilities: np.ndarray, labels: np.ndarray, cuts: list[int]) -> list[PredictionCounts]:
    parts = zip(np.split(probabilities, cuts), np.split(labels, cuts), strict=True)
    return [PredictionCounts.of(p, y) for p, y in parts]


def slow_ece(probabilities: np.ndarray, labels: np.ndarray) -> float:
    decisions = []
    for row, truth in zip(probabilities, labels, strict=True):
        for p, y in zip(row, truth, strict=True):
            decisions.append((max(p, 1 - p), (p >= 0.5) == bool(y)))
    total = 0.0
    for b in range(15):
        inside = [(c, right) for c, right in decisions if b / 15 <= c < ((b + 1) / 15 if b < 14 else 1.1)]
        total += abs(sum(c for c, _ in inside) - sum(right for _, right in inside))
    return total / len(decisions)


EACH_PROBLEM = pytest.mark.parametrize(
    ("seed", "n", "classes", "confidence"), [(0, 200, 4, 1.0), (1, 500, 2, 3.0), (2, 300, 9, 0.2), (3, 400, 4, 15.0)]
)


@EACH_PROBLEM
def test_the_scores_are_those_of_scikit_learn_finding_by_finding(seed, n, classes, confidence):
    probabilities, labels = problem(seed, n, classes, confidence)
    decided = probabilities >= 0.5
    each = range(classes)
    scores = evaluate(probabilities, labels)
    assert scores.n == n
    assert scores.accuracy == pytest.approx(accuracy_score(labels.reshape(-1), decided.reshape(-1)), abs=1e-12)
    balanced = np.mean([balanced_accuracy_score(labels[:, k], decided[:, k]) for k in each])
    assert scores.balanced_accuracy == pytest.approx(balanced, abs=1e-12)
    assert scores.macro_auc == pytest.approx(roc_auc_score(labels, probabilities, average="macro"), abs=1e-12)
    assert scores.ece == pytest.approx(slow_ece(probabilities, labels), abs=1e-12)


def test_findings_that_no_case_has_or_every_case_has_count_in_no_mean_but_in_accuracy():
    probabilities, labels = problem(0, 100)
    labels[:, 1], labels[:, 2] = 0, 1
    scores = evaluate(probabilities, labels)
    kept = evaluate(probabilities[:, [0, 3]], labels[:, [0, 3]])
    assert (scores.balanced_accuracy, scores.macro_auc) == (kept.balanced_accuracy, kept.macro_auc)
    assert scores.accuracy == ((probabilities >= 0.5) == labels).mean()


def test_where_no_finding_can_be_judged_the_means_are_missing_and_accuracy_is_not():
    scores = evaluate(np.array([[0.9, 0.1], [0.6, 0.6]]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert (scores.n, scores.accuracy) == (2, 0.75)
    assert (scores.balanced_accuracy, scores.macro_auc) == (None, None)


def test_always_saying_no_is_worth_half_however_rare_the_findings():
    labels = np.zeros((50, 3))
    labels[:2] = 1
    scores = evaluate(np.full((50, 3), 0.01), labels)
    assert (scores.accuracy, scores.balanced_accuracy, scores.macro_auc) == (0.96, 0.5, 0.5)


def test_even_odds_are_a_finding_found():
    counts = PredictionCounts.of(np.array([[0.5, np.nextafter(0.5, 0)]]), np.array([[1.0, 1.0]]))
    assert counts.confusion.tolist() == [[[0, 0], [0, 1]], [[0, 0], [1, 0]]]


@EACH_PROBLEM
def test_pooled_scores_are_those_over_all_cases_together(seed, n, classes, confidence):
    probabilities, labels = problem(seed, n, classes, confidence)
    together = evaluate(probabilities, labels)
    pooled = pool(in_parts(probabilities, labels, [n // 7, n // 7, n // 2]))
    assert (pooled.n, pooled.accuracy, pooled.balanced_accuracy) == (n, together.accuracy, together.balanced_accuracy)
    assert pooled.ece == pytest.approx(together.ece, abs=1e-12)
    assert pooled.macro_auc == pytest.approx(together.macro_auc, abs=0.002)


def test_a_site_that_has_a_finding_in_no_case_still_counts_for_its_specificity():
    probabilities, labels = problem(4, 200)
    order = np.argsort(-labels[:, 3], kind="stable")  # all cases of the rarest finding at the first site
    probabilities, labels = probabilities[order], labels[order]
    parts = in_parts(probabilities, labels, [int(labels[:, 3].sum())])
    assert pool(parts).balanced_accuracy == evaluate(probabilities, labels).balanced_accuracy


def test_a_site_without_cases_changes_nothing():
    alone = PredictionCounts.of(*problem(0, 50))
    empty = PredictionCounts.of(np.zeros((0, 4)), np.zeros((0, 4), dtype=np.float32))
    assert pool([empty, alone]) == pool([alone])
    assert pool([empty, empty]) == NOTHING


def test_counts_arrive_as_they_were_sent():
    counts = PredictionCounts.of(*problem(0, 80))
    assert counts.confusion.shape == (4, 2, 2)
    assert pool([counts_from_arrays(counts_to_arrays(counts), 4, "multilabel")]) == pool([counts])


def test_counts_of_the_other_task_are_refused():
    multi = counts_to_arrays(PredictionCounts.of(*problem(0, 80)))
    with pytest.raises(WeightsError, match=r"'confusion': shape \(4, 2, 2\); expected \(4, 4\)"):
        counts_from_arrays(multi, 4)
    with pytest.raises(WeightsError, match=r"'confusion': shape \(3, 2, 2\); expected \(4, 2, 2\)"):
        multi["confusion"] = Array(np.zeros((3, 2, 2), np.int64))
        counts_from_arrays(multi, 4, "multilabel")
    single = counts_to_arrays(PredictionCounts.of(np.eye(4), np.arange(4)))
    with pytest.raises(WeightsError, match=r"'confusion': shape \(4, 4\); expected \(4, 2, 2\)"):
        counts_from_arrays(single, 4, "multilabel")
