"""The coordinator's command, `chainward`. Progress and errors go to stderr; 0: fine, 1: a finding, 2: bad input."""

# What takes seconds to import, PyTorch, Flower and matplotlib say, is imported by the command that needs it.

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click
import typer
from rich.table import Column, Table
from rich.text import Text

from chainward_server.report.formats import bytes_size, duration
from chainward_server.run_folder import RunFolder
from chainward_server.run_list import RunSummary, list_runs
from chainward_server.watch import find_run, watch
from chainward_server.watch.display import QUIET
from chainward_server.watch.watching import Output
from chainward_server.watch.web import live_page
from chainward_shared.config import ConfigScalar, OutputConfig, RunConfig
from chainward_shared.config.docs import configuration_markdown, flower_app_config
from chainward_shared.console import PlainConsole, run_command
from chainward_shared.errors import ConfigError
from chainward_shared.pretrained.commands import weights_commands
from chainward_shared.pretrained.store import usual_place
from chainward_shared.privacy.audit import audit_statements
from chainward_shared.privacy.console import print_audit, write_page
from chainward_shared.privacy.record import read_privacy_record

if TYPE_CHECKING:
    from chainward_shared.pretrained.store import WeightsStore

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = PlainConsole()
errors = PlainConsole(stderr=True)

RunsDir = Annotated[Path, typer.Option("--dir", help="Folder of the run folders.")]
DEFAULT_DIR = Path(OutputConfig().dir).expanduser()
DATED = 100
"""Columns of a terminal from which on the list of runs has the time of the start."""


def _store(root: Path) -> WeightsStore:
    from chainward_shared.pretrained.store import WeightsStore

    return WeightsStore(root)


app.add_typer(
    weights_commands(typer.Option("--store", help="Folder of the store."), usual_place(), _store), name="weights"
)


def main() -> None:
    """Run the command; an error that a person can act on is one line and exit code 2."""
    run_command(app, "chainward")


@app.command()
def runs(
    directory: RunsDir = DEFAULT_DIR,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """List the runs, newest first: status, phase, figures of the models that came out."""
    found = list_runs(directory)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in found], indent=1))
        return
    if not found:
        console.say(f"no runs in {directory}")
        return
    console.print(_table_of_runs(found))
    for row in found:
        if row.reason:
            console.say(f"{row.run}: {row.reason}")
    console.print("chain, student: balanced accuracy on the pooled test images")


def _table_of_runs(found: list[RunSummary]) -> Table:
    """Return a row for each run. On a narrow terminal it does without the time of the start, which the run's id begins with."""
    began = [Column("started", no_wrap=True)] if console.width >= DATED else []
    headers = (Column("data", overflow="fold"), "status", "time", "sites", "privacy", "chain", "student")
    table = Table(Column("run", no_wrap=True), *began, *headers, box=None, padding=(0, 1, 0, 0))
    for row in found:
        status = f"{row.status}: {row.phase}" if row.status == "running" else row.status
        if row.silent and row.silent > QUIET:
            status += f", silent for {duration(row.silent)}"
        cells = [row.run]
        if began:
            cells.append(f"{datetime.fromisoformat(row.started).astimezone():%m-%d %H:%M}" if row.started else "")
        spent = duration(row.elapsed) if row.elapsed is not None else ""
        cells += [row.data or "", status, spent, str(row.sites or ""), row.privacy or ""]
        table.add_row(*map(Text, [*cells, row.chain or "", row.student or ""]))
    return table


@app.command("watch")
def watch_run(
    run: Annotated[
        str | None, typer.Argument(help="Id of a run, or path of its folder. Default: the run that was last at work.")
    ] = None,
    directory: RunsDir = DEFAULT_DIR,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks at the run.")] = 2.0,
    wait: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds to wait until the run is there. Without RUN: until one appears, or was at work a minute ago at most.",
        ),
    ] = 0.0,
    timeout: Annotated[
        float, typer.Option(min=0, help="Exit with 1 after so many seconds without a sign of life. 0: never.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for all that happens.")] = False,
    web: Annotated[
        bool, typer.Option("--web", help="Also serve a live page on 127.0.0.1; its address is printed.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port of that page. 0: any free one.")] = 0,
) -> None:
    """Watch a run until it ends. 0: it finished, 1: it failed or gave no sign of life, 2: no such run, 3: it ended
    incomplete, 130: Ctrl-C."""
    output: Output = "json" if as_json else "live" if console.is_terminal else "lines"
    try:
        path = find_run(run, directory, wait=wait)
        with live_page(path, port, errors.say) if web else nullcontext():
            code = watch(
                path, console, output, interval=interval, timeout=timeout, write=typer.echo if as_json else console.say
            )
    except KeyboardInterrupt:
        errors.say("no longer watching; the run goes on without it")
        code = 130
    raise typer.Exit(code)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Id of a run, or path of its folder.")],
    directory: RunsDir = DEFAULT_DIR,
    model: Annotated[
        Literal["student", "chain"] | None,
        typer.Option(help="Which model. Default: the student; the chain's in a run that trains none."),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="The new folder. Default: RUN-MODEL in this folder.")] = None,
    onnx: Annotated[bool, typer.Option(help="Also as ONNX, compared with PyTorch (extra `onnx`).")] = True,
    onnx_input: Annotated[
        Literal["pixels", "scaled", "image"],
        typer.Option(
            help="What the ONNX model is given: squares of pixels 0 to 255 (uint8), squares scaled already (float32), or one "
            "image of any shape (uint8)."
        ),
    ] = "pixels",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in that folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Write a run's model for others: safetensors, timm's config.json, ONNX, a model card, checksums. Print where."""
    from chainward_server.export import chosen_model, export_run

    folder = open_run(run, directory)
    chosen = chosen_model(folder, model)
    target = to or Path(f"{folder.state.run_id}-{chosen}")
    done = export_run(folder, target, model=chosen, onnx=onnx, onnx_input=onnx_input, force=force)
    for warning in done.warnings:
        errors.say(f"note: {warning}", style="yellow")
    if as_json:
        typer.echo(json.dumps(done.to_json(), indent=1))
        return
    for file in done.files:
        errors.say(f"{bytes_size(file.bytes):>8}  {file.name}")
    if done.onnx:
        errors.say(
            f"ONNX and PyTorch agree on {done.onnx.images} images: logits within {done.onnx.logits:.1e}, probabilities within "
            f"{done.onnx.probabilities:.1e}"
        )
    typer.echo(done.path)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Id of a run, or path of its folder.")],
    directory: RunsDir = DEFAULT_DIR,
) -> None:
    """Render report.html of a run anew and print where it is."""
    from chainward_server.report.page import write_report

    typer.echo(write_report(open_run(run, directory)))


def open_run(run: str, directory: Path) -> RunFolder:
    """Return the run folder of a run's id or path.

    Raises
    ------
    RunFolderError
        There is none, or a file of it is damaged.
    """
    return RunFolder.open(find_run(run, directory))


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
    audited = audit_statements(folder.state.run_id, record.statements, record.trained, absent=record.absent)
    results = folder.load_results()
    start = None if results is None else results.start
    if html is not None:
        write_page(audited, html)
    if as_json:
        of_start = {"start": None if start is None else start.model_dump()}
        typer.echo(json.dumps(audited.to_json() | of_start, indent=1))
    else:
        print_audit(audited, console)
        if start is not None:
            console.say(
                f"the run started from {start.name}, SHA-256 {start.sha256} ({start.source}; licence {start.licence}): whom "
                "those weights were trained on is outside of what the sites account for"
            )
        if not record.statements:
            console.say("differential privacy was off in this run")
        if html is not None:
            console.say(f"report: {html.absolute()}")
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
    checked = RunConfig.from_flat(parse_settings(settings or []))
    defaults = RunConfig().to_flat()
    changed = {key: value for key, value in checked.to_flat().items() if value != defaults[key]}
    table = Table("key", "value", "default")
    for key, value in changed.items():
        table.add_row(key, repr(value), repr(defaults[key]))
    console.print(table if changed else "every key at its default")


def parse_settings(settings: list[str]) -> dict[str, ConfigScalar]:
    """Return settings as Flower reads them from one --run-config (of several it forgets keys of the same table)."""
    from flwr.common.config import parse_config_args

    try:
        return parse_config_args(settings if settings[-1:] and settings[-1].endswith(".toml") else [" ".join(settings)])
    except (click.ClickException, ValueError, OSError) as error:
        message = error.message if isinstance(error, click.ClickException) else str(error)
        raise ConfigError(f"{' '.join(settings)}: {' '.join(message.split())}") from error
