"""The compact students: selected out of the chain's model, trained at every site, averaged."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from chainward_server.aggregation import aggregate, capped, check_drift
from chainward_server.attempts import attempted, check_digest
from chainward_server.chain import ChainOutcome
from chainward_server.claims import check_training
from chainward_server.context import Run
from chainward_server.heads import with_statistics_head
from chainward_server.results import Influence, StudentRound
from chainward_server.scoring import shown
from chainward_server.secure_rounds import summed_everywhere
from chainward_server.sites import Failure, Summed, Trained, Work
from chainward_shared.config import StudentConfig
from chainward_shared.errors import ChainwardError
from chainward_shared.hops import STUDENT_HEAD, student_key
from chainward_shared.models import Architecture, Selection, build_model, select_weights, skeleton
from chainward_shared.models.of_run import student_architecture
from chainward_shared.protocol import MOST_WEIGHT, MaskedSum, StudentResult, StudentTask
from chainward_shared.seeds import derive_seed
from chainward_shared.settings import Transfer
from chainward_shared.summands import student_mean
from chainward_shared.weights import StateDict, digest, rounded

Stage = Literal["distil", "finetune"]

logger = logging.getLogger("chainward")


def initial_students(
    config: StudentConfig, large: Architecture, chain_model: StateDict, seed: int, transfer: Transfer
) -> tuple[StateDict, StateDict]:
    """Return the first weights of the student A and of the auxiliary teacher B, `rounded` as they travel.

    "dual": complementary selections; "single": B is A; "random": both have the same random start, a control.
    Which channels, heads and layers are selected is the configuration's choice; draws derive from `seed`.
    """
    small = student_architecture(config, large)
    if config.start == "random":
        state = rounded(build_model(small, derive_seed(seed, "student", "initial")).state_dict(), transfer)
        return state, state
    selection = Selection(config.selection, config.heads, config.layers, seed)
    student = rounded(select_weights(chain_model, large, small, "A", selection=selection), transfer)
    if config.start == "single":
        return student, student
    return student, rounded(select_weights(chain_model, large, small, "B", selection=selection), transfer)


@dataclass
class _Round:
    """What one round starts from.

    Attributes
    ----------
    auxiliary : the selection B, for sites that have no auxiliary teacher of their own yet; None in fine-tuning
    large : the chain's large models, where they teach the student
    """

    number: int
    stage: Stage
    architecture: Architecture
    student: StateDict
    auxiliary: StateDict | None = None
    large: list[StateDict] = field(default_factory=list)

    @cached_property
    def digests(self) -> dict[str, str]:
        """The digests of all its models, by the names under which they travel."""
        return {name: digest(state) for name, state in self.models(new=True).items()}

    def models(self, *, new: bool) -> dict[str, StateDict]:
        """Return the models that a site is sent; `new`: with the auxiliary teacher that all sites start with."""
        models = {"student": self.student} | {f"large_{index}": state for index, state in enumerate(self.large)}
        return models | {"auxiliary": self.auxiliary} if new and self.auxiliary is not None else models


def run_students(run: Run, chain: ChainOutcome) -> StateDict:
    """Run all rounds and return the aggregated student, with its head from statistics where that is asked.

    A round goes on without the sites that failed, and says so. Where ``student.large-weight`` is above 0 the student also
    learns from the chain's model, or, with ``chain.merge = "ensemble"``, from the last model of every strand.

    Raises
    ------
    ChainwardError
        No site finished a round, or fewer than ``student.quorum``.
    """
    config = run.config.student
    teachers = chain.strands if run.config.chain.merge == "ensemble" else [chain.model]
    large = teachers if config.large_weight > 0 else []
    architecture = student_architecture(config, run.architecture)
    transfer = run.config.federation.transfer
    source = chain.model if config.source == "chain" else run.initial()
    student, auxiliary = initial_students(config, run.architecture, source, run.config.seed, transfer)
    template = skeleton(architecture).state_dict()
    total = config.rounds + config.finetune_rounds
    for number in range(1, total + 1):
        key = student_key(number)
        if run.checkpoints.is_finished(key):
            if run.checkpoints.has_model(key):
                student = run.checkpoints.load_model(key, template)
            continue
        if number <= config.rounds:
            begun = _Round(number, "distil", architecture, student, auxiliary, large)
        else:
            begun = _Round(number, "finetune", architecture, student)
        student, record = _run_round(run, begun)
        if run.score_all:
            record.validation = run.score(architecture, student, ["val"])["val"].pooled
        run.save_model(key, student, architecture)
        run.results.student_rounds.append(record)
        run.checkpoints.commit(run.results, key)
        run.checkpoints.drop_model(student_key(number - 1))
        _tell(run, record, total)
    if config.head == "statistics":
        student = with_statistics_head(run, STUDENT_HEAD, student, architecture)
    return student


def _run_round(run: Run, begun: _Round) -> tuple[StateDict, StudentRound]:
    """Train one round at all sites and average what came back."""
    started = time.monotonic()
    has_auxiliary = {site for round_ in run.results.student_rounds for site in round_.sites}
    average, summed, told = (_in_secret if run.secure else _in_the_open)(run, begun, has_auxiliary)
    return rounded(average, run.config.federation.transfer), StudentRound(
        round=begun.number,
        stage=begun.stage,
        secure=run.secure,
        seconds=time.monotonic() - started,
        **summed.account,
        **told,
    )


def _in_the_open(run: Run, begun: _Round, has_auxiliary: set[str]) -> tuple[StateDict, Summed, dict[str, Any]]:
    """Return the average of a round's students, whose they are, and what their sites tell of them."""

    def ask(sites: Sequence[str], attempt: int) -> Iterator[tuple[str, Trained[StudentResult] | Failure]]:
        # A retry brings the auxiliary teacher again: the site may have lost its own.
        new = set(sites) if attempt else set(sites) - has_auxiliary
        return run.sites.train_students({site: _student_work(run, begun, site, new=site in new) for site in sites})

    def check(site: str, answer: Trained[StudentResult]) -> None:
        _check_student(run, answer, begun.number, site)
        check_drift(answer.model, begun.student, run.config.student.max_drift, "student.max-drift")

    outcomes = attempted(run.sites.ids, ask, check, retries=run.config.chain.retries)
    answers = outcomes.answers
    summed = outcomes.summed({}, 0.0)
    _check_quorum(run, begun.number, summed)
    for reason in summed.reasons.values():
        logger.warning("student round %d goes on without a site: %s", begun.number, reason)
    average, influence = _average(run, begun, {site: answer.model for site, answer in answers.items()})
    kept = [answer.result.auxiliary_kept for answer in answers.values() if answer.result.auxiliary_kept is not None]
    told = {"auxiliary_kept": _kept(run, sum(kept) / len(kept) if kept else None), "influence": influence}
    return average, replace(summed, bytes_up=sum(answer.bytes_up for answer in answers.values())), told


def _in_secret(run: Run, begun: _Round, has_auxiliary: set[str]) -> tuple[StateDict, Summed, dict[str, Any]]:
    """Return the same without seeing what came back.

    Weights are those of a mean in the open: sizes by the cards, none above ``student.max-share``, nor above what a hospital lets
    itself weigh. What one hospital has done to its student nobody sees, so that ``student.max-update`` holds for none;
    ``student.max-drift`` holds for the mean.
    """
    asked = set[str]()

    def work(site: str) -> Work[StudentTask]:
        new = site in asked or site not in has_auxiliary  # a site that is asked again may have lost its own
        asked.add(site)
        return _student_work(run, begun, site, new=new)

    config, what = run.config.student, f"student round {begun.number}"

    def weights(members: Sequence[str]) -> dict[str, float]:
        found = capped([run.sites.sizes[site] for site in members], min(config.max_share, MOST_WEIGHT))
        return {site: weight / sum(found) for site, weight in zip(members, found, strict=True)}

    def check(site: str, answer: MaskedSum) -> None:
        run.privacy.take(answer.statement, site, student_key(begun.number))

    summed = summed_everywhere(run.sites, what, work, retries=run.config.chain.retries, weights=weights, check=check)
    shares = weights(summed.members)
    mean, kept = student_mean(summed.state, begun.student, sum(shares[site] for site in summed.sites))
    try:
        check_drift(mean, begun.student, config.max_drift, "student.max-drift")
    except ChainwardError as error:
        raise ChainwardError(
            f"{what}: of the mean of {len(summed.sites)} sites, {error}; which of them it is can't be told"
        ) from error
    _check_quorum(run, begun.number, summed)
    return mean, summed, {"auxiliary_kept": _kept(run, kept if begun.stage == "distil" else None)}


def _average(run: Run, begun: _Round, models: dict[str, StateDict]) -> tuple[StateDict, dict[str, Influence]]:
    """Return the students' average and each site's part in it, and say where a site was held back."""
    config = run.config.student
    average, parts = aggregate(
        models,
        begun.student,
        run.sites.sizes,
        mean=config.aggregation,
        max_share=config.max_share,
        max_update=config.max_update,
    )
    declared = sum(max(1, run.sites.sizes[site]) for site in models)
    for site, part in parts.items():
        if part.factor < 1:
            logger.warning(
                "student round %d: the update of site '%s' is %.3g times as long as student.max-update allows beside the "
                "others; it counts as that long",
                begun.number,
                site,
                1 / part.factor,
            )
        own = max(1, run.sites.sizes[site]) / declared
        if config.aggregation == "mean" and part.share < own * (1 - 1e-9) and begun.number == 1 and len(models) > 1:
            logger.warning(
                "site '%s' declares %.0f%% of all training cases; it counts as %.0f%% (student.max-share)",
                site,
                100 * own,
                100 * part.share,
            )
    return average, parts


def _check_quorum(run: Run, number: int, summed: Summed) -> None:
    """Raise `ChainwardError` where too few sites have finished a round."""
    reason, quorum = next(iter(summed.reasons.values()), "no reason given"), run.config.student.quorum
    finished = len(summed.sites)
    if not finished:
        raise ChainwardError(f"student round {number}: no site finished it; {reason}")
    if finished < quorum:
        raise ChainwardError(
            f"student round {number}: {finished} of {len(run.sites.ids)} sites finished it, student.quorum is "
            f"{quorum}; {reason}. Resume the run when they are back"
        )


def _kept(run: Run, kept: float | None) -> float | None:
    """Return what fraction of its own selection the auxiliary teacher still holds after a round that kept so much of its start;
    None in fine-tuning."""
    if kept is None:
        return None
    before = [round_.auxiliary_kept for round_ in run.results.student_rounds if round_.auxiliary_kept is not None]
    return (before[-1] if before else 1.0) * kept


def _student_work(run: Run, begun: _Round, site: str, *, new: bool) -> Work[StudentTask]:
    """Return a site's part in a round; `new`: it has no auxiliary teacher of its own yet."""
    models, digests = begun.models(new=new), begun.digests
    task = StudentTask(
        run_id=run.checkpoints.run_id,
        round=begun.number,
        architecture=begun.architecture,
        recipe=run.config.student_recipe(begun.stage),
        student_digest=digests["student"],
        auxiliary_digest=digests["auxiliary"] if "auxiliary" in models else None,
        large_architecture=run.architecture if begun.large else None,
        large_digests=[digests[f"large_{index}"] for index in range(len(begun.large))],
        seen_head=run.privacy.seen_head(site),
    )
    return Work(task, models)


def _check_student(run: Run, answer: Trained[StudentResult], number: int, site: str) -> None:
    """Check that a student is the one that was asked for; keep the privacy statement that came with it.

    Raises
    ------
    ChainwardError
        It is of another round or site, or damaged, or its privacy statement is.
    """
    result = answer.result
    if (result.site, result.round) != (site, number):
        raise ChainwardError(f"it answers round {result.round} of site '{result.site}'; expected round {number}")
    check_training(result.training, run.sites.cards[site], run.config.student.epochs, run.checkpoints.age)
    check_digest(answer.model, result.digest)
    run.privacy.take(result.statement, site, student_key(number))


def _tell(run: Run, record: StudentRound, total: int) -> None:
    scores = ""
    if record.validation is not None:
        scores = f"validation balanced accuracy {shown(record.validation.balanced_accuracy)}, "
    kept = (
        "" if record.auxiliary_kept is None else f", auxiliary teacher is {record.auxiliary_kept:.0%} its own selection"
    )
    logger.info(
        "student round %d of %d (%s): %d sites, %s%.1f s%s; %s",
        record.round,
        total,
        "self-distillation" if record.stage == "distil" else "fine-tuning",
        len(record.sites),
        scores,
        record.seconds,
        kept,
        run.expected_end("students"),
    )
