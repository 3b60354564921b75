"""Who is in the headers is counted, and no value of a header is in a message, log, note, warning, array or file of a run."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import Message
from flwr.common.serde import recorddict_to_proto

pydicom = pytest.importorskip("pydicom")

from pydicom.datadict import keyword_dict  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402

import chainward_simulations.client_app  # noqa: E402
from chainward_client.data import dicom_file  # noqa: E402
from chainward_client.data.dicom_file import parse  # noqa: E402
from chainward_client.data.dicom_headers import IDENTIFYING, Facts, facts, notes  # noqa: E402
from chainward_client.data.dicom_picture import picture  # noqa: E402
from chainward_client.data.dicom_settings import DicomBlock  # noqa: E402
from chainward_client.data.sources import local_site  # noqa: E402
from chainward_shared.errors import DataError  # noqa: E402

Write = Callable[..., bytes]

NAMES = {
    "PatientName": "Zwetschgenbaum^Adelheid",
    "PatientBirthDate": "19430817",
    "OtherPatientIDs": "ZOTHER-7741",
    "PatientAddress": "Zitronengasse 17",
    "PatientComments": "Zkommentar",
    "InstitutionName": "Zentralklinik Linden",
    "ReferringPhysicianName": "Zuweiser^Egon",
    "AccessionNumber": "ZACC-90210",
    "StudyID": "ZSTUDY-12",
    "StationName": "ZSTATION-3",
    "StudyDate": "20190231",  # no such day
    "StudyDescription": "Zstudienbeschreibung",
    "SeriesDescription": "Zserienbeschreibung " * 20,  # longer than the standard allows
    "ProtocolName": "Zprotokoll",
    "BodyPartExamined": "Zkörperteil",
    "Laterality": "Zseite",
    "BurnedInAnnotation": "Zja",
    "PatientIdentityRemoved": "Zweifelhaft",
    "PatientOrientation": ["ZRICHTUNG-R", "ZRICHTUNG-F"],
    "WindowCenterWidthExplanation": "Zfenster",
    "FrameOfReferenceUID": "1.2.99.77777.1.2",
}
UIDS = ("1.2.99.77777.", "1.2.99.88888.")


def secrets_of(index: int) -> set[str]:
    """Return all texts in the headers of a file that must be nowhere."""
    texts = {value for value in NAMES.values() if isinstance(value, str)}
    texts |= {part for name in NAMES.values() if isinstance(name, str) for part in name.split("^")}
    return {text.strip() for text in texts} | {f"ZPAT-{index:04d}", *UIDS, "ZPRIVATE-5", "Zoperateur", "ZRICHTUNG"}


SECRETS = set().union(*(secrets_of(index) for index in range(64)))


@contextmanager
def quietly_written() -> Iterator[None]:
    """Write without a word what breaks the standard, and leave pydicom as it comes: reading must silence it itself."""
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    pydicom.config.settings.reading_validation_mode = pydicom.config.WARN


def hospital_file(dicom: Write, index: int, pixels: np.ndarray | None = None, **elements: Any) -> bytes:
    """Return a file as a hospital has it: full of names, and careless about the standard."""

    def change(dataset: Dataset) -> None:
        block = dataset.private_block(0x0011, "ZHERSTELLER", create=True)
        block.add_new(0x01, "LO", "ZPRIVATE-5")
        item = Dataset()
        item.ScheduledPerformingPhysicianName = "Zoperateur^Ida"
        dataset.RequestAttributesSequence = Sequence([item])

    with quietly_written():
        return dicom(
            pixels,
            change=change,
            **{
                **NAMES,
                "PatientID": f"ZPAT-{index:04d}-{'x' * 70}",
                "SOPInstanceUID": f"{UIDS[0]}0{index}",  # no part may begin with 0: pydicom would say so, and quote it
                "StudyInstanceUID": f"{UIDS[1]}{index}",
                **elements,
            },
        )


def found_in(texts: list[str], secrets: set[str] = SECRETS) -> set[str]:
    everything = "\n".join(texts)
    return {secret for secret in secrets if secret in everything}


def block(**changes: Any) -> dict[str, Any]:
    return {
        "format": "dicom",
        "manifest": "cases.csv",
        "images": "files",
        "classes": ["a", "b"],
        "columns": {"image": "image", "label": "dx", "split": "part", "site": "site"},
        "image": {"size": 32, "channels": 1},
        **changes,
    }


def make(folder: Path, files: list[bytes], *, by_uid: bool = False, **changes: Any) -> Path:
    """Write a data file of two hospitals; the manifest names files, or their SOPInstanceUIDs."""
    (folder / "files").mkdir(exist_ok=True)
    lines = ["image,dx,part,site"]
    for index, data in enumerate(files):
        (folder / "files" / f"IM{index:04d}").write_bytes(data)
        part = ("train", "train", "train", "val", "test")[index // 4 % 5]
        name = f"{UIDS[0]}0{index}" if by_uid else f"IM{index:04d}"
        lines.append(f"{name},{'ab'[index % 2]},{part},{('ash', 'birch')[index // 2 % 2]}")
    (folder / "cases.csv").write_text("\n".join(lines) + "\n")
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(block(**changes)))
    return path


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[str]]]:
    """Return all that was logged, warned and printed so far, down to debug, also by libraries in C."""
    caplog.set_level(logging.DEBUG)
    dicom_file.require_pydicom.cache_clear()
    logging.getLogger("pydicom").setLevel(logging.DEBUG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def texts() -> list[str]:
            out, err = capfd.readouterr()
            records = [record.getMessage() + str(record.exc_info or "") for record in caplog.records]
            return [out, err, *records, *(str(warning.message) for warning in caught)]

        yield texts


# --- what is counted ---


def test_every_identifying_keyword_is_one_of_the_standard() -> None:
    assert set(keyword_dict) >= IDENTIFYING


def known(data: bytes) -> Facts:
    dicom_file.require_pydicom()
    dataset = parse(data)
    return facts(dataset, picture(dataset, DicomBlock()).origin)


def test_identifying_fields_are_found_at_any_depth_and_only_where_they_hold_something(dicom: Write) -> None:
    assert known(dicom(PatientID=None)).identifying == set()
    assert known(dicom(PatientName="", PatientBirthDate="", PatientID="x")).identifying == {"PatientID"}
    assert known(dicom(PatientName="^^", PatientID="x")).identifying == {"PatientID"}

    def nested(dataset: Dataset) -> None:
        inner, outer = Dataset(), Dataset()
        inner.OperatorsName = "Ida"
        inner.AccessionNumber = "1"
        outer.ContentSequence = Sequence([inner])
        dataset.ContentSequence = Sequence([outer])

    assert known(dicom(change=nested)).identifying == {"PatientID", "OperatorsName", "AccessionNumber"}


def test_any_persons_name_is_identifying_whatever_its_keyword(dicom: Write) -> None:
    assert "DistributionName" not in IDENTIFYING
    assert known(dicom(DistributionName="Meier^Anna")).identifying == {"PatientID", "DistributionName"}


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"])
def test_what_is_found_does_not_depend_on_the_transfer_syntax(dicom: Write, syntax: str) -> None:
    found = known(hospital_file(dicom, 1, syntax=syntax))
    described_only = {"StudyDescription", "SeriesDescription", "ProtocolName", "BodyPartExamined", "Laterality"}
    others = {"BurnedInAnnotation", "PatientIdentityRemoved", "PatientOrientation", "WindowCenterWidthExplanation"}
    expected = set(NAMES) - described_only - others - {"FrameOfReferenceUID"}
    assert found.identifying == expected | {"PatientID", "ScheduledPerformingPhysicianName"}
    assert found.private


def files(dicom: Write, *elements: dict[str, Any]) -> list[Facts]:
    return [known(dicom(**{"SOPInstanceUID": f"1.2.{index}", **own})) for index, own in enumerate(elements)]


def test_notes_list_keywords_and_counts(dicom: Write) -> None:
    found = files(dicom, {"PatientName": "A"}, {"PatientID": None}, {"AccessionNumber": "1"})
    assert notes(found) == (
        "2 DICOM files of 3 with identifying header fields, none of which is kept, written or sent: PatientID 2, "
        "AccessionNumber 1, PatientName 1",
    )


def test_unremarkable_files_leave_no_note(dicom: Write) -> None:
    assert notes(files(dicom, {"PatientID": None}, {"PatientID": None})) == ()


@pytest.mark.parametrize(
    ("odd", "note"),
    [
        ({"BurnedInAnnotation": "YES"}, "1 DICOM file of 3 with burned-in annotation (BurnedInAnnotation YES)"),
        ({"PixelSpacing": [2, 1]}, "1 DICOM file of 3 with pixels that are not square: made square"),
        ({"pixels": np.zeros((6, 8), np.uint8)}, "1 DICOM file of 3 with pixels that are all alike"),
        (
            {"WindowCenter": [1, 2], "WindowWidth": [9, 9]},
            "1 DICOM file of 3 with several windows or VOI LUTs: number 1",
        ),
        (
            {"pixels": np.arange(48, dtype=np.uint16).reshape(6, 8)},
            "1 DICOM file of 3 with more than 8 bits and no window",
        ),
        ({"Modality": "MG"}, "mixed modalities: another 2, MG 1"),
        (
            {"PhotometricInterpretation": "MONOCHROME1"},
            "mixed photometric interpretations: MONOCHROME2 2, MONOCHROME1 1",
        ),
        ({"PatientOrientation": ["A", "F"]}, "mixed orientations (along rows, along columns): unknown 2, A\\F 1"),
        ({"ImageLaterality": "L"}, "mixed lateralities: unknown 2, L 1"),
        ({"pixels": np.arange(64, dtype=np.uint8).reshape(8, 8)}, "2 different sizes of DICOM images, 8x6 to 8x8"),
        ({"SOPInstanceUID": "1.2.0"}, "1 DICOM file with the SOPInstanceUID of another: copies of one image"),
    ],
)
def test_each_oddity_leaves_its_note_and_no_other(dicom: Write, odd: dict[str, Any], note: str) -> None:
    plain = {"PatientID": None, "Modality": "ZZ"}
    (line,) = notes(files(dicom, plain, plain, plain | odd))
    assert line.startswith(note)


def test_private_fields_and_overlays_and_declared_files_are_counted(dicom: Write) -> None:
    def private(dataset: Dataset) -> None:
        dataset.private_block(0x0011, "MAKER", create=True).add_new(0x01, "LO", "x")
        dataset.add_new(0x60003000, "OW", b"\0" * 6)
        dataset.PatientIdentityRemoved = "YES"

    lines = notes(files(dicom, {}, {"change": private}))
    assert "1 DICOM file of 2 with private header fields, which are not read" in lines
    assert "1 DICOM file of 2 with overlays, which are not shown" in lines
    assert "1 DICOM file declared to be without identity (PatientIdentityRemoved YES)" in lines


# --- nothing of it is anywhere ---


def test_nothing_of_a_header_is_in_notes_logs_warnings_or_cases(dicom: Write, tmp_path: Path, heard: Any) -> None:
    pixels = [np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8) for index in range(40)]
    path = make(tmp_path, [hospital_file(dicom, index, pixels[index]) for index in range(40)], by_uid=True)
    site = local_site(path, "north", b"key")
    held = [patient for cases in site.splits.values() for patient in cases.patients.tolist()]
    assert any("PatientName 40" in note for note in site.notes)
    assert any(note.startswith("mixed") or "private header fields" in note for note in site.notes)
    assert found_in([*heard(), *site.notes, *held, repr(site)]) == set()


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "truncated pixels": lambda data: data[:-20],
    "truncated header": lambda data: data[:700],
    "no DICOM": lambda data: b"\0" * 128 + b"NONE" + data[132:],
    "no rows": lambda data: data.replace(b"\x28\x00\x10\x00US", b"\x28\x00\x11\x99US"),
    "names where numbers should be": lambda data: data.replace(
        b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x10\x00IS\x02\x00"
    ),
    "another photometric": lambda data: data.replace(b"MONOCHROME2 ", b"ZPRIVATE-5  "),
    "a name as transfer syntax": lambda data: data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.99.77777.9.1.2\0\0"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_nothing_of_a_damaged_file_is_in_its_message_or_in_logs(
    dicom: Write, tmp_path: Path, heard: Any, damage: str
) -> None:
    files = [hospital_file(dicom, index) for index in range(20)]
    files[7] = DAMAGED[damage](files[7])
    assert files[7] != hospital_file(dicom, 7)
    path = make(tmp_path, files)
    with pytest.raises(DataError) as caught:
        local_site(path, "north", b"key")
    assert "row 9" in str(caught.value)
    assert found_in([*heard(), str(caught.value), repr(caught.value), repr(caught.value.__cause__)]) == set()


@pytest.mark.parametrize(
    "wrong",
    [
        {"NumberOfFrames": 3},
        {"RescaleSlope": 2},
        {"BitsStored": 77},
        {"PatientID": ""},
        {"PatientID": "ZPAT-0000-" + "x" * 70},
    ],
    ids=str,
)
def test_nothing_of_an_unusable_header_is_in_its_message_or_in_logs(
    dicom: Write, tmp_path: Path, heard: Any, wrong: dict[str, Any]
) -> None:
    every = wrong.get("PatientID", "")  # one id in all of them
    files = [hospital_file(dicom, index, **(wrong if index == 9 or every else {})) for index in range(20)]
    with pytest.raises(DataError) as caught:
        local_site(make(tmp_path, files), "north", b"key")
    assert found_in([*heard(), str(caught.value)]) == set()


def test_nothing_of_a_header_that_is_passed_over_is_in_a_note_or_in_logs(
    dicom: Write, tmp_path: Path, heard: Any
) -> None:
    odd = hospital_file(dicom, 9, WindowCenter="12345678", WindowWidth="1").replace(b"12345678", b"Zfenster")
    files = [odd if index == 9 else hospital_file(dicom, index) for index in range(20)]
    site = local_site(make(tmp_path, files), "north", 0)
    assert any("WindowCenter that is no number" in note for note in site.notes)
    assert found_in([*heard(), *site.notes]) == set()


def test_a_repeated_patient_or_image_is_refused_without_its_id(dicom: Write, tmp_path: Path, heard: Any) -> None:
    files = [hospital_file(dicom, index, PatientID=f"ZPAT-{index % 3:04d}") for index in range(20)]
    with pytest.raises(DataError, match="PatientID of the files: 3 patients in more than one split") as caught:
        local_site(make(tmp_path, files), "north", b"key")
    path = make(tmp_path, files, by_uid=True)
    lines = (tmp_path / "cases.csv").read_text().splitlines()
    (tmp_path / "cases.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(DataError, match="1 image in more than one row; first: rows 2, 22") as repeated:
        local_site(path, "north", b"key")
    assert found_in([*heard(), str(caught.value), str(repeated.value)]) == set()


def test_nothing_of_a_header_is_in_any_message_or_file_of_a_whole_run(
    dicom: Write, settings: Any, coordinated: Any, loopback: Any, tmp_path: Path, heard: Any
) -> None:
    chainward_simulations.client_app._opened.cache_clear()
    data = tmp_path / "hospital"
    data.mkdir()
    generator = np.random.default_rng(0)
    files = []
    for index in range(64):
        pixels = generator.normal(90, 25, (32, 32))
        pixels[8:20, 8:20] += 60 * (index % 2)
        files.append(hospital_file(dicom, index, pixels.clip(0, 255).astype(np.uint8)))
    crossed: list[str] = []

    def listen(message: Message, answer: Callable[[], Message]) -> Message:
        reply = answer()
        assert not reply.has_error(), reply.error
        for content in (message.content, reply.content):
            crossed.append(recorddict_to_proto(content).SerializeToString().decode("latin-1"))
        return reply

    flat = settings | {
        "data.source": str(make(data, files, by_uid=True)),
        "chain.epochs": 1,
        "student.rounds": 1,
        "chain.compare-alone": False,
    }
    folder, results = coordinated(flat, loopback(2, listen))
    written = [file for file in tmp_path.rglob("*") if file.is_file() and data not in file.parents]
    assert folder.path in {parent for file in written for parent in file.parents}
    assert any("identifying header fields" in text for text in crossed), (
        "the notes did not cross, so nothing was tested"
    )
    assert (
        found_in([*heard(), *crossed, repr(results), *(file.read_bytes().decode("latin-1") for file in written)])
        == set()
    )


# --- the search can fail ---


def test_pydicom_unsilenced_does_log_values(dicom: Write, heard: Callable[[], list[str]]) -> None:
    data = hospital_file(dicom, 3)
    assert found_in(heard()) == set()
    _ = pydicom.dcmread(BytesIO(data)).SOPInstanceUID
    assert found_in(heard()) == {UIDS[0]}


def test_a_note_that_quotes_a_value_is_found() -> None:
    assert found_in([json.dumps({"note": "by the way: ZPAT-0003"})]) == {"ZPAT-0003"}
