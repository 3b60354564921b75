"""Calibration and operating points out of counts: what they choose is what a search over the cases themselves chooses."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from chainward_shared.evaluation.classification import PredictionCounts
from chainward_shared.evaluation.intervals import mean_of_proportions, wilson
from chainward_shared.evaluation.operating import (
    MIN_CASES,
    THRESHOLDS,
    Tally,
    fitted_temperature,
    net_benefits,
    operating_points,
    reliability,
    summed,
    tallies_at,
    tallies_decided,
)
from chainward_shared.model_record import calibrated, class_log_odds
from chainward_shared.task import Task

TASKS: tuple[Task, ...] = ("single", "multilabel")


def cases(task: Task, n: int = 600, classes: int = 3, overconfidence: float = 3.0, seed: int = 0):
    """Logits of a model that is `overconfidence` times too sure, and labels drawn as its cooler twin says."""
    generator = np.random.default_rng(seed)
    true = generator.normal(0, 1.2, (n, classes))
    if task == "multilabel":
        labels = (generator.random((n, classes)) < 1 / (1 + np.exp(-true))).astype(np.float32)
    else:
        shares = np.exp(true) / np.exp(true).sum(axis=1, keepdims=True)
        labels = np.array([generator.choice(classes, p=row) for row in shares])
    return true * overconfidence, labels


def probabilities(logits: np.ndarray, task: Task) -> np.ndarray:
    if task == "multilabel":
        return 1 / (1 + np.exp(-logits))
    exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True)


def counted(logits: np.ndarray, labels: np.ndarray, task: Task) -> PredictionCounts:
    return PredictionCounts.of(probabilities(logits, task), labels)


def of_class(labels: np.ndarray, classes: int) -> np.ndarray:
    return labels > 0.5 if labels.ndim == 2 else labels[:, None] == np.arange(classes)


def slow_loss(log_odds: np.ndarray, truth: np.ndarray, temperature: float) -> float:
    return float(
        np.mean(np.where(truth, np.logaddexp(0, -log_odds / temperature), np.logaddexp(0, log_odds / temperature)))
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("classes", [2, 5])
def test_the_temperature_is_that_of_the_cases_themselves(task, classes):
    logits, labels = cases(task, classes=classes)
    found = fitted_temperature(counted(logits, labels, task).histograms)
    log_odds, truth = class_log_odds(logits, task), of_class(labels, classes)
    best = minimize_scalar(lambda t: slow_loss(log_odds, truth, t), bounds=(0.2, 9), method="bounded").x
    assert found.temperature == pytest.approx(best, rel=0.02)
    assert found.loss_before == pytest.approx(slow_loss(log_odds, truth, 1.0), rel=0.02)
    assert found.loss_after < found.loss_before - 0.05
    assert found.images == len(labels)


def test_of_two_classes_it_is_temperature_scaling_of_the_logits():
    logits, labels = cases("single", classes=2)
    fit = fitted_temperature(counted(logits, labels, "single").histograms)
    after = calibrated(class_log_odds(logits, "single"), fit)
    assert np.allclose(after, probabilities(logits / fit.temperature, "single"), atol=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_no_threshold_separates_better_than_the_operating_point(task):
    logits, labels = cases(task, n=200)
    points = operating_points(counted(logits, labels, task).histograms, 3)
    log_odds, truth = class_log_odds(logits, task), of_class(labels, 3)
    for k, point in enumerate(points):

        def gain(at: float, k: int = k) -> float:
            called = log_odds[:, k] >= at
            return called[truth[:, k]].mean() + (~called[~truth[:, k]]).mean() - 1

        assert gain(point.log_odds) >= max(map(gain, log_odds[:, k])) - 0.011, "one bin may hold a case or two"
        called = log_odds[:, k] >= point.log_odds
        assert point.validation.found == (called & truth[:, k]).sum()
        assert point.validation.cleared == (~called & ~truth[:, k]).sum()
        assert 0 < point.threshold < 1


@pytest.mark.parametrize("task", TASKS)
def test_counts_of_sites_add_up_to_those_of_one_place(task):
    logits, labels = cases(task)
    parts = [counted(logits[i::3], labels[i::3], task) for i in range(3)]
    together = counted(logits, labels, task)
    assert np.array_equal(summed(parts), together.histograms)


@pytest.mark.parametrize("task", TASKS)
def test_what_comes_out_at_a_point_and_at_the_models_own_decision_is_counted_right(task):
    logits, labels = cases(task)
    others, other_labels = cases(task, seed=1)
    points = operating_points(counted(logits, labels, task).histograms, 3)
    counts = counted(others, other_labels, task)
    truth, log_odds, given = of_class(other_labels, 3), class_log_odds(others, task), probabilities(others, task)
    own = given >= 0.5 if task == "multilabel" else given.argmax(axis=1)[:, None] == np.arange(3)
    for k, (at_point, decided) in enumerate(
        zip(tallies_at(counts.histograms, points), tallies_decided(counts.confusion), strict=True)
    ):
        for tally, called in ((at_point, log_odds[:, k] >= points[k].log_odds), (decided, own[:, k])):
            assert (tally.cases, tally.others) == (truth[:, k].sum(), (~truth[:, k]).sum())
            assert tally.found == (called & truth[:, k]).sum()
            assert tally.cleared == (~called & ~truth[:, k]).sum()


def test_reliability_says_how_often_decisions_of_like_probability_are_right():
    logits, labels = cases("multilabel")
    histograms = counted(logits, labels, "multilabel").histograms
    for bins, temperature in ((reliability(histograms), 1.0), (reliability(histograms, 3.0), 3.0)):
        given, truth = probabilities(logits / temperature, "multilabel").reshape(-1), labels.reshape(-1) > 0
        assert sum(one.decisions for one in bins) == len(given)
        for one in bins:
            low = np.floor(one.probability * 10) / 10
            inside = (given >= low) & (given < low + 0.1)
            assert one.decisions == pytest.approx(inside.sum(), abs=6)
            assert one.share == pytest.approx(truth[inside].mean(), abs=0.05)
    gap_before, gap_after = (
        sum(abs(one.share - one.probability) * one.decisions for one in bins)
        for bins in (reliability(histograms), reliability(histograms, 3.0))
    )
    assert gap_after < gap_before / 3


def test_the_net_benefit_is_that_of_acting_on_the_calibrated_probability():
    logits, labels = cases("multilabel", classes=2)
    curves = net_benefits(counted(logits, labels, "multilabel").histograms, 3.0)
    given = probabilities(logits / 3.0, "multilabel")
    for k, curve in enumerate(curves):
        for at, found in list(zip(THRESHOLDS, curve, strict=True))[::7]:
            acted, truth = given[:, k] >= at, labels[:, k] > 0
            slow = (acted & truth).mean() - (acted & ~truth).mean() * at / (1 - at)
            assert found == pytest.approx(slow, abs=0.02)


def test_where_counts_are_withheld_or_few_it_says_so_and_chooses_nothing():
    nothing = summed([])
    assert fitted_temperature(nothing).temperature is None
    assert "0 validation images" in fitted_temperature(nothing).missing
    assert [point.log_odds for point in operating_points(nothing, 3)] == [None] * 3
    logits, labels = cases("single", n=400)
    few = labels.copy()
    few[np.flatnonzero(labels == 2)[MIN_CASES - 1 :]] = 0
    points = operating_points(counted(logits, few, "single").histograms, 3)
    assert f"{MIN_CASES - 1} validation images of the class" in points[2].missing
    assert points[0].missing is None
    noised = np.zeros((3, 2, 4096), dtype=np.int64)
    assert operating_points(noised, 3)[0].missing and fitted_temperature(noised).missing
    assert tallies_at(noised, points) == [None] * 3


def test_a_model_that_is_never_wrong_gets_no_temperature():
    labels = np.arange(90) % 3
    logits = np.eye(3)[labels] * 12.0
    found = fitted_temperature(counted(logits, labels, "single").histograms)
    assert found.temperature is None
    assert "no temperature between" in found.missing


@pytest.mark.parametrize(("found", "of"), [(0, 10), (3, 10), (10, 10), (480, 1000)])
def test_the_interval_is_wilsons(found, of):
    exact = binomtest(found, of).proportion_ci(method="wilson")
    assert wilson(found, of) == pytest.approx((exact.low, exact.high))
    assert mean_of_proportions([(found, of)]) == pytest.approx((exact.low, exact.high))


def test_the_interval_of_a_balanced_accuracy_covers_it_as_often_as_it_says():
    generator, shares, sizes = np.random.default_rng(0), (0.95, 0.6, 0.8), (10, 10, 14)
    true, covered = np.mean(shares), 0
    for _ in range(2000):
        low, high = mean_of_proportions(
            [(int(generator.binomial(n, p)), n) for p, n in zip(shares, sizes, strict=True)]
        )
        covered += low <= true <= high
    assert 0.93 <= covered / 2000 <= 0.995


def test_of_few_images_a_tally_says_so():
    assert Tally(cases=9, others=50, found=9, cleared=50).few
    assert not Tally(cases=10, others=50, found=9, cleared=50).few
    assert Tally(cases=0, others=5, found=0, cleared=5).sensitivity is None
