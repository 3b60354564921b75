"""How the pixels of a DICOM file are stored: what its header says, corrected by what a compressed stream says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chainward_client.data.dicom_file import PHOTOMETRIC, Header
from chainward_client.data.dicom_stream import StreamFormat
from chainward_client.data.unusable import ImageProblem, unreadable

MAX_PIXELS = 178_956_970
"""As Pillow's: what claims more is damaged, or no image for a classifier."""

_GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
YBR = ("YBR_FULL", "YBR_FULL_422")


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
