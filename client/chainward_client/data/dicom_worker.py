"""A process that decodes compressed pixels, so that a decoder that dies of a damaged stream takes nothing else with it.

A script, started by dicom_workers.py: imports of the package would cost seconds. Requests come on standard input, answers go to
standard output: the length of a JSON object (8 bytes, big-endian), the object, and as many bytes as its "length" says.
"""

import json
import logging
import sys
import warnings
from typing import Any

import numpy as np


def decoded(request: dict[str, Any], stream: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the answer to a request, and the stored values of its stream."""
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    decoder = get_decoder(UID(request.pop("transfer_syntax")))
    plugin = request.pop("plugin")
    options = {key: value for key, value in request.items() if key != "length"}
    options |= {"number_of_frames": 1, "pixel_keyword": "PixelData"}
    try:
        values, properties = decoder.as_array(encapsulate([stream]), index=0, decoding_plugin=plugin, **options)
        values = np.ascontiguousarray(values)
        data = values.tobytes()
    except BaseException as error:  # Rust code panics with what is no Exception
        return {"error": f"{type(error).__name__}: {error}", "length": 0}, b""
    answer = {
        "dtype": values.dtype.str,
        "shape": values.shape,
        "photometric": str(properties["photometric_interpretation"]),
        "length": len(data),
    }
    return answer, data


def main() -> None:
    """Answer requests until there are no more."""
    warnings.simplefilter("ignore")
    logging.disable()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints is no answer
    while length := requests.read(8):
        request = json.loads(requests.read(int.from_bytes(length)))
        answer, data = decoded(request, requests.read(request["length"]))
        head = json.dumps(answer).encode()
        answers.write(len(head).to_bytes(8) + head + data)
        answers.flush()


if __name__ == "__main__":
    main()
