"""What the doctor found: one `Check` after the other, as a table, as JSON, and as an exit code."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from chainward_shared.console import PlainConsole
from chainward_shared.outside import Shown

Outcome = Literal["ok", "warning", "problem", "skipped"]

_STYLES: dict[Outcome, str] = {"ok": "green", "warning": "yellow", "problem": "red", "skipped": "dim"}


@dataclass(frozen=True)
class Check(Shown):
    """One thing that was looked at.

    Attributes
    ----------
    name : what was looked at
    outcome : "ok"; "warning": works, a person should know; "problem": the site can't take part so; "skipped"
    found : what was found, one line
    advice : what to do; empty where nothing is to be done
    items : all that was found, where `found` names only the first few; in JSON only
    """

    name: str
    outcome: Outcome
    found: str
    advice: str = ""
    items: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # causes come from files and from the network, and may hold line breaks
        for field in ("found", "advice"):
            object.__setattr__(self, field, " ".join(getattr(self, field).split()))
        super().__post_init__()


def ok(name: str, found: str) -> Check:
    """Return a check that found nothing wrong."""
    return Check(name, "ok", found)


def warning(name: str, found: str, advice: str = "") -> Check:
    """Return a check that found something to know."""
    return Check(name, "warning", found, advice)


def problem(name: str, found: str, advice: str) -> Check:
    """Return a check that found something with which the site can't take part."""
    return Check(name, "problem", found, advice)


def skipped(name: str, why: str, advice: str = "") -> Check:
    """Return a check that wasn't made."""
    return Check(name, "skipped", why, advice)


@dataclass(frozen=True)
class Diagnosis:
    """All checks of a site, or (`what`) of a data file, in the order in which they were made."""

    site: str
    checks: tuple[Check, ...]
    what: str = "site"

    def count(self, outcome: Outcome) -> int:
        """Return how many checks came out so."""
        return sum(check.outcome == outcome for check in self.checks)

    @property
    def exit_code(self) -> int:
        """0: fine, warnings allowed. 1: a problem."""
        return 1 if self.count("problem") else 0

    @property
    def summary(self) -> str:
        """One line: the verdict and the counts."""
        verdict = "not ready" if self.exit_code else "ready"
        words: dict[Outcome, str] = {"problem": "problems", "warning": "warnings", "skipped": "skipped", "ok": "ok"}
        counts = ", ".join(f"{self.count(outcome)} {word}" for outcome, word in words.items())
        return f"{self.what} {self.site}: {verdict} ({counts})"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        verdict = "problem" if self.exit_code else "fine"
        return {"site": self.site, "verdict": verdict, "checks": [asdict(check) for check in self.checks]}


def print_diagnosis(diagnosis: Diagnosis, console: PlainConsole) -> None:
    """Print a table of all checks, then the summary."""
    table = Table("check", "outcome", "found", "what to do")
    for check in diagnosis.checks:
        style = _STYLES[check.outcome]
        table.add_row(Text(check.name), Text(check.outcome, style=style), Text(check.found), Text(check.advice))
    console.print(table)
    style = "red" if diagnosis.exit_code else "green"
    console.say(diagnosis.summary, style=style)
