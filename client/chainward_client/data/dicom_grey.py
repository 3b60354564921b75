"""The greyscale pipeline of PS3.4 N.2.1: stored values, rescale or modality LUT, window or VOI LUT, inversion of MONOCHROME1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from chainward_client.data.dicom_file import Header, transfer_syntax
from chainward_client.data.dicom_pixels import Stored
from chainward_client.data.dicom_settings import DicomBlock
from chainward_client.data.scale import Scale, measure
from chainward_client.data.unusable import ImageProblem, unreadable

Contrast = Literal["window", "VOI LUT", "own window", "all bits", "scale of the set", "colour"]

_CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"


@dataclass(frozen=True)
class GreyValues:
    """The values of a grey image in the units of its modality, and how they are shown.

    Attributes
    ----------
    values : (rows, columns)
    padding : where the image is filled up; None if nowhere
    contrast : what decides which are black and which white
    views : number of the file's VOI LUTs, or else of its windows
    shown : returns the values as 0, black, to 1, white (what lies beyond is cut off); None: the scale of the data set does
    """

    values: np.ndarray
    padding: np.ndarray | None
    contrast: Contrast
    views: int
    shown: Callable[[], np.ndarray] | None

    @property
    def measurable(self) -> np.ndarray | None:
        """Return the values if the scale of the data set decides, without padding; else None."""
        if self.shown is not None:
            return None
        return self.values if self.padding is None else self.values[~self.padding]


def grey_values(header: Header, stored: Stored, block: DicomBlock) -> GreyValues:
    """Return the values of a grey image, and what decides its contrast.

    Raises
    ------
    ImageProblem
        If rescale, tables or windows are damaged, or the file has not the view that is asked for.
    """
    padding = _padding(header, stored)
    values, bits = _modality(header, stored)
    group = header.group("FrameVOILUTSequence", "WindowCenter")
    tables, windows = header.items("VOILUTSequence"), windows_of(group)
    views = len(tables) or len(windows)
    contrast: Contrast = "scale of the set"
    shown: Callable[[], np.ndarray] | None = None
    if block.window is not None:
        contrast = "own window"
        shown = partial(_windowed, values, block.window.center, block.window.width, "LINEAR_EXACT")
    elif block.view > max(views, 1):
        raise ImageProblem("{} without the view asked for", f"{views} in the file; dicom.view is {block.view}")
    elif tables:
        contrast, shown = "VOI LUT", partial(_looked_up, tables[block.view - 1], values, header)
    elif windows:
        function = group.word("VOILUTFunction", ("LINEAR", "LINEAR_EXACT", "SIGMOID")) or "LINEAR"
        contrast, shown = "window", partial(_windowed, values, *windows[block.view - 1], function)
    elif bits is not None and bits[0] <= 8:
        contrast, shown = "all bits", partial(Scale(*bits[1:]).unit, values)
    return GreyValues(values, padding, contrast, views, shown)


def grey_picture(grey: GreyValues, photometric: str, scale: Callable[[], Scale] | None) -> np.ndarray:
    """Return uint8 (rows, columns); without a `scale` of a data set, a file is a data set of its own."""
    shown: np.ndarray
    if grey.shown is not None:
        shown = np.clip(grey.shown(), 0.0, 1.0)
    else:
        shown = (measure(1, lambda _: grey.measurable) if scale is None else scale()).unit(grey.values)
    if photometric == "MONOCHROME1":
        shown = 1.0 - shown
    if grey.padding is not None:
        shown = np.where(grey.padding, 0.0, shown)
    return np.floor(shown * 255 + 0.5).astype(np.uint8)


def _padding(header: Header, stored: Stored) -> np.ndarray | None:
    """Return where the image is filled up (PS3.3 C.7.5.1.1.2), None if nowhere."""
    value = header.usable("PixelPaddingValue", "no padding")
    if not value or not np.issubdtype(stored.values.dtype, np.integer):
        return None
    edges = [int(edge) for edge in (value[0], *header.usable("PixelPaddingRangeLimit", "no padding")[:1])]
    if stored.format.signed:  # often written as if it were unsigned
        edges = [edge - 2**16 if edge >= 2**15 else edge for edge in edges]
    padding: np.ndarray = (stored.values >= min(edges)) & (stored.values <= max(edges))
    return padding if padding.any() else None


def _modality(header: Header, pixels: Stored) -> tuple[np.ndarray, tuple[int, float, float] | None]:
    """Return the values in the units of the modality (Hounsfield units in CT).

    The second is how many bits they have, and the lowest and highest value that such bits can hold; None for floating-point
    pixels.
    """
    stored = pixels.values
    tables = header.items("ModalityLUTSequence")
    if tables:
        values, depth = _lookup(tables[0], stored, "ModalityLUTSequence", header)
        return values, (depth, 0.0, 2.0**depth - 1)
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
    bits = None
    if np.issubdtype(stored.dtype, np.integer):
        depth, signed = pixels.format.bits, pixels.format.signed
        low, high = (-(2.0 ** (depth - 1)), 2.0 ** (depth - 1) - 1) if signed else (0.0, 2.0**depth - 1)
        bits = (depth, low, high)
    if not slope or (slope[0] == 1 and intercept[0] == 0):
        return stored, bits
    values = stored.astype(np.float64) * slope[0] + intercept[0]
    if not np.isfinite(values).all():
        raise unreadable("RescaleSlope makes the pixels infinite")
    if bits is not None:
        low, high = sorted(edge * slope[0] + intercept[0] for edge in bits[1:])
        bits = (bits[0], low, high)
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
    entries = lut_entries(item.get("LUTData"), count, header)
    if entries is None:
        raise unreadable(f"LUTData in {sequence} does not hold the entries that LUTDescriptor tells of")
    if np.issubdtype(values.dtype, np.floating):
        values = np.rint(values)
    if _meant_as_unsigned(first, values):
        first += 2**16
    positions = np.clip(values.astype(np.float64) - first, 0, count - 1).astype(np.int64)
    return np.minimum(entries[positions], 2**depth - 1), depth


def _looked_up(item: Header, values: np.ndarray, header: Header) -> np.ndarray:
    """Return the values within a VOI LUT as 0 to 1."""
    table, depth = _lookup(item, values, "VOILUTSequence", header)
    found: np.ndarray = table / (2.0**depth - 1)
    return found


def _meant_as_unsigned(first: int, values: np.ndarray) -> bool:
    """Return whether a first mapped value below 0 must have been meant as one above 32767: no value is below 0."""
    return first < 0 and values.size > 0 and values.min() >= 0 and values.max() > 2**15


def lut_entries(data: Any, count: int, header: Header) -> np.ndarray | None:
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


def windows_of(group: Header) -> list[tuple[float, float]]:
    """Return centre and width of every window that is one: a width below 1 is how some programs write "none"."""
    centers, widths = (group.usable(keyword, "no window") for keyword in ("WindowCenter", "WindowWidth"))
    pairs = zip(centers, widths, strict=False)
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
