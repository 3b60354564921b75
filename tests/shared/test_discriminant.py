"""A head out of sums is the head of all images together, and slow, obvious computations find the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from chainward_shared import discriminant as module
from chainward_shared.discriminant import LARGEST, UNSEEN, HeadSums, class_weights, discriminant

CLASSES, SIZE = 4, 12


def images(n: int, seed: int, *, size: int = SIZE, multilabel: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings whose values go together and whose classes differ, far from the origin, and labels."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(size, size))
    if multilabel:
        labels = (generator.random((n, CLASSES)) < [0.5, 0.3, 0.2, 0.1]).astype(float)
        drawn = generator.normal(size=(n, size)) @ mixing + labels @ np.random.default_rng(1).normal(
            size=(CLASSES, size)
        )
    else:
        labels = generator.choice(CLASSES, size=n, p=[0.5, 0.25, 0.15, 0.1])
        drawn = (
            generator.normal(size=(n, size)) @ mixing + np.random.default_rng(1).normal(size=(CLASSES, size))[labels]
        )
    return torch.from_numpy(drawn + 7.0), torch.from_numpy(labels)


def split(values: tuple[torch.Tensor, torch.Tensor], *sizes: int) -> list[HeadSums]:
    return [
        HeadSums.of(embeddings, labels, CLASSES)
        for embeddings, labels in zip(values[0].split(sizes), values[1].split(sizes), strict=True)
    ]


def posterior(head, embeddings: torch.Tensor) -> np.ndarray:
    logits = embeddings.numpy() @ head.weight.T + head.bias
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def close(first, second) -> bool:
    return np.allclose(first.weight, second.weight, rtol=1e-9, atol=1e-9) and np.allclose(
        first.bias, second.bias, rtol=1e-9, atol=1e-9
    )


@pytest.mark.slow
@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_sums_of_sites_give_the_head_of_all_their_images_in_any_order(order, multilabel):
    whole, held = images(400, 3, multilabel=multilabel), images(90, 4, multilabel=multilabel)
    parts, val = split(whole, 3, 47, 150, 200), split(held, 20, 30, 39, 1)
    pooled = discriminant(*split(whole, 400), *split(held, 90), multilabel=multilabel)

    train = sum((parts[site] for site in order), HeadSums.none(CLASSES, SIZE))
    validation = sum((val[site] for site in order), HeadSums.none(CLASSES, SIZE))

    assert close(discriminant(train, validation, multilabel=multilabel), pooled)
    without = discriminant(sum(parts[1:], HeadSums.none(CLASSES, SIZE)), validation, multilabel=multilabel)
    rest = HeadSums.of(whole[0][3:], whole[1][3:], CLASSES)
    assert close(without, discriminant(rest, validation, multilabel=multilabel))
    assert not close(without, pooled)  # three images do make a difference


@pytest.mark.filterwarnings("ignore:Only one sample available")
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("n", [300, 9])  # 9 images are fewer than there are dimensions
def test_the_head_is_scikit_learns_discriminant(n, strength):
    embeddings, labels = images(n, 11)
    labels[:CLASSES] = torch.arange(CLASSES)
    head = discriminant(HeadSums.of(embeddings, labels, CLASSES), None, prior_strength=strength)

    natural = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=head.shrinkage).fit(
        embeddings.numpy(), labels.numpy()
    )
    frequencies = np.bincount(labels.numpy(), minlength=CLASSES) / n
    logits = natural.decision_function(embeddings.numpy()) - strength * np.log(frequencies)
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    assert np.allclose(posterior(head, embeddings), expected, rtol=1e-7, atol=1e-9)


def test_each_finding_has_the_discriminant_of_images_with_it_against_those_without():
    embeddings, labels = images(300, 5, multilabel=True)
    held, their = images(80, 6, multilabel=True)
    head = discriminant(
        HeadSums.of(embeddings, labels, CLASSES),
        HeadSums.of(held, their, CLASSES),
        multilabel=True,
    )
    for finding in range(CLASSES):
        alone = discriminant(HeadSums.of(embeddings, labels[:, finding], 2), HeadSums.of(held, their[:, finding], 2))
        assert np.allclose(head.weight[finding], alone.weight[1] - alone.weight[0])
        assert np.allclose(head.bias[finding], alone.bias[1] - alone.bias[0])


def test_without_validation_images_the_shrinkage_is_scikit_learns_oas():
    embeddings, labels = images(30, 21)
    means = torch.stack([embeddings[labels == label].mean(dim=0) for label in range(CLASSES)])
    _, expected = oas((embeddings - means[labels]).numpy(), assume_centered=True)
    assert discriminant(HeadSums.of(embeddings, labels, CLASSES), None).shrinkage == pytest.approx(expected, rel=1e-9)
    few = HeadSums.of(*images(19, 3), CLASSES)
    assert discriminant(HeadSums.of(embeddings, labels, CLASSES), few).shrinkage == pytest.approx(expected, rel=1e-9)


def overlapping(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings of classes that can't be told apart altogether."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(CLASSES, size=n, p=[0.4, 0.3, 0.2, 0.1])
    spread = np.linspace(0.3, 3, SIZE)
    drawn = generator.normal(size=(n, SIZE)) * spread + np.random.default_rng(1).normal(size=(CLASSES, SIZE))[labels]
    return torch.from_numpy(drawn + 7.0), torch.from_numpy(labels)


def slow_accuracy(head, held, their, parts) -> float:
    """Classify many draws of a normal distribution around each class's mean, in all dimensions, one class after the other."""
    means = {label: held[their == label].mean(dim=0).numpy() for label in parts}
    apart = np.stack([x - means[int(y)] for x, y in zip(held.numpy(), their.numpy(), strict=True)])
    covariance = apart.T @ apart / len(apart)
    generator = np.random.default_rng(5)
    found = 0.0
    for label, part in parts.items():
        drawn = generator.multivariate_normal(means[label], covariance, size=20_000)
        found += part * float(((drawn @ head.weight.T + head.bias).argmax(axis=1) == label).mean())
    return found


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_validation_chooses_the_shrinkage_with_which_most_is_expected_to_be_right(strength, monkeypatch):
    embeddings, labels = overlapping(18, 31)
    held, their = overlapping(300, 32)
    sums = HeadSums.of(embeddings, labels, CLASSES), HeadSums.of(held, their, CLASSES)
    found = discriminant(*sums, prior_strength=strength)
    shares = torch.bincount(their, minlength=CLASSES).numpy() ** (1 - strength)
    parts = dict(enumerate(shares / shares.sum()))
    expected = {}
    for shrinkage in (1e-4, found.shrinkage, 1.0):
        monkeypatch.setattr(module, "SHRINKAGES", np.array([shrinkage]))
        expected[shrinkage] = slow_accuracy(discriminant(*sums, prior_strength=strength), held, their, parts)
    assert expected[found.shrinkage] > max(expected[1e-4], expected[1.0])
    assert 1e-4 < found.shrinkage < 1.0


def test_a_head_that_is_too_sure_is_cooled_so_that_images_like_the_validation_images_are_likelier():
    embeddings, labels = overlapping(40, 31)
    held, their = overlapping(400, 32)
    new, truth = overlapping(4000, 33)
    head = discriminant(HeadSums.of(embeddings, labels, CLASSES), HeadSums.of(held, their, CLASSES), prior_strength=0.0)

    def cross_entropy(temperature: float) -> float:
        prior = np.log(np.bincount(labels.numpy(), minlength=CLASSES) / len(labels))
        logits = (new.numpy() @ head.weight.T + head.bias - prior) * head.temperature / temperature + prior
        logits -= logits.max(axis=1, keepdims=True)
        given = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -float(given[np.arange(len(truth)), truth.numpy()].mean())

    assert head.temperature > 1
    assert cross_entropy(head.temperature) < cross_entropy(1.0) - 0.02
    assert cross_entropy(head.temperature) < cross_entropy(2 * head.temperature)


def test_weights_of_classes_count_in_the_covariance_and_nowhere_else():
    embeddings, labels = images(60, 41)
    weights = class_weights(torch.bincount(labels, minlength=CLASSES).numpy(), 1.0)
    sums = HeadSums.of(embeddings, labels, CLASSES, weights)
    scatter = np.zeros((SIZE, SIZE))
    for x, y in zip(embeddings.numpy(), labels.numpy(), strict=True):
        apart = x - embeddings[labels == y].mean(dim=0).numpy()
        scatter += float(weights[y]) * np.outer(apart, apart)
    assert np.allclose(sums.scatter(), scatter, rtol=1e-9)
    assert sums.counted == pytest.approx(float(weights @ torch.bincount(labels, minlength=CLASSES).double()))
    plain = HeadSums.of(embeddings, labels, CLASSES)
    assert torch.equal(sums.total, plain.total) and torch.equal(sums.sums, plain.sums)
    assert "weights" not in " ".join(sums.state("train"))
    parts = [HeadSums.of(embeddings[rows], labels[rows], CLASSES, weights) for rows in (slice(0, 25), slice(25, 60))]
    assert close(discriminant(sum(parts, HeadSums.none(CLASSES, SIZE)), None), discriminant(sums, None))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_classes_have_parts_in_the_covariance_as_even_as_their_priors(strength):
    counts = np.array([100, 25, 0, 4])
    weights = class_weights(counts, strength).numpy()
    assert weights.max() == 1.0 and (weights > 0).all()
    parts = weights * counts
    assert parts[0] / parts[3] == pytest.approx(25 ** (1 - strength))
    assert not class_weights(np.zeros(3), strength).isnan().any()


def test_a_class_that_a_site_lacks_comes_from_the_others_and_one_that_all_lack_is_never_chosen():
    embeddings, labels = images(200, 41)
    labels[labels == 3] = 2
    first = labels != 1
    lacking = HeadSums.of(embeddings[first], labels[first], CLASSES)
    having = HeadSums.of(embeddings[~first], labels[~first], CLASSES)
    head = discriminant(lacking + having, None)

    assert close(head, discriminant(HeadSums.of(embeddings, labels, CLASSES), None))
    assert not head.weight[3].any() and head.bias[3] == UNSEEN
    chosen = posterior(head, embeddings).argmax(axis=1)
    assert set(chosen) == {0, 1, 2}


def test_one_image_of_a_class_is_enough_for_a_head_that_finds_it():
    embeddings, labels = images(100, 51)
    labels[labels == 3] = 0
    embeddings[0] += 40 * torch.eye(SIZE, dtype=torch.float64)[0]
    labels[0] = 3
    head = discriminant(HeadSums.of(embeddings, labels, CLASSES), None)
    assert posterior(head, embeddings)[0].argmax() == 3


@pytest.mark.parametrize(
    "kind", ["three images", "one image", "all alike", "rank one", "no spread within classes", "huge"]
)
@pytest.mark.parametrize("multilabel", [False, True])
def test_whatever_the_matrix_is_the_head_is_finite(kind, multilabel):
    embeddings, labels = images(60, 61, multilabel=multilabel)
    if kind in ("three images", "one image"):
        n = 3 if kind == "three images" else 1
        embeddings, labels = embeddings[:n], labels[:n]
    elif kind == "all alike":
        embeddings = embeddings[:1].expand(60, -1)
    elif kind == "rank one":
        embeddings = embeddings[:, :1].expand(-1, SIZE)
    elif kind == "no spread within classes":
        means = torch.randn(CLASSES, SIZE, dtype=torch.float64)
        embeddings = labels @ means if multilabel else means[labels]
    else:
        embeddings = embeddings * 1e9
    sums = HeadSums.of(embeddings, labels, CLASSES)
    head = discriminant(sums, sums, multilabel=multilabel)
    assert np.isfinite(head.weight).all() and np.isfinite(head.bias).all() and 0 < head.shrinkage <= 1


@pytest.mark.parametrize("prevalence", [0.0, 1.0])
def test_a_finding_that_no_image_or_every_one_has_gets_its_smoothed_odds(prevalence):
    embeddings, labels = images(50, 71, multilabel=True)
    labels[:, 2] = prevalence
    head = discriminant(HeadSums.of(embeddings, labels, CLASSES), None, multilabel=True)
    assert not head.weight[2].any()
    assert head.bias[2] == pytest.approx(math.log(50.5 / 0.5) * (1 if prevalence else -1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_embeddings_that_are_no_numbers_leave_sums_that_are(value):
    embeddings, labels = images(20, 81)
    embeddings[4, 2] = value
    sums = HeadSums.of(embeddings, labels, CLASSES)
    state = sums.state("train")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    cut = embeddings.clone()
    cut[4, 2] = {"nan": 0.0, "-inf": -LARGEST}.get(str(value), LARGEST)
    expected = HeadSums.of(cut, labels, CLASSES).state("train")
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_only_half_of_the_symmetric_matrix_is_kept_and_the_whole_comes_back():
    embeddings, labels = images(30, 91)
    sums = HeadSums.of(embeddings, labels, CLASSES)
    assert sums.moments.shape == (SIZE * (SIZE + 1) // 2,)
    slow = sum(np.outer(row, row) for row in embeddings.numpy())
    assert np.allclose(sums.second_moments, slow, rtol=1e-12)
    again = HeadSums.from_state(sums.state("val"), "val")
    assert all(torch.equal(*pair) for pair in zip(vars_of(again), vars_of(sums), strict=True))


def vars_of(sums: HeadSums) -> list[torch.Tensor]:
    return list(sums.state("x").values())
