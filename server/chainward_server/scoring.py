"""Scores of a model at every site, and pooled over them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from chainward_server.claims import check_counted, check_looks
from chainward_server.privacy import RunPrivacy
from chainward_server.results import LinkMetrics, SiteLocalisation, SiteScores
from chainward_server.secure_rounds import card_of_all, summed_everywhere
from chainward_server.sites import Failure, Scored, Sites, Work
from chainward_shared.errors import ChainwardError, ModelError, ProtocolError, StatementError, WeightsError
from chainward_shared.evaluation.attention_maps import check_mappable
from chainward_shared.evaluation.classification import PredictionCounts, check_scores, pool
from chainward_shared.evaluation.localisation import pool_sums
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import Architecture, skeleton
from chainward_shared.protocol import EvaluateTask, MaskedSum
from chainward_shared.summands import counts_in
from chainward_shared.weights import StateDict, digest

logger = logging.getLogger("chainward")

Split = Literal["val", "test"]

NO_SCORES = Scores(n=0, accuracy=None, balanced_accuracy=None, macro_auc=None, ece=None)
"""Of a model that no site scores for others to see."""


@dataclass(frozen=True)
class Counted:
    """A model's predictions on one split, as counts of every site that let some out.

    Attributes
    ----------
    scores : those that the sites sent
    counts : that they follow from; with noise: of the confusion matrix alone
    total, together : counts of all sites that added theirs up in secret, and which sites these are
    """

    scores: dict[str, Scores] = field(default_factory=dict)
    counts: dict[str, PredictionCounts] = field(default_factory=dict)
    total: PredictionCounts | None = None
    together: list[str] = field(default_factory=list)

    @property
    def parts(self) -> list[PredictionCounts]:
        """All counts, whosever they are."""
        return [*self.counts.values(), *([] if self.total is None else [self.total])]

    @property
    def site_scores(self) -> SiteScores:
        """Return the scores at every site, and over all of them."""
        pooled = pool(self.parts) if self.parts else NO_SCORES
        return SiteScores(sites=self.scores, pooled=pooled, together=self.together)


def count_everywhere(
    sites: Sites,
    privacy: RunPrivacy,
    architecture: Architecture,
    state: StateDict,
    splits: list[Split],
    *,
    run_id: str,
    threads: int,
    asked: Collection[str] | None = None,
) -> dict[Split, Counted]:
    """Return the predictions of a model on the images of every site, for each of `splits`.

    A site that does not answer is left out, with a warning; so is one whose policy withholds its scores. Where all do, there
    are counts of none.

    Parameters
    ----------
    asked : the sites to ask; default: all

    Raises
    ------
    ChainwardError
        No site answered.
    """
    task = EvaluateTask(run_id=run_id, architecture=architecture, splits=splits, threads=threads, digest=digest(state))
    counted: dict[Split, Counted] = {split: Counted() for split in splits}
    problems = []
    answers = _ask(sites, privacy, task, state, sites.ids if asked is None else asked)
    for site, answer in answers.items():
        if isinstance(answer, Failure):
            problems.append(answer.reason)
            continue
        if answer.result.release == "withhold":
            logger.debug("site '%s' withholds its scores, as its policy says", site)
            continue
        try:
            if answer.result.release == "noised":
                privacy.take(answer.result.statement, site, task.hop)
            found = _checked(sites, site, answer, splits)
        except (KeyError, ProtocolError, WeightsError, StatementError) as error:
            problems.append(f"site '{site}' sent scores that can't be used: {error}")
            continue
        for split in splits:
            counted[split].counts[site] = answer.counts[split]
            counted[split].scores[site] = found[split]
    for problem in problems:
        logger.warning("scores are without a site: %s", problem)
    if problems and len(problems) == len(answers):
        raise ChainwardError(f"no site scored the model: {problems[0]}")
    return counted


def count_in_secret(
    sites: Sites,
    privacy: RunPrivacy,
    architecture: Architecture,
    state: StateDict,
    splits: list[Split],
    *,
    run_id: str,
    threads: int,
    retries: int,
    asked: Collection[str] | None = None,
) -> dict[Split, Counted]:
    """Return the predictions of a model on the images of all sites together, of which those of no single site are seen.

    A site that withholds its scores isn't asked. Where there is no secure sum there are counts of none, with a warning.
    Parameters as of `count_everywhere`; `retries`: so many times a sum is tried again.
    """
    task = EvaluateTask(run_id=run_id, architecture=architecture, splits=splits, threads=threads, digest=digest(state))

    def check(site: str, answer: MaskedSum) -> None:
        declared = sites.cards[site].privacy
        if declared is not None and declared.terms.metrics == "noised":
            privacy.take(answer.statement, site, task.hop)

    def work(site: str) -> Work[EvaluateTask]:
        return Work(task.model_copy(update={"seen_head": privacy.seen_head(site)}), {"model": state})

    telling = [
        site for site, card in sites.cards.items() if not card.privacy or card.privacy.terms.metrics != "withhold"
    ]
    members = [site for site in telling if asked is None or site in asked]
    try:
        summed = summed_everywhere(sites, "scores", work, retries=retries, asked=members, check=check)
        counts = counts_in(summed.state, task)
        card = card_of_all([sites.cards[site] for site in summed.sites])
        check_counted({split: pool([of]) for split, of in counts.items()}, card)
    except ChainwardError as error:
        logger.warning("a model has no scores: %s", error)
        return {split: Counted() for split in splits}
    return {split: Counted(total=counts[split], together=summed.sites) for split in splits}


def _checked(sites: Sites, site: str, answer: Scored, splits: list[Split]) -> dict[Split, Scores]:
    """Return a site's scores of each split after checking them against what it counted, and against its card."""
    found = {split: answer.result.scores[split] for split in splits}
    check_counted(found, sites.cards[site])
    declared = sites.cards[site].class_counts if answer.result.release == "exact" else {}
    for split in splits:
        check_scores(found[split], answer.counts[split], declared.get(split))
    return found


def localise_everywhere(
    sites: Sites,
    privacy: RunPrivacy,
    architecture: Architecture,
    state: StateDict,
    *,
    run_id: str,
    threads: int,
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
    for site, answer in _ask(sites, privacy, task, state, sites.ids).items():
        if isinstance(answer, Failure):
            logger.warning("where the model looks is scored without a site: %s", answer.reason)
            continue
        found = answer.result.localisation
        if found is None or not found.n:
            continue
        try:
            check_looks(found, sites.cards[site], architecture.image_size)
        except ProtocolError as error:
            logger.warning("where the model looks is scored without a site: site '%s': %s", site, error)
            continue
        sums[site] = found
    if not sums:
        return None
    return SiteLocalisation(
        sites={site: part.scores() for site, part in sums.items()}, pooled=pool_sums(sums.values()).scores()
    )


def _ask(
    sites: Sites, privacy: RunPrivacy, task: EvaluateTask, state: StateDict, asked: Collection[str]
) -> dict[str, Scored | Failure]:
    return sites.evaluate(
        {site: Work(task.model_copy(update={"seen_head": privacy.seen_head(site)}), {"model": state}) for site in asked}
    )


def link_metrics(scores: dict[Split, SiteScores]) -> LinkMetrics:
    """Return what is kept of the scores of a model that left a link."""
    validation = scores["val"]
    return LinkMetrics(test=scores["test"], validation=validation.pooled, validation_sites=validation.sites)


def shown(value: float | None) -> str:
    """Return a score for the log, a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"
