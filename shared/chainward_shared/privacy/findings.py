"""What an audit found: findings, what sites have spent, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from chainward_shared.outside import Shown
from chainward_shared.privacy.accounting import Epsilons
from chainward_shared.privacy.empirical import Empirical
from chainward_shared.privacy.entries import Entry, Head, MechanismRecord
from chainward_shared.privacy.policy import MetricsRelease
from chainward_shared.settings import PrivacyUnit

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
    def epsilon(self) -> float | None:
        """The epsilon that counts; None where there is no delta."""
        return self.epsilons.enforced if self.epsilons else None

    @property
    def left(self) -> float | None:
        """What the budget still holds, never below 0; None without a budget."""
        return None if self.budget is None or self.epsilon is None else max(0.0, self.budget - self.epsilon)

    @property
    def over(self) -> bool:
        """Whether more was spent than the budget allows."""
        return self.budget is not None and self.epsilon is not None and self.epsilon > self.budget


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
        return replace(self, empirical=empirical, findings=worst_first([*self.findings, *found, *noted]))


def worst_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return the findings by their severity, those of the same in their order."""
    return tuple(sorted(findings, key=lambda finding: -_EXIT_CODES[finding.severity]))


def _site_json(site: SiteAudit) -> dict[str, Any]:
    return vars(site) | {
        "head": site.head.model_dump() if site.head else None,
        "lifetime": _spent_json(site.lifetime) if site.lifetime else None,
        "runs": [_spent_json(run) for run in site.runs],
        "entries": [entry.model_dump(mode="json", by_alias=True) for entry in site.entries],
    }


def _spent_json(spent: Spent) -> dict[str, Any]:
    return {
        "run": spent.run,
        "epsilon": _number(spent.epsilon),
        **{name: _number(getattr(spent.epsilons, name, None)) for name in ("rdp", "prv", "pld")},
        "budget": spent.budget,
        "left": _number(spent.left),
        "mechanisms": [record.model_dump() for record in spent.mechanisms],
    }


def _number(value: float | None) -> float | str | None:
    if value is None or math.isnan(value):
        return None
    return "inf" if math.isinf(value) else value
