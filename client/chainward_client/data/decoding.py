"""The decoding of a table's rows into the files of a store, a block at a time; what was decoded before is taken over."""

from __future__ import annotations

import errno
import logging
import shutil
from pathlib import Path

import numpy as np

from chainward_client.data.decoded_rows import (
    IMAGES,
    MASKS,
    KeptRow,
    Row,
    RowWriter,
    kept_rows,
    read_row,
)
from chainward_client.data.dicom_headers import Facts
from chainward_client.data.formats.npz import NpzCases
from chainward_client.data.sources import Decoded, decoded_in_memory, leaves_out
from chainward_client.data.table import Table
from chainward_client.data.unusable import UnusableFile, UnusableFiles
from chainward_client.kept_files import Making, mapped
from chainward_shared.errors import DataError

logger = logging.getLogger("chainward.client")

LEFT_FREE = 10**9
"""Bytes of the disk that stay free; where the store would take them, images are decoded in memory."""

_BLOCK_BYTES, _BLOCK_ROWS = 64 * 2**20, 512


class NoRoom(Exception):
    """The disk is too full for the decoded images."""


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
        writer = RowWriter(self.folder, self._secret)
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
            writer.close(sync=True)
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
