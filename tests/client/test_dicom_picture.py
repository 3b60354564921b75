"""A DICOM file becomes the picture that a viewer shows: values, contrast, colours and how it lies, against slow references."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom")

from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402

from chainward_client.data.dicom_file import parse, require_pydicom  # noqa: E402
from chainward_client.data.dicom_picture import Picture, mask_image, picture  # noqa: E402
from chainward_client.data.dicom_settings import DicomBlock, OwnWindow  # noqa: E402
from chainward_client.data.unusable import ImageProblem  # noqa: E402

Write = Callable[..., bytes]
NATIVE = {"implicit": "1.2.840.10008.1.2", "explicit": "1.2.840.10008.1.2.1", "deflated": "1.2.840.10008.1.2.1.99"}
BIG_ENDIAN = "1.2.840.10008.1.2.2"
LOSSLESS = {
    "JPEG lossless": "1.2.840.10008.1.2.4.57",
    "JPEG lossless, first order": "1.2.840.10008.1.2.4.70",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
    "RLE": "1.2.840.10008.1.2.5",
}
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"


@pytest.fixture(autouse=True)
def quiet() -> None:
    require_pydicom()


def shown(data: bytes, **block: Any) -> Picture:
    return picture(parse(data), DicomBlock(**block))


def array(data: bytes, **block: Any) -> np.ndarray:
    return np.asarray(shown(data, **block).image)


def refusal(data: bytes, **block: Any) -> tuple[str, str]:
    with pytest.raises(ImageProblem) as caught:
        shown(data, **block)
    return caught.value.kind, str(caught.value)


def sample(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), f"pydicom came without {name}"
    return Path(path).read_bytes()


def values(bits: int, signed: bool, shape: tuple[int, int] = (9, 7)) -> np.ndarray:
    """Return stored values over the whole range of their bits."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    dtype = np.dtype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")
    drawn = np.random.default_rng(bits).integers(low, high, shape)
    drawn[0, 0], drawn[-1, -1] = low, high - 1
    return drawn.astype(dtype)


def eight_bits(grey: float) -> int:
    return math.floor(min(max(grey, 0.0), 1.0) * 255 + 0.5)


def each(pixels: np.ndarray, function: Callable[[float], float]) -> np.ndarray:
    return np.array([[eight_bits(function(float(value))) for value in row] for row in pixels])


def linear(value: float, center: float, width: float) -> float:
    """PS3.3 C.11.2.1.2.1, as it stands there."""
    if value <= center - 0.5 - (width - 1) / 2:
        return 0.0
    if value > center - 0.5 + (width - 1) / 2:
        return 1.0
    return (value - (center - 0.5)) / (width - 1) + 0.5


def exact(value: float, center: float, width: float) -> float:
    """PS3.3 C.11.2.1.3.2."""
    if value <= center - width / 2:
        return 0.0
    if value > center + width / 2:
        return 1.0
    return (value - center) / width + 0.5


def sigmoid(value: float, center: float, width: float) -> float:
    """PS3.3 C.11.2.1.3.1."""
    return 1 / (1 + math.exp(min(-4 * (value - center) / width, 700)))


# --- windows ---


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("bits", "signed"), itertools.product((8, 10, 12, 14, 16), (False, True)))
def test_a_files_window_decides_black_and_white_at_every_bit_depth(
    dicom: Write, bits: int, signed: bool, photometric: str
) -> None:
    pixels = values(bits, signed)
    center, width = float(np.median(pixels)) + 3.5, 2.0**bits / 3
    data = dicom(pixels, bits=bits, PhotometricInterpretation=photometric, WindowCenter=center, WindowWidth=width)
    found = shown(data)
    expected = each(pixels, lambda value: linear(value, center, width))
    if photometric == "MONOCHROME1":
        expected = each(pixels, lambda value: 1 - linear(value, center, width))
    assert np.array_equal(np.asarray(found.image), expected)
    assert (found.origin.contrast, found.origin.photometric) == ("window", photometric)


@pytest.mark.parametrize(
    ("function", "reference"), [("LINEAR", linear), ("LINEAR_EXACT", exact), ("SIGMOID", sigmoid), (None, linear)]
)
def test_windows_follow_their_function(dicom: Write, function: str | None, reference: Callable[..., float]) -> None:
    pixels = values(12, False)
    named = {} if function is None else {"VOILUTFunction": function}
    data = dicom(pixels, bits=12, WindowCenter=1900, WindowWidth=1501, **named)
    assert np.array_equal(array(data), each(pixels, lambda value: reference(value, 1900, 1501)))


def test_bits_above_those_stored_play_no_role(dicom: Write) -> None:
    pixels = values(12, False)
    overlaid = pixels | np.uint16(0xF000)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    assert np.array_equal(array(dicom(overlaid, bits=12, **window)), array(dicom(pixels, bits=12, **window)))


def test_the_window_is_one_of_rescaled_values(dicom: Write) -> None:
    pixels = values(12, False)
    data = dicom(pixels, bits=12, RescaleSlope=0.5, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    assert np.array_equal(array(data), each(pixels, lambda value: linear(value * 0.5 - 1024, 40, 400)))


def test_a_falling_rescale_turns_dark_and_bright(dicom: Write) -> None:
    pixels = values(8, False)
    falling = array(dicom(pixels, RescaleSlope=-1, RescaleIntercept=255))
    assert np.array_equal(falling, 255 - pixels)


def test_the_first_of_several_windows_is_taken_or_the_one_that_is_asked_for(dicom: Write) -> None:
    pixels = values(12, False)
    data = dicom(pixels, bits=12, WindowCenter=[500, 3000], WindowWidth=[400, 1000])
    assert shown(data).origin.views == 2
    assert np.array_equal(array(data), each(pixels, lambda value: linear(value, 500, 400)))
    assert np.array_equal(array(data, view=2), each(pixels, lambda value: linear(value, 3000, 1000)))
    kind, reason = refusal(data, view=3)
    assert (kind, reason) == ("{} without the view asked for", "2 in the file; dicom.view is 3")
    assert refusal(dicom(pixels, bits=12), view=2)[1] == "0 in the file; dicom.view is 2"


def test_the_data_files_window_goes_before_the_files(dicom: Write) -> None:
    pixels = values(12, False)
    data = dicom(pixels, bits=12, WindowCenter=500, WindowWidth=400, RescaleSlope=2, RescaleIntercept=-100)
    found = shown(data, window=OwnWindow(center=100, width=900))
    assert np.array_equal(np.asarray(found.image), each(pixels, lambda value: exact(value * 2 - 100, 100, 900)))
    assert found.origin.contrast == "own window"


@pytest.mark.parametrize("width", [0, 0.5, -3])
def test_a_width_below_one_is_no_window(dicom: Write, width: float) -> None:
    pixels = values(12, False)
    data = dicom(pixels, bits=12, WindowCenter=500, WindowWidth=width)
    assert np.array_equal(array(data), array(dicom(pixels, bits=12)))
    assert shown(data).origin.views == 0


# --- without a window ---


@pytest.mark.parametrize(("bits", "signed"), itertools.product((5, 8), (False, True)))
def test_up_to_8_bits_are_shown_whole(dicom: Write, bits: int, signed: bool) -> None:
    pixels = values(bits, signed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    found = shown(dicom(pixels, bits=bits))
    assert np.array_equal(np.asarray(found.image), each(pixels, lambda value: (value - low) / (high - low)))
    assert found.origin.contrast == "all bits"


def test_eight_unsigned_bits_are_shown_as_they_are(dicom: Write) -> None:
    pixels = values(8, False)
    assert np.array_equal(array(dicom(pixels)), pixels)


@pytest.mark.parametrize(("bits", "signed"), itertools.product((10, 16), (False, True)))
def test_more_bits_of_a_file_alone_are_shown_between_two_percentiles(dicom: Write, bits: int, signed: bool) -> None:
    pixels = values(bits, signed, (31, 23))

    def percentile(share: float) -> float:
        ordered = sorted(float(value) for value in pixels.ravel())
        place = share / 100 * (len(ordered) - 1)
        below = ordered[math.floor(place)]
        return below + (ordered[math.ceil(place)] - below) * (place % 1)

    low, high = percentile(0.5), percentile(99.5)
    found = shown(dicom(pixels, bits=bits))
    difference = np.asarray(found.image).astype(int) - each(pixels, lambda value: (value - low) / (high - low))
    assert np.abs(difference).max() <= 1  # a scale is measured on as many values of each image
    assert found.origin.contrast == "scale of the set"


def test_padding_is_black_and_decides_no_contrast(dicom: Write) -> None:
    pixels = values(12, True, (20, 20)) // 4
    padded = pixels.copy()
    padded[:8] = -2000
    found = array(dicom(padded, bits=12, PixelPaddingValue=-2000))
    assert (found[:8] == 0).all()
    assert np.array_equal(found[8:], array(dicom(pixels[8:], bits=12)))
    inverted = array(dicom(padded, bits=12, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1"))
    assert (inverted[:8] == 0).all()
    assert np.abs(inverted[8:].astype(int) - (255 - found[8:])).max() <= 1


def test_a_range_of_padding_is_padding(dicom: Write) -> None:
    pixels = values(8, False)
    found = array(dicom(pixels, PixelPaddingValue=250, PixelPaddingRangeLimit=255))
    assert np.array_equal(found, np.where(pixels >= 250, 0, pixels))


def test_an_image_of_one_value_is_known_as_such(dicom: Write) -> None:
    found = shown(dicom(np.full((4, 4), 700, np.uint16), bits=12))
    assert found.origin.constant
    assert (np.asarray(found.image) == 0).all()
    assert not shown(dicom()).origin.constant


def test_one_bit_is_black_or_white() -> None:
    found = array(sample("liver_1frame.dcm"))
    assert np.array_equal(
        found, pydicom.dcmread(get_testdata_file("liver_1frame.dcm", download=False)).pixel_array * 255
    )


# --- lookup tables ---


def table(entries: list[int], first: int, depth: int, *, packed: bool = False, order: str = "<") -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries) % 65536, first, depth])
    if packed:
        item.add_new("LUTData", "OW", np.array(entries, np.uint8).view(f"{order}u2").astype("<u2").tobytes())
    else:
        item.add_new("LUTData", "US", entries)
    return item


def looked_up(value: float, entries: list[int], first: int) -> int:
    return entries[min(max(int(value) - first, 0), len(entries) - 1)]


@pytest.mark.parametrize("signed", [False, True])
def test_a_voi_table_maps_each_value_and_holds_its_ends(dicom: Write, signed: bool) -> None:
    pixels = values(12, signed)
    first = -700 if signed else 900
    entries = [int(entry) for entry in np.random.default_rng(1).integers(0, 1024, 1500)]
    data = dicom(pixels, bits=12, VOILUTSequence=Sequence([table(entries, first, 10)]), WindowCenter=1, WindowWidth=2)
    found = shown(data)
    assert np.array_equal(np.asarray(found.image), each(pixels, lambda value: looked_up(value, entries, first) / 1023))
    assert found.origin.contrast == "VOI LUT"


def test_a_modality_table_comes_before_the_window(dicom: Write) -> None:
    pixels = values(8, False)
    entries = [int(entry) for entry in np.random.default_rng(1).integers(0, 65536, 200)]
    sequence = Sequence([table(entries, 30, 16)])
    data = dicom(pixels, ModalityLUTSequence=sequence, WindowCenter=30000, WindowWidth=40000)
    assert np.array_equal(array(data), each(pixels, lambda value: linear(looked_up(value, entries, 30), 30000, 40000)))


def test_tables_of_all_65536_values_and_of_packed_bytes_are_read(dicom: Write) -> None:
    pixels = values(16, True)
    entries = [(7 * entry) % 65536 for entry in range(65536)]
    data = dicom(pixels, VOILUTSequence=Sequence([table(entries, -32768, 16)]))
    assert np.array_equal(array(data), each(pixels, lambda value: looked_up(value, entries, -32768) / 65535))
    small = values(8, False)
    packed = list(range(255, -1, -1))
    data = dicom(small, VOILUTSequence=Sequence([table(packed, 0, 8, packed=True)]))
    assert np.array_equal(array(data), 255 - small)


def test_a_table_that_lacks_entries_is_refused(dicom: Write) -> None:
    short = table([1, 2, 3], 0, 8)
    short.LUTDescriptor = [300, 0, 8]
    assert "LUTData in VOILUTSequence does not hold" in refusal(dicom(VOILUTSequence=Sequence([short])))[1]


# --- what rescale must say ---


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"RescaleSlope": 1}, "RescaleSlope is there, RescaleIntercept is missing"),
        ({"RescaleIntercept": 0}, "RescaleIntercept is there, RescaleSlope is missing"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "RescaleSlope is 0"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "CT without RescaleSlope and RescaleIntercept"),
    ],
)
def test_a_rescale_that_is_half_there_is_refused(dicom: Write, elements: dict[str, Any], reason: str) -> None:
    kind, found = refusal(dicom(**elements))
    assert kind == "{} without rescale"
    assert reason in found


# --- colour ---


def test_colours_are_shown_as_they_are_interleaved_or_in_planes(dicom: Write) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    assert np.array_equal(array(dicom(pixels)), pixels)

    def in_planes(dataset: Dataset) -> None:
        dataset.PlanarConfiguration = 1
        dataset.PixelData = pixels.transpose(2, 0, 1).tobytes()

    assert np.array_equal(array(dicom(pixels, change=in_planes)), pixels)


def test_sixteen_bit_colours_become_eight(dicom: Write) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    expected = [[[eight_bits(float(value) / 65535) for value in pixel] for pixel in row] for row in pixels]
    assert np.array_equal(array(dicom(pixels)), expected)


def test_ybr_becomes_rgb(dicom: Write) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(drawn).convert("YCbCr"))
    found = array(dicom(pixels, PhotometricInterpretation="YBR_FULL")).astype(int)
    for (row, column), (y, b, r) in zip(np.ndindex(6, 8), pixels.reshape(-1, 3).astype(float), strict=True):
        # PS3.3 C.7.6.3.1.2, turned round
        red, green, blue = y + 1.402 * (r - 128), y - 0.344136 * (b - 128) - 0.714136 * (r - 128), y + 1.772 * (b - 128)
        expected = np.clip([red, green, blue], 0, 255)
        assert np.abs(found[row, column] - expected).max() <= 1.01


def palette(depth: int, count: int, first: int, order: str = "<") -> tuple[dict[str, Any], np.ndarray]:
    """Return the elements of a palette and its colours (count, 3)."""
    colours = np.random.default_rng(depth).integers(0, 2**depth, (count, 3))
    colours[0, 0] = 2**depth - 1
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [count % 65536, first, depth]
        data = colours[:, channel].astype(f"{order}u{depth // 8}").tobytes()
        elements[f"{name}PaletteColorLookupTableData"] = data + b"\0" * (len(data) % 2)
    return elements, colours


@pytest.mark.parametrize(
    ("depth", "count", "first"), [(8, 256, 0), (8, 100, 60), (16, 256, 0), (16, 77, 9), (8, 4096, 0)]
)
def test_a_palette_gives_every_index_its_colour_and_holds_its_ends(
    dicom: Write, depth: int, count: int, first: int
) -> None:
    bits = 12 if count > 256 else 8
    pixels = values(bits, False)
    elements, colours = palette(depth, count, first)
    expected = [
        [
            [eight_bits(channel / (2**depth - 1)) for channel in colours[min(max(int(value) - first, 0), count - 1)]]
            for value in row
        ]
        for row in pixels
    ]
    found = shown(dicom(pixels, bits=bits, **elements))
    assert np.array_equal(np.asarray(found.image), expected)
    assert found.origin.contrast == "colour"


def test_a_segmented_palette_is_expanded(dicom: Write) -> None:
    pixels = values(8, False)
    elements, _ = palette(8, 256, 0)
    for name in ("Red", "Green", "Blue"):
        del elements[f"{name}PaletteColorLookupTableData"]
        # one discrete entry of 0, then a line of 255 more that ends at 255 (PS3.3 C.7.9.2)
        elements[f"Segmented{name}PaletteColorLookupTableData"] = bytes([0, 1, 0, 1, 255, 255])
    found = array(dicom(pixels, **elements))
    assert np.abs(found.astype(int) - pixels[..., None]).max() <= 1


def test_a_palette_that_is_missing_is_refused(dicom: Write) -> None:
    assert (
        "PaletteColorLookupTableDescriptor is missing" in refusal(dicom(PhotometricInterpretation="PALETTE COLOR"))[1]
    )


# --- transfer syntaxes ---


@pytest.mark.parametrize(
    "syntax", [*NATIVE.values(), BIG_ENDIAN, *LOSSLESS.values()], ids=[*NATIVE, "big endian", *LOSSLESS]
)
@pytest.mark.parametrize(("bits", "signed"), [(8, False), (12, False), (16, False), (16, True)])
def test_grey_is_the_same_in_every_lossless_syntax(dicom: Write, syntax: str, bits: int, signed: bool) -> None:
    pixels = values(bits, signed, (36, 33))
    window = {"WindowCenter": float(np.median(pixels)), "WindowWidth": 2.0**bits / 2}
    found = shown(dicom(pixels, bits=bits, syntax=syntax, **window))
    assert np.array_equal(np.asarray(found.image), array(dicom(pixels, bits=bits, **window)))


@pytest.mark.parametrize(
    "syntax", [*NATIVE.values(), BIG_ENDIAN, *LOSSLESS.values()], ids=[*NATIVE, "big endian", *LOSSLESS]
)
def test_colour_is_the_same_in_every_lossless_syntax(dicom: Write, syntax: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (36, 33, 3), dtype=np.uint8)
    assert np.array_equal(array(dicom(pixels, syntax=syntax)), pixels)


@pytest.mark.parametrize("depth", [8, 16])
def test_tables_and_palettes_of_big_endian_files_are_read(dicom: Write, depth: int) -> None:
    pixels = values(8, False)
    little, big = palette(depth, 256, 0)[0], palette(depth, 256, 0, ">")[0]
    if depth == 8:  # packed two in a word, and words are swapped
        for name in ("Red", "Green", "Blue"):
            keyword = f"{name}PaletteColorLookupTableData"
            big[keyword] = np.frombuffer(big[keyword], "<u2").astype(">u2").tobytes()
    assert np.array_equal(array(dicom(pixels, syntax=BIG_ENDIAN, **big)), array(dicom(pixels, **little)))


@pytest.mark.parametrize("colour", [False, True])
def test_baseline_jpeg_is_what_pillow_makes_of_the_stream(dicom: Write, colour: bool) -> None:
    smooth = np.add.outer(np.arange(32) * 3, np.arange(24) * 4).astype(np.uint8)
    pixels = np.stack([smooth, smooth[::-1], 255 - smooth], axis=-1) if colour else smooth
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    found = array(dicom(pixels, syntax=JPEG_BASELINE)).astype(int)
    assert np.abs(found - np.asarray(Image.open(buffer)).astype(int)).max() <= (2 if colour else 0)


def test_a_syntax_that_nothing_decodes_is_named(dicom: Write) -> None:
    kind, reason = refusal(dicom(syntax=LOSSLESS["RLE"], meta={"TransferSyntaxUID": "1.2.840.10008.1.2.4.100"}))
    assert kind == "{} in a transfer syntax without a decoder"
    assert "MPEG2 Main Profile" in reason
    assert refusal(sample("JPGExtended.dcm"))[1].startswith("JPEG Extended (Process 2 and 4) of 12 bits; convert it")


def test_a_decoder_that_is_not_installed_is_named(dicom: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.pixels.decoders import JPEGLosslessSV1Decoder

    data = dicom(values(16, False), syntax=LOSSLESS["JPEG lossless, first order"])
    monkeypatch.setattr(JPEGLosslessSV1Decoder, "_available", {})
    kind, reason = refusal(data)
    assert kind == "{} in a transfer syntax without a decoder"
    assert "First-Order Prediction" in reason
    assert "pip install python-gdcm" in reason


def test_a_private_syntax_is_refused_without_its_uid(dicom: Write) -> None:
    reason = refusal(dicom(meta={"TransferSyntaxUID": "1.2.3.4.5.6"}))[1]
    assert "1.2.3.4.5.6" not in reason
    assert "private" in reason


# --- pydicom's own samples ---

SAME_MR = ["implicit", "bigendian", "RLE", "jp2klossless", "jpeg_ls_lossless", "expb", "padded"]


@pytest.mark.parametrize("variant", SAME_MR)
def test_one_slice_is_one_picture_however_it_is_stored(variant: str) -> None:
    assert np.array_equal(array(sample(f"MR_small_{variant}.dcm")), array(sample("MR_small.dcm")))


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("SC_rgb_jpeg_gdcm.dcm", 0),
        ("SC_rgb_gdcm_KY.dcm", 1),
        ("SC_rgb_dcmtk_+eb+cr.dcm", 40),
        ("SC_rgb_dcmtk_+eb+cy+n1.dcm", 40),
        ("SC_rgb_dcmtk_+eb+cy+n2.dcm", 40),
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", 40),
        ("SC_rgb_dcmtk_+eb+cy+s2.dcm", 40),
        ("SC_rgb_dcmtk_+eb+cy+s4.dcm", 40),
        ("SC_rgb_jpeg_dcmtk.dcm", 40),
        ("SC_rgb_jpeg_lossy_gdcm.dcm", 40),
        ("SC_ybr_full_422_uncompressed.dcm", 40),
        ("SC_rgb_rle_16bit.dcm", 1),
        ("SC_rgb_rle_32bit.dcm", 1),
    ],
)
def test_one_colour_picture_is_itself_in_every_encoding(name: str, tolerance: int) -> None:
    """Bars of pure colours: whoever forgets a conversion is off by far more than a lossy codec."""
    found, expected = array(sample(name)).astype(int), array(sample("SC_rgb_rle.dcm")).astype(int)
    away = np.abs(found - expected)
    middle = np.zeros(100, bool)  # bars are 10 rows high; codecs and subsampling blur their edges
    middle[[row for row in range(100) if 3 <= row % 10 <= 6]] = True
    assert away[middle].max() <= tolerance


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MR_truncated.dcm", "truncated: 8130 bytes of pixels, expected 8192"),
        ("rtplan.dcm", "holds no image"),
        ("test-SR.dcm", "holds no image"),
        ("waveform_ecg.dcm", "holds no image"),
        ("reportsi.dcm", "holds no image"),
        ("no_meta.dcm", "not a DICOM file (no DICM at byte 128)"),
        ("badVR.dcm", "NumberOfFrames is not a number"),
    ],
)
def test_samples_without_a_usable_image_say_why(name: str, reason: str) -> None:
    kind, found = refusal(sample(name))
    assert kind == "unreadable {}"
    assert reason in found


def test_a_palette_of_a_sample_is_pydicoms() -> None:
    from pydicom.pixels import apply_color_lut

    dataset = pydicom.dcmread(io.BytesIO(sample("examples_palette.dcm")))
    expected = apply_color_lut(dataset.pixel_array, dataset)
    scaled = np.floor(expected.astype(float) / (255 if expected.dtype == np.uint8 else 65535) * 255 + 0.5)
    assert np.array_equal(array(sample("examples_palette.dcm")), scaled)


# --- frames ---


def test_several_frames_are_refused_unless_one_is_chosen(dicom: Write) -> None:
    pixels = np.stack([values(8, False), values(8, False)[::-1]])
    data = dicom(pixels, frames=2)
    assert refusal(data) == (
        "multi-frame {}",
        "2 frames; expected one: split it, or choose one for all files with dicom.frame",
    )
    assert np.array_equal(array(data, frame=1), pixels[0])
    assert np.array_equal(array(data, frame=2), pixels[1])
    assert refusal(data, frame=3) == ("{} without the frame asked for", "2 frames; dicom.frame is 3")


@pytest.mark.parametrize("syntax", LOSSLESS.values(), ids=LOSSLESS)
def test_a_chosen_frame_is_found_in_compressed_files(dicom: Write, syntax: str) -> None:
    pixels = np.stack([values(8, False, (36, 33)), values(8, False, (36, 33))[::-1]])
    assert np.array_equal(array(dicom(pixels, frames=2, syntax=syntax), frame=2), pixels[1])


def item(**elements: Any) -> Sequence:
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return Sequence([dataset])


def test_functional_groups_of_the_frame_count_and_else_the_shared_ones(dicom: Write) -> None:
    pixels = np.stack([values(12, False), values(12, False)])

    def grouped(dataset: Dataset) -> None:
        own = [item(FrameVOILUTSequence=item(WindowCenter=center, WindowWidth=200))[0] for center in (100.0, 900.0)]
        dataset.PerFrameFunctionalGroupsSequence = Sequence(own)
        dataset.SharedFunctionalGroupsSequence = item(
            PixelValueTransformationSequence=item(RescaleSlope=0.5, RescaleIntercept=-10),
            PlaneOrientationSequence=item(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
            PixelMeasuresSequence=item(PixelSpacing=[2, 1]),
        )

    data = dicom(pixels, bits=12, frames=2, change=grouped)
    found = shown(data, frame=2)
    assert found.origin.directions == "P\\F"
    assert found.origin.geometry.square == (7, 18)
    flat = dicom(
        pixels[1],
        bits=12,
        WindowCenter=900,
        WindowWidth=200,
        RescaleSlope=0.5,
        RescaleIntercept=-10,
        PixelSpacing=[2, 1],
    )
    assert np.array_equal(np.asarray(found.image), array(flat))


# --- how it lies ---

LETTERS = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "H": (2, 1), "F": (2, -1)}
PAIRS = [(row, column) for row, column in itertools.product(LETTERS, LETTERS) if LETTERS[row][0] != LETTERS[column][0]]


def vector(letter: str) -> np.ndarray:
    axis, sign = LETTERS[letter]
    unit = np.zeros(3)
    unit[axis] = sign
    return unit


def walk(found: np.ndarray, along_row: np.ndarray, along_column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the directions of the body to the right and down in a picture of the stored values 10, 20, 30 (a row), 40, ..."""
    position = {int(value): np.array(where) for where, value in np.ndenumerate(found)}
    across, down = position[20] - position[10], position[40] - position[10]
    body = {
        tuple(across): along_row,
        tuple(-across): -along_row,
        tuple(down): along_column,
        tuple(-down): -along_column,
    }
    return body[(0, 1)], body[(1, 0)]


@pytest.mark.parametrize("by", ["ImageOrientationPatient", "PatientOrientation"])
@pytest.mark.parametrize(("row", "column"), PAIRS)
def test_standard_orientation_leads_to_left_posterior_or_foot(dicom: Write, row: str, column: str, by: str) -> None:
    pixels = (np.arange(6, dtype=np.uint8).reshape(2, 3) + 1) * 10
    cosines = [*vector(row).tolist(), *vector(column).tolist()]
    data = dicom(pixels, **{by: cosines if by == "ImageOrientationPatient" else [row, column]})
    assert np.array_equal(array(data), pixels)
    assert shown(data).origin.directions == f"{row}\\{column}"
    right, down = walk(array(data, orientation="standard"), vector(row), vector(column))
    axes = {LETTERS[row][0], LETTERS[column][0]}
    assert np.array_equal(right, vector("L") if 0 in axes else vector("P"))
    assert np.array_equal(down, vector("F") if 2 in axes else vector("P"))


def test_oblique_slices_lie_as_the_nearest_straight_one(dicom: Write) -> None:
    data = dicom(ImageOrientationPatient=[-0.8, 0.6, 0, -0.6, -0.8, 0])
    assert shown(data).origin.directions == "R\\A"


@pytest.mark.parametrize(
    "elements",
    [
        {},
        {"PatientOrientation": ["L", "R"]},
        {"PatientOrientation": ["LE", "V"]},
        {"PatientOrientation": ["L", "F"], "AnatomicalOrientationType": "QUADRUPED"},
        {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]},
    ],
)
def test_without_a_known_orientation_the_standard_one_is_refused(dicom: Write, elements: dict[str, Any]) -> None:
    data = dicom(**elements)
    assert shown(data).origin.directions == ""
    assert refusal(data, orientation="standard")[0] == "{} without orientation"


@pytest.mark.parametrize("keyword", ["ImageLaterality", "Laterality"])
@pytest.mark.parametrize(
    ("side", "wanted", "mirrored"), [("L", "left", False), ("R", "left", True), ("L", "right", True)]
)
def test_the_other_side_is_mirrored(dicom: Write, keyword: str, side: str, wanted: str, mirrored: bool) -> None:
    pixels = values(8, False)
    data = dicom(pixels, **{keyword: side})
    assert shown(data).origin.side == side
    assert np.array_equal(array(data), pixels)
    assert np.array_equal(array(data, laterality=wanted), pixels[:, ::-1] if mirrored else pixels)


@pytest.mark.parametrize("side", [None, "B", "U"])
def test_without_a_known_side_mirroring_is_refused(dicom: Write, side: str | None) -> None:
    data = dicom(**({} if side is None else {"ImageLaterality": side}))
    assert refusal(data, laterality="left")[0] == "{} without laterality"


@pytest.mark.parametrize(
    ("elements", "size"),
    [
        ({"PixelSpacing": [2, 1]}, (8, 12)),
        ({"PixelSpacing": [1, 2]}, (16, 6)),
        ({"ImagerPixelSpacing": [0.3, 0.1]}, (8, 18)),
        ({"PixelAspectRatio": [3, 2]}, (8, 9)),
        ({"PixelSpacing": [1, 1], "PixelAspectRatio": [3, 1]}, (8, 6)),
        ({"PixelSpacing": [1, 1.001]}, (8, 6)),
    ],
)
def test_pixels_become_square_by_the_side_that_is_too_short(
    dicom: Write, elements: dict[str, Any], size: tuple
) -> None:
    found = shown(dicom(**elements))
    assert found.image.size == size
    assert found.origin.geometry.stored == (8, 6)


@pytest.mark.parametrize("spacing", [[1, 1000], [0, 0], [-1, 1], [1], [1, 2, 3]])
@pytest.mark.parametrize("keyword", ["PixelSpacing", "ImagerPixelSpacing"])
def test_a_spacing_that_can_not_be_is_as_if_it_were_missing_and_noted(
    dicom: Write, keyword: str, spacing: list[float]
) -> None:
    found = shown(dicom(**{keyword: spacing}))
    assert found.image.size == (8, 6)
    assert any(oddity.startswith(keyword) for oddity in found.origin.oddities)
    usable = shown(dicom(**{keyword: spacing}, PixelAspectRatio=[3, 2]))
    assert usable.image.size == (8, 9)


# --- damaged formats ---


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"Rows": None}, "Rows is missing"),
        ({"BitsAllocated": None}, "BitsAllocated is missing"),
        ({"BitsAllocated": 12}, "BitsAllocated is 12"),
        ({"BitsStored": 20}, "BitsStored is 20, with BitsAllocated 8"),
        ({"HighBit": 3}, "HighBit is not 7"),
        ({"SamplesPerPixel": 3}, "SamplesPerPixel 3 does not suit PhotometricInterpretation MONOCHROME2"),
        ({"PhotometricInterpretation": None}, "PhotometricInterpretation is missing or unknown"),
        ({"PhotometricInterpretation": "MEIER"}, "PhotometricInterpretation is missing or unknown"),
        ({"Rows": 60000, "Columns": 60000}, "60000x60000"),
        ({"Rows": 7}, "truncated: 48 bytes of pixels, expected 56"),
        ({"PixelData": None}, "PixelData is missing"),
        ({"PixelRepresentation": 7}, "PixelRepresentation is neither 0 nor 1"),
    ],
)
def test_a_damaged_format_is_named_by_its_keyword(dicom: Write, elements: dict[str, Any], reason: str) -> None:
    def change(dataset: Dataset) -> None:
        for keyword, value in elements.items():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)

    assert reason in refusal(dicom(change=change))[1]


def test_a_mask_is_its_stored_values_neither_windowed_nor_turned(dicom: Write) -> None:
    inside = np.zeros((6, 8), np.uint16)
    inside[2:4, 3:] = 1
    data = dicom(inside, bits=12, WindowCenter=2000, WindowWidth=10, PatientOrientation=["R", "H"])
    assert np.array_equal(np.asarray(mask_image(data)), inside * 255)
    assert np.asarray(mask_image(dicom(np.zeros((6, 8), np.uint8)))).max() == 0
    assert np.asarray(mask_image(dicom(np.full((6, 8), 3, np.uint8)))).min() == 255
