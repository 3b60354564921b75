"""A CSV manifest becomes checked arrays and cases, or one line that counts what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chainward_client.data.description import parse_description
from chainward_client.data.formats.csv import CsvDescription
from chainward_client.data.manifest import Manifest, read_manifest
from chainward_client.data.splits import split_by_patient
from chainward_shared.errors import DataError
from chainward_shared.seeds import numpy_generator

HEADER = "image,dx,patient,split,notes,age,sex"
GOOD = [
    "a,ill,p1,train,opaque left,50,female",
    "b,healthy,p2,train,clear,,male",
    "c,ill,p3,val,,70,unknown",
    "d,healthy,p4,test,clear,30,",
]


def describe(folder: Path, lines: list[str], **changes: object) -> CsvDescription:
    (folder / "cases.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    columns = {"image": "image", "label": "dx", "patient": "patient", "split": "split"}
    block = {
        "format": "csv",
        "manifest": "cases.csv",
        "classes": ["healthy", "ill"],
        "columns": columns | changes,
        "image": {"size": 8, "channels": 1},
    }
    description = parse_description(block, folder / "data.yaml")
    assert isinstance(description, CsvDescription)
    return description


def read(folder: Path, lines: list[str], **changes: object) -> Manifest:
    return read_manifest(describe(folder, lines, **changes))


def refusal(folder: Path, lines: list[str], **changes: object) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, lines, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert "cases.csv" in message
    return message


# what is read


def test_a_good_manifest_is_read_column_by_column(tmp_path: Path) -> None:
    tabular = {
        "age": {"kind": "number", "min": 0, "max": 100},
        "sex": {"kind": "category", "values": ["female", "male", "unknown"]},
    }
    manifest = read(tmp_path, [HEADER, *GOOD], text="notes", tabular=tabular)
    assert manifest.rows.tolist() == [2, 3, 4, 5]
    assert manifest.labels.tolist() == [1, 0, 1, 0]
    assert manifest.patients.tolist() == ["p1", "p2", "p3", "p4"]
    assert manifest.splits is not None
    assert manifest.splits.tolist() == ["train", "train", "val", "test"]
    assert manifest.texts == ("opaque left", "clear", None, "clear")
    assert manifest.table == {"age": (50.0, None, 70.0, 30.0), "sex": ("female", "male", "unknown", None)}
    assert manifest.notes == ()


def test_ids_stay_text_however_numeric_they_look(tmp_path: Path) -> None:
    manifest = read(tmp_path, ["image,dx,patient,split", "001,ill,007,train", "1,ill,7,val"])
    assert manifest.images.tolist() == ["001", "1"]
    assert manifest.patients.tolist() == ["007", "7"]


def test_labels_may_be_indices(tmp_path: Path) -> None:
    manifest = read(tmp_path, ["image,dx,patient,split", "a,1,p,train", "b,0,q,val", "c,1.0,r,val"])
    assert manifest.labels.tolist() == [1, 0, 1]


def test_numeric_class_names_are_names_not_indices(tmp_path: Path) -> None:
    description = describe(tmp_path, ["image,dx,patient,split", "a,1,p,train", "b,2,q,val"])
    manifest = read_manifest(description.model_copy(update={"classes": ("1", "2")}))
    assert manifest.labels.tolist() == [0, 1]


def test_without_patient_column_each_image_is_a_patient_and_a_note_says_so(tmp_path: Path) -> None:
    manifest = read(tmp_path, [HEADER, *GOOD], patient=None)
    assert manifest.patients.tolist() == ["a", "b", "c", "d"]
    assert any("no patient column" in note for note in manifest.notes)


def test_blank_lines_are_skipped_and_rows_are_named_as_a_spreadsheet_counts_them(tmp_path: Path) -> None:
    lines = [HEADER, GOOD[0], "", ",,,,,,", 'b,healthy,p2,train,"two\nlines",,', "c,sick,p3,val,,,"]
    assert "row 6, 'sick'" in refusal(tmp_path, lines)


def test_spaces_around_cells_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    manifest = read(tmp_path, ["\ufeffimage, dx ,patient,split", " a , ill,p1 ,train "])
    assert manifest.images.tolist() == ["a"]
    assert manifest.labels.tolist() == [1]


# what is refused


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            ["a,sick,p,train", "b,ilt,q,train", "c,ill,r,val"],
            "column 'dx': 2 labels outside the classes; first:",
        ),
        (["a,ill,p,train", "b,ilt,q,train"], "row 3, 'ilt' (did you mean 'ill'?); expected healthy or ill"),
        (["a,2,p,train", "b,0,q,val"], "1 label outside the classes; first: row 2, '2'"),
        (["a,ill,p,train", "b,0,q,val"], "1 label outside the classes; first: row 3, '0'"),
        (['a,"sick,\nvery",p,train', "b,ill,q,val"], "first: row 2, 'sick, very'; expected healthy or ill"),
        (["a,-1,p,train", "b,0.5,q,val"], "2 labels outside the classes"),
        (["a,,p,train", "b,NA,q,train", "c,ill,r,val"], "column 'dx': 2 rows without a label; first: row 2"),
        (["a,ill,p,train", ",ill,q,val"], "column 'image': 1 row without a value; first: row 3"),
        (["a,ill,,train", "b,ill,nan,val"], "column 'patient': 2 rows without a value; first: row 2"),
        (["a,ill,p,train", "a,ill,p,train"], "1 image in more than one row; first: 'a' in rows 2, 3"),
        (
            ["a,ill,p,train", "b,ill,p,val"],
            "1 patient in more than one split; first: 'p' in train (row 2) and val",
        ),
        (
            ["a,ill,p,Train", "b,ill,q,"],
            "2 rows with another split; first: row 2, 'Train' (did you mean 'train'?)",
        ),
        (["a,ill,p,validation"], "first: row 2, 'validation'"),
    ],
)
def test_bad_rows_are_counted_and_the_first_is_named(tmp_path: Path, rows: list[str], expected: str) -> None:
    assert expected in refusal(tmp_path, ["image,dx,patient,split", *rows])


def test_all_kinds_of_problems_are_reported_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, ["image,dx,patient,split", "a,sick,p,train", "b,ill,q,prod", "b,ill,r,val"])
    for kind in ("outside the classes", "another split", "more than one row"):
        assert kind in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"label": "dxx"}, "column 'dxx' (columns.label) is missing (did you mean 'dx'?)"),
        ({"box": ["x0", "y0", "x1", "y1"]}, "column 'x0' (columns.box[0]) is missing"),
        (
            {"tabular": {"agee": {"kind": "number", "min": 0, "max": 1}}},
            "'agee' (columns.tabular.agee) is missing",
        ),
        ({"text": "age"}, "column 'age' holds numbers only (row 2, '50', ...); expected text"),
        ({"text": "empty"}, "column 'empty' is empty in every row"),
        (
            {"tabular": {"age": {"kind": "number", "min": 0, "max": 40}}},
            "'age': 2 values outside the declared range",
        ),
        ({"tabular": {"age": {"kind": "number", "min": 0, "max": 40}}}, "first: row 2, 50; expected 0 to 40"),
        (
            {"tabular": {"sex": {"kind": "number", "min": 0, "max": 1}}},
            "'sex': 3 values that are not numbers",
        ),
        (
            {"tabular": {"sex": {"kind": "category", "values": ["femal", "male"]}}},
            "'sex': 2 values that are not",
        ),
        ({"tabular": {"sex": {"kind": "category", "values": ["femal", "male"]}}}, "(did you mean 'femal'?)"),
    ],
)
def test_columns_that_do_not_hold_what_was_declared_are_refused(
    tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    lines = [HEADER + ",empty", *(row + "," for row in GOOD)]
    assert expected in refusal(tmp_path, lines, **changes)


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        (["0,0,x,5", "0,0,5,5"], "column 'x1': 1 value that is not a number; first: row 2, 'x'"),
        (["0,0,5,5", "0,,5,5"], "1 box without all four edges; first: row 3"),
    ],
)
def test_broken_boxes_are_refused(tmp_path: Path, boxes: list[str], expected: str) -> None:
    rows = [f"i{n},ill,p{n},train,{box}" for n, box in enumerate(boxes)]
    lines = ["image,dx,patient,split,x0,y0,x1,y1", *rows]
    assert expected in refusal(tmp_path, lines, box=["x0", "y0", "x1", "y1"])


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["image|dx|patient|split", "a|ill|p|train"], "separated by '|', expected commas"),
        (["image,dx,patient,split"], "has a header but no rows"),
        (["image,dx,patient,split", "a,ill,p,train", "b,ill,q,train,extra"], "line 3"),
        (["image,dx,patient,split", "a,ill,p,train,extra", "b,ill,q,train,extra"], "not a well-formed CSV"),
        (["image,dx,patient,split,dx", "a,ill,p,train,ill"], "column 'dx' is there 2 times"),
        (["image,dx,patient,split", 'a,"ill,p,train'], "not a well-formed CSV"),
    ],
)
def test_a_file_that_is_no_proper_table_is_refused(tmp_path: Path, lines: list[str], expected: str) -> None:
    assert expected in refusal(tmp_path, lines)


def test_a_row_that_is_too_short_lacks_its_last_cells(tmp_path: Path) -> None:
    lines = ["image,dx,patient,split", "a,ill,p,train", "b,ill"]
    message = refusal(tmp_path, lines)
    assert "column 'patient': 1 row without a value; first: row 3" in message


def test_empty_undecodable_and_vanished_files_are_refused(tmp_path: Path) -> None:
    description = describe(tmp_path, [HEADER, *GOOD])
    (tmp_path / "cases.csv").write_text("")
    with pytest.raises(DataError, match=r"cases\.csv is empty"):
        read_manifest(description)
    (tmp_path / "cases.csv").write_bytes("image,dx\nä,ill\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_manifest(description)
    (tmp_path / "cases.csv").unlink()
    with pytest.raises(DataError, match="There is no manifest"):
        read_manifest(description)


# cases


def save_images(folder: Path, *names: str) -> None:
    for value, name in enumerate(names):
        Image.new("L", (8, 8), 10 * value).save(folder / f"{name}.png")


def test_cases_hold_the_asked_rows_in_the_asked_order(tmp_path: Path) -> None:
    save_images(tmp_path, "a", "b", "c", "d")
    tabular = {"age": {"kind": "number", "min": 0, "max": 100}}
    manifest = read(tmp_path, [HEADER, *GOOD], text="notes", tabular=tabular)
    cases = manifest.cases(np.array([3, 0]))
    assert cases.images[:, 0, 0, 0].tolist() == [30, 0]
    assert cases.labels.tolist() == [0, 1]
    assert cases.labels.dtype == torch.int64
    assert cases.patients.tolist() == ["p4", "p1"]
    assert cases.privileged.texts == ("clear", "opaque left")
    assert cases.privileged.table == {"age": (30.0, 50.0)}
    assert cases.privileged.masks is None


def test_only_the_asked_rows_are_decoded(tmp_path: Path) -> None:
    save_images(tmp_path, "a")
    manifest = read(tmp_path, [HEADER, *GOOD])
    assert len(manifest.cases(np.array([0]))) == 1
    with pytest.raises(DataError, match="3 images not found; first: row 3, 'b'"):
        manifest.cases(np.array([0, 1, 2, 3]))


def test_masks_and_boxes_become_masks_of_the_cases(tmp_path: Path) -> None:
    save_images(tmp_path, "a", "b")
    Image.new("L", (8, 8), 255).save(tmp_path / "a_mask.png")
    by_mask = ["image,dx,patient,split,mask", "a,ill,p,train,a_mask.png", "b,ill,q,train,"]
    masks = read(tmp_path, by_mask, mask="mask").cases(np.array([0, 1])).privileged.masks
    assert masks is not None
    assert masks.sum(dim=(1, 2)).tolist() == [64, 0]
    by_box = ["image,dx,patient,split,l,t,r,b", "a,ill,p,train,0,0,4,2", "b,ill,q,train,,,,"]
    boxes = read(tmp_path, by_box, box=["l", "t", "r", "b"]).cases(np.array([1, 0])).privileged.masks
    assert boxes is not None
    assert boxes.sum(dim=(1, 2)).tolist() == [0, 8]
    assert boxes[1, :2, :4].all()


def test_masks_of_the_images_names_may_lie_in_a_place_of_their_own(tmp_path: Path) -> None:
    for name, value in (("images", 7), ("masks", 255)):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8), value).save(tmp_path / name / "a.png")
    description = describe(tmp_path, ["image,dx,patient,split,mask", "a,ill,p,train,a"], mask="mask")
    places = {"images": tmp_path / "images", "masks": tmp_path / "masks"}
    cases = read_manifest(description.model_copy(update=places)).cases(np.array([0]))
    assert cases.images.unique().tolist() == [7]
    assert cases.privileged.masks is not None
    assert cases.privileged.masks.unique().tolist() == [1]


def test_a_box_beyond_its_image_names_the_manifest(tmp_path: Path) -> None:
    save_images(tmp_path, "a")
    lines = ["image,dx,patient,split,l,t,r,b", "a,ill,p,train,0,0,40,2"]
    manifest = read(tmp_path, lines, box=["l", "t", "r", "b"])
    with pytest.raises(DataError, match=r"^cases\.csv: 1 box beyond its image; first: row 2"):
        manifest.cases(np.array([0]))


# splitting


def split(labels: np.ndarray, patients: np.ndarray, seed: int = 0) -> np.ndarray:
    return split_by_patient(labels, patients, int(labels.max()) + 1, numpy_generator(seed, "test"))


def test_a_split_keeps_patients_whole_and_classes_in_proportion() -> None:
    rng = np.random.default_rng(1)
    patients = np.array([f"p{number:04d}" for number in rng.integers(0, 900, 2000)])
    labels = np.array([(0, 0, 0, 0, 0, 0, 0, 1, 1, 2)[int(patient[-1])] for patient in patients])
    splits = split(labels, patients)
    for patient in np.unique(patients):
        assert len(np.unique(splits[patients == patient])) == 1
    for label in range(3):
        of_class = splits[labels == label]
        for name, fraction in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
            assert abs((of_class == name).mean() - fraction) < 0.03


def test_a_split_is_the_same_for_the_same_seed_only_and_whatever_the_order_of_rows() -> None:
    patients = np.array([f"p{number:03d}" for number in range(100)])
    labels = np.arange(100) % 2
    order = np.random.default_rng(0).permutation(100)
    assert np.array_equal(split(labels, patients), split(labels, patients))
    assert np.array_equal(split(labels, patients)[order], split(labels[order], patients[order]))
    assert not np.array_equal(split(labels, patients, 0), split(labels, patients, 1))


@pytest.mark.parametrize(
    ("num_patients", "expected"),
    [(1, {"train"}), (2, {"train", "test"}), (3, {"train", "val", "test"}), (7, {"train", "val", "test"})],
)
def test_no_split_is_empty_when_patients_suffice(num_patients: int, expected: set[str]) -> None:
    patients = np.repeat([f"p{number}" for number in range(num_patients)], 2)
    for seed in range(20):
        assert set(split(np.zeros(len(patients), dtype=int), patients, seed)) == expected


def test_the_only_patient_of_a_rare_class_is_for_training() -> None:
    labels = np.array([0] * 50 + [1])
    assert split(labels, np.arange(51).astype(str))[-1] == "train"
