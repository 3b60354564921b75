"""The chain: from site to site, each link checked, checkpointed and handed on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from chainward_server.exchange import Failure, Reply, Request
from chainward_server.progress import Progress
from chainward_server.rendezvous import Consortium
from chainward_server.results import AloneRecord, LinkRecord, LinkStatus, Results, SiteScores, TrainingSummary
from chainward_server.run_folder import RunFolder
from chainward_server.schedule import Hop, plan, site_order
from chainward_server.scoring import Split, link_metrics, score_everywhere
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError
from chainward_shared.models import Architecture, skeleton
from chainward_shared.protocol import LinkResult, LinkTask, TrainingLog
from chainward_shared.weights import StateDict, digest, from_arrays, to_arrays

logger = logging.getLogger("chainward")

ALONE_WORK, LINK_WORK = 1.0, 1.35
"""Cost of one image in one epoch without and with a predecessor, relative; only for the expected end."""


@dataclass
class Strand:
    """Where one strand is: the model it carries and the site it came from."""

    model: StateDict | None = None
    model_name: str | None = None
    site: str | None = None


@dataclass
class _Attempted:
    """What has come of one hop so far."""

    attempts: int = 0
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    model: StateDict | None = None
    training: TrainingLog | None = None
    failure: Failure | None = None


@dataclass
class ChainRun:
    """What a run's phases share."""

    consortium: Consortium
    config: RunConfig
    architecture: Architecture
    folder: RunFolder
    results: Results
    progress: Progress
    template: StateDict = field(init=False)

    def __post_init__(self) -> None:
        self.template = skeleton(self.architecture).state_dict()

    @property
    def order(self) -> list[str]:
        """The sites in the order of a lap."""
        sizes = {site: card.train for site, card in self.consortium.cards.items()}
        return site_order(self.consortium.sites, sizes, self.config.chain, self.config.seed)


def run_chain(run: ChainRun) -> str:
    """Run the whole chain and return the name of the model that came out: that of the best strand by validation.

    Raises
    ------
    ChainwardError
        A link failed and ``chain.on-failure`` is "stop", or no link at all succeeded.
    """
    turns = plan(run.order, run.config.chain.laps, run.config.chain.strands)
    total = sum(len(turn) for turn in turns)
    strands = [Strand() for _ in range(run.config.chain.strands)]
    number = 0
    for turn in turns:
        pending = []
        for hop in turn:
            number += 1
            if run.folder.is_finished(hop.key):
                _restore(run, hop, strands[hop.strand])
            else:
                pending.append((number, hop))
        if pending:
            _run_turn(run, pending, total, strands)
    finished = [link for link in run.results.links if link.metrics is not None]
    if not finished:
        reasons = "; ".join(link.reason or "" for link in run.results.links[:1])
        raise ChainwardError(f"no link of the chain succeeded: {reasons}")
    last = {link.strand: link for link in finished}
    best = max(last.values(), key=lambda link: (_validation(link), -link.strand))
    if len(last) > 1:
        logger.info("strand %d is best by validation; its model goes on", best.strand)
    return best.key


def _validation(link: LinkRecord) -> float:
    """Return the pooled validation balanced accuracy, by which strands are compared; -1 where it is unknown."""
    score = link.metrics.validation.balanced_accuracy if link.metrics else None
    return -1.0 if score is None else score


def _restore(run: ChainRun, hop: Hop, strand: Strand) -> None:
    """Take up a hop that an earlier part of the run has finished."""
    if hop.key in run.folder.state.models:
        strand.model = run.folder.load_model(hop.key, run.template)
        strand.model_name, strand.site = hop.key, hop.site


def _run_turn(run: ChainRun, pending: list[tuple[int, Hop]], total: int, strands: list[Strand]) -> None:
    """Train the hops of one turn at the same time, each with its attempts, and record them."""
    outcomes = {hop.key: _Attempted() for _, hop in pending}
    for attempt in range(1 + run.config.chain.retries):
        open_hops = {hop.site: hop for _, hop in pending if outcomes[hop.key].model is None}
        if not open_hops:
            break
        requests = {site: _link_request(run, hop, strands[hop.strand]) for site, hop in open_hops.items()}
        replies = run.consortium.exchange.stream(requests, LinkResult, run.config.federation.hop_deadline)
        for site, reply in replies:
            hop, outcome = open_hops[site], outcomes[open_hops[site].key]
            outcome.attempts = attempt + 1
            outcome.bytes_down += requests[site].bytes
            _take(run, hop, reply, outcome)
            if outcome.model is not None:
                run.folder.save_model(hop.key, outcome.model, run.architecture, run.results.data.classes)
            elif attempt < run.config.chain.retries and outcome.failure:
                logger.warning("%s; trying again", outcome.failure.reason)
    for number, hop in pending:
        _record(run, hop, outcomes[hop.key], strands[hop.strand], f"hop {number} of {total}")


def _link_request(run: ChainRun, hop: Hop, strand: Strand) -> Request:
    predecessor = strand.model
    task = LinkTask(
        hop=hop.key,
        strand=hop.strand,
        lap=hop.lap,
        architecture=run.architecture,
        recipe=run.config.link_recipe(),
        predecessor_digest=None if predecessor is None else digest(predecessor),
        simulated=run.consortium.exchange.members[hop.site].simulated,
    )
    return Request("train.link", task, {} if predecessor is None else {"predecessor": to_arrays(predecessor)})


def _take(run: ChainRun, hop: Hop, reply: Reply[LinkResult] | Failure, outcome: _Attempted) -> None:
    """Check a reply and note the model, or why there is none."""
    outcome.seconds += reply.seconds
    if isinstance(reply, Failure):
        outcome.failure = reply
        return
    outcome.bytes_up += reply.bytes
    try:
        outcome.model = checked_model(reply, hop.key, hop.site, run.template)
        outcome.training = reply.body.training
    except ChainwardError as error:
        outcome.failure = Failure(f"site '{hop.site}' sent a model that can't be used: {error}", reply.seconds)


def checked_model(reply: Reply[LinkResult], hop: str, site: str, template: StateDict) -> StateDict:
    """Return the model in a reply after checking that it is the one that was asked for.

    Raises
    ------
    ChainwardError
        It is for another hop, from another site, incomplete, damaged, or not finite.
    """
    body = reply.body
    if (body.hop, body.site) != (hop, site):
        raise ChainwardError(f"it answers hop '{body.hop}' of site '{body.site}'; expected '{hop}' of '{site}'")
    if "model" not in reply.arrays:
        raise ChainwardError("there are no arrays in it")
    state = from_arrays(reply.arrays["model"], template)
    if digest(state) != body.digest:
        raise ChainwardError("its digest is not the one stated; the message was damaged on its way")
    return state


def _record(run: ChainRun, hop: Hop, outcome: _Attempted, strand: Strand, number: str) -> None:
    """Score a finished hop everywhere, write it down and move the strand on; or note that it is missing."""
    before = next(
        (
            link.metrics.validation
            for link in reversed(run.results.links)
            if link.key == strand.model_name and link.metrics
        ),
        None,
    )
    record = LinkRecord(
        strand=hop.strand,
        lap=hop.lap,
        step=hop.step,
        site=hop.site,
        predecessor=strand.site,
        status=_status(run, outcome),
        attempts=outcome.attempts,
        seconds=outcome.seconds,
        bytes_down=outcome.bytes_down,
        bytes_up=outcome.bytes_up,
        reason=outcome.failure.reason if outcome.failure else None,
    )
    run.progress.add(link_work(run, hop.site))
    if outcome.model is None or outcome.training is None:
        run.results.links.append(record)
        if record.status == "failed":
            run.folder.write_results(run.results)
            raise ChainwardError(f"{number}: {record.reason} (chain.on-failure = 'stop')")
        run.folder.commit(run.results, hop.key)
        logger.warning("%s  %s: %s; the chain goes on without it. %s", number, hop.site, record.status, record.reason)
        return
    record.training = training_summary(outcome.training)
    record.metrics = link_metrics(score(run, run.architecture, outcome.model, ["val", "test"]))
    run.results.links.append(record)
    run.folder.commit(run.results, hop.key)
    strand.model, strand.model_name, strand.site = outcome.model, hop.key, hop.site
    logger.info(
        "%s  %s: validation balanced accuracy %s -> %s, %.1f s%s; %s",
        number,
        hop.site if run.config.chain.strands == 1 else f"{hop.site} (strand {hop.strand})",
        _score(before.balanced_accuracy if before else None),
        _score(record.metrics.validation.balanced_accuracy),
        outcome.seconds,
        f", attempt {outcome.attempts}" if outcome.attempts > 1 else "",
        run.progress.expected_end(),
    )


def _status(run: ChainRun, outcome: _Attempted) -> LinkStatus:
    if outcome.model is not None:
        return "done" if outcome.attempts == 1 else "retried"
    if run.config.chain.on_failure == "stop":
        return "failed"
    return "refused" if outcome.failure and outcome.failure.refused else "skipped"


def run_alone(run: ChainRun) -> None:
    """Train every site without the others, with the budget of its links, to compare the chain with.

    A chain of one lap has trained its first site just so already: that link is taken as it is.
    """
    laps = run.config.chain.laps
    missing = [site for site in run.consortium.sites if not run.folder.is_finished(f"alone-{site}")]
    for link in run.results.links:
        if laps == 1 and link.predecessor is None and link.metrics and link.site in missing:
            missing.remove(link.site)
            run.results.alone.append(
                AloneRecord(site=link.site, status="done", seconds=link.seconds, metrics=link.metrics)
            )
            run.folder.commit(run.results, f"alone-{link.site}")
            run.progress.add(alone_work(run, link.site))
    requests = {site: _alone_request(run, site) for site in missing}
    replies = run.consortium.exchange.stream(requests, LinkResult, run.config.federation.hop_deadline * len(missing))
    for site, reply in replies:
        _record_alone(run, site, reply)


def _alone_request(run: ChainRun, site: str) -> Request:
    task = LinkTask(
        hop=f"alone-{site}",
        strand=0,
        lap=0,
        trained_alone=True,
        architecture=run.architecture,
        recipe=run.config.link_recipe(laps=run.config.chain.laps),
        simulated=run.consortium.exchange.members[site].simulated,
    )
    return Request("train.link", task)


def _record_alone(run: ChainRun, site: str, reply: Reply[LinkResult] | Failure) -> None:
    key = f"alone-{site}"
    run.progress.add(alone_work(run, site))
    metrics, reason = None, reply.reason if isinstance(reply, Failure) else None
    if not isinstance(reply, Failure):
        try:
            state = checked_model(reply, key, site, run.template)
            metrics = link_metrics(score(run, run.architecture, state, ["val", "test"]))
        except ChainwardError as error:
            reason = f"site '{site}' alone: {error}"
    status: LinkStatus = "skipped" if reason else "done"
    run.results.alone.append(
        AloneRecord(site=site, status=status, seconds=reply.seconds, reason=reason, metrics=metrics)
    )
    run.folder.commit(run.results, key)
    if reason:
        logger.warning("%s alone: skipped. %s", site, reason)
    elif metrics:
        logger.info(
            "%s alone: validation balanced accuracy %s; %s",
            site,
            _score(metrics.validation.balanced_accuracy),
            run.progress.expected_end(),
        )


def link_work(run: ChainRun, site: str) -> float:
    """Return the cost of one link at `site`, in images times epochs, relative to training without a teacher."""
    return LINK_WORK * run.config.chain.epochs * run.consortium.cards[site].train


def alone_work(run: ChainRun, site: str) -> float:
    """Return the cost of training `site` alone, in the unit of `link_work`."""
    return ALONE_WORK * run.config.chain.epochs * run.config.chain.laps * run.consortium.cards[site].train


def score(run: ChainRun, architecture: Architecture, state: StateDict, splits: list[Split]) -> dict[Split, SiteScores]:
    """Return the scores of a model at all sites of the run."""
    federation = run.config.federation
    return score_everywhere(
        run.consortium, architecture, state, splits, threads=federation.threads, deadline=federation.hop_deadline
    )


def training_summary(log: TrainingLog) -> TrainingSummary:
    """Return what metrics.json keeps of a training."""
    return TrainingSummary(
        epochs=log.epochs,
        steps=log.steps,
        images=log.images,
        loss=log.loss,
        temperature=log.temperature,
        teacher_trust=log.teacher_trust,
        images_per_second=log.images / log.seconds if log.seconds > 0 else 0.0,
        precision=log.precision,
    )


def _score(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.3f}"
