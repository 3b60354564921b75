"""Files that can't be used are all named, and may be left out; names are found however a manifest writes them."""

from __future__ import annotations

import codecs
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from chainward_client.data.image_store import ImageStore
from chainward_client.data.site_data import SiteData
from chainward_client.data.sources import local_site
from chainward_client.data.unusable import ImageProblem, UnusableFiles
from chainward_client.doctor.data import checks_of, unusable_data
from chainward_shared.errors import DataError

KEY = b"k" * 32
HEADER = "image,dx,split,who"


def write(folder: Path, rows: list[str], header: str = HEADER, encoding: str = "utf-8", **changes: Any) -> Path:
    (folder / "cases.csv").write_bytes("\n".join([header, *rows]).encode(encoding))
    block: dict[str, Any] = {
        "format": "csv",
        "manifest": "cases.csv",
        "images": ".",
        "classes": ["a", "b"],
        "columns": {"image": "image", "label": "dx", "split": "split", "patient": "who"},
        "image": {"size": 8, "channels": 1},
        **changes,
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(block))
    return folder / "data.yaml"


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) + np.uint8(value)).save(path)


def opened(path: Path) -> SiteData:
    return local_site(path, "north", KEY)


def damaged_set(folder: Path, **changes: Any) -> Path:
    """Nine images, of which five can't be used, each for a reason of its own."""
    rows = []
    for index in range(9):
        picture(folder / f"i{index}.png", index)
        rows.append(f"i{index}.png,{'ab'[index % 2]},{['train', 'val', 'test'][index % 3]},p{index}")
    (folder / "i1.png").write_bytes(b"")
    (folder / "i3.png").write_bytes(b"no picture")
    (folder / "i4.png").write_bytes((folder / "i4.png").read_bytes()[:-30])
    (folder / "i5.png").unlink()
    Image.new("CMYK", (8, 8)).save(folder / "i7.png", "TIFF")
    return write(folder, rows, **changes)


def test_every_unusable_file_is_named_with_its_row_and_reason(tmp_path: Path) -> None:
    path = damaged_set(tmp_path)
    with pytest.raises(UnusableFiles) as caught:
        opened(path)
    assert [file.row for file in caught.value.files] == [3, 5, 6, 7, 9]
    assert all(f"'i{index}.png'" in file.shown for index, file in zip((1, 3, 4, 5, 7), caught.value.files, strict=True))
    assert "3 unreadable images; first: row 3, 'i1.png': the file is empty; row 5, " in str(caught.value)
    check = unusable_data(path, caught.value)
    assert check.outcome == "problem"
    assert check.items == tuple(file.shown for file in caught.value.files)
    assert "unusable: leave-out" in check.advice


def test_unusable_files_may_be_left_out_and_are_counted(tmp_path: Path) -> None:
    path = damaged_set(tmp_path, unusable="leave-out")
    data = opened(path)
    assert {split: cases.patients.tolist() for split, cases in data.splits.items()} == {
        "train": ["p0", "p6"],
        "val": [],
        "test": ["p2", "p8"],
    }
    assert [int(image[0, 0, 0]) for image in data.splits["train"].images] == [0, 6]
    assert "5 of 9 images left out: their files can't be used (unusable: leave-out)" in data.notes
    check = next(check for check in checks_of(path, data) if check.name == "images: left out")
    assert len(check.items) == 5
    assert "'i1.png'" in check.found


def test_a_mask_that_can_not_be_used_leaves_its_case_out(tmp_path: Path) -> None:
    rows = []
    for index in range(6):
        picture(tmp_path / f"i{index}.png", index)
        Image.new("L", (8, 8), 255).save(tmp_path / f"m{index}.png")
        rows.append(f"i{index}.png,{'ab'[index % 2]},{['train', 'val', 'test'][index % 3]},p{index},m{index}.png")
    (tmp_path / "m3.png").write_bytes(b"")
    (tmp_path / "i4.png").write_bytes(b"")
    columns = {"image": "image", "label": "dx", "split": "split", "patient": "who", "mask": "m"}
    data = opened(write(tmp_path, rows, HEADER + ",m", columns=columns, unusable="leave-out"))
    assert data.splits["train"].patients.tolist() == ["p0"]
    assert any(note.startswith("2 of 6 images left out") for note in data.notes)


def test_nothing_is_trained_where_all_files_are_unusable(tmp_path: Path) -> None:
    path = write(tmp_path, ["x.png,a,train,p1", "y.png,b,test,p2"], unusable="leave-out")
    with pytest.raises(DataError, match="2 images not found"):
        opened(path)


def test_a_dicom_file_without_a_patient_is_left_out_too(tmp_path: Path, dicom: Any) -> None:
    rows = []
    for index in range(6):
        pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) + np.uint8(index)
        (tmp_path / f"i{index}.dcm").write_bytes(dicom(pixels, PatientID=f"P{index}" if index != 3 else None))
        rows.append(f"i{index}.dcm,{'ab'[index % 2]},{['train', 'val', 'test'][index % 3]}")
    (tmp_path / "i4.dcm").write_bytes(b"")
    columns = {"image": "image", "label": "dx", "split": "split"}
    path = write(tmp_path, rows, "image,dx,split", format="dicom", columns=columns, unusable="leave-out")
    data = opened(path)
    assert [len(cases) for cases in data.splits.values()] == [1, 1, 2]
    assert any(note.startswith("2 of 6 images left out") for note in data.notes)


# --- names ---


@pytest.mark.parametrize(
    "name",
    [
        "north/im 1.png",
        "/mnt/archive/export/north/im 1.png",
        "/mnt/archive/im 1.png",
        "C:\\export\\north\\im 1.png",
        "north\\im 1.png",
        "NORTH/IM 1.PNG",
        "im 1",
    ],
)
def test_an_image_is_found_by_a_name_as_manifests_write_it(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "north" / "im 1.png", 1)
    with ImageStore(tmp_path) as store:
        assert store.find(name) == "north/im 1.png"


@pytest.mark.parametrize("name", ["other/im.png", "../north/im.png", "/etc/passwd", "north/im.png/", "im.pn"])
def test_a_name_with_another_folder_or_of_nothing_is_not_found(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "north" / "im.png", 1)
    with ImageStore(tmp_path) as store:
        if name == "north/im.png/":
            assert store.find(name) == "north/im.png"
            return
        with pytest.raises(ImageProblem, match="no such file"):
            store.find(name)


@pytest.mark.parametrize(("stored", "named"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accented_letters_are_the_same_in_either_form(tmp_path: Path, stored: str, named: str) -> None:
    picture(tmp_path / unicodedata.normalize(stored, "Müller é.png"), 1)  # type: ignore[arg-type]
    with ImageStore(tmp_path) as store:
        assert store.find(unicodedata.normalize(named, "Müller é.png"))  # type: ignore[arg-type]


def test_where_two_files_differ_only_in_case_the_exact_name_decides(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "A.png", 2)
    with ImageStore(tmp_path) as store:
        assert (store.find("a.png"), store.find("A.png")) == ("a.png", "A.png")
        with pytest.raises(ImageProblem, match=r"could be A\.png or a\.png"):
            store.find("a.PNG")


def test_linked_folders_are_followed_and_a_circle_of_links_has_an_end(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "im.png", 1)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "images")
    with ImageStore(tmp_path / "images") as store:
        assert store.find("linked/im.png") == "linked/im.png"


# --- tables ---


@pytest.mark.parametrize("unending", ["pipe", "device", "link to nothing"])
def test_what_is_no_file_is_not_found_instead_of_being_waited_for(tmp_path: Path, unending: str) -> None:
    place = tmp_path / "a.png"
    if unending == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero" if unending == "device" else tmp_path / "nothing")
    with ImageStore(tmp_path) as store:
        assert store.members == ()
        with pytest.raises(ImageProblem, match="no such file"):
            store.find("a.png")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("utf-8", "utf-8"), ("utf-8 with mark", "utf-8-sig"), ("utf-16", "utf-16"), ("utf-32", "utf-32")],
)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_is_read_in_what_spreadsheets_write(tmp_path: Path, text: str, encoding: str, separator: str) -> None:
    rows = [f"Bild-ä{index}.png,{'ab'[index]},{split},Pé{index}" for index, split in enumerate(("train", "test"))]
    for index in range(2):
        picture(tmp_path / f"Bild-ä{index}.png", index)
    rows = [row.replace(",", separator) for row in rows]
    data = opened(write(tmp_path, rows, HEADER.replace(",", separator), encoding))
    assert data.splits["train"].patients.tolist() == ["Pé0"], text


def test_the_line_by_which_excel_tells_its_separator_is_no_row(tmp_path: Path) -> None:
    for index in range(2):
        picture(tmp_path / f"i{index}.png", index)
    data = opened(write(tmp_path, ["i0.png|a|train|p0", "i1.png|b|test|p1"], "sep=|\n" + HEADER.replace(",", "|")))
    assert data.splits["train"].patients.tolist() == ["p0"]
    with pytest.raises(DataError, match="row 3, 'c'"):
        opened(write(tmp_path, ["i0.png;a;train;p0", "i1.png;c;test;p1"], "sep=;\n" + HEADER.replace(",", ";")))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            f"{HEADER}\ni.png,a,train,M\xfcller\n".encode("cp1252"),
            "line 2, column 4 'who', byte 0xFC, 'ü' in Windows-1252",
        ),
        (
            f"{HEADER}\r\ni.png,a,train,p\r\n\xe9.png,a,x,p\r\n".encode("cp1252"),
            "line 3, column 1 'image', byte 0xE9, 'é'",
        ),
        ('image;dx;"sp;l";who\nx;"q;\xe9"'.encode("latin-1"), "line 2, column 2 'dx', byte 0xE9"),
        (b"im\xe4ge,dx\n", "line 1, column 1, byte 0xE4"),
        (f"{HEADER}\na".encode("utf-16-le"), "a zero byte in line 1: UTF-16 without its mark?"),
        (codecs.BOM_UTF16_LE + b"a\0\x00\xd8", "its mark says UTF-16"),
    ],
)
def test_text_in_another_encoding_is_named_with_its_place_and_how_to_save_it(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = write(tmp_path, [])
    (tmp_path / "cases.csv").write_bytes(content)
    with pytest.raises(DataError) as caught:
        opened(path)
    assert expected in str(caught.value)
    assert "CSV UTF-8" in str(caught.value)


def test_one_patient_in_two_spellings_of_programs_is_one_and_noted(tmp_path: Path) -> None:
    rows = []
    for index, who in enumerate(["12", "12.0", "Zo\u00eb", "Zoe\u0308", "p 1", "p  1", "07", "7", "x", "X"]):
        picture(tmp_path / f"i{index}.png", index)
        rows.append(f"i{index}.png,{'ab'[index % 2]},train,{who}")
    picture(tmp_path / "t.png", 99)
    data = opened(write(tmp_path, [*rows, "t.png,a,test,last"]))
    patients = data.splits["train"].patients
    assert len(set(patients.tolist())) == 7
    assert patients[0] == patients[1] == "12"
    assert patients[2] == patients[3]
    assert patients[4] == patients[5]
    assert any(note.startswith("3 patients of column 'who' are written in several ways") for note in data.notes)
    assert any(note.startswith("4 patients of column 'who' differ from another only in case") for note in data.notes)
    assert not any("Zo" in note for note in data.notes)


def test_one_patient_in_two_spellings_on_both_sides_of_a_split_is_refused(tmp_path: Path) -> None:
    for index in range(2):
        picture(tmp_path / f"i{index}.png", index)
    with pytest.raises(DataError, match="'12' in train"):
        opened(write(tmp_path, ["i0.png,a,train,12", "i1.png,b,test,12.0"]))


def test_labels_that_mean_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = []
    for index, label in enumerate(["a", "b", "-1", "-1.0", "255", "a"]):
        picture(tmp_path / f"i{index}.png", index)
        rows.append(f"i{index}.png,{label},{['train', 'train', 'train', 'val', 'val', 'test'][index]},p{index}")
    data = opened(write(tmp_path, rows, ignore_labels=[-1, 255]))
    assert [len(cases) for cases in data.splits.values()] == [2, 0, 1]
    assert "3 rows left out: their label is one of ignore_labels" in data.notes


def test_copies_of_one_picture_in_two_splits_are_counted(tmp_path: Path) -> None:
    for index in range(4):
        picture(tmp_path / f"i{index}.png", 0 if index in (0, 3) else index)
    rows = [f"i{index}.png,{'ab'[index % 2]},{split},p{index}" for index, split in enumerate(["train"] * 3 + ["test"])]
    path = write(tmp_path, rows)
    data = opened(path)
    assert data.copies() == 1
    assert any(note.startswith("1 picture in two splits") for note in data.notes)
    assert [check.name for check in checks_of(path, data)].count("patients: copies") == 1


def test_a_mask_that_cannot_be_used_leaves_out_its_own_case_where_others_have_no_mask(tmp_path: Path) -> None:
    rows = []
    for index in range(9):
        picture(tmp_path / f"i{index}.png", index)
        picture(tmp_path / f"m{index}.png", index)
        mask = f"m{index}.png" if index > 3 else ""
        rows.append(f"i{index}.png,{'ab'[index % 2]},{['train', 'val', 'test'][index % 3]},p{index},{mask}")
    (tmp_path / "m6.png").write_bytes(b"")
    columns = {"image": "image", "label": "dx", "split": "split", "patient": "who", "mask": "mask"}
    data = opened(write(tmp_path, rows, header=f"{HEADER},mask", columns=columns, unusable="leave-out"))
    kept = {patient for cases in data.splits.values() for patient in cases.patients.tolist()}
    assert kept == {f"p{index}" for index in range(9) if index != 6}
