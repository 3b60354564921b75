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

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from chainward_shared.errors import LedgerError
from chainward_shared.privacy.accounting import Mechanism
from chainward_shared.privacy.entries import Entry, Head, MechanismRecord, Spending, State, merged
from chainward_shared.privacy.ledger_file import LedgerFile, count_text
from chainward_shared.settings import PrivacyUnit
from chainward_shared.words import first_problem


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


def now() -> datetime:
    """Return the time that entries say."""
    return datetime.now(UTC)


class Ledger(LedgerFile):
    """A site's ledger. Make it with `create` (once in a site's life), or `open` it.

    One object may be used by several threads, and one file by several processes: each change reads the file anew
    under the lock.
    """

    @classmethod
    def create(cls, path: Path, site: str, key: Ed25519PrivateKey) -> Ledger:
        """Start a ledger in which nothing is spent.

        Parameters
        ----------
        path : the ledger's file; head and lock go beside it
        site : the site's id
        key : the site's private key

        Raises
        ------
        LedgerError
            There is one already, or there was one and it is gone, or the folder can't be written.
        """
        ledger = cls(path, site, key)
        ledger._make_folder()
        with ledger._locked():
            if ledger.head_path.exists():
                ledger.reload()
                if ledger.entries:
                    raise LedgerError(f"{path}: there is a ledger already; a site keeps one for its lifetime")
            elif path.exists():
                raise LedgerError(
                    f"{path}: there is a ledger already, but {ledger.head_path.name} is missing; restore it"
                )
            else:
                ledger._write_head(ledger.counted)  # first: a ledger without a head is always one that lost it
            ledger._append(now(), state="created", public_key=ledger.public_key)
        return ledger

    @classmethod
    def open(cls, path: Path, key: Ed25519PrivateKey | Ed25519PublicKey, site: str) -> Ledger:
        """Read and verify a ledger; with the private key it can be written too. Opening changes nothing.

        Raises
        ------
        LedgerError
            It is missing, damaged, of another site, key or version, or shorter than its head says.
        """
        ledger = cls(path, site, key)
        ledger.reload()
        if not ledger.entries:
            raise LedgerError(f"{path}: its creation was interrupted; run `chainward-site keys` again")
        return ledger

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep all others out while something is decided on what is spent and then reserved. May be nested.

        Raises
        ------
        LedgerError
            Another process keeps the ledger for longer than the patience, or it is damaged, or can't be written.
        """
        if self.key is None:
            raise LedgerError(f"{self.path}: opened with the public key only; nothing can be reserved")
        with self._locked():
            self.reload()
            self._complete()
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
            if other := next((entry.unit for entry in self.entries if entry.unit not in (None, unit)), None):
                raise LedgerError(
                    f"the ledger of site '{self.site}' counts per {other}; it can't also count per {unit}"
                )
            entry = self._append(
                now(),
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
        entries = self.entries[:upto]
        ends = {entry.reservation: entry for entry in entries if entry.reservation is not None}
        return [Spending(entry, ends.get(entry.sequence)) for entry in entries if entry.state == "reserved"]

    def mechanisms(self, run: str | None = None, upto: int | None = None) -> list[Mechanism]:
        """Return what counts as spent, in the site's lifetime or in one run."""
        return [record.mechanism for record in self.records(run, upto)]

    def mechanisms_within(self, period: timedelta) -> list[Mechanism]:
        """Return what counts as spent of all that was reserved within the last `period`, or in what the clock calls future."""
        since = now() - period
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
        found = self.entries[head.sequence - 1].hash if 0 < head.sequence <= len(self.entries) else None
        if head.sequence and found != head.hash:
            raise LedgerError(
                f"{self.path}: {count_text(len(self.entries))}, but a signed statement shows that entry {head.sequence} "
                f"was {head.hash[:12]}; an older copy was put back. Restore the newest one"
            )

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
                now(),
                state=state,
                reservation=made.sequence,
                mechanism=record,
                **{name: getattr(made, name) for name in ("run", "phase", "hop", "unit", "delta", "seeded")},
            )

    def _named(self, reservation: Reservation) -> str:
        return f"reservation {reservation.entry.sequence} of site '{self.site}'"
