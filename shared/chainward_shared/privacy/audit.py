"""The audit: chain and signatures, every epsilon recomputed by three accountants, and comparison with what was promised.

From a site's own ledger (`audit_ledger`), or from the statements that came with a run's results (`audit_statements`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from chainward_shared.errors import LedgerError, StatementError
from chainward_shared.privacy.accounting import epsilons
from chainward_shared.privacy.entries import MechanismRecord
from chainward_shared.privacy.findings import Audit, Finding, SiteAudit, Spent, worst_first
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.privacy.policy import Terms
from chainward_shared.privacy.signing import fingerprint
from chainward_shared.privacy.statements import TOLERANCE, Statement, check_order, check_statement, parse_statement
from chainward_shared.settings import PrivacyUnit
from chainward_shared.words import listed


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
        return Audit("ledger", site, (), worst_first([*findings, Finding("damage", what, str(path))]))
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
    return Audit("ledger", site, (audited,), worst_first(findings))


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
    return Audit("run", run, tuple(audited), worst_first(findings))


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
    for before, entry in zip((None, *ledger.entries), ledger.entries, strict=False):
        where = f"site {ledger.site}, entry {entry.sequence}"
        if entry.seeded and entry.state == "reserved":
            found.append(Finding("violation", "noise came from a seed: whoever knows it can take it off again", where))
        if entry.note:
            found.append(Finding("note", entry.note, where))
        if before is not None and entry.time < before.time and "clock" not in entry.note:
            found.append(
                Finding("note", f"its time, {entry.time:%Y-%m-%d %H:%M:%S}, is before that of the entry before", where)
            )
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
