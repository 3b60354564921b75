"""A head out of sums is the head of all images together, and slow, obvious computations find the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from chainward_shared.discriminant import LARGEST, SHRINKAGES, UNSEEN, HeadSums, discriminant

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


def test_validation_chooses_the_shrinkage_under_which_its_images_are_likeliest():
    embeddings, labels = images(40, 31)
    held, their = images(60, 32)
    means = np.stack([embeddings[labels == label].mean(dim=0).numpy() for label in range(CLASSES)])
    apart = embeddings.numpy() - means[labels.numpy()]
    covariance = apart.T @ apart / len(apart)

    def log_likelihood(shrinkage: float) -> float:
        shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / SIZE * np.eye(SIZE)
        inverse, (_, log_determinant) = np.linalg.inv(shrunk), np.linalg.slogdet(shrunk)
        return sum(
            -(x - means[y]) @ inverse @ (x - means[y]) / 2 - log_determinant / 2
            for x, y in zip(held.numpy(), their.numpy(), strict=True)
        )

    found = discriminant(HeadSums.of(embeddings, labels, CLASSES), HeadSums.of(held, their, CLASSES)).shrinkage
    assert found == max(SHRINKAGES, key=log_likelihood)
    assert SHRINKAGES[0] < found < SHRINKAGES[-1]


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
