"""What the report says of privacy: a row for each hospital, and what is outside the guarantee, in words."""

from __future__ import annotations

from dataclasses import dataclass

from chainward_server.results import Results
from chainward_shared.privacy.record import PrivacyRecord, SiteFacts
from chainward_shared.words import listed

_RELEASES = {
    "withhold": "withheld",
    "noised": "with noise, charged",
    "exact": "as they are",
}


_MODES = {"dp-sgd": "private (DP-SGD)", "off": "without privacy", "no model": "no model came from it"}


@dataclass(frozen=True)
class PrivacyRow:
    """One hospital, and what privacy.json says of it."""

    site: str
    facts: SiteFacts

    @property
    def private(self) -> bool:
        """Whether it trained privately."""
        return self.facts.mode == "dp-sgd"

    @property
    def mode(self) -> str:
        """What it did, in words."""
        return _MODES[self.facts.mode]

    @property
    def scores(self) -> str | None:
        """What became of its scores, in words; None where it did not train privately."""
        return _RELEASES.get(str(self.facts.metrics)) if self.private else None


def privacy_rows(record: PrivacyRecord) -> list[PrivacyRow]:
    """Return a row for each hospital that privacy.json knows."""
    return [PrivacyRow(site, facts) for site, facts in record.sites.items()]


def outside_the_guarantee(rows: list[PrivacyRow], results: Results) -> list[str]:
    """Return what the guarantee does not cover in this run, a sentence each; empty where no hospital has one."""
    private = [row for row in rows if row.private]
    if not private:
        return []
    found = []
    if open_sites := [row.site for row in rows if row.facts.mode == "off"]:
        who = "this hospital" if len(open_sites) == 1 else "these hospitals"
        found.append(f"All that left {listed(open_sites)}: {who} trained without differential privacy.")
    if exact := [row.site for row in private if row.scores == _RELEASES["exact"]]:
        found.append(
            f"Scores, counts of cases and notes of {listed(exact)}: their policies let them leave as they are. Figures over "
            "few cases, and choices made on them (which strand, which link is refused), can betray single cases."
        )
    if declared := [row.site for row in private if row.scores != _RELEASES["exact"]]:
        found.append(
            f"The numbers of training cases that {listed(declared)} declared or rounded; they are taken as public."
        )
    if seeded := [row.site for row in private if row.facts.seeded]:
        found.append(f"Everything of {listed(seeded)}: noise came from a seed, which is for tests only.")
    if any(link.training and link.training.privacy for link in results.links):
        found.append("The time that trainings took, side channels, and software that a hospital did not install.")
    return found


def notes(results: Results) -> list[str]:
    """Return what hospitals switched off because their data are private, a line each."""
    lines: dict[str, list[str]] = {}
    for link in results.links:
        for note in link.training.notes if link.training else []:
            lines.setdefault(note, []).append(link.site)
    return [f"{listed(list(dict.fromkeys(sites)))}: {note}." for note, sites in lines.items()]
