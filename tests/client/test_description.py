"""A data file is read into a typed description, or refused with one line that says what to change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from chainward_client.data.description import ImageShape, load_description, parse_description
from chainward_client.data.formats.csv import CsvDescription
from chainward_client.data.formats.npz import NpzDescription
from chainward_shared.errors import DataError

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cases.csv").write_text("image,dx\n")
    (tmp_path / "cases.npz").write_bytes(b"")
    (tmp_path / "pictures").mkdir()
    return tmp_path


def csv_block(**changes: object) -> dict[str, object]:
    block: dict[str, object] = {
        "format": "csv",
        "manifest": "cases.csv",
        "classes": ["healthy", "ill"],
        "columns": {"image": "image", "label": "dx"},
    }
    return block | changes


def columns(**changes: object) -> dict[str, object]:
    return {"image": "image", "label": "dx"} | changes


def write(folder: Path, text: str) -> Path:
    path = folder / "data.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, block: object) -> str:
    path = write(folder, yaml.safe_dump(block))
    with pytest.raises(DataError) as caught:
        load_description(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("key", ["manifest", "images"])
def test_a_pipe_in_place_of_a_file_is_refused_instead_of_being_waited_for(folder: Path, key: str) -> None:
    os.mkfifo(folder / "pipe")
    expected = "is a pipe or a device; expected a file" if key == "manifest" else "neither a folder nor a whole zip"
    assert expected in refusal(folder, csv_block(**{key: "pipe"}))


def test_a_minimal_csv_description_has_the_documented_defaults(folder: Path) -> None:
    description = load_description(write(folder, yaml.safe_dump(csv_block())))
    assert isinstance(description, CsvDescription)
    assert description.image == ImageShape(size=64, channels=3, fit="pad")
    assert description.image_location == folder
    assert description.columns.by_key() == {"image": "image", "label": "dx"}


def test_paths_are_relative_to_the_data_file_not_to_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, yaml.safe_dump(csv_block(images="pictures")))
    monkeypatch.chdir(folder)
    description = load_description("data.yaml")
    assert isinstance(description, CsvDescription)
    assert description.manifest == folder / "cases.csv"
    assert description.image_location == folder / "pictures"
    assert description.manifest.is_absolute()


def test_masks_are_looked_up_where_the_images_are_unless_a_place_is_named(folder: Path) -> None:
    (folder / "masks").mkdir()
    block = csv_block(images="pictures", columns=columns(mask="mask"))
    without = parse_description(block, folder / "data.yaml")
    named = parse_description(block | {"masks": "masks"}, folder / "data.yaml")
    assert isinstance(without, CsvDescription)
    assert isinstance(named, CsvDescription)
    assert without.mask_location == folder / "pictures"
    assert named.mask_location == folder / "masks"


def test_npz_needs_no_classes(folder: Path) -> None:
    description = load_description(write(folder, "format: npz\nimages: cases.npz\n"))
    assert isinstance(description, NpzDescription)
    assert description.classes is None


def test_numeric_class_names_become_text(folder: Path) -> None:
    assert parse_description(csv_block(classes=[0, 1]), folder / "data.yaml").classes == ("0", "1")


@pytest.mark.parametrize("name", ["ham10000", "pneumoniamnist"])
def test_the_examples_are_valid_where_their_files_are(name: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("")
    (tmp_path / "images_200x150.zip").write_bytes(b"PK\x05\x06" + bytes(18))  # a zip without members
    (tmp_path / "pneumoniamnist.npz").write_bytes(b"")
    text = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")
    assert load_description(write(tmp_path, text)).classes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image": {"sise": 64}}, "key 'image': unknown key 'sise' (did you mean 'size'?)"),
        ({"colums": {}}, "unknown key 'colums' (did you mean 'columns'?)"),
        (
            {"columns": columns(lable="dx", patent="p")},
            "'lable' (did you mean 'label'?), 'patent' (did you mean",
        ),
        ({"columns": {"image": "image"}}, "key 'columns.label' is missing"),
        ({"image": {"size": 4}}, "key 'image.size': found 4; input should be greater than or equal to 8"),
        ({"image": {"channels": 2}}, "key 'image.channels': found 2"),
        ({"image": {"fit": "fill"}}, "'pad', 'crop' or 'stretch'"),
        ({"manifest": "absent.csv"}, "key 'manifest': there is no /"),
        ({"manifest": "pictures"}, "is a folder; expected a file"),
        ({"images": "absent.zip"}, "key 'images': there is no /"),
        ({"images": "a" * 300}, "can't be read: File name too long"),
        ({"manifest": "two\nlines.csv"}, "two lines.csv; give the path relative to the data file"),
        ({"images": "cases.csv"}, "neither a folder nor a whole zip"),
        ({"masks": "pictures"}, "without 'columns.mask'"),
        ({"classes": ["ill"]}, "at least 2"),
        ({"classes": ["ill", "ill"]}, "class 'ill' is given more than once"),
        ({"classes": [True, False]}, "put it in quotes"),
        ({"columns": columns(mask="m", box=["a", "b", "c", "d"])}, "both 'mask' and 'box'"),
        ({"columns": columns(box=["a", "b", "c", "c"])}, "box column 'c' is given more than once"),
        ({"columns": columns(text="dx")}, "column 'dx' is both label and privileged"),
        ({"columns": ["image", "label"]}, "key 'columns': expected a mapping"),
    ],
)
def test_a_wrong_key_is_named_with_what_is_expected(folder: Path, changes: dict[str, object], expected: str) -> None:
    assert expected in refusal(folder, csv_block(**changes))


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"kind": "number", "min": 5, "max": 5}, "key 'columns.tabular.age': min 5 is not below max 5"),
        ({"kind": "number", "min": 0}, "key 'columns.tabular.age.max' is missing"),
        ({"kind": "number", "min": 0, "max": float("inf")}, "finite number"),
        ({"kind": "category", "values": []}, "at least 1"),
        ({"kind": "category", "values": ["a", "a"]}, "value 'a' is given more than once"),
        ({"kind": "text"}, "found kind 'text'; expected number or category"),
        ({"min": 0, "max": 1}, "'kind' is missing; expected number or category"),
        ("number", "expected a mapping"),
    ],
)
def test_a_wrong_tabular_column_is_named(folder: Path, declared: object, expected: str) -> None:
    assert expected in refusal(folder, csv_block(columns=columns(tabular={"age": declared})))


def test_all_wrong_keys_are_reported_together(folder: Path) -> None:
    message = refusal(folder, csv_block(manifest="absent.csv", image={"size": 1}))
    assert "'manifest'" in message
    assert "'image.size'" in message


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"format": "dicom"}, "key 'manifest' is missing"),
        ({"format": "phantom"}, "phantoms need no data file"),
        ({"format": "CSV"}, "found 'CSV' (did you mean 'csv'?)"),
        ({"format": "cvs"}, "found 'cvs' (did you mean 'csv'?); expected csv, dicom, folders or npz"),
        ({"formt": "csv"}, "key 'format' is missing (there is 'formt')"),
        ({"format": ["csv"]}, "expected csv, dicom, folders or npz"),
        ({"format": "npz", "images": "cases.npz", "manifest": "cases.csv"}, "unknown key 'manifest'"),
        (["format"], "expected a mapping ('format: csv', ...), found a list"),
        ("csv", "found 'csv'"),
    ],
)
def test_a_file_that_is_no_description_says_what_it_is(folder: Path, block: object, expected: str) -> None:
    assert expected in refusal(folder, block)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("format: [csv\n", "is not valid YAML"),
        ("format: csv\n\tclasses: [a, b]\n", "line 2"),
        ("format: 2024-99-99\n", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DataError, match=r"^Data file [^\n]*$") as caught:
        load_description(write(tmp_path, text))
    assert expected in str(caught.value)


def test_a_missing_file_a_folder_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no data file"):
        load_description(tmp_path / "absent.yaml")
    with pytest.raises(DataError, match="can't be read"):
        load_description(tmp_path)
    (tmp_path / "data.yaml").write_bytes(b"format: \xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        load_description(tmp_path / "data.yaml")
