"""Scores of a model at every site, and pooled over them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
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


@dataclass(frozen=True)
class Scorer:
    """Asks sites what models say of their images.

    Attributes
    ----------
    privacy : what the sites have signed
    run_id : of the run, as the sites are told it
    threads : CPU threads of a scoring
    retries : so many times a secure sum is tried again
    """

    sites: Sites
    privacy: RunPrivacy
    run_id: str
    threads: int
    retries: int = 0

    def everywhere(
        self,
        architecture: Architecture,
        state: StateDict,
        splits: list[Split],
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
        task = self._task(architecture, state, splits=splits)
        counted: dict[Split, Counted] = {split: Counted() for split in splits}
        problems = []
        answers = self._ask(task, state, asked)
        for site, answer in answers.items():
            if isinstance(answer, Failure):
                problems.append(answer.reason)
                continue
            if answer.result.release == "withhold":
                logger.debug("site '%s' withholds its scores, as its policy says", site)
                continue
            try:
                if answer.result.release == "noised":
                    self.privacy.take(answer.result.statement, site, task.hop)
                found = _checked(self.sites, site, answer, splits)
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

    def in_secret(
        self,
        architecture: Architecture,
        state: StateDict,
        splits: list[Split],
        asked: Collection[str] | None = None,
    ) -> dict[Split, Counted]:
        """Return the predictions of a model on the images of all sites together, of which those of no single site are seen.

        A site that withholds its scores isn't asked. Where there is no secure sum there are counts of none, with a warning.
        Parameters as of `everywhere`.
        """
        task, cards = self._task(architecture, state, splits=splits), self.sites.cards
        metrics = {site: card.privacy.terms.metrics if card.privacy else "exact" for site, card in cards.items()}

        def check(site: str, answer: MaskedSum) -> None:
            if metrics[site] == "noised":
                self.privacy.take(answer.statement, site, task.hop)

        members = [site for site in cards if metrics[site] != "withhold" and (asked is None or site in asked)]
        try:
            summed = summed_everywhere(
                self.sites,
                "scores",
                lambda site: self._work(site, task, state),
                retries=self.retries,
                asked=members,
                check=check,
            )
            counts = counts_in(summed.state, task)
            check_counted(
                {split: pool([of]) for split, of in counts.items()},
                card_of_all([cards[site] for site in summed.sites]),
            )
        except ChainwardError as error:
            logger.warning("a model has no scores: %s", error)
            return {split: Counted() for split in splits}
        return {split: Counted(total=counts[split], together=summed.sites) for split in splits}

    def localised(self, architecture: Architecture, state: StateDict) -> SiteLocalisation | None:
        """Return how well a model's attention finds the regions of interest of every site's test images.

        None where no site has regions, or where such a backbone's attention can't be read. A site that does not answer is
        left out, with a warning.
        """
        try:
            check_mappable(skeleton(architecture))
        except ModelError as error:
            logger.info("where the model looks is not scored: %s", error)
            return None
        sums = {}
        for site, answer in self._ask(self._task(architecture, state, localisation=True), state).items():
            if isinstance(answer, Failure):
                logger.warning("where the model looks is scored without a site: %s", answer.reason)
                continue
            found = answer.result.localisation
            if found is None or not found.n:
                continue
            try:
                check_looks(found, self.sites.cards[site], architecture.image_size)
            except ProtocolError as error:
                logger.warning("where the model looks is scored without a site: site '%s': %s", site, error)
                continue
            sums[site] = found
        if not sums:
            return None
        return SiteLocalisation(
            sites={site: part.scores() for site, part in sums.items()}, pooled=pool_sums(sums.values()).scores()
        )

    def _task(
        self, architecture: Architecture, state: StateDict, *, splits: Sequence[Split] = (), localisation: bool = False
    ) -> EvaluateTask:
        return EvaluateTask(
            run_id=self.run_id,
            architecture=architecture,
            splits=list(splits),
            localisation=localisation,
            threads=self.threads,
            digest=digest(state),
        )

    def _work(self, site: str, task: EvaluateTask, state: StateDict) -> Work[EvaluateTask]:
        return Work(task.model_copy(update={"seen_head": self.privacy.seen_head(site)}), {"model": state})

    def _ask(
        self, task: EvaluateTask, state: StateDict, asked: Collection[str] | None = None
    ) -> dict[str, Scored | Failure]:
        return self.sites.evaluate(
            {site: self._work(site, task, state) for site in (self.sites.ids if asked is None else asked)}
        )


def _checked(sites: Sites, site: str, answer: Scored, splits: list[Split]) -> dict[Split, Scores]:
    """Return a site's scores of each split after checking them against what it counted, and against its card."""
    found = {split: answer.result.scores[split] for split in splits}
    check_counted(found, sites.cards[site])
    declared = sites.cards[site].class_counts if answer.result.release == "exact" else {}
    for split in splits:
        check_scores(found[split], answer.counts[split], declared.get(split))
    return found


def link_metrics(scores: dict[Split, SiteScores]) -> LinkMetrics:
    """Return what is kept of the scores of a model that left a link."""
    validation = scores["val"]
    return LinkMetrics(test=scores["test"], validation=validation.pooled, validation_sites=validation.sites)


def shown(value: float | None) -> str:
    """Return a score for the log, a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"
