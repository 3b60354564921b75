"""A privileged teacher: a small network on the vectors of reports or table rows, trained at the site."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from chainward_client.precision import training_environment
from chainward_client.private_training import PrivateTraining
from chainward_shared.distillation.losses import class_counts, classification_loss
from chainward_shared.errors import ModelError
from chainward_shared.recipes import PrivilegedRecipe, TrainingRecipe
from chainward_shared.seeds import derive_seed, torch_generator

LEARNING_RATE = 1e-2
WEIGHT_DECAY = 1e-2
BATCH = 64
STEPS_PER_EPOCH = 16
"""At most; a site with more cases has larger batches, not a training of minutes."""

DROPOUT = 0.5


class PrivilegedTeacher(nn.Module):
    """One hidden layer between a privileged vector and the class logits.

    Parameters
    ----------
    inputs : length of the vectors
    hidden : units of the hidden layer, and length of the embedding
    classes : number of logits
    dropout : probability with which a hidden unit is left out in training
    """

    def __init__(self, inputs: int, hidden: int, classes: int, dropout: float = DROPOUT) -> None:
        super().__init__()
        # tanh, because an embedding is compared by its direction: with values of both signs no direction is common to all
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, classes)

    def embed(self, vectors: Tensor) -> Tensor:
        """Return the hidden layer, (n, hidden)."""
        hidden: Tensor = self.body(vectors)
        return hidden

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the logits, (n, classes)."""
        logits: Tensor = self.head(self.dropout(self.embed(vectors)))
        return logits


def _optimizer(teacher: PrivilegedTeacher, steps: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)


def train_teacher(
    vectors: Tensor,
    labels: Tensor,
    classes: int,
    recipe: PrivilegedRecipe,
    training: TrainingRecipe,
    *names: str | int,
) -> PrivilegedTeacher:
    """Return a teacher trained on `vectors`, on the CPU and in evaluation mode.

    A loop of its own: `training.loop.train` takes decoded images and augments them, and nothing of that applies to rows of
    numbers that are all in memory. What the two share is the loss, per example, with the same handling of class imbalance.

    Parameters
    ----------
    vectors : float32 (n, inputs)
    labels : int64 (n,), or multi-label float32 (n, classes)
    recipe : epochs and hidden units
    training : seed, threads and class balance
    names : name the training; initial weights, dropout and batches derive from the seed by them
    """
    with training_environment(training.threads, derive_seed(training.seed, *names, "torch")):
        teacher = PrivilegedTeacher(vectors.shape[1], recipe.hidden, classes).train()
        counts = class_counts(labels, classes)
        steps = min(math.ceil(len(vectors) / BATCH), STEPS_PER_EPOCH)
        optimizer, schedule = _optimizer(teacher, recipe.epochs * steps)
        order = torch_generator(training.seed, *names, "batches")
        for _ in range(recipe.epochs):
            for chosen in torch.randperm(len(vectors), generator=order).tensor_split(steps):
                losses = classification_loss(
                    teacher(vectors[chosen]), labels[chosen], counts, training.class_balance, training.prior_strength
                )
                optimizer.zero_grad(set_to_none=True)
                losses.mean().backward()
                optimizer.step()
                schedule.step()
    return teacher.eval()


def train_teacher_privately(
    vectors: Tensor,
    available: Tensor,
    labels: Tensor,
    patients: np.ndarray,
    classes: int,
    recipe: PrivilegedRecipe,
    training: TrainingRecipe,
    counts: Tensor,
    private: PrivateTraining,
    *names: str | int,
) -> PrivilegedTeacher:
    """Return a teacher trained as `private` says, on the CPU and in evaluation mode.

    Without dropout: clipping and noise keep it from knowing a case by heart, and dropout on top of them only costs
    accuracy. All units are sampled alike. A case without the modality has the loss 0, and so no gradient: nobody sees from
    the number of steps, the batches or the noise how many there are.

    Parameters
    ----------
    vectors : float32 (n, inputs), of all cases, each a function of its own record
    available : bool (n,), which cases have the modality
    labels : int64 (n,), or multi-label float32 (n, classes)
    patients : str (n,)
    recipe : hidden units; epochs and batch size are those of `private`
    training : seed, threads and class balance, as `PrivateWork.prepared` returns it
    counts : declared, in the form of `class_counts`
    names : name the training; the initial weights derive from the seed by them, nothing else does

    Raises
    ------
    ModelError
        A weight is not finite at the end.
    PrivacyError
        The recipe asks for something that is not a function of one record; its cost is spent.
    """
    private.check(training.model_copy(update={"privileged": None}), 0)  # this training has no teachers of its own
    with training_environment(training.threads, derive_seed(training.seed, *names, "torch")):
        teacher = PrivilegedTeacher(vectors.shape[1], recipe.hidden, classes, dropout=0.0).train()
        parameters = list(teacher.parameters())
        optimizer, schedule = _optimizer(teacher, private.dp_sgd.steps)

        def losses(rows: Tensor) -> Tensor:
            of_each = classification_loss(
                teacher(vectors[rows]), labels[rows], counts, training.class_balance, training.prior_strength
            )
            return torch.where(available[rows], of_each, 0.0)

        private.start(teacher, [], parameters, patients)
        try:
            for _ in range(private.dp_sgd.steps):
                private.step(losses)
                optimizer.step()
                schedule.step()
        finally:
            private.close()
        if not all(bool(parameter.isfinite().all()) for parameter in parameters):
            raise ModelError(
                "a privileged teacher's weight is not finite after a private training; raise privacy.epsilon"
            )
    return teacher.eval()
