"""Where the header and the compressed stream of a DICOM file differ, the stream decides, and the difference is noted."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402

from chainward_client.data import dicom_pixels  # noqa: E402
from chainward_client.data.dicom_file import parse, require_pydicom  # noqa: E402
from chainward_client.data.dicom_format import has_end, stream_format  # noqa: E402
from chainward_client.data.dicom_headers import facts, notes  # noqa: E402
from chainward_client.data.dicom_picture import Picture, picture  # noqa: E402
from chainward_client.data.dicom_settings import DicomBlock  # noqa: E402
from chainward_client.data.unusable import ImageProblem  # noqa: E402

Write = Callable[..., bytes]
LOSSLESS = {
    "JPEG lossless": "1.2.840.10008.1.2.4.70",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
    "RLE": "1.2.840.10008.1.2.5",
    "uncompressed": "1.2.840.10008.1.2.1",
}
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"


@pytest.fixture(autouse=True)
def quiet() -> None:
    require_pydicom()


def shown(data: bytes) -> Picture:
    return picture(parse(data), DicomBlock())


def array(data: bytes) -> np.ndarray:
    return np.asarray(shown(data).image)


def oddities(data: bytes) -> str:
    return "; ".join(sorted(shown(data).origin.oddities))


def refusal(data: bytes) -> str:
    with pytest.raises(ImageProblem) as caught:
        shown(data)
    return str(caught.value)


def smooth(low: int, high: int, dtype: Any = np.uint16) -> np.ndarray:
    """Return a round hill between two values, without jumps, as tissue has."""
    row, column = np.mgrid[0:40, 0:36]
    hill = np.exp(-(((row - 20) / 14) ** 2) - ((column - 18) / 12) ** 2)
    return np.rint(low + (high - low) * hill).astype(dtype)


def changed(dicom: Write, pixels: np.ndarray, syntax: str, **elements: Any) -> bytes:
    """Compress pixels with a true header, then give the file these elements."""
    dataset = pydicom.dcmread(io.BytesIO(dicom(pixels, syntax=syntax)))
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("syntax", LOSSLESS.values(), ids=LOSSLESS)
def test_overlay_bits_above_those_stored_are_taken_out_in_every_syntax(dicom: Write, syntax: str) -> None:
    pixels = smooth(100, 4000)
    overlaid = pixels.copy()
    overlaid[10:12, 5:30] |= 0x8000
    overlaid[30, :] |= 0x1000
    odd = changed(dicom, overlaid, syntax, BitsStored=12, HighBit=11)
    assert np.array_equal(array(odd), array(changed(dicom, pixels, syntax, BitsStored=12, HighBit=11)))
    assert "bits above BitsStored" in oddities(odd)


@pytest.mark.parametrize("syntax", LOSSLESS.values(), ids=LOSSLESS)
def test_values_larger_than_the_bits_that_the_header_tells_are_not_cut(dicom: Write, syntax: str) -> None:
    pixels = smooth(100, 16000)
    odd = changed(dicom, pixels, syntax, BitsStored=12, HighBit=11)
    assert np.array_equal(array(odd), array(dicom(pixels, bits=14)))
    assert "values larger than BitsStored" in oddities(odd)


def test_signed_values_are_read_with_and_without_their_sign_above_the_bits_stored(dicom: Write) -> None:
    pixels = smooth(-900, 1500, np.int16)
    bare = (pixels & 0x0FFF).astype(np.int16)
    assert np.array_equal(array(dicom(bare, bits=12)), array(dicom(pixels, bits=12)))
    assert oddities(dicom(bare, bits=12)) == ""


def test_a_signed_stream_is_signed_whatever_the_header_says(dicom: Write) -> None:
    pixels = smooth(-900, 1500, np.int16)
    true = dicom(pixels, syntax=LOSSLESS["JPEG 2000"])
    odd = changed(dicom, pixels, LOSSLESS["JPEG 2000"], PixelRepresentation=0)
    assert np.array_equal(array(odd), array(true))
    assert "PixelRepresentation that is not the sign of the stream" in oddities(odd)
    assert oddities(true) == ""


@pytest.mark.parametrize("syntax", ["JPEG lossless", "JPEG-LS", "JPEG 2000"])
@pytest.mark.parametrize(
    ("elements", "noted"),
    [
        ({"Rows": 36, "Columns": 40}, "Rows and Columns"),
        ({"Rows": 39}, "Rows and Columns"),
        ({"HighBit": 15, "BitsStored": 12}, "HighBit"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "SamplesPerPixel"),
        ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "BitsAllocated"),
    ],
)
def test_size_bits_and_channels_are_the_streams(
    dicom: Write, syntax: str, elements: dict[str, Any], noted: str
) -> None:
    pixels = smooth(100, 4000)
    odd = changed(dicom, pixels, LOSSLESS[syntax], **elements)
    assert np.array_equal(array(odd), array(changed(dicom, pixels, LOSSLESS[syntax], BitsStored=12, HighBit=11)))
    assert noted in oddities(odd)


# --- colours ---


def baseline(photometric: str, marker: bytes | None, *, transformed: bool = True) -> Callable[[Dataset], None]:
    """Return what makes a file hold a JPEG of one red, with the APP marker given in place of the encoder's."""

    def change(dataset: Dataset) -> None:
        buffer = io.BytesIO()
        red = Image.new("RGB", (8, 6), (200, 30, 40))
        if not transformed:  # the stored channels are red, green and blue themselves
            red = Image.frombytes("YCbCr", red.size, red.tobytes())
        red.save(buffer, "JPEG", quality=100, subsampling=0)
        stream = buffer.getvalue()
        end = 4 + struct.unpack(">H", stream[4:6])[0]
        dataset.PixelData = encapsulate([stream[:2] + (marker or b"") + stream[end:]])
        dataset.PhotometricInterpretation = photometric

    return change


def adobe(transform: int) -> bytes:
    return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])


JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "YBR_FULL_422", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("marker", "transformed"), [(JFIF, True), (adobe(1), True), (adobe(0), False)], ids=["JFIF", "Adobe 1", "Adobe 0"]
)
def test_a_marker_in_the_stream_says_how_its_colours_are_meant(
    dicom: Write, photometric: str, marker: bytes, transformed: bool
) -> None:
    colour = np.zeros((6, 8, 3), np.uint8)
    found = array(dicom(colour, syntax=JPEG_BASELINE, change=baseline(photometric, marker, transformed=transformed)))
    assert np.abs(found[3, 4].astype(int) - (200, 30, 40)).max() <= 3


@pytest.mark.parametrize(("photometric", "transformed"), [("YBR_FULL_422", True), ("RGB", False)])
def test_without_a_marker_the_header_says_how_colours_are_meant(
    dicom: Write, photometric: str, transformed: bool
) -> None:
    colour = np.zeros((6, 8, 3), np.uint8)
    found = array(dicom(colour, syntax=JPEG_BASELINE, change=baseline(photometric, None, transformed=transformed)))
    assert np.abs(found[3, 4].astype(int) - (200, 30, 40)).max() <= 3


@pytest.mark.parametrize("syntax", LOSSLESS.values(), ids=LOSSLESS)
def test_rgb_that_is_tagged_as_ybr_is_noted_or_refused_and_never_shown_in_wrong_colours(
    dicom: Write, syntax: str
) -> None:
    pixels = np.zeros((40, 36, 3), np.uint8)  # black outside of the tissue, as ultrasound and endoscopy have
    pixels[10:30, 8:28] = (180, 90, 70)
    odd = changed(dicom, pixels, syntax, PhotometricInterpretation="YBR_FULL")
    if syntax == LOSSLESS["JPEG lossless"]:  # GDCM writes a marker into the stream, which says RGB
        assert np.array_equal(array(odd), pixels)
        assert "PhotometricInterpretation that is not the stream's" in oddities(odd)
        return
    assert "says YBR" in refusal(odd)
    true = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
    right = array(changed(dicom, true, syntax, PhotometricInterpretation="YBR_FULL"))
    assert np.abs(right.astype(int) - pixels).max() <= 3


def test_a_colour_transform_that_the_decoder_has_undone_is_not_undone_again() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 36), (200, 30, 40)).save(buffer, "JPEG2000", irreversible=False, no_jp2=True, mct=1)
    found = stream_format(buffer.getvalue())
    assert found is not None
    assert (found.rows, found.columns, found.samples, found.bits, found.signed, found.colours) == (
        36,
        40,
        3,
        8,
        False,
        "RGB",
    )


# --- decoders ---


def test_where_the_first_decoder_fails_the_next_one_reads_the_stream(dicom: Write) -> None:
    """A zero byte before the end marker is valid; pyjpegls refuses it, GDCM does not."""
    pixels = smooth(100, 4000)

    def padded(dataset: Dataset) -> None:
        stream = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1).rstrip(b"\0")
        assert stream.endswith(b"\xff\xd9")
        dataset.PixelData = encapsulate([stream[:-2] + b"\0\0\0\xff\xd9"])

    whole = dicom(pixels, syntax=LOSSLESS["JPEG-LS"])
    assert np.array_equal(array(dicom(pixels, syntax=LOSSLESS["JPEG-LS"], change=padded)), array(whole))


def test_a_stream_without_its_end_is_truncated_and_any_other_failure_is_told_in_the_decoders_words(
    dicom: Write,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 36)).astype(np.uint16)

    def cut(dataset: Dataset) -> None:
        stream = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
        dataset.PixelData = encapsulate([stream[: len(stream) // 3]])

    def garbled(dataset: Dataset) -> None:
        stream = bytearray(pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1).rstrip(b"\0"))
        stream[60:-2] = bytes(len(stream) - 62)
        dataset.PixelData = encapsulate([bytes(stream)])

    assert "truncated" in refusal(dicom(pixels, syntax=LOSSLESS["JPEG-LS"], change=cut))
    told = refusal(dicom(pixels, syntax=LOSSLESS["JPEG-LS"], change=garbled))
    assert "truncated" not in told
    assert "pyjpegls: " in told
    assert "gdcm: " in told


def test_every_syntax_names_decoders_that_there_are_in_a_fixed_order() -> None:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    for syntax, preferred in dicom_pixels._DECODERS.items():
        there = dicom_pixels._plugins(get_decoder(UID(syntax)), 8)
        assert there, syntax
        assert [plugin for plugin in there if plugin in preferred] == [
            plugin for plugin in preferred if plugin in there
        ]


@pytest.mark.parametrize(
    ("stream", "whole"),
    [(b"\xff\xd8..\xff\xd9", True), (b"\xff\xd8..\xff\xd9\0\0", True), (b"\xff\xd8..\xff", False), (b"", False)],
)
def test_an_end_marker_may_be_followed_by_padding(stream: bytes, whole: bool) -> None:
    assert has_end(stream) is whole


@pytest.mark.parametrize("length", range(0, 60, 3))
def test_the_head_of_a_stream_that_is_cut_anywhere_is_no_error(length: int) -> None:
    for start in (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00", b"\xff\x4f\xff\x51\x00\x2f\x00\x00\x00\x00"):
        stream_format((start + b"\x00" * 60)[:length])


@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (1, 1), (7, 9)])
def test_frames_of_one_bit_begin_within_a_byte(dicom: Write, shape: tuple[int, int]) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (4, *shape), dtype=np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    data = dicom(
        BitsAllocated=1,
        BitsStored=1,
        HighBit=0,
        Rows=shape[0],
        Columns=shape[1],
        NumberOfFrames=4,
        PixelData=packed + b"\0" * (len(packed) % 2),
    )
    for frame in range(4):
        found = picture(parse(data), DicomBlock(frame=frame + 1))
        assert np.array_equal(np.asarray(found.image), bits[frame] * 255)


# --- odd headers ---


def test_a_stray_delimiter_behind_the_pixels_is_left_out_and_noted(dicom: Write) -> None:
    data = dicom() + b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"
    assert np.array_equal(array(data), array(dicom()))
    assert "delimiter" in oddities(data)
    parsed = parse(data)
    assert any("delimiter" in line for line in notes([facts(parsed, picture(parsed, DicomBlock()).origin)]))


@pytest.mark.parametrize("word", ["Monochrome1", " MONOCHROME1 ", "MONOCHROME 1", "MONOCHROME1\0", "monochrome_1"])
def test_words_are_known_in_any_case_and_with_blanks(dicom: Write, word: str) -> None:
    assert np.array_equal(
        array(dicom(PhotometricInterpretation=word)), array(dicom(PhotometricInterpretation="MONOCHROME1"))
    )


@pytest.mark.parametrize(
    ("elements", "noted"),
    [
        ({"PhotometricInterpretation": ["MONOCHROME2", "MONOCHROME2"]}, "several values in PhotometricInterpretation"),
        ({"NumberOfFrames": 0}, "NumberOfFrames below 1"),
        ({"PatientOrientation": ["L", "F"], "PixelSpacing": [0, 0]}, "PixelSpacing"),
    ],
)
def test_odd_but_harmless_elements_are_noted_and_the_picture_is_the_same(
    dicom: Write, elements: dict[str, Any], noted: str
) -> None:
    assert np.array_equal(array(dicom(**elements)), array(dicom()))
    assert noted in oddities(dicom(**elements))
