"""The audit: chain and signatures, every epsilon recomputed by three accountants, and comparison with what was promised.

From a site's own ledger (`audit_ledger`), or from the statements that came with a run's results (`audit_statements`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from chainward_shared.errors import LedgerError, StatementError
from chainward_shared.outside import Shown
from chainward_shared.privacy.accounting import Epsilons, epsilons
from chainward_shared.privacy.empirical import Empirical
from chainward_shared.privacy.entries import Entry, Head, MechanismRecord
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.privacy.policy import MetricsRelease, Terms
from chainward_shared.privacy.signing import fingerprint
from chainward_shared.privacy.statements import (
    TOLERANCE,
    Statement,
    check_order,
    check_statement,
    parse_statement,
)
from chainward_shared.settings import PrivacyUnit
from chainward_shared.words import listed

Severity = Literal["note", "violation", "damage"]
"""note: worth knowing, nothing is wrong. violation: over budget, or two things that must agree don't. damage: can't be
trusted or read at all."""

_TRIAL = "private training, tried here"
_EXIT_CODES: dict[Severity, int] = {"note": 0, "violation": 1, "damage": 2}


@dataclass(frozen=True)
class Finding(Shown):
    """Something that the audit noticed: how bad, what, and where (a site, a run, an entry, a file)."""

    severity: Severity
    what: str
    where: str


@dataclass(frozen=True)
class Spent(Shown):
    """What one run, or a site's lifetime, has spent.

    Attributes
    ----------
    run : id of the run; None: the lifetime
    epsilons : by the three accountants; None where there is no delta to compute them at
    budget : what the policy allows; None: no limit of its own, or no policy is known
    mechanisms : what was done, equal ones added up
    """

    run: str | None
    epsilons: Epsilons | None
    budget: float | None
    mechanisms: tuple[MechanismRecord, ...]

    @property
    def left(self) -> float | None:
        """What the budget still holds, never below 0; None without a budget."""
        if self.budget is None or self.epsilons is None:
            return None
        return max(0.0, self.budget - self.epsilons.enforced)


@dataclass(frozen=True)
class SiteAudit(Shown):
    """What the audit found of one site.

    Attributes
    ----------
    site : its id
    private : False: it trained without differential privacy, and nothing else is known
    unit, delta, metrics, required : of its policy; None where unknown
    key : fingerprint of its public key
    head : how far its ledger went
    lifetime, runs : what it has spent
    open : reservations without an end, which count in full; None where only the site knows
    seeded : whether noise came from a seed anywhere
    entries : of its ledger; empty where only statements are known
    """

    site: str
    private: bool
    unit: PrivacyUnit | None = None
    delta: float | None = None
    metrics: MetricsRelease | None = None
    key: str | None = None
    head: Head | None = None
    lifetime: Spent | None = None
    runs: tuple[Spent, ...] = ()
    open: int | None = None
    seeded: bool = False
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Audit(Shown):
    """The outcome of an audit.

    Attributes
    ----------
    kind : "ledger": of a site's own ledger; "run": of the statements of one run
    subject : the site, or the run
    sites : one for a ledger, all of a run's otherwise
    findings : the worst first
    time : when it was made, UTC
    empirical : how the private training here stood trial; None where it was not asked for
    """

    kind: Literal["ledger", "run"]
    subject: str
    sites: tuple[SiteAudit, ...]
    findings: tuple[Finding, ...]
    time: datetime = field(default_factory=lambda: datetime.now(UTC))
    empirical: Empirical | None = None

    @property
    def exit_code(self) -> int:
        """0: fine; 1: over budget or inconsistent; 2: damaged or unreadable."""
        return max((_EXIT_CODES[finding.severity] for finding in self.findings), default=0)

    @property
    def verdict(self) -> str:
        """The outcome in one word or a few."""
        return ("fine", "over budget or inconsistent", "damaged or unreadable")[self.exit_code]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values. An epsilon without bound is "inf", one that an accountant lacks is null."""
        return {
            "schema": 1,
            "kind": self.kind,
            "subject": self.subject,
            "time": self.time.isoformat(timespec="seconds"),
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "findings": [asdict(finding) for finding in self.findings],
            "sites": [_site_json(site) for site in self.sites],
            "empirical": self.empirical.to_json() if self.empirical else None,
        }

    def with_empirical(self, empirical: Empirical) -> Audit:
        """Return the audit with the trials of the private training, whose problems are violations."""
        found = [Finding("violation", problem, _TRIAL) for problem in empirical.problems]
        noted = [Finding("note", remark, _TRIAL) for remark in empirical.remarks]
        return replace(self, empirical=empirical, findings=_worst_first([*self.findings, *found, *noted]))


def audit_ledger(
    path: Path,
    key: Ed25519PublicKey,
    site: str,
    *,
    terms: Terms | None = None,
    told: Sequence[object] = (),
    remarks: Sequence[Finding] = (),
) -> Audit:
    """Audit a site's own ledger.

    Parameters
    ----------
    path : the ledger
    key : the site's public key
    site : its id
    terms : its policy; without one, epsilon is computed at the delta of each entry's time and compared with nothing
    told : statements as the coordinator holds them (parsed JSON); those of other sites are left out
    remarks : findings of whoever opened the files
    """
    findings = list(remarks)
    try:
        ledger = Ledger.open(path, key, site)
    except LedgerError as error:
        what = str(error).removeprefix(f"{path}: ")
        return _outcome("ledger", site, [], [*findings, Finding("damage", what, str(path))])
    findings += _entry_findings(ledger)
    unit, delta = _unit_and_delta(ledger, terms, findings)
    runs = list(dict.fromkeys(spending.reserved.run for spending in ledger.spendings()))
    budgets = {None: terms.epsilon if terms else None} | dict.fromkeys(runs, terms.epsilon_per_run if terms else None)
    spent = {run: _spent(ledger.site, run, ledger.records(run), budgets[run], delta, findings) for run in (None, *runs)}
    for content in told:
        findings += _told_findings(ledger, content)
    audited = SiteAudit(
        site=site,
        private=True,
        unit=unit,
        delta=delta,
        metrics=terms.metrics if terms else None,
        key=fingerprint(ledger.public_key),
        head=ledger.head,
        lifetime=spent[None],
        runs=tuple(spent[run] for run in runs),
        open=sum(spending.end is None for spending in ledger.spendings()),
        seeded=any(entry.seeded for entry in ledger.entries),
        entries=tuple(entry.shown() for entry in ledger.entries),
    )
    return _outcome("ledger", site, [audited], findings)


def audit_statements(
    run: str, contents: Sequence[object], sites: Sequence[str] = (), *, absent: Sequence[str] = ()
) -> Audit:
    """Audit the signed statements of a run, in the order in which they came.

    Parameters
    ----------
    run : id of the run
    contents : the statements, as parsed JSON
    sites : all sites of the run; one without a statement trained without privacy, which the audit notes
    absent : sites from which no model came, which the audit notes too
    """
    findings: list[Finding] = []
    by_site: dict[str, list[Statement]] = {}
    for number, content in enumerate(contents, 1):
        try:
            statement = parse_statement(content)
            check_statement(statement, run=run, recompute=False)
        except StatementError as error:
            findings.append(Finding("damage", str(error), f"statement {number}"))
            continue
        earlier = by_site.setdefault(statement.site, [])
        try:
            check_statement(statement, run=run)
            if earlier:
                check_order(earlier[-1], statement)
        except StatementError as error:
            findings.append(Finding("violation", str(error), f"site {statement.site}, statement {number}"))
        earlier.append(statement)
    audited = [_site_of_statements(statements, findings) for statements in by_site.values()]
    for site in sites:
        if site not in by_site:
            audited.append(SiteAudit(site=site, private=False))
            findings.append(
                Finding("note", "trained without differential privacy: nothing bounds what left it", f"site {site}")
            )
    findings += [Finding("note", "no model came from it in this run", f"site {site}") for site in absent]
    return _outcome("run", run, audited, findings)


def _site_of_statements(statements: Sequence[Statement], findings: list[Finding]) -> SiteAudit:
    last = statements[-1]
    where, terms = f"site {last.site}", last.terms
    if any(statement.seeded for statement in statements):
        findings.append(Finding("violation", "noise came from a seed: whoever knows it can take it off again", where))
    if any(statement.terms != terms for statement in statements):
        findings.append(Finding("note", "its policy changed during the run", where))
    return SiteAudit(
        site=last.site,
        private=True,
        unit=terms.unit,
        delta=terms.delta,
        metrics=terms.metrics,
        key=fingerprint(last.public_key),
        head=last.head,
        lifetime=_spent(last.site, None, last.of_lifetime, terms.epsilon, terms.delta, findings),
        runs=(_spent(last.site, last.run, last.of_run, terms.epsilon_per_run, terms.delta, findings),),
        seeded=any(statement.seeded for statement in statements),
    )


def _spent(
    site: str,
    run: str | None,
    records: Sequence[MechanismRecord],
    budget: float | None,
    delta: float | None,
    findings: list[Finding],
) -> Spent:
    where = f"site {site}, " + ("lifetime" if run is None else f"run {run}")
    if delta is None:
        return Spent(run, None, budget, tuple(records))
    found = epsilons([record.mechanism for record in records], delta)
    if found.problem is not None:
        findings.append(Finding("violation", f"the accountants contradict each other: {found.problem}", where))
    if not math.isfinite(found.enforced):
        findings.append(Finding("violation", "something was done without noise: no epsilon bounds it", where))
    elif budget is not None and found.enforced > budget:
        findings.append(Finding("violation", f"epsilon {found.enforced:.4f} is over the budget of {budget:g}", where))
    return Spent(run, found, budget, tuple(records))


def _entry_findings(ledger: Ledger) -> list[Finding]:
    found: list[Finding] = []
    before: Entry | None = None
    for entry in ledger.entries:
        where = f"site {ledger.site}, entry {entry.sequence}"
        if entry.seeded and entry.state == "reserved":
            found.append(Finding("violation", "noise came from a seed: whoever knows it can take it off again", where))
        if entry.note:
            found.append(Finding("note", entry.note, where))
        if before is not None and entry.time < before.time and "clock" not in entry.note:
            found.append(
                Finding("note", f"its time, {entry.time:%Y-%m-%d %H:%M:%S}, is before that of the entry before", where)
            )
        before = entry
    for spending in ledger.spendings():
        where = f"site {ledger.site}, entry {spending.reserved.sequence}"
        if spending.end is None:
            what = "reserved and never ended (it is running, or its process died): counts in full"
            found.append(Finding("note", what, where))
    if ledger.torn_bytes:
        what = f"{ledger.torn_bytes} bytes at the end are an entry that was cut while being written; nothing was trained on it"
        found.append(Finding("note", what, f"site {ledger.site}"))
    return found


def _unit_and_delta(
    ledger: Ledger, terms: Terms | None, findings: list[Finding]
) -> tuple[PrivacyUnit | None, float | None]:
    where = f"site {ledger.site}"
    reserved = [spending.reserved for spending in ledger.spendings()]
    units = {entry.unit for entry in reserved if entry.unit is not None}
    deltas = {entry.delta for entry in reserved if entry.delta is not None}
    if len(units | ({terms.unit} if terms else set())) > 1:
        named = listed(sorted(units))
        what = f"counted per {named}" + (f", while the policy protects one {terms.unit}" if terms else "")
        findings.append(Finding("violation", f"{what}: no epsilon holds for both", where))
    if terms is None:
        findings.append(Finding("note", "no policy was given: nothing to compare the spending with", where))
        # epsilon at the smallest delta bounds that at every other
        return (next(iter(units)) if len(units) == 1 else None), min(deltas, default=None)
    if other := sorted(deltas - {terms.delta}):
        named = ", ".join(f"{delta:g}" for delta in other)
        findings.append(
            Finding("note", f"spent under delta {named}, now {terms.delta:g}; all is recomputed at that", where)
        )
    return terms.unit, terms.delta


def _told_findings(ledger: Ledger, content: object) -> list[Finding]:
    try:
        statement = parse_statement(content)
    except StatementError as error:
        return [Finding("damage", str(error), "what the coordinator was told")]
    if statement.site != ledger.site:
        return []
    where = f"told about run {statement.run}, entry {statement.head.sequence}"
    try:
        check_statement(statement, public_key=ledger.public_key)
        ledger.require(statement.head)
    except (StatementError, LedgerError) as error:
        return [Finding("violation", str(error), where)]
    found: list[Finding] = []
    for what, run, stated in (
        ("the run", statement.run, statement.epsilon_run),
        ("the lifetime", None, statement.epsilon_lifetime),
    ):
        mechanisms = ledger.mechanisms(run, upto=statement.head.sequence)
        actual = epsilons(mechanisms, statement.terms.delta).enforced
        if not math.isclose(actual, stated, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            said = f"the coordinator was told epsilon {stated:.4f} for {what}; the ledger makes {actual:.4f}"
            found.append(Finding("violation", said, where))
    if statement.seeded != any(entry.seeded for entry in ledger.entries[: statement.head.sequence]):
        found.append(Finding("violation", "the coordinator was told otherwise whether noise came from a seed", where))
    return found


def _outcome(
    kind: Literal["ledger", "run"], subject: str, sites: Sequence[SiteAudit], findings: Sequence[Finding]
) -> Audit:
    return Audit(kind, subject, tuple(sites), _worst_first(findings))


def _worst_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda finding: -_EXIT_CODES[finding.severity]))


def _site_json(site: SiteAudit) -> dict[str, Any]:
    return {
        "site": site.site,
        "private": site.private,
        "unit": site.unit,
        "delta": site.delta,
        "metrics": site.metrics,
        "key": site.key,
        "head": site.head.model_dump() if site.head else None,
        "lifetime": _spent_json(site.lifetime) if site.lifetime else None,
        "runs": [_spent_json(run) for run in site.runs],
        "open": site.open,
        "seeded": site.seeded,
        "entries": [entry.model_dump(mode="json", by_alias=True) for entry in site.entries],
    }


def _spent_json(spent: Spent) -> dict[str, Any]:
    found = spent.epsilons
    return {
        "run": spent.run,
        "epsilon": _number(found.enforced) if found else None,
        "rdp": _number(found.rdp) if found else None,
        "prv": _number(found.prv) if found else None,
        "pld": _number(found.pld) if found else None,
        "budget": spent.budget,
        "left": _number(spent.left),
        "mechanisms": [record.model_dump() for record in spent.mechanisms],
    }


def _number(value: float | None) -> float | str | None:
    if value is None or math.isnan(value):
        return None
    return "inf" if math.isinf(value) else value
