"""The decoding of a table's rows into the files of a store, a block at a time; what was decoded before is taken over.

The files are pixels, masks, and a journal that says of each row what it was made of.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from chainward_client.data.dicom_headers import Facts
from chainward_client.data.formats.npz import NpzCases
from chainward_client.data.image_store import opened, stamp
from chainward_client.data.manifest import Manifest
from chainward_client.data.sources import Decoded, decoded_in_memory, leaves_out
from chainward_client.data.table import Table
from chainward_client.data.unusable import ImageProblem, UnusableFile, UnusableFiles
from chainward_client.kept_files import Making, mapped
from chainward_shared.errors import DataError

logger = logging.getLogger("chainward.client")

IMAGES, MASKS, JOURNAL = "images.u8", "masks.u8", "rows.jsonl"

LEFT_FREE = 10**9
"""Bytes of the disk that stay free; where the store would take them, images are decoded in memory."""

_BLOCK_BYTES, _BLOCK_ROWS = 64 * 2**20, 512
_FACTS: TypeAdapter[Facts | None] = TypeAdapter(Facts | None)


class NoRoom(Exception):
    """The disk is too full for the decoded images."""


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
    """Writes rows to the files of a folder, in order; what it has written can be read again if its process is ended.

    Parameters
    ----------
    folder : an empty one
    key : the site's secret
    masks : whether rows have masks
    """

    def __init__(self, folder: Path, key: bytes, *, masks: bool) -> None:
        self._key = key
        names = (IMAGES, MASKS, JOURNAL) if masks else (IMAGES, JOURNAL)
        self._files = {name: (folder / name).open("wb") for name in names}
        self.digests: list[str] = []

    def write(self, rows: Sequence[Row], scale: tuple[float, float] | None) -> None:
        """Write rows; `scale` of grey was measured before they were decoded, or not."""
        lines = []
        for row in rows:
            self._files[IMAGES].write(row.image.tobytes())
            if row.mask is not None:
                self._files[MASKS].write(row.mask.tobytes())
            self.digests.append(row.digest)
            lines.append([row.key, self.digests[-1], _FACTS.dump_python(row.facts, mode="json")])
        for file in self._files.values():
            file.flush()
        self._files[JOURNAL].write(signed({"rows": lines, "scale": scale}, self._key))  # of what is there
        self._files[JOURNAL].flush()

    def close(self) -> None:
        """Close the files once they are on the disk."""
        for file in self._files.values():
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
    position = count()
    for line in lines:
        content = verified(line, key)
        if content is None:
            return
        scale = None if content["scale"] is None else tuple(content["scale"])
        for of_row, digest, facts in content["rows"]:
            yield of_row, KeptRow(folder, next(position), digest, facts, scale)


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
    size = int(np.prod(shape))
    return np.fromfile(path, np.uint8, size, offset=position * size).reshape(shape)


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


class Decoding:
    """Decodes the rows of a table into the files of a folder, a block at a time."""

    def __init__(self, folder: Path, secret: bytes, table: Table, rows: np.ndarray, keys: list[str | None]) -> None:
        image = table.description.image
        self.shape = (image.channels, image.size, image.size)
        self.folder, self.table, self.rows, self.keys = folder, table, rows, keys
        self.digests: list[str] = []
        self._secret = secret
        self._masks = table.masks is not None or table.boxes is not None
        self._unusable: list[set[int]] = [set(), set()]
        self._earlier = self._kept_before()

    def _kept_before(self) -> dict[str, KeptRow]:
        """Return the rows that were decoded before, into the folders beside this one, and still hold; by key."""
        wanted = set(self.keys)
        found: dict[str, KeptRow] = {}
        for other in sorted(path for path in self.folder.parent.iterdir() if path.is_dir() and not path.is_symlink()):
            found.update((key, row) for key, row in kept_rows(other, self._secret) if key in wanted)
        if any(row.scale is not None for row in found.values()):
            scale = self.table.scale()
            found = {key: row for key, row in found.items() if row.scale in (None, (scale.low, scale.high))}
            if not len(scale.values):  # nothing here has more than 8 bits
                self.table.scale.forget()
        return found

    def run(self) -> Decoded:
        """Return the cases, their pixels mapped from the files.

        Raises
        ------
        NoRoom
            The disk is too full.
        DataError
            An image can't be used.
        """
        row_bytes = self.shape[1] * self.shape[2] * (self.shape[0] + self._masks)
        self.folder.mkdir()
        _require_room(self.folder, row_bytes * len(self.rows))
        new = len(self.rows) - sum(key in self._earlier for key in self.keys)
        logger.info("%d of %d images are decoded and kept in %s", new, len(self.rows), self.folder.parent)
        step = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // row_bytes))
        if isinstance(self.table, NpzCases):  # its arrays can only be read whole
            step = len(self.rows)
        writer = RowWriter(self.folder, self._secret, masks=self._masks)
        kept: list[int] = []
        facts: list[Facts] = []
        try:
            with Making("images", len(self.rows)) as making:
                for start in range(0, len(self.rows), step):
                    block = self._block(start, min(start + step, len(self.rows)))
                    scale = self.table.scale.measured
                    writer.write(list(block.values()), None if scale is None else (scale.low, scale.high))
                    kept += block
                    facts += [row.facts for row in block.values() if row.facts is not None]
                    making.done(min(start + step, len(self.rows)))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        finally:
            writer.close()
        self.digests = writer.digests
        return self._cases(np.array(kept, dtype=np.int64), facts)

    def _block(self, start: int, end: int) -> dict[int, Row]:
        """Return the rows from a place up to another by their places, without those that can't be used."""
        found: dict[int, Row] = {}
        for place in range(start, end):
            key = self.keys[place]
            if key is not None and (kept := self._earlier.get(key)) is not None:
                row = read_row(key, kept, self.shape, masks=self._masks)
                if row is not None:
                    found[place] = row
        places = np.array([place for place in range(start, end) if place not in found], dtype=np.int64)
        while len(places):
            try:
                cases, facts = self.table.cases_with_facts(self.rows[places])
            except UnusableFiles as error:
                bad = [file.position for file in error.files]
                self._unusable[error.what == "mask"].update(places[bad].tolist())
                places = np.delete(places, bad)
                continue
            masks = cases.privileged.masks
            for index, place in enumerate(places.tolist()):
                mask = None if masks is None else masks[index].numpy()
                of_file = facts[index] if facts else None
                found[place] = Row(self.keys[place] or "", cases.images[index].numpy(), mask, of_file)
            break
        return {place: found[place] for place in sorted(found)}

    def _cases(self, kept: np.ndarray, facts: list[Facts]) -> Decoded:
        left_out: tuple[UnusableFile, ...] = ()
        for places in self._unusable:
            if places:
                left_out += self._why(self.rows[sorted(places)])
        if not len(kept):
            return decoded_in_memory(self.table, self.rows)  # says that none can be used
        shape = (len(kept), *self.shape)
        masks = mapped(self.folder / MASKS, np.uint8, (shape[0], *shape[2:])) if self._masks else None
        rows = self.rows[kept]
        cases = self.table.with_labels(rows, mapped(self.folder / IMAGES, np.uint8, shape), masks)
        return (cases, self.table.notes_on(facts, cases.patients)), rows, left_out

    def _why(self, rows: np.ndarray) -> tuple[UnusableFile, ...]:
        """Return why the files of rows can't be used, all together; where that is a reason to refuse the data, raise it."""
        try:
            self.table.cases_with_facts(rows)
        except UnusableFiles as error:
            if leaves_out(self.table):
                return error.files
            raise
        raise DataError(f"{self.table.description.locations[0].name}: files change while they are read; try again")


def _require_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free - wanted < LEFT_FREE:
        folder.rmdir()
        raise NoRoom(
            f"{folder.parent}: {free / 1e9:.1f} GB free; the decoded images would take {wanted / 1e9:.1f} GB, and "
            f"{LEFT_FREE / 1e9:.1f} GB stay free. Free space, or set `state` in site.yaml to a larger disk"
        )
