"""The one training loop. A link, a student, a baseline are objectives for it, not copies of it."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from chainward_client.checkpoint import Checkpoint
from chainward_client.data.site_data import Cases
from chainward_client.precision import best_device, resolve_precision, training_environment
from chainward_client.training.objective import Objective
from chainward_client.training.private_loop import private_log, train_privately
from chainward_client.training.setup import Training, prepare, skip_steps
from chainward_shared.errors import ModelError
from chainward_shared.models.start import mixes_images
from chainward_shared.models.trunk import Trunk
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import TrainingRecipe
from chainward_shared.seeds import derive_seed, torch_generator

if TYPE_CHECKING:
    from chainward_client.private_training import PrivateTraining

logger = logging.getLogger("chainward.client")

PROGRESS_SECONDS = 20.0
"""A training reports an epoch at most this often."""


def train(
    model: nn.Module,
    cases: Cases,
    recipe: TrainingRecipe,
    objective: Objective,
    *names: str | int,
    unlabelled: Tensor | None = None,
    part: tuple[int, int] = (0, 1),
    layer_decay: float = 1.0,
    trunk: Trunk | None = None,
    private: PrivateTraining | None = None,
    checkpoint: Checkpoint | None = None,
) -> TrainingLog:
    """Train `model` in place on `cases` and return how it went.

    The model ends on the CPU, in evaluation mode. `names` name the training (purpose, site, strand, lap): batches and
    augmentation derive from the recipe's seed by them, so the same names and cases give the same model, bit for bit.

    Parameters
    ----------
    unlabelled : further images without labels, uint8 (m, c, h, w); every batch gets as many of them as it has labelled
        ones. An epoch is one pass over the labelled images
    part : (index, of): this training is part `index`, 0-based, of `of` equal ones under one learning-rate schedule
    layer_decay : factor on the learning rate from each layer to the one before it (as timm counts layers), the last has 1
    trunk : images are its features (`training.features`), and what is called is the rest of the model; None: all of it
    private : train privately; it then decides steps and batches; holds what was spent, also after an
        error. The log says nothing of the data then: no losses, and the expected number of images
    checkpoint : where the training writes itself down from epoch to epoch, and goes on from if it was interrupted: without
        privacy to the same model, bit for bit

    Raises
    ------
    ModelError
        The loss (private: a weight) is not finite, or a backbone with batch norm has a single image to train on.
    PrivacyError
        A private training is asked for something that is not a function of one record and public things.
    """
    if len(cases) < 2 and mixes_images(model):
        raise ModelError(
            "a backbone with batch norm needs at least 2 training images at a site, found 1; choose another"
        )
    images_without_label = 0 if unlabelled is None else len(unlabelled)
    if private is not None:
        private.check(recipe, images_without_label)
    started = time.monotonic()
    with training_environment(recipe.threads, derive_seed(recipe.seed, *names, "torch")):
        training = prepare(
            model,
            cases,
            recipe,
            objective,
            unlabelled=unlabelled,
            trunk=trunk,
            layer_decay=layer_decay,
            steps=None if private is None else private.dp_sgd.steps,
            part=part,
            checkpoint=checkpoint,
        )
        if private is not None:
            train_privately(training, private, cases.patients)
            return private_log(recipe, private, started)
        epochs = _Epochs(training, names, resolve_precision(recipe.precision, best_device()))
        epochs.run(started)
        model.to("cpu").eval()
    return epochs.log(time.monotonic() - started, images_without_label)


class _Epochs:
    """The epochs of a training without privacy, in shuffled batches, and what is noted of each."""

    def __init__(self, training: Training, names: tuple[str | int, ...], precision: str) -> None:
        seed = training.recipe.seed
        self.training, self.precision, self.name = training, precision, " ".join(map(str, names))
        self.order = torch_generator(seed, *names, "batches")
        self.views = torch_generator(seed, *names, "augmentation")
        self.generators = {"order": self.order, "views": self.views}
        self.others = None
        if training.unlabelled is not None:
            self.others = _Unlabelled(training.unlabelled, torch_generator(seed, *names, "unlabelled"))
            self.generators["unlabelled"] = self.others.generator
        self.curves: dict[str, list[float]] = {"loss": []}

    def run(self, started: float) -> None:
        """Train from the first epoch, or the first that an interrupted training has left, to the last."""
        epochs, first = self.training.recipe.epochs, self._resume()
        reported = started
        for epoch in range(first, epochs):
            self.training.objective.start_epoch(epoch)
            self._note(epoch, self._epoch())
            left_over = {} if self.others is None else {"unlabelled.left": self.others.left.clone()}
            self.training.keep(epoch, self.curves, self.generators, left_over)
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                left = (reported - started) / (epoch + 1) * (epochs - epoch - 1)
                loss = self.curves["loss"][-1]
                logger.info(
                    "%s: epoch %d of %d, loss %.3f, about %.0f s left", self.name, epoch + 1, epochs, loss, left
                )

    def log(self, seconds: float, unlabelled: int) -> TrainingLog:
        """Return how the training went, in `seconds`, with so many images without label."""
        training, epochs = self.training, self.training.recipe.epochs
        return TrainingLog(
            epochs=epochs,
            steps=epochs * training.steps_per_epoch,
            images=epochs * len(training.labels),
            unlabelled=unlabelled,
            seconds=seconds,
            precision=self.precision,
            **self.curves,
        )

    def _resume(self) -> int:
        training = self.training
        saved = training.resume(self.generators)
        if saved is None:
            return 0
        if self.others is not None:
            self.others.left = saved.tensors["unlabelled.left"]
        self.curves = saved.log
        skip_steps(training.schedule, saved.epoch * training.steps_per_epoch)
        logger.info("%s: goes on after epoch %d of %d", self.name, saved.epoch, training.recipe.epochs)
        return saved.epoch

    def _epoch(self) -> float:
        """Do the steps of one epoch, and return the mean loss of the labelled images."""
        training = self.training
        device, count = training.labels.device, len(training.labels)
        total = torch.zeros((), device=device)
        # Batches of nearly one size: a remainder of one image would be too few for batch norm, and too loud.
        for rows in torch.randperm(count, generator=self.order).to(device).tensor_split(training.steps_per_epoch):
            beside = None if self.others is None else self.others.take(len(rows))
            batch = training.batch(rows, beside, self.views)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                losses = training.objective.losses(training.called, batch)
            labelled, rest = losses[: len(rows)], losses[len(rows) :]
            training.optimizer.zero_grad(set_to_none=True)
            (labelled.mean() + rest.mean() if len(rest) else labelled.mean()).backward()
            training.step()
            total += labelled.detach().sum()
        return float(total) / count

    def _note(self, epoch: int, loss: float) -> None:
        self.curves["loss"].append(loss)
        recipe = self.training.recipe
        if not math.isfinite(loss):
            raise ModelError(
                f"the loss became {loss} in epoch {epoch + 1} of {recipe.epochs}; "
                f"lower the learning rate (now {recipe.learning_rate:g})"
            )
        for name, value in self.training.objective.epoch_log().items():
            self.curves.setdefault(name, []).append(value)


class _Unlabelled:
    """Batches out of images without labels, in an order that is shuffled anew whenever all have been seen."""

    def __init__(self, images: Tensor, generator: torch.Generator) -> None:
        self.images, self.generator = images, generator
        self.left = torch.empty(0, dtype=torch.int64)

    def take(self, count: int) -> Tensor:
        """Return `count` images, uint8 (count, c, h, w)."""
        while len(self.left) < count:
            self.left = torch.cat([self.left, torch.randperm(len(self.images), generator=self.generator)])
        chosen, self.left = self.left[:count], self.left[count:]
        return self.images[chosen.to(self.images.device)]
