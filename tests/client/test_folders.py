"""`format: folders`: images in folders that are called what they show, without a manifest."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from chainward_client.data.description import load_description
from chainward_client.data.formats.folders import FoldersDescription, folder_rows
from chainward_client.data.sources import local_site, read_table
from chainward_shared.errors import DataError

KEY = b"k" * 32


def images(folder: Path, *names: str) -> None:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) + np.uint8(index)
        Image.fromarray(pixels).save(folder / name)


def described(tmp_path: Path, **changes: Any) -> Path:
    block = {"format": "folders", "images": "set", "image": {"size": 8, "channels": 1}, **changes}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(block))
    return tmp_path / "data.yaml"


def test_a_folder_per_class_is_a_data_set(tmp_path: Path) -> None:
    images(tmp_path / "set", *(f"{name}/{index}.png" for name in ("ill", "healthy") for index in range(8)))
    (tmp_path / "set" / "ill" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "set" / ".DS_Store").write_bytes(b"x")
    table = read_table(described(tmp_path))
    assert table.classes == ("healthy", "ill")
    assert table.labels.tolist() == [0] * 8 + [1] * 8
    assert table.splits is None
    data = local_site(tmp_path / "data.yaml", "north", KEY)
    assert sum(len(cases) for cases in data.splits.values()) == 16
    assert not data.has_patient_ids


def test_folders_of_splits_hold_folders_of_classes(tmp_path: Path) -> None:
    names = [f"{split}/{name}/{split}{name}.png" for split in ("train", "Validation", "test") for name in ("a", "b")]
    images(tmp_path / "set", *names, "train/a/deeper/still.png")
    data = local_site(described(tmp_path, classes=["b", "a"]), "north", KEY)
    assert {split: len(cases) for split, cases in data.splits.items()} == {"train": 3, "val": 2, "test": 2}
    assert data.classes == ("b", "a")


def test_a_zip_of_such_folders_is_read_with_the_folder_it_was_made_of(tmp_path: Path) -> None:
    images(tmp_path / "raw", "a/1.png", "b/1.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("a/1.png", "b/1.png"):
            archive.write(tmp_path / "raw" / name, f"export/{name}")
            archive.writestr(f"__MACOSX/export/{name}", b"shadow")
    header, *rows = folder_rows(tmp_path / "set.zip")
    assert header == ["image", "label"]
    assert rows == [["export/a/1.png", "a"], ["export/b/1.png", "b"]]
    assert len(read_table(described(tmp_path, images="set.zip")).cases(np.arange(2))) == 2


def test_a_class_called_test_beside_another_is_a_class(tmp_path: Path) -> None:
    images(tmp_path / "set", "test/1.png", "control/1.png")
    assert [row[1] for row in folder_rows(tmp_path / "set")[1:]] == ["control", "test"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/1.png", "stray.png", "other.png"], "2 images in no class folder; first: 'other.png'; 'stray.png'"),
        (
            ["train/1.png", "test/a/1.png"],
            "1 image in no class folder; first: 'train/1.png'; expected SPLIT/CLASS/image",
        ),
        ([], "holds no images"),
    ],
)
def test_images_without_a_class_are_refused(tmp_path: Path, names: list[str], expected: str) -> None:
    (tmp_path / "set").mkdir()
    images(tmp_path / "set", *names)
    with pytest.raises(DataError) as caught:
        read_table(described(tmp_path))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"columns": {"image": "i"}}, "'format: folders' has no key 'columns'"),
        ({"clases": ["a", "b"]}, "'clases' (did you mean 'classes'?)"),
        ({"images": "nowhere"}, "there is no"),
        ({"classes": ["a", "c"]}, "label outside the classes"),
    ],
)
def test_what_folders_can_not_say_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    images(tmp_path / "set", "a/1.png", "b/1.png")
    with pytest.raises(DataError) as caught:
        read_table(described(tmp_path, **changes))
    assert expected in str(caught.value)


def test_an_image_that_comes_later_is_seen(tmp_path: Path) -> None:
    images(tmp_path / "set", "a/1.png", "b/1.png")
    path = described(tmp_path)
    assert isinstance(load_description(path), FoldersDescription)
    assert len(read_table(path)) == 2
    images(tmp_path / "set", "a/deeper/2.png")
    assert len(read_table(path)) == 3
