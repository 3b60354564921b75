"""Decoded images in files, row by row: pixels, masks, and a journal that says of each row what it was made of."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import TypeAdapter

from chainward_client.data.dicom_headers import Facts
from chainward_client.data.formats.npz import NpzCases
from chainward_client.data.image_store import opened, stamp
from chainward_client.data.manifest import Manifest
from chainward_client.data.table import Table
from chainward_client.data.unusable import ImageProblem

IMAGES, MASKS, JOURNAL = "images.u8", "masks.u8", "rows.jsonl"

_FACTS: TypeAdapter[Facts | None] = TypeAdapter(Facts | None)


@dataclass(frozen=True)
class Row:
    """One decoded image.

    Attributes
    ----------
    key : digest of all that decides it, but a measured scale of grey
    image : uint8 (channels, size, size)
    mask : uint8 (size, size), or None
    facts : what is counted of a DICOM file
    """

    key: str
    image: np.ndarray
    mask: np.ndarray | None
    facts: Facts | None

    @property
    def digest(self) -> str:
        """Return the digest of the pixels."""
        found = hashlib.blake2b(np.ascontiguousarray(self.image).data, digest_size=16)
        if self.mask is not None:
            found.update(np.ascontiguousarray(self.mask).data)
        return found.hexdigest()


class RowWriter:
    """Writes rows to the files of a folder, in order; what it has written can be read again if its process is ended."""

    def __init__(self, folder: Path, key: bytes) -> None:
        self._key = key
        self._folder = folder
        self._images = (folder / IMAGES).open("wb")
        self._masks: BinaryIO | None = None
        self._journal = (folder / JOURNAL).open("wb")
        self.digests: list[str] = []

    def write(self, rows: Sequence[Row], scale: tuple[float, float] | None) -> None:
        """Write rows; `scale` of grey was measured before they were decoded, or not."""
        lines = []
        for row in rows:
            self._images.write(row.image.tobytes())
            if row.mask is not None:
                self._masks = self._masks or (self._folder / MASKS).open("wb")
                self._masks.write(row.mask.tobytes())
            self.digests.append(row.digest)
            lines.append([row.key, self.digests[-1], _FACTS.dump_python(row.facts, mode="json")])
        for file in (self._images, self._masks):
            if file is not None:
                file.flush()
        self._journal.write(signed({"rows": lines, "scale": scale}, self._key))
        self._journal.flush()

    def close(self, *, sync: bool) -> None:
        """Close the files; `sync`: once they are on the disk."""
        for file in (self._images, self._masks, self._journal):
            if file is not None:
                if sync:
                    os.fsync(file.fileno())
                file.close()


@dataclass(frozen=True)
class KeptRow:
    """Where a row is that was decoded before."""

    folder: Path
    position: int
    digest: str
    facts: Any = None
    scale: tuple[float, float] | None = None


def kept_rows(folder: Path, key: bytes) -> Iterator[tuple[str, KeptRow]]:
    """Yield the rows of a store, whole or not, by their keys; up to the first line of its journal that isn't the site's."""
    try:
        lines = (folder / JOURNAL).read_bytes().splitlines()
    except OSError:
        return
    position = 0
    for line in lines:
        content = verified(line, key)
        if content is None:
            return
        scale = None if content["scale"] is None else tuple(content["scale"])
        for of_row, digest, facts in content["rows"]:
            yield of_row, KeptRow(folder, position, digest, facts, scale)
            position += 1


def read_row(key: str, kept: KeptRow, shape: tuple[int, int, int], *, masks: bool) -> Row | None:
    """Return a row that was decoded before; None if it isn't what was written.

    Parameters
    ----------
    shape : channels, height and width
    masks : whether it has a mask
    """
    try:
        image = _part(kept.folder / IMAGES, kept.position, shape)
        mask = _part(kept.folder / MASKS, kept.position, shape[1:]) if masks else None
    except (OSError, ValueError):
        return None
    row = Row(key, image, mask, _FACTS.validate_python(kept.facts))
    return row if row.digest == kept.digest else None


def _part(path: Path, position: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.fromfile(path, np.uint8, count, offset=position * count).reshape(shape)


def signed(content: object, key: bytes) -> bytes:
    """Return content as one line, with a code under the site's secret."""
    body = json.dumps(content, separators=(",", ":")).encode()
    return hmac.digest(key, body, "sha256").hex().encode() + b" " + body + b"\n"


def verified(line: bytes, key: bytes) -> Any:
    """Return the content of a line that `signed` made; None of any other."""
    code, _, body = line.rstrip(b"\n").partition(b" ")
    return json.loads(body) if hmac.compare_digest(code, hmac.digest(key, body, "sha256").hex().encode()) else None


def row_keys(table: Table, rows: np.ndarray, settings: str) -> tuple[list[str | None], list[list[str]]]:
    """Return digests of all that decides `rows`, None where a file is not there, and by location the files that they are made of.

    Parameters
    ----------
    table : the checked table
    settings : what decides every row: how images are brought to their shape, versions
    """

    def key(*parts: object) -> str:
        return hashlib.blake2b(json.dumps([settings, *parts]).encode(), digest_size=16).hexdigest()

    used: list[list[str]] = [[] for _ in table.description.locations]
    if isinstance(table, NpzCases):
        path = table.description.images
        file = str(path), stamp(path)
        return [key(*file, str(table.splits[row]), int(table.positions[row])) for row in rows], used
    assert isinstance(table, Manifest)
    keys: list[str | None] = []
    with (
        opened(table.description.image_location, table.extensions) as images,
        opened(table.description.mask_location, table.extensions) as masks,
    ):
        for row in rows.tolist():
            try:
                member = table.member(images, row)
                used[0].append(member)
                parts: list[object] = [str(images.location), member, images.stamp(member)]
                if table.masks is not None and (name := table.masks[row]) is not None:
                    mask = masks.find(name)
                    used[-1].append(mask)
                    parts += [str(masks.location), mask, masks.stamp(mask)]
                elif table.masks is None and table.boxes is not None:
                    parts.append(table.boxes[row].tolist())
                keys.append(key(*parts))
            except (ImageProblem, OSError):
                keys.append(None)
    return keys, used
