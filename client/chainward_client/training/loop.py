"""The one training loop. A link, a student, a baseline are objectives for it, not copies of it."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from chainward_client.data.site_data import Cases
from chainward_client.training.augmentation import augmented
from chainward_client.training.precision import best_device, resolve_precision, training_environment
from chainward_shared.errors import ModelError
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import Augmentation, TrainingRecipe
from chainward_shared.seeds import derive_seed, torch_generator

logger = logging.getLogger("chainward.client")

PROGRESS_SECONDS = 20.0
"""A training reports an epoch at most this often."""


@dataclass
class Batch:
    """One batch: its labels, (n,), and as many random views of its images as an objective asks for."""

    images: Tensor
    labels: Tensor
    augmentation: Augmentation
    generator: torch.Generator

    def view(self) -> Tensor:
        """Return a new random view of the images, float32 (n, c, h, w)."""
        return augmented(self.images, self.augmentation, self.generator)


class Objective(Protocol):
    """What a training minimises."""

    def start(self, device: torch.device, steps_per_epoch: int) -> None:
        """Prepare for a training on `device`."""

    def start_epoch(self, epoch: int) -> None:
        """Prepare for `epoch`, 0-based."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each example, (n,); each a function of its own example."""

    def after_step(self, model: nn.Module) -> None:
        """Follow a step of the optimiser."""

    def epoch_log(self) -> dict[str, float]:
        """Return what to note of the epoch that ended: `temperature`, `teacher_trust`."""


def train(
    model: nn.Module, cases: Cases, recipe: TrainingRecipe, objective: Objective, *names: str | int
) -> TrainingLog:
    """Train `model` in place on `cases` and return how it went.

    The model ends on the CPU, in evaluation mode. `names` name the training (purpose, site, strand, lap): batches and
    augmentation derive from the recipe's seed by them, so the same names and cases give the same model, bit for bit.

    Raises
    ------
    ModelError
        The loss is not finite, or a backbone with batch norm has a single image to train on.
    """
    if len(cases) < 2 and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ModelError(
            "a backbone with batch norm needs at least 2 training images at a site, found 1; choose another"
        )
    device = best_device()
    precision = resolve_precision(recipe.precision, device)
    started = time.monotonic()
    with training_environment(recipe.threads, derive_seed(recipe.seed, *names, "torch")):
        model.to(device).train()
        images, labels = cases.images.to(device), cases.labels.to(device)
        steps_per_epoch = math.ceil(len(cases) / recipe.batch_size)
        optimizer = torch.optim.AdamW(
            param_groups_weight_decay(model, recipe.weight_decay), lr=recipe.learning_rate, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=recipe.learning_rate, total_steps=recipe.epochs * steps_per_epoch
        )
        order = torch_generator(recipe.seed, *names, "batches")
        views = torch_generator(recipe.seed, *names, "augmentation")
        objective.start(device, steps_per_epoch)
        log: dict[str, list[float]] = {"loss": []}
        reported = started
        for epoch in range(recipe.epochs):
            objective.start_epoch(epoch)
            total = torch.zeros((), device=device)
            # Batches of nearly one size: a remainder of one image would be too few for batch norm, and too loud.
            for chosen in torch.randperm(len(cases), generator=order).to(device).tensor_split(steps_per_epoch):
                batch = Batch(images[chosen], labels[chosen], recipe.augmentation, views)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    losses = objective.losses(model, batch)
                optimizer.zero_grad(set_to_none=True)
                losses.mean().backward()
                optimizer.step()
                schedule.step()
                objective.after_step(model)
                total += losses.detach().sum()
            log["loss"].append(float(total) / len(cases))
            if not math.isfinite(log["loss"][-1]):
                raise ModelError(
                    f"the loss became {log['loss'][-1]} in epoch {epoch + 1} of {recipe.epochs}; "
                    f"lower the learning rate (now {recipe.learning_rate:g})"
                )
            for name, value in objective.epoch_log().items():
                log.setdefault(name, []).append(value)
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                left = (reported - started) / (epoch + 1) * (recipe.epochs - epoch - 1)
                logger.info(
                    "%s: epoch %d of %d, loss %.3f, about %.0f s left",
                    " ".join(map(str, names)),
                    epoch + 1,
                    recipe.epochs,
                    log["loss"][-1],
                    left,
                )
        model.to("cpu").eval()
    return TrainingLog(
        epochs=recipe.epochs,
        steps=recipe.epochs * steps_per_epoch,
        images=recipe.epochs * len(cases),
        loss=log["loss"],
        temperature=log.get("temperature", []),
        teacher_trust=log.get("teacher_trust", []),
        seconds=time.monotonic() - started,
        precision=precision,
    )
