"""One DICOM file as a picture: grey or RGB of 8 bits, as a viewer would show it.

The order is that of PS3.3 C.7.6.3, C.11.1 and C.11.2 (the greyscale pipeline of PS3.4 N.2.1): stored values, rescale or
modality LUT, window or VOI LUT, inversion of MONOCHROME1; then square pixels, then the directions that the data file asks
for. Presentation states, overlays and ICC profiles are not applied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from chainward_client.data.dicom_file import Header, parse
from chainward_client.data.dicom_format import frame_index
from chainward_client.data.dicom_geometry import Geometry, geometry_of, known_directions, known_side
from chainward_client.data.dicom_grey import Contrast, grey_picture, grey_values, lut_entries, windows_of
from chainward_client.data.dicom_pixels import Stored, stored_values
from chainward_client.data.dicom_settings import DicomBlock
from chainward_client.data.scale import Scale
from chainward_client.data.unusable import unreadable

if TYPE_CHECKING:
    from pydicom import FileDataset


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
    oddities : what is odd about the file and does no harm, in words without any value of its header
    """

    geometry: Geometry
    photometric: str
    contrast: Contrast
    views: int
    directions: str
    side: str
    constant: bool
    oddities: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Picture:
    """The picture of one file, mode L or RGB, and how it came about."""

    image: Image.Image
    origin: Origin


def picture(dataset: FileDataset, block: DicomBlock, scale: Callable[[], Scale] | None = None) -> Picture:
    """Return what a viewer would show of a parsed file, lying as `block` asks.

    Parameters
    ----------
    dataset : the file
    block : how pictures come out of files
    scale : returns that of the data set, for more than 8 bits without a window; None: measured on this file alone

    Raises
    ------
    ImageProblem
        If the file holds no image, several frames, a transfer syntax without a decoder, damaged pixels, or not what
        `block` relies on.
    """
    header, pixels = _opened(dataset, block.frame)
    photometric = pixels.format.photometric
    contrast: Contrast = "colour"
    views = 0
    if photometric in ("MONOCHROME1", "MONOCHROME2"):
        values = grey_values(header, pixels, block)
        contrast, views = values.contrast, values.views
        grey = grey_picture(values, photometric, scale)
    else:
        grey = _colour(header, pixels)
    image = Image.fromarray(grey)
    directions, side = known_directions(header), known_side(header)
    geometry = geometry_of(header, image.size, directions, side, block)
    origin = Origin(
        geometry=geometry,
        photometric=photometric,
        contrast=contrast,
        views=views,
        directions="\\".join(directions or ()),
        side=side,
        constant=bool((grey == grey[0, 0]).all()),
        oddities=frozenset(header.oddities),
    )
    return Picture(geometry.apply(image, Image.Resampling.BICUBIC), origin)


def deep_values(dataset: FileDataset, block: DicomBlock) -> np.ndarray | None:
    """Return the values of a parsed file that the scale of the data set is measured on; None where it plays no role.

    Raises
    ------
    ImageProblem
        As `picture`.
    """
    known = Header(dataset, 0)
    if block.window is not None or windows_of(known) or known.get("VOILUTSequence") is not None:
        return None  # before the pixels are decoded
    header, pixels = _opened(dataset, block.frame)
    if pixels.format.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        return None
    return grey_values(header, pixels, block).measurable


def _opened(dataset: FileDataset, wanted: int | None) -> tuple[Header, Stored]:
    header = Header(dataset, 0)
    frame = frame_index(header, wanted)
    header = Header(dataset, frame, header.oddities)
    return header, stored_values(header, frame)


def mask_image(data: bytes) -> Image.Image:
    """Return a mask that is a DICOM file, in stored pixels: the stored values, neither windowed nor turned.

    Raises
    ------
    ImageProblem
        As `picture`, and if it is in colour.
    """
    values = _opened(parse(data), None)[1].values
    if values.ndim != 2:
        raise unreadable("in colour; expected a mask of one channel")
    low, high = float(values.min()), float(values.max())
    if high > low:
        values = (values.astype(np.float64) - min(low, 0.0)) / (high - min(low, 0.0)) * 255
    else:
        values = np.where(values > 0, 255, 0)
    return Image.fromarray(np.floor(values + 0.5).astype(np.uint8))


# colour


def _colour(header: Header, stored: Stored) -> np.ndarray:
    """Return uint8 (rows, columns, 3)."""
    pixels, top = stored.values, 2**stored.format.bits - 1
    if stored.format.photometric == "PALETTE COLOR":
        pixels, top = _palette(header, pixels)
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
        entries = lut_entries(data, count, header)
        if entries is None:
            raise unreadable(
                f"{colour}PaletteColorLookupTableData does not hold the colours that its descriptor tells of"
            )
        tables.append(entries)
    palette = np.stack(tables, axis=-1)
    positions = np.clip(stored.astype(np.int64) - first, 0, count - 1)
    # Some write 8-bit colours as words, and some of those as if they had 16 bits.
    return palette[positions], 255 if depth == 8 and palette.max() <= 255 else 65535
