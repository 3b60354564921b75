"""What a run will ask of a site, said before it asks: for hospitals where a person approves every run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from chainward_shared.bounds import Sha256
from chainward_shared.models import Architecture
from chainward_shared.outside import MAX_SITES, Line, RunId, SiteId
from chainward_shared.protocol.envelope import Body
from chainward_shared.protocol.joining import BaseTask
from chainward_shared.protocol.scoring import EvaluateTask, StatisticsTask
from chainward_shared.protocol.training import LinkTask, StudentTask
from chainward_shared.recipes import LinkRecipe, StudentRecipe

PlannedTask = LinkTask | StudentTask | EvaluateTask | StatisticsTask | BaseTask
"""What a site does only within a plan, where a person approves runs there."""

Approval = Literal["approved", "waiting", "refused"]


class RunPlan(Body):
    """All that a run will ask of each site. A task that is not within it needs another plan, and another approval.

    Attributes
    ----------
    asked_by : who asks, in the coordinator's own words
    model, link : the model that travels along the chain, with the weights it starts from; how a link is trained
    laps, strands : a link is trained here once for each of both
    alone : how the site is trained without the others, for the comparison; None: it is not
    student, students, rounds : the compact model and how it is trained, in all its rounds; None and empty: it is not
    statistics, student_statistics : whether the classifier of the model, and of the student, comes from sums over the sites'
        embeddings
    noise_from : the noise of how many sites together private sums need, in secure sums; 1: each adds all of it
    """

    KIND: ClassVar[str] = "run-plan"

    run_id: RunId
    asked_by: Line = ""
    model: Architecture
    link: LinkRecipe
    laps: Annotated[int, Field(ge=0, le=100)]
    strands: Annotated[int, Field(ge=1, le=512)]
    alone: LinkRecipe | None = None
    student: Architecture | None = None
    students: Annotated[list[StudentRecipe], Field(max_length=2)] = Field(default_factory=list)
    rounds: Annotated[int, Field(ge=0, le=20_000)] = 0
    statistics: bool = False
    student_statistics: bool = False
    noise_from: Annotated[int, Field(ge=1, le=MAX_SITES)] = 1

    @property
    def digest(self) -> str:
        """SHA-256 of everything in it: what an approval is bound to."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def links(self) -> int:
        """How many links a site trains."""
        return self.laps * self.strands


class RunPlanState(Body):
    """A site's answer to a plan. `plan`: digest of the plan that is approved, waits or was refused."""

    KIND: ClassVar[str] = "run-plan-state"

    site: SiteId
    approval: Approval
    plan: Sha256


def beyond(task: PlannedTask, plan: RunPlan) -> str | None:
    """Return in what a task is not within a plan, naming the fields; None where it is."""
    found = next(_differences(task, plan), None)
    return None if found is None else f"{found} (run {plan.run_id}, plan {plan.digest[:12]})"


def _differences(task: PlannedTask, plan: RunPlan) -> Iterator[str]:
    if task.run_id != plan.run_id:
        yield f"the plan is for run {plan.run_id}, and not for {task.run_id}"
    if isinstance(task, LinkTask):
        yield from _link(task, plan)
    elif isinstance(task, StudentTask):
        yield from _student(task, plan)
    elif isinstance(task, StatisticsTask):
        summed = ((plan.model, plan.statistics), (plan.student, plan.student_statistics))
        planned = [model for model, asked in summed if asked and model is not None]
        if not planned:
            yield "sums over embeddings are not in the plan"
        elif task.architecture not in planned:
            yield from _model("architecture", task.architecture, planned[0])
        for name in ("label_fraction", "seed"):
            if getattr(task, name) != getattr(plan.link, name):
                yield f"{name} of the sums is not that of the plan"
        if task.privacy not in (None, plan.link.privacy):
            yield "privacy of the sums is not that of the plan"
        if task.shared_noise is not None and task.shared_noise.sites != plan.noise_from:
            yield f"noise shared among {task.shared_noise.sites} sites is not in the plan, which has it from {plan.noise_from}"
    elif isinstance(task, BaseTask):
        yield from _model("architecture", task.architecture, plan.model)
    elif task.architecture not in (plan.model, plan.student):
        yield "a model is to be scored that is not in the plan"


def _link(task: LinkTask, plan: RunPlan) -> Iterator[str]:
    yield from _model("architecture", task.architecture, plan.model)
    if task.trained_alone and plan.alone is None:
        yield "a training without the other sites is not in the plan"
    planned = plan.alone if task.trained_alone and plan.alone is not None else plan.link
    yield from _recipe(task.recipe, planned)
    for name, value, most in (("lap", task.lap, plan.laps), ("strand", task.strand, plan.strands)):
        if value >= most:
            yield f"{name} {value + 1} of {most}"


def _student(task: StudentTask, plan: RunPlan) -> Iterator[str]:
    planned = next((one for one in plan.students if one.stage == task.recipe.stage), None)
    if plan.student is None or planned is None:
        yield f"students ({task.recipe.stage}) are not in the plan"
        return
    yield from _model("architecture", task.architecture, plan.student)
    if task.large_architecture is not None:
        yield from _model("large_architecture", task.large_architecture, plan.model)
    yield from _recipe(task.recipe, planned)
    if task.round > plan.rounds:
        yield f"round {task.round} of {plan.rounds}"


def _model(what: str, asked: Architecture, planned: Architecture) -> Iterator[str]:
    for name in Architecture.model_fields:
        if getattr(asked, name) != getattr(planned, name):
            other = "the weights it starts from" if name == "start" else name
            yield f"{what}: {other} is not that of the plan"


def _recipe(asked: LinkRecipe | StudentRecipe, planned: LinkRecipe | StudentRecipe) -> Iterator[str]:
    for name in type(planned).model_fields:
        if getattr(asked, name) != getattr(planned, name):
            yield f"recipe.{name} is not that of the plan"
