"""Statistics rounds: a classifier head out of the sums of all sites, for the model that is at hand."""

from __future__ import annotations

import functools
import logging
import math
import operator
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from chainward_server.attempts import attempted, check_answer
from chainward_server.claims import check_sums
from chainward_server.context import Run
from chainward_server.private_heads import private_head
from chainward_server.results import HeadRecord
from chainward_server.scoring import link_metrics, shown
from chainward_server.secure_rounds import card_of_all, summed_everywhere
from chainward_server.sites import Failure, Summed, Trained, Work
from chainward_shared.discriminant import Head, HeadSums, class_weights, discriminant
from chainward_shared.errors import ChainwardError
from chainward_shared.familiarity import Familiarity
from chainward_shared.hops import END_HEAD
from chainward_shared.models import Architecture, skeleton
from chainward_shared.models.heads import check_head, with_head
from chainward_shared.protocol import StatisticsResult, StatisticsTask
from chainward_shared.secure_sums import FRACTION_BITS
from chainward_shared.settings import ClassBalance
from chainward_shared.weights import StateDict, digest, rounded

logger = logging.getLogger("chainward")

LEAST_WEIGHT = 1e-6
"""Of an image in the covariance: the least that a task may ask for."""

FURTHEST = 10.0
"""A site is left out whose embeddings are longer, in root mean square, than the median site's by more than this factor: one
image whose embedding was made huge would otherwise decide the covariance of all."""


@dataclass(frozen=True)
class _Sums:
    """What one site has sent, or several together."""

    train: HeadSums
    validation: HeadSums

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.train + other.train, self.validation + other.validation)

    @property
    def length(self) -> float:
        """Root mean square of the training embeddings' lengths."""
        return math.sqrt(float(self.train.second_moments.trace()) / (self.train.counted or 1.0))


def with_statistics_head(run: Run, key: str, state: StateDict, architecture: Architecture | None = None) -> StateDict:
    """Return a model with the head that follows from the sums of all sites that answer over its embeddings.

    The round called `key` is asked for once: a finished one is taken as it is. Sums are used and forgotten; none of a single site
    is written down.

    Parameters
    ----------
    architecture : of the model; None: the chain's

    Raises
    ------
    ModelError
        The classifier of this backbone isn't one linear layer.
    ChainwardError
        No site answered, or the images of those that did are all of one class.
    """
    architecture = architecture or run.architecture
    check_head(architecture)
    if run.checkpoints.is_finished(key) and run.checkpoints.has_model(key):
        return run.checkpoints.load_model(key, skeleton(architecture).state_dict())
    familiarity = None
    if run.privacy.on:
        record, head = private_head(run, key, state, architecture, prior_strength=_strength(run))
    else:
        record, sums = _asked(run, key, state, architecture)
        head = _solved(run, key, sums)
        if key == END_HEAD or run.config.chain.refit == "links":  # it may be the model that the chain leaves
            familiarity = Familiarity.of_sums(sums.train, sums.validation)
    record.shrinkage, record.temperature = head.shrinkage, head.temperature
    model = rounded(with_head(state, architecture, head), run.config.federation.transfer)
    run.save_model(key, model, architecture, familiarity)
    if run.score_all:
        record.metrics = link_metrics(run.score(architecture, model, ["val", "test"]))
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


def balance_strength(balance: ClassBalance, prior_strength: float) -> float:
    """Return how equal the priors of a head from statistics are, so that they agree with what the links are trained to."""
    return {"site-prior": prior_strength, "weighted": 1.0, "none": 0.0}[balance]


def _strength(run: Run) -> float:
    return balance_strength(run.config.chain.class_balance, run.config.chain.prior_strength)


def _class_weights(run: Run) -> Tensor | None:
    """Return how much an image of each class is to count in the covariance; None: each the same.

    So it is where a site does not tell how many images of which class it has, and where an image may have several findings.
    """
    cards, strength = run.sites.cards.values(), _strength(run)
    told = [card.class_counts.get("train") for card in cards if card.privacy is None]
    if strength == 0 or run.sites.any_card.task == "multilabel" or len(told) < len(cards) or not all(told):
        return None
    counts = np.sum([counts for counts in told if counts], axis=0)
    return class_weights(counts, strength).clamp(min=LEAST_WEIGHT)


def _sums_in(model: StateDict, weights: Tensor | None) -> _Sums:
    return _Sums(HeadSums.from_state(model, "train", weights), HeadSums.from_state(model, "val"))


def _asked(run: Run, key: str, state: StateDict, architecture: Architecture) -> tuple[HeadRecord, _Sums]:
    """Ask all sites; return the record of it, without what the head will be, and what the sums add up to."""
    weights = _class_weights(run)
    task = StatisticsTask(
        run_id=run.checkpoints.run_id,
        hop=key,
        architecture=architecture,
        label_fraction=run.config.chain.label_fraction,
        seed=run.config.seed,
        class_weights=() if weights is None else tuple(weights.tolist()),
        threads=run.config.federation.cpu_threads,
        digest=digest(state),
    )
    summed, sums = (_in_secret if run.secure else _in_the_open)(run, Work(task, {"model": state}), weights)
    images, validation = (round(float(of.images)) for of in (sums.train, sums.validation))
    record = HeadRecord(
        key=key, secure=run.secure, images=images, validation=validation, seconds=summed.seconds, **summed.account
    )
    return record, sums


def _in_secret(run: Run, work: Work[StatisticsTask], weights: Tensor | None) -> tuple[Summed, _Sums]:
    """Return what came of a secure sum of all sites, and the sums, which no single one of them has shown."""
    what = f"statistics round '{work.task.hop}'"
    summed = summed_everywhere(run.sites, what, lambda site: work, retries=run.config.chain.retries)
    sums = _sums_in(summed.state, weights)
    card = card_of_all([run.sites.cards[site] for site in summed.sites])
    rounding = len(summed.sites) * len(card.classes) * 2.0**-FRACTION_BITS
    check_sums(sums.train, "train", round(float(sums.train.images)), card, rounding=rounding)
    check_sums(sums.validation, "val", round(float(sums.validation.images)), card, rounding=rounding)
    return summed, sums


def _in_the_open(run: Run, work: Work[StatisticsTask], weights: Tensor | None) -> tuple[Summed, _Sums]:
    """Return the same where each site sends its sums."""
    key, started = work.task.hop, time.monotonic()

    def ask(sites: Sequence[str], attempt: int) -> Iterator[tuple[str, Trained[StatisticsResult] | Failure]]:
        return run.sites.statistics(dict.fromkeys(sites, work))

    def check(site: str, answer: Trained[StatisticsResult]) -> None:
        result, card = answer.result, run.sites.cards[site]
        check_answer(answer, "round", key, site)
        sums = _sums_in(answer.model, weights)
        check_sums(sums.train, "train", result.images, card)
        check_sums(sums.validation, "val", result.validation, card)

    outcomes = attempted(run.sites.ids, ask, check, retries=run.config.chain.retries)
    sums = {site: _sums_in(answer.model, weights) for site, answer in outcomes.answers.items()}
    summed = outcomes.summed({}, time.monotonic() - started)
    summed = replace(summed, failed={**summed.failed, **_implausible(sums)})
    for reason in summed.reasons.values():
        logger.warning("statistics round '%s' goes on without a site: %s", key, reason)
    used = [of for site, of in sums.items() if site not in summed.failed]
    if not used:
        raise ChainwardError(
            f"statistics round '{key}': no site took part in it (the log says why); set chain.head and student.head to "
            "'trained', or resume the run when they can"
        )
    summed = replace(summed, sites=[site for site in sums if site not in summed.failed])
    return summed, functools.reduce(operator.add, used)


def _implausible(sums: Mapping[str, _Sums]) -> dict[str, Failure]:
    """Return the sites whose embeddings are far longer than those of the others, and why they are left out."""
    if len(sums) < 3:
        return {}
    middle = statistics.median_low(of.length for of in sums.values())
    return {
        site: Failure(
            f"site '{site}': its embeddings are {of.length / middle:.3g} times as long as those of the median site; at most "
            f"{FURTHEST:g} times is taken",
            0.0,
        )
        for site, of in sums.items()
        if middle > 0 and of.length > FURTHEST * middle
    }


def _solved(run: Run, key: str, sums: _Sums) -> Head:
    multilabel = run.sites.any_card.task == "multilabel"
    if not multilabel and int((sums.train.counts > 0).sum()) < 2:
        raise ChainwardError(f"statistics round '{key}': all images of the sites that answered are of one class")
    return discriminant(sums.train, sums.validation, multilabel=multilabel, prior_strength=_strength(run))
