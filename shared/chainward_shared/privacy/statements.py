"""What a site tells the coordinator about its spending: signed, and complete enough to be recomputed by whoever reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chainward_shared.errors import StatementError
from chainward_shared.outside import MAX_RECORDS, Base64, Figure, HopKey, RunId, SiteId
from chainward_shared.privacy.accounting import spent
from chainward_shared.privacy.entries import Head, MechanismRecord, merged
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.privacy.policy import Terms
from chainward_shared.privacy.signing import canonical_json, fingerprint, is_signed, public_text, sign
from chainward_shared.words import first_problem

_PURPOSE = "privacy statement"

TOLERANCE = 1e-3
"""Share by which a recomputed epsilon may differ: versions of the accountant round differently."""


class Statement(BaseModel):
    """What a site has spent in one run and in its lifetime, as its ledger stood at `head`.

    Attributes
    ----------
    site, run, hop : whose statement, about which run, sent with the result of which piece of work
    head : how far the ledger went
    of_run : what the run has spent; reserved and not yet committed counts in full
    of_lifetime : the same for all runs together, equal mechanisms added up; the run's are among them
    epsilon_run, epsilon_lifetime : enforced epsilon (PLD) of each at ``terms.delta``
    terms : the policy
    seeded : noise came from a seed: a test, without protection
    time : UTC, ISO 8601
    public_key : the site's, 32 bytes in hexadecimal
    signature : Ed25519 over all of the above, base64
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    site: SiteId
    run: RunId
    hop: HopKey
    head: Head
    of_run: tuple[MechanismRecord, ...] = Field(max_length=MAX_RECORDS)
    of_lifetime: tuple[MechanismRecord, ...] = Field(max_length=MAX_RECORDS)
    epsilon_run: Figure = Field(ge=0)
    epsilon_lifetime: Figure = Field(ge=0)
    terms: Terms
    seeded: bool
    time: datetime
    public_key: str = Field(pattern="^[0-9a-f]{64}$")
    signature: Base64 = ""

    @property
    def left(self) -> float:
        """What the lifetime's budget still holds; never below 0."""
        return max(0.0, self.terms.epsilon - self.epsilon_lifetime)

    @property
    def message(self) -> bytes:
        """The bytes that are signed."""
        return canonical_json(self.model_dump(mode="json", by_alias=True, exclude={"signature"}))

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True)


def sign_statement(ledger: Ledger, key: Ed25519PrivateKey, run: str, hop: str, terms: Terms) -> Statement:
    """Return the signed statement of a run as the ledger stands; made after the work's commitment, sent with its result.

    Raises
    ------
    StatementError
        The spending has no finite epsilon, the ledger counts in another unit, or the key is not the ledger's.
    """
    if public_text(key) != ledger.public_key:
        raise StatementError(
            f"the key {fingerprint(public_text(key))} is not that of the ledger of site '{ledger.site}'"
        )
    spendings = [spending for spending in ledger.spendings() if spending.counted is not None]
    if units := {spending.reserved.unit for spending in spendings} - {terms.unit}:
        raise StatementError(
            f"the ledger of site '{ledger.site}' counts per {units.pop()}, the policy per {terms.unit}; "
            "an epsilon of the one says nothing of the other"
        )
    of_run, of_lifetime = ledger.records(run), ledger.records()
    epsilon_run, epsilon_lifetime = (_epsilon(some, terms.delta) for some in (of_run, of_lifetime))
    if not math.isfinite(epsilon_lifetime):
        raise StatementError(
            f"what site '{ledger.site}' has spent has no finite epsilon: something was done without noise"
        )
    unsigned = Statement(
        site=ledger.site,
        run=run,
        hop=hop,
        head=ledger.head,
        of_run=of_run,
        of_lifetime=of_lifetime,
        epsilon_run=epsilon_run,
        epsilon_lifetime=epsilon_lifetime,
        terms=terms,
        seeded=any(spending.reserved.seeded for spending in spendings),
        time=datetime.now(UTC),
        public_key=ledger.public_key,
    )
    return unsigned.model_copy(update={"signature": sign(key, _PURPOSE, unsigned.message)})


def parse_statement(content: object) -> Statement:
    """Return the statement that values read from JSON hold.

    Raises
    ------
    StatementError
        It is none, or of a version that this one can't read.
    """
    schema = content.get("schema") if isinstance(content, Mapping) else None
    if isinstance(schema, int) and schema > 1:
        raise StatementError(
            f"a privacy statement of schema {schema}, expected 1; a newer Chainward wrote it: update this one"
        )
    try:
        return Statement.model_validate(content)
    except ValidationError as error:
        raise StatementError(f"not a privacy statement ({first_problem(error)})") from error


def check_statement(
    statement: Statement,
    *,
    site: str | None = None,
    run: str | None = None,
    hop: str | None = None,
    public_key: str | None = None,
    recompute: bool = True,
) -> None:
    """Check one statement for itself.

    Parameters
    ----------
    site, run, hop : whose and about what it must be; None: any
    public_key : the key the site is known by; None: whichever it names
    recompute : whether to recompute both epsilons (seconds for the first, then remembered)

    Raises
    ------
    StatementError
        It is of another site, run or key, its signature or its arithmetic is wrong.
    """
    who = f"the privacy statement of site '{statement.site}'"
    if site not in (None, statement.site):
        raise StatementError(f"{who} came from site '{site}'")
    if run not in (None, statement.run):
        raise StatementError(f"{who} is about run '{statement.run}', expected '{run}'")
    if hop not in (None, statement.hop):
        raise StatementError(f"{who} was made for '{statement.hop}', not for '{hop}': what '{hop}' cost is not in it")
    if public_key not in (None, statement.public_key):
        raise StatementError(
            f"{who} is signed with the key {fingerprint(statement.public_key)}, expected {fingerprint(str(public_key))}"
        )
    if not is_signed(statement.public_key, _PURPOSE, statement.message, statement.signature):
        raise StatementError(f"{who} does not match its signature: it was changed on its way")
    if missing := _missing(statement.of_run, statement.of_lifetime):
        raise StatementError(f"{who} lists {missing} steps for the run that its lifetime lacks")
    if not recompute:
        return
    for what, records, stated in (
        ("the run", statement.of_run, statement.epsilon_run),
        ("the lifetime", statement.of_lifetime, statement.epsilon_lifetime),
    ):
        found = _epsilon(records, statement.terms.delta)
        if not math.isclose(found, stated, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            raise StatementError(f"{who} says epsilon {stated:.4f} for {what}; what it lists makes {found:.4f}")


def check_order(earlier: Statement, later: Statement) -> None:
    """Check that a site's statement can come after an earlier one of the same ledger, of whichever run.

    Raises
    ------
    StatementError
        The ledger went back, forked, or changed its key.
    """
    who = f"the privacy statement of site '{later.site}'"
    if later.public_key != earlier.public_key:
        raise StatementError(
            f"{who} is signed with the key {fingerprint(later.public_key)}, an earlier one with "
            f"{fingerprint(earlier.public_key)}"
        )
    if later.head.sequence < earlier.head.sequence:
        raise StatementError(
            f"{who} shows a ledger of {later.head.sequence} entries; an earlier one showed {earlier.head.sequence}: "
            "an older copy of the ledger was put back"
        )
    if later.head.sequence == earlier.head.sequence and later.head.hash != earlier.head.hash:
        raise StatementError(
            f"{who} shows another entry {later.head.sequence} than an earlier one: the ledger was rewritten"
        )


class Statements:
    """The statements of a run that the coordinator has accepted, by site, in the order in which they came.

    Parameters
    ----------
    statements : those that were accepted before
    known : the newest of each site from earlier runs; the first of this run must be able to follow it
    """

    def __init__(self, statements: Iterable[Statement] = (), known: Mapping[str, Statement] | None = None) -> None:
        self._known = dict(known or {})
        self._by_site: dict[str, list[Statement]] = {}
        for statement in statements:
            self.add(statement)

    def add(self, statement: Statement) -> None:
        """Keep a statement that was accepted before."""
        self._by_site.setdefault(statement.site, []).append(statement)

    def known(self, site: str) -> Statement | None:
        """Return a site's newest statement from earlier runs."""
        return self._known.get(site)

    def accept(self, statement: Statement, *, site: str, run: str, hop: str) -> None:
        """Check what came with a site's result, and keep it.

        A statement that came before and comes again (a repeated request) is kept once.

        Raises
        ------
        StatementError
            As `check_statement` and `check_order`; the result that it came with must not be used.
        """
        if statement in self.of(site) and statement.hop == hop:
            return
        earlier = self.last(site) or self.known(site)
        check_statement(statement, site=site, run=run, hop=hop, public_key=earlier.public_key if earlier else None)
        if earlier:
            check_order(earlier, statement)
        self.add(statement)

    def of(self, site: str) -> Sequence[Statement]:
        """Return a site's statements, oldest first."""
        return tuple(self._by_site.get(site, ()))

    def last(self, site: str) -> Statement | None:
        """Return a site's newest statement."""
        return self.of(site)[-1] if self.of(site) else None

    @property
    def all(self) -> list[Statement]:
        """All statements, site by site."""
        return [statement for statements in self._by_site.values() for statement in statements]


def _missing(some: Sequence[MechanismRecord], among: Sequence[MechanismRecord]) -> int:
    """Return how many steps of `some` are not among the others."""
    have = {record.model_copy(update={"steps": 1}): record.steps for record in merged(among)}
    return sum(max(0, record.steps - have.get(record.model_copy(update={"steps": 1}), 0)) for record in merged(some))


def _epsilon(records: Iterable[MechanismRecord], delta: float) -> float:
    return spent([record.mechanism for record in records], delta)
