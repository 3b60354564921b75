"""The coordinator's command, `chainward`. Progress and errors go to stderr; 0: fine, 2: bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import click
import typer
from flwr.common.config import parse_config_args
from rich.console import Console
from rich.table import Table

from chainward_server.report.from_folder import write_report
from chainward_server.run_folder import RunFolder
from chainward_shared.config import ConfigScalar, OutputConfig, RunConfig
from chainward_shared.config_docs import configuration_markdown, flower_app_config
from chainward_shared.errors import ChainwardError, ConfigError, RunFolderError, nearest
from chainward_shared.privacy.audit import audit_statements
from chainward_shared.privacy.console import print_audit, write_page
from chainward_shared.privacy.statements import read_privacy_record

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()
errors = Console(stderr=True)

RunsDir = Annotated[Path, typer.Option("--dir", help="Folder of the run folders.")]
DEFAULT_DIR = Path(OutputConfig().dir).expanduser()


def main() -> None:
    """Run the command; an error that a person can act on is one line and exit code 2."""
    try:
        app()
    except ChainwardError as error:
        errors.print(f"chainward: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


@app.command()
def runs(
    directory: RunsDir = DEFAULT_DIR,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """List the runs, newest first: status, phase, figures of the models that came out."""
    rows = [_summary(path.parent) for path in sorted(directory.expanduser().glob("*/run.json"), reverse=True)]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        console.print(f"no runs in {directory}", markup=False)
        return
    table = Table("run", "status", "phase", "chain", "student", "reason")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    console.print(table)
    console.print("chain, student: balanced accuracy on the pooled test images")


def _summary(path: Path) -> dict[str, str | None]:
    try:
        folder = RunFolder.open(path)
        results = folder.load_results()
    except RunFolderError as error:
        return {
            "run": path.name,
            "status": "damaged",
            "phase": None,
            "chain": None,
            "student": None,
            "reason": str(error),
        }
    scores = {name: final.pooled.balanced_accuracy for name, final in (results.final if results else {}).items()}
    figures = {name: None if (value := scores.get(name)) is None else f"{value:.3f}" for name in ("chain", "student")}
    state = folder.state
    return {"run": state.run_id, "status": state.status, "phase": state.phase, **figures, "reason": state.reason}


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Id of a run, or path of its folder.")],
    directory: RunsDir = DEFAULT_DIR,
) -> None:
    """Render report.html of a run anew and print where it is."""
    typer.echo(write_report(open_run(run, directory)))


def open_run(run: str, directory: Path) -> RunFolder:
    """Return the run folder of a run's id or path.

    Raises
    ------
    RunFolderError
        There is none, or a file of it is damaged.
    """
    base = directory.expanduser()
    path = base / run
    if not (path / "run.json").is_file():
        known = [found.parent.name for found in base.glob("*/run.json")]
        raise RunFolderError(
            f"run {run!r}: no run.json in {path}{nearest(run, known)}; `chainward runs` lists the runs"
        )
    return RunFolder.open(path)


@app.command()
def audit(
    run: Annotated[str, typer.Argument(help="Id of a run, or path of its folder.")],
    directory: RunsDir = DEFAULT_DIR,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report for an ethics committee there.")] = None,
) -> None:
    """Check what the sites signed about a run's privacy. 0: fine, 1: over budget or inconsistent, 2: damaged."""
    folder = open_run(run, directory)
    record = read_privacy_record(folder.path / "privacy.json")
    statements = record.get("statements", [])
    audited = audit_statements(folder.state.run_id, statements, list(record.get("sites", {})))
    if html is not None:
        write_page(audited, html)
    if as_json:
        typer.echo(json.dumps(audited.to_json(), indent=1))
    else:
        print_audit(audited, console)
        if not statements:
            console.print("differential privacy was off in this run", markup=False)
        if html is not None:
            console.print(f"report: {html.absolute()}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(audited.exit_code)


@app.command()
def config(
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings as for `flwr run --run-config`: 'chain.laps=2', or the path of a TOML file."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/configuration.md.")] = False,
    toml: Annotated[
        bool, typer.Option("--toml", help="Print every key at its default, for an app's pyproject.toml.")
    ] = False,
) -> None:
    """Check settings without a run: misspelt keys, values out of range, contradictions."""
    if markdown or toml:
        typer.echo(configuration_markdown() if markdown else flower_app_config(), nl=False)
        return
    checked = RunConfig.from_flat(_parse(settings or []))
    defaults = RunConfig().to_flat()
    changed = {key: value for key, value in checked.to_flat().items() if value != defaults[key]}
    table = Table("key", "value", "default")
    for key, value in changed.items():
        table.add_row(key, repr(value), repr(defaults[key]))
    console.print(table if changed else "every key at its default")


def _parse(settings: list[str]) -> dict[str, ConfigScalar]:
    """Return settings as Flower reads them from one --run-config (of several it forgets keys of the same table)."""
    try:
        return parse_config_args(settings if settings[-1:] and settings[-1].endswith(".toml") else [" ".join(settings)])
    except (click.ClickException, ValueError, OSError) as error:
        message = error.message if isinstance(error, click.ClickException) else str(error)
        raise ConfigError(f"{' '.join(settings)}: {' '.join(message.split())}") from error
