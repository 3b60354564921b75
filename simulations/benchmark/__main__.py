"""Measure Chainward on this machine: ``python simulations/benchmark --help``."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from chainward_shared.config import ConfigScalar
from chainward_shared.console import PlainConsole
from chainward_shared.errors import ConfigError
from chainward_simulations.benchmark.figures import Backbone, BenchmarkError, Options, Report, Table

SIX_SITES = Path(__file__).resolve().parent.parent / "six_sites"

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
progress = PlainConsole(stderr=True)


class Part(StrEnum):
    """What can be measured alone."""

    TRAINING = "training"
    RUN = "run"
    MEMORY = "memory"
    PRIVATE = "private"
    PEERS = "peers"
    IMAGES = "images"
    SECURE_SUMS = "secure-sums"
    FEATURES = "features"
    MODELS = "models"


ONLY_WHERE_NAMED = {Part.PEERS, Part.IMAGES, Part.SECURE_SUMS, Part.FEATURES, Part.MODELS}


@cli.command()
def main(
    only: Annotated[
        list[Part] | None,
        typer.Option(
            help="Measure only this; may be repeated. training: throughput beside plain PyTorch; "
            "run: a whole flwr run beside the same work without Flower, and its memory; memory: flwr run alone, hops and memory; "
            "private: a private step beside a plain one, its time and memory; peers: the same six "
            "trainings in a plain loop, in Flower's FedAvg, in NVFlare where it is installed, and here; images: opening a "
            "deployed site's images with and without its store of decoded ones; secure-sums: what sums over 3, 6 and 50 sites "
            "cost, about fifteen minutes; features: training the last part of a backbone with and without kept features; models: "
            "what common backbones can do (or those of --backbone). The last five only where named."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A tiny version of everything: shows that it works, its figures say nothing."),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write every single measurement to this file.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of tables.")] = False,
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:PATCH]",
            help="timm model to train, a ViT with its patch size; may be repeated. "
            "Default: convnext_atto and vit_tiny_patch16_224:8; for private also resnetv2_18.",
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Measured trainings of each kind. Default: 5; 7 private steps.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of a measured training. Default: 2.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a training.")] = 2,
    app: Annotated[
        Path, typer.Option(exists=True, file_okay=False, show_default="six_sites", help="Flower app to run.")
    ] = SIX_SITES,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE|FILE.toml",
            help="Settings of that run, where they differ from the app's: one, or a file of them; may be repeated.",
        ),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Times that the Flower app is run.")] = 1,
    images: Annotated[
        int | None, typer.Option(min=24, help="Generated images of the site. Default: 50000; 512 for features.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one whole run may take.")] = 3600.0,
) -> None:
    """Measure Chainward on this machine: training throughput, a whole Flower run, peak memory.

    Stop other work on the machine first.
    """
    from chainward_simulations.benchmark import machine

    parts = set(only or set(Part) - ONLY_WHERE_NAMED)
    if Part.RUN in parts:
        parts.discard(Part.MEMORY)  # which a run has, too
    try:
        backbones = tuple(Backbone.parse(name) for name in backbone or [])
    except ValueError as error:
        raise typer.BadParameter("the patch size after ':' is not a number", param_hint="--backbone") from error
    settings = _settings_of_run(app, setting or [], quick, threads) if parts & {Part.RUN, Part.MEMORY} else {}
    options = Options(
        progress.say,
        quick,
        backbones,
        repeats,
        epochs,
        threads,
        images,
        app=app,
        settings=settings,
        runs=runs,
        timeout=timeout,
    )
    started = time.monotonic()
    about = machine.describe_machine()
    tables = [Table("Machine", ("what", "value"), rows=list(about.items()))]
    measured: dict[str, object] = {"machine": about, "quick": quick}
    try:
        for part in Part:
            if part in parts:
                found, values = measure(part, options)
                tables += found
                measured["runs" if part in (Part.RUN, Part.MEMORY) else part.value] = values
    except BenchmarkError as error:
        progress.say(str(error))
        raise typer.Exit(1) from error
    progress.say(f"measured in {time.monotonic() - started:.0f} s")

    output = PlainConsole()
    for table in tables:
        if markdown:
            typer.echo(table.markdown())
        else:
            table.print(output)
    if json_file:
        json_file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def _settings_of_run(app: Path, given: list[str], quick: bool, threads: int) -> dict[str, ConfigScalar]:
    from chainward_simulations.benchmark.flower_run import QUICK_CONFIG
    from chainward_simulations.run_command import app_and_settings

    try:
        settings = app_and_settings([str(app), *given])[1] if given else {}
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from error
    return {**(QUICK_CONFIG if quick else {}), "federation.threads": threads, **settings}


def measure(part: Part, options: Options) -> Report:
    """Measure one part; what it needs is imported now, so that --help answers at once."""
    if part in (Part.RUN, Part.MEMORY):
        from chainward_simulations.benchmark import flower_run

        return flower_run.measure(options, with_reference=part == Part.RUN)
    name = {"peers": "peers.measure", "secure-sums": "secure_sums", "models": "backbones"}.get(part, part.value)
    found: Report = import_module(f"chainward_simulations.benchmark.{name}").measure(options)
    return found


if __name__ == "__main__":
    cli()
