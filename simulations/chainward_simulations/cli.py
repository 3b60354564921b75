"""`chainward`: the coordinator's command, and what needs hospitals and coordinator in one program."""

from __future__ import annotations

from typing import Annotated

import typer

from chainward_server.cli import DEFAULT_DIR, RunsDir, app, errors, main, open_run
from chainward_simulations.attack_command import attack
from chainward_simulations.check import check
from chainward_simulations.predict.command import predict
from chainward_simulations.study.command import StudyCommand, study

app.command(cls=StudyCommand)(study)
app.command()(attack)
app.command()(check)
app.command()(predict)


@app.command("run")
def run_simulation(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[APP] [KEY=VALUE ...]",
            help="Folder of a simulation's app, the six sites where none is named, and settings: chain.laps=2, or a .toml file.",
            show_default=False,
        ),
    ] = None,
    run_config: Annotated[
        list[str] | None, typer.Option("--run-config", help="Settings as `flwr run` takes them; may be repeated.")
    ] = None,
) -> None:
    """Run a simulation and follow it. 0: finished, 1: failed, 2: bad settings, 3: incomplete, 130: Ctrl-C.

    The settings are checked first. The run has a SuperLink of its own, which ends with it. Ctrl-C ends the log; whether the run
    ends, too, is asked. The last line is the path of the report.
    """
    from chainward_simulations.run_command import app_and_settings, run

    folder, settings = app_and_settings(words or [], run_config or [])
    code = run(folder, settings, typer.echo, lambda question: typer.confirm(question, default=False, err=True))
    raise typer.Exit(code)


@app.command()
def stop(
    run: Annotated[
        str | None,
        typer.Argument(
            help="Id of a run, or path of its folder. Default: what runs that were killed have left behind."
        ),
    ] = None,
    directory: RunsDir = DEFAULT_DIR,
) -> None:
    """Stop a run, or what killed runs and killed SuperLinks have left behind; never anything that is not of such a run."""
    from chainward_server.stop import stop_leftovers, stop_run
    from chainward_server.watch import find_run
    from chainward_simulations.superlink import abandoned

    if run is not None:
        stopped = [stop_run(find_run(run, directory))]
    else:
        stopped, links = stop_leftovers(directory), abandoned()
        for link in links:
            errors.say(f"{link.home}: a SuperLink that nobody looks after any more")
            typer.echo(_ended(link.stop()))
        if not (stopped or links):
            typer.echo(f"no run in {directory} was killed and left anything behind; `chainward stop RUN` stops one")
    for one in stopped:
        what = "stopped" if one.was_running else "was gone already"
        typer.echo(f"run {one.run} {what}; {_ended(one.ended)}")
        if how := open_run(str(one.path), directory).how_to_resume:
            typer.echo(f"to go on from the last finished piece of work: the same command with {how}")


@app.command()
def examples(
    run: Annotated[str, typer.Argument(help="Id of a simulated run, or path of its folder.")],
    directory: RunsDir = DEFAULT_DIR,
    without: Annotated[
        str, typer.Option(help="Id of a run on the same data without privileged teachers, to compare with.")
    ] = "",
    count: Annotated[int, typer.Option(min=1, max=24, help="Images to show.")] = 6,
) -> None:
    """Draw test images, their regions and where a simulated run's models look into its report; print where it is."""
    from chainward_server.report.page import write_report
    from chainward_simulations.run_examples import draw_examples

    folder = open_run(run, directory)
    draw_examples(folder, without=open_run(without, directory) if without else None, count=count)
    typer.echo(write_report(folder))


def _ended(processes: int) -> str:
    return f"{processes} process{'' if processes == 1 else 'es'} ended"


__all__ = ["app", "main"]
