"""What the steps of a training work with, private or not: model, data, optimiser and learning rates, on one device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chainward_client.checkpoint import Checkpoint, Saved, restore_training, training_state
from chainward_client.data.site_data import Cases
from chainward_client.precision import best_device
from chainward_client.training.objective import Batch, Objective
from chainward_shared.models.start import train_mode
from chainward_shared.models.trunk import Trunk
from chainward_shared.pixels import Pixels
from chainward_shared.preprocessing import pixels_of
from chainward_shared.recipes import TrainingRecipe


@dataclass(frozen=True)
class Training:
    """A training that is ready for its first step.

    Attributes
    ----------
    called : what is called with images, or with a trunk's features: the model, or the rest of it
    images, labels : the labelled cases, on the device
    unlabelled : images without label, on the device; None where there are none
    pixels : how the model's pixels are scaled
    """

    model: nn.Module
    called: nn.Module
    recipe: TrainingRecipe
    objective: Objective
    images: Tensor
    labels: Tensor
    unlabelled: Tensor | None
    pixels: Pixels | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    steps_per_epoch: int
    checkpoint: Checkpoint | None

    def batch(self, rows: Tensor, unlabelled: Tensor | None, views: torch.Generator) -> Batch:
        """Return the batch of the labelled cases `rows`, with images without label beside them."""
        return Batch(
            self.images[rows], self.labels[rows], rows, unlabelled, self.recipe.augmentation, views, self.pixels
        )

    def step(self) -> None:
        """Take the optimiser's step along the gradients that there are."""
        self.optimizer.step()
        self.schedule.step()
        self.objective.after_step(self.model)

    def resume(self, generators: Mapping[str, torch.Generator]) -> Saved | None:
        """Put the training back to where it was interrupted, and return what was kept; None if it was not."""
        saved = None if self.checkpoint is None else self.checkpoint.load()
        if saved is not None:
            self.objective.load_state(restore_training(saved.tensors, self.model, self.optimizer, generators))
        return saved

    def keep(
        self,
        epoch: int,
        curves: Mapping[str, list[float]],
        generators: Mapping[str, torch.Generator],
        further: Mapping[str, Tensor],
    ) -> None:
        """Write down the training as it is after `epoch`, 0-based, where it is to be written down at all."""
        if self.checkpoint is not None:
            tensors = training_state(self.model, self.optimizer, generators, self.objective.state())
            self.checkpoint.save(epoch + 1, curves, tensors | dict(further), last=epoch + 1 == self.recipe.epochs)


def prepare(
    model: nn.Module,
    cases: Cases,
    recipe: TrainingRecipe,
    objective: Objective,
    *,
    unlabelled: Tensor | None,
    trunk: Trunk | None,
    layer_decay: float,
    steps: int | None,
    part: tuple[int, int],
    checkpoint: Checkpoint | None,
) -> Training:
    """Bring the model and what it trains on to the device; the arguments are those of `training.loop.train`.

    Parameters
    ----------
    steps : of a private training, in all; None: as many as its batches have cases
    """
    device = best_device()
    per_epoch = math.ceil(len(cases) / recipe.batch_size if steps is None else steps / recipe.epochs)
    train_mode(model.to(device))
    objective.start(device, per_epoch)
    groups = parameter_groups(model, objective, recipe.weight_decay, layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
    return Training(
        model=model,
        called=model if trunk is None else trunk.rest,
        recipe=recipe,
        objective=objective,
        images=cases.images.to(device),
        labels=cases.labels.to(device),
        unlabelled=unlabelled.to(device) if unlabelled is not None and len(unlabelled) else None,
        pixels=pixels_of(model),
        optimizer=optimizer,
        schedule=one_cycle(optimizer, recipe.learning_rate, steps or recipe.epochs * per_epoch, part),
        steps_per_epoch=per_epoch,
        checkpoint=checkpoint,
    )


def parameter_groups(
    model: nn.Module, objective: Objective, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of one weight decay and one ``lr_scale``, a factor on the learning rate."""
    # seconds of CPU: see `chainward_shared.models.architecture`
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    groups: list[dict[str, Any]] = (
        param_groups_weight_decay(model, weight_decay)
        if layer_decay == 1
        else param_groups_layer_decay(model, weight_decay, layer_decay=layer_decay)
    )
    if extra := objective.extra_parameters():
        groups.append({"params": extra, "weight_decay": weight_decay})
    return groups


def one_cycle(
    optimizer: torch.optim.Optimizer, peak: float, steps: int, part: tuple[int, int]
) -> torch.optim.lr_scheduler.OneCycleLR:
    """Return the schedule of part `part[0]` of `part[1]`, of `steps` each.

    A training of one step gets the first of two: the last of a cycle has a rate at which nothing is learned.
    """
    index, of = part
    peaks = [peak * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=max(2, of * steps))
    skip_steps(schedule, index * steps)
    return schedule


def skip_steps(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    """Move a schedule on by steps that were done elsewhere: in another part, or before a crash."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step")
        for _ in range(steps):
            schedule.step()
