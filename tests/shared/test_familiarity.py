"""How far an image is from the training images, out of sums alone."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from chainward_shared.discriminant import HeadSums, class_weights
from chainward_shared.errors import ModelError
from chainward_shared.familiarity import FAMILIAR_WITHIN, FEWEST_VALIDATION, Familiarity

SIZE, CLASSES = 12, 3


def embeddings(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, count)
    mixing = np.random.default_rng(0).normal(size=(SIZE, SIZE)) * np.linspace(0.1, 2, SIZE)
    values = generator.normal(size=(count, SIZE)) @ mixing + np.eye(CLASSES, SIZE)[labels] + 5
    return torch.from_numpy(values).float(), torch.from_numpy(labels)


def sums(count: int, seed: int, weights=None) -> HeadSums:
    return HeadSums.of(*embeddings(count, seed), CLASSES, weights)


@pytest.fixture(scope="module")
def known() -> Familiarity:
    return Familiarity.of_sums(sums(400, 1), sums(200, 2))


def test_distances_are_those_of_the_factor_model_computed_directly_from_all_images(known):
    train = embeddings(400, 1)[0].double().numpy()
    centred = train - train.mean(axis=0)
    covariance = centred.T @ centred / len(train)
    values, basis = np.linalg.eigh(covariance)
    axes, floor = basis[:, ::-1][:, : SIZE - 1], 1e-4 * values.mean()
    asked = embeddings(50, 3)[0].double().numpy() - train.mean(axis=0)
    left = asked - asked @ axes @ axes.T
    beside = np.diag(covariance) - np.square(axes) @ values[::-1][: SIZE - 1] + floor
    slow = [
        sum(float(one @ axes[:, k]) ** 2 / (values[::-1][k] + floor) for k in range(SIZE - 1))
        + sum(float(rest[j]) ** 2 / beside[j] for j in range(SIZE))
        for one, rest in zip(asked, left, strict=True)
    ]
    found = known.distances(embeddings(50, 3)[0].numpy()) * known.usual
    assert found == pytest.approx(np.array(slow), rel=1e-4)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_usual_distance_out_of_sums_is_the_mean_over_the_validation_images(strength):
    counts = np.bincount(embeddings(400, 1)[1], minlength=CLASSES)
    weights = class_weights(counts.astype(float), strength)
    found = Familiarity.of_sums(sums(400, 1, weights), sums(200, 2))
    assert found.distances(embeddings(200, 2)[0].numpy()).mean() == pytest.approx(1, rel=1e-6)


def test_images_like_the_validation_images_are_near_and_others_far(known):
    near = known.distances(embeddings(300, 4)[0].numpy())
    assert (near <= FAMILIAR_WITHIN).mean() > 0.95
    far = np.random.default_rng(5).normal(size=(300, SIZE)) * 6 + 5
    assert (known.distances(far) > FAMILIAR_WITHIN).mean() > 0.9
    assert np.isfinite(known.distances(np.array([[np.nan] * SIZE, [np.inf] * SIZE, [1e300] * SIZE]))).all()


def test_of_few_images_or_of_images_all_alike_nothing_is_told():
    assert Familiarity.of_sums(sums(15, 1), sums(200, 2)) is None
    assert Familiarity.of_sums(sums(400, 1), sums(FEWEST_VALIDATION - 1, 2)) is None
    assert len(Familiarity.of_sums(sums(64, 1), sums(200, 2)).arrays["along"]) == 4, "16 images for each axis"
    alike = HeadSums.of(torch.zeros(400, SIZE), torch.arange(400) % CLASSES, CLASSES)
    assert Familiarity.of_sums(alike, alike) is None


def test_it_travels_in_a_models_file_and_a_damaged_one_is_refused(known):
    assert Familiarity.from_metadata(known.to_metadata()) == known
    assert Familiarity.from_metadata({}) is None
    content = known.model_dump()
    for damage in (
        {"mean": content["mean"][:-8]},
        {"along": base64.b64encode(np.zeros(SIZE - 1, "<f4").tobytes()).decode()},
        {"beside": base64.b64encode(np.full(SIZE, np.nan, "<f4").tobytes()).decode()},
        {"axes": "AAA"},
        {"usual": 0.0},
    ):
        damaged = known.model_copy(update=damage).model_dump_json()
        with pytest.raises(ModelError, match=r"'chainward\.familiarity' is damaged"):
            Familiarity.from_metadata({Familiarity.KEY: damaged})
