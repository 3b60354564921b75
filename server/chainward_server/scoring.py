"""Scores of a model at every site, and pooled over them."""

from __future__ import annotations

import logging
from typing import Literal

from chainward_server.exchange import Failure, Request
from chainward_server.rendezvous import Consortium
from chainward_server.results import LinkMetrics, SiteScores
from chainward_shared.errors import ChainwardError, WeightsError
from chainward_shared.evaluation.classification import PredictionCounts, counts_from_arrays, pool
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import Architecture
from chainward_shared.protocol import EvaluateResult, EvaluateTask
from chainward_shared.weights import StateDict, digest, to_arrays

logger = logging.getLogger("chainward")

Split = Literal["val", "test"]


def score_everywhere(
    consortium: Consortium,
    architecture: Architecture,
    state: StateDict,
    splits: list[Split],
    *,
    threads: int,
    deadline: float,
) -> dict[Split, SiteScores]:
    """Return the scores of a model on the images of every site, for each of `splits`.

    A site that does not answer is left out, with a warning.

    Raises
    ------
    ChainwardError
        No site answered.
    """
    arrays = {"model": to_arrays(state)}
    checksum = digest(state)
    requests = {
        site: Request(
            "evaluate",
            EvaluateTask(
                architecture=architecture,
                splits=splits,
                threads=threads,
                digest=checksum,
                simulated=consortium.exchange.members[site].simulated,
            ),
            arrays,
        )
        for site in consortium.sites
    }
    scores: dict[Split, dict[str, Scores]] = {split: {} for split in splits}
    counts: dict[Split, list[PredictionCounts]] = {split: [] for split in splits}
    classes = architecture.num_classes
    problems = []
    for site, reply in consortium.exchange.ask(requests, EvaluateResult, deadline).items():
        if isinstance(reply, Failure):
            problems.append(reply.reason)
            continue
        try:
            received = {split: counts_from_arrays(reply.arrays[f"counts_{split}"], classes) for split in splits}
            found = {split: reply.body.scores[split] for split in splits}
        except (KeyError, WeightsError) as error:
            problems.append(f"site '{site}' sent scores that can't be used: {error}")
            continue
        for split in splits:
            counts[split].append(received[split])
            scores[split][site] = found[split]
    for problem in problems:
        logger.warning("scores are without a site: %s", problem)
    if len(problems) == len(requests):
        raise ChainwardError(f"no site scored the model: {problems[0]}")
    return {split: SiteScores(sites=scores[split], pooled=pool(counts[split])) for split in splits}


def link_metrics(scores: dict[Split, SiteScores]) -> LinkMetrics:
    """Return what is kept of the scores of a model that left a link."""
    return LinkMetrics(test=scores["test"], validation=scores["val"].pooled)


def shown(value: float | None) -> str:
    """Return a score for the log, a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"
