"""The steps of a private training: each of a Poisson sample, in parts that fit into memory, and of one draw of noise.

What comes out is a moving average of the weights over the steps (De et al. 2022, arXiv:2204.13650). It is computed from weights
that noise protects already, and so costs no privacy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from chainward_client.checkpoint import optimised
from chainward_client.training.setup import Training, skip_steps
from chainward_shared.errors import ModelError
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import TrainingRecipe

if TYPE_CHECKING:
    from chainward_client.private_training import PrivateTraining

logger = logging.getLogger("chainward.client")


class WeightAverage:
    """An exponential moving average of parameters over the steps of a training, whose decay rises with them.

    Parameters
    ----------
    parameters : which the optimiser changes
    decay : that it rises to; 0: there is no average
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.steps = (list(parameters) if decay else []), decay, 0
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Take in the parameters after a step: ``average <- d average + (1-d) parameter``, ``d = min(decay, (1+t) / (10+t))``."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1.0 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the parameters to their average."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            parameter.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Return the averages, to be written down."""
        return {f"average.{number}": value for number, value in enumerate(self.values)}

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on from what `state` returned after so many steps."""
        self.steps = steps
        for number, value in enumerate(self.values):
            value.copy_(tensors[f"average.{number}"])


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
    parameters = optimised(training.optimizer)
    private.start(training.model, training.objective.extra_modules(), parameters, patients)
    average = WeightAverage(parameters, private.average_decay)
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
        skip_steps(training.schedule, private.steps_done)
        average.load(saved.tensors, private.steps_done)
        logger.info("a private training goes on after epoch %d of %d", first, recipe.epochs)
    try:
        for epoch in range(first, recipe.epochs):
            training.objective.start_epoch(epoch)
            for _ in range(steps * epoch // recipe.epochs, steps * (epoch + 1) // recipe.epochs):
                private.step(losses)
                training.step()
                average.step()
            if not all(bool(parameter.isfinite().all()) for parameter in parameters):
                raise ModelError(
                    f"a weight is not finite after epoch {epoch + 1} of {recipe.epochs} of a private training; "
                    f"lower the learning rate (now {recipe.learning_rate:g})"
                )
            training.keep(epoch, {}, {}, average.state())
        average.apply()
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
