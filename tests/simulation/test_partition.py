"""Simulated sites get whole patients, differ as much as they should, and are the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from chainward_client.data.splits import keep_label_fraction
from chainward_shared.errors import DataError
from chainward_simulations import partition
from chainward_simulations.partition import partition_by_label_skew, partition_by_site

Dataset = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """3,000 images of 1,500 patients in 4 unequal classes: labels, patients, splits."""
    rng = np.random.default_rng(0)
    class_of = rng.choice(4, 1500, p=[0.5, 0.3, 0.15, 0.05])
    split_of = rng.choice(["train", "val", "test"], 1500, p=[0.7, 0.1, 0.2])
    patient = rng.integers(0, 1500, 3000)
    return class_of[patient], np.char.add("p", patient.astype(str)), split_of[patient]


def class_counts(labels: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    return np.array([np.bincount(labels[part], minlength=4) for part in parts])


def all_train(labels: np.ndarray) -> np.ndarray:
    return np.full(len(labels), "train")


def test_natural_sites_are_ordered_by_name_and_cover_all_rows() -> None:
    sites = partition_by_site(np.array(["south", "north", "south", "east"]))
    rows_of = {site: rows.tolist() for site, rows in sites.items()}
    assert rows_of == {
        "east": [3],
        "north": [1],
        "south": [0, 2],
    }
    assert list(sites) == ["east", "north", "south"]


@pytest.mark.parametrize("alpha", [0.3, 1.0, 100.0])
def test_every_case_is_at_one_site_and_no_patient_at_two(dataset: Dataset, alpha: float) -> None:
    labels, patients, splits = dataset
    parts = partition_by_label_skew(labels, patients, 5, alpha, 7, splits)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    site_of = np.empty(len(labels), dtype=int)
    for site, part in enumerate(parts):
        site_of[part] = site
        assert (np.diff(part) > 0).all()
    for patient in np.unique(patients):
        assert len(np.unique(site_of[patients == patient])) == 1


def test_the_same_seed_gives_the_same_partition_and_another_seed_another(dataset: Dataset) -> None:
    labels, patients, splits = dataset
    first, again, other = (partition_by_label_skew(labels, patients, 5, 0.5, seed, splits) for seed in (3, 3, 4))
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert not all(np.array_equal(one, two) for one, two in zip(first, other, strict=True))


def test_the_order_of_rows_plays_no_role(dataset: Dataset) -> None:
    labels, patients, splits = dataset
    order = np.random.default_rng(1).permutation(len(labels))
    plain = partition_by_label_skew(labels, patients, 5, 0.5, 3, splits)
    mixed = partition_by_label_skew(labels[order], patients[order], 5, 0.5, 3, splits[order])
    assert all(np.array_equal(one, np.sort(order[two])) for one, two in zip(plain, mixed, strict=True))


def test_a_smaller_alpha_makes_sites_more_different(dataset: Dataset) -> None:
    labels, patients, _ = dataset

    def difference(alpha: float) -> float:
        """Mean total variation distance of sites from the whole, over ten seeds."""
        distances = []
        for seed in range(10):
            counts = class_counts(labels, partition_by_label_skew(labels, patients, 5, alpha, seed, all_train(labels)))
            own = counts / counts.sum(axis=1, keepdims=True)
            distances.append(np.abs(own - counts.sum(axis=0) / counts.sum()).sum(axis=1).mean() / 2)
        return float(np.mean(distances))

    skewed, medium, even = difference(0.3), difference(2.0), difference(1000.0)
    assert skewed > 1.5 * medium
    assert medium > 3 * even
    assert even < 0.05


def test_the_sites_shares_are_the_same_in_train_val_and_test(dataset: Dataset) -> None:
    labels, patients, splits = dataset
    parts = partition_by_label_skew(labels, patients, 4, 0.5, 1, splits)
    shares = {}
    for split in ("train", "val", "test"):
        counts = class_counts(labels, [part[splits[part] == split] for part in parts])
        shares[split] = counts / counts.sum(axis=0)
    # The rarest class has some 15 validation images, several of one patient.
    assert np.abs(shares["train"] - shares["test"])[:, :3].max() < 0.06
    assert np.abs(shares["train"] - shares["val"])[:, :3].max() < 0.1


def test_every_site_has_the_minimum_of_training_cases(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "MIN_TRAIN_CASES", 60)
    labels, patients, splits = dataset
    for seed in range(10):
        parts = partition_by_label_skew(labels, patients, 6, 0.3, seed, splits)
        assert min((splits[part] == "train").sum() for part in parts) >= 60


def test_one_site_has_everything(dataset: Dataset) -> None:
    labels, patients, _ = dataset
    (part,) = partition_by_label_skew(labels, patients, 1, 0.5, 0, all_train(labels))
    assert np.array_equal(part, np.arange(len(labels)))


def test_an_impossible_minimum_is_refused_at_once() -> None:
    labels = np.zeros(50, dtype=int)
    with pytest.raises(DataError, match="50 training cases can't give 6 sites 10 each"):
        partition_by_label_skew(labels, np.arange(50).astype(str), 6, 1.0, 0, all_train(labels))


def test_an_unlikely_minimum_is_refused_after_a_bounded_number_of_draws() -> None:
    labels = np.zeros(300, dtype=int)
    with pytest.raises(DataError, match=r"label-skew=0\.01 over 6 sites: in 200 draws .* raise data\.label-skew"):
        partition_by_label_skew(labels, np.arange(300).astype(str), 6, 0.01, 0, all_train(labels))


# fewer labels


def test_a_label_fraction_is_kept_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [100, 40, 1])
    kept = keep_label_fraction(labels, 0.1, 0, "north")
    assert np.bincount(labels[kept]).tolist() == [10, 4, 1]
    assert (np.diff(kept) > 0).all()


def test_fraction_1_keeps_all_and_a_smaller_one_is_a_subset_of_a_larger() -> None:
    labels = np.arange(200) % 3
    assert np.array_equal(keep_label_fraction(labels, 1.0, 0, "north"), np.arange(200))
    small, large = (set(keep_label_fraction(labels, fraction, 0, "north")) for fraction in (0.1, 0.5))
    assert small < large


def test_the_kept_labels_depend_on_seed_and_site_only() -> None:
    labels = np.arange(200) % 3
    kept = keep_label_fraction(labels, 0.2, 0, "north").tolist()
    assert kept == keep_label_fraction(labels, 0.2, 0, "north").tolist()
    assert kept != keep_label_fraction(labels, 0.2, 1, "north").tolist()
    assert kept != keep_label_fraction(labels, 0.2, 0, "south").tolist()


def test_a_site_without_cases_keeps_none() -> None:
    assert keep_label_fraction(np.empty(0, dtype=int), 0.5, 0, "north").tolist() == []


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_a_label_fraction_is_above_0_and_up_to_1(fraction: float) -> None:
    with pytest.raises(DataError, match=r"chain\.label-fraction: found"):
        keep_label_fraction(np.zeros(5, dtype=int), fraction, 0, "north")
