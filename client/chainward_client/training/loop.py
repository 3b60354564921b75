"""The one training loop. A link, a student, a baseline are objectives for it, not copies of it."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chainward_client.checkpoint import Checkpoint, restore_training, training_state
from chainward_client.data.site_data import Cases
from chainward_client.precision import best_device, resolve_precision, training_environment
from chainward_client.training.augmentation import augmented
from chainward_client.training.features import forward_of, is_features, one_view
from chainward_shared.errors import ModelError
from chainward_shared.models.start import mixes_images, train_mode
from chainward_shared.models.trunk import Trunk
from chainward_shared.preprocessing import Pixels, pixels_of
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import TrainingRecipe
from chainward_shared.seeds import derive_seed, torch_generator
from chainward_shared.settings import Augmentation

if TYPE_CHECKING:
    from chainward_client.private_training import PrivateTraining

logger = logging.getLogger("chainward.client")

PROGRESS_SECONDS = 20.0
"""A training reports an epoch at most this often."""


@dataclass
class Batch:
    """One batch, and as many random views of its images as an objective asks for.

    Attributes
    ----------
    images, labels : the labelled images, uint8 (n, c, h, w), or their features, float16 (n, views, ...), and their labels
    rows : int64 (n,), which of the training's cases they are
    unlabelled : images without a label that go with them, uint8 (m, c, h, w); None where there are none
    pixels : how the model's pixels are scaled
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    unlabelled: Tensor | None
    augmentation: Augmentation
    generator: torch.Generator
    pixels: Pixels | None = None

    def view(self) -> Tensor:
        """Return a new random view of the images, float32 (n + m, c, h, w), labelled ones first; of features, (n + m, ...)."""
        images = self.images if self.unlabelled is None else torch.cat([self.images, self.unlabelled])
        if is_features(images):
            return one_view(images, self.generator)
        return augmented(images, self.augmentation, self.generator, self.pixels)


class Objective:
    """What a training minimises. Only `losses` must be given."""

    def start(self, device: torch.device, steps_per_epoch: int) -> None:
        """Prepare for a training on `device`."""

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return what is trained beside the model and never leaves: a projector, say."""
        return []

    def extra_modules(self) -> list[nn.Module]:
        """Return the modules of `extra_parameters`: private training clips their gradients with the model's."""
        return []

    def start_epoch(self, epoch: int) -> None:
        """Prepare for `epoch`, 0-based."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each example, (n,), or (n + m,) where the batch has m unlabelled images; each a function of
        its own example."""
        raise NotImplementedError

    def after_step(self, model: nn.Module) -> None:
        """Follow a step of the optimiser."""

    def epoch_log(self) -> dict[str, float]:
        """Return what to note of the epoch that ended, by the names of `TrainingLog`'s lists."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what the objective has learnt by the end of an epoch, but for `extra_parameters`: a moving average, say."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""


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
    private : train privately by its plan, which then decides steps and batches; holds what was spent, also after an
        error. The log says nothing of the data then: no losses, and the plan's number of images
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
    device, pixels = best_device(), pixels_of(model)
    precision = resolve_precision(recipe.precision, device)
    if private is not None:
        private.check(recipe, 0 if unlabelled is None else len(unlabelled))
        precision = "fp32"
    started = time.monotonic()
    with training_environment(recipe.threads, derive_seed(recipe.seed, *names, "torch")):
        train_mode(model.to(device))
        called = forward_of(model, trunk)
        steps_per_epoch = math.ceil(len(cases) / recipe.batch_size)
        if private is not None:
            steps_per_epoch = math.ceil(private.plan.steps / recipe.epochs)
        objective.start(device, steps_per_epoch)
        images, labels = cases.images.to(device), cases.labels.to(device)
        groups = _parameter_groups(model, objective, recipe.weight_decay, layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
        if private is not None:
            schedule = _one_cycle(optimizer, recipe.learning_rate, private.plan.steps, part)
            _train_privately(
                model, cases, recipe, objective, unlabelled, trunk, private, optimizer, schedule, checkpoint
            )
            return _private_log(recipe, private, started)
        schedule = _one_cycle(optimizer, recipe.learning_rate, recipe.epochs * steps_per_epoch, part)
        order = torch_generator(recipe.seed, *names, "batches")
        views = torch_generator(recipe.seed, *names, "augmentation")
        others = None
        if unlabelled is not None and len(unlabelled):
            others = _Unlabelled(unlabelled.to(device), torch_generator(recipe.seed, *names, "unlabelled"))
        log: dict[str, list[float]] = {"loss": []}
        generators = {"order": order, "views": views, **({} if others is None else {"unlabelled": others.generator})}
        first = 0
        if checkpoint is not None and (saved := checkpoint.load()) is not None:
            objective.load_state(restore_training(saved.tensors, model, optimizer, generators))
            if others is not None:
                others.left = saved.tensors["unlabelled.left"]
            first, log = saved.epoch, saved.log
            _forward(schedule, first * steps_per_epoch)
            logger.info("%s: goes on after epoch %d of %d", " ".join(map(str, names)), first, recipe.epochs)
        reported = started
        for epoch in range(first, recipe.epochs):
            objective.start_epoch(epoch)
            total = torch.zeros((), device=device)
            # Batches of nearly one size: a remainder of one image would be too few for batch norm, and too loud.
            for chosen in torch.randperm(len(cases), generator=order).to(device).tensor_split(steps_per_epoch):
                beside = None if others is None else others.take(len(chosen))
                batch = Batch(images[chosen], labels[chosen], chosen, beside, recipe.augmentation, views, pixels)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    losses = objective.losses(called, batch)
                labelled, rest = losses[: len(chosen)], losses[len(chosen) :]
                optimizer.zero_grad(set_to_none=True)
                (labelled.mean() + rest.mean() if len(rest) else labelled.mean()).backward()
                optimizer.step()
                schedule.step()
                objective.after_step(model)
                total += labelled.detach().sum()
            log["loss"].append(float(total) / len(cases))
            if not math.isfinite(log["loss"][-1]):
                raise ModelError(
                    f"the loss became {log['loss'][-1]} in epoch {epoch + 1} of {recipe.epochs}; "
                    f"lower the learning rate (now {recipe.learning_rate:g})"
                )
            for name, value in objective.epoch_log().items():
                log.setdefault(name, []).append(value)
            if checkpoint is not None:
                tensors = training_state(model, optimizer, generators, objective.state())
                left_over = {} if others is None else {"unlabelled.left": others.left.clone()}
                checkpoint.save(epoch + 1, log, tensors | left_over, last=epoch + 1 == recipe.epochs)
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
        unlabelled=0 if unlabelled is None else len(unlabelled),
        temperature=log.get("temperature", []),
        teacher_trust=log.get("teacher_trust", []),
        attention=log.get("attention", []),
        unlabelled_loss=log.get("unlabelled_loss", []),
        privileged=log.get("privileged", []),
        seconds=time.monotonic() - started,
        precision=precision,
    )


def _train_privately(
    model: nn.Module,
    cases: Cases,
    recipe: TrainingRecipe,
    objective: Objective,
    unlabelled: Tensor | None,
    trunk: Trunk | None,
    private: PrivateTraining,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    checkpoint: Checkpoint | None,
) -> None:
    """Do the steps of the plan: each of a Poisson sample, in parts that fit into memory, and of one draw of noise."""
    device, n, steps = next(model.parameters()).device, len(cases), private.plan.steps
    images, labels = cases.images.to(device), cases.labels.to(device)
    others = None if unlabelled is None or not len(unlabelled) else unlabelled.to(device)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    private.start(model, objective.extra_modules(), parameters, cases.patients)
    views, pixels, called = private.fresh_chance(device), pixels_of(model), forward_of(model, trunk)

    def losses(rows: Tensor) -> Tensor:
        chosen = rows[rows < n].to(device)
        beside = None if others is None or len(chosen) == len(rows) else others[rows[rows >= n] - n]
        batch = Batch(images[chosen], labels[chosen], chosen, beside, recipe.augmentation, views, pixels)
        return objective.losses(called, batch)

    first = 0
    if checkpoint is not None and (saved := checkpoint.load()) is not None:
        objective.load_state(restore_training(saved.tensors, model, optimizer, {}))
        views = private.fresh_chance(device)  # not what it was: the randomness of a private training is never kept
        first, private.steps_done = saved.epoch, steps * saved.epoch // recipe.epochs
        _forward(schedule, private.steps_done)
        logger.info("a private training goes on after epoch %d of %d", first, recipe.epochs)
    try:
        for epoch in range(first, recipe.epochs):
            objective.start_epoch(epoch)
            for _ in range(steps * epoch // recipe.epochs, steps * (epoch + 1) // recipe.epochs):
                private.step(losses)
                optimizer.step()
                schedule.step()
                objective.after_step(model)
            if not all(bool(parameter.isfinite().all()) for parameter in parameters):
                raise ModelError(
                    f"a weight is not finite after epoch {epoch + 1} of {recipe.epochs} of a private training; "
                    f"lower the learning rate (now {recipe.learning_rate:g})"
                )
            if checkpoint is not None:
                tensors = training_state(model, optimizer, {}, objective.state())
                checkpoint.save(epoch + 1, {}, tensors, last=epoch + 1 == recipe.epochs)
    finally:
        private.close()
    model.to("cpu").eval()


def _private_log(recipe: TrainingRecipe, private: PrivateTraining, started: float) -> TrainingLog:
    plan = private.plan
    return TrainingLog(
        epochs=recipe.epochs,
        steps=plan.steps,
        images=round(plan.steps * plan.expected_batch),
        loss=[],
        seconds=time.monotonic() - started,
        precision="fp32",
        privacy=plan,
    )


def _parameter_groups(
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


def _one_cycle(
    optimizer: torch.optim.Optimizer, peak: float, steps: int, part: tuple[int, int]
) -> torch.optim.lr_scheduler.OneCycleLR:
    """Return the schedule of part `part[0]` of `part[1]`, of `steps` each."""
    index, of = part
    peaks = [peak * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=of * steps)
    _forward(schedule, index * steps)
    return schedule


def _forward(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    """Move a schedule on by steps that were done elsewhere: in another part, or before a crash."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step")
        for _ in range(steps):
            schedule.step()


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
