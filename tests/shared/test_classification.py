"""The scores of a classifier: against scikit-learn and slow loops, at one site and pooled from counts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from flwr.app import Array
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from chainward_shared.errors import WeightsError
from chainward_shared.evaluation.classification import (
    CALIBRATION_BINS,
    SCORE_BINS,
    PredictionCounts,
    check_scores,
    counts_from_arrays,
    counts_to_arrays,
    evaluate,
    pool,
)
from chainward_shared.evaluation.scores import Scores

NOTHING = Scores(n=0, accuracy=None, balanced_accuracy=None, macro_auc=None, ece=None)


def problem(seed: int, n: int, classes: int = 3, confidence: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are right more often than not, and labels; `confidence` multiplies the logits."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    logits = generator.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1.0
    powers = np.exp(confidence * (logits - logits.max(axis=1, keepdims=True)))
    return powers / powers.sum(axis=1, keepdims=True), labels


def in_parts(probabilities: np.ndarray, labels: np.ndarray, cuts: list[int]) -> list[PredictionCounts]:
    return [
        PredictionCounts.of(p, y) for p, y in zip(np.split(probabilities, cuts), np.split(labels, cuts), strict=True)
    ]


def slow_ece(probabilities: np.ndarray, labels: np.ndarray) -> float:
    total = 0.0
    for b in range(15):
        low, high = b / 15, (b + 1) / 15 if b < 14 else 1.1
        inside = [i for i, row in enumerate(probabilities) if low <= max(row) < high]
        if inside:
            confidence = sum(max(probabilities[i]) for i in inside) / len(inside)
            accuracy = sum(int(np.argmax(probabilities[i]) == labels[i]) for i in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


def slow_macro_auc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs in the right order, ties half, by class."""
    areas = []
    for k in range(probabilities.shape[1]):
        of_class, others = probabilities[labels == k, k], probabilities[labels != k, k]
        if len(of_class) and len(others):
            pairs = [(a > b) + 0.5 * (a == b) for a in of_class for b in others]
            areas.append(sum(pairs) / len(pairs))
    return float(np.mean(areas))


PROBLEMS = [(0, 200, 3, 1.0), (1, 500, 2, 1.0), (2, 300, 7, 3.0), (3, 60, 3, 0.1), (4, 400, 4, 15.0), (5, 12, 3, 1.0)]
EACH_PROBLEM = pytest.mark.parametrize(("seed", "n", "classes", "confidence"), PROBLEMS)


# --- one site ---


@EACH_PROBLEM
def test_the_scores_are_those_of_scikit_learn_and_of_slow_loops(seed, n, classes, confidence):
    probabilities, labels = problem(seed, n, classes, confidence)
    assert set(labels) == set(range(classes)), "scikit-learn's multi-class area needs every class"
    scores = evaluate(probabilities, labels)
    predictions = probabilities.argmax(axis=1)
    assert scores.n == n
    assert scores.accuracy == pytest.approx((predictions == labels).mean(), abs=1e-12)
    assert scores.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predictions), abs=1e-12)
    asked = (probabilities, {"multi_class": "ovr", "average": "macro"}) if classes > 2 else (probabilities[:, 1], {})
    assert scores.macro_auc == pytest.approx(roc_auc_score(labels, asked[0], **asked[1]), abs=1e-12)
    assert scores.macro_auc == pytest.approx(slow_macro_auc(probabilities, labels), abs=1e-12)
    assert scores.ece == pytest.approx(slow_ece(probabilities, labels), abs=1e-12)


def test_classes_without_cases_count_in_no_mean():
    probabilities, labels = problem(0, 100, classes=5)
    kept = (labels != 2) & (labels != 4)
    probabilities, labels = probabilities[kept], labels[kept]
    scores = evaluate(probabilities, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prediction of an absent class
        expected = balanced_accuracy_score(labels, probabilities.argmax(axis=1))
    assert scores.balanced_accuracy == pytest.approx(expected, abs=1e-12)
    areas = [roc_auc_score(labels == k, probabilities[:, k]) for k in (0, 1, 3)]
    assert scores.macro_auc == pytest.approx(np.mean(areas), abs=1e-12)


def test_one_class_alone_has_no_area_under_the_curve():
    scores = evaluate(np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([0, 0]))
    assert (scores.accuracy, scores.balanced_accuracy, scores.macro_auc) == (0.5, 0.5, None)


def test_no_cases_have_no_scores():
    assert evaluate(np.zeros((0, 3)), np.zeros(0, dtype=np.int64)) == NOTHING


def test_certainty_falls_into_the_last_bin_of_calibration():
    certain = np.eye(3)[[0, 1, 2, 0]]
    scores = evaluate(certain, np.array([0, 1, 2, 1]))
    assert (scores.accuracy, scores.ece) == (0.75, 0.25)


def test_a_perfect_and_an_inverted_ranking_have_the_areas_one_and_zero():
    probabilities = np.stack([np.linspace(0, 1, 10), np.linspace(1, 0, 10)], axis=1)
    labels = np.repeat([1, 0], 5)
    assert evaluate(probabilities, labels).macro_auc == 1.0
    assert evaluate(probabilities, 1 - labels).macro_auc == 0.0
    assert pool([PredictionCounts.of(probabilities, labels)]).macro_auc == 1.0


# --- several sites ---


@EACH_PROBLEM
def test_pooled_scores_are_those_over_all_cases_together(seed, n, classes, confidence):
    probabilities, labels = problem(seed, n, classes, confidence)
    together = evaluate(probabilities, labels)
    pooled = pool(in_parts(probabilities, labels, [n // 7, n // 7, n // 2]))
    assert pooled.n == n
    assert pooled.accuracy == together.accuracy
    assert pooled.balanced_accuracy == together.balanced_accuracy
    assert pooled.ece == pytest.approx(together.ece, abs=1e-12)


def test_sites_that_lack_classes_pool_to_the_scores_over_all_cases():
    probabilities, labels = problem(6, 300)
    order = np.argsort(labels, kind="stable")  # each part has one class, or two
    probabilities, labels = probabilities[order], labels[order]
    together = evaluate(probabilities, labels)
    pooled = pool(in_parts(probabilities, labels, [90, 180]))
    assert pooled.balanced_accuracy == together.balanced_accuracy
    assert pooled.macro_auc == pytest.approx(together.macro_auc, abs=0.002)


@pytest.mark.parametrize("confidence", [0.1, 0.3, 1.0, 5.0, 10.0, 20.0])
@pytest.mark.parametrize("n", [300, 3_000])
def test_the_pooled_area_is_within_two_thousandths_of_the_exact_one(n, confidence):
    for seed in range(10):
        probabilities, labels = problem(seed, n, confidence=confidence)
        pooled = pool(in_parts(probabilities, labels, [n // 3, n // 2]))
        assert pooled.macro_auc == pytest.approx(evaluate(probabilities, labels).macro_auc, abs=0.002), f"seed {seed}"


@pytest.mark.parametrize("confidence", [0.3, 1.0, 5.0, 10.0])
@pytest.mark.parametrize("n", [5, 20])
def test_of_very_few_cases_the_pooled_area_is_within_two_thousandths_on_average(n, confidence):
    problems = [problem(seed, n, confidence=confidence) for seed in range(40)]
    pairs = [(evaluate(*each).macro_auc, pool(in_parts(*each, [n // 2])).macro_auc) for each in problems]
    errors = [abs(exact - pooled) for exact, pooled in pairs if exact is not None]
    assert len(errors) > 35
    assert np.mean(errors) < 0.002


def test_scores_that_are_equal_are_ties_in_the_pooled_area():
    flat = np.full((8, 2), 0.5)
    assert pool([PredictionCounts.of(flat, np.arange(8) % 2)]).macro_auc == 0.5


def test_the_scores_of_an_overconfident_model_stay_apart():
    others = 10.0 ** -np.arange(1, 41, dtype=np.float64)  # what is left beside an ever surer class
    probabilities = np.stack([1 - others, others], axis=1)
    counts = PredictionCounts.of(probabilities, np.zeros(40, dtype=np.int64))
    assert counts.histograms.max() == 1, "no two of them share a bin"


def test_a_site_without_cases_changes_nothing():
    probabilities, labels = problem(0, 50)
    alone = PredictionCounts.of(probabilities, labels)
    empty = PredictionCounts.of(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))
    assert pool([empty, alone, empty]) == pool([alone])
    assert pool([empty, empty]) == NOTHING


def test_pooling_leaves_the_counts_of_the_sites_alone():
    parts = in_parts(*problem(0, 50), [20])
    before = [part.confusion.copy() for part in parts]
    pool(parts)
    assert all(np.array_equal(part.confusion, old) for part, old in zip(parts, before, strict=True))


# --- on the wire ---


def test_counts_arrive_as_they_were_sent():
    counts = PredictionCounts.of(*problem(0, 80))
    received = counts_from_arrays(counts_to_arrays(counts), classes=3)
    for name in ("confusion", "calibration", "histograms"):
        sent, arrived = getattr(counts, name), getattr(received, name)
        assert arrived.dtype == sent.dtype
        assert np.array_equal(arrived, sent)
    assert pool([received]) == pool([counts])


@pytest.mark.parametrize(
    ("name", "values", "problem_named"),
    [
        ("confusion", np.zeros((4, 4), np.int64), r"'confusion': shape \(4, 4\); expected \(3, 3\)"),
        ("confusion", np.zeros((3, 3)), "'confusion': float64; expected int64"),
        ("confusion", np.full((3, 3), -1), "not between 0 and"),
        ("calibration", np.zeros((CALIBRATION_BINS + 1, 3)), "'calibration': shape"),
        ("calibration", np.full((CALIBRATION_BINS, 3), np.nan), "'calibration': 45 of 45 values are NaN"),
        ("calibration", np.full((CALIBRATION_BINS, 3), -0.5), "not between 0 and"),
        ("histograms", np.zeros((3, SCORE_BINS), np.int64), "'histograms': shape"),
        ("histograms", np.full((3, 2, SCORE_BINS), -1), "not between 0 and"),
        ("histograms", np.full((3, 2, SCORE_BINS), 10**12), "not between 0 and 1,000,000,000"),
        ("patients", np.zeros(3), "unexpected array.*'patients'"),
    ],
)
def test_counts_that_can_not_be_are_refused(name, values, problem_named):
    arrays = counts_to_arrays(PredictionCounts.of(*problem(0, 80)))
    arrays[name] = Array(values)
    with pytest.raises(WeightsError, match=problem_named):
        counts_from_arrays(arrays, classes=3)


def test_counts_of_another_number_of_classes_are_refused():
    with pytest.raises(WeightsError, match="'confusion': shape"):
        counts_from_arrays(counts_to_arrays(PredictionCounts.of(*problem(0, 80))), classes=4)


def test_counts_that_lack_an_array_are_refused():
    arrays = counts_to_arrays(PredictionCounts.of(*problem(0, 80)))
    del arrays["calibration"]
    with pytest.raises(WeightsError, match="missing, first 'calibration'"):
        counts_from_arrays(arrays, classes=3)


# -- a site whose scores contradict what it counted


@pytest.mark.parametrize("multilabel", [False, True])
def test_honest_scores_contradict_nothing(multilabel):
    for seed in range(20):
        probabilities, labels = problem(seed, n=1 + 7 * seed, confidence=1 + 10 * seed)
        if multilabel:
            labels = (probabilities > np.random.default_rng(seed).uniform(size=probabilities.shape)).astype(np.int64)
        declared = labels.sum(axis=0) if multilabel else np.bincount(labels, minlength=3)
        check_scores(evaluate(probabilities, labels), PredictionCounts.of(probabilities, labels), declared.tolist())


def test_nothing_to_score_contradicts_nothing():
    probabilities, labels = np.zeros((0, 3)), np.zeros(0, dtype=np.int64)
    check_scores(evaluate(probabilities, labels), PredictionCounts.of(probabilities, labels), [0, 0, 0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", 41), ("accuracy", 0.99), ("accuracy", float("nan")), ("balanced_accuracy", None), ("ece", 0.0)],
)
def test_scores_that_do_not_follow_from_the_counts_are_refused(name, value):
    probabilities, labels = problem(0, n=40)
    scores = evaluate(probabilities, labels).model_copy(update={name: value})
    with pytest.raises(WeightsError, match=f"its {name.replace('_', ' ')} is"):
        check_scores(scores, PredictionCounts.of(probabilities, labels))


def test_counts_of_other_cases_than_were_declared_are_refused():
    probabilities, labels = problem(0, n=40)
    declared = np.bincount(labels, minlength=3)
    declared[0] += 1
    with pytest.raises(WeightsError, match="it has declared"):
        check_scores(evaluate(probabilities, labels), PredictionCounts.of(probabilities, labels), declared.tolist())
