"""The recipe of a compact student: self-distillation from an auxiliary teacher of the same small architecture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chainward_client.data.site_data import SiteData
from chainward_client.training.link import labelled_cases
from chainward_client.training.loop import Batch, train
from chainward_shared.distillation.losses import classification_loss, distillation_loss
from chainward_shared.distillation.schedules import ema_decay
from chainward_shared.models import Architecture, build_model
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import StudentRecipe
from chainward_shared.weights import StateDict


class StudentObjective:
    """``L = CE(y, A(x1)) + l T^2 KL(B(x2) || A(x1))``; after each step ``B <- m B + (1-m) A`` (methods, section 3).

    Parameters
    ----------
    auxiliary : B, the auxiliary teacher; None in fine-tuning
    counts : training cases of each class at this site, (classes,)
    round_index : rounds of self-distillation before this one
    """

    def __init__(self, recipe: StudentRecipe, auxiliary: nn.Module | None, counts: Tensor, round_index: int) -> None:
        self.recipe, self.auxiliary, self.counts, self.round_index = recipe, auxiliary, counts, round_index
        self.step = self.epoch = self.steps_per_epoch = 0
        self.kept = 1.0
        """How much of its own selection the auxiliary teacher still holds: the product of the decays."""

    def start(self, device: torch.device, steps_per_epoch: int) -> None:
        self.counts = self.counts.to(device)
        self.steps_per_epoch = steps_per_epoch
        if self.auxiliary is not None:
            self.auxiliary.to(device).eval().requires_grad_(False)

    def start_epoch(self, epoch: int) -> None:
        self.epoch = self.round_index * self.recipe.epochs + epoch

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.view()).float()
        loss = classification_loss(logits, batch.labels, self.counts, self.recipe.class_balance)
        if self.auxiliary is None or self.recipe.distillation_weight == 0:
            return loss
        with torch.no_grad():
            teacher_logits = self.auxiliary(batch.view()).float()
        return loss + self.recipe.distillation_weight * distillation_loss(
            logits, teacher_logits, self.recipe.temperature
        )

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        step = self.round_index * self.recipe.epochs * self.steps_per_epoch + self.step
        self.step += 1
        if self.auxiliary is None or self.epoch < self.recipe.frozen_epochs:
            return
        total = self.recipe.rounds * self.recipe.epochs * self.steps_per_epoch
        decay = ema_decay(step, total, self.recipe.ema_decay)
        self.kept *= decay
        for mine, theirs in zip(self.auxiliary.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 1.0 - decay)
        for held, current in zip(self.auxiliary.buffers(), model.buffers(), strict=True):
            held.copy_(current)

    def epoch_log(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class TrainedStudent:
    """What a round at a site yields: A, B (None in fine-tuning), how it went, and how much of B's weights at the round's
    start the moving average has left in it (None in fine-tuning)."""

    student: StateDict
    auxiliary: StateDict | None
    log: TrainingLog
    auxiliary_kept: float | None


def train_student(
    data: SiteData,
    architecture: Architecture,
    recipe: StudentRecipe,
    student: StateDict,
    auxiliary: StateDict | None,
    *,
    round_index: int,
) -> TrainedStudent:
    """Train the student for one round at a site.

    Parameters
    ----------
    student : weights of A, as aggregated over the sites
    auxiliary : weights of B, this site's own; None in fine-tuning, which has no teacher
    round_index : rounds before this one, of both stages
    """
    cases = labelled_cases(data, recipe)
    model = build_model(architecture, recipe.seed)
    model.load_state_dict(student)
    teacher = None
    if auxiliary is not None:
        teacher = build_model(architecture, recipe.seed)
        teacher.load_state_dict(auxiliary)
    counts = torch.bincount(cases.labels, minlength=len(data.classes))
    objective = StudentObjective(recipe, teacher, counts, round_index)
    log = train(model, cases, recipe, objective, "student", recipe.stage, data.site, "round", round_index)
    state = dict(model.state_dict())
    if teacher is None:
        return TrainedStudent(state, None, log, None)
    return TrainedStudent(state, dict(teacher.to("cpu").state_dict()), log, objective.kept)
