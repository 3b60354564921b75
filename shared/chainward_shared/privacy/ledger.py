"""A site's privacy ledger: what it has spent, appended before it is spent, hash-chained and signed.

Three files lie side by side: the ledger (JSON Lines, one entry a line), its head (how many entries there are and the
hash of the last; replaced at once) and a lock. An entry is appended in this order, each step synced to the disk before
the next: the line, the folder, the head. Only then does `Ledger.reserve` return, and only then may a noisy step start.

Therefore, whenever the power fails or the process is killed:

* An entry that the head counts is in the ledger. A ledger with fewer entries than its head says has lost some, or
  is an older copy put back: it is refused.
* At most one entry follows those that the head counts. It counts as spent, though nothing has been: its `reserve` never
  returned. It is synced and the head brought up to it before the next entry.
* A line that was cut while being written is behind all that the head counts, and is either without its newline or has
  zero bytes where the disk never wrote. Nothing was trained on it. It is reported, left out, and cut off before the
  next entry, which says so in its note. A lost end of a commitment or a release leaves the whole reservation spent.

Anything else that is not as it was written is refused with the number of the first bad entry, never repaired: spending
might be forgotten. When the ledger and its head are both replaced by an older pair, nothing on the site's disk can
show it; the heads in the statements that the coordinator holds can (`Ledger.require`).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from filelock import FileLock, Timeout
from pydantic import ValidationError

from chainward_shared.errors import LedgerError
from chainward_shared.files import sync_folder, write_all, write_atomically
from chainward_shared.privacy.accounting import Mechanism
from chainward_shared.privacy.entries import (
    NO_HASH,
    SCHEMA,
    Entry,
    Head,
    MechanismRecord,
    Spending,
    State,
    merged,
    software,
)
from chainward_shared.privacy.signing import canonical_json, fingerprint, is_signed, public_text, sign
from chainward_shared.settings import PrivacyUnit
from chainward_shared.words import first_problem

logger = logging.getLogger("chainward")

_ENTRY, _HEAD = "ledger entry", "ledger head"


@dataclass
class Reservation:
    """The right to do so many noisy steps, held by the process that reserved it or that resumed its checkpoint.

    Attributes
    ----------
    entry : the ledger's entry
    begun : whether a noisy step may have been done. `begin` says so; after a crash it is taken for granted
    """

    entry: Entry
    begun: bool = False
    process: int = field(default_factory=os.getpid)

    @property
    def mechanism(self) -> Mechanism:
        """What was reserved."""
        assert self.entry.mechanism is not None
        return self.entry.mechanism.mechanism

    def begin(self) -> None:
        """Say that the first noisy step starts now: from here on the reservation can't be released any more."""
        self.begun = True


class Ledger:
    """A site's ledger. Make it with `create` (once in a site's life), or `open` it.

    One object may be used by several threads, and one file by several processes: each change reads the file anew
    under the lock.
    """

    def __init__(
        self,
        path: Path,
        site: str,
        key: Ed25519PrivateKey | Ed25519PublicKey,
        *,
        patience: float = 60.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.path, self.site, self.public_key = path, site, public_text(key)
        self._key = key if isinstance(key, Ed25519PrivateKey) else None
        self._clock = clock
        self._lock = FileLock(str(path.with_name(f"{path.name}.lock")), timeout=patience)
        self._patience = patience
        self._entries: list[Entry] = []
        self._verified = b""
        self._counted = Head(sequence=0, hash=NO_HASH)
        self._torn = 0

    @classmethod
    def create(
        cls,
        path: Path,
        site: str,
        key: Ed25519PrivateKey,
        *,
        patience: float = 60.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> Ledger:
        """Start a ledger in which nothing is spent.

        Parameters
        ----------
        path : the ledger's file; head and lock go beside it
        site : the site's id
        key : the site's private key
        patience : seconds to wait for another process that holds the lock, default 60
        clock : tells the time

        Raises
        ------
        LedgerError
            There is one already, or there was one and it is gone, or the folder can't be written.
        """
        ledger = cls(path, site, key, patience=patience, clock=clock)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ledger._unwritable(error) from error
        with ledger._locked():
            if ledger._head_path.exists():
                ledger.reload()
                if ledger._entries:
                    raise LedgerError(f"{path}: there is a ledger already; a site keeps one for its lifetime")
            elif path.exists():
                raise LedgerError(
                    f"{path}: there is a ledger already, but {ledger._head_path.name} is missing; restore it"
                )
            else:
                ledger._write_head(ledger._counted)  # first: a ledger without a head is always one that lost it
            ledger._append(state="created", public_key=ledger.public_key)
        return ledger

    @classmethod
    def open(
        cls,
        path: Path,
        key: Ed25519PrivateKey | Ed25519PublicKey,
        site: str,
        *,
        patience: float = 60.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> Ledger:
        """Read and verify a ledger; with the private key it can be written too. Opening changes nothing.

        Raises
        ------
        LedgerError
            It is missing, damaged, of another site, key or version, or shorter than its head says.
        """
        ledger = cls(path, site, key, patience=patience, clock=clock)
        ledger.reload()
        if not ledger._entries:
            raise LedgerError(f"{path}: its creation was interrupted; run `chainward-site keys` again")
        return ledger

    @property
    def entries(self) -> Sequence[Entry]:
        """The entries as they were when the ledger was last read."""
        return tuple(self._entries)

    @property
    def head(self) -> Head:
        """Number and hash of the last entry."""
        return self._entries[-1].head if self._entries else Head(sequence=0, hash=NO_HASH)

    @property
    def torn_bytes(self) -> int:
        """Length of a line at the end that was cut while being written and doesn't count; 0 if there is none."""
        return self._torn

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep all others out while something is decided on what is spent and then reserved. May be nested.

        Raises
        ------
        LedgerError
            Another process keeps the ledger for longer than the patience, or it is damaged, or can't be written.
        """
        if self._key is None:
            raise LedgerError(f"{self.path}: opened with the public key only; nothing can be reserved")
        with self._locked():
            self.reload()
            if self._counted != self.head:  # a crash came between an entry and its head
                self._sync_file()  # or a power cut could take an entry that the head counts
                self._write_head(self.head)
            yield

    def reserve(
        self,
        mechanism: Mechanism,
        *,
        run: str,
        phase: str,
        hop: str,
        unit: PrivacyUnit,
        delta: float,
        clip_norm: float | None = None,
        seeded: bool = False,
    ) -> Reservation:
        """Note on disk that `mechanism` is about to be spent. No noisy step may start before this has returned.

        Whether the budget allows it is the policy's business: see `chainward_client.policy.reserve`.

        Raises
        ------
        LedgerError
            It can't be written: nothing may be trained. It may count as spent nevertheless.
        """
        try:
            record = MechanismRecord.of(mechanism, clip_norm)
        except ValidationError as error:
            raise LedgerError(f"{self.path}: can't reserve {mechanism}: {first_problem(error)}") from error
        with self.exclusive():
            if other := next((entry.unit for entry in self._entries if entry.unit not in (None, unit)), None):
                raise LedgerError(
                    f"the ledger of site '{self.site}' counts per {other}; it can't also count per {unit}"
                )
            entry = self._append(
                state="reserved",
                run=run,
                phase=phase,
                hop=hop,
                mechanism=record,
                unit=unit,
                delta=delta,
                seeded=seeded,
            )
        return Reservation(entry)

    def commit(self, reservation: Reservation, steps: int) -> Entry:
        """Note that `steps` of a reservation were done; the rest was not and is free again.

        Raises
        ------
        LedgerError
            More steps than were reserved; a reservation that was never begun, or has ended.
        """
        record = reservation.entry.mechanism
        assert record is not None
        if not reservation.begun:
            raise LedgerError(f"{self._named(reservation)} was never begun: nothing to commit; release it")
        if not 1 <= steps <= record.steps:
            raise LedgerError(f"{self._named(reservation)} is for {record.steps} steps; {steps} can't be committed")
        return self._end(reservation, "committed", record.model_copy(update={"steps": steps}))

    def release(self, reservation: Reservation) -> Entry:
        """Give back a reservation of which no noisy step was done.

        Only the process that made the reservation knows: it has not called `Reservation.begin`, which comes before the
        first noisy step. After a crash nobody knows, so that a reservation of a dead process stays spent.

        Raises
        ------
        LedgerError
            It was begun, was made by another process, or has ended.
        """
        if reservation.begun:
            raise LedgerError(f"{self._named(reservation)} was begun: noisy steps may have been done; commit it")
        if reservation.process != os.getpid():
            raise LedgerError(f"{self._named(reservation)} was made by another process, which may have begun it")
        return self._end(reservation, "released", None)

    def resume(self, run: str, phase: str, hop: str) -> Reservation | None:
        """Return the open reservation of a piece of work whose process died, to go on inside it; None if there is none.

        Only for a training that continues from its checkpoint: with what was done before the checkpoint it must not
        exceed the reserved steps. It counts as begun. The newest is returned where there are several.
        """
        self.reload()
        for spending in reversed(self.spendings()):
            entry = spending.reserved
            if spending.end is None and (entry.run, entry.phase, entry.hop) == (run, phase, hop):
                return Reservation(entry, begun=True)
        return None

    def spendings(self, upto: int | None = None) -> list[Spending]:
        """Return all reservations with their ends, in order, as the ledger stood after entry number `upto`."""
        entries = self._entries if upto is None else self._entries[:upto]
        ends = {entry.reservation: entry for entry in entries if entry.reservation is not None}
        return [Spending(entry, ends.get(entry.sequence)) for entry in entries if entry.state == "reserved"]

    def mechanisms(self, run: str | None = None, upto: int | None = None) -> list[Mechanism]:
        """Return what counts as spent, in the site's lifetime or in one run."""
        return [record.mechanism for record in self.records(run, upto)]

    def mechanisms_within(self, period: timedelta) -> list[Mechanism]:
        """Return what counts as spent of all that was reserved within the last `period`, or in what the clock calls future."""
        since = self._clock() - period
        spendings = [spending for spending in self.spendings() if spending.reserved.time > since]
        counted = merged(spending.counted for spending in spendings if spending.counted is not None)
        return [record.mechanism for record in counted]

    def records(self, run: str | None = None, upto: int | None = None) -> tuple[MechanismRecord, ...]:
        """Return what counts as spent, in the site's lifetime or in one run; equal mechanisms are added up."""
        spendings = [spending for spending in self.spendings(upto) if run in (None, spending.reserved.run)]
        return merged(spending.counted for spending in spendings if spending.counted is not None)

    def require(self, head: Head) -> None:
        """Check that the ledger holds an entry that somebody else has seen it hold.

        Raises
        ------
        LedgerError
            It doesn't: an older copy was put back, or another ledger.
        """
        self.reload()
        found = self._entries[head.sequence - 1].hash if 0 < head.sequence <= len(self._entries) else None
        if head.sequence and found != head.hash:
            raise LedgerError(
                f"{self.path}: {self._count(len(self._entries))}, but a signed statement shows that entry {head.sequence} "
                f"was {head.hash[:12]}; an older copy was put back. Restore the newest one"
            )

    # --- changing ---

    def _end(self, reservation: Reservation, state: State, record: MechanismRecord | None) -> Entry:
        with self.exclusive():
            mine = [one for one in self.spendings() if one.reserved.head == reservation.entry.head]
            if not mine:
                raise LedgerError(f"{self._named(reservation)} is not in this ledger")
            if mine[0].end is not None:
                raise LedgerError(
                    f"{self._named(reservation)} was {mine[0].end.state} already; its work must not be used again"
                )
            made = reservation.entry
            return self._append(
                state=state,
                run=made.run,
                phase=made.phase,
                hop=made.hop,
                reservation=made.sequence,
                mechanism=record,
                unit=made.unit,
                delta=made.delta,
                seeded=made.seeded,
            )

    def _append(self, **fields: object) -> Entry:
        """Write one entry; the lock is held and the file was just read."""
        assert self._key is not None
        now, notes = self._clock(), []
        if self._torn:
            notes.append(
                f"{self._torn} bytes of an entry that was cut while being written were removed before this one"
            )
        if self._entries and (back := (self._entries[-1].time - now).total_seconds()) > 0:
            notes.append(f"the clock went back by {back:.0f} s since the entry before")
        try:
            entry = Entry.model_validate(
                {
                    "sequence": self.head.sequence + 1,
                    "previous": self.head.hash,
                    "time": now,
                    "site": self.site,
                    "versions": software(),
                    "note": "; ".join(notes),
                    **fields,
                }
            )
        except ValidationError as error:
            raise LedgerError(f"{self.path}: no valid entry: {first_problem(error)}") from error
        content = entry.model_dump(mode="json", by_alias=True, exclude={"hash", "signature"})
        digest = hashlib.sha256(canonical_json(content)).hexdigest()
        signature = sign(self._key, _ENTRY, digest.encode())
        line = canonical_json({**content, "hash": digest, "signature": signature}) + b"\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                if self._torn:
                    os.ftruncate(descriptor, len(self._verified))
                    os.fsync(descriptor)
                write_all(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._unwritable(error) from error
        entry = entry.model_copy(update={"hash": digest, "signature": signature})
        self._write_head(entry.head)
        self._entries.append(entry)
        self._verified += line
        self._torn = 0
        return entry

    def _write_head(self, head: Head) -> None:
        assert self._key is not None
        content = {"schema": SCHEMA, "site": self.site, **head.model_dump()}
        signature = sign(self._key, _HEAD, canonical_json(content))
        try:
            write_atomically(self._head_path, canonical_json({**content, "signature": signature}) + b"\n", mode=0o600)
        except OSError as error:
            raise self._unwritable(error) from error
        self._counted = head

    def _sync_file(self) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unwritable(error) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise LedgerError(
                f"{self.path}: another process has held it for {self._patience:g} s; wait for it, or end it"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            self._lock.release()

    # --- reading ---

    @property
    def _head_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.head")

    def reload(self) -> None:
        """Read and verify ledger and head anew, whoever may be writing at the same time.

        Raises
        ------
        LedgerError
            As `open`.
        """
        while True:
            # The head first: the ledger, read later, then has at least what the head counts. If the head moved
            # meanwhile, the ledger may hold the beginning of a later entry.
            head_bytes, data = self._read(self._head_path), self._read(self.path, missing=b"")
            if head_bytes == self._read(self._head_path):
                break
        counted = self._parse_head(head_bytes)
        known = self._verified if data.startswith(self._verified) else b""
        entries = list(self._entries) if known else []
        verified, torn = len(known), 0
        for line in io.BytesIO(data[verified:]):
            number, left = len(entries) + 1, len(data) - verified
            if len(line) == left and number == counted.sequence + 1 and (not line.endswith(b"\n") or b"\0" in line):
                torn = left
                break
            entries.append(self._parse_entry(line, number, entries))
            verified += len(line)
        if len(entries) < counted.sequence:
            raise LedgerError(
                f"{self.path}: {self._count(len(entries))}, but its head counts {counted.sequence}: entries were removed at "
                "its end, or an older copy was put back. Restore the newest one"
            )
        if counted.sequence and entries[counted.sequence - 1].hash != counted.hash:
            raise LedgerError(
                f"{self.path}: entry {counted.sequence} is not the one that its head counts; restore the ledger and the "
                "head that belong together"
            )
        if len(entries) > counted.sequence + 1:
            raise LedgerError(
                f"{self._head_path}: it counts {counted.sequence} entries and the ledger holds {len(entries)}: an older "
                "head was put back. Restore the newest one"
            )
        last = self.head
        if last.sequence and (len(entries) < last.sequence or entries[last.sequence - 1].hash != last.hash):
            raise LedgerError(f"{self.path}: it was replaced while it was in use; restore the newest one")
        if torn and torn != self._torn:
            logger.warning(
                "%s: the last line (%d bytes) was cut while it was written and does not count; nothing was trained on it",
                self.path,
                torn,
            )
        self._entries, self._verified, self._counted, self._torn = entries, data[:verified], counted, torn

    def _parse_entry(self, line: bytes, number: int, before: list[Entry]) -> Entry:
        def bad(why: str) -> LedgerError:
            return LedgerError(
                f"{self.path}: entry {number} is damaged ({why}); restore the ledger from a copy that is whole"
            )

        try:
            raw = json.loads(line)
            if not isinstance(raw, dict) or canonical_json(raw) + b"\n" != line:
                raise bad("it is not written as a ledger writes")
        except (ValueError, RecursionError) as error:
            raise bad("it is not JSON") from error
        self._check_schema(raw, f"entry {number}")
        try:
            entry = Entry.model_validate(raw)
        except ValidationError as error:
            raise bad(first_problem(error)) from error
        content = {name: value for name, value in raw.items() if name not in ("hash", "signature")}
        if hashlib.sha256(canonical_json(content)).hexdigest() != entry.hash:
            raise bad("its content does not match its hash: it was edited")
        if entry.site != self.site:
            raise LedgerError(f"{self.path}: entry {number} is of site '{entry.site}', expected '{self.site}'")
        if entry.sequence != number:
            raise bad(f"it is numbered {entry.sequence}: entries were removed, added or reordered")
        if entry.previous != (before[-1].hash if before else NO_HASH):
            raise bad("it does not follow the entry before: entries were removed, added or edited")
        if not is_signed(self.public_key, _ENTRY, entry.hash.encode(), entry.signature):
            raise LedgerError(
                f"{self.path}: entry {number} is not signed with the key {fingerprint(self.public_key)}; "
                "use the key that the ledger was made with"
            )
        if problem := self._contradiction(entry, before):
            raise bad(problem)
        return entry

    def _contradiction(self, entry: Entry, before: list[Entry]) -> str | None:
        if (entry.state == "created") != (entry.sequence == 1):
            return "a ledger starts with one entry 'created', and has no other"
        if entry.public_key not in (None, self.public_key):
            return "it names another key than signed it"
        if entry.reservation is None:
            return None
        if not 1 <= entry.reservation < entry.sequence or before[entry.reservation - 1].state != "reserved":
            return f"entry {entry.reservation}, which it ends, is no reservation"
        if any(other.reservation == entry.reservation for other in before):
            return f"it ends reservation {entry.reservation} a second time"
        reserved = before[entry.reservation - 1].mechanism
        assert reserved is not None
        if entry.mechanism is not None and (
            entry.mechanism.steps > reserved.steps
            or entry.mechanism.model_copy(update={"steps": reserved.steps}) != reserved
        ):
            return f"it commits something else than entry {entry.reservation} reserved"
        return None

    def _parse_head(self, content: bytes) -> Head:
        def bad(why: str) -> LedgerError:
            return LedgerError(f"{self._head_path}: damaged ({why}); restore the ledger and its head from a whole copy")

        try:
            raw = json.loads(content)
            if not isinstance(raw, dict) or canonical_json(raw) + b"\n" != content:
                raise bad("it is not written as a ledger writes")
        except (ValueError, RecursionError) as error:
            raise bad("it is not JSON") from error
        self._check_schema(raw, "the head")
        signature = raw.pop("signature", None)
        if raw.get("site") != self.site:
            raise LedgerError(f"{self._head_path}: it is of site '{raw.get('site')}', expected '{self.site}'")
        if not is_signed(self.public_key, _HEAD, canonical_json(raw), str(signature)):
            raise bad(f"it is not signed with the key {fingerprint(self.public_key)}")
        return Head(sequence=raw["sequence"], hash=raw["hash"])

    def _check_schema(self, raw: dict[str, object], what: str) -> None:
        if (found := raw.get("schema")) != SCHEMA:
            newer = isinstance(found, int) and found > SCHEMA
            raise LedgerError(
                f"{self.path}: {what} is of schema {found!r}, expected {SCHEMA}; "
                + ("a newer Chainward wrote it: update this one" if newer else "restore the ledger from a whole copy")
            )

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

    def _unwritable(self, error: OSError) -> LedgerError:
        return LedgerError(
            f"{self.path}: the privacy ledger can't be written ({error.strerror}); nothing is trained. "
            "Free space or fix the folder's rights"
        )

    def _named(self, reservation: Reservation) -> str:
        return f"reservation {reservation.entry.sequence} of site '{self.site}'"

    @staticmethod
    def _count(entries: int) -> str:
        return f"it holds {entries} {'entry' if entries == 1 else 'entries'}"


def named_key_and_site(path: Path) -> tuple[str, str]:
    """Return the public key and the site that a ledger names in its first entry: what it says, not yet checked.

    Raises
    ------
    LedgerError
        The file can't be read, or its first line is no first entry.
    """
    try:
        with path.open("rb") as file:
            raw = json.loads(file.readline(1_000_000))
        public, site = raw["public_key"], raw["site"]
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    except OSError as error:
        raise LedgerError(f"{path}: can't be read ({error.strerror}); name a site.yaml or a ledger") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LedgerError(
            f"{path}: its first line is not the first entry of a ledger; name a site.yaml or a ledger"
        ) from error
    return public, str(site)
