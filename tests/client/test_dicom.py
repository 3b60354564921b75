"""A manifest of DICOM files: which file a row means, whose it is, what is refused, and how masks and boxes follow."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom")

from chainward_client.data import dicom_file, dicom_headers, dicom_workers, image_store
from chainward_client.data.description import parse_description
from chainward_client.data.formats.dicom import DicomDescription, DicomManifest, read_dicom
from chainward_client.data.sources import local_site
from chainward_shared.data_notes import NO_PATIENTS
from chainward_shared.errors import DataError

Write = Callable[..., bytes]
JPEG_LOSSLESS = "1.2.840.10008.1.2.4.70"


def filled(value: int) -> np.ndarray:
    return np.full((8, 8), value, np.uint8)


def describe(folder: Path, lines: list[str], **changes: Any) -> DicomDescription:
    (folder / "cases.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    block = {
        "format": "dicom",
        "manifest": "cases.csv",
        "classes": ["healthy", "ill"],
        "columns": {"image": "image", "label": "dx"},
        "image": {"size": 8, "channels": 1},
    }
    if "columns" in changes:
        changes["columns"] = block["columns"] | changes["columns"]
    description = parse_description(block | changes, folder / "data.yaml")
    assert isinstance(description, DicomDescription)
    return description


def read(folder: Path, lines: list[str], **changes: Any) -> DicomManifest:
    return read_dicom(describe(folder, lines, **changes))


def grey(manifest: DicomManifest) -> list[int]:
    return [int(image[0, 0, 0]) for image in manifest.cases(np.arange(len(manifest))).images]


def refusal(folder: Path, lines: list[str], **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        manifest = read(folder, lines, **changes)
        manifest.cases(np.arange(len(manifest)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def save(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# --- finding files ---


def test_files_are_found_by_name_with_or_without_ending_and_folder(dicom: Write, tmp_path: Path) -> None:
    save(tmp_path / "a.dcm", dicom(filled(10), PatientID="P1"))
    save(tmp_path / "study" / "b.DCM", dicom(filled(20), PatientID="P2"))
    save(tmp_path / "study" / "IM0001", dicom(filled(30), PatientID="P3"))
    save(tmp_path / "1.2.3.dcm", dicom(filled(40), PatientID="P4"))
    assert grey(read(tmp_path, ["image,dx", "a,ill", "study/b,ill", "IM0001,healthy", "1.2.3,ill"])) == [10, 20, 30, 40]


def test_siemens_endings_are_known_and_the_shadows_of_macos_are_not_taken_for_files(
    dicom: Write, tmp_path: Path
) -> None:
    save(tmp_path / "a.IMA", dicom(filled(10), PatientID="P1", SOPInstanceUID="1.2.1"))
    save(tmp_path / "b.dcm", dicom(filled(20), PatientID="P2", SOPInstanceUID="1.2.2"))
    for name in ("._a.IMA", "._b.dcm", ".DS_Store"):
        save(tmp_path / name, b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ")
    assert grey(read(tmp_path, ["image,dx", "a,ill", "b,healthy"])) == [10, 20]
    assert grey(read(tmp_path, ["image,dx", "1.2.1,ill", "b.dcm,healthy"])) == [10, 20]


def test_the_length_of_the_pixels_may_be_off_by_its_padding_and_no_more(dicom: Write, tmp_path: Path) -> None:
    pixels = np.full((3, 3), 7, np.uint8)  # 9 bytes: one of padding

    def holding(data: bytes) -> bytes:
        return dicom(pixels, change=lambda dataset: setattr(dataset, "PixelData", data))

    for index, data in enumerate((pixels.tobytes() + b"\0", pixels.tobytes() + b"\0\0\0")):
        save(tmp_path / f"long{index}.dcm", holding(data))
        assert grey(read(tmp_path, ["image,dx", f"long{index},ill"])) == [7]
    save(tmp_path / "bare.dcm", holding(pixels.tobytes() + b"\0")[:-1])
    assert grey(read(tmp_path, ["image,dx", "bare,ill"])) == [7]
    save(tmp_path / "short.dcm", holding(pixels.tobytes()[:8]))
    assert "truncated: 8 bytes of pixels, expected 9" in refusal(tmp_path, ["image,dx", "short,ill"])


@pytest.mark.parametrize("columns", [{}, {"patient": "who"}], ids=["PatientID", "column"])
def test_a_bomb_in_a_zip_is_called_one(
    columns: dict[str, str], dicom: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_store, "MOST_BYTES", 100)
    with zipfile.ZipFile(tmp_path / "i.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", dicom(filled(10)))
    message = refusal(tmp_path, ["image,dx,who", "a,ill,p"], images="i.zip", columns=columns)
    assert "1 image too large to be unpacked; first: row 2: " in message and "take it out of the zip" in message


def test_files_may_be_in_a_zip(dicom: Write, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for index in range(2):
            archive.writestr(f"x/IM{index}", dicom(filled(index), PatientID=f"P{index}", SOPInstanceUID=f"1.2.{index}"))
    lines = ["image,dx", "IM0,ill", "1.2.1,healthy"]
    assert grey(read(tmp_path, lines, images="images.zip")) == [0, 1]


def test_files_are_found_by_their_instance_uid(dicom: Write, tmp_path: Path) -> None:
    for index in range(3):
        data = dicom(filled(index), PatientID=f"P{index}", SOPInstanceUID=f"1.2.826.0.{index}")
        save(tmp_path / f"IM{index}", data)
    save(tmp_path / "notes.txt", b"not an image")
    assert grey(read(tmp_path, ["image,dx", "1.2.826.0.2,ill", "IM1,ill", "1.2.826.0.0,healthy"])) == [2, 1, 0]


def test_a_uid_of_two_files_or_of_none_is_refused_without_naming_it(dicom: Write, tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / f"IM{index}", dicom(SOPInstanceUID=f"1.2.826.{index // 2}", PatientID=f"P{index}"))
    lines = ["image,dx,who", "1.2.826.0,ill,a", "1.2.826.9,ill,b", "IM7,ill,c"]
    message = refusal(tmp_path, lines, columns={"patient": "who"})
    assert "1 image with an ambiguous name; first: row 2: 2 files have this SOPInstanceUID; name the file" in message
    assert "2 images not found; first: row 3: no file has this name or SOPInstanceUID" in message
    assert "1.2.826" not in message


def test_two_rows_of_one_file_are_refused(dicom: Write, tmp_path: Path) -> None:
    save(tmp_path / "IM0", dicom(SOPInstanceUID="1.2.826.5"))
    message = refusal(tmp_path, ["image,dx", "IM0,ill", "1.2.826.5,healthy"])
    assert message == "cases.csv: column 'image': 1 image in more than one row; first: rows 2, 3"


def test_an_image_named_twice_is_refused_without_its_name(tmp_path: Path) -> None:
    message = refusal(tmp_path, ["image,dx", "meier_anna,ill", "meier_anna,healthy"])
    assert "1 image in more than one row; first: rows 2, 3" in message
    assert "meier" not in message


# --- patients ---


def test_patients_of_the_column_go_before_those_of_the_files(dicom: Write, tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name, dicom(PatientID="same"))
    manifest = read(tmp_path, ["image,dx,who", "a,ill,one", "b,ill,two"], columns={"patient": "who"})
    assert manifest.patients.tolist() == ["one", "two"]


def test_without_the_column_patient_id_groups_and_is_replaced_by_a_digest_of_itself(
    dicom: Write, tmp_path: Path
) -> None:
    for name, who in {"a": "Meier", "b": "Schmid", "c": " MEIER ", "d": "Huber"}.items():
        save(tmp_path / name, dicom(PatientID=who))
    manifest = read(tmp_path, ["image,dx", "d,ill", "a,ill", "b,healthy", "c,ill"])
    huber, meier, schmid, again = manifest.patients.tolist()
    assert meier == again and len({huber, meier, schmid}) == 3
    assert "meier" not in meier.casefold()
    alone = read(tmp_path, ["image,dx", "b,healthy", "a,ill"])
    assert alone.patients.tolist() == [schmid, meier]
    assert NO_PATIENTS not in manifest.notes


def test_the_names_of_patients_are_the_same_in_every_process(
    dicom: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["image,dx"]
    for index in range(20):
        save(tmp_path / f"i{index}", dicom(filled(index), PatientID=f"P{index // 2}"))
        lines.append(f"i{index},{('ill', 'healthy')[index % 2]}")
    first = local_site(describe(tmp_path, lines), "north", b"key")
    monkeypatch.setattr(dicom_headers, "_KEY", b"another process")
    second = local_site(describe(tmp_path, lines), "north", b"key")
    for split, cases in first.splits.items():
        assert cases.patients.tolist() == second.splits[split].patients.tolist()
        assert cases.images.equal(second.splits[split].images)
    held = [set(cases.patients.tolist()) for cases in first.splits.values()]
    assert not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]
    assert first.has_patient_ids


def test_a_patient_of_the_files_in_two_splits_is_refused_by_rows(dicom: Write, tmp_path: Path) -> None:
    for name, who in {"a": "Meier", "b": "Schmid", "c": "Meier"}.items():
        save(tmp_path / name, dicom(PatientID=who))
    lines = ["image,dx,part", "a,ill,train", "b,ill,train", "c,ill,test"]
    message = refusal(tmp_path, lines, columns={"split": "part"})
    assert "PatientID of the files: 1 patient in more than one split; first: train (row 2) and test (row 4)" in message
    assert "Meier" not in message
    lines = ["image,dx,part,who", "a,ill,train,Meier", "b,ill,train,Schmid", "c,ill,test,Meier"]
    message = refusal(tmp_path, lines, columns={"split": "part", "patient": "who"})
    assert "1 patient in more than one split; first: train (row 2) and test (row 4)" in message
    assert "Meier" not in message


@pytest.mark.parametrize("who", [None, "", "  "])
def test_files_without_patient_id_need_a_patient_column(dicom: Write, tmp_path: Path, who: str | None) -> None:
    save(tmp_path / "a", dicom(PatientID="P1"))
    save(tmp_path / "b", dicom(PatientID=who))
    message = refusal(tmp_path, ["image,dx", "a,ill", "b,ill"])
    assert "1 image without PatientID; first: row 3: name a patient column in columns.patient" in message


def test_one_patient_id_in_all_files_is_what_a_deidentification_wrote(dicom: Write, tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / name, dicom(PatientID="ANON"))
    message = refusal(tmp_path, ["image,dx", "a,ill", "b,ill", "c,healthy"])
    assert "all 3 files have the same PatientID" in message
    assert "ANON" not in message


def test_patients_of_the_column_that_share_a_patient_id_are_noted(dicom: Write, tmp_path: Path) -> None:
    for name, who in {"a": "P1", "b": "P1", "c": "P2"}.items():
        save(tmp_path / name, dicom(PatientID=who))
    manifest = read(tmp_path, ["image,dx,who", "a,ill,x", "b,ill,y", "c,ill,z"], columns={"patient": "who"})
    cases, facts = manifest.cases_with_facts(np.arange(3))
    notes = manifest.notes_on(facts, cases.patients)
    assert [note for note in notes if "share" in note] == [
        "2 patients of column 'who' share their PatientID with another of them: one person may be on both sides of a split"
    ]


# --- what is refused ---


def test_all_unusable_files_are_counted_by_kind_and_named_by_row(dicom: Write, tmp_path: Path) -> None:
    save(tmp_path / "empty", b"")
    save(tmp_path / "text", b"hello" * 100)
    save(tmp_path / "short", dicom()[:-10])
    save(tmp_path / "frames", dicom(np.zeros((3, 8, 8), np.uint8), frames=3))
    save(tmp_path / "report", dicom(PixelData=None))
    save(tmp_path / "good", dicom())
    names = ["good", "empty", "text", "short", "frames", "report", "absent"]
    lines = ["image,dx,who", *(f"{name},ill,{name}" for name in names)]
    message = refusal(tmp_path, lines, columns={"patient": "who"})
    assert message == (
        f"{tmp_path.name}: 4 unreadable images; first: row 3: the file is empty; row 4: not a DICOM file (no DICM at byte 128); "
        "row 5: truncated: 38 bytes of pixels, expected 48; 1 multi-frame image; first: row 6: 3 frames; "
        "expected one: split it, or choose one for all files with dicom.frame; 1 image not found; first: row 8: no file has "
        "this name"
    )


@pytest.mark.parametrize(
    ("dicom_block", "expected"),
    [
        ({"window": {"center": 40, "width": 0}}, "'dicom.window.width': found 0"),
        ({"window": {"center": 40}}, "'dicom.window.width' is missing"),
        ({"window": "lung"}, "'dicom.window': expected a mapping"),
        ({"window": {"center": 4, "width": 1}, "view": 2}, "both 'window' and 'view'"),
        ({"view": 0}, "'dicom.view': found 0"),
        ({"orientation": "upright"}, "'dicom.orientation': found 'upright'"),
        ({"laterality": "both"}, "'dicom.laterality': found 'both'"),
        ({"flip": True}, "unknown key 'flip'"),
    ],
)
def test_a_wrong_dicom_block_is_named(tmp_path: Path, dicom_block: Any, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        describe(tmp_path, ["image,dx"], dicom=dicom_block)
    assert expected in str(caught.value)


def test_a_dicom_block_may_be_empty(tmp_path: Path) -> None:
    assert describe(tmp_path, ["image,dx"], dicom=None).dicom.orientation == "stored"


def test_without_pydicom_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("pydicom"):
            raise ImportError(name)
        return imported(name, *arguments, **named)

    dicom_file.require_pydicom.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"needs pydicom, which is not installed; pip install 'chainward\[dicom\]'"):
        read_dicom(describe(tmp_path, ["image,dx", "a,ill"]))


@pytest.mark.slow
def test_pydicom_is_imported_for_dicom_only() -> None:
    code = "import sys, chainward_client.data.sources; sys.exit(any(name.split('.')[0] == 'pydicom' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- decoders that break down ---


def lossless(dicom: Write, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 4096, (16, 16)).astype(np.uint16)
    return dicom(pixels, bits=12, syntax=JPEG_LOSSLESS, PatientID=f"P{seed}", WindowCenter=2048, WindowWidth=4096)


@pytest.mark.slow
def test_a_decoder_that_dies_is_an_unreadable_image_and_the_others_are_read(
    dicom: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = dicom_workers._exchange
    ended: list[int] = []

    def killed_once(process: Any, *arguments: Any) -> Any:
        if not ended:
            ended.append(process.pid)
            process.kill()
            process.wait()
        return exchange(process, *arguments)

    monkeypatch.setattr(dicom_workers, "_exchange", killed_once)
    for index in range(4):
        save(tmp_path / f"i{index}", lossless(dicom, index))
    manifest = read(tmp_path, ["image,dx", *(f"i{index},ill" for index in range(4))])
    with pytest.raises(
        DataError, match=r"1 unreadable image; first: row \d: its pixels can't be decoded \(gdcm: it broke"
    ):
        manifest.cases(np.arange(4))
    assert len(grey(manifest)) == 4


def test_a_decoder_that_hangs_is_ended(dicom: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(dicom_workers, "__file__", str(script))
    monkeypatch.setattr(dicom_workers, "DECODING_TIMEOUT", 0.3)
    save(tmp_path / "a", lossless(dicom))
    started = time.monotonic()
    assert "it broke down" in refusal(tmp_path, ["image,dx", "a,ill"])
    assert time.monotonic() - started < 20


def test_decoders_are_gone_when_the_images_are_read(
    dicom: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    for index in range(3):
        save(tmp_path / f"i{index}", lossless(dicom, index))
    grey(read(tmp_path, ["image,dx", *(f"i{index},ill" for index in range(3))]))
    assert 1 <= len(started) <= min(3, os.cpu_count() or 1)
    assert all(process.returncode == 0 for process in started)


def test_several_sizes_of_streams_pass_through_one_decoder(dicom: Write, tmp_path: Path) -> None:
    lines = ["image,dx"]
    for index, side in enumerate((10, 300, 16, 700)):
        pixels = np.full((side, side), 16 * index, np.uint8)
        save(tmp_path / f"i{index}", dicom(pixels, syntax=JPEG_LOSSLESS, PatientID=f"P{index}"))
        lines.append(f"i{index},ill")
    assert grey(read(tmp_path, lines)) == [0, 16, 32, 48]


# --- regions ---


def marked() -> tuple[np.ndarray, np.ndarray]:
    """Return an image and the mask of its bright part."""
    pixels = np.full((8, 8), 20, np.uint8)
    pixels[1:3, 4:7] = 220
    return pixels, (pixels > 100).astype(np.uint8)


TURNED = {
    "as stored": ({}, {}),
    "turned and mirrored": ({"orientation": "standard"}, {"PatientOrientation": ["H", "R"]}),
    "mirrored": ({"laterality": "left"}, {"ImageLaterality": "R"}),
    "oblong": ({}, {"PixelSpacing": [2, 1]}),
    "all of it": (
        {"orientation": "standard", "laterality": "left"},
        {"PatientOrientation": ["H", "L"], "Laterality": "R", "PixelSpacing": [1, 2]},
    ),
}


@pytest.mark.parametrize("kind", ["png", "dicom", "box"])
@pytest.mark.parametrize(("block", "elements"), TURNED.values(), ids=TURNED)
def test_masks_and_boxes_of_stored_pixels_follow_their_image(
    dicom: Write, tmp_path: Path, block: dict[str, str], elements: dict[str, Any], kind: str
) -> None:
    pixels, mask = marked()
    save(tmp_path / "images" / "a.dcm", dicom(pixels, **elements))
    lines, columns = ["image,dx,mask", "a,ill,a"], {"mask": "mask"}
    if kind == "png":
        (tmp_path / "masks").mkdir()
        Image.fromarray(mask * 255).save(tmp_path / "masks" / "a.png")
    elif kind == "dicom":
        save(tmp_path / "masks" / "a.dcm", dicom(mask))
    else:
        lines, columns = ["image,dx,l,t,r,b", "a,ill,4,1,7,3"], {"box": ["l", "t", "r", "b"]}
    changes: dict[str, Any] = {"images": "images", "columns": columns, "dicom": block}
    if kind != "box":
        changes["masks"] = "masks"
    size = 16 if "PixelSpacing" in elements else 8
    manifest = read(tmp_path, lines, image={"size": size, "channels": 1}, **changes)
    cases = manifest.cases(np.array([0]))
    assert cases.privileged.masks is not None
    found, image = cases.privileged.masks[0].numpy().astype(bool), cases.images[0, 0].numpy()
    assert found.any()
    if size == 8:
        assert np.array_equal(found, image > 100)
    else:  # the image's edges are interpolated
        assert (image[found] > 60).all()
        assert (image[~found] < 180).all()
        assert found.sum() == 12


def test_a_wrong_box_is_shown_as_it_stands_in_the_manifest(dicom: Write, tmp_path: Path) -> None:
    save(tmp_path / "a", dicom(marked()[0], PatientOrientation=["R", "H"]))
    lines = ["image,dx,l,t,r,b", "a,ill,4,1,70,3"]
    message = refusal(tmp_path, lines, columns={"box": ["l", "t", "r", "b"]}, dicom={"orientation": "standard"})
    assert "row 2: 4, 1, 70, 3, the image is 8x8" in message


def test_a_box_a_pixel_beyond_an_oblong_image_is_tolerated_and_a_case_may_have_none(
    dicom: Write, tmp_path: Path
) -> None:
    save(tmp_path / "a", dicom(marked()[0], PatientID="P1", PixelSpacing=[3, 1]))
    save(tmp_path / "b", dicom(marked()[0], PatientID="P2", PixelSpacing=[3, 1]))
    lines = ["image,dx,l,t,r,b", "a,ill,0,4,8.5,8.9", "b,ill,,,,"]
    manifest = read(tmp_path, lines, columns={"box": ["l", "t", "r", "b"]}, image={"size": 24, "channels": 1})
    masks = manifest.cases(np.arange(2)).privileged.masks
    assert masks is not None
    assert masks[0].sum() == 8 * 12
    assert masks[1].sum() == 0


def test_a_mask_that_is_missing_is_refused_without_its_name(dicom: Write, tmp_path: Path) -> None:
    save(tmp_path / "a", dicom())
    message = refusal(tmp_path, ["image,dx,mask", "a,ill,meier"], columns={"mask": "mask"})
    assert message == f"{tmp_path.name}: 1 mask not found; first: row 2: no file, or several, of this name"


# --- a whole site ---


def test_a_site_of_dicom_files_is_one_like_any_other(dicom: Write, tmp_path: Path) -> None:
    lines = ["image,dx"]
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
        save(tmp_path / f"i{index}", dicom(pixels, PatientID=f"P{index}"))
        Image.fromarray(pixels).save(tmp_path / f"i{index}.png")
        lines.append(f"i{index},{('ill', 'healthy')[index % 2]}")
    site = local_site(describe(tmp_path, lines), "north", b"key")
    assert sum(len(cases) for cases in site.splits.values()) == 12
    cases = read(tmp_path, lines).cases(np.arange(12))
    for index in range(12):
        assert np.array_equal(cases.images[index, 0].numpy(), np.asarray(Image.open(tmp_path / f"i{index}.png")))
    assert cases.labels.tolist() == [1, 0] * 6


def test_colour_and_grey_become_the_channels_that_are_asked_for(dicom: Write, tmp_path: Path) -> None:
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[..., 0] = 200
    save(tmp_path / "a", dicom(colour, PatientID="P1"))
    save(tmp_path / "b", dicom(filled(90), PatientID="P2"))
    lines = ["image,dx", "a,ill", "b,ill"]
    three = read(tmp_path, lines, image={"size": 8, "channels": 3}).cases(np.arange(2)).images[:, :, 0, 0]
    assert three.tolist() == [[200, 0, 0], [90, 90, 90]]
    assert read(tmp_path, lines).cases(np.arange(2)).images[:, :, 0, 0].tolist() == [[60], [90]]


# --- the example ---


def test_the_example_of_the_documentation_reads_such_a_hospital(dicom: Write, tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[2] / "docs" / "examples" / "dicom.yaml"
    (tmp_path / "dicom.yaml").write_text(example.read_text(encoding="utf-8"), encoding="utf-8")
    lines = ["image,finding"]
    for index in range(12):
        data = dicom(
            filled(index), PatientID=f"P{index}", SOPInstanceUID=f"1.2.826.{index}", PatientOrientation=["L", "F"]
        )
        save(tmp_path / "export" / f"IM{index:04d}", data)
        name = f"1.2.826.{index}" if index % 2 else f"IM{index:04d}"
        lines.append(f"{name},{('normal', 'effusion', 'pneumothorax')[index % 3]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    site = local_site(tmp_path / "dicom.yaml", "north", b"key")
    assert site.splits["train"].images.shape[1:] == (1, 224, 224)
    assert site.classes == ("normal", "effusion", "pneumothorax")
