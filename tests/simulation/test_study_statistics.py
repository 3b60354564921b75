"""Paired differences: every resample against a slow one that repeats the images and asks scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from chainward_simulations.study.predictions import Predictions, load_predictions, save_predictions
from chainward_simulations.study.statistics import (
    PairedBootstrap,
    patient_weights,
    resampled_metrics,
    spread,
)

CLASSES = 3


def predictions_of(
    seed: int, n: int = 60, models: int = 2, skill: float = 1.0, multilabel: bool = False
) -> Predictions:
    """Random predictions on images that only `n` decides."""
    images = np.random.default_rng(n)
    labels = images.integers(0, 2, (n, CLASSES)) if multilabel else images.integers(0, CLASSES, n)
    noise = np.random.default_rng(seed)
    target = labels if multilabel else np.eye(CLASSES)[labels]
    logits = skill * target + noise.normal(size=(models, n, CLASSES))
    values = 1 / (1 + np.exp(-logits)) if multilabel else np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    return Predictions(
        models=tuple(f"model-{i}" for i in range(models)),
        sites=("oak", "elm"),
        probabilities=values.round(2) if multilabel else values,  # ties
        labels=labels,
        site=(np.arange(n) * 2) // n,
        group=images.integers(0, n // 2, n),
        localisation=np.where(images.random((1, 1, n)) < 0.5, noise.random((models, 4, n)), np.nan),
    )


def slow_metrics(predictions: Predictions, rows: np.ndarray) -> tuple[float, float]:
    """Balanced accuracy and macro AUC of the images `rows`, which may repeat, mean over the models."""
    labels = predictions.labels[rows]
    balanced, areas = [], []
    for probabilities in predictions.probabilities[:, rows]:
        if labels.ndim == 2:
            balanced.append(
                np.mean([balanced_accuracy_score(labels[:, k], probabilities[:, k] >= 0.5) for k in range(CLASSES)])
            )
            areas.append(np.mean([roc_auc_score(labels[:, k], probabilities[:, k]) for k in range(CLASSES)]))
        else:
            balanced.append(balanced_accuracy_score(labels, probabilities.argmax(axis=1)))
            areas.append(np.mean([roc_auc_score(labels == k, probabilities[:, k]) for k in range(CLASSES)]))
    return float(np.mean(balanced)), float(np.mean(areas))


def slow_area(predictions: Predictions, rows: np.ndarray) -> float:
    """Macro AUC of the one model of single-label `predictions`."""
    labels, probabilities = predictions.labels[rows], predictions.probabilities[0, rows]
    return float(np.mean([roc_auc_score(labels == k, probabilities[:, k]) for k in range(CLASSES)]))


@pytest.mark.parametrize("multilabel", [False, True])
def test_figures_of_a_resample_are_those_of_the_repeated_images(multilabel):
    predictions = predictions_of(0, multilabel=multilabel)
    (weights,) = patient_weights([predictions.group], 20)
    fast = resampled_metrics(predictions, weights)
    for b in range(20):
        rows = np.repeat(np.arange(60), weights[:, b].astype(int))
        balanced, area = slow_metrics(predictions, rows)
        assert fast["balanced_accuracy"][b] == pytest.approx(balanced, abs=1e-6)
        assert fast["macro_auc"][b] == pytest.approx(area, abs=1e-6)
        lifts = predictions.localisation[:, 0, rows]
        assert fast["lift"][b] == pytest.approx(np.nanmean(lifts), abs=1e-6)


def test_a_patient_is_drawn_with_all_images_and_in_all_seeds_alike():
    first, second = np.array([7, 7, 9, 11]), np.array([11, 7, 13])
    one, two = patient_weights([first, second], 50)
    assert (one[0] == one[1]).all()
    assert (one[0] == two[1]).all()
    assert (one[3] == two[0]).all()
    everybody = one[0] + one[2] + one[3] + two[2]
    assert (everybody == 4).all()  # as many draws as there are patients
    assert one[0].std() > 0


@pytest.mark.slow
def test_the_difference_is_the_mean_of_the_seeds_and_its_interval_that_of_a_slow_bootstrap():
    reference = {seed: predictions_of(seed, models=1, skill=1.0) for seed in (0, 1, 2)}
    arm = {seed: predictions_of(seed + 10, models=1, skill=2.0) for seed in (0, 1, 2)}
    rows = np.arange(60)
    expected = [slow_metrics(arm[s], rows)[1] - slow_metrics(reference[s], rows)[1] for s in (0, 1, 2)]
    found = PairedBootstrap(reference).difference(arm, "macro_auc")
    assert found.mean == pytest.approx(np.mean(expected))
    assert list(found.per_seed.values()) == pytest.approx(expected)

    generator = np.random.default_rng(5)  # other draws: the intervals agree as closely as 150 draws allow
    groups = reference[0].group
    patients = np.unique(groups)
    figures = []
    for _ in range(150):
        drawn = np.concatenate([np.flatnonzero(groups == p) for p in generator.choice(patients, len(patients))])
        seeds = generator.choice([0, 1, 2], 3)
        differences = {s: slow_area(arm[s], drawn) - slow_area(reference[s], drawn) for s in set(seeds.tolist())}
        figures.append(np.mean([differences[s] for s in seeds]))
    low, high = np.quantile(figures, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.3 * (high - low))
    assert found.high == pytest.approx(high, abs=0.3 * (high - low))


def test_an_arm_does_not_differ_from_itself():
    reference = {seed: predictions_of(seed) for seed in (0, 1)}
    found = PairedBootstrap(reference).difference(reference, "balanced_accuracy")
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_arms_on_different_images_are_not_compared():
    with pytest.raises(ValueError, match="different images"):
        PairedBootstrap({0: predictions_of(0, n=60)}).difference({0: predictions_of(0, n=50)}, "macro_auc")


def test_spread_is_that_of_a_sample_and_ignores_what_is_not_there():
    found = spread([0.2, None, 0.4, 0.9])
    assert (found.mean, found.sd) == (pytest.approx(0.5), pytest.approx(0.36055512754639896))
    assert (found.least, found.most, found.seeds) == (0.2, 0.9, 3)
    assert spread([0.3]).sd is None
    assert spread([None]) is None


def test_predictions_are_kept_to_the_bit(tmp_path):
    before = predictions_of(4)
    save_predictions(before, tmp_path / "arm.safetensors")
    after = load_predictions(tmp_path / "arm.safetensors")
    assert (after.models, after.sites) == (before.models, before.sites)
    for name in ("probabilities", "labels", "site", "group", "localisation"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
