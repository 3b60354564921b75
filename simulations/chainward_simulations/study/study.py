"""A whole study: plan the arms, train what is not finished, put the results together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from chainward_server.measure import summarize_model
from chainward_shared.config import ConfigScalar, RunConfig
from chainward_shared.console import PlainConsole
from chainward_shared.errors import StudyError, nearest
from chainward_shared.models import build_model
from chainward_simulations.simulated_sites import simulated_site_ids
from chainward_simulations.study.configured_arms import ConfiguredArm, configure_arms
from chainward_simulations.study.picture import attention_pictures, study_picture
from chainward_simulations.study.progress import StudyProgress
from chainward_simulations.study.records import ArmRecord
from chainward_simulations.study.results import StudyResult, collect, results_json
from chainward_simulations.study.settings import Goal
from chainward_simulations.study.store import StudyFolder, default_folder, study_settings, write_output
from chainward_simulations.study.tune import Tuned, tune
from chainward_simulations.study.workers import Event, Failed, Workers, make_units, renamed


@dataclass(frozen=True)
class StudyRequest:
    """What is asked for.

    Attributes
    ----------
    base : the settings of all arms, as flat run config
    arms, definitions : names of arms, and arms defined as ``NAME=key=value``
    seeds : one run of every arm for each
    reference : arm that the others are compared with; None: `chain`, or the first
    folder : the study's folder; None: one of its own for these settings
    jobs : worker processes; 0: as many as there are cores
    resume : True: the study must be there; False: start anew; None: go on if there is one
    tune : finished trials of the search for settings before the arms are trained with what it found; 0: no search
    objective : what the search maximises on the validation images
    """

    base: dict[str, ConfigScalar]
    arms: Sequence[str]
    definitions: Sequence[str]
    seeds: Sequence[int]
    reference: str | None = None
    folder: Path | None = None
    jobs: int = 0
    resume: bool | None = None
    tune: int = 0
    objective: Goal = "balanced-accuracy"


def run_study(request: StudyRequest, console: PlainConsole) -> StudyReport:
    """Train what is not finished yet and return the results.

    Parameters
    ----------
    console : where progress goes

    Raises
    ------
    ChainwardError
        One line: what is wrong with the request, the data or the folder. Finished arms are kept.
    """
    base = request.base
    configured = configure_arms(request.arms, request.definitions, base, request.seeds[0], may_be_none=request.tune > 0)
    reference = reference_of(request.reference, [arm.name for arm in configured])
    config = RunConfig.from_flat({**base, "seed": request.seeds[0]})
    sites = check_data(config)
    settings = study_settings(config)
    jobs = request.jobs or default_jobs(config.federation.cpu_threads)
    folder = StudyFolder.open(request.folder or default_folder(settings), settings, resume=request.resume)
    try:
        folder.save()
        tuned = None
        if request.tune:
            tuned = tune(base, request.tune, request.objective, folder.path, jobs, sites, console)
            folder.state.tuned = tuned.settings
            folder.save()
            if configured:
                base = {**base, **tuned.settings}
                configured = configure_arms(request.arms, request.definitions, base, request.seeds[0])
        failures = train_missing(folder, configured, request.seeds, jobs, sites, console)
        measure_latency(folder)
        result = collect(folder, configured, request.seeds, reference, failures)
        if configured:
            write_output(folder.path / "results.json", results_json(result, folder))
            write_output(folder.path / "study.png", study_picture(result, _title(config)))
            if picture := attention_pictures(folder, configured, request.seeds[0], reference):
                write_output(folder.path / "examples.png", picture)
    finally:
        folder.close()
    return StudyReport(result, folder, tuned)


@dataclass(frozen=True)
class StudyReport:
    """What came of a study, and where it is."""

    result: StudyResult
    folder: StudyFolder
    tuned: Tuned | None


def reference_of(wanted: str | None, names: Sequence[str]) -> str | None:
    """Return the arm that the others are compared with; None where there is nothing to compare.

    Raises
    ------
    StudyError
        The one that is wanted is not among the arms.
    """
    if wanted is not None and wanted not in names:
        raise StudyError(
            f"--reference {wanted}: not among the arms of this study{nearest(wanted, names)}; add it to --arms"
        )
    if len(names) < 2:
        return None
    return wanted or ("chain" if "chain" in names else names[0])


def check_data(config: RunConfig) -> int:
    """Return the number of sites, before any image is decoded.

    Raises
    ------
    DataError
        The data can't be used, or has other sites than were asked for.
    """
    count = 0 if config.expected_sites else config.federation.num_sites
    ids = simulated_site_ids(config.data.source, num_sites=count, label_skew=config.data.label_skew)
    if missing := [site for site in config.expected_sites if site not in ids]:
        raise StudyError(
            f"federation.sites: there is no site '{missing[0]}'{nearest(missing[0], ids)}; the data has {', '.join(ids)}"
        )
    return len(config.expected_sites or ids)


def train_missing(
    folder: StudyFolder,
    configured: Sequence[ConfiguredArm],
    seeds: Sequence[int],
    jobs: int,
    sites: int,
    console: PlainConsole,
) -> list[tuple[str, int, str]]:
    """Train the arms that are not finished, note each as it is, and return what failed: arm, seed and why."""
    asked = [arm.of_seed(seed) for seed in seeds for arm in configured]
    missing = [arm for arm in asked if not folder.has(arm.name, arm.config.seed, arm.digest())]
    if len(missing) < len(asked):
        console.say(f"{len(asked) - len(missing)} of {len(asked)} arms were finished before")
    todo = []
    for arm in missing:
        twin = next((one for one in folder.state.records if one.digest == arm.digest()), None)
        if twin is None:
            todo.append(arm)
        else:
            folder.add(renamed(twin, arm))
    failures: list[tuple[str, int, str]] = []
    if not todo:
        return failures
    units = make_units(todo)
    with StudyProgress(console, len(todo), sum(unit.images(sites) for unit in units)) as progress:

        def on_event(event: Event) -> None:
            if isinstance(event, ArmRecord):
                folder.add(event)
            elif isinstance(event, Failed):
                failures.append((event.arm, event.seed, event.reason))
            progress.on_event(event)

        with Workers(min(jobs, len(units)), folder.path, on_event) as workers:
            workers.run(units)
    return failures


def default_jobs(threads: int) -> int:
    """Return how many workers this machine has cores for, a few at most beside a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // threads, 4 if torch.cuda.is_available() else cores))


def measure_latency(folder: StudyFolder) -> None:
    """Measure every architecture once, now that no worker disturbs; weights don't change it."""
    known = folder.state.latency_ms
    for record in folder.state.records:
        if record.architecture is None:
            continue
        key = record.architecture.model_dump_json()
        if key not in known:
            weights = dict(build_model(record.architecture, seed=0).state_dict())
            known[key] = summarize_model(record.architecture, weights, folder.path / "study.json").latency_ms
    folder.save()


def _title(config: RunConfig) -> str:
    chain = config.chain
    return f"{Path(config.data.source).stem}: label fraction {chain.label_fraction:g}, {chain.epochs} epochs per link"
