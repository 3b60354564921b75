"""What a compressed stream says of itself: its size, channels, bits, sign and colours, and whether its end is there.

The header of a DICOM file repeats all of this, and is what programs get wrong: the stream can't be, because it is what was
compressed. Read here are JPEG, JPEG-LS (ISO 10918-1 B.2, ISO 14495-1 C.2) and JPEG 2000 (ISO 15444-1 A.5).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

Colours = Literal["RGB", "YBR"]

_JPEG_2000_START = b"\xff\x4f\xff\x51"
_END = b"\xff\xd9"
_NO_FRAME = (0xC4, 0xC8, 0xCC)
_RGB_NAMES = (b"RGB", b"rgb")


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
