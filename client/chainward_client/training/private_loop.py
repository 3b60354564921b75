"""The steps of a private training: each of a Poisson sample, in parts that fit into memory, and of one draw of noise."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from chainward_client.training.setup import Training
from chainward_shared.errors import ModelError
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import TrainingRecipe

if TYPE_CHECKING:
    from chainward_client.private_training import PrivateTraining

logger = logging.getLogger("chainward.client")


def train_privately(training: Training, private: PrivateTraining, patients: np.ndarray) -> None:
    """Do the private steps, and leave the model on the CPU, in evaluation mode.

    Parameters
    ----------
    patients : str (n,), of the labelled images

    Raises
    ------
    ModelError
        A weight is not finite after an epoch.
    """
    recipe, steps, n = training.recipe, private.dp_sgd.steps, len(training.labels)
    device = training.labels.device
    parameters = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    private.start(training.model, training.objective.extra_modules(), parameters, patients)
    views = private.secret_generator(device)

    def losses(rows: Tensor) -> Tensor:
        chosen = rows[rows < n].to(device)
        others = training.unlabelled
        beside = None if others is None or len(chosen) == len(rows) else others[rows[rows >= n] - n]
        return training.objective.losses(training.called, training.batch(chosen, beside, views))

    first = 0
    if (saved := training.resume({})) is not None:
        views = private.secret_generator(device)  # not what it was: the randomness of a private training is never kept
        first, private.steps_done = saved.epoch, steps * saved.epoch // recipe.epochs
        training.skip(private.steps_done)
        logger.info("a private training goes on after epoch %d of %d", first, recipe.epochs)
    try:
        for epoch in range(first, recipe.epochs):
            training.objective.start_epoch(epoch)
            for _ in range(steps * epoch // recipe.epochs, steps * (epoch + 1) // recipe.epochs):
                private.step(losses)
                training.step()
            if not all(bool(parameter.isfinite().all()) for parameter in parameters):
                raise ModelError(
                    f"a weight is not finite after epoch {epoch + 1} of {recipe.epochs} of a private training; "
                    f"lower the learning rate (now {recipe.learning_rate:g})"
                )
            training.keep(epoch, {}, {}, {})
    finally:
        private.close()
    training.model.to("cpu").eval()


def private_log(recipe: TrainingRecipe, private: PrivateTraining, started: float) -> TrainingLog:
    """Return the log of a private training that began at `started`: nothing in it is a function of the data."""
    dp_sgd = private.dp_sgd
    return TrainingLog(
        epochs=recipe.epochs,
        steps=dp_sgd.steps,
        images=round(dp_sgd.steps * dp_sgd.expected_batch),
        loss=[],
        seconds=time.monotonic() - started,
        precision="fp32",
        privacy=dp_sgd,
    )
