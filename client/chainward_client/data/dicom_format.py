"""How the pixels of a DICOM file are stored: what its header says, corrected by what a compressed stream says of itself.

The header repeats a stream's size, channels, bits, sign and colours, and is what programs get wrong: the stream can't be, because
it is what was compressed. Read here are JPEG, JPEG-LS (ISO 10918-1 B.2, ISO 14495-1 C.2) and JPEG 2000 (ISO 15444-1 A.5).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal

from chainward_client.data.dicom_file import PHOTOMETRIC, Header
from chainward_client.data.unusable import ImageProblem, unreadable

MAX_PIXELS = 178_956_970
"""As Pillow's: what claims more is damaged, or no image for a classifier."""

_GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
YBR = ("YBR_FULL", "YBR_FULL_422")

_JPEG_2000_START = b"\xff\x4f\xff\x51"
_END = b"\xff\xd9"
_NO_FRAME = (0xC4, 0xC8, 0xCC)
_RGB_NAMES = (b"RGB", b"rgb")

Colours = Literal["RGB", "YBR"]


@dataclass(frozen=True)
class StreamFormat:
    """What the stream of one frame holds.

    Attributes
    ----------
    rows, columns : size in pixels
    samples : channels
    bits : precision of a value
    signed : whether values are signed; None where this kind of stream can't say
    colours : what markers say of three channels; None where they say nothing
    adobe : it has Adobe's marker, by which some decoders turn YBR into RGB by themselves
    """

    rows: int
    columns: int
    samples: int
    bits: int
    signed: bool | None = None
    colours: Colours | None = None
    adobe: bool = False


@dataclass(frozen=True)
class Format:
    """How pixels are stored.

    Attributes
    ----------
    photometric : PhotometricInterpretation
    rows, columns : size in pixels
    samples : channels, 1 or 3
    allocated, bits : bits of a stored value, and those of them that the decoder must give
    meant : those of them that the header says to count
    signed : whether values are signed
    planar : PlanarConfiguration
    """

    photometric: str
    rows: int
    columns: int
    samples: int
    allocated: int
    bits: int
    meant: int
    signed: bool
    planar: int

    def options(self) -> dict[str, Any]:
        """Return what pydicom's decoders must know."""
        return {
            "rows": self.rows,
            "columns": self.columns,
            "samples_per_pixel": self.samples,
            "photometric_interpretation": self.photometric,
            "bits_allocated": self.allocated,
            "bits_stored": self.bits,
            "pixel_representation": int(self.signed),
            "planar_configuration": self.planar,
            "as_rgb": False,
            "correct_unused_bits": False,
        }


def frame_index(header: Header, wanted: int | None) -> int:
    """Return the index of the frame to be read."""
    frames = header.whole("NumberOfFrames", default=1)
    if frames < 1:
        header.note("NumberOfFrames below 1: taken as 1")
        frames = 1
    if wanted is None and frames > 1:
        raise ImageProblem(
            "multi-frame {}", f"{frames} frames; expected one: split it, or choose one for all files with dicom.frame"
        )
    if wanted is not None and frames > 1 and wanted > frames:
        raise ImageProblem("{} without the frame asked for", f"{frames} frames; dicom.frame is {wanted}")
    return 0 if wanted is None or frames == 1 else wanted - 1


def declared_format(header: Header, stream: StreamFormat | None) -> Format:
    """Return the format of the header, corrected by that of the stream; what was corrected is noted.

    Raises
    ------
    ImageProblem
        If neither tells what is needed, or what they tell can't be.
    """
    photometric = header.word("PhotometricInterpretation", PHOTOMETRIC)
    if photometric is None:
        raise unreadable("PhotometricInterpretation is missing or unknown")
    rows, columns = _size(header, stream)
    samples, photometric = _colours(header, stream, photometric)
    if samples not in (1, 3) or (samples == 1) != (photometric in _GREY):
        raise unreadable(f"SamplesPerPixel {samples} does not suit PhotometricInterpretation {photometric}")
    container = None if stream is None else 8 if stream.bits <= 8 else 16 if stream.bits <= 16 else 32
    allocated = header.whole("BitsAllocated", default=container)
    credible = container is None or (allocated >= container and allocated in (8, 16, 32))
    if container is not None and not credible:
        header.note("BitsAllocated that does not hold the stream's bits: the stream's taken")
        allocated = container
    if allocated not in (1, 8, 16, 32, 64):
        raise unreadable(f"BitsAllocated is {allocated}; expected 1, 8, 16 or 32")
    bits = meant = allocated
    signed = False
    if "PixelData" in header.dataset:
        bits, signed = _bits(header, stream, allocated)
        told = header.whole("BitsStored", default=bits)
        meant = told if credible and 1 <= told <= bits else bits
    planar = header.whole("PlanarConfiguration", default=0)
    return Format(photometric, rows, columns, samples, allocated, bits, meant, signed, planar)


def _size(header: Header, stream: StreamFormat | None) -> tuple[int, int]:
    rows = header.whole("Rows", default=None if stream is None else stream.rows)
    columns = header.whole("Columns", default=None if stream is None else stream.columns)
    if stream is not None and (stream.rows, stream.columns) != (rows, columns) and stream.rows and stream.columns:
        header.note("Rows and Columns that are not the stream's: the stream's taken")
        rows, columns = stream.rows, stream.columns
    if rows < 1 or columns < 1 or rows * columns > MAX_PIXELS:
        raise unreadable(f"Columns x Rows is {columns}x{rows}; expected 1 to {MAX_PIXELS} pixels")
    return rows, columns


def _colours(header: Header, stream: StreamFormat | None, photometric: str) -> tuple[int, str]:
    """Return the number of channels, and how they are to be read."""
    samples = header.whole("SamplesPerPixel", default=1 if photometric in _GREY else 3)
    if stream is None:
        return samples, photometric
    meant = photometric
    if stream.samples == 1 and photometric not in _GREY:
        meant = "MONOCHROME2"
    elif stream.samples == 3 and (photometric in _GREY or stream.colours is not None):
        transformed = photometric in ("YBR_ICT", "YBR_RCT")  # which decoders undo
        if stream.colours == "RGB" and not transformed:
            meant = "RGB"
        elif stream.colours == "YBR" and photometric not in YBR and not transformed:
            meant = "YBR_FULL"
        elif photometric in _GREY:
            meant = "YBR_FULL" if stream.signed is None else "RGB"
    if stream.samples != samples:
        header.note("SamplesPerPixel that is not the stream's: the stream's taken")
    if meant != photometric:
        header.note("PhotometricInterpretation that is not the stream's: the stream's taken")
    return stream.samples, meant


def _bits(header: Header, stream: StreamFormat | None, allocated: int) -> tuple[int, bool]:
    """Return how many bits of a value count, as far as the decoder is concerned, and whether it is signed."""
    bits = header.whole("BitsStored", default=allocated if stream is None else stream.bits)
    representation = header.whole("PixelRepresentation", default=0)
    if representation not in (0, 1):
        raise unreadable("PixelRepresentation is neither 0 nor 1")
    if stream is None and not 1 <= bits <= allocated:
        raise unreadable(f"BitsStored is {bits}, with BitsAllocated {allocated}")
    if header.whole("HighBit", default=bits - 1) != bits - 1:
        if stream is None:
            raise unreadable(f"HighBit is not {bits - 1}, BitsStored less one")
        header.note("HighBit that is not BitsStored less one: of no account in a compressed stream")
    signed = representation == 1
    if stream is None:
        return bits, signed
    if bits > stream.bits or bits < 1:
        header.note("BitsStored above the stream's bits: the stream's taken")
    if stream.signed is not None and stream.signed != signed:
        # An unsigned stream may hold the words of signed values: then the header alone knows.
        header.note("PixelRepresentation that is not the sign of the stream: signed taken")
        signed = True
    return stream.bits, signed


def stream_format(stream: bytes) -> StreamFormat | None:
    """Return what the stream says of itself; None where it is of another kind (RLE), or its head is damaged."""
    try:
        if stream[:2] == b"\xff\xd8":
            return _jpeg(stream)
        start = 0 if stream.startswith(_JPEG_2000_START) else stream[:4096].find(_JPEG_2000_START)
        return _jpeg_2000(stream, start) if start >= 0 else None
    except (struct.error, IndexError):
        return None


def has_end(stream: bytes) -> bool:
    """Return whether a JPEG or JPEG 2000 stream has its end marker, with nothing but padding behind it."""
    return stream.rstrip(b"\0").endswith(_END)


def _jpeg(stream: bytes) -> StreamFormat | None:
    colours: Colours | None = None
    adobe = False
    position = 2
    while position + 4 <= len(stream):
        if stream[position] != 0xFF:
            return None
        marker = stream[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
            continue
        length = struct.unpack_from(">H", stream, position + 2)[0]
        body = stream[position + 4 : position + 2 + length]
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            colours, adobe = "YBR" if body[11] else "RGB", True
        elif marker == 0xE0 and body.startswith(b"JFIF") and colours is None:
            colours = "YBR"
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in _NO_FRAME):
            bits, rows, columns, samples = struct.unpack_from(">BHHB", body)
            names = bytes(body[6 + 3 * index] for index in range(samples))
            if names in _RGB_NAMES:
                colours = "RGB"
            return StreamFormat(rows, columns, samples, bits, None, colours if samples == 3 else None, adobe)
        elif marker in (0xD9, 0xDA):
            return None
        position += 2 + length
    return None


def _jpeg_2000(stream: bytes, start: int) -> StreamFormat:
    # behind the marker: length, capabilities, size of the grid, offset, size of a tile, its offset, number of components
    _, _, right, bottom, left, top, *_, samples = struct.unpack_from(">HH8IH", stream, start + 4)
    depth = stream[start + 42]
    # The decoders undo the colour transform that the coding style (COD) declares: what comes out is RGB.
    style = stream.find(b"\xff\x52", start)
    transformed = samples == 3 and style >= 0 and stream[style + 8] == 1
    return StreamFormat(
        bottom - top, right - left, samples, (depth & 0x7F) + 1, bool(depth & 0x80), "RGB" if transformed else None
    )
