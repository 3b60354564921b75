"""`chainward-site runs`, `approve`, `refuse` and `watch`: a person looks, and decides on the runs that ask to train here."""

from __future__ import annotations

import getpass
import json
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from chainward_client.approval.listing import Decision, ListedRun, listed_runs
from chainward_client.site_config import SiteConfig, load_site_config
from chainward_shared.console import PlainConsole
from chainward_shared.errors import ConfigError
from chainward_shared.local_page import LocalPage

if TYPE_CHECKING:
    from chainward_client.approval.record import Approvals, AskedRun

SHORT = 12
"""Digits of a plan's digest that a person sees and types."""

SiteYaml = Annotated[Path, typer.Argument(metavar="SITE_YAML", help="The site's site.yaml.")]
RunArgument = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="Id of the run. Default: the only one that waits.")
]
PlanOption = Annotated[
    str | None,
    typer.Option("--plan", help=f"First {SHORT} or more digits of the plan that was read: then nothing is asked."),
]
console = PlainConsole()


def approval_commands(app: typer.Typer) -> None:
    """Add the commands to the hospital's."""
    app.command("runs")(list_runs)
    app.command("approve")(approve)
    app.command("refuse")(refuse)
    app.command("watch")(watch)


def list_runs(
    site_yaml: SiteYaml, as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False
) -> None:
    """List the runs that have asked to train here, newest first, and how each stands (`runs: ask` in site.yaml)."""
    config, now = load_site_config(site_yaml), datetime.now(UTC)
    runs = listed_runs(config.state_dir(site_yaml))
    if as_json:
        typer.echo(json.dumps([_row(one, now) for one in runs], indent=1))
        return
    if config.runs != "ask":
        console.say("runs are not asked about here: site.yaml has no `runs: ask`")
    if not runs:
        console.say("no run has asked to train here")
        return
    headers = ("asked (UTC)", "state", "by", "until", "plan")
    table = Table(Column("run", no_wrap=True), *headers, box=None, padding=(0, 1, 0, 0))
    for one in runs:
        until = f"{one.expires:%Y-%m-%d %H:%M}" if one.expires else ""
        asked = f"{one.asked:%Y-%m-%d %H:%M}"
        table.add_row(*map(Text, (one.plan.run_id, asked, one.state(now), one.by, until, one.digest[:SHORT])))
    console.print(table)


def approve(
    site_yaml: SiteYaml,
    run: RunArgument = None,
    plan: PlanOption = None,
    days: Annotated[float, typer.Option(help="Days for which the approval holds.")] = 30.0,
) -> None:
    """Show what a run asks of this hospital, in words, and let it train here. Without a terminal --plan must be given."""
    _decide(site_yaml, run, plan, "approved", days)


def refuse(site_yaml: SiteYaml, run: RunArgument = None, plan: PlanOption = None) -> None:
    """Refuse a run, or take an approval back: nothing of it is trained here any more, and no answer of it leaves."""
    _decide(site_yaml, run, plan, "refused", 30.0)


def watch(
    site_yaml: SiteYaml,
    web: Annotated[bool, typer.Option("--web", help="Serve the page; its address is printed.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port on 127.0.0.1. 0: any free one.")] = 0,
) -> None:
    """Show what is asked of this hospital, by whom, what was sent and spent; --web: as a page with the approval's buttons."""
    if not web:
        list_runs(site_yaml)
        return
    from chainward_client.approval.web import SitePage  # loads PyTorch, which takes seconds

    page = SitePage(site_yaml)
    with LocalPage(f"Chainward · {page.config().site}", page.look, page.act, port=port) as served:
        console.say(f"page: {served.address}")
        console.say("only on this machine, and whoever has the address may decide: keep it to yourself. Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


def _decide(site_yaml: Path, run: str | None, plan: str | None, decision: Decision, days: float) -> None:
    from chainward_client.approval.record import Approvals  # loads PyTorch, which takes seconds

    config = load_site_config(site_yaml)
    approvals = Approvals(config.state_dir(site_yaml))
    one = _meant(approvals, run, plan, decision)
    show_plan(one, config, site_yaml, console)
    if plan is None:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"there is no terminal to ask on: read the plan above, then give --plan {one.plan.digest[:SHORT]}"
            )
        verb = "Approve" if decision == "approved" else "Refuse"
        if not typer.confirm(f"{verb} run {one.plan.run_id} with exactly this plan?", default=False, err=True):
            raise typer.Exit(1)
    decided = approvals.decide(one.plan.digest, decision, getpass.getuser(), days=days)
    until = f" until {decided.expires:%Y-%m-%d %H:%M} UTC" if decided.expires else ""
    console.say(f"run {one.plan.run_id}: {decision}{until}")


def show_plan(one: AskedRun, config: SiteConfig, site_yaml: Path, console: PlainConsole) -> None:
    """Print a plan in words."""
    from chainward_client.approval.words import plan_in_words  # loads PyTorch, which takes seconds

    for part in plan_in_words(one, config, site_yaml):
        console.print(Text(part.title, style="bold red" if part.warns else "bold"))
        for line in part.lines:
            console.say(Text(f"  {line}"))


def _meant(approvals: Approvals, run: str | None, plan: str | None, decision: Decision) -> AskedRun:
    """Return the plan that a person means.

    Raises
    ------
    ConfigError
        None or several may be meant.
    """
    if plan is not None and len(plan) < SHORT:
        raise ConfigError(f"--plan {plan}: expected at least {SHORT} digits of the plan's digest, as it was shown")
    if run is not None:
        return approvals.find(run, plan or "")
    now = approvals.now()
    waiting = [one for one in approvals.runs() if one.state(now) == "waiting" or decision == "refused"]
    waiting = [one for one in waiting if one.plan.digest.startswith(plan or "") and one.state(now) != "refused"]
    if len(waiting) != 1:
        found = ", ".join(dict.fromkeys(one.plan.run_id for one in waiting)) or "none"
        raise ConfigError(f"which run? {found} can be meant; `chainward-site runs` lists them, name one")
    return waiting[0]


def _row(one: ListedRun, now: datetime) -> dict[str, Any]:
    return {
        "run": one.plan.run_id,
        "asked_by": one.plan.asked_by,
        "asked": one.asked.isoformat(timespec="seconds"),
        "state": one.state(now),
        "by": one.by,
        "decided": one.decided and one.decided.isoformat(timespec="seconds"),
        "expires": one.expires and one.expires.isoformat(timespec="seconds"),
        "plan": one.digest,
        "links": len(one.links),
        "students": len(one.students),
    }
