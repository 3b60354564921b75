"""Scores of a model at every site, and pooled over them."""

from __future__ import annotations

import logging
from typing import Literal

from chainward_server.claims import check_counted, check_looks
from chainward_server.exchange import Failure, Reply, Request
from chainward_server.privacy import RunPrivacy
from chainward_server.rendezvous import Consortium
from chainward_server.results import LinkMetrics, SiteLocalisation, SiteScores
from chainward_shared.errors import ChainwardError, ModelError, ProtocolError, StatementError, WeightsError
from chainward_shared.evaluation.attention_maps import check_mappable
from chainward_shared.evaluation.classification import PredictionCounts, check_scores, counts_from_arrays, pool
from chainward_shared.evaluation.localisation import pool_sums
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import Architecture, skeleton
from chainward_shared.protocol import EvaluateResult, EvaluateTask
from chainward_shared.weights import StateDict, digest, to_arrays

logger = logging.getLogger("chainward")

Split = Literal["val", "test"]

NO_SCORES = Scores(n=0, accuracy=None, balanced_accuracy=None, macro_auc=None, ece=None)
"""Of a model that no site scores for others to see."""


def score_everywhere(
    consortium: Consortium,
    privacy: RunPrivacy,
    architecture: Architecture,
    state: StateDict,
    splits: list[Split],
    *,
    run_id: str,
    threads: int,
    deadline: float,
) -> dict[Split, SiteScores]:
    """Return the scores of a model on the images of every site, for each of `splits`.

    A site that does not answer is left out, with a warning; so is one whose policy withholds its scores. Where all do, the
    pooled scores are of no images.

    Raises
    ------
    ChainwardError
        No site answered.
    """
    task = EvaluateTask(run_id=run_id, architecture=architecture, splits=splits, threads=threads, digest=digest(state))
    scores: dict[Split, dict[str, Scores]] = {split: {} for split in splits}
    counts: dict[Split, list[PredictionCounts]] = {split: [] for split in splits}
    classes, kind = architecture.num_classes, consortium.any_card.task
    problems = []
    for site, reply in _ask_all(consortium, privacy, task, state, deadline).items():
        if isinstance(reply, Failure):
            problems.append(reply.reason)
            continue
        if reply.body.release == "withhold":
            logger.debug("site '%s' withholds its scores, as its policy says", site)
            continue
        try:
            if reply.body.release == "noised":
                privacy.take(reply.body.statement, site, task.hop)
            received = {split: counts_from_arrays(reply.arrays[f"counts_{split}"], classes, kind) for split in splits}
            found = {split: reply.body.scores[split] for split in splits}
            check_counted(found, consortium.cards[site])
            declared = consortium.cards[site].class_counts if reply.body.release == "exact" else {}
            for split in splits:
                check_scores(found[split], received[split], declared.get(split))
        except (KeyError, ProtocolError, WeightsError, StatementError) as error:
            problems.append(f"site '{site}' sent scores that can't be used: {error}")
            continue
        for split in splits:
            counts[split].append(received[split])
            scores[split][site] = found[split]
    for problem in problems:
        logger.warning("scores are without a site: %s", problem)
    if len(problems) == len(consortium.sites):
        raise ChainwardError(f"no site scored the model: {problems[0]}")
    return {
        split: SiteScores(sites=scores[split], pooled=pool(counts[split]) if counts[split] else NO_SCORES)
        for split in splits
    }


def localise_everywhere(
    consortium: Consortium,
    privacy: RunPrivacy,
    architecture: Architecture,
    state: StateDict,
    *,
    run_id: str,
    threads: int,
    deadline: float,
) -> SiteLocalisation | None:
    """Return how well a model's attention finds the regions of interest of every site's test images.

    None where no site has regions, or where such a backbone's attention can't be read. A site that does not answer is
    left out, with a warning.
    """
    try:
        check_mappable(skeleton(architecture))
    except ModelError as error:
        logger.info("where the model looks is not scored: %s", error)
        return None
    task = EvaluateTask(
        run_id=run_id, architecture=architecture, splits=[], localisation=True, threads=threads, digest=digest(state)
    )
    sums = {}
    for site, reply in _ask_all(consortium, privacy, task, state, deadline).items():
        if isinstance(reply, Failure):
            logger.warning("where the model looks is scored without a site: %s", reply.reason)
            continue
        found = reply.body.localisation
        if found is None or not found.n:
            continue
        try:
            check_looks(found, consortium.cards[site], architecture.image_size)
        except ProtocolError as error:
            logger.warning("where the model looks is scored without a site: site '%s': %s", site, error)
            continue
        sums[site] = found
    if not sums:
        return None
    return SiteLocalisation(
        sites={site: part.scores() for site, part in sums.items()}, pooled=pool_sums(sums.values()).scores()
    )


def _ask_all(
    consortium: Consortium, privacy: RunPrivacy, task: EvaluateTask, state: StateDict, deadline: float
) -> dict[str, Reply[EvaluateResult] | Failure]:
    arrays = {"model": to_arrays(state)}
    requests = {
        site: Request(
            "evaluate",
            task.model_copy(
                update={
                    "simulated": consortium.exchange.members[site].simulated,
                    "seen_head": privacy.seen_head(site),
                }
            ),
            arrays,
        )
        for site in consortium.sites
    }
    return consortium.exchange.ask(requests, EvaluateResult, deadline)


def link_metrics(scores: dict[Split, SiteScores]) -> LinkMetrics:
    """Return what is kept of the scores of a model that left a link."""
    validation = scores["val"]
    return LinkMetrics(test=scores["test"], validation=validation.pooled, validation_sites=validation.sites)


def shown(value: float | None) -> str:
    """Return a score for the log, a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"
