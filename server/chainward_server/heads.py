"""Statistics rounds: a classifier head out of the sums of all sites, for the model that is at hand."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from chainward_server.attempts import attempted
from chainward_server.claims import check_sums
from chainward_server.context import Run
from chainward_server.results import HeadRecord
from chainward_server.scoring import link_metrics, shown
from chainward_server.sites import Failure, Trained, Work
from chainward_shared.config import ChainConfig
from chainward_shared.discriminant import Head, HeadSums, discriminant
from chainward_shared.errors import ChainwardError
from chainward_shared.models.heads import check_head, with_head
from chainward_shared.protocol import StatisticsResult, StatisticsTask
from chainward_shared.weights import StateDict, digest, rounded

logger = logging.getLogger("chainward")

FURTHEST = 10.0
"""A site is left out whose embeddings are longer, in root mean square, than the median site's by more than this factor: one
image whose embedding was made huge would otherwise decide the covariance of all."""


@dataclass(frozen=True)
class _Sums:
    """What one site has sent."""

    train: HeadSums
    validation: HeadSums

    @property
    def length(self) -> float:
        """Root mean square of the training embeddings' lengths."""
        return math.sqrt(float(self.train.second_moments.trace()) / max(1.0, float(self.train.images)))


def with_statistics_head(run: Run, key: str, state: StateDict) -> StateDict:
    """Return a model with the head that follows from the sums of all sites that answer over its embeddings.

    The round called `key` is asked for once: a finished one is taken as it is. Sums are used and forgotten; none of a single site
    is written down.

    Raises
    ------
    ModelError
        The classifier of this backbone isn't one linear layer.
    ChainwardError
        No site answered, or the images of those that did are all of one class.
    """
    check_head(run.architecture)
    if run.checkpoints.is_finished(key) and run.checkpoints.has_model(key):
        return run.checkpoints.load_model(key, run.template)
    record, sums = _asked(run, key, state)
    head = _solved(run, key, sums)
    record.shrinkage = head.shrinkage
    model = rounded(with_head(state, run.architecture, head), run.config.federation.transfer)
    run.save_model(key, model, run.architecture)
    if run.score_all:
        record.metrics = link_metrics(run.score(run.architecture, model, ["val", "test"]))
    run.results.heads.append(record)
    run.checkpoints.commit(run.results, key)
    logger.info(
        "statistics round '%s': %d of %d sites, %d images, shrinkage %.3g%s",
        key,
        len(record.sites),
        len(run.sites.ids),
        record.images,
        head.shrinkage,
        f"; validation balanced accuracy {shown(record.metrics.validation.balanced_accuracy)}"
        if record.metrics
        else "",
    )
    return model


def prior_strength(chain: ChainConfig) -> float:
    """Return how equal the priors of a head from statistics are, so that they agree with what the links are trained to."""
    return {"site-prior": chain.prior_strength, "weighted": 1.0, "none": 0.0}[chain.class_balance]


def _asked(run: Run, key: str, state: StateDict) -> tuple[HeadRecord, dict[str, _Sums]]:
    """Ask all sites, and return what came of it and the sums that can be used, in the order of the sites."""
    task = StatisticsTask(
        run_id=run.checkpoints.run_id,
        hop=key,
        architecture=run.architecture,
        label_fraction=run.config.chain.label_fraction,
        seed=run.config.seed,
        threads=run.config.federation.threads,
        digest=digest(state),
    )
    started = time.monotonic()

    def ask(sites: Sequence[str], attempt: int) -> Iterator[tuple[str, Trained[StatisticsResult] | Failure]]:
        return run.sites.statistics({site: Work(task, {"model": state}) for site in sites})

    def check(site: str, answer: Trained[StatisticsResult]) -> None:
        result = answer.result
        if (result.hop, result.site) != (key, site):
            raise ChainwardError(
                f"it answers round '{result.hop}' of site '{result.site}'; expected '{key}' of '{site}'"
            )
        if digest(answer.model) != result.digest:
            raise ChainwardError("its digest is not the one stated; the message was damaged on its way")
        card = run.sites.cards[site]
        check_sums(HeadSums.from_state(answer.model, "train"), "train", result.images, card)
        check_sums(HeadSums.from_state(answer.model, "val"), "val", result.validation, card)

    outcomes = attempted(run.sites.ids, ask, check, retries=run.config.chain.retries)
    sums = {
        site: _Sums(
            HeadSums.from_state(outcome.answer.model, "train"), HeadSums.from_state(outcome.answer.model, "val")
        )
        for site, outcome in outcomes.items()
        if outcome.answer is not None
    }
    failed = {
        site: outcome.failure.reason if outcome.failure else "no reason given"
        for site, outcome in outcomes.items()
        if outcome.answer is None
    }
    failed |= _implausible(sums)
    for reason in failed.values():
        logger.warning("statistics round '%s' goes on without a site: %s", key, reason)
    sums = {site: of for site, of in sums.items() if site not in failed}
    return HeadRecord(
        key=key,
        sites=list(sums),
        failed=failed,
        unreached=[site for site, outcome in outcomes.items() if outcome.unreached],
        images=round(sum(float(of.train.images) for of in sums.values())),
        validation=round(sum(float(of.validation.images) for of in sums.values())),
        seconds=time.monotonic() - started,
        bytes_down=sum(outcome.bytes_down for outcome in outcomes.values()),
        bytes_up=sum(outcome.bytes_up for outcome in outcomes.values()),
    ), sums


def _implausible(sums: Mapping[str, _Sums]) -> dict[str, str]:
    """Return the sites whose embeddings are far longer than those of the others, and why they are left out."""
    if len(sums) < 3:
        return {}
    middle = statistics.median_low(of.length for of in sums.values())
    return {
        site: f"site '{site}': its embeddings are {of.length / middle:.3g} times as long as those of the median site; at most "
        f"{FURTHEST:g} times is taken"
        for site, of in sums.items()
        if middle > 0 and of.length > FURTHEST * middle
    }


def _solved(run: Run, key: str, sums: Mapping[str, _Sums]) -> Head:
    card = run.sites.any_card
    none = HeadSums.none(len(card.classes), check_head(run.architecture))
    train = sum((of.train for of in sums.values()), none)
    validation = sum((of.validation for of in sums.values()), none)
    if not sums:
        raise ChainwardError(
            f"statistics round '{key}': no site took part in it (the log says why); set chain.head = 'trained', or resume the "
            "run when they can"
        )
    multilabel = card.task == "multilabel"
    if not multilabel and int((train.counts > 0).sum()) < 2:
        raise ChainwardError(f"statistics round '{key}': all images of the sites that answered are of one class")
    return discriminant(train, validation, multilabel=multilabel, prior_strength=prior_strength(run.config.chain))
