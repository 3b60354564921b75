"""What the steps of a training work with, private or not: model, data, optimiser and schedule, on one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chainward_client.checkpoint import Checkpoint, Saved, restore_training, training_state
from chainward_client.data.site_data import Cases
from chainward_client.training.features import forward_of
from chainward_client.training.objective import Batch, Objective
from chainward_client.training.schedule import one_cycle, parameter_groups, skip_steps
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

    def skip(self, steps: int) -> None:
        """Move the schedule on by steps that were done before a crash."""
        skip_steps(self.schedule, steps)

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
    device: torch.device,
    *,
    unlabelled: Tensor | None,
    trunk: Trunk | None,
    layer_decay: float,
    steps_per_epoch: int,
    steps: int,
    part: tuple[int, int],
    checkpoint: Checkpoint | None,
) -> Training:
    """Bring the model and what it trains on to the device; the arguments are those of `training.loop.train`.

    Parameters
    ----------
    steps : of this part of the schedule
    """
    train_mode(model.to(device))
    objective.start(device, steps_per_epoch)
    groups = parameter_groups(model, objective, recipe.weight_decay, layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
    return Training(
        model=model,
        called=forward_of(model, trunk),
        recipe=recipe,
        objective=objective,
        images=cases.images.to(device),
        labels=cases.labels.to(device),
        unlabelled=unlabelled.to(device) if unlabelled is not None and len(unlabelled) else None,
        pixels=pixels_of(model),
        optimizer=optimizer,
        schedule=one_cycle(optimizer, recipe.learning_rate, steps, part),
        steps_per_epoch=steps_per_epoch,
        checkpoint=checkpoint,
    )
