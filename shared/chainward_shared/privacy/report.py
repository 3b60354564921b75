"""The audit as one HTML page that an ethics committee can read: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from chainward_shared.privacy.audit import Audit, SiteAudit, Spent
from chainward_shared.privacy.entries import MechanismRecord

MISSING = "–"


@dataclass(frozen=True)
class Outside:
    """Something that the guarantee does not cover, and why."""

    what: str
    why: str


def render_audit(audit: Audit) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("chainward_shared.privacy", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(epsilon=epsilon_text, mechanism=mechanism_text, count=count_text, odds=odds_text)
    private = [site for site in audit.sites if site.private]
    return environment.get_template("audit.html.jinja").render(
        audit=audit,
        private=private,
        others=[site.site for site in audit.sites if not site.private],
        units=sorted({site.unit for site in private if site.unit}),
        outside=outside(audit),
        verdict=verdict(audit),
        bars={site.site: bar(site) for site in private},
        ledger=audit.kind == "ledger",
    )


def verdict(audit: Audit) -> str:
    """Return the outcome in one or two sentences."""
    if audit.exit_code == 2:
        return "The record of what was spent can't be trusted or read. Nothing below may be relied on until it is restored."
    if audit.exit_code == 1:
        return "Something is over budget, or two things that must agree do not. The guarantee does not hold as it was promised."
    private = [site for site in audit.sites if site.private]
    if not private:
        return "No hospital trained with differential privacy: nothing bounds what the models reveal about a patient."
    if audit.kind == "ledger":
        site = private[0]
        if site.lifetime is None or site.lifetime.budget is None:
            return "The record is complete and its signatures are right. No policy was given to compare it with."
        return (
            f"{site.site} kept within its budget: epsilon {epsilon_text(_enforced(site.lifetime))} of "
            f"{site.lifetime.budget:g} spent in its lifetime, {epsilon_text(site.lifetime.left)} left."
        )
    of_all = "The hospital" if len(private) == 1 else f"All {len(private)} hospitals"
    return f"{of_all} that trained privately kept within {'its' if len(private) == 1 else 'their'} budget, as signed."


def outside(audit: Audit) -> list[Outside]:
    """Return what the guarantee does not cover: first what is particular to this audit, then what always holds."""
    found: list[Outside] = []
    if others := [site.site for site in audit.sites if not site.private]:
        found.append(
            Outside(f"Everything of {', '.join(others)}", "Trained without differential privacy; no bound holds there.")
        )
    if exact := [site.site for site in audit.sites if site.metrics == "exact"]:
        found.append(
            Outside(
                f"Scores and counts of {', '.join(exact)}", "Its policy lets them leave as they are (metrics: exact)."
            )
        )
    if images := [site.site for site in audit.sites if site.unit == "image"]:
        found.append(
            Outside(
                f"A patient with several images at {', '.join(images)}",
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
    if lifetime is None or lifetime.budget is None or lifetime.epsilons is None:
        return None
    return min(100.0, 100 * lifetime.epsilons.enforced / lifetime.budget)


def epsilon_text(value: float | None) -> str:
    """Return an epsilon with three decimals, a dash where there is none, "unbounded" where nothing bounds it."""
    if value is None or math.isnan(value):
        return MISSING
    return "unbounded" if math.isinf(value) else f"{value:.3f}"


def odds_text(value: float | None) -> str:
    """Return what an epsilon means: how many times more likely a patient's presence can make any outcome."""
    if value is None or not math.isfinite(value):
        return MISSING
    factor = math.exp(min(value, 700))
    if factor < 10:
        return f"{factor:.1f}×"
    return f"{factor:,.0f}×".replace(",", "\u202f") if factor < 1e6 else "over a million×"


def mechanism_text(record: MechanismRecord) -> str:
    """Return a mechanism in words."""
    if record.kind == "laplace":
        releases = "release" if record.steps == 1 else "releases"
        return f"{count_text(record.steps)} {releases} of scores, Laplace noise of scale {record.noise_multiplier:g}"
    clip = "" if record.clip_norm is None else f", clipped to {record.clip_norm:g}"
    return (
        f"{count_text(record.steps)} steps of DP-SGD, noise multiplier {record.noise_multiplier:g}, "
        f"sample rate {record.sample_rate:g}{clip}"
    )


def count_text(value: int) -> str:
    """Return a whole number with a thin space between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def _enforced(spent: Spent) -> float | None:
    return spent.epsilons.enforced if spent.epsilons else None
