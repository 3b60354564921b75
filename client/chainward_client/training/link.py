"""The recipe of a link: cross-entropy on the site's own labels, and the predecessor as teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chainward_client.data.partition import keep_label_fraction
from chainward_client.data.site_data import Cases, SiteData
from chainward_client.training.loop import Batch, train
from chainward_shared.distillation.losses import classification_loss, distillation_loss, teacher_trust
from chainward_shared.distillation.schedules import annealed_temperature
from chainward_shared.models import Architecture, build_model
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import LinkRecipe, TrainingRecipe
from chainward_shared.weights import StateDict


class LinkObjective:
    """``L = (1-a) CE + a w T^2 KL(predecessor || link)`` (methods, section 1); without a predecessor, CE alone.

    Parameters
    ----------
    predecessor : frozen teacher, or None for the first link and for a hospital alone
    counts : training cases of each class at this site, (classes,)
    """

    def __init__(self, recipe: LinkRecipe, predecessor: nn.Module | None, counts: Tensor) -> None:
        self.recipe = recipe
        self.predecessor = predecessor if recipe.distillation_weight > 0 else None
        self.counts = counts
        self.temperature = recipe.temperature
        self.trust_sum, self.seen = 0.0, 0

    def start(self, device: torch.device, steps_per_epoch: int) -> None:
        self.counts = self.counts.to(device)
        if self.predecessor is not None:
            self.predecessor.to(device).eval().requires_grad_(False)

    def start_epoch(self, epoch: int) -> None:
        self.temperature = annealed_temperature(epoch, self.recipe.temperature, self.recipe.temperature_decay)
        self.trust_sum, self.seen = 0.0, 0

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        view = batch.view()
        logits = model(view).float()
        loss = classification_loss(logits, batch.labels, self.counts, self.recipe.class_balance)
        if self.predecessor is None:
            return loss
        with torch.no_grad():
            teacher_logits = self.predecessor(view).float()
            trust = teacher_trust(teacher_logits, batch.labels, self.recipe.teacher_trust)
        self.trust_sum += float(trust.sum())
        self.seen += len(trust)
        weight = self.recipe.distillation_weight
        return (1 - weight) * loss + weight * trust * distillation_loss(logits, teacher_logits, self.temperature)

    def after_step(self, model: nn.Module) -> None:
        """Nothing follows a step of a link."""

    def epoch_log(self) -> dict[str, float]:
        if self.predecessor is None:
            return {}
        return {"temperature": self.temperature, "teacher_trust": self.trust_sum / self.seen}


def labelled_cases(data: SiteData, recipe: TrainingRecipe) -> Cases:
    """Return the training cases that the recipe's label fraction leaves."""
    cases = data.splits["train"]
    if recipe.label_fraction == 1.0:
        return cases
    kept = keep_label_fraction(cases.labels.numpy(), recipe.label_fraction, recipe.seed, data.site)
    return Cases(cases.images[kept], cases.labels[kept], cases.patients[kept])


def train_link(
    data: SiteData,
    architecture: Architecture,
    recipe: LinkRecipe,
    predecessor: StateDict | None,
    *,
    strand: int,
    lap: int,
    alone: bool = False,
) -> tuple[StateDict, TrainingLog]:
    """Train one link at a site and return the refined weights and how it went.

    Parameters
    ----------
    predecessor : weights that the previous link handed on; None for the first link and for a hospital alone
    strand, lap : 0-based; with the site they name the random choices of this link
    alone : name them otherwise, so that a hospital alone is not the chain's first link in disguise
    """
    cases = labelled_cases(data, recipe)
    model = build_model(architecture, recipe.seed)
    teacher = None
    if predecessor is not None:
        teacher = build_model(architecture, recipe.seed)
        teacher.load_state_dict(predecessor)
        if recipe.start == "warm":
            model.load_state_dict(predecessor)
    counts = torch.bincount(cases.labels, minlength=len(data.classes))
    objective = LinkObjective(recipe, teacher, counts)
    purpose = "alone" if alone else "link"
    log = train(model, cases, recipe, objective, purpose, data.site, "strand", strand, "lap", lap)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}, log
