"""The audit on a terminal, and its page on disk."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from chainward_shared.console import PlainConsole
from chainward_shared.errors import PrivacyError
from chainward_shared.files import written
from chainward_shared.privacy.empirical import Empirical
from chainward_shared.privacy.findings import Audit
from chainward_shared.privacy.report import MISSING, epsilon_text, render_audit


def print_audit(audit: Audit, console: PlainConsole) -> None:
    """Print what was spent as a table, how the training stood trial, then the findings, then the outcome."""
    if audit.sites:
        console.print(_spending(audit))
    if audit.empirical is not None:
        console.print(_trials(audit.empirical))
    for finding in audit.findings:
        line = f"{finding.severity}: {finding.where}: {finding.what}"
        style = None if finding.severity == "note" else "red"
        console.say(line, style=style)
    for site in audit.sites:
        if site.key is not None:
            console.say(f"key of {site.site}: {site.key}")
    console.say(f"{audit.kind} {audit.subject}: {audit.verdict}")


def _spending(audit: Audit) -> Table:
    table = Table(
        *("spent by", "epsilon", "budget", "left", "PRV", "RDP", "delta"),
        caption="epsilon: PLD, enforced; together runs cost less than their sum",
        caption_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for site in audit.sites:
        unit = f", per {site.unit}" if site.unit else ""
        if site.lifetime is None:
            table.add_row(Text(f"{site.site}: no differential privacy"), *[MISSING] * 6, end_section=True)
            continue
        metrics = f", metrics {site.metrics}" if site.metrics else ""
        table.add_row(Text(f"{site.site}{unit}{metrics}", style="bold"), *[""] * 6)
        for spent in (*site.runs, site.lifetime):
            found = spent.epsilons
            table.add_row(
                Text("  lifetime" if spent.run is None else f"  run {spent.run}"),
                epsilon_text(spent.epsilon),
                MISSING if spent.budget is None else f"{spent.budget:g}",
                epsilon_text(spent.left),
                *(epsilon_text(value) for value in ((found.prv, found.rdp) if found else (None, None))),
                MISSING if site.delta is None else f"{site.delta:g}",
                style="red" if spent.over else "bold" if spent.run is None else None,
                end_section=spent.run is None,
            )
    return table


def _trials(tried: Empirical) -> Table:
    attack = tried.attack
    table = Table(
        *("training", "claimed", "right guesses", "at least", "checks of the step", "outcome"),
        title="private training, tried by attack",
        title_justify="left",
        caption=f"{tried.checks} checks; at {attack.confidence:.0%} confidence; all guesses right would show "
        f"{attack.ceiling:.2f}; attacked at {tried.source}",
        caption_justify="left",
    )
    for trial in tried.trials:
        attacked = trial.attack
        outcome = ("fails" if trial.caught else "passes") if trial.honest else "found out" if trial.caught else "MISSED"
        table.add_row(
            trial.name if trial.honest else f"{trial.name} (on purpose)",
            f"{attacked.claimed:.2f}" if attacked else MISSING,
            f"{attacked.correct} of {attacked.guesses}" if attacked else MISSING,
            f"{attacked.measured:.2f}" if attacked else MISSING,
            Text("all passed" if not trial.problems else f"{len(trial.problems)} failed: {trial.problems[0]}"),
            outcome,
            style="red" if trial.caught == trial.honest else None,
        )
    return table


def write_page(audit: Audit, path: Path) -> None:
    """Write the audit as an HTML page.

    Raises
    ------
    PrivacyError
        The file can't be written.
    """
    with written(path, PrivacyError, "name a file in a folder you may write to"):
        path.write_text(render_audit(audit), encoding="utf-8")
