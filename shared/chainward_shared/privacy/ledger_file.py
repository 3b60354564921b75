"""The three files of a ledger on the disk: read under nobody's lock, written under one, and never half."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from filelock import FileLock, Timeout
from pydantic import ValidationError

from chainward_shared.errors import LedgerError
from chainward_shared.files import sync, write_all, write_atomically
from chainward_shared.privacy.entries import NO_HASH, Entry, Head, software
from chainward_shared.privacy.ledger_format import LedgerFormat
from chainward_shared.words import first_problem

logger = logging.getLogger("chainward")

PATIENCE = 60.0
"""Seconds to wait for another process that holds the lock."""


class LedgerFile(LedgerFormat):
    """A ledger's lines, head and lock; what they mean is `ledger.Ledger`'s business.

    Parameters
    ----------
    path : the ledger's file; head and lock lie beside it
    site, key : whose; with the private key it can be written

    Attributes
    ----------
    entries : as they were when the ledger was last read
    torn_bytes : length of a line at the end that was cut while being written and doesn't count; 0 if there is none
    """

    def __init__(self, path: Path, site: str, key: Ed25519PrivateKey | Ed25519PublicKey) -> None:
        super().__init__(path, site, key)
        self.key = key if isinstance(key, Ed25519PrivateKey) else None
        self.entries: tuple[Entry, ...] = ()
        self.counted = Head(sequence=0, hash=NO_HASH)
        self.torn_bytes = 0
        self._verified = b""
        self._lock = FileLock(str(path.with_name(f"{path.name}.lock")), timeout=PATIENCE)

    @property
    def head(self) -> Head:
        """Number and hash of the last entry."""
        return self.entries[-1].head if self.entries else Head(sequence=0, hash=NO_HASH)

    def _make_folder(self) -> None:
        """Make the folder of the files."""
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from writing. May be nested.

        Raises
        ------
        LedgerError
            Another process holds the lock for longer than the patience, or it can't be taken.
        """
        with self._writing():
            try:
                self._lock.acquire()
            except Timeout as error:
                raise LedgerError(
                    f"{self.path}: another process has held it for {PATIENCE:g} s; wait for it, or end it"
                ) from error
        try:
            yield
        finally:
            self._lock.release()

    def reload(self) -> None:
        """Read and verify ledger and head anew, whoever may be writing at the same time.

        Raises
        ------
        LedgerError
            They are missing, damaged, of another site, key or version, or don't belong together.
        """
        while True:
            # The head first: the ledger, read later, then has at least what the head counts. If the head moved
            # meanwhile, the ledger may hold the beginning of a later entry.
            head_bytes, data = self._read(self.head_path), self._read(self.path, missing=b"")
            if head_bytes == self._read(self.head_path):
                break
        counted = self._parse_head(head_bytes)
        known = self._verified if data.startswith(self._verified) else b""
        entries = list(self.entries) if known else []
        verified, torn = len(known), 0
        for line in io.BytesIO(data[verified:]):
            number, left = len(entries) + 1, len(data) - verified
            if len(line) == left and number == counted.sequence + 1 and (not line.endswith(b"\n") or b"\0" in line):
                torn = left
                break
            entries.append(self._parse_entry(line, number, entries))
            verified += len(line)
        self._check(entries, counted)
        if torn and torn != self.torn_bytes:
            logger.warning(
                "%s: the last line (%d bytes) was cut while it was written and does not count; nothing was trained on it",
                self.path,
                torn,
            )
        self.entries, self._verified = tuple(entries), data[:verified]
        self.counted, self.torn_bytes = counted, torn

    def _check(self, entries: list[Entry], counted: Head) -> None:
        """Check that the entries are those that the head counts, and follow those that were read before."""
        if len(entries) < counted.sequence:
            raise LedgerError(
                f"{self.path}: {count_text(len(entries))}, but its head counts {counted.sequence}: entries were removed at "
                "its end, or an older copy was put back. Restore the newest one"
            )
        if counted.sequence and entries[counted.sequence - 1].hash != counted.hash:
            raise LedgerError(
                f"{self.path}: entry {counted.sequence} is not the one that its head counts; restore the ledger and the "
                "head that belong together"
            )
        if len(entries) > counted.sequence + 1:
            raise LedgerError(
                f"{self.head_path}: it counts {counted.sequence} entries and the ledger holds {len(entries)}: an older "
                "head was put back. Restore the newest one"
            )
        last = self.head
        if last.sequence and (len(entries) < last.sequence or entries[last.sequence - 1].hash != last.hash):
            raise LedgerError(f"{self.path}: it was replaced while it was in use; restore the newest one")

    def _complete(self) -> None:
        """Bring the head up to an entry that a crash came behind; the lock is held and the file was just read."""
        if self.counted == self.head:
            return
        with self._writing():
            sync(self.path)  # or a power cut could take an entry that the head counts
        self._write_head(self.head)

    def _append(self, now: datetime, **fields: object) -> Entry:
        """Write one entry; the lock is held and the file was just read.

        Raises
        ------
        LedgerError
            The entry is not valid, or the disk fails: it may be there nevertheless.
        """
        assert self.key is not None
        content = {
            "sequence": self.head.sequence + 1,
            "previous": self.head.hash,
            "time": now,
            "site": self.site,
            "versions": software(),
            "note": "; ".join(self._notes(now)),
            **fields,
        }
        try:
            unsigned = Entry.model_validate(content)
        except ValidationError as error:
            raise LedgerError(f"{self.path}: no valid entry: {first_problem(error)}") from error
        entry, line = self._line(unsigned, self.key)
        with self._writing():
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                if self.torn_bytes:
                    os.ftruncate(descriptor, len(self._verified))
                    os.fsync(descriptor)
                write_all(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync(self.path.parent)
        self._write_head(entry.head)
        self.entries += (entry,)
        self._verified += line
        self.torn_bytes = 0
        return entry

    def _write_head(self, head: Head) -> None:
        """Replace the head.

        Raises
        ------
        LedgerError
            The disk fails; the old head is there, or the new one.
        """
        assert self.key is not None
        with self._writing():
            write_atomically(self.head_path, self._head_bytes(head, self.key), mode=0o600)
        self.counted = head

    def _notes(self, now: datetime) -> list[str]:
        notes = []
        if self.torn_bytes:
            notes.append(
                f"{self.torn_bytes} bytes of an entry that was cut while being written were removed before this one"
            )
        if self.entries and (back := (self.entries[-1].time - now).total_seconds()) > 0:
            notes.append(f"the clock went back by {back:.0f} s since the entry before")
        return notes

    def _read(self, path: Path, missing: bytes | None = None) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            if missing is not None:
                return missing
            if self.path.exists():
                raise LedgerError(
                    f"{path}: missing; without it a shortened ledger can't be told. Restore it"
                ) from error
            raise LedgerError(f"{self.path}: there is no ledger; `chainward-site keys` makes a site's first") from error
        except OSError as error:
            raise LedgerError(f"{path}: can't be read ({error.strerror}); fix its rights") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LedgerError(
                f"{self.path}: the privacy ledger can't be written ({error.strerror}); nothing is trained. "
                "Free space or fix the folder's rights"
            ) from error


def count_text(entries: int) -> str:
    """Return how many entries a ledger holds, in words."""
    return f"it holds {entries} {'entry' if entries == 1 else 'entries'}"
