"""Features of frozen trunks by image: each is computed once, whichever arm, seed, split or site asks for it."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from chainward_client.kept_files import Making
from chainward_client.training.features import BLOCK, ENDINGS, Compute, Features, number_type

_ID_BYTES = 32
LIMIT = 40_000_000_000
"""Bytes that one call may take."""


class ImageFeatures(Features):
    """Features in a study's folder, one row for each image and trunk.

    A seed changes which images are labelled and who gets which case, but neither the images nor a trunk.
    A trunk's rows are in ``DIGEST.f16`` or ``.f32``, the SHA-256 of their images in the same order in ``DIGEST.ids``; processes
    take turns.

    Parameters
    ----------
    folder : where they are kept; nothing is removed to make room, it is the study's
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, LIMIT)
        self.files = folder

    def _get(self, what: str, images: Tensor, shape: tuple[int, ...], kind: torch.dtype, compute: Compute) -> Tensor:
        ids = [hashlib.sha256(image.contiguous().numpy()).digest() for image in images]
        self.files.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.files / f"{hashlib.sha256(what.encode()).hexdigest()}{ENDINGS[kind]}"
        size = kind.itemsize * math.prod(shape[1:])
        with FileLock(f"{path}.lock", mode=0o600):
            known = _known(path.with_suffix(".ids"), path, size)
            missing = [row for row, one in enumerate(ids) if one not in known]
            missing = list({ids[row]: row for row in missing}.values())  # the same picture twice is computed once
            with Making("features", len(missing)) as making:
                for start in range(0, len(missing), BLOCK):
                    chosen = missing[start : start + BLOCK]
                    _append(path, compute(images[chosen]).to(kind).contiguous().numpy().tobytes(), size * len(known))
                    _append(path.with_suffix(".ids"), b"".join(ids[row] for row in chosen), _ID_BYTES * len(known))
                    known |= {ids[row]: len(known) + place for place, row in enumerate(chosen)}
                    making.done(start + len(chosen))
        rows = np.memmap(path, dtype=number_type(kind), mode="r", shape=(len(known), *shape[1:]))
        return torch.from_numpy(rows[[known[one] for one in ids]])


def _known(ids: Path, rows: Path, size: int) -> dict[bytes, int]:
    """Return the row of each image that has one, rows first written, ids after them: what an id names is whole."""
    if not ids.exists() or not rows.exists():
        return {}
    found = ids.read_bytes()
    count = min(len(found) // _ID_BYTES, rows.stat().st_size // size)
    return {found[_ID_BYTES * row : _ID_BYTES * (row + 1)]: row for row in range(count)}


def _append(path: Path, content: bytes, at: int) -> None:
    """Write at the end of what is whole; what an interruption left after that is written over."""
    path.touch(mode=0o600)
    with path.open("r+b") as file:
        file.truncate(at)
        file.seek(at)
        file.write(content)
