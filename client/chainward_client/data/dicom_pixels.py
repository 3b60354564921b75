"""The stored values of one frame of a DICOM file, uncompressed, and what they are.

Where the header and a compressed stream differ, the stream decides (dicom_format.py); where the pixels can't be what the header
says, they are refused. The installed decoders of a transfer syntax are tried one after the other, each but Pillow in a process
of its own (dicom_workers.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from chainward_client.data.dicom_file import Header, transfer_syntax
from chainward_client.data.dicom_format import YBR, Format, StreamFormat, declared_format, has_end, stream_format
from chainward_client.data.dicom_workers import DecodingError, decode_here, decode_in_process
from chainward_client.data.unusable import ImageProblem, unreadable

OUTSIDE = 0.02
"""Share of the pixels that may be colours that no RGB has, before YBR is taken to be a wrong tag."""

_DECODERS = {
    "1.2.840.10008.1.2.4.50": ("pillow", "gdcm"),  # JPEG baseline
    "1.2.840.10008.1.2.4.51": ("pillow", "gdcm"),  # JPEG extended
    "1.2.840.10008.1.2.4.57": ("gdcm",),  # JPEG lossless
    "1.2.840.10008.1.2.4.70": ("gdcm",),  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": ("pyjpegls", "gdcm"),  # JPEG-LS
    "1.2.840.10008.1.2.4.81": ("pyjpegls", "gdcm"),
    "1.2.840.10008.1.2.4.90": ("pylibjpeg", "pillow", "gdcm"),  # JPEG 2000
    "1.2.840.10008.1.2.4.91": ("pylibjpeg", "pillow", "gdcm"),
    "1.2.840.10008.1.2.4.201": ("pylibjpeg",),  # HTJ2K
    "1.2.840.10008.1.2.4.202": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.203": ("pylibjpeg",),
    "1.2.840.10008.1.2.5": ("pylibjpeg", "pydicom"),  # RLE
}
"""Which of pydicom's plugins decodes a transfer syntax, best first: always in the same order, because lossy decoders differ."""

_PACKAGES = {
    "gdcm": "python-gdcm",
    "pyjpegls": "pyjpegls",
    "pylibjpeg": "pylibjpeg pylibjpeg-openjpeg pylibjpeg-rle",
    "pillow": "pillow",
}
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_IN_PROCESS = ("pillow", "pydicom")


@dataclass(frozen=True)
class Stored:
    """The stored values (rows, columns), or (rows, columns, 3) in RGB, and their format."""

    values: np.ndarray
    format: Format


def stored_values(header: Header, frame: int) -> Stored:
    """Return the stored values of a frame, colours in RGB.

    Raises
    ------
    ImageProblem
        If there are none, their format is damaged or no decoder reads it.
    """
    if not any(keyword in header.dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise unreadable("it holds no image (PixelData is missing)")
    decoder = _decoder(header)
    if decoder.is_encapsulated:
        stream = _stream(header, frame)
        says = stream_format(stream)
        form = declared_format(header, says)
        values, colours = _decompressed(decoder, form, stream, says)
    else:
        form = declared_format(header, None)
        values, colours = _native(header, decoder, frame, form)
    if form.samples == 3 and colours in YBR:
        values, colours = _rgb(header, values), "RGB"
    if form.samples == 3 and colours != "RGB":
        raise unreadable(f"{form.photometric} can't be turned into RGB")
    if values.shape != ((form.rows, form.columns) if form.samples == 1 else (form.rows, form.columns, 3)):
        raise unreadable("its pixels are of another shape than its Rows and Columns")
    if not np.isfinite(values).all():
        raise unreadable("pixels that are not finite numbers")
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return _within_bits(header, values, form)


def _decoder(header: Header) -> Any:
    """Return pydicom's decoder of the file's transfer syntax."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    syntax = UID(transfer_syntax(header.dataset))
    try:
        return get_decoder(syntax)
    except Exception:
        reason = f"{_name(syntax)}; convert it to an uncompressed one"
        raise ImageProblem("{} in a transfer syntax without a decoder", reason) from None


def _name(syntax: Any) -> str:
    # UID.name is the UID itself where it is none of the standard's.
    known = syntax.name != str(syntax) and syntax.is_transfer_syntax
    return str(syntax.name) if known else "a private or damaged one"


def _plugins(decoder: Any, bits: int) -> list[str]:
    """Return the installed plugins that decode such a stream, in the order in which they are tried."""
    kind = "{} in a transfer syntax without a decoder"
    syntax = decoder.UID
    usable = decoder.available_plugins
    if syntax == _JPEG_EXTENDED and bits != 8:
        usable = tuple(plugin for plugin in usable if plugin == "pylibjpeg")  # the others are built for 8 bits
        if not usable:
            raise ImageProblem(kind, f"{_name(syntax)} of 12 bits; convert it, or install pylibjpeg-libjpeg (GPL)")
    preferred = _DECODERS.get(str(syntax), ())
    if not usable:
        packages = _PACKAGES[preferred[0]] if preferred else "a decoder for it"
        raise ImageProblem(kind, f"{_name(syntax)}; pip install {packages} (part of 'chainward[dicom]')")
    return list(dict.fromkeys(plugin for plugin in (*preferred, *sorted(usable)) if plugin in usable))


def _decompressed(decoder: Any, form: Format, stream: bytes, says: StreamFormat | None) -> tuple[np.ndarray, str]:
    """Return the values that the first decoder that can read the stream makes of it, and how their colours are to be read.

    Raises
    ------
    ImageProblem
        If no decoder can.
    """
    words: dict[str, str] = {}
    for plugin in _plugins(decoder, form.bits):
        decode = decode_here if plugin in _IN_PROCESS else decode_in_process
        try:
            request = form.options() | {"transfer_syntax": str(decoder.UID), "plugin": plugin}
            values, colours = decode(request, stream)
            by_itself = plugin == "pillow" and says is not None and says.adobe and form.samples == 3
            return values, "RGB" if by_itself else colours
        except MemoryError:
            raise
        except DecodingError as error:
            words[plugin] = str(error)
        except Exception as error:  # decoders of damaged pixels raise nearly anything
            words[plugin] = f"{type(error).__name__}: {error}"
    if says is not None and not has_end(stream):
        raise unreadable("its pixels can't be decoded: truncated, the stream has no end marker")
    told = "; ".join(f"{plugin}: {_shortened(found)}" for plugin, found in words.items())
    raise unreadable(f"its pixels can't be decoded ({told})")


def _shortened(words: str) -> str:
    """Return what a decoder said, on one line: of pydicom's chain of reasons the last."""
    line = " ".join(words.replace(chr(0), " ").split())
    line = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in line)
    return line if len(line) <= 120 else f"{line[:40]} ... {line[-75:]}"


def _stream(header: Header, frame: int) -> bytes:
    """Return the compressed stream of one frame."""
    from pydicom.encaps import get_frame

    dataset = header.dataset
    try:
        offsets = None
        if "ExtendedOffsetTable" in dataset and "ExtendedOffsetTableLengths" in dataset:
            offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
        frames = max(header.whole("NumberOfFrames", default=1), 1)
        return get_frame(dataset.PixelData, frame, number_of_frames=frames, extended_offsets=offsets)
    except (ImageProblem, MemoryError):
        raise
    except Exception as error:
        raise unreadable(f"the stream of its frame can't be found ({type(error).__name__})") from None


def _native(header: Header, decoder: Any, frame: int, form: Format) -> tuple[np.ndarray, str]:
    """Return uncompressed values, and how their colours are to be read."""
    keyword = next(name for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if name in header.dataset)
    frames = max(header.whole("NumberOfFrames", default=1), 1)
    channels = 2 if form.photometric == "YBR_FULL_422" else form.samples
    expected = (form.rows * form.columns * channels * form.allocated * frames + 7) // 8
    data = header.get(keyword)
    if not isinstance(data, bytes | bytearray):
        raise unreadable(f"{keyword} holds no bytes")
    if len(data) < expected:
        raise unreadable(f"truncated: {len(data)} bytes of pixels, expected {expected}")
    if form.allocated == 1 and form.samples == 1:
        return _single_bits(header, bytes(data), frame, form), form.photometric
    options = form.options() | {"number_of_frames": frames, "pixel_keyword": keyword}
    options["pixel_vr"] = header.dataset[keyword].VR
    try:
        values, found = decoder.as_array(data, index=frame, decoding_plugin="", **options)
    except MemoryError:
        raise
    except Exception as error:
        raise unreadable(f"its pixels can't be read ({_shortened(f'{type(error).__name__}: {error}')})") from None
    return values, str(found["photometric_interpretation"])


def _single_bits(header: Header, data: bytes, frame: int, form: Format) -> np.ndarray:
    """Return pixels of one bit; those of a frame begin where those of the one before end, within a byte (PS3.5 8.1.1)."""
    if transfer_syntax(header.dataset) == _BIG_ENDIAN and header.dataset["PixelData"].VR == "OW":
        data = np.frombuffer(data[: len(data) // 2 * 2], ">u2").astype("<u2").tobytes() + data[len(data) // 2 * 2 :]
    size = form.rows * form.columns
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=(frame + 1) * size, bitorder="little")
    return bits[frame * size :].reshape(form.rows, form.columns)


def _rgb(header: Header, values: np.ndarray) -> np.ndarray:
    """Return YBR as RGB (PS3.3 C.7.6.3.1.2).

    Raises
    ------
    ImageProblem
        If the pixels can't be YBR: too many would be colours that there are not. Black is 0, 128, 128 in YBR, so that RGB with a
        wrong tag is found by its background alone.
    """
    from pydicom.pixels.processing import convert_color_space

    if values.dtype != np.uint8:
        raise unreadable("YBR of more than 8 bits can't be turned into RGB")
    few = values[:: max(1, values.shape[0] // 128), :: max(1, values.shape[1] // 128)].reshape(-1, 3).astype(np.float32)
    light, blue, red = few[:, 0], few[:, 1] - 128, few[:, 2] - 128
    made = np.stack([light + 1.402 * red, light - 0.344136 * blue - 0.714136 * red, light + 1.772 * blue])
    outside = float(((made < -24) | (made > 279)).any(axis=0).mean())
    if outside > OUTSIDE:
        raise unreadable(
            f"PhotometricInterpretation says YBR, but {outside:.0%} of the pixels can't be: RGB with a wrong tag? "
            "Correct the tag"
        )
    return convert_color_space(values, "YBR_FULL", "RGB")


def _within_bits(header: Header, values: np.ndarray, form: Format) -> Stored:
    """Return the values without what lies above BitsStored, or with it where it belongs to them.

    Overlays were once kept there, and some devices leave garbage; others only tell too few bits. In the first case the picture
    jumps where they are left in, in the second where they are taken out: the smoother of the two is taken.
    """
    if "PixelData" not in header.dataset or not np.issubdtype(values.dtype, np.integer):
        return Stored(values, form)
    form = replace(form, bits=form.meant)
    width = values.dtype.itemsize * 8
    if form.bits >= width or form.bits == 1:
        return Stored(values, form)
    low, high = (-(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1) if form.signed else (0, 2**form.bits - 1)
    if values.min() >= low and values.max() <= high:
        return Stored(values, form)
    cut = values & (2**form.bits - 1)
    if form.signed:
        zero_filled = np.array_equal(cut, values)
        cut = cut - ((cut > high).astype(values.dtype) << form.bits)
        if zero_filled:
            return Stored(cut, form)
    if _variation(cut) <= _variation(values):
        header.note("bits above BitsStored (overlays or garbage): taken out")
        return Stored(cut, form)
    header.note("values larger than BitsStored allows: left as they are")
    largest = int(max(abs(int(values.min())), abs(int(values.max()))))
    return Stored(values, replace(form, bits=min(width, largest.bit_length() + form.signed)))


def _variation(values: np.ndarray) -> float:
    """Return the mean jump from a pixel to the next, along rows and along columns."""
    wide = values.astype(np.float64)
    return sum(float(np.abs(np.diff(wide, axis=axis)).mean()) for axis in (0, 1) if wide.shape[axis] > 1)
