"""The audit as one HTML page that an ethics committee can read: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

from chainward_shared.local_page.page import environment
from chainward_shared.privacy.entries import MechanismRecord
from chainward_shared.privacy.findings import Audit, SiteAudit
from chainward_shared.words import listed

MISSING = "–"


@dataclass(frozen=True)
class Outside:
    """Something that the guarantee does not cover, and why."""

    what: str
    why: str


def render_audit(audit: Audit) -> str:
    """Return the page."""
    templates = environment("chainward_shared.privacy")
    templates.filters.update(epsilon=epsilon_text, mechanism=mechanism_text, count=count_text, surest=surest_text)
    private = [site for site in audit.sites if site.private]
    return templates.get_template("audit.html.jinja").render(
        audit=audit,
        private=private,
        others=[site.site for site in audit.sites if not site.private],
        units=sorted({site.unit for site in private if site.unit}),
        outside=outside(audit),
        verdict=verdict(audit),
        bars={site.site: bar(site) for site in private},
        ledger=audit.kind == "ledger",
        over_in_a_run={site.site for site in private if any(run.over for run in site.runs)},
    )


def verdict(audit: Audit) -> str:
    """Return the outcome in one or two sentences."""
    if audit.exit_code == 2:
        return (
            "The record of what was spent can't be trusted or read: it was damaged or changed after it was signed. No figure "
            "of it may be relied on, and nothing should be trained, until it is restored from a copy that is whole."
        )
    if audit.exit_code == 1:
        first = next(finding for finding in audit.findings if finding.severity == "violation")
        return f"The guarantee does not hold as it was promised: {first.what} ({first.where})."
    private = [site for site in audit.sites if site.private]
    if not private:
        return "No hospital trained with differential privacy: nothing bounds what the models reveal about a patient."
    if audit.kind == "ledger":
        site = private[0]
        if site.lifetime is None or site.lifetime.budget is None:
            spent = epsilon_text(site.lifetime.epsilon if site.lifetime else None)
            return (
                f"The record is complete and its signatures are right: epsilon {spent} spent in the site's lifetime. No policy "
                "was given to compare it with."
            )
        return (
            f"{site.site} kept within its budget: epsilon {epsilon_text(site.lifetime.epsilon)} of "
            f"{site.lifetime.budget:g} spent in its lifetime, {epsilon_text(site.lifetime.left)} left."
        )
    of_all = {1: "The one hospital", 2: "Both hospitals"}.get(len(private), f"All {len(private)} hospitals")
    kept = f"{of_all} that trained privately kept within {'its' if len(private) == 1 else 'their'} budget, as signed."
    if others := [site.site for site in audit.sites if not site.private]:
        kept += f" Nothing bounds what left {listed(others)}, which trained without privacy."
    return kept


def outside(audit: Audit) -> list[Outside]:
    """Return what the guarantee does not cover: first what is particular to this audit, then what always holds."""
    found: list[Outside] = []
    if others := [site.site for site in audit.sites if not site.private]:
        found.append(
            Outside(f"Everything of {listed(others)}", "Trained without differential privacy; no bound holds there.")
        )
    if exact := [site.site for site in audit.sites if site.metrics == "exact"]:
        found.append(
            Outside(f"Scores and counts of {listed(exact)}", "Its policy lets them leave as they are (metrics: exact).")
        )
    if images := [site.site for site in audit.sites if site.unit == "image"]:
        found.append(
            Outside(
                f"A patient with several images at {listed(images)}",
                "There one image is protected. For a patient with k images epsilon is about k times as large, and delta "
                "grows with it.",
            )
        )
    if any(site.seeded for site in audit.sites):
        found.append(Outside("Whatever used seeded noise", "It is a test: who knows the seed can remove the noise."))
    return [
        *found,
        Outside(
            "What medicine learns from all patients together",
            "That a finding goes with a disease can be learnt with or without any one patient, and is meant to be.",
        ),
        Outside(
            "Decisions made outside of the program",
            "Settings chosen by a person who looked at private scores and did not count those looks.",
        ),
        Outside(
            "A hospital's own computers and staff",
            "The guarantee is about what leaves the hospital. It assumes that the software there is the one that was reviewed.",
        ),
        Outside(
            "Side channels",
            "How long a computation took, and attacks on the rounding of the noise in floating-point numbers.",
        ),
    ]


def bar(site: SiteAudit) -> float | None:
    """Return the share of the lifetime's budget that is spent, in percent, at most 100; None without a budget."""
    lifetime = site.lifetime
    if lifetime is None or lifetime.budget is None or lifetime.epsilon is None:
        return None
    return min(100.0, 100 * lifetime.epsilon / lifetime.budget)


def epsilon_text(value: float | None) -> str:
    """Return an epsilon with three decimals, a dash where there is none, "unbounded" where nothing bounds it."""
    if value is None or math.isnan(value):
        return MISSING
    return "unbounded" if math.isinf(value) else f"{value:.3f}"


def surest_text(value: float | None) -> str:
    """Return what an epsilon means: how sure, in percent, an even guess whether a patient took part can become at most.

    By Bayes' rule an even guess becomes at most ``e^epsilon / (1 + e^epsilon)``.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    percent = 100 / (1 + math.exp(-value))
    if percent < 99:
        return f"{percent:.0f} %"
    return "over 99.99 %" if percent > 99.99 else f"{percent:.2f} %"


def mechanism_text(record: MechanismRecord) -> str:
    """Return a mechanism in words."""
    releases = f"{count_text(record.steps)} {'release' if record.steps == 1 else 'releases'}"
    if record.kind == "laplace":
        noise = record.noise_multiplier
        return f"{releases} of scores " + (
            f"with Laplace noise, epsilon {1 / noise:g} each" if noise else "without noise"
        )
    if record.kind == "gaussian":
        return f"{releases} of sums over embeddings with noise: noise multiplier {record.noise_multiplier:g}"
    clip = "" if record.clip_norm is None else f", clipped to {record.clip_norm:g}"
    return (
        f"{count_text(record.steps)} steps of training with noise (DP-SGD): noise multiplier {record.noise_multiplier:g}, "
        f"sample rate {record.sample_rate:g}{clip}"
    )


def count_text(value: int) -> str:
    """Return a whole number with a thin space between thousands."""
    return f"{value:,}".replace(",", "\u202f")
