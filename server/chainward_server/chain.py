"""The chain: from site to site, each link checked, checkpointed and handed on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from chainward_server.aggregation import check_drift
from chainward_server.attempts import Attempted, attempted, check_answer
from chainward_server.claims import check_training
from chainward_server.context import Run
from chainward_server.decisions import best_strand, forgetting, weakest_site
from chainward_server.heads import with_statistics_head
from chainward_server.results import LinkMetrics, LinkRecord, LinkStatus, SiteScores
from chainward_server.schedule import Hop, schedule
from chainward_server.scoring import link_metrics, shown
from chainward_server.sites import Failure, Trained, Work
from chainward_shared.errors import ChainwardError, StartAnewError
from chainward_shared.hops import END_HEAD, START_HEAD, link_head_key
from chainward_shared.protocol import LinkResult, LinkTask
from chainward_shared.weights import StateDict, digest, rounded, weighted_average

logger = logging.getLogger("chainward")


@dataclass
class Strand:
    """Where one strand is: the model it carries, the site it came from, and all sites whose links are part of it."""

    model: StateDict | None = None
    model_name: str | None = None
    site: str | None = None
    trained_at: list[str] = field(default_factory=list)

    def move_on(self, hop: Hop, model: StateDict, name: str) -> None:
        """Take up the model that a hop left, and what it is called."""
        self.model, self.model_name, self.site = model, name, hop.site
        self.trained_at.append(hop.site)


@dataclass(frozen=True)
class ChainOutcome:
    """What came out of the chain.

    Attributes
    ----------
    model : the weights that go on to the students
    test : their scores on every site's test images; None where not all models are scored
    strands : the last model of every strand, in the order of the strands
    """

    model: StateDict
    test: SiteScores | None
    strands: list[StateDict]


def run_chain(run: Run) -> ChainOutcome:
    """Run the whole chain and return what came out of it, its strands merged as ``chain.merge`` says.

    Raises
    ------
    ChainwardError
        A link failed and ``chain.on-failure`` is "stop", or no link at all succeeded.
    """
    config = run.config.chain
    if config.laps == 0:
        return _without_links(run)
    order = run.order
    turns = schedule(order, config.laps, config.strands)
    total = sum(len(turn) for turn in turns)
    strands = _beginnings(run)
    number = 0
    for index, turn in enumerate(turns):
        hops = turn
        if config.order == "weakest-next":
            hops = [_weakest_next(run, turn[0], turns[index - turn[0].step : index], order, strands[0])]
            turns[index] = hops
        _run_turn(run, [(number + place, hop) for place, hop in enumerate(hops, start=1)], total, strands)
        number += len(hops)
        if index + 1 == len(turns) or turns[index + 1][0].lap > turn[0].lap:
            for hop in _to_revisit(run, turn[0].lap, len(order)):
                number, total = number + 1, total + 1
                _run_turn(run, [(number, hop)], total, strands)
    for hop in _to_make_up_for(run, turns[-1][0].lap, len(order)):
        number, total = number + 1, total + 1
        _run_turn(run, [(number, hop)], total, strands)
    return _released(run, _merged(run))


def _without_links(run: Run) -> ChainOutcome:
    """Return the model that the chain would start from, with its head from statistics."""
    return _with_last_head(run, rounded(run.initial(), run.config.federation.transfer))


def _with_last_head(run: Run, state: StateDict) -> ChainOutcome:
    """Return a model with its head from statistics, as that with which the chain ends."""
    run.results.released = END_HEAD
    model = with_statistics_head(run, END_HEAD, state)
    metrics = run.metrics(END_HEAD)
    return ChainOutcome(model, metrics.test if metrics else None, [model])


def _beginnings(run: Run) -> list[Strand]:
    """Return where the strands are before the first link: at a model of which only the head is known, or at none."""
    count = run.config.chain.strands
    if run.config.chain.head == "trained":
        return [Strand() for _ in range(count)]
    model = with_statistics_head(run, START_HEAD, rounded(run.initial(), run.config.federation.transfer))
    return [Strand(model, START_HEAD) for _ in range(count)]


def _left_by(run: Run, key: str) -> str:
    """Return what the model is called that a hop leaves: its own, or the one with a head from statistics after it."""
    return link_head_key(key) if run.config.chain.refit == "links" else key


def _released(run: Run, outcome: ChainOutcome) -> ChainOutcome:
    """Return what the chain leaves: with its head from statistics, where that is asked."""
    config = run.config.chain
    if config.head == "trained" or config.refit in ("no", "links"):
        return outcome
    ended = _with_last_head(run, outcome.model)
    logger.info("the chain leaves the model of '%s'", END_HEAD)
    return replace(ended, strands=outcome.strands)


def _to_revisit(run: Run, lap: int, steps: int) -> list[Hop]:
    """Return a further hop for each of this lap that was skipped at a site that is to be tried again; a site that refused
    has said no. They follow the lap's `steps`, so that a resumed run finds the same."""
    skipped = [link for link in run.results.links if link.lap == lap and link.step < steps and link.status == "skipped"]
    again = [link for link in skipped if run.config.chain.on_failure_of(link.site) == "revisit"]
    return [Hop(link.strand, lap, steps + number, link.site) for number, link in enumerate(again)]


def _to_make_up_for(run: Run, lap: int, steps: int) -> list[Hop]:
    """Return, in a resumed run, a further hop for each whose site was not reached before; they follow all others of the lap."""
    steps += len(_to_revisit(run, lap, steps))
    missing = [link for key in run.results.make_up if (link := run.link(key))]
    return [Hop(link.strand, lap, steps + number, link.site) for number, link in enumerate(missing)]


def _weakest_next(run: Run, hop: Hop, lap_so_far: list[list[Hop]], order: list[str], strand: Strand) -> Hop:
    """Return `hop` at the site where the strand's model is weakest, of those that this lap has not visited."""
    if finished := run.link(hop.key):
        return replace(hop, site=finished.site)
    visited = {earlier.site for turn in lap_so_far for earlier in turn}
    remaining = [site for site in order if site not in visited]
    validation = run.validation(strand.model_name).sites if strand.model_name else {}
    return replace(hop, site=weakest_site(remaining, validation))


def _merged(run: Run) -> ChainOutcome:
    """Return what comes of the strands' last models."""
    last = {link.strand: link for link in run.results.links if link.succeeded}
    if not last:
        reasons = "; ".join(link.reason or "" for link in run.results.links[:1])
        helps = any(link.unreached for link in run.results.links)
        raise (ChainwardError if helps else StartAnewError)(f"no link of the chain succeeded: {reasons}")
    names = {strand: _left_by(run, last[strand].key) for strand in sorted(last)}
    models = {strand: run.checkpoints.load_model(name, run.template) for strand, name in names.items()}
    if run.config.chain.merge == "average" and len(models) > 1:
        average = weighted_average(list(models.values()), [1.0] * len(models))
        average = rounded(average, run.config.federation.transfer)
        logger.info("the weights of %d strands are averaged", len(models))
        test = run.score(run.architecture, average, ["val", "test"])["test"] if run.score_all else None
        return ChainOutcome(average, test, list(models.values()))
    (best,) = last if len(last) == 1 else (_best_strand(run, names),)
    metrics = run.metrics(names[best])
    return ChainOutcome(models[best], metrics.test if metrics else None, list(models.values()))


def _best_strand(run: Run, names: dict[int, str]) -> int:
    best = best_strand({strand: run.validation(name).pooled for strand, name in names.items()})
    logger.info("strand %d is best by validation; its model goes on", best)
    return best


def _run_turn(run: Run, turn: Sequence[tuple[int, Hop]], total: int, strands: list[Strand]) -> None:
    """Train the hops of one turn at the same time, each with its attempts, and record them.

    Those that an earlier part of the run has finished are taken up as they are.
    """
    pending = [(number, hop) for number, hop in turn if not run.checkpoints.is_finished(hop.key)]
    for _, hop in turn:
        if run.checkpoints.is_finished(hop.key) and run.checkpoints.has_model(hop.key):
            name, model = _left_by(run, hop.key), run.checkpoints.load_model(hop.key, run.template)
            if name != hop.key:  # kept too, unless a site was not reached for it
                model = with_statistics_head(run, name, model)
            strands[hop.strand].move_on(hop, model, name)
    hops, config = {hop.site: hop for _, hop in pending}, run.config.chain

    def ask(sites: Sequence[str], attempt: int) -> Iterator[tuple[str, Trained[LinkResult] | Failure]]:
        return run.sites.train_links({site: _link_work(run, hops[site], strands[hops[site].strand]) for site in sites})

    def check(site: str, answer: Trained[LinkResult]) -> None:
        check_link(run, answer, hops[site].key, site)
        start = strands[hops[site].strand].model
        if config.start == "fresh" or start is None:
            start = run.initial()
        check_drift(answer.model, start, config.max_drift, "chain.max-drift")

    def keep(site: str, answer: Trained[LinkResult]) -> None:
        run.save_model(hops[site].key, answer.model, run.architecture)

    outcomes = attempted(hops, ask, check, retries=config.retries, keep=keep)
    for number, hop in pending:
        _record(run, hop, outcomes[hop.site], strands[hop.strand], f"hop {number} of {total}")


def _link_work(run: Run, hop: Hop, strand: Strand) -> Work[LinkTask]:
    predecessor = strand.model
    task = LinkTask(
        run_id=run.checkpoints.run_id,
        hop=hop.key,
        strand=hop.strand,
        lap=hop.lap,
        architecture=run.architecture,
        recipe=run.config.link_recipe(),
        predecessor_digest=None if predecessor is None else digest(predecessor),
        seen_head=run.privacy.seen_head(hop.site),
    )
    return Work(task, {} if predecessor is None else {"predecessor": predecessor})


def check_link(run: Run, answer: Trained[LinkResult], hop: str, site: str, *, laps: int = 1) -> None:
    """Check that a model is the one that was asked for; keep the privacy statement that came with it.

    Raises
    ------
    ChainwardError
        It is for another hop, from another site, or damaged, or its privacy statement is; or it was trained otherwise than
        it was asked for.
    """
    result, asked = answer.result, run.config.link_recipe(laps=laps).epochs
    check_answer(answer, "hop", hop, site)
    check_training(result.training, run.sites.cards[site], asked, run.checkpoints.age)
    run.privacy.take(result.statement, site, hop)


def _record(run: Run, hop: Hop, outcome: Attempted[LinkResult], strand: Strand, number: str) -> None:
    """Write a hop down and move its strand on, or note why the chain goes on without it."""
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
        unreached=outcome.unreached,
    )
    if outcome.answer is None:
        _go_on_without(run, record, number)
        return
    metrics, model, name = None, outcome.answer.model, _left_by(run, hop.key)
    if run.score_all:
        metrics = link_metrics(run.score(run.architecture, model, ["val", "test"]))
    if name != hop.key:
        model = with_statistics_head(run, name, model)
    if reason := _forgotten(run, strand, name, metrics if name == hop.key else None):
        record.status, record.reason = "refused", reason
        for dropped in {hop.key, name}:
            run.checkpoints.drop_model(dropped)
        _go_on_without(run, record, number)
        return
    record.training, record.metrics = outcome.answer.result.training, metrics
    run.results.links.append(record)
    run.checkpoints.commit(run.results, hop.key)
    _tell(run, record, number, strand)
    strand.move_on(hop, model, name)


def _go_on_without(run: Run, record: LinkRecord, number: str) -> None:
    """Write down a hop that left no model.

    Raises
    ------
    ChainwardError
        The run must not go on without it.
    """
    run.results.links.append(record)
    if record.status == "failed":
        run.checkpoints.write_results(run.results)
        raise ChainwardError(f"{number}: {record.reason} (chain.on-failure = 'stop' at this site)")
    run.checkpoints.commit(run.results, record.key)
    logger.warning("%s  %s: %s; the chain goes on without it. %s", number, record.site, record.status, record.reason)


def _forgotten(run: Run, strand: Strand, key: str, metrics: LinkMetrics | None) -> str | None:
    """Return why a link must be refused for what it makes the model forget; None if it need not be."""
    allowed = run.config.chain.max_forgetting
    if allowed == 1 or strand.model_name is None:  # no score can fall by more
        return None
    after = metrics.validation_sites if metrics else run.validation(key).sites
    forgot = forgetting(strand.trained_at, run.validation(strand.model_name).sites, after)
    if forgot is None or forgot.lost <= allowed:
        return None
    return (
        f"the link lowers the validation balanced accuracy of the sites before it from {forgot.before:.3f} to "
        f"{forgot.after:.3f}, by more than chain.max-forgetting = {allowed:g}"
    )


def _tell(run: Run, record: LinkRecord, number: str, strand: Strand) -> None:
    before, scores = run.metrics(strand.model_name), ""
    if record.metrics is not None:
        earlier = before.validation.balanced_accuracy if before else None
        now = record.metrics.validation.balanced_accuracy
        scores = f"validation balanced accuracy {shown(earlier)} -> {shown(now)}, "
    logger.info(
        "%s  %s: %s%.1f s%s; %s",
        number,
        record.site if run.config.chain.strands == 1 else f"{record.site} (strand {record.strand})",
        scores,
        record.seconds,
        f", attempt {record.attempts}" if record.attempts > 1 else "",
        run.expected_end("chain"),
    )


def _status(run: Run, site: str, outcome: Attempted[LinkResult]) -> LinkStatus:
    if outcome.answer is not None:
        return "done" if outcome.attempts == 1 else "retried"
    if run.config.chain.on_failure_of(site) == "stop":
        return "failed"
    return "refused" if outcome.failure and outcome.failure.refused else "skipped"
