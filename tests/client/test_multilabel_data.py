"""Data files with several findings per image become 0/1 labels, are divided sensibly, or are refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from chainward_client.data.description import parse_description
from chainward_client.data.formats.csv import CsvDescription
from chainward_client.data.formats.npz import NpzCases, NpzDescription, read_npz
from chainward_client.data.manifest import Manifest, read_manifest
from chainward_client.data.site_data import Cases, SiteData
from chainward_client.data.sources import local_site
from chainward_client.data.splits import keep_label_fraction, split_by_patient, strata
from chainward_shared.errors import DataError
from chainward_simulations.partition import partition_by_label_skew

FINDINGS = ["effusion", "mass", "nodule"]


def read(folder: Path, lines: list[str], label: object = "findings", **changes: object) -> Manifest:
    (folder / "cases.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    block = {
        "format": "csv",
        "manifest": "cases.csv",
        "task": "multilabel",
        "classes": FINDINGS,
        "columns": {"image": "image", "label": label},
    }
    description = parse_description(block | changes, folder / "data.yaml")
    assert isinstance(description, CsvDescription)
    return read_manifest(description)


def refusal(folder: Path, lines: list[str], **changes: object) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, lines, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def of_cells(*cells: str) -> list[str]:
    return ["image,findings", *(f"i{row},{cell}" for row, cell in enumerate(cells))]


# --- one column of findings ---


def test_findings_are_separated_by_bars_and_an_empty_cell_has_none(tmp_path: Path) -> None:
    labels = read(tmp_path, of_cells("mass", "nodule|effusion", "", " mass | nodule ")).labels
    assert labels.dtype == np.float32
    assert labels.tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 1, 1]]


def test_findings_may_be_indices(tmp_path: Path) -> None:
    assert read(tmp_path, of_cells("1", "2|0", "")).labels.tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]


def test_the_declared_word_means_no_finding(tmp_path: Path) -> None:
    labels = read(tmp_path, of_cells("No Finding", "mass"), no_finding="No Finding").labels
    assert labels.tolist() == [[0, 0, 0], [0, 1, 0]]


def test_the_word_for_no_finding_stands_beside_indices_too(tmp_path: Path) -> None:
    assert read(tmp_path, of_cells("none", "0|2"), no_finding="none").labels.tolist() == [[0, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("mass|efusion", "1 finding outside the classes; first: row 3, 'efusion' (did you mean 'effusion'?); expected"),
        ("mass|", "1 finding outside the classes; first: row 3, ''"),
        ("3", "1 finding outside the classes; first: row 3, '3'; expected effusion, mass or nodule"),
        ("mass|mass", "1 row that names a finding twice; first: row 3, 'mass|mass'; keep one of the two"),
        ("NA", "1 row without a label; first: row 3, 'NA'; expected an empty cell where there is no finding"),
    ],
)
def test_cells_that_can_not_be_are_refused_with_row_and_column(tmp_path: Path, cell: str, expected: str) -> None:
    message = refusal(tmp_path, of_cells("mass", cell))
    assert f"cases.csv: column 'findings': {expected}" in message


def test_with_a_word_for_no_finding_an_empty_cell_is_a_row_without_a_label(tmp_path: Path) -> None:
    message = refusal(tmp_path, of_cells("mass", "", "healthy"), no_finding="healthy")
    assert "1 row without a label; first: row 3, ''; expected 'healthy' where there is no finding" in message


def test_no_finding_beside_a_finding_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, of_cells("mass|healthy"), no_finding="healthy")
    assert "1 row with and without a finding; first: row 2, 'mass|healthy'; keep one or the other" in message


# --- a column for each finding ---

COLUMNS = ["E", "M", "N"]


def test_a_column_for_each_finding_holds_one_and_zero_or_true_and_false(tmp_path: Path) -> None:
    lines = ["image,E,M,N", "a,1,0,1", "b,0.0,1.0,0", "c,True,FALSE,0"]
    assert read(tmp_path, lines, label=COLUMNS).labels.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_the_columns_are_in_the_order_of_the_classes_not_of_the_file(tmp_path: Path) -> None:
    assert read(tmp_path, ["image,E,M,N", "a,1,0,0"], label=["N", "M", "E"]).labels.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("b,1,2,0", "column 'M': 1 label that is neither 1 nor 0; first: row 3, '2'; expected 1 or 0"),
        ("b,1,0,-1", "column 'N': 1 label that is neither 1 nor 0; first: row 3, '-1'"),
        ("b,yes,0,0", "column 'E': 1 label that is neither 1 nor 0; first: row 3, 'yes'"),
        ("b,1,,0", "column 'M': 1 row without a label; first: row 3"),
    ],
)
def test_other_values_in_such_columns_are_refused(tmp_path: Path, row: str, expected: str) -> None:
    assert expected in refusal(tmp_path, ["image,E,M,N", "a,1,0,1", row], label=COLUMNS)


def test_a_missing_label_column_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path, ["image,E,M", "a,1,0"], label=COLUMNS)
    assert "column 'N' (columns.label[2]) is missing" in message


# --- the description ---


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": "multi"}, "key 'task': found 'multi'; input should be 'single' or 'multilabel'"),
        ({"task": "single", "label": COLUMNS}, "lists 3 columns, which 'task: multilabel' alone permits"),
        ({"label": ["E", "M"]}, "lists 2 columns; expected one for each of the 3 classes"),
        ({"label": ["E", "M", "E"]}, "label column 'E' is given more than once"),
        ({"label": 3.5}, None),
        ({"label": {"a": 1}}, "key 'columns.label': found {'a': 1}; input should be a valid string"),
        ({"label": ["E", None, "N"]}, "key 'columns.label.1': found nothing"),
        ({"task": "single", "no_finding": "healthy"}, "'no_finding' is given, which 'task: multilabel' alone permits"),
        ({"label": COLUMNS, "no_finding": "healthy"}, "columns of 1 and 0 need no word for it"),
        ({"no_finding": "mass"}, "'no_finding' 'mass' is one of the classes"),
        ({"classes": ["a", "b|c"]}, "class 'b|c' contains '|', which separates findings; rename it"),
    ],
)
def test_descriptions_that_contradict_themselves_are_refused(
    tmp_path: Path, changes: dict[str, object], expected: str | None
) -> None:
    if expected is None:  # a number is a column's name, as elsewhere
        assert read(tmp_path, ["image,3.5", "a,mass"], **changes).labels.tolist() == [[0, 1, 0]]
        return
    assert expected in refusal(tmp_path, ["image,E,M,N", "a,1,0,1"], **changes)


def test_a_label_column_that_is_privileged_too_is_refused(tmp_path: Path) -> None:
    columns = {"image": "image", "label": COLUMNS, "tabular": {"M": {"kind": "number", "min": 0, "max": 1}}}
    message = refusal(tmp_path, ["image,E,M,N", "a,1,0,1"], columns=columns)
    assert "column 'M' is both label and privileged" in message


# --- npz ---


def read_medmnist(folder: Path, task: str | None = "multilabel", **changes: np.ndarray) -> NpzCases:
    rng = np.random.default_rng(0)
    stored: dict[str, np.ndarray] = {}
    for name, count in (("train", 12), ("val", 4), ("test", 5)):
        stored[f"{name}_images"] = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        stored[f"{name}_labels"] = rng.integers(0, 2, (count, 3), dtype=np.uint8)
    np.savez(folder / "set.npz", **(stored | changes))  # type: ignore[arg-type]
    block: dict[str, object] = {"format": "npz", "images": "set.npz", "image": {"size": 8, "channels": 1}}
    description = parse_description(block | ({"task": task} if task else {}), folder / "data.yaml")
    assert isinstance(description, NpzDescription)
    return read_npz(description)


def test_a_medmnist_file_with_several_labels_is_read_as_it_is(tmp_path: Path) -> None:
    npz = read_medmnist(tmp_path)
    with np.load(tmp_path / "set.npz") as stored:
        expected = np.concatenate([stored[f"{split}_labels"] for split in ("train", "val", "test")])
    assert npz.classes == ("0", "1", "2")
    assert npz.labels.dtype == np.float32
    assert np.array_equal(npz.labels, expected)
    cases = npz.cases(np.array([13, 0]))
    assert cases.labels.tolist() == expected[[13, 0]].tolist()


def test_the_task_and_the_file_must_agree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train_labels has 3 columns, expected .*set task: multilabel"):
        read_medmnist(tmp_path, task=None)
    flat = np.zeros((12, 1), dtype=np.uint8)
    with pytest.raises(DataError, match=r"set\.npz: train_labels has one label per image, .*; remove the task"):
        read_medmnist(tmp_path, train_labels=flat)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"val_labels": np.array([[0, 1, 0], [0, 2, 0]] * 2)}, r"2 labels .*; first: val_labels\[1, 1\] is 2"),
        ({"test_labels": np.zeros((5, 4), dtype=int)}, "columns; expected one for each of the 4 classes"),
        ({"test_labels": np.zeros((5, 3))}, r"test_labels is float64 \(5, 3\); expected 1 and 0"),
    ],
)
def test_labels_that_are_no_findings_are_refused(tmp_path: Path, changes: dict[str, np.ndarray], expected: str) -> None:
    with pytest.raises(DataError, match=rf"^set\.npz: [^\n]*{expected}"):
        read_medmnist(tmp_path, **changes)


# --- dividing ---


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """2,000 images: findings of 40, 10 and 3 %, the last one never alone; half of the images without any."""
    rng = np.random.default_rng(0)
    drawn = (rng.random((2000, 3)) < (0.4, 0.1, 0.03)).astype(np.float32)
    drawn[:, 0] = np.maximum(drawn[:, 0], drawn[:, 2])
    return drawn


def test_the_stratum_of_an_image_is_its_rarest_finding_or_that_it_has_none() -> None:
    few = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 0]], dtype=np.float32)
    assert strata(few).tolist() == [0, 1, 2, 2, 3, 1]
    classes = np.array([2, 0, 1])
    assert strata(classes).tolist() == [2, 0, 1]
    assert strata(np.zeros((0, 3), dtype=np.float32)).tolist() == []


def test_of_equally_rare_findings_the_first_counts() -> None:
    assert strata(np.array([[0, 1, 1], [0, 1, 1]], dtype=np.float32)).tolist() == [1, 1]


def test_every_split_has_its_share_of_every_finding(labels: np.ndarray) -> None:
    splits = split_by_patient(labels, np.arange(2000).astype(str), 3, np.random.default_rng(0))
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        found = labels[splits == split].sum(axis=0) / labels.sum(axis=0)
        assert found == pytest.approx(share, abs=0.02), split


def test_label_skew_gives_the_sites_other_mixes_of_findings_and_uses_every_image_once(labels: np.ndarray) -> None:
    patients = np.arange(2000).astype(str)

    def spread(alpha: float) -> float:
        parts = partition_by_label_skew(labels, patients, 4, alpha, 1, np.full(2000, "train"))
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(2000))
        return float(np.std([labels[part].mean(axis=0) for part in parts], axis=0).mean())

    assert spread(0.5) > 4 * spread(1000.0)


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.5])
def test_a_label_fraction_keeps_a_share_and_at_least_one_image_of_each_finding_and_of_none(
    labels: np.ndarray, fraction: float
) -> None:
    kept = keep_label_fraction(labels, fraction, 0, "north")
    assert len(kept) == pytest.approx(fraction * 2000, abs=4)
    assert labels[kept].sum(axis=0).min() >= 1
    assert (labels[kept].sum(axis=1) == 0).any()
    assert len(np.unique(kept)) == len(kept)
    assert kept.tolist() == keep_label_fraction(labels, fraction, 0, "north").tolist()
    assert kept.tolist() != keep_label_fraction(labels, fraction, 0, "south").tolist()


def test_a_finding_that_never_comes_without_a_rarer_one_is_kept_too() -> None:
    labels = np.zeros((60, 3), dtype=np.float32)
    labels[:20, 0] = 1
    labels[:10, 1] = labels[10:20, 2] = 1  # finding 0 never alone
    for fraction in (0.01, 0.2):
        kept = keep_label_fraction(labels, fraction, 5, "north")
        assert labels[kept].sum(axis=0).min() >= 1


def test_a_smaller_fraction_is_a_subset_of_a_larger_one(labels: np.ndarray) -> None:
    kept = [set(keep_label_fraction(labels, fraction, 0, "north")) for fraction in (0.01, 0.1, 0.5, 1.0)]
    assert kept[0] < kept[1] < kept[2] < kept[3] == set(range(2000))


# --- what a site says of itself ---


def test_a_site_counts_its_images_with_each_finding() -> None:
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    cases = Cases(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), labels, np.array(["a", "b"]))
    site = SiteData("north", tuple(FINDINGS), {"train": cases, "val": cases, "test": cases}, task="multilabel")
    assert site.class_counts("train") == [1, 0, 2]


def test_notes_name_findings_that_teach_nothing(tmp_path: Path) -> None:
    train = np.zeros((12, 3), dtype=np.uint8)
    train[:, 0], train[0, 1] = 1, 1
    read_medmnist(tmp_path, train_labels=train)
    (tmp_path / "data.yaml").write_text(
        "{format: npz, images: set.npz, task: multilabel, classes: [effusion, mass, nodule], "
        "image: {size: 8, channels: 1}}"
    )
    site = local_site(tmp_path / "data.yaml", "north", b"key")
    assert site.task == "multilabel"
    assert {"finding 'mass': 1 training case", "finding 'nodule': 0 training cases"} <= set(site.notes)
    assert "finding 'effusion': all training cases have it" in site.notes
