"""`chainward`: the coordinator's command, and what needs hospitals and coordinator in one program."""

from __future__ import annotations

from typing import Annotated

import typer

from chainward_server.cli import DEFAULT_DIR, RunsDir, app, main, open_run
from chainward_simulations.attack import attack
from chainward_simulations.check import check
from chainward_simulations.study.command import study

app.command()(study)
app.command()(attack)
app.command()(check)


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
    from chainward_server.report.from_folder import write_report
    from chainward_simulations.run_examples import draw_examples

    folder = open_run(run, directory)
    draw_examples(folder, without=open_run(without, directory) if without else None, count=count)
    typer.echo(write_report(folder))


__all__ = ["app", "main"]
