"""Processes that decode compressed pixels, started when needed.

Decoders of compressed pixels are C and Rust code that aborts on some damaged streams, and with it the process. They get the
stream and the numbers of its format, nothing else, so that what they say of an error can't quote a header.

Such a process runs this file as a script: imports of the package would cost seconds, so there are none. Requests come on
standard input, answers go to standard output, both as `_send` writes them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import subprocess
import sys
import threading
import warnings
from typing import IO, Any

import numpy as np

DECODING_TIMEOUT = 120.0
"""Seconds after which a decoder that does not answer is ended."""

_IDLE: list[subprocess.Popen[bytes]] = []


class DecodingError(Exception):
    """A decoder refuses a stream, or breaks down on it; in the decoder's own words."""


def decode_here(request: dict[str, Any], stream: bytes) -> tuple[np.ndarray, str]:
    """Return the stored values of the stream of one frame, and how their colours are to be read.

    Parameters
    ----------
    request : "transfer_syntax", "plugin", and beside them what pydicom's decoders must know
    """
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    options = {"number_of_frames": 1, "pixel_keyword": "PixelData", **request}
    decoder, plugin = get_decoder(UID(options.pop("transfer_syntax"))), options.pop("plugin")
    values, found = decoder.as_array(encapsulate([stream]), index=0, decoding_plugin=plugin, **options)
    return values, str(found["photometric_interpretation"])


def decode_in_process(request: dict[str, Any], stream: bytes) -> tuple[np.ndarray, str]:
    """As `decode_here`, in a process of its own, which is kept for the next request until `close_decoders`.

    Raises
    ------
    DecodingError
        If the decoder refuses the stream, dies of it or does not come to an end.
    """
    try:
        process = _IDLE.pop()
    except IndexError:
        process = subprocess.Popen(
            [sys.executable, "-I", __file__],
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
        raise DecodingError("it broke down") from None
    finally:
        timer.cancel()
    _IDLE.append(process)
    if "error" in answer:
        raise DecodingError(str(answer["error"]))
    return np.frombuffer(values, answer["dtype"]).reshape(answer["shape"]), str(answer["photometric"])


@atexit.register
def close_decoders() -> None:
    """End the processes that are idle; the next file that needs one starts it anew."""
    with contextlib.suppress(IndexError):
        while True:
            _end(_IDLE.pop())


def _exchange(process: subprocess.Popen[bytes], request: dict[str, Any], stream: bytes) -> tuple[dict[str, Any], bytes]:
    assert process.stdin is not None and process.stdout is not None
    _send(process.stdin, request, stream)
    return _received(process.stdout)


def _send(file: IO[bytes], head: dict[str, Any], data: bytes) -> None:
    """Write the length of a JSON object (8 bytes, big-endian), the object, and as many bytes as its "length" says."""
    text = json.dumps({**head, "length": len(data)}).encode()
    file.write(len(text).to_bytes(8) + text + data)
    file.flush()


def _received(file: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    head = json.loads(_read(file, int.from_bytes(_read(file, 8))))
    return head, _read(file, head.pop("length"))


def _read(file: IO[bytes], length: int) -> bytes:
    data = file.read(length)
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


def _answer(request: dict[str, Any], stream: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        values, photometric = decode_here(request, stream)
        return {"dtype": values.dtype.str, "shape": values.shape, "photometric": photometric}, values.tobytes()
    except BaseException as error:  # Rust code panics with what is no Exception
        return {"error": f"{type(error).__name__}: {error}"}, b""


def main() -> None:
    """Answer requests until there are no more."""
    warnings.simplefilter("ignore")
    logging.disable()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints is no answer
    with contextlib.suppress(EOFError):
        while True:
            _send(answers, *_answer(*_received(requests)))


if __name__ == "__main__":
    main()
