"""One DICOM file as a picture: grey or RGB of 8 bits, as a viewer would show it.

The order is that of PS3.3 C.7.6.3, C.11.1 and C.11.2 (the greyscale pipeline of PS3.4 N.2.1): stored values, rescale or
modality LUT, window or VOI LUT, inversion of MONOCHROME1; then square pixels, then the directions that the data file asks
for. Presentation states, overlays and ICC profiles are not applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from chainward_client.data.description import DicomBlock
from chainward_client.data.dicom_file import PHOTOMETRIC, Header, parse, transfer_syntax, unreadable
from chainward_client.data.dicom_pixels import MAX_PIXELS, frame_index, stored_values
from chainward_client.data.images import ImageProblem

if TYPE_CHECKING:
    from pydicom import FileDataset

PERCENTILES = (0.5, 99.5)
"""Where an image of more than 8 bits without a window becomes black and white, in percent of its own pixels."""

MAX_ASPECT = 16.0
"""Pixels that are more oblong than this are a wrong PixelSpacing or PixelAspectRatio."""

Contrast = Literal["window", "VOI LUT", "own window", "all bits", "percentiles", "colour"]

_CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"


@dataclass(frozen=True)
class Geometry:
    """How a picture came out of the stored pixels; masks and boxes of the stored pixels must follow. In the order done:

    Attributes
    ----------
    stored : width and height in stored pixels
    square : width and height with pixels made square
    transpose : rows and columns are exchanged
    mirror : left and right are exchanged
    flip : top and bottom are exchanged
    """

    stored: tuple[int, int]
    square: tuple[int, int]
    transpose: bool = False
    mirror: bool = False
    flip: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height of the picture."""
        return (self.square[1], self.square[0]) if self.transpose else self.square

    def apply(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Return the picture of an image in stored pixels."""
        if image.size != self.square:
            image = image.resize(self.square, resample)
        if self.transpose:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        if self.mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return image

    def box(self, box: np.ndarray) -> np.ndarray:
        """Return float (4,), x0, y0, x1, y1 in the picture, of a box in stored pixels; NaN stays NaN."""
        scale_x, scale_y = (new / old for new, old in zip(self.square, self.stored, strict=True))
        x0, y0, x1, y1 = (float(edge) for edge in box * np.array([scale_x, scale_y, scale_x, scale_y]))
        if self.transpose:
            x0, y0, x1, y1 = y0, x0, y1, x1
        width, height = self.size
        if self.mirror:
            x0, x1 = width - x1, width - x0
        if self.flip:
            y0, y1 = height - y1, height - y0
        # What reaches a pixel beyond the image, which is tolerated, may be several once pixels are square.
        return np.clip([x0, y0, x1, y1], 0, [width, height, width, height])


@dataclass(frozen=True)
class Origin:
    """How a picture came about.

    Attributes
    ----------
    geometry : how it lies
    photometric : PhotometricInterpretation
    contrast : what decided which value is black and which white
    views : number of windows or VOI LUTs in the file
    directions : where rows and columns of the stored pixels lead to, "L\\F" say (left, foot); "" where the file does not say
    side : "L", "R", or "" where the file does not say
    constant : all pixels are alike
    """

    geometry: Geometry
    photometric: str
    contrast: Contrast
    views: int
    directions: str
    side: str
    constant: bool


@dataclass(frozen=True)
class Picture:
    """The picture of one file, mode L or RGB, and how it came about."""

    image: Image.Image
    origin: Origin


def picture(dataset: FileDataset, block: DicomBlock) -> Picture:
    """Return what a viewer would show of a parsed file, lying as `block` asks.

    Raises
    ------
    ImageProblem
        If the file holds no image, several frames, a transfer syntax without a decoder, damaged pixels, or not what
        `block` relies on.
    """
    header = Header(dataset, 0)
    frame = frame_index(header, block.frame)
    header = Header(dataset, frame)
    pixels = stored_values(header, frame)
    photometric = header.word("PhotometricInterpretation", PHOTOMETRIC)
    assert photometric is not None  # checked by stored_values
    if photometric in ("MONOCHROME1", "MONOCHROME2"):
        grey, contrast, views = _grey(header, pixels, photometric, block)
    else:
        grey, contrast, views = _colour(header, pixels, photometric), "colour", 0
    image = Image.fromarray(grey)
    directions, side = _directions(header), _side(header)
    geometry = _geometry(header, image.size, directions, side, block)
    origin = Origin(
        geometry=geometry,
        photometric=photometric,
        contrast=contrast,
        views=views,
        directions="\\".join(directions or ()),
        side=side,
        constant=bool((grey == grey[0, 0]).all()),
    )
    return Picture(geometry.apply(image, Image.Resampling.BICUBIC), origin)


def mask_image(data: bytes) -> Image.Image:
    """Return a mask that is a DICOM file, in stored pixels: the stored values, neither windowed nor turned.

    Raises
    ------
    ImageProblem
        As `picture`, and if it is in colour.
    """
    header = Header(parse(data), 0)
    values = stored_values(header, frame_index(header, None))
    if values.ndim != 2:
        raise unreadable("in colour; expected a mask of one channel")
    low, high = float(values.min()), float(values.max())
    if high > low:
        values = (values.astype(np.float64) - min(low, 0.0)) / (high - min(low, 0.0)) * 255
    else:
        values = np.where(values > 0, 255, 0)
    return Image.fromarray(np.floor(values + 0.5).astype(np.uint8))


# grey


def _grey(header: Header, stored: np.ndarray, photometric: str, block: DicomBlock) -> tuple[np.ndarray, Contrast, int]:
    """Return uint8 (rows, columns), what decided its contrast, and how many windows or VOI LUTs the file has."""
    padding = _padding(header, stored)
    values, bits = _modality(header, stored)
    group = header.group("FrameVOILUTSequence", "WindowCenter")
    tables, windows = header.items("VOILUTSequence"), _windows(group)
    views = len(tables) or len(windows)
    contrast: Contrast
    if block.window is not None:
        grey = _windowed(values, block.window.center, block.window.width, "LINEAR_EXACT")
        contrast = "own window"
    elif views or block.view > 1:
        if block.view > views:
            raise ImageProblem("{} without the view asked for", f"{views} in the file; dicom.view is {block.view}")
        if tables:
            table, depth = _lookup(tables[block.view - 1], values, "VOILUTSequence", header)
            grey = table / (2.0**depth - 1)
            contrast = "VOI LUT"
        else:
            function = group.word("VOILUTFunction", ("LINEAR", "LINEAR_EXACT", "SIGMOID")) or "LINEAR"
            grey = _windowed(values, *windows[block.view - 1], function)
            contrast = "window"
    elif bits is not None and bits[1] <= 8:
        low, high = bits[2:]
        grey = (values.astype(np.float64) - low) / (high - low)
        contrast = "all bits"
    else:
        shown = values if padding is None else values[~padding]
        low, high = np.percentile(shown, PERCENTILES) if shown.size else (0.0, 0.0)
        if not low < high:
            low, high = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 0.0)
        grey = (values.astype(np.float64) - low) / (high - low) if low < high else np.zeros(values.shape)
        contrast = "percentiles"
    grey = np.clip(grey, 0.0, 1.0)
    if photometric == "MONOCHROME1":
        grey = 1.0 - grey
    if padding is not None:
        grey = np.where(padding, 0.0, grey)
    return np.floor(grey * 255 + 0.5).astype(np.uint8), contrast, views


def _padding(header: Header, stored: np.ndarray) -> np.ndarray | None:
    """Return where the image is filled up (PS3.3 C.7.5.1.1.2), None if nowhere."""
    value = header.numbers("PixelPaddingValue")
    if not value or not np.issubdtype(stored.dtype, np.integer):
        return None
    edges = [int(edge) for edge in (value[0], *header.numbers("PixelPaddingRangeLimit")[:1])]
    if header.whole("PixelRepresentation", default=0) == 1:  # often written as if it were unsigned
        edges = [edge - 2**16 if edge >= 2**15 else edge for edge in edges]
    padding: np.ndarray = (stored >= min(edges)) & (stored <= max(edges))
    return padding if padding.any() else None


_Bits = tuple[str, int, float, float]


def _modality(header: Header, stored: np.ndarray) -> tuple[np.ndarray, _Bits | None]:
    """Return the values in the units of the modality (Hounsfield units in CT).

    The second is where they come from, how many bits they have, and the lowest and highest value that such bits can hold;
    None for floating-point pixels.
    """
    tables = header.items("ModalityLUTSequence")
    if tables:
        values, depth = _lookup(tables[0], stored, "ModalityLUTSequence", header)
        return values, ("table", depth, 0.0, 2.0**depth - 1)
    group = header.group("PixelValueTransformationSequence", "RescaleSlope")
    slope, intercept = group.numbers("RescaleSlope"), group.numbers("RescaleIntercept")
    if bool(slope) != bool(intercept):
        there, lacking = ("RescaleSlope", "RescaleIntercept") if slope else ("RescaleIntercept", "RescaleSlope")
        raise ImageProblem("{} without rescale", f"{there} is there, {lacking} is missing")
    if not slope and str(header.get("SOPClassUID")) == _CT_IMAGE_STORAGE:
        raise ImageProblem(
            "{} without rescale", "CT without RescaleSlope and RescaleIntercept, so without Hounsfield units"
        )
    if slope and slope[0] == 0:
        raise ImageProblem("{} without rescale", "RescaleSlope is 0")
    bits: _Bits | None = None
    if np.issubdtype(stored.dtype, np.integer):
        depth = header.whole("BitsStored", default=header.whole("BitsAllocated"))
        signed = header.whole("PixelRepresentation", default=0) == 1
        low, high = (-(2.0 ** (depth - 1)), 2.0 ** (depth - 1) - 1) if signed else (0.0, 2.0**depth - 1)
        bits = ("bits", depth, low, high)
    if not slope or (slope[0] == 1 and intercept[0] == 0):
        return stored, bits
    values = stored.astype(np.float64) * slope[0] + intercept[0]
    if not np.isfinite(values).all():
        raise unreadable("RescaleSlope makes the pixels infinite")
    if bits is not None:
        edges = [edge * slope[0] + intercept[0] for edge in bits[2:]]
        bits = ("bits", bits[1], edges[0], edges[1])
        if slope[0] < 0:
            bits = ("bits", bits[1], edges[1], edges[0])
    return values, bits


def _lookup(item: Header, values: np.ndarray, sequence: str, header: Header) -> tuple[np.ndarray, int]:
    """Return the entries of a lookup table for the values, and the bits of an entry (PS3.3 C.11.1.1, C.11.2.1.1).

    A value below the first one mapped gets the first entry, a value above the last one mapped the last.
    """
    descriptor = item.numbers("LUTDescriptor")
    if len(descriptor) != 3 or not all(number.is_integer() for number in descriptor):
        raise unreadable(f"LUTDescriptor in {sequence} is missing or damaged")
    count, first, depth = (int(number) for number in descriptor)
    count = count % 2**16 or 2**16  # 0 means 65536, and a signed reading of more than 32767 is negative
    if not 8 <= depth <= 16:
        raise unreadable(f"LUTDescriptor in {sequence} asks for {depth} bits per entry; expected 8 to 16")
    entries = _entries(item.get("LUTData"), count, header)
    if entries is None:
        raise unreadable(f"LUTData in {sequence} does not hold the entries that LUTDescriptor tells of")
    if np.issubdtype(values.dtype, np.floating):
        values = np.rint(values)
    if _meant_as_unsigned(first, values):
        first += 2**16
    positions = np.clip(values.astype(np.float64) - first, 0, count - 1).astype(np.int64)
    return np.minimum(entries[positions], 2**depth - 1), depth


def _meant_as_unsigned(first: int, values: np.ndarray) -> bool:
    """Return whether a first mapped value below 0 must have been meant as one above 32767: no value is below 0."""
    return first < 0 and values.size > 0 and values.min() >= 0 and values.max() > 2**15


def _entries(data: Any, count: int, header: Header) -> np.ndarray | None:
    """Return int64 (count,), from words, or from bytes that hold words or (two in a word) bytes."""
    if isinstance(data, bytes | bytearray):
        order = ">" if transfer_syntax(header.dataset) == _BIG_ENDIAN else "<"
        if len(data) >= 2 * count:
            return np.frombuffer(data, f"{order}u2", count).astype(np.int64)
        if len(data) >= count:
            packed = np.frombuffer(data[: len(data) // 2 * 2], f"{order}u2").astype("<u2").tobytes() + data[-1:]
            return np.frombuffer(packed, np.uint8, count).astype(np.int64)
        return None
    if isinstance(data, Sequence) and not isinstance(data, str) and len(data) >= count:
        if not all(isinstance(entry, int) for entry in data[:count]):
            return None
        return np.array(data[:count], dtype=np.int64) % 2**16
    return None


def _windows(group: Header) -> list[tuple[float, float]]:
    """Return centre and width of every window that is one: a width below 1 is how some programs write "none"."""
    pairs = zip(group.numbers("WindowCenter"), group.numbers("WindowWidth"), strict=False)
    exact = group.word("VOILUTFunction", ("LINEAR_EXACT", "SIGMOID")) is not None
    return [(center, width) for center, width in pairs if (width > 0 if exact else width >= 1)]


def _windowed(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Return the values within a window as 0 to 1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    from pydicom import Dataset
    from pydicom.pixels.processing import apply_windowing

    # pydicom scales to the range of the stored bits; these make it 0 to 65535 whatever the values are.
    view = Dataset()
    view.PhotometricInterpretation, view.PixelRepresentation, view.BitsStored = "MONOCHROME2", 0, 16
    view.add_new("VOILUTFunction", "CS", function)
    view.add_new("WindowCenter", "FD", center)
    view.add_new("WindowWidth", "FD", width)
    with np.errstate(over="ignore"):  # exp() of what lies far below a sigmoid's centre
        windowed: np.ndarray = apply_windowing(values, view) / (2.0**16 - 1)
    return windowed


# colour


def _colour(header: Header, pixels: np.ndarray, photometric: str) -> np.ndarray:
    """Return uint8 (rows, columns, 3)."""
    if photometric == "PALETTE COLOR":
        pixels, top = _palette(header, pixels)
    else:
        top = 2 ** header.whole("BitsStored", default=header.whole("BitsAllocated")) - 1
    if np.issubdtype(pixels.dtype, np.signedinteger) and pixels.min() < 0:
        raise unreadable("colours below 0 (PixelRepresentation 1)")
    scaled: np.ndarray = np.minimum(pixels, top).astype(np.float64) * (255.0 / top)
    return np.floor(scaled + 0.5).astype(np.uint8)


def _palette(header: Header, stored: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the colours (rows, columns, 3) of palette indices, and the value of the brightest (PS3.3 C.7.6.3.1.5 and .6)."""
    from pydicom.pixels.processing import apply_color_lut

    dataset = header.dataset
    descriptor = header.numbers("RedPaletteColorLookupTableDescriptor")
    if len(descriptor) != 3 or not all(number.is_integer() for number in descriptor):
        raise unreadable("RedPaletteColorLookupTableDescriptor is missing or damaged")
    count, first, depth = (int(number) for number in descriptor)
    count = count % 2**16 or 2**16
    if depth not in (8, 16):
        raise unreadable(f"RedPaletteColorLookupTableDescriptor asks for {depth} bits per entry; expected 8 or 16")
    if "RedPaletteColorLookupTableData" not in dataset:
        if depth == 8 and count > 256:
            raise unreadable(f"a segmented palette of {count} colours of 8 bits; expected 256 at most")
        try:
            colours: np.ndarray = apply_color_lut(stored, dataset)[..., :3]
            return colours, 2**depth - 1
        except MemoryError:
            raise
        except Exception:
            raise unreadable("its palette is missing or damaged") from None
    tables = []
    for colour in ("Red", "Green", "Blue"):
        data = header.get(f"{colour}PaletteColorLookupTableData")
        entries = _entries(data, count, header)
        if entries is None:
            raise unreadable(
                f"{colour}PaletteColorLookupTableData does not hold the colours that its descriptor tells of"
            )
        tables.append(entries)
    palette = np.stack(tables, axis=-1)
    positions = np.clip(stored.astype(np.int64) - first, 0, count - 1)
    # Some write 8-bit colours as words, and some of those as if they had 16 bits.
    return palette[positions], 255 if depth == 8 and palette.max() <= 255 else 65535


# geometry

_AXES = {"L": "LR", "R": "LR", "A": "AP", "P": "AP", "H": "HF", "F": "HF"}
_STANDARD = {
    frozenset(("LR", "AP")): ("L", "P"),
    frozenset(("LR", "HF")): ("L", "F"),
    frozenset(("AP", "HF")): ("P", "F"),
}
"""Where rows and columns lead to in a picture of the standard orientation: as axial, coronal and sagittal slices are stored."""


def _directions(header: Header) -> tuple[str, str] | None:
    """Return the direction of the body along a row and along a column of the stored pixels (PS3.3 C.7.6.1.1.1, C.7.6.2.1.1).

    One letter each: L(eft), R(ight), A(nterior), P(osterior), H(ead), F(oot) of the patient. Oblique slices get the nearest.
    None where the file does not say, says what can't be, or is of an animal.
    """
    cosines = header.group("PlaneOrientationSequence", "ImageOrientationPatient").numbers("ImageOrientationPatient")
    if len(cosines) == 6:
        letters = [_letter(cosines[:3]), _letter(cosines[3:])]
    else:
        value = header.get("PatientOrientation")
        if (
            header.word("AnatomicalOrientationType", ("QUADRUPED",))
            or not isinstance(value, Sequence)
            or len(value) != 2
        ):
            return None
        words = [str(word).strip().upper() for word in value]
        letters = [word[0] if word and set(word) <= set(_AXES) else "" for word in words]
    if "" in letters or _AXES[letters[0]] == _AXES[letters[1]]:
        return None
    return letters[0], letters[1]


def _letter(vector: list[float]) -> str:
    axis = int(np.argmax(np.abs(vector)))
    if vector[axis] == 0:
        return ""
    return ("LPH" if vector[axis] > 0 else "RAF")[axis]


def _side(header: Header) -> str:
    """Return which of two paired organs the image shows, "" where the file does not say."""
    for source, keyword in (
        (header, "ImageLaterality"),
        (header.group("FrameAnatomySequence", "FrameLaterality"), "FrameLaterality"),
        (header, "Laterality"),
    ):
        if side := source.word(keyword, ("L", "R")):
            return side
    return ""


def _geometry(
    header: Header, stored: tuple[int, int], directions: tuple[str, str] | None, side: str, block: DicomBlock
) -> Geometry:
    width, height = stored
    ratio = _aspect(header)
    if abs(ratio - 1) < 0.01:
        square = stored
    elif ratio > 1:
        square = (width, max(1, round(height * ratio)))
    else:
        square = (max(1, round(width / ratio)), height)
    if square[0] * square[1] > MAX_PIXELS:
        raise unreadable(f"{square[0]}x{square[1]} once its pixels are square; expected {MAX_PIXELS} pixels at most")
    transpose = mirror = flip = False
    if block.orientation == "standard":
        if directions is None:
            raise ImageProblem(
                "{} without orientation",
                "neither ImageOrientationPatient nor PatientOrientation says how it lies, and dicom.orientation is standard",
            )
        right, down = _STANDARD[frozenset(_AXES[letter] for letter in directions)]
        transpose = _AXES[directions[0]] != _AXES[right]
        along_rows, along_columns = directions[::-1] if transpose else directions
        mirror, flip = along_rows != right, along_columns != down
    if block.laterality != "stored":
        if not side:
            raise ImageProblem(
                "{} without laterality",
                f"neither ImageLaterality nor Laterality is L or R, and dicom.laterality is {block.laterality}",
            )
        mirror ^= side != {"left": "L", "right": "R"}[block.laterality]
    return Geometry(stored, square, transpose, mirror, flip)


def _aspect(header: Header) -> float:
    """Return height over width of a pixel: PixelSpacing (rows, then columns), else ImagerPixelSpacing, PixelAspectRatio."""
    spacing = header.group("PixelMeasuresSequence", "PixelSpacing").numbers("PixelSpacing")
    for keyword, numbers in (
        ("PixelSpacing", spacing),
        ("ImagerPixelSpacing", header.numbers("ImagerPixelSpacing")),
        ("PixelAspectRatio", header.numbers("PixelAspectRatio")),
    ):
        if len(numbers) == 2:
            if min(numbers) <= 0 or not 1 / MAX_ASPECT <= numbers[0] / numbers[1] <= MAX_ASPECT:
                raise unreadable(f"{keyword} tells of pixels more oblong than {MAX_ASPECT:g} to 1")
            return numbers[0] / numbers[1]
    return 1.0
