"""Measure Chainward on this machine: ``python simulations/benchmark --help``."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chainward_shared.console import PlainConsole

if TYPE_CHECKING:  # imported when something is measured, so that --help answers at once
    from chainward_shared.config import ConfigScalar
    from chainward_simulations.benchmark.figures import Table
    from chainward_simulations.benchmark.flower_run import FlowerRun
    from chainward_simulations.benchmark.training import Backbone, TrainingWorkload

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
    from chainward_simulations.benchmark import machine, training
    from chainward_simulations.benchmark.figures import Table

    parts = set(only or set(Part) - ONLY_WHERE_NAMED)
    try:
        backbones = tuple(training.Backbone.parse(name) for name in backbone or [])
    except ValueError as error:
        raise typer.BadParameter("the patch size after ':' is not a number", param_hint="--backbone") from error
    given = {
        "backbones": backbones or None,
        "repeats": repeats,
        "epochs": epochs,
        "threads": threads,
    }
    workload = training.TrainingWorkload.quick() if quick else training.TrainingWorkload()
    workload = workload.with_changes({name: value for name, value in given.items() if value is not None})

    started = time.monotonic()
    about = machine.describe_machine()
    tables = [Table("Machine", ("what", "value"), rows=list(about.items()))]
    measured: dict[str, object] = {"machine": about, "quick": quick}
    if Part.TRAINING in parts:
        tables.append(_measure_training(workload, measured))
    if parts & {Part.RUN, Part.MEMORY}:
        tables += _measure_runs(
            parts, app, _settings_of_run(app, setting or [], quick, threads), runs, timeout, measured
        )
    if Part.PRIVATE in parts:
        tables.append(_measure_private(backbones, repeats, quick, threads, measured))
    if Part.PEERS in parts:
        tables.append(_measure_peers(backbones, repeats, epochs, quick, threads, timeout, measured))
    if Part.IMAGES in parts:
        tables.append(_measure_images(images or (200 if quick else 50_000), measured))
    if Part.SECURE_SUMS in parts:
        tables.append(_measure_secure_sums(quick, measured))
    if Part.FEATURES in parts:
        tables.append(_measure_features(backbones, images, epochs, quick, threads, measured))
    if Part.MODELS in parts:
        tables.append(_examine_models(backbones, measured))
    progress.say(f"measured in {time.monotonic() - started:.0f} s")

    output = PlainConsole()
    for table in tables:
        if markdown:
            typer.echo(table.markdown())
        else:
            table.print(output)
    if json_file:
        json_file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def _measure_training(workload: TrainingWorkload, measured: dict[str, object]) -> Table:
    from chainward_simulations.benchmark import training

    throughputs = training.measure_throughput(workload, progress.say)
    measured["training"] = [throughput.to_json() for throughput in throughputs]
    return training.throughput_table(throughputs, workload)


def _measure_private(
    backbones: tuple[Backbone, ...], repeats: int | None, quick: bool, threads: int, measured: dict[str, object]
) -> Table:
    from chainward_simulations.benchmark import private

    workload = private.PrivateStepWorkload.quick() if quick else private.PrivateStepWorkload()
    workload = private.with_choices(workload, backbones, repeats, threads)
    costs = private.measure_private_steps(workload, progress.say)
    measured["private"] = [cost.to_json() for cost in costs]
    return private.private_table(costs, workload)


def _settings_of_run(app: Path, given: list[str], quick: bool, threads: int) -> dict[str, ConfigScalar]:
    from chainward_shared.errors import ConfigError
    from chainward_simulations.benchmark import flower_run
    from chainward_simulations.run_command import app_and_settings

    try:
        settings = app_and_settings([str(app), *given])[1] if given else {}
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from error
    return {**(flower_run.QUICK_CONFIG if quick else {}), "federation.threads": threads, **settings}


def _measure_runs(
    parts: set[Part],
    app: Path,
    settings: dict[str, ConfigScalar],
    runs: int,
    timeout: float,
    measured: dict[str, object],
) -> list[Table]:
    from chainward_simulations.benchmark import flower_run

    done: list[FlowerRun] = []
    for number in range(1, runs + 1):
        progress.say(f"flwr run {app.name}: {number} of {runs}")
        try:
            run = flower_run.measure_run(app, settings, with_reference=Part.RUN in parts, timeout=timeout)
        except flower_run.BenchmarkError as error:
            progress.say(str(error))
            raise typer.Exit(1) from error
        done.append(run)
    measured["runs"] = [run.to_json() for run in done]
    tables = [flower_run.hops_table(done[0]), flower_run.memory_table(done)]
    return [flower_run.phases_table(done), *tables] if Part.RUN in parts else tables


def _measure_secure_sums(quick: bool, measured: dict[str, object]) -> Table:
    from chainward_simulations.benchmark import secure_sums

    costs = secure_sums.measure_secure_sums(progress.say, ((4, 1),) if quick else secure_sums.SIZES)
    measured["secure-sums"] = [asdict(cost) for cost in costs]
    return secure_sums.secure_sums_table(costs)


def _measure_images(count: int, measured: dict[str, object]) -> Table:
    from chainward_simulations.benchmark import images

    openings, stored = images.measure_images(count, progress.say)
    measured["images"] = {"images": count, "store": stored, "openings": [one.to_json() for one in openings]}
    return images.images_table(openings, stored, count)


def _measure_features(
    backbones: tuple[Backbone, ...],
    images: int | None,
    epochs: int | None,
    quick: bool,
    threads: int,
    measured: dict[str, object],
) -> Table:
    from chainward_simulations.benchmark import features

    workload = features.FeaturesWorkload.quick() if quick else features.FeaturesWorkload()
    given = {"backbone": backbones[0].name if backbones else None, "images": images, "epochs": epochs}
    chosen = {name: value for name, value in given.items() if value is not None}
    workload = replace(workload, threads=threads, **chosen)  # type: ignore[arg-type]
    links = features.measure_features(workload, progress.say)
    measured["features"] = [link.to_json() for link in links]
    return features.features_table(links, workload)


def _examine_models(backbones: tuple[Backbone, ...], measured: dict[str, object]) -> Table:
    from chainward_simulations.benchmark import backbones as models

    found = models.examine(tuple(one.name for one in backbones) or models.COMMON, progress.say)
    measured["models"] = [{"name": one.name, "parameters": one.parameters, **one.answers} for one in found]
    return models.backbones_table(found)


def _measure_peers(
    backbones: tuple[Backbone, ...],
    repeats: int | None,
    epochs: int | None,
    quick: bool,
    threads: int,
    timeout: float,
    measured: dict[str, object],
) -> Table:
    os.environ["CHAINWARD_PEERS_EPOCHS"] = str(epochs or (1 if quick else 12))
    os.environ["CHAINWARD_PEERS_THREADS"] = str(threads)
    if backbones or quick:
        os.environ["CHAINWARD_PEERS_BACKBONE"] = backbones[0].name if backbones else "test_convnext"
    from chainward_simulations.benchmark.peers import measure

    costs, left_out = measure.measure_peers(repeats or (1 if quick else 2), timeout, progress.say)
    measured["peers"] = measure.to_json(costs)
    return measure.peers_table(costs, left_out)


if __name__ == "__main__":
    cli()
