"""Damaged DICOM files of every kind end in a picture or in one line that says what is wrong, never in anything else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("pydicom")

from chainward_client.data.dicom_file import parse, require_pydicom
from chainward_client.data.dicom_headers import facts
from chainward_client.data.dicom_picture import mask_image, picture
from chainward_client.data.dicom_settings import DicomBlock
from chainward_client.data.unusable import ImageProblem

SYNTAXES = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "deflated": "1.2.840.10008.1.2.1.99",
    "big endian": "1.2.840.10008.1.2.2",
    "JPEG": "1.2.840.10008.1.2.4.50",
    "JPEG lossless": "1.2.840.10008.1.2.4.70",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
    "RLE": "1.2.840.10008.1.2.5",
}
BLOCKS = [
    DicomBlock(),
    DicomBlock(orientation="standard", laterality="left"),
    DicomBlock(window={"center": 100, "width": 50}, frame=1),
    DicomBlock(view=2, frame=2),
]


@pytest.fixture
def whole(dicom: Callable[..., bytes]) -> dict[str, bytes]:
    """Return a file of each syntax whose header has all that is read."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    pixels = np.random.default_rng(0).integers(0, 256, (36, 34), dtype=np.uint8)
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [256, 0, 8])
    table.add_new("LUTData", "US", list(range(256)))
    elements = {
        "WindowCenter": [128, 90],
        "WindowWidth": [200, 50],
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PatientOrientation": ["L", "F"],
        "ImageLaterality": "R",
        "PixelSpacing": [0.5, 0.4],
        "PixelPaddingValue": 3,
        "PatientName": "Meier^Anna",
        "VOILUTSequence": Sequence([table]),
    }
    return {name: dicom(pixels, syntax=syntax, **elements) for name, syntax in SYNTAXES.items()}


def read(data: bytes, block: DicomBlock) -> None:
    """Read a file in all ways that a site does; only an ImageProblem may come out."""
    try:
        dataset = parse(data)
        shown = picture(dataset, block)
        facts(dataset, shown.origin)
        assert shown.image.size == shown.origin.geometry.size
        assert shown.image.mode in ("L", "RGB")
        mask_image(data)
    except ImageProblem as problem:
        assert "\n" not in str(problem)
        assert "Meier" not in str(problem)


damages = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["set", "cut", "insert", "repeat"]), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=6,
)


def damaged(data: bytes, damage: list[tuple[float, str, bytes]]) -> bytes:
    for place, kind, content in damage:
        position = int(place * len(data))
        if kind == "set":
            data = data[:position] + content + data[position + len(content) :]
        elif kind == "cut":
            data = data[:position]
        elif kind == "insert":
            data = data[:position] + content + data[position:]
        else:
            data = data[:position] + data[max(0, position - 40) :]
    return data


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_end_in_a_picture_or_in_one_line(whole: dict[str, bytes], syntax: str) -> None:
    require_pydicom()
    for block in BLOCKS[:2]:
        picture(parse(whole[syntax]), block)  # undamaged, it is read

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(damage=damages, block=st.sampled_from(BLOCKS))
    def fuzz(damage: list[tuple[float, str, bytes]], block: DicomBlock) -> None:
        read(damaged(whole[syntax], damage), block)

    fuzz()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.binary(max_size=300), preamble=st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_end_in_one_line(data: bytes, preamble: bool) -> None:
    require_pydicom()
    with pytest.raises(ImageProblem):
        picture(parse(b"\0" * 128 + b"DICM" + data if preamble else data), DicomBlock())


KEYWORDS = [
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "PlanarConfiguration",
    "RescaleSlope",
    "RescaleIntercept",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "PixelSpacing",
    "PixelAspectRatio",
    "ImageOrientationPatient",
    "PatientOrientation",
    "ImageLaterality",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "VOILUTSequence",
    "PixelData",
    "SOPClassUID",
    "PatientID",
]
VALUES = [
    b"",
    b"\0\0",
    b"\1\0",
    b"\xff\xff",
    b"\xff\x7f",
    b"Meier^Anna",
    b"1\\2",
    b"-1e308 ",
    b"nan ",
    b"inf ",
    b"0\\0 ",
    b"1e-300",
]


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    wrong=st.dictionaries(st.sampled_from(KEYWORDS), st.sampled_from([*VALUES, None]), min_size=1, max_size=4),
    representation=st.sampled_from([None, "US", "SS", "DS", "CS", "UN", "SQ", "OB", "FD", "IS"]),
    block=st.sampled_from(BLOCKS),
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_elements_end_in_a_picture_or_in_one_line(
    whole: dict[str, bytes], wrong: dict[str, bytes | None], representation: str | None, block: DicomBlock
) -> None:
    import struct

    from pydicom.datadict import dictionary_VR, tag_for_keyword

    require_pydicom()
    data = whole["explicit"]
    for keyword, value in wrong.items():
        tag = tag_for_keyword(keyword)
        assert tag is not None
        start = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
        position = data.find(start, 132)
        if position < 0:
            continue
        long = data[position + 4 : position + 6] in (b"OB", b"OW", b"SQ", b"UN")
        length = struct.unpack("<I" if long else "<H", data[position + (8 if long else 6) :][: 4 if long else 2])[0]
        end = position + (12 if long else 8) + (0 if length == 0xFFFFFFFF else length)
        named = representation or dictionary_VR(tag)[:2]
        element = b""
        if value is not None:
            wide = named in ("OB", "UN", "SQ")
            head = named.encode() + (struct.pack("<HI", 0, len(value)) if wide else struct.pack("<H", len(value)))
            element = start + head + value
        data = data[:position] + element + data[end:]
    read(data, block)
