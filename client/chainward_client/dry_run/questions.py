"""What a coordinator asks in a run, with fresh weights and little work."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import torch
from flwr.app import ArrayRecord

from chainward_client.doctor.privacy import beginning
from chainward_client.private_site import declared_units
from chainward_client.site import OpenSite
from chainward_shared.config import RunConfig
from chainward_shared.hops import END_HEAD, STUDENT_HEAD
from chainward_shared.models import Architecture, build_model
from chainward_shared.models.heads import check_head
from chainward_shared.models.of_run import run_architectures
from chainward_shared.models.start import initial_model, travelling
from chainward_shared.noisy_discriminant import FEWEST_AXES
from chainward_shared.private_sums import Frame, SumsForm
from chainward_shared.protocol import (
    BaseTask,
    Body,
    CardRequest,
    EvaluateTask,
    HelloRequest,
    LinkTask,
    StatisticsTask,
    StudentTask,
)
from chainward_shared.weights import StateDict, digest, rounded, to_arrays

RUN = "dry-run"


Question = tuple[str, Body, dict[str, ArrayRecord]]


def questions(plan: RunConfig, site: OpenSite, steps: int) -> Iterator[Question]:
    """Yield what a coordinator asks in a run, with fresh weights and little work."""
    yield "query", HelloRequest(source="phantom", num_sites=0, label_skew=0.0), {}
    yield "query", CardRequest(), {}
    plan = _little(plan, site, steps)
    begun = beginning(plan, site.data)
    large, *small = run_architectures(plan, begun.architecture)
    if begun.base is not None:
        site.bases.keep(begun.base, large)
        yield "query", BaseTask(run_id=RUN, architecture=large, bytes=1, sha256="0" * 64), {}
    state = rounded(initial_model(large, plan.seed, begun.base).state_dict(), plan.federation.transfer)
    sent = to_arrays(travelling(state, large))
    link = LinkTask(
        run_id=RUN,
        hop="link",
        strand=0,
        lap=0,
        architecture=large,
        recipe=plan.link_recipe(),
        predecessor_digest=digest(state),
    )
    yield "train.link", link, {"predecessor": sent}
    if small:
        yield _student_question(plan, small[0], large, digest(state), sent)
    if plan.chain.head == "statistics":
        yield from _statistics_questions(plan, END_HEAD, large, digest(state), sent)
    if small and plan.student.head == "statistics":
        student = _fresh(small[0], plan.seed, plan)
        yield from _statistics_questions(plan, STUDENT_HEAD, small[0], digest(student), to_arrays(student))
    score = EvaluateTask(
        run_id=RUN,
        architecture=large,
        splits=["val", "test"],
        localisation=site.data.splits["test"].privileged.masks is not None,
        threads=plan.federation.cpu_threads,
        digest=digest(state),
    )
    yield "evaluate", score, {"model": sent}


def _fresh(architecture: Architecture, seed: int, plan: RunConfig) -> StateDict:
    return rounded(build_model(architecture, seed).state_dict(), plan.federation.transfer)


def _student_question(
    plan: RunConfig, small: Architecture, large: Architecture, large_digest: str, sent: ArrayRecord
) -> Question:
    student, auxiliary = _fresh(small, plan.seed, plan), _fresh(small, plan.seed + 1, plan)
    recipe = plan.student_recipe("distil")
    taught = recipe.large_weight > 0
    task = StudentTask(
        run_id=RUN,
        round=1,
        architecture=small,
        recipe=recipe,
        student_digest=digest(student),
        auxiliary_digest=digest(auxiliary),
        large_architecture=large if taught else None,
        large_digests=[large_digest] if taught else [],
    )
    arrays = {"student": to_arrays(student), "auxiliary": to_arrays(auxiliary)}
    return "train.student", task, arrays | ({"large_0": sent} if taught else {})


def _statistics_questions(
    plan: RunConfig, key: str, architecture: Architecture, asked: str, sent: ArrayRecord
) -> Iterator[Question]:
    """Yield the sums of a statistics round; in a private plan its two releases, in a frame of a few axes."""
    task = StatisticsTask(
        run_id=RUN,
        hop=key,
        architecture=architecture,
        label_fraction=plan.chain.label_fraction,
        seed=plan.seed,
        threads=plan.federation.cpu_threads,
        digest=asked,
    )
    if (privacy := plan.privacy_recipe()) is None:
        yield "evaluate.statistics", task, {"model": sent}
        return
    size = check_head(architecture)
    axes = torch.eye(min(FEWEST_AXES, size), size, dtype=torch.float64)
    frame = Frame(torch.zeros(size, dtype=torch.float64), axes).state()
    for hop, labels in ((f"{key}-centre", False), (key, True)):
        form = SumsForm(dimension=len(axes), labels=labels, moments=labels)
        private = {"hop": hop, "privacy": privacy, "form": form, "frame_digest": digest(frame)}
        yield "evaluate.statistics", task.model_copy(update=private), {"model": sent, "frame": to_arrays(frame)}


def _little(plan: RunConfig, site: OpenSite, steps: int) -> RunConfig:
    """Return the plan with one training of each kind, of about so many steps.

    One epoch of part of the cases, or several epochs where there are few. A private one is allowed what the policy allows a
    run, less one release of noised scores: whether the whole plan fits is for `chainward-site check --plan` to say.
    """
    data, policy, chain = site.data, site.policy, plan.chain
    units = len(data.splits["train"]) if policy is None else declared_units(policy, data)
    batch = plan.privacy.batch_size or chain.batch_size
    wanted = steps * batch / units
    epochs = max(1, ceil(wanted)) if wanted >= 1 else 1
    changes: dict[str, Any] = {
        "chain.laps": 1,
        "chain.strands": 1,
        "chain.merge": "best",
        "chain.refit": "end",
        "chain.epochs": epochs,
        "chain.label-fraction": min(1.0, wanted, chain.label_fraction),
        "chain.unlabelled-weight": 0.0,
        "student.epochs": epochs,
        "student.rounds": min(1, plan.student.rounds),
        "student.finetune-rounds": 0,
        "privileged.epochs": 1,
    }
    if plan.privacy.mode != "off" and policy is not None:
        allowed = (policy.epsilon_per_run or policy.epsilon) - (policy.metrics_epsilon or 0.0)
        if allowed > 0:
            changes["privacy.epsilon"] = min(plan.privacy.epsilon, 0.99 * allowed)
    return RunConfig.from_flat(plan.to_flat() | changes)
