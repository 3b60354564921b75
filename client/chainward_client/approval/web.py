"""The hospital's own page: what is asked, by whom, what was sent, what is left of the budget, and the buttons to decide."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment

from chainward_client.approval.record import DAYS, Approvals, AskedRun
from chainward_client.approval.words import Paragraph, plan_in_words
from chainward_client.journal import Entry, Journal
from chainward_client.site_config import SiteConfig, load_site_config
from chainward_client.site_ledger import ledger_path, open_site_ledger
from chainward_shared.errors import ConfigError, PrivacyError
from chainward_shared.local_page import Form, Look, environment
from chainward_shared.privacy.accounting import spent

SHOWN_LINES = 20
READ_LINES = 2_000
AT_WORK = timedelta(days=7)
"""What was begun longer ago and never answered is not shown as going on: its process was killed."""

_WHAT = {
    "link-task": "a link",
    "student-task": "a student",
    "evaluate-task": "scores",
    "statistics-task": "sums over embeddings",
    "base-task": "weights to start from",
}
_OUTCOME = {"begun": "at work", "sent": "sent", "refused": "refused", "waits": "waits for approval"}
_COLOUR = {"begun": "now", "sent": "done", "refused": "refused", "waits": "waiting"}


class SitePage:
    """What the page of one site shows, and what its buttons do.

    Parameters
    ----------
    site_yaml : of the site, read anew for every look
    """

    def __init__(self, site_yaml: Path) -> None:
        self.site_yaml = site_yaml
        self.config()
        self._words: dict[tuple[str, object], list[Paragraph]] = {}

    def config(self) -> SiteConfig:
        """Return the site's configuration as it is now."""
        return load_site_config(self.site_yaml)

    def look(self, form: str) -> Look:
        """Return the page as it is now; `form`: the secret that its forms send."""
        config = self.config()
        state = config.state_dir(self.site_yaml)
        approvals, journal = Approvals(state), Journal(state).last(READ_LINES)
        now = approvals.now()
        waiting: list[tuple[AskedRun, list[Paragraph]]] = []
        decided: list[tuple[AskedRun, str]] = []
        for run in approvals.runs():
            if config.runs == "ask" and run.state(now) == "waiting":
                waiting.append((run, self._in_words(run, config)))
            else:
                decided.append((run, run.state(now)))
        working = at_work(journal, now)
        return Look(
            _environment()
            .get_template("site.html.jinja")
            .render(
                config=config,
                form=form,
                waiting=waiting,
                decided=decided[:SHOWN_LINES],
                verdict=_verdict(len(waiting), working),
                working=working,
                lines=[one for one in journal if one.outcome != "begun"][:SHOWN_LINES],
                last=journal[0].time if journal else None,
                sent=sum(one.bytes for one in journal),
                answers=sum(one.outcome == "sent" for one in journal),
                since=journal[-1].time if journal else None,
                spent=spent_of(config, self.site_yaml),
                days=DAYS,
                what=_WHAT,
                outcome=_OUTCOME,
                colour=_COLOUR,
            )
        )

    def act(self, form: Form) -> None:
        """Do what a button says, on exactly the plan that was shown beside it.

        Raises
        ------
        ConfigError
            The form lacks something.
        """
        decision, plan = form.get("decision"), form.get("plan", "")
        if decision not in ("approved", "refused"):
            raise ConfigError("the form says neither approved nor refused; load the page again")
        if decision == "approved" and form.get("read") != "yes":
            raise ConfigError("tick that the plan was read, then approve; nothing was decided")
        state = self.config().state_dir(self.site_yaml)
        Approvals(state).decide(
            plan, "approved" if decision == "approved" else "refused", f"{getpass.getuser()} (page)"
        )

    def _in_words(self, run: AskedRun, config: SiteConfig) -> list[Paragraph]:
        """Return the words of a plan, computed anew when site.yaml or the ledger have changed: epsilons take a while."""
        ledger = ledger_path(config.state_dir(self.site_yaml))
        stamp = tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in (self.site_yaml, ledger))
        key = run.plan.digest, stamp
        if key not in self._words:
            if len(self._words) > 100:
                self._words.clear()
            self._words[key] = plan_in_words(run, config, self.site_yaml)
        return self._words[key]


def at_work(journal: list[Entry], now: datetime) -> Entry | None:
    """Return the work that was begun and not answered; `journal`: the newest first. None where there is none."""
    finished = set()
    for entry in journal:
        key = (entry.run, entry.kind, entry.hop)
        if entry.outcome != "begun":
            finished.add(key)
        elif key not in finished and now - entry.time < AT_WORK:
            return entry
    return None


def spent_of(config: SiteConfig, site_yaml: Path) -> float | str:
    """Return what is spent of a site's budget, or why that can't be said; 0 where it has no privacy policy."""
    if config.privacy is None:
        return 0.0
    try:
        ledger, _ = open_site_ledger(config.state_dir(site_yaml), config.site)
        return _spent(tuple(ledger.mechanisms()), config.privacy.delta)
    except PrivacyError as error:
        return str(error)


@lru_cache(maxsize=16)
def _spent(mechanisms: tuple, delta: float) -> float:  # type: ignore[type-arg]
    return spent(mechanisms, delta)


def _verdict(waiting: int, working: Entry | None) -> str:
    if waiting:
        return (
            "A run waits for a decision here." if waiting == 1 else f"{waiting} runs wait for a decision here."
        ) + " Nothing is trained before that."
    if working is not None:
        return f"At work on {_WHAT.get(working.kind, working.kind)} for run {working.run}."
    return "Nothing is being asked of this hospital right now."


def _ago(time: datetime) -> str:
    """How long ago, roughly."""
    seconds = max(0.0, (datetime.now(UTC) - time).total_seconds())
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def _size(count: int) -> str:
    """Bytes in the decimal unit that fits."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    made = environment("chainward_client.approval")
    made.filters.update(ago=_ago, size=_size)
    return made
