"""The stored values of one frame of a DICOM file, uncompressed.

Decoders of compressed pixels are C and Rust code that aborts on some damaged streams, and with it the process. All but Pillow's
therefore run in processes of their own (dicom_worker.py), which get the stream and the numbers of its format, nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from chainward_client.data.dicom_file import PHOTOMETRIC, Header, transfer_syntax, unreadable
from chainward_client.data.images import ImageProblem

MAX_PIXELS = 178_956_970
"""As Pillow's: what claims more is damaged, or no image for a classifier."""

DECODING_TIMEOUT = 120.0
"""Seconds after which a decoder that does not answer is ended."""

_DECODERS = {
    "1.2.840.10008.1.2.4.50": ("pillow",),  # JPEG baseline
    "1.2.840.10008.1.2.4.51": ("pillow",),  # JPEG extended
    "1.2.840.10008.1.2.4.57": ("gdcm",),  # JPEG lossless
    "1.2.840.10008.1.2.4.70": ("gdcm",),  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": ("pyjpegls",),  # JPEG-LS
    "1.2.840.10008.1.2.4.81": ("pyjpegls",),
    "1.2.840.10008.1.2.4.90": ("pylibjpeg", "pillow"),  # JPEG 2000
    "1.2.840.10008.1.2.4.91": ("pylibjpeg", "pillow"),
    "1.2.840.10008.1.2.4.201": ("pylibjpeg",),  # HTJ2K
    "1.2.840.10008.1.2.4.202": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.203": ("pylibjpeg",),
    "1.2.840.10008.1.2.5": ("pylibjpeg", "pydicom"),  # RLE
}
"""Which of pydicom's plugins decodes a transfer syntax, best first: always the same one, because lossy decoders differ."""

_PACKAGES = {
    "gdcm": "python-gdcm",
    "pyjpegls": "pyjpegls",
    "pylibjpeg": "pylibjpeg pylibjpeg-openjpeg pylibjpeg-rle",
    "pillow": "pillow",
}
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
_IN_PROCESS = ("", "pillow", "pydicom")


def frame_index(header: Header, wanted: int | None) -> int:
    """Return the index of the frame to be read."""
    frames = header.whole("NumberOfFrames", default=1)
    if frames < 1:
        raise unreadable("NumberOfFrames is not 1 or more")
    if wanted is None and frames > 1:
        raise ImageProblem(
            "multi-frame {}", f"{frames} frames; expected one: split it, or choose one for all files with dicom.frame"
        )
    if wanted is not None and frames > 1 and wanted > frames:
        raise ImageProblem("{} without the frame asked for", f"{frames} frames; dicom.frame is {wanted}")
    return 0 if wanted is None or frames == 1 else wanted - 1


def stored_values(header: Header, frame: int) -> np.ndarray:
    """Return the stored values (rows, columns), or (rows, columns, 3) in RGB.

    Raises
    ------
    ImageProblem
        If there are none, their format is damaged or no decoder reads it.
    """
    dataset = header.dataset
    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise unreadable("it holds no image (PixelData is missing)")
    photometric = header.word("PhotometricInterpretation", PHOTOMETRIC)
    if photometric is None:
        raise unreadable("PhotometricInterpretation is missing or unknown")
    rows, columns = header.whole("Rows"), header.whole("Columns")
    samples = header.whole("SamplesPerPixel", default=1)
    allocated = header.whole("BitsAllocated")
    if rows < 1 or columns < 1 or rows * columns > MAX_PIXELS:
        raise unreadable(f"Columns x Rows is {columns}x{rows}; expected 1 to {MAX_PIXELS} pixels")
    if samples not in (1, 3) or (samples == 1) != (photometric in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")):
        raise unreadable(f"SamplesPerPixel {samples} does not suit PhotometricInterpretation {photometric}")
    if allocated not in (1, 8, 16, 32, 64):
        raise unreadable(f"BitsAllocated is {allocated}; expected 1, 8, 16 or 32")
    if "PixelData" in dataset:
        stored = header.whole("BitsStored", default=allocated)
        if not 1 <= stored <= allocated:
            raise unreadable(f"BitsStored is {stored}, with BitsAllocated {allocated}")
        if header.whole("HighBit", default=stored - 1) != stored - 1:
            raise unreadable(f"HighBit is not {stored - 1}, BitsStored less one")
        if header.whole("PixelRepresentation", default=0) not in (0, 1):
            raise unreadable("PixelRepresentation is neither 0 nor 1")
    decoder, plugin = _decoder(header)
    try:
        if plugin in _IN_PROCESS:
            # YBR becomes RGB.
            values, properties = decoder.as_array(dataset, index=frame, decoding_plugin=plugin)
            colours = properties["photometric_interpretation"]
        else:
            values, colours = _WORKERS.decode(_request(header, photometric, plugin), _stream(header, frame))
    except ImageProblem:
        raise
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged pixels raise nearly anything
        raise unreadable(f"its pixels can't be decoded ({type(error).__name__}): truncated or damaged") from None
    if samples == 3 and colours != "RGB":
        raise unreadable(f"{photometric} can't be turned into RGB")
    if values.shape != ((rows, columns) if samples == 1 else (rows, columns, 3)):
        raise unreadable("its pixels are of another shape than its Rows and Columns")
    if not np.isfinite(values).all():
        raise unreadable("pixels that are not finite numbers")
    native: np.ndarray = values.astype(values.dtype.newbyteorder("="), copy=False)
    return native


def _decoder(header: Header) -> tuple[Any, str]:
    """Return pydicom's decoder of the file's transfer syntax, and its plugin ("" for uncompressed)."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    syntax = UID(transfer_syntax(header.dataset))
    kind = "{} in a transfer syntax without a decoder"
    # UID.name is the UID itself where it is none of the standard's.
    known = syntax.name != str(syntax) and syntax.is_transfer_syntax
    name = syntax.name if known else "a private or damaged one"
    try:
        decoder = get_decoder(syntax)
    except Exception:
        raise ImageProblem(kind, f"{name}; convert it to an uncompressed one") from None
    if not decoder.is_encapsulated:
        return decoder, ""
    usable = decoder.available_plugins
    if syntax == _JPEG_EXTENDED and header.whole("BitsStored", default=8) != 8:
        usable = tuple(plugin for plugin in usable if plugin == "pylibjpeg")  # the others are built for 8 bits
        if not usable:
            raise ImageProblem(kind, f"{name} of 12 bits; convert it, or install pylibjpeg-libjpeg (GPL)")
    preferred = _DECODERS.get(str(syntax), ())
    for plugin in (*preferred, *sorted(usable)):
        if plugin in usable:
            return decoder, plugin
    packages = _PACKAGES[preferred[0]] if preferred else "a decoder for it"
    raise ImageProblem(kind, f"{name}; pip install {packages} (part of 'chainward[dicom]')")


def _request(header: Header, photometric: str, plugin: str) -> dict[str, int | str]:
    """Return what a decoder must know of the pixels."""
    allocated = header.whole("BitsAllocated")
    return {
        "transfer_syntax": transfer_syntax(header.dataset),
        "plugin": plugin,
        "rows": header.whole("Rows"),
        "columns": header.whole("Columns"),
        "samples_per_pixel": header.whole("SamplesPerPixel", default=1),
        "photometric_interpretation": photometric,
        "bits_allocated": allocated,
        "bits_stored": header.whole("BitsStored", default=allocated),
        "pixel_representation": header.whole("PixelRepresentation", default=0),
        "planar_configuration": header.whole("PlanarConfiguration", default=0),
    }


def _stream(header: Header, frame: int) -> bytes:
    """Return the compressed stream of one frame."""
    from pydicom.encaps import get_frame

    dataset = header.dataset
    offsets = None
    if "ExtendedOffsetTable" in dataset and "ExtendedOffsetTableLengths" in dataset:
        offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    frames = header.whole("NumberOfFrames", default=1)
    return get_frame(dataset.PixelData, frame, number_of_frames=frames, extended_offsets=offsets)


class _Workers:
    """Processes that decode, one request at a time each; started when needed, and kept until `close`."""

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def decode(self, request: dict[str, int | str], stream: bytes) -> tuple[np.ndarray, str]:
        """Return the stored values, and how their colours are to be read.

        Raises
        ------
        ImageProblem
            If the decoder refuses the stream, dies of it or does not come to an end.
        """
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is None:
            process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("dicom_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        timer = threading.Timer(DECODING_TIMEOUT, process.kill)
        timer.start()
        try:
            answer, values = _exchange(process, request, stream)
        except (OSError, ValueError, EOFError):
            process.kill()
            _end(process)
            raise unreadable("its pixels can't be decoded (the decoder broke down): truncated or damaged") from None
        finally:
            timer.cancel()
        with self._lock:
            self._idle.append(process)
        if "error" in answer:
            raise unreadable(f"its pixels can't be decoded ({answer['error']}): truncated or damaged")
        return np.frombuffer(values, answer["dtype"]).reshape(answer["shape"]), str(answer["photometric"])

    def close(self) -> None:
        """End the processes that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            _end(process)


def _exchange(
    process: subprocess.Popen[bytes], request: dict[str, int | str], stream: bytes
) -> tuple[dict[str, Any], bytes]:
    assert process.stdin is not None and process.stdout is not None
    head = json.dumps({**request, "length": len(stream)}).encode()
    process.stdin.write(len(head).to_bytes(8) + head + stream)
    process.stdin.flush()
    answer = json.loads(_read(process, int.from_bytes(_read(process, 8))))
    return answer, _read(process, answer["length"])


def _read(process: subprocess.Popen[bytes], length: int) -> bytes:
    assert process.stdout is not None
    data = process.stdout.read(length)
    if len(data) < length:
        raise EOFError
    return data


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what it had not read
                pipe.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


_WORKERS = _Workers()
close_decoders = _WORKERS.close
"""Ends the processes that decode; the next file that needs one starts it anew."""
atexit.register(close_decoders)
