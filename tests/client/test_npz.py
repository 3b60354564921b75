"""Files in the MedMNIST layout become cases, or one line that says which array is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from chainward_client.data.description import parse_description
from chainward_client.data.formats.npz import NpzCases, NpzDescription, read_npz
from chainward_shared.errors import DataError


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for name, count in (("train", 6), ("val", 2), ("test", 3)):
        made[f"{name}_images"] = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        made[f"{name}_labels"] = (np.arange(count)[:, None] % 2).astype(np.uint8)
    return made | changes


def describe(
    folder: Path, stored: dict[str, np.ndarray], image: dict[str, object] | None = None, **changes: object
) -> NpzDescription:
    np.savez(folder / "set.npz", **stored)  # type: ignore[arg-type]
    block = {"format": "npz", "images": "set.npz", "image": image or {"size": 8, "channels": 1}} | changes
    description = parse_description(block, folder / "data.yaml")
    assert isinstance(description, NpzDescription)
    return description


def read(folder: Path, stored: dict[str, np.ndarray], **changes: object) -> NpzCases:
    return read_npz(describe(folder, stored, **changes))  # type: ignore[arg-type]


def refusal(folder: Path, stored: dict[str, np.ndarray], **changes: object) -> str:
    with pytest.raises(DataError) as caught:
        npz = read(folder, stored, **changes)
        npz.cases(np.arange(len(npz)))
    assert "\n" not in str(caught.value)
    assert "set.npz" in str(caught.value)
    return str(caught.value)


def test_labels_splits_and_default_classes_are_read(tmp_path: Path) -> None:
    npz = read(tmp_path, arrays())
    assert npz.classes == ("0", "1")
    assert npz.splits.tolist() == ["train"] * 6 + ["val"] * 2 + ["test"] * 3
    assert npz.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert len(set(npz.patients)) == 11


def test_cases_hold_the_asked_images_in_the_asked_order(tmp_path: Path) -> None:
    stored = arrays()
    cases = read(tmp_path, stored).cases(np.array([8, 0, 7]))
    expected = [stored["test_images"][0], stored["train_images"][0], stored["val_images"][1]]
    assert np.array_equal(cases.images[:, 0].numpy(), np.stack(expected))
    assert cases.labels.tolist() == [0, 0, 1]
    assert cases.patients.tolist() == ["test-0", "train-0", "val-1"]


def test_flat_labels_and_a_channel_axis_of_one_are_the_same_data(tmp_path: Path) -> None:
    stored = arrays()
    flat = {
        name: values.reshape(-1) if name.endswith("labels") else values[..., None] for name, values in stored.items()
    }
    everything = np.arange(11)
    one, other = read(tmp_path, stored).cases(everything), read(tmp_path, flat).cases(everything)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)


def test_images_come_in_the_wanted_size_and_channels(tmp_path: Path) -> None:
    grey = read(tmp_path, arrays(), image={"size": 16, "channels": 3}).cases(np.array([0]))
    assert grey.images.shape == (1, 3, 16, 16)
    assert torch.equal(grey.images[:, 0], grey.images[:, 2])
    red = np.zeros((6, 8, 8, 3), dtype=np.uint8)
    red[..., 0] = 200
    rgb = read(tmp_path, arrays(train_images=red), image={"size": 8, "channels": 3}).cases(np.array([0]))
    assert rgb.images[0, :, 0, 0].tolist() == [200, 0, 0]


def test_missing_arrays_are_named(tmp_path: Path) -> None:
    stored = arrays()
    stored["train_image"] = stored.pop("train_images")
    del stored["val_labels"]
    message = refusal(tmp_path, stored)
    assert "lacks 'train_images' (did you mean 'train_image'?), 'val_labels'" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"train_labels": np.array([0, 1, 2, 0, 5, 1])},
            "2 labels outside the classes: 2 (1 in train), 5 (1 in train); expected 0 to 1",
        ),
        (
            {"val_labels": np.array([0, -1])},
            "a label outside the classes: -1 (1 in val); expected 0 to 1",
        ),
        (
            {"train_labels": np.zeros((6, 14), dtype=np.uint8)},
            "train_labels has 14 columns, expected shape (n,) or (n, 1); if they are several",
        ),
        ({"train_labels": np.full(6, 0.5)}, "train_labels is float64 (6,); expected whole numbers"),
        ({"test_images": np.zeros((3, 8, 8), complex)}, "test_images is complex128 (3, 8, 8); expected numbers"),
        ({"test_images": np.full((3, 8, 8), np.nan)}, "test_images holds values that are not finite numbers"),
        (
            {"test_images": np.zeros((3, 3, 8, 8), dtype=np.uint8)},
            "test_images is uint8 (3, 3, 8, 8); expected",
        ),
        (
            {"test_images": np.zeros((2, 8, 8), dtype=np.uint8)},
            "test_images has 2 entries, test_labels has 3",
        ),
        ({"train_labels": np.array([None] * 6)}, "Python objects, which are never loaded"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, np.ndarray], expected: str) -> None:
    assert expected in refusal(tmp_path, arrays(**changes), classes=["normal", "ill"])


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    zeros = {f"{name}_labels": np.zeros(n, dtype=int) for name, n in (("train", 6), ("val", 2), ("test", 3))}
    assert "holds 1 class" in refusal(tmp_path, arrays(**zeros))


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    description = describe(tmp_path, arrays())
    path = tmp_path / "set.npz"
    whole = path.read_bytes()
    middle = whole.index(b"\x93NUMPY") + 200
    for content in (
        whole[: len(whole) // 2],
        whole[:middle] + b"\x00\x01\x02" + whole[middle + 3 :],
        b"",
        b"text",
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"^set\.npz can't be read as \.npz: [^\n]+$"):
            read_npz(description).cases(np.arange(11))
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="holds a single array"):
        read_npz(description)
    path.unlink()
    with pytest.raises(DataError, match="There is no file"):
        read_npz(description)


@pytest.mark.parametrize("stray", [255, 10**9, -1, 2**40])
def test_a_stray_label_is_named_with_its_count_and_may_be_ignored(tmp_path: Path, stray: int) -> None:
    labels = np.array([0, 1, stray, 0, stray, 1])
    message = refusal(tmp_path, arrays(train_labels=labels))
    assert f"a label outside the classes: {stray} (2 in train); the other labels are 0, 1" in message
    assert f"ignore_labels: [{stray}]" in message
    cases = read(tmp_path, arrays(train_labels=labels), ignore_labels=[stray])
    assert cases.classes == ("0", "1")
    assert cases.patients.tolist()[:4] == ["train-0", "train-1", "train-3", "train-5"]
    assert "2 images left out: their label is one of ignore_labels" in cases.notes
    stored = arrays(train_labels=labels)["train_images"]
    assert np.array_equal(cases.cases(np.arange(4)).images[:, 0].numpy(), stored[[0, 1, 3, 5]])


def test_classes_are_the_labels_that_occur_or_those_that_are_named(tmp_path: Path) -> None:
    changes = {
        "train_labels": np.array([1, 2, 3, 1, 2, 3]),
        "val_labels": np.array([1, 2]),
        "test_labels": np.array([3, 1, 2]),
    }
    occurring = read(tmp_path, arrays(**changes))
    assert occurring.classes == ("1", "2", "3")
    assert occurring.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    named = read(tmp_path, arrays(**changes), classes=["0", "1", "2", "3"])
    assert named.labels.tolist() == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]
    assert "3 (2 in train, 1 in test); expected 0 to 2" in refusal(tmp_path, arrays(**changes), classes=["a", "b", "c"])


def test_whole_numbers_of_any_type_are_labels(tmp_path: Path) -> None:
    for kind in (float, bool, np.uint64, np.int8):
        stored = arrays()
        stored |= {name: values.astype(kind) for name, values in stored.items() if name.endswith("labels")}
        assert read(tmp_path, stored).labels.tolist() == read(tmp_path, arrays()).labels.tolist()
