"""The Flower `ServerApp` of the coordinator: reads the configuration and runs the phases in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from chainward_server.approvals import run_plan
from chainward_server.completeness import shortfalls
from chainward_server.context import Run, data_summary
from chainward_server.flower_sites import FlowerSites
from chainward_server.measure import summarize_model
from chainward_server.method import Outcome, run_method
from chainward_server.privacy import run_privacy
from chainward_server.rendezvous import meet
from chainward_server.report.page import write_report
from chainward_server.results import DataSummary, Results, StartSummary, named
from chainward_server.run_folder import RunFolder
from chainward_server.run_process import RunProcess
from chainward_server.run_state import Phase, keys_of_earlier_runs
from chainward_server.scoring import shown
from chainward_server.surroundings import tell as tell_surroundings
from chainward_server.threads import settle_threads
from chainward_server.tracking import Tracking, check_trackers
from chainward_shared import __version__
from chainward_shared.config import RunConfig
from chainward_shared.console import show_progress
from chainward_shared.errors import ChainwardError, ConfigError, ModelError, StartAnewError
from chainward_shared.models import Architecture, count_parameters, skeleton
from chainward_shared.models.of_run import run_architectures
from chainward_shared.models.private_ready import check_private_ready
from chainward_shared.models.start import travelling_template
from chainward_shared.pretrained.begin import Beginning, begin

logger = logging.getLogger("chainward")

NotesOnData = Callable[[Path, Sequence[str]], list[str]]
WriteReport = Callable[[RunFolder], Path]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a consortium from rendezvous to report."""
    fail_if_incomplete(run_app(grid, context))


def run_app(
    grid: Grid, context: Context, notes_on_data: NotesOnData | None = None, report: WriteReport = write_report
) -> RunFolder:
    """Run the consortium that the run configuration describes, or what is left of it, and return its run folder.

    Parameters
    ----------
    notes_on_data : for simulated sites alone: returns what makes scores on their data too good, out of the folder of their
        state, and their ids
    report : writes the report of a run that came to its end, and returns its path

    Raises
    ------
    ChainwardError
        The run can't start or can't go on; logged in one line before.
    """
    show_progress()
    try:
        config = RunConfig.from_flat(context.run_config)
        check_trackers(config)
        folder = RunFolder.resume(config) if config.output.resume else RunFolder.create(config)
        folder.begin(RunProcess.current(context.run_id))
        tell_surroundings(folder)
        coordinate(grid, folder, notes_on_data, report)
    except ChainwardError as error:
        logger.error("the run stops: %s", error)
        _one_line_for(error)
        raise
    return folder


def fail_if_incomplete(folder: RunFolder) -> None:
    """Let Flower, too, call a run failed that ended as incomplete.

    Raises
    ------
    ChainwardError
        It did.
    """
    if folder.state.status != "incomplete":
        return
    error = ChainwardError(f"the run is incomplete: {folder.state.reason}{_to_go_on(folder)}")
    logger.error("%s", error)
    _one_line_for(error)
    raise error


def coordinate(
    grid: Grid, folder: RunFolder, notes_on_data: NotesOnData | None = None, report: WriteReport = write_report
) -> Results:
    """Run the phases of the run that `folder` holds, or what is left of them, and return what was measured.

    Parameters
    ----------
    notes_on_data, report : as of `run_app`

    Raises
    ------
    ChainwardError
        The run can't go on; the run folder says why and the run can be resumed.
    """
    logger.info(
        "chainward %s (flwr %s, torch %s, timm %s), run folder %s",
        __version__,
        version("flwr"),
        version("torch"),
        version("timm"),
        folder.path,
    )
    results: Results | None = None
    try:
        results = folder.load_results()
        with Tracking(folder):
            _run_phases(grid, folder, results, notes_on_data, report)
    except BaseException as error:
        reason = str(error) if isinstance(error, ChainwardError) else f"{type(error).__name__}: {error}"
        _note_failure(folder, reason, resumable=not isinstance(error, ConfigError | ModelError | StartAnewError))
        raise
    finished = folder.load_results()
    assert finished is not None
    return finished


def _run_phases(
    grid: Grid,
    folder: RunFolder,
    results: Results | None,
    notes_on_data: NotesOnData | None,
    report: WriteReport,
) -> None:
    config = folder.config
    timings = dict(results.timings) if results else {}
    states = folder.path / "simulated-sites"
    with _timed("rendezvous", folder, timings):
        sites = meet(
            grid,
            config,
            states,
            bound=folder.state.keys,
            earlier=keys_of_earlier_runs(folder.path),
            run_id=folder.state.run_id,
        )
        folder.bind(sites.keys)
        begun = folder.beginning() or _begin(config, sites)
        found = run_architectures(config, begun.architecture)
        models = dict(zip(("chain", "student"), found, strict=False))
        config = settle_threads(folder, models["chain"])
        _check_privacy(config, sites, found)
        notes = notes_on_data(states, sites.ids) if notes_on_data else None
        source = named(config.data.source) if sites.simulated else "the sites' own data"
        data = data_summary(list(sites.cards.values()), source, notes)
        results = _continued(results, data, folder, config)
        results.timings = timings
        _tell_about_data(data)
        privacy = run_privacy(folder, sites.cards, simulated=sites.simulated)
        sites.announce(run_plan(config, folder.state.run_id, found), folder.await_approval)
        _share(begun, sites, folder, results)
    run = Run(sites, config, models["chain"], folder, results, privacy, begun.base)
    outcome = run_method(run, partial(_timed, folder=folder, timings=timings))
    with _timed("evaluation", folder, timings):
        _evaluate(run, models, outcome, folder)
    with _timed("report", folder, timings):
        run.privacy.write(results)
        results.timings["total"] = sum(seconds for phase, seconds in timings.items() if phase != "total")
        folder.commit(results)
        missing = shortfalls(results, config, frozenset(filter(run.privacy.is_private, run.sites.ids)))
        path = folder.finish(missing, report)
    if missing:
        logger.warning("the run is INCOMPLETE: %s", "; ".join(missing))
    _tell_outcome(results)
    logger.info("report: %s", path)


def _evaluate(run: Run, models: Mapping[str, Architecture], outcome: Outcome, folder: RunFolder) -> None:
    """Score the models that the run leaves, each on all sites' test images, and describe them."""
    results = run.results
    if outcome.chain.test is not None:
        results.final["chain"] = outcome.chain.test
    for name, state in (("chain", outcome.chain.model), ("student", outcome.student)):
        if state is None:
            continue
        results.models[name] = summarize_model(models[name], state, folder.model_path(name))
        looks = run.localise(models[name], state)
        if looks is not None:
            results.localization[name] = looks


def _begin(config: RunConfig, sites: FlowerSites) -> Beginning:
    card = sites.any_card
    return begin(config, classes=len(card.classes), channels=card.channels, image_size=card.image_size)


@contextmanager
def _timed(phase: Phase, folder: RunFolder, timings: dict[str, float]) -> Iterator[None]:
    """Note the phase in run.json and add its seconds to those of earlier parts of the run."""
    folder.enter(phase)
    started = time.monotonic()
    try:
        yield
    finally:
        timings[phase] = timings.get(phase, 0.0) + time.monotonic() - started


def _check_privacy(config: RunConfig, sites: FlowerSites, architectures: list[Architecture]) -> None:
    """Say who trains privately, and refuse at once what no private site could train.

    Raises
    ------
    ModelError
        A backbone can't be trained privately.
    """
    policies = {site: card.privacy for site, card in sites.cards.items() if card.privacy is not None}
    if config.privacy.mode == "off":
        if refusing := [site for site, policy in policies.items() if policy.required]:
            logger.warning(
                "%s: their policies require differential privacy and this run has none (privacy.mode = 'off'); they will "
                "refuse to train",
                ", ".join(refusing),
            )
        return
    if policies:
        for architecture in architectures:
            check_private_ready(architecture)
    for site in sites.cards:
        policy = policies.get(site)
        if policy is None:
            what = "will refuse" if config.privacy.mode == "dp-sgd" else "trains without privacy"
            logger.info("%s: no privacy policy, %s", site, what)
        else:
            logger.info(
                "%s: budget epsilon %g at delta %g per %s, scores: %s",
                site,
                policy.terms.epsilon,
                policy.terms.delta,
                policy.terms.unit,
                policy.terms.metrics,
            )
    logger.info(
        "each private site spends at most epsilon %g at delta %g in this run",
        config.privacy.epsilon,
        config.privacy.delta,
    )


def _share(begun: Beginning, sites: FlowerSites, folder: RunFolder, results: Results) -> None:
    """Bring the weights that the run starts from to the sites, and write down which they are."""
    if begun.base is None or begun.card is None:
        if not results.data.synthetic:
            logger.info(
                "the chain starts at random; on real images pretrained weights help (chain.start-from, docs/models.md)"
            )
        return
    start = begun.architecture.start
    assert start is not None
    folder.save_base(begun)
    trained = travelling_template(begun.architecture).values()
    share = sum(tensor.numel() for tensor in trained) / count_parameters(skeleton(begun.architecture))
    logger.info(
        "the chain starts from %s (SHA-256 %s, licence %s); trained, and sent, is %s: %.3g %% of the model",
        start.name,
        start.file[:12],
        begun.card.licence,
        start.part,
        100 * share,
    )
    sent = sites.share(begun.architecture, begun.base)
    results.start = StartSummary(
        name=start.name,
        sha256=start.file,
        licence=begun.card.licence,
        source=begun.card.source,
        part=start.part,
        trained=share,
        bytes_sent=sent,
    )


def _continued(results: Results | None, data: DataSummary, folder: RunFolder, config: RunConfig) -> Results:
    """Return the results to add to: new ones, or those of a resumed run, whose data must still be the same."""
    if results is None:
        return Results(run_id=folder.state.run_id, seed=config.seed, data=data)
    if not _same(results.data, data):
        raise StartAnewError(
            f"run {folder.state.run_id} can't be resumed: the sites' data are not those it was started with; start anew"
        )
    done = len(folder.state.finished)
    logger.info("resuming run %s: %d finished pieces of work are taken as they are", folder.state.run_id, done)
    return results


def _same(before: DataSummary, now: DataSummary) -> bool:
    """Return whether a resumed run has the data it was started with, as far as an earlier build has noted it."""
    noted = {site.site: site.preparation for site in before.sites}
    sites = [
        site if noted.get(site.site) is not None else site.model_copy(update={"preparation": None})
        for site in now.sites
    ]
    return before == now.model_copy(update={"sites": sites, "source": before.source, "notes": before.notes})


def _tell_about_data(data: DataSummary) -> None:
    for site in data.sites:
        if site.val is None or site.test is None:
            logger.info("%s: about %d training cases; its policy withholds the numbers", site.site, site.train)
        else:
            logger.info("%s: %d training, %d validation, %d test images", site.site, site.train, site.val, site.test)
        for note in site.notes:
            logger.info("%s: %s", site.site, note)
    for note in data.notes:
        logger.warning("the data: %s", note)
    if data.synthetic:
        logger.info("these are synthetic phantoms: nothing here speaks about real images")


def _tell_outcome(results: Results) -> None:
    alone = [record.metrics.test.pooled.balanced_accuracy or 0.0 for record in results.alone if record.metrics]
    if alone:
        logger.info(
            "pooled test balanced accuracy: a hospital alone %.3f on average, %.3f at best",
            sum(alone) / len(alone),
            max(alone),
        )
    for name, scores in results.final.items():
        pooled = scores.pooled
        logger.info(
            "pooled test of the %s: balanced accuracy %s, macro AUC %s, n = %d, %.2f million parameters",
            name,
            shown(pooled.balanced_accuracy),
            shown(pooled.macro_auc),
            pooled.n,
            results.models[name].parameters / 1e6,
        )
    for name, looks in results.localization.items():
        if lift := looks.pooled.lift:
            logger.info(
                "where the %s looks: %.2f times chance inside the regions of interest, n = %d",
                name,
                lift.mean,
                looks.pooled.n,
            )


def _one_line_for(error: ChainwardError) -> None:
    """Let Flower report `error`, which makes the run fail, in one line instead of with a traceback."""

    def shorten(record: logging.LogRecord) -> bool:
        raised = record.exc_info[1] if record.exc_info else None
        while raised is not None and raised is not error:
            raised = raised.__cause__ or raised.__context__
        if raised is error:
            record.exc_info = record.exc_text = None
            record.msg, record.args = "The run failed: %s", (str(error),)
        return "Traceback (most recent call last)" not in record.getMessage()

    logging.getLogger("flwr").addFilter(shorten)


def _to_go_on(folder: RunFolder) -> str:
    how = folder.how_to_resume
    return f". To go on from the last finished piece of work: the same command with {how}" if how else ""


def _note_failure(folder: RunFolder, reason: str, *, resumable: bool) -> None:
    """Say in the run folder why the run ended, as far as the disk still allows."""
    try:
        folder.end("failed", reason, resumable=resumable)
        if folder.load_results() is not None:
            write_report(folder)
        if folder.how_to_resume:
            logger.info("to go on from the last finished piece of work: the same command with %s", folder.how_to_resume)
    except Exception as error:  # the reason of the failure itself must not be lost behind this one
        logger.error("the run folder could not be brought up to date: %s", error)
