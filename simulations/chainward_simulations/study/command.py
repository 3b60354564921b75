"""`chainward study`: what is typed, and what is printed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from click import Context, HelpFormatter
from typer.core import TyperCommand

from chainward_shared.console import PlainConsole
from chainward_shared.errors import StudyError
from chainward_simulations.study.settings import Goal, base_settings, parse_assignments, parse_seeds, typed

if TYPE_CHECKING:
    from chainward_simulations.study.study import StudyReport

INTERRUPTED = 130


class StudyCommand(TyperCommand):
    """Lists the arms in its help: only there, since they include every baseline's file, and those import PyTorch."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the help, with the arms."""
        from chainward_simulations.study.arms import ARMS

        arms = "\n".join(f"  {arm.name:<28} {arm.about}" for arm in ARMS.values())
        self.help = f"{self.help}\n\n\b\nArms:\n{arms}"
        super().format_help(ctx, formatter)


Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Settings of all arms: 'chain.epochs=8 data.label-skew=0.5'. May be repeated."),
]
OwnArms = Annotated[
    list[str] | None,
    typer.Option(
        help="An arm of your own, NAME='KEY=VALUE ...': mine='chain.laps=2'; 'arm=fedprox mu=1' starts from another arm than "
        "chain. May be repeated."
    ),
]
LabelFraction = Annotated[
    float | None, typer.Option(help="Fraction of each site's training images whose labels are used.")
]
Reference = Annotated[
    str | None, typer.Option(help="Arm that the others are compared with. Default: chain, or the first.")
]
Out = Annotated[Path | None, typer.Option(help="The study's folder. Default: one of its own in ~/.chainward/studies.")]
JsonFile = Annotated[
    str | None, typer.Option("--json", help="Also write the results to this file; '-': to stdout, no table.")
]
Tune = Annotated[
    int,
    typer.Option(
        min=0,
        help="First search the chain's settings (learning rate, distillation, temperature, attention) in so many trials, "
        "on validation images of seed 0 only, and train the arms with the best.",
    ),
]
Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--fresh",
        help="--resume: there must be a study to continue; --fresh: delete what is there. Default: continue if there is one.",
        show_default=False,
    ),
]


def study(
    data: Annotated[str, typer.Option(help="A data file (YAML, docs/data.md), or 'phantom'.")],
    arms: Annotated[str, typer.Option(help="Arms to train, comma-separated; listed above.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated: each arm is trained once for each.")] = "0",
    sites: Annotated[
        int, typer.Option(min=0, help="Number of sites. 0: those of the data's site column, 6 otherwise.")
    ] = 0,
    settings: Settings = None,
    arm: OwnArms = None,
    label_fraction: LabelFraction = None,
    reference: Reference = None,
    out: Out = None,
    json_file: JsonFile = None,
    jobs: Annotated[int, typer.Option(min=0, help="Trainings at the same time. 0: one per core.")] = 0,
    tune: Tune = 0,
    objective: Annotated[
        Goal, typer.Option(help="What --tune maximises on the validation images.")
    ] = "balanced-accuracy",
    resume: Resume = None,
) -> None:
    """Train the methods side by side on the same images, labels and budget, over several seeds.

    Everything is trained in this one program, without Flower, with the code of a real run. Progress goes to stderr, the table
    to stdout; results.json, study.png and the predictions to the study's folder. Interrupted, the same command goes on.
    """
    # Not before it is needed: other commands of `chainward` start without waiting for it.
    from chainward_simulations.study.study import StudyRequest, run_study

    progress = PlainConsole(stderr=True)
    if json_file not in (None, "-"):
        _check_writable(Path(json_file))
    base = base_settings(data, sites, label_fraction, typed(parse_assignments(settings or [], "--set"), "--set"))
    names = [name.strip() for name in arms.split(",") if name.strip()]
    request = StudyRequest(base, names, arm or [], parse_seeds(seeds), reference, out, jobs, resume, tune, objective)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = run_study(request, progress)
    except KeyboardInterrupt:
        progress.say("interrupted; finished arms are kept, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    _show(report, json_file)
    progress.say(f"study folder: {report.folder.path}")
    if report.result.failures:
        arm_name, seed, reason = report.result.failures[0]
        more = f" (and {len(report.result.failures) - 1} more)" if len(report.result.failures) > 1 else ""
        raise StudyError(f"arm '{arm_name}', seed {seed} failed{more}: {reason}")


def _show(report: StudyReport, json_file: str | None) -> None:
    """Print the table of a study, or its JSON, and write the latter where it was asked for."""
    from chainward_simulations.study.results import results_json
    from chainward_simulations.study.store import write_output
    from chainward_simulations.study.table import notes, study_table, tuning_note

    result, folder = report.result, report.folder
    if json_file == "-":
        typer.echo(results_json(result, folder), nl=False)
        return
    screen = PlainConsole()
    if report.tuned is not None:
        screen.say(tuning_note(report.tuned))
    if result.arms:
        screen.print(study_table(result))
    for line in notes(result):
        screen.say(line)
    if json_file is not None:
        write_output(Path(json_file), results_json(result, folder))


def _check_writable(path: Path) -> None:
    """Refuse a file that can't be written before anything is trained."""
    if path.is_dir():
        raise StudyError(f"--json {path}: is a folder; expected a file")
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise StudyError(f"--json {path}: can't be written ({error.strerror})") from error
