"""Processes that decode compressed pixels, started when needed; dicom_worker.py is what they run.

Decoders of compressed pixels are C and Rust code that aborts on some damaged streams, and with it the process. They get the
stream and the numbers of its format, nothing else, so that what they say of an error can't quote a header.
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

DECODING_TIMEOUT = 120.0
"""Seconds after which a decoder that does not answer is ended."""


class DecodingError(Exception):
    """A decoder refuses a stream, or breaks down on it; in the decoder's own words."""


class _Workers:
    """Processes that decode, one request at a time each; started when needed, and kept until `close`."""

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def decode(self, request: dict[str, Any], stream: bytes) -> tuple[np.ndarray, str]:
        """Return the stored values, and how their colours are to be read.

        Raises
        ------
        DecodingError
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
            raise DecodingError("it broke down") from None
        finally:
            timer.cancel()
        with self._lock:
            self._idle.append(process)
        if "error" in answer:
            raise DecodingError(str(answer["error"]))
        return np.frombuffer(values, answer["dtype"]).reshape(answer["shape"]), str(answer["photometric"])

    def close(self) -> None:
        """End the processes that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            _end(process)


def _exchange(process: subprocess.Popen[bytes], request: dict[str, Any], stream: bytes) -> tuple[dict[str, Any], bytes]:
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
decode_in_process = _WORKERS.decode
close_decoders = _WORKERS.close
"""Ends the processes that decode; the next file that needs one starts it anew."""
atexit.register(close_decoders)
