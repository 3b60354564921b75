"""What a privacy ledger holds: its entries, and the reservations that they make up."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from chainward_shared.bounds import Sha256
from chainward_shared.outside import MAX_LINE, Figure, Positive, Record, visible, visible_values
from chainward_shared.privacy.accounting import Mechanism, MechanismKind
from chainward_shared.settings import PrivacyUnit

SCHEMA = 1
State = Literal["created", "reserved", "committed", "released"]
NO_HASH = "0" * 64


class Head(Record):
    """How far a ledger goes: number of its last entry (1-based; 0: none yet) and that entry's hash."""

    sequence: int = Field(ge=0, le=10**12)
    hash: Sha256


class MechanismRecord(Record):
    """A `Mechanism`, and the norm to which what each unit adds was clipped (None: not clipped, a Laplace release)."""

    kind: MechanismKind
    noise_multiplier: Figure = Field(ge=0)
    sample_rate: float = Field(gt=0, le=1)
    steps: Positive
    clip_norm: Figure | None = Field(default=None, gt=0)

    @classmethod
    def of(cls, mechanism: Mechanism, clip_norm: float | None = None) -> MechanismRecord:
        """Return the record of a mechanism."""
        return cls(**asdict(mechanism), clip_norm=clip_norm)

    @property
    def mechanism(self) -> Mechanism:
        """What the accountants need of it."""
        return Mechanism(self.kind, self.noise_multiplier, self.sample_rate, self.steps)


class Entry(BaseModel):
    """One line of a ledger.

    Attributes
    ----------
    sequence : its number, from 1
    previous : hash of the entry before; zeros for the first
    time : UTC, ISO 8601
    state :
        "created": the first entry, which names the site's public key. "reserved": may be spent from now on, counts in
        full. "committed": of the reservation, `mechanism.steps` were done. "released": nothing of it was done
    run, phase, hop : what it was spent for; the hop is the key of the piece of work
    reservation : number of the entry that a commitment or release ends
    unit, delta : what the policy said at that time
    seeded : the noise came from a seed; for tests only, no protection
    versions : of the software that wrote the entry
    note : what was odd when it was written: the clock, a line that was cut
    hash : SHA-256 of the canonical JSON of all but hash and signature
    signature : Ed25519, over the hash, base64
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    sequence: int = Field(ge=1)
    previous: str
    time: datetime
    site: str
    state: State
    run: str = Field(default="", max_length=256)
    phase: str = Field(default="", max_length=256)
    hop: str = Field(default="", max_length=256)
    reservation: int | None = None
    mechanism: MechanismRecord | None = None
    unit: PrivacyUnit | None = None
    delta: float | None = Field(default=None, gt=0, lt=1)
    seeded: bool = False
    versions: dict[str, str] = Field(default_factory=dict)
    note: str = ""
    public_key: str | None = None
    hash: str = ""
    signature: str = ""

    @model_validator(mode="after")
    def _complete(self) -> Entry:
        if self.time.tzinfo is None:
            raise ValueError("the time has no time zone")
        if (self.state == "created") != (self.public_key is not None):
            raise ValueError("a public key belongs into the first entry and nowhere else")
        if self.state in ("reserved", "committed") and None in (self.mechanism, self.unit, self.delta):
            raise ValueError(f"'{self.state}' without mechanism, unit or delta")
        if (self.state in ("committed", "released")) != (self.reservation is not None):
            raise ValueError("a commitment or release names its reservation, and nothing else does")
        return self

    def shown(self) -> Entry:
        """Return the entry for people to read. The ledger's own keeps every character: its hash is over them."""
        texts = ("site", "run", "phase", "hop", "note", "previous", "hash", "signature", "public_key")
        shown = {
            name: None if getattr(self, name) is None else visible(getattr(self, name), MAX_LINE) for name in texts
        }
        return self.model_copy(update={**shown, "versions": visible_values(self.versions)})

    @property
    def head(self) -> Head:
        """The ledger's head while this is its last entry."""
        return Head(sequence=self.sequence, hash=self.hash)


@dataclass(frozen=True)
class Spending:
    """A reservation and how it ended.

    Attributes
    ----------
    reserved : the entry that opened it
    end : the entry that committed or released it; None while it is open, or if its process died
    """

    reserved: Entry
    end: Entry | None

    @property
    def counted(self) -> MechanismRecord | None:
        """What counts as spent: in full without an end, the committed steps, or None if it was released."""
        if self.end is None:
            return self.reserved.mechanism
        return self.end.mechanism if self.end.state == "committed" else None


def merged(records: Iterable[MechanismRecord]) -> tuple[MechanismRecord, ...]:
    """Return the same spending with the steps of equal mechanisms added up, in the order of their first."""
    steps: dict[MechanismRecord, int] = {}
    for record in records:
        kind = record.model_copy(update={"steps": 1})
        steps[kind] = steps.get(kind, 0) + record.steps
    return tuple(kind.model_copy(update={"steps": count}) for kind, count in steps.items())


@lru_cache(maxsize=1)
def software() -> dict[str, str]:
    """Return the versions of what decides whether the noise and its accounting are right."""
    packages = ("chainward", "torch", "opacus", "dp-accounting")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
