"""The audit on a terminal, and its page on disk."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chainward_shared.errors import PrivacyError
from chainward_shared.privacy.audit import Audit
from chainward_shared.privacy.report import MISSING, epsilon_text, render_audit


def print_audit(audit: Audit, console: Console) -> None:
    """Print what was spent as a table, then the findings, then the outcome."""
    table = Table("site", "of", "epsilon (PLD)", "PRV", "RDP", "delta", "budget", "left", "metrics")
    for site in audit.sites:
        if site.lifetime is None:
            table.add_row(Text(site.site), "no differential privacy", *[MISSING] * 7)
            continue
        for spent in (*site.runs, site.lifetime):
            found = spent.epsilons
            table.add_row(
                Text(site.site),
                Text("lifetime" if spent.run is None else f"run {spent.run}"),
                *(epsilon_text(value) for value in ((found.pld, found.prv, found.rdp) if found else (None,) * 3)),
                MISSING if site.delta is None else f"{site.delta:g}",
                MISSING if spent.budget is None else f"{spent.budget:g}",
                epsilon_text(spent.left),
                site.metrics or MISSING,
            )
    if audit.sites:
        console.print(table)
    for finding in audit.findings:
        line = f"{finding.severity}: {finding.where}: {finding.what}"
        style = None if finding.severity == "note" else "red"
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    for site in audit.sites:
        if site.key is not None:
            console.print(f"key of {site.site}: {site.key}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{audit.kind} {audit.subject}: {audit.verdict}", markup=False, highlight=False, soft_wrap=True)


def write_page(audit: Audit, path: Path) -> None:
    """Write the audit as an HTML page.

    Raises
    ------
    PrivacyError
        The file can't be written.
    """
    try:
        path.write_text(render_audit(audit), encoding="utf-8")
    except OSError as error:
        raise PrivacyError(
            f"{path}: can't be written ({error.strerror}); name a file in a folder you may write to"
        ) from error
