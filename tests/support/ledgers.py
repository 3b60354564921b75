"""A site's ledger for tests: its key, and work that is spent on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chainward_shared.privacy.accounting import Mechanism
from chainward_shared.privacy.ledger import Ledger, Reservation
from chainward_shared.privacy.policy import Terms
from chainward_shared.privacy.statements import Statement, sign_statement

KEY, OTHER_KEY = (Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)) for number in (1, 2))
WORK: dict[str, Any] = {"run": "r", "phase": "chain", "hop": "h", "unit": "patient", "delta": 1e-5}


def new_ledger(folder: Path, site: str = "oak", **more: Any) -> Ledger:
    """Return a ledger in which nothing is spent."""
    return Ledger.create(folder / "ledger.jsonl", site, KEY, **more)


def gaussian(steps: int, noise: float = 20.0) -> Mechanism:
    """Return steps that everybody takes part in: the accountant is quick on them."""
    return Mechanism("dp-sgd", noise, 1.0, steps)


def statement_of_spending(folder: Path, run: str) -> Statement:
    """Return what site "ash" signs of `run` when it has spent 20 steps of an epsilon of 4."""
    ledger = new_ledger(folder, "ash")
    spend(ledger, gaussian(20), 20, run=run)
    return sign_statement(ledger, KEY, run, "h", Terms(epsilon=4.0, delta=1e-5))


def spend(ledger: Ledger, mechanism: Mechanism, done: int | None = None, **work: Any) -> Reservation:
    """Reserve, begin and, if `done` is given, commit."""
    reservation = ledger.reserve(mechanism, **{**WORK, **work})
    reservation.begin()
    if done is not None:
        ledger.commit(reservation, done)
    return reservation
