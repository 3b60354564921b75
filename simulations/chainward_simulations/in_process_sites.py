"""Hospitals that are data in memory: the implementation of `Sites` that needs no Flower."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chainward_client.card import site_card
from chainward_client.data.site_data import SiteData
from chainward_client.private_site import PrivateSite, PrivateWork, declared_units
from chainward_client.request_check import admitted
from chainward_client.scoring import exact_scores, noised_scores
from chainward_client.site_config import SiteLimits
from chainward_client.statistics import private_sums_of, sums_of
from chainward_client.training.features import Features
from chainward_client.training.link import train_link
from chainward_client.training.student import train_student
from chainward_server.sites import (
    Failure,
    Result,
    Scored,
    Sites,
    Summable,
    Summed,
    Task,
    TooFewSitesError,
    Trained,
    Work,
)
from chainward_shared.errors import ChainwardError, PolicyRefusal
from chainward_shared.models import Architecture, build_model
from chainward_shared.private_sums import Frame
from chainward_shared.protocol import (
    FEWEST_SITES,
    EvaluateResult,
    EvaluateTask,
    LinkResult,
    LinkTask,
    MaskedSum,
    SiteCard,
    SitePrivacy,
    StatisticsResult,
    StatisticsTask,
    StudentResult,
    StudentTask,
    TrainingLog,
    fingerprint,
)
from chainward_shared.secure_sums import fixed_point, flat, real_numbers, shaped
from chainward_shared.summands import counts_summand, fraction_bits, student_summand, summand_template
from chainward_shared.weights import StateDict, digest, rounded


class InProcessSites(Sites):
    """Hospitals that train right here, one after the other.

    Parameters
    ----------
    data : of each site, in the order of the chain's first lap
    private : the sites that have a privacy policy
    on_step : called with a line of progress after each training
    state_dir : folder in which the sites keep their privileged teachers; None: trained anew whenever they are needed
    features : where all of them keep the output of frozen trunks; None: each its own, in memory

    Attributes
    ----------
    logs : how every training went, by hop key, `alone-SITE` or `student-round-N-SITE`
    alone : the models that sites trained without the others
    """

    def __init__(
        self,
        data: Mapping[str, SiteData],
        private: Mapping[str, PrivateSite] | None = None,
        on_step: Callable[[str], None] = lambda step: None,
        state_dir: Path | None = None,
        features: Features | None = None,
    ) -> None:
        self.data, self.private, self.on_step, self.state_dir = data, private or {}, on_step, state_dir
        super().__init__({site: self._card(site) for site in data})
        self.logs: dict[str, TrainingLog] = {}
        self.alone: dict[str, StateDict] = {}
        self._auxiliaries: dict[str, StateDict] = {}
        self._last: dict[str, tuple[str, Trained[Any]]] = {}
        self._base: StateDict | None = None
        declared = {site: declared_units(private.policy, data[site]) for site, private in self.private.items()}
        self._features = {site: features or Features(None, declared=declared.get(site)) for site in data}

    @property
    def simulated(self) -> bool:
        return True

    def share(self, architecture: Architecture, base: StateDict) -> dict[str, int]:
        self._base = base
        return dict.fromkeys(self.ids, 0)

    def train_links(self, work: Mapping[str, Work[LinkTask]]) -> Iterator[tuple[str, Trained[LinkResult] | Failure]]:
        return ((site, self._answer(site, one, self._link)) for site, one in work.items())

    def train_students(
        self, work: Mapping[str, Work[StudentTask]]
    ) -> Iterator[tuple[str, Trained[StudentResult] | Failure]]:
        return ((site, self._answer(site, one, self._student)) for site, one in work.items())

    def statistics(
        self, work: Mapping[str, Work[StatisticsTask]]
    ) -> Iterator[tuple[str, Trained[StatisticsResult] | Failure]]:
        return ((site, self._answer(site, one, self._sums)) for site, one in work.items())

    def summed(
        self,
        work: Mapping[str, Work[Summable]],
        *,
        weights: Mapping[str, float] | None = None,
        check: Callable[[str, MaskedSum], None] = lambda site, answer: None,
    ) -> Summed:
        started, failed, total, noise = time.monotonic(), dict[str, Failure](), dict[str, np.ndarray](), 0.0
        task = next(iter(work.values())).task
        for site, one in work.items():
            answer = self._summand(site, one, 1.0 if weights is None else weights[site])
            if isinstance(answer, Failure):
                failed[site] = answer
                continue
            masked, state = answer
            try:
                check(site, masked)
            except ChainwardError as error:
                failed[site] = Failure(f"site '{site}': {error}", 0.0, malformed=True)
                continue
            total[site] = fixed_point(flat(state), len(work), fraction_bits(task))
            noise = math.hypot(noise, masked.noise)
        if len(total) < FEWEST_SITES:
            raise TooFewSitesError(f"{len(total)} sites have answered; a secure sum takes {FEWEST_SITES}", failed)
        if isinstance(task, StatisticsTask) and task.shared_noise and len(total) < task.shared_noise.sites:
            together = task.shared_noise.sites
            raise TooFewSitesError(f"{len(total)} sites have answered; the noise of this sum takes {together}", failed)
        numbers = real_numbers(np.asarray(sum(total.values())), fraction_bits(task))
        state = shaped(numbers, summand_template(task, self.any_card.task))
        return Summed(state, list(total), list(work), noise, failed, time.monotonic() - started)

    def _summand(self, site: str, work: Work[Any], weight: float) -> tuple[MaskedSum, StateDict] | Failure:
        """Return what a site adds to a secure sum, and what it says beside it."""
        if isinstance(work.task, EvaluateTask):
            scored = self._scored(site, work)
            if isinstance(scored, Failure) or scored.result.release == "withhold":
                return scored if isinstance(scored, Failure) else Failure(f"site '{site}' withholds its scores", 0.0)
            return MaskedSum(site=site, statement=scored.result.statement), counts_summand(scored.counts)
        student = isinstance(work.task, StudentTask)
        answer: Trained[Any] | Failure = self._answer(site, work, self._student if student else self._sums)
        if isinstance(answer, Failure):
            return answer
        beside = MaskedSum(site=site, noise=getattr(answer.result, "noise", 0.0), statement=answer.result.statement)
        if not student:
            return beside, answer.model
        return beside, student_summand(answer.model, work.models["student"], answer.result.auxiliary_kept, weight)

    def evaluate(self, work: Mapping[str, Work[EvaluateTask]]) -> dict[str, Scored | Failure]:
        return {site: self._scored(site, one) for site, one in work.items()}

    def _card(self, site: str) -> SiteCard:
        if site not in self.private:
            return site_card(self.data[site], None, None)
        policy, ledger = self.private[site].policy, self.private[site].ledger
        told = SitePrivacy(terms=policy.terms, required=policy.required, head=ledger.head)
        return site_card(self.data[site], policy, told)

    def _answer(
        self, site: str, work: Work[Task], train: Callable[[str, Work[Task]], tuple[Result, StateDict]]
    ) -> Trained[Result] | Failure:
        """Return what a site answers; asked the same again, it gives the same answer."""
        asked, started = fingerprint(work.task), time.monotonic()
        if site in self._last and self._last[site][0] == asked:
            return self._last[site][1]
        try:
            result, state = train(site, work)
        except ChainwardError as error:
            final = isinstance(error, PolicyRefusal)
            reason = f"site '{site}' refused: {error}"
            return Failure(reason, time.monotonic() - started, refused=True, final=final)
        answer = Trained(result, state, time.monotonic() - started)
        self._last[site] = asked, answer
        return answer

    def _link(self, site: str, work: Work[LinkTask]) -> tuple[LinkResult, StateDict]:
        task, spends = work.task, self._admitted(site, work.task)
        state, log = train_link(
            self.data[site],
            task.architecture,
            task.recipe,
            work.models.get("predecessor"),
            strand=task.strand,
            lap=task.lap,
            alone=task.trained_alone,
            base=self._base,
            features=self._features[site],
            state_dir=self._state_dir(site),
            work=spends,
        )
        state = rounded(state, task.recipe.transfer)
        self.logs[task.hop] = log
        if task.trained_alone:
            self.alone[site] = state
        self.on_step(f"alone {site}" if task.trained_alone else f"{task.hop} {site}")
        signed = spends.statement() if spends else None
        return LinkResult(hop=task.hop, site=site, digest=digest(state), training=log, statement=signed), state

    def _student(self, site: str, work: Work[StudentTask]) -> tuple[StudentResult, StateDict]:
        task, spends = work.task, self._admitted(site, work.task)
        auxiliary = self._auxiliaries.get(site, work.models.get("auxiliary"))
        trained = train_student(
            self.data[site],
            task.architecture,
            task.recipe,
            work.models["student"],
            auxiliary if task.recipe.stage == "distil" else None,
            round_index=task.round - 1,
            large=[work.models[f"large_{index}"] for index in range(len(task.large_digests))],
            large_architecture=task.large_architecture,
            features=self._features[site],
            state_dir=self._state_dir(site),
            work=spends,
        )
        if trained.auxiliary is not None:
            self._auxiliaries[site] = trained.auxiliary
        state = rounded(trained.student, task.recipe.transfer)
        self.logs[f"{task.hop}-{site}"] = trained.log
        self.on_step(f"student round {task.round} {site}")
        return StudentResult(
            round=task.round,
            site=site,
            digest=digest(state),
            training=trained.log,
            auxiliary_kept=trained.auxiliary_kept,
            statement=spends.statement() if spends else None,
        ), state

    def _sums(self, site: str, work: Work[StatisticsTask]) -> tuple[StatisticsResult, StateDict]:
        task, state, spends = work.task, work.models["model"], self._admitted(site, work.task)
        data, features = self.data[site], self._features[site]
        if task.form is None:
            result, sums = sums_of(task, data, state, SiteLimits(), features)
        else:
            frame = Frame.from_state(work.models["frame"])
            result, sums = private_sums_of(task, data, state, frame, spends, SiteLimits(), features)
        self.on_step(f"{task.hop} {site}")
        return result.model_copy(update={"statement": spends.statement() if spends else None}), sums

    def _admitted(self, site: str, task: LinkTask | StudentTask | StatisticsTask) -> PrivateWork | None:
        private = self.private.get(site)
        return admitted(private.policy if private else None, lambda: private, task)

    def _state_dir(self, site: str) -> Path | None:
        return None if self.state_dir is None else self.state_dir / site

    def _scored(self, site: str, work: Work[EvaluateTask]) -> Scored | Failure:
        task, private = work.task, self.private.get(site)
        release = private.policy.metrics if private else "exact"
        withheld = Scored(EvaluateResult(site=site, scores={}, release="withhold"))
        if release == "withhold" or (release == "noised" and not task.splits):
            return withheld
        model = build_model(task.architecture)
        model.load_state_dict(work.models["model"])
        if private is None or release == "exact":
            return Scored(*exact_scores(task, self.data[site], model, self._features[site]))
        charged = private.work(task.run_id, task.hop)
        if not charged.release():
            return withheld
        result, counts = noised_scores(task, self.data[site], private, model, self._features[site])
        return Scored(result.model_copy(update={"statement": charged.statement()}), counts)
