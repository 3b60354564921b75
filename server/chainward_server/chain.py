"""The chain: from site to site, each link checked, checkpointed and handed on."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace

from chainward_server.claims import check_training
from chainward_server.context import Run
from chainward_server.decisions import best_strand, forgetting, weakest_site
from chainward_server.exchange import Failure, Reply, Request
from chainward_server.results import LinkRecord, LinkStatus, SiteScores
from chainward_server.schedule import Hop, plan
from chainward_server.scoring import link_metrics, shown
from chainward_shared.errors import ChainwardError
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import build_model
from chainward_shared.protocol import LinkResult, LinkTask, TrainingLog
from chainward_shared.weights import StateDict, digest, from_arrays, rounded, to_arrays, weighted_average

logger = logging.getLogger("chainward")


@dataclass
class Strand:
    """Where one strand is: the model it carries, the site it came from, and all sites whose links are part of it."""

    model: StateDict | None = None
    model_name: str | None = None
    site: str | None = None
    trained_at: list[str] = field(default_factory=list)


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

    @property
    def open(self) -> bool:
        """Whether asking (again) may help: there is no model yet, and the site's policy has not said no."""
        return self.model is None and not (self.failure and self.failure.final)


@dataclass(frozen=True)
class ChainOutcome:
    """What came out of the chain.

    Attributes
    ----------
    model : the weights that go on to the students
    test : their scores on every site's test images
    strands : the last model of every strand, in the order of the strands
    """

    model: StateDict
    test: SiteScores
    strands: list[StateDict]


def run_chain(run: Run) -> ChainOutcome:
    """Run the whole chain and return what came out of it, its strands merged as ``chain.merge`` says.

    Raises
    ------
    ChainwardError
        A link failed and ``chain.on-failure`` is "stop", or no link at all succeeded.
    """
    config = run.config.chain
    order = run.order
    turns = plan(order, config.laps, config.strands)
    total = sum(len(turn) for turn in turns)
    strands = [Strand() for _ in range(config.strands)]
    number = 0
    for index, turn in enumerate(turns):
        hops = turn
        if config.order == "weakest-next":
            hops = [_weakest_next(run, turn[0], turns[index - turn[0].step : index], order, strands[0])]
            turns[index] = hops
        pending = []
        for hop in hops:
            number += 1
            if run.folder.is_finished(hop.key):
                _restore(run, hop, strands[hop.strand])
            else:
                pending.append((number, hop))
        if pending:
            _run_turn(run, pending, total, strands)
        if index + 1 == len(turns) or turns[index + 1][0].lap > turn[0].lap:
            for hop in _to_revisit(run, turn[0].lap, len(order)):
                number, total = number + 1, total + 1
                if run.folder.is_finished(hop.key):
                    _restore(run, hop, strands[hop.strand])
                else:
                    _run_turn(run, [(number, hop)], total, strands)
    return _merged(run)


def _to_revisit(run: Run, lap: int, steps: int) -> list[Hop]:
    """Return a further hop for each of this lap that was skipped at a site that is to be tried again; a site that refused
    has said no. They follow the lap's `steps`, so that a resumed run finds the same."""
    skipped = [link for link in run.results.links if link.lap == lap and link.step < steps and link.status == "skipped"]
    again = [link for link in skipped if run.config.chain.on_failure_of(link.site) == "revisit"]
    return [Hop(link.strand, lap, steps + number, link.site) for number, link in enumerate(again)]


def _weakest_next(run: Run, hop: Hop, lap_so_far: list[list[Hop]], order: list[str], strand: Strand) -> Hop:
    """Return `hop` at the site where the strand's model is weakest, of those that this lap has not visited."""
    finished = next((link.site for link in run.results.links if link.key == hop.key), None)
    visited = {earlier.site for turn in lap_so_far for earlier in turn}
    remaining = [site for site in order if site not in visited]
    return replace(hop, site=finished or weakest_site(remaining, _validation_of(run, strand.model_name)))


def _validation_of(run: Run, model_name: str | None) -> dict[str, Scores]:
    """Return the validation scores, at every site, of the model that left the hop `model_name`."""
    link = next((link for link in run.results.links if link.key == model_name), None)
    return link.metrics.validation_sites if link and link.metrics else {}


def _merged(run: Run) -> ChainOutcome:
    """Return what comes of the strands' last models."""
    finished = [link for link in run.results.links if link.metrics is not None]
    if not finished:
        reasons = "; ".join(link.reason or "" for link in run.results.links[:1])
        raise ChainwardError(f"no link of the chain succeeded: {reasons}")
    last = {link.strand: link for link in finished}
    models = {strand: run.folder.load_model(last[strand].key, run.template) for strand in sorted(last)}
    if run.config.chain.merge == "average" and len(models) > 1:
        average = weighted_average(list(models.values()), [1.0] * len(models))
        average = rounded(average, run.config.federation.transfer)
        logger.info("the weights of %d strands are averaged", len(models))
        return ChainOutcome(average, run.score(run.architecture, average, ["test"])["test"], list(models.values()))
    best = best_strand({strand: link.metrics.validation for strand, link in last.items() if link.metrics})
    if len(last) > 1:
        logger.info("strand %d is best by validation; its model goes on", best)
    metrics = last[best].metrics
    assert metrics is not None
    return ChainOutcome(models[best], metrics.test, list(models.values()))


def _restore(run: Run, hop: Hop, strand: Strand) -> None:
    """Take up a hop that an earlier part of the run has finished."""
    if hop.key in run.folder.state.models:
        strand.model = run.folder.load_model(hop.key, run.template)
        strand.model_name, strand.site = hop.key, hop.site
        strand.trained_at.append(hop.site)


def _run_turn(run: Run, pending: list[tuple[int, Hop]], total: int, strands: list[Strand]) -> None:
    """Train the hops of one turn at the same time, each with its attempts, and record them."""
    outcomes = {hop.key: _Attempted() for _, hop in pending}
    for attempt in range(1 + run.config.chain.retries):
        open_hops = {hop.site: hop for _, hop in pending if outcomes[hop.key].open}
        if not open_hops:
            break
        requests = {site: _link_request(run, hop, strands[hop.strand]) for site, hop in open_hops.items()}
        federation = run.config.federation
        replies = run.consortium.exchange.stream(
            requests, LinkResult, federation.hop_deadline, patience=federation.patience
        )
        for site, reply in replies:
            hop, outcome = open_hops[site], outcomes[open_hops[site].key]
            outcome.attempts = attempt + 1
            outcome.bytes_down += requests[site].bytes
            _take(run, hop, reply, outcome, strands[hop.strand].model)
            if outcome.model is not None:
                data = run.results.data
                run.folder.save_model(hop.key, outcome.model, run.architecture, data.classes, data.task)
            elif attempt < run.config.chain.retries and outcome.failure and outcome.open:
                logger.warning("%s; trying again", outcome.failure.reason)
    for number, hop in pending:
        _record(run, hop, outcomes[hop.key], strands[hop.strand], f"hop {number} of {total}")


def _link_request(run: Run, hop: Hop, strand: Strand) -> Request:
    predecessor = strand.model
    task = LinkTask(
        run_id=run.folder.state.run_id,
        hop=hop.key,
        strand=hop.strand,
        lap=hop.lap,
        architecture=run.architecture,
        recipe=run.config.link_recipe(),
        predecessor_digest=None if predecessor is None else digest(predecessor),
        seen_head=run.privacy.seen_head(hop.site),
        simulated=run.consortium.exchange.members[hop.site].simulated,
    )
    return Request("train.link", task, {} if predecessor is None else {"predecessor": to_arrays(predecessor)})


def _take(run: Run, hop: Hop, reply: Reply[LinkResult] | Failure, outcome: _Attempted, start: StateDict | None) -> None:
    """Check a reply and note the model, or why there is none. `start`: what the link started from; None: the first one."""
    outcome.seconds += reply.seconds
    if isinstance(reply, Failure):
        outcome.failure = reply
        return
    outcome.bytes_up += reply.bytes
    try:
        model = checked_model(run, reply, hop.key, hop.site)
        _check_drift(run, model, start)
        outcome.model = model
        outcome.training = reply.body.training
    except ChainwardError as error:
        outcome.failure = Failure(f"site '{hop.site}' sent a model that can't be used: {error}", reply.seconds)


def _check_drift(run: Run, model: StateDict, start: StateDict | None) -> None:
    """Refuse weights that are implausibly far from those that the link started with.

    Raises
    ------
    ChainwardError
        They are further than ``chain.max-drift`` times the length of the latter.
    """
    if run.config.chain.start == "fresh" or start is None:
        start = dict(build_model(run.architecture, run.config.seed).state_dict())
    names = [name for name, tensor in start.items() if tensor.is_floating_point()]
    moved = math.sqrt(sum(float((model[name].double() - start[name].double()).square().sum()) for name in names))
    length = math.sqrt(sum(float(start[name].double().square().sum()) for name in names))
    if moved > run.config.chain.max_drift * length:
        raise ChainwardError(
            f"its weights are {moved / length:.3g} times their former length away from where it started; "
            f"chain.max-drift allows {run.config.chain.max_drift:g}"
        )


def checked_model(run: Run, reply: Reply[LinkResult], hop: str, site: str, *, laps: int = 1) -> StateDict:
    """Return the model in a reply after checking that it is the one that was asked for; keep the privacy statement.

    Raises
    ------
    ChainwardError
        It is for another hop, from another site, incomplete, damaged, or not finite, or its privacy statement is; or it was
        trained otherwise than it was asked for.
    """
    body, asked = reply.body, run.config.link_recipe(laps=laps).epochs
    if (body.hop, body.site) != (hop, site):
        raise ChainwardError(f"it answers hop '{body.hop}' of site '{body.site}'; expected '{hop}' of '{site}'")
    check_training(body.training, run.consortium.cards[site], asked, run.folder.age)
    if "model" not in reply.arrays:
        raise ChainwardError("there are no arrays in it")
    state = from_arrays(reply.arrays["model"], run.template)
    if digest(state) != body.digest:
        raise ChainwardError("its digest is not the one stated; the message was damaged on its way")
    run.privacy.take(body.statement, site, hop)
    return state


def _record(run: Run, hop: Hop, outcome: _Attempted, strand: Strand, number: str) -> None:
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
        status=_status(run, hop.site, outcome),
        attempts=outcome.attempts,
        seconds=outcome.seconds,
        bytes_down=outcome.bytes_down,
        bytes_up=outcome.bytes_up,
        reason=outcome.failure.reason if outcome.failure else None,
    )
    run.progress.add(run.link_work(hop.site))
    if outcome.model is None or outcome.training is None:
        run.results.links.append(record)
        if record.status == "failed":
            run.folder.write_results(run.results)
            raise ChainwardError(f"{number}: {record.reason} (chain.on-failure = 'stop' at this site)")
        run.folder.commit(run.results, hop.key)
        logger.warning("%s  %s: %s; the chain goes on without it. %s", number, hop.site, record.status, record.reason)
        return
    metrics = link_metrics(run.score(run.architecture, outcome.model, ["val", "test"]))
    forgot = forgetting(strand.trained_at, _validation_of(run, strand.model_name), metrics.validation_sites)
    if forgot is not None and forgot.lost > run.config.chain.max_forgetting:
        record.status = "refused"
        record.reason = (
            f"the link lowers the validation balanced accuracy of the sites before it from {forgot.before:.3f} to "
            f"{forgot.after:.3f}, by more than chain.max-forgetting = {run.config.chain.max_forgetting:g}"
        )
        run.results.links.append(record)
        run.folder.drop_model(hop.key)
        run.folder.commit(run.results, hop.key)
        logger.warning("%s  %s: refused; the chain goes on without it. %s", number, hop.site, record.reason)
        return
    record.training, record.metrics = outcome.training, metrics
    run.results.links.append(record)
    run.folder.commit(run.results, hop.key)
    strand.model, strand.model_name, strand.site = outcome.model, hop.key, hop.site
    strand.trained_at.append(hop.site)
    logger.info(
        "%s  %s: validation balanced accuracy %s -> %s, %.1f s%s; %s",
        number,
        hop.site if run.config.chain.strands == 1 else f"{hop.site} (strand {hop.strand})",
        shown(before.balanced_accuracy if before else None),
        shown(record.metrics.validation.balanced_accuracy),
        outcome.seconds,
        f", attempt {outcome.attempts}" if outcome.attempts > 1 else "",
        run.progress.expected_end(),
    )


def _status(run: Run, site: str, outcome: _Attempted) -> LinkStatus:
    if outcome.model is not None:
        return "done" if outcome.attempts == 1 else "retried"
    if run.config.chain.on_failure_of(site) == "stop":
        return "failed"
    return "refused" if outcome.failure and outcome.failure.refused else "skipped"
