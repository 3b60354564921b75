"""The method from its first link to its student: the one loop that runs, wherever the sites are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from chainward_server.baseline import run_alone
from chainward_server.by_class import judged
from chainward_server.chain import ChainOutcome, run_chain
from chainward_server.context import Run
from chainward_server.students import run_students
from chainward_shared.config.contradictions import secure_contradictions
from chainward_shared.errors import StartAnewError
from chainward_shared.models import Architecture
from chainward_shared.models.of_run import student_architecture
from chainward_shared.weights import StateDict

Stage = Literal["chain", "alone", "students"]


@dataclass(frozen=True)
class Outcome:
    """What the method came to. `student`: None in a run without students."""

    chain: ChainOutcome
    student: StateDict | None


def run_method(
    run: Run,
    stage: Callable[[Stage], AbstractContextManager[object]] = lambda name: nullcontext(),
    *,
    students: bool = True,
) -> Outcome:
    """Train the chain, each site alone and the students, as the configuration says, or what is left of them.

    Parameters
    ----------
    stage : called with the name of each stage; the stage runs within what it returns
    students : False: without them, though private sites account for them

    Raises
    ------
    ChainwardError
        The run can't go on.
    """
    if run.secure and (problem := next(secure_contradictions(run.config), None)):
        raise StartAnewError(problem)
    with stage("chain"):
        chain = run_chain(run)
        _keep(run, "chain", run.architecture, chain.model)
    if run.config.chain.compare_alone:
        with stage("alone"):
            run_alone(run)
    if not (students and run.config.student.rounds):
        return Outcome(chain, None)
    with stage("students"):
        student = run_students(run, chain)
        _keep(run, "student", student_architecture(run.config.student, run.architecture), student)
    return Outcome(chain, student)


def _keep(run: Run, name: str, architecture: Architecture, state: StateDict) -> None:
    """Keep a final model, with all that its file says of it; one that an earlier part of the run has kept stays as it is."""
    if name in run.results.by_class and run.checkpoints.has_model(name):
        return
    record = None
    if run.score_all:
        if name == "student":
            run.results.final[name] = run.score(architecture, state, ["val", "test"])["test"]
        record = judged(run, name, architecture, state)
    run.save_model(name, state, architecture, record)
