"""The recipe of a compact student: self-distillation from an auxiliary teacher of the same small architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from chainward_client.checkpoint import Checkpoint
from chainward_client.data.site_data import SiteData
from chainward_client.private_site import PrivateWork
from chainward_client.training.features import Features
from chainward_client.training.link import labelled_cases, prepared_for, privileged_term, spending
from chainward_client.training.loop import train
from chainward_client.training.objective import Batch, Objective
from chainward_client.training.passes import passes
from chainward_shared.distillation.losses import classification_loss, distillation_loss, ensemble_distillation_loss
from chainward_shared.distillation.schedules import ema_decay
from chainward_shared.errors import ModelError
from chainward_shared.models import Architecture, build_model
from chainward_shared.models.taps import Taps
from chainward_shared.preprocessing import resized
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import StudentRecipe
from chainward_shared.weights import StateDict

if TYPE_CHECKING:
    from chainward_client.training.privileged import PrivilegedTerm


class StudentObjective(Objective):
    """``L = CE(y, A(x1)) + l T^2 KL(B(x2) || A(x1)) + g T^2 KL(large(x1) || A(x1)) + P``; after each step
    ``B <- m B + (1-m) A`` (mean teacher: Tarvainen and Valpola 2017, arXiv:1703.01780). P is the privileged teachers' part,
    `PrivilegedTerm`.

    Parameters
    ----------
    auxiliary : B, the auxiliary teacher; None in fine-tuning
    counts : training cases of each class at this site, as of `class_counts`
    round_index : rounds of self-distillation before this one
    large : the chain's large models, which teach by the mean of their probabilities; used where the recipe gives them
        weight
    large_size : side of the images that they see, pixels
    answers : what the large models say of each case as it is, logits (models, n, classes), in the place of `large`, where every
        view is the image as it is; None: they are asked about each view
    privileged : the term of the site's privileged teachers, and the taps that hold the student's embedding; or None
    """

    def __init__(
        self,
        recipe: StudentRecipe,
        auxiliary: nn.Module | None,
        counts: Tensor,
        round_index: int,
        *,
        large: Sequence[nn.Module] = (),
        large_size: int = 0,
        answers: Tensor | None = None,
        privileged: tuple[PrivilegedTerm, Taps] | None = None,
    ) -> None:
        self.recipe, self.auxiliary, self.counts, self.round_index = recipe, auxiliary, counts, round_index
        self.large, self.large_size = list(large) if recipe.large_weight > 0 else [], large_size
        self.answers = answers
        self.privileged = privileged
        self.step = self.epoch = self.steps_per_epoch = 0
        self.kept = 1.0
        """How much of its own selection the auxiliary teacher still holds: the product of the decays."""
        self.privileged_sum, self.seen = 0.0, 0

    def start(self, device: torch.device, steps_per_epoch: int) -> None:
        self.counts = self.counts.to(device)
        self.steps_per_epoch = steps_per_epoch
        for teacher in [*self.large, *([] if self.auxiliary is None else [self.auxiliary])]:
            teacher.to(device).eval().requires_grad_(False)
        if self.answers is not None:
            self.answers = self.answers.to(device)
        if self.privileged is not None:
            self.privileged[0].to(device)

    def extra_modules(self) -> list[nn.Module]:
        return [] if self.privileged is None else [self.privileged[0]]

    def start_epoch(self, epoch: int) -> None:
        self.epoch = self.round_index * self.recipe.epochs + epoch
        self.privileged_sum, self.seen = 0.0, 0

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        recipe, multilabel = self.recipe, batch.labels.ndim == 2
        view = batch.view()
        logits = model(view).float()
        loss = classification_loss(logits, batch.labels, self.counts, recipe.class_balance, recipe.prior_strength)
        if self.privileged is not None:
            term, taps = self.privileged
            guided = term.losses(logits, taps.embedding, batch.rows)
            self.privileged_sum += float(guided.detach().sum())
            self.seen += len(guided)
            loss = loss + guided
        if self.auxiliary is not None and recipe.distillation_weight > 0:
            with torch.no_grad():
                teacher_logits = self.auxiliary(batch.view()).float()
            apart = distillation_loss(logits, teacher_logits, recipe.temperature, multilabel=multilabel)
            loss = loss + recipe.distillation_weight * apart
        if (large_logits := self._of_large(view, batch.rows)) is not None:
            apart = ensemble_distillation_loss(logits, large_logits, recipe.temperature, multilabel=multilabel)
            loss = loss + recipe.large_weight * apart
        return loss

    @torch.no_grad()
    def _of_large(self, view: Tensor, rows: Tensor) -> Tensor | None:
        """Return what the large models say of the batch, logits (models, n, classes); None where there are none."""
        if self.answers is not None:
            return self.answers[:, rows]
        if not self.large:
            return None
        seen = resized(view, self.large_size or view.shape[-1])
        return torch.stack([large(seen).float() for large in self.large])

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        step = self.round_index * self.recipe.epochs * self.steps_per_epoch + self.step
        self.step += 1
        if self.auxiliary is None or self.recipe.auxiliary == "frozen" or self.epoch < self.recipe.frozen_epochs:
            return
        decay = self.recipe.ema_decay
        if self.recipe.ema_schedule == "cosine":
            total = self.recipe.rounds * self.recipe.epochs * self.steps_per_epoch
            decay = ema_decay(step, total, self.recipe.ema_decay)
        self.kept *= decay
        for mine, theirs in zip(self.auxiliary.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 1.0 - decay)
        for held, current in zip(self.auxiliary.buffers(), model.buffers(), strict=True):
            held.copy_(current)

    def state(self) -> dict[str, Tensor]:
        held = {} if self.auxiliary is None else dict(self.auxiliary.state_dict())
        return {"step": torch.tensor(self.step), "kept": torch.tensor(self.kept, dtype=torch.float64), **held}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        held = dict(state)
        self.step, self.kept = int(held.pop("step")), float(held.pop("kept"))
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(held)

    def epoch_log(self) -> dict[str, float]:
        return {} if self.privileged is None else {"privileged": self.privileged_sum / self.seen}


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
    large: Sequence[StateDict] = (),
    large_architecture: Architecture | None = None,
    features: Features | None = None,
    state_dir: Path | None = None,
    work: PrivateWork | None = None,
    checkpoint: Checkpoint | None = None,
) -> TrainedStudent:
    """Train the student for one round at a site, on images of its own size.

    Parameters
    ----------
    student : weights of A, as aggregated over the sites
    auxiliary : weights of B, this site's own; None in fine-tuning, which has no teacher
    round_index : rounds before this one, of both stages
    large, large_architecture : weights of the chain's large models, and what they are; needed where the recipe gives
        them weight
    features : where the output of a large model's frozen trunk is kept; None: nowhere
    state_dir : folder in which the site keeps its privileged teachers; None: trained anew for each round
    work : what a private training spends through; None: the site trains without privacy
    checkpoint : where the training writes itself down

    Raises
    ------
    ModelError
        The recipe gives large models weight, and there are none; or the student can't be trained privately.
    PrivacyError
        Policy, budget or ledger don't allow a private training.
    """
    cases = labelled_cases(data, recipe, private=work is not None)
    prepared = prepared_for(work, recipe, data, cases, architecture)
    recipe = prepared.recipe
    model = _loaded(architecture, recipe, student)
    teacher = None if auxiliary is None else _loaded(architecture, recipe, auxiliary)
    seen = replace(cases, images=resized(cases.images, architecture.image_size))
    large_models, large_size = _large_models(recipe, large, large_architecture)
    answers = None
    if large_models and recipe.augmentation == "none":
        as_they_are = [passes(one, seen.images, recipe.threads, large_size, features) for one in large_models]
        answers = torch.stack([torch.cat(list(logits)).cpu() for logits in as_they_are])
        large_models = []
    names = ("student", recipe.stage, data.site, "round", round_index)
    privileged = None
    if recipe.stage == "distil":
        term = privileged_term(data, cases, recipe, model, state_dir, *names, work=work)
        privileged = None if term is None else (term, Taps(model, embedding=True))
    objective = StudentObjective(
        recipe,
        teacher,
        prepared.counts,
        round_index,
        large=large_models,
        large_size=large_size,
        answers=answers,
        privileged=privileged,
    )
    guide = None if privileged is None else privileged[0]
    with spending(work, prepared, data, guide, checkpoint, phase="student") as privately:
        log = train(model, seen, recipe, objective, *names, private=privately, checkpoint=checkpoint)
    log = log.model_copy(update={"notes": prepared.notes})
    state = dict(model.state_dict())
    if teacher is None:
        return TrainedStudent(state, None, log, None)
    return TrainedStudent(state, dict(teacher.to("cpu").state_dict()), log, objective.kept)


def _large_models(
    recipe: StudentRecipe, large: Sequence[StateDict], architecture: Architecture | None
) -> tuple[list[nn.Module], int]:
    """Return the large models that teach, and the side of the images that they see, pixels; none where they have no weight."""
    if recipe.large_weight == 0:
        return [], 0
    if architecture is None or not large:
        raise ModelError(
            f"a student is to learn from large models with weight {recipe.large_weight:g}, found none; send them"
        )
    return [_loaded(architecture, recipe, state) for state in large], architecture.image_size


def _loaded(architecture: Architecture, recipe: StudentRecipe, state: StateDict) -> nn.Module:
    model = build_model(architecture, recipe.seed)
    model.load_state_dict(state)
    return model
