"""The compact students: selected out of the chain's model, trained at every site, averaged by Flower's FedAvg."""

from __future__ import annotations

import logging
import time
from typing import Literal

from flwr.serverapp.strategy import FedAvg

from chainward_server.claims import check_training
from chainward_server.context import Run
from chainward_server.exchange import Failure, Reply, Request
from chainward_server.results import StudentRound
from chainward_server.scoring import shown
from chainward_shared.config import StudentConfig
from chainward_shared.errors import ChainwardError, ProtocolError, StatementError
from chainward_shared.models import (
    Architecture,
    Selection,
    build_model,
    select_weights,
    skeleton,
)
from chainward_shared.models.planned import student_architecture
from chainward_shared.protocol import EXAMPLES_KEY, StudentResult, StudentTask
from chainward_shared.seeds import derive_seed
from chainward_shared.settings import Transfer
from chainward_shared.weights import (
    StateDict,
    digest,
    from_arrays,
    from_full_arrays,
    rounded,
    to_arrays,
    to_full_arrays,
)

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


def run_students(run: Run, chain_model: StateDict, teachers: list[StateDict] | None = None) -> StateDict:
    """Run all rounds and return the aggregated student.

    A round goes on without the sites that failed, and says so.

    Parameters
    ----------
    chain_model : weights that the students are selected out of
    teachers : large models from which the student also learns where `student.large-weight` is above 0; None: the chain's
        model alone

    Raises
    ------
    ChainwardError
        No site finished a round.
    """
    config = run.config.student
    large = [] if config.large_weight == 0 else [chain_model] if teachers is None else teachers
    architecture = student_architecture(config, run.architecture)
    transfer = run.config.federation.transfer
    student, auxiliary = initial_students(config, run.architecture, chain_model, run.config.seed, transfer)
    template = skeleton(architecture).state_dict()
    total = config.rounds + config.finetune_rounds
    for number in range(1, total + 1):
        key = f"student-round-{number}"
        if run.folder.is_finished(key):
            if key in run.folder.state.models:
                student = run.folder.load_model(key, template)
            continue
        stage: Literal["distil", "finetune"] = "distil" if number <= config.rounds else "finetune"
        taught_by = large if stage == "distil" else []
        student, record = _run_round(run, architecture, student, auxiliary, taught_by, number, stage)
        record.validation = run.score(architecture, student, ["val"])["val"].pooled
        run.folder.save_model(key, student, architecture, run.results.data.classes, run.results.data.task)
        run.results.student_rounds.append(record)
        run.folder.commit(run.results, key)
        run.folder.drop_model(f"student-round-{number - 1}")
        logger.info(
            "student round %d of %d (%s): %d sites, validation balanced accuracy %s, %.1f s%s; %s",
            number,
            total,
            "self-distillation" if stage == "distil" else "fine-tuning",
            len(record.sites),
            shown(record.validation.balanced_accuracy),
            record.seconds,
            ""
            if record.auxiliary_kept is None
            else f", auxiliary teacher is {record.auxiliary_kept:.0%} its own selection",
            run.progress.expected_end(),
        )
    return student


def _run_round(
    run: Run,
    architecture: Architecture,
    student: StateDict,
    auxiliary: StateDict,
    large: list[StateDict],
    number: int,
    stage: Literal["distil", "finetune"],
) -> tuple[StateDict, StudentRound]:
    """Train one round at all sites and average what came back."""
    started = time.monotonic()
    template = skeleton(architecture).state_dict()
    has_auxiliary = {site for round_ in run.results.student_rounds for site in round_.sites}
    replies: dict[str, Reply[StudentResult]] = {}
    failed: dict[str, str] = {}
    final: set[str] = set()
    record = StudentRound(round=number, stage=stage, sites=[], seconds=0.0, bytes_down=0, bytes_up=0)
    for attempt in range(1 + run.config.chain.retries):
        open_sites = [site for site in run.consortium.sites if site not in replies and site not in final]
        if not open_sites:
            break
        # A retry brings the auxiliary teacher again: the site may have lost its own.
        requests = {
            site: _student_request(
                run,
                architecture,
                student,
                auxiliary if stage == "distil" and (attempt or site not in has_auxiliary) else None,
                large,
                number,
                stage,
                site,
            )
            for site in open_sites
        }
        record.bytes_down += sum(request.bytes for request in requests.values())
        deadline = run.config.federation.hop_deadline * len(open_sites)
        patience = run.config.federation.patience
        for site, reply in run.consortium.exchange.stream(requests, StudentResult, deadline, patience=patience):
            problem = reply.reason if isinstance(reply, Failure) else _problem(run, reply, site, number, template)
            if problem or isinstance(reply, Failure):
                failed[site] = problem or ""
                if isinstance(reply, Failure) and reply.final:
                    final.add(site)
                continue
            failed.pop(site, None)
            replies[site] = reply
            record.bytes_up += reply.bytes
    if not replies:
        raise ChainwardError(
            f"student round {number}: no site finished it; {next(iter(failed.values()), 'no reason given')}"
        )
    if len(replies) < run.config.student.quorum:
        raise ChainwardError(
            f"student round {number}: {len(replies)} of {len(run.consortium.sites)} sites finished it, student.quorum is "
            f"{run.config.student.quorum}; {next(iter(failed.values()), 'no reason given')}. Resume the run when they are back"
        )
    for site in run.consortium.sites:
        run.progress.add(run.student_work(site))
    for reason in failed.values():
        logger.warning("student round %d goes on without a site: %s", number, reason)
    record.sites = [site for site in run.consortium.sites if site in replies]
    record.failed = failed
    record.auxiliary_kept = _kept(run, [replies[site].body for site in record.sites])
    average = _average([replies[site] for site in record.sites], template, number)
    average = rounded(average, run.config.federation.transfer)
    record.seconds = time.monotonic() - started
    return average, record


def _kept(run: Run, results: list[StudentResult]) -> float | None:
    """Return what fraction of its own selection the auxiliary teacher still holds, over all rounds, mean of the sites."""
    kept = [result.auxiliary_kept for result in results if result.auxiliary_kept is not None]
    if not kept:
        return None
    before = [round_.auxiliary_kept for round_ in run.results.student_rounds if round_.auxiliary_kept is not None]
    return (before[-1] if before else 1.0) * sum(kept) / len(kept)


def _student_request(
    run: Run,
    architecture: Architecture,
    student: StateDict,
    auxiliary: StateDict | None,
    large: list[StateDict],
    number: int,
    stage: Literal["distil", "finetune"],
    site: str,
) -> Request:
    task = StudentTask(
        run_id=run.folder.state.run_id,
        round=number,
        architecture=architecture,
        recipe=run.config.student_recipe(stage),
        student_digest=digest(student),
        auxiliary_digest=None if auxiliary is None else digest(auxiliary),
        large_architecture=run.architecture if large else None,
        large_digests=[digest(state) for state in large],
        seen_head=run.privacy.seen_head(site),
        simulated=run.consortium.exchange.members[site].simulated,
    )
    arrays = {"student": to_arrays(student)}
    if auxiliary is not None:
        arrays["auxiliary"] = to_arrays(auxiliary)
    arrays.update({f"large_{i}": to_arrays(state) for i, state in enumerate(large)})
    return Request("train.student", task, arrays)


def _problem(run: Run, reply: Reply[StudentResult], site: str, number: int, template: StateDict) -> str | None:
    """Return in one line why a site's student can't be averaged, or None if it can."""
    body = reply.body
    if (body.site, body.round) != (site, number):
        return f"site '{site}' answered round {body.round} of site '{body.site}'; expected round {number}"
    weights = reply.message.content.metric_records.get("metrics")
    stated = None if weights is None else weights.get(EXAMPLES_KEY)
    if body.examples < 1 or stated != body.examples:
        return f"site '{site}' states {stated!r} examples; expected the {body.examples} of its result"
    if "student" not in reply.arrays:
        return f"site '{site}' sent no student"
    try:
        state = from_arrays(reply.arrays["student"], template)
    except ChainwardError as error:
        return f"site '{site}' sent a student that can't be used: {error}"
    if digest(state) != body.digest:
        return f"site '{site}' sent a student with another digest than it states"
    try:
        check_training(body.training, run.consortium.cards[site], run.config.student.epochs, run.folder.age)
        run.privacy.take(body.statement, site, f"student-round-{number}")
    except StatementError as error:
        return str(error)
    except ProtocolError as error:
        return f"site '{site}' sent a student that can't be used: {error}"
    return None


def _average(replies: list[Reply[StudentResult]], template: StateDict, number: int) -> StateDict:
    """Return the average of the students, weighted by training cases, as Flower's FedAvg computes it.

    The replies come in the order of the sites: sums of floats depend on the order, and the run must be repeatable. They are
    summed in the template's dtypes, not in the float16 in which they came.
    """
    for reply in replies:
        reply.message.content["student"] = to_full_arrays(from_arrays(reply.arrays["student"], template))
    arrays, _ = FedAvg(weighted_by_key=EXAMPLES_KEY).aggregate_train(number, [reply.message for reply in replies])
    if arrays is None:
        raise ChainwardError(f"student round {number}: Flower's FedAvg returned no average")
    return from_full_arrays(arrays, template)
