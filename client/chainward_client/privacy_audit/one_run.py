"""A lower bound on epsilon, measured by attack on one run of the real training code.

Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run" (NeurIPS 2023): each of m canaries is trained on
or left out by its own fair coin; an attacker who sees the trained model guesses some of the coins; an (epsilon, delta)
private training limits how many of them can be right.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn import functional

from chainward_client.data.site_data import Cases
from chainward_client.training.loop import Batch, Objective, train
from chainward_client.training.private import PrivateTraining
from chainward_shared.errors import PrivacyError
from chainward_shared.models import Architecture, build_model
from chainward_shared.models.private_ready import GradSampleMode, check_private_ready
from chainward_shared.pixels import to_float
from chainward_shared.privacy.accounting import spent
from chainward_shared.privacy.plan import PrivatePlan
from chainward_shared.recipes import TrainingRecipe

CONFIDENCE = 0.95
_SIDE = 32
_CLASSES = 8


@dataclass(frozen=True)
class EmpiricalAudit:
    """What the attack found.

    Attributes
    ----------
    claimed : epsilon of the plan at its delta, as accounted
    measured : lower bound on epsilon at `confidence`
    canaries, guesses, correct : how many there were, how many coins were guessed, how many of them rightly
    """

    claimed: float
    measured: float
    confidence: float
    canaries: int
    guesses: int
    correct: int

    @property
    def problem(self) -> str | None:
        """One sentence where the measured bound is above the claim, else None."""
        if self.measured <= self.claimed:
            return None
        return (
            f"an attack on the trained model guesses {self.correct} of {self.guesses} coins: epsilon is at least "
            f"{self.measured:.2f} at {self.confidence:.0%} confidence, claimed is {self.claimed:.2f}"
        )


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return how probable at least `correct` right guesses are, at most, if the training is (epsilon, delta) private.

    Theorem 5.2 with the algorithm of appendix D: right guesses are dominated by Binomial(guesses, e^eps / (1 + e^eps)),
    but for what delta adds.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise PrivacyError(f"{correct} right of {guesses} guesses about {canaries} canaries is impossible")
    right = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, right))
    if delta == 0 or correct == 0:
        return min(1.0, tail)
    below = np.cumsum(
        binom.pmf(np.arange(correct - 1, -1, -1), guesses, right)
    )  # P[correct - i <= X < correct], i = 1..
    worst = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * worst)


def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Return the largest epsilon that the guesses refute at this confidence; 0 where they refute none.

    Parameters
    ----------
    canaries : each was included by a fair coin
    guesses : about how many of them the attacker said something; fixed before looking, or the confidence is not what it says
    correct : how many of the guesses were right

    Raises
    ------
    PrivacyError
        The numbers contradict one another.
    """
    doubt = 1.0 - confidence
    if p_value(canaries, guesses, correct, 0.0, delta) >= doubt:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(canaries, guesses, correct, high, delta) < doubt:
        low, high = high, high + 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) < doubt:
            low = middle
        else:
            high = middle
    return low


def audit_training(
    plan: PrivatePlan, *, canaries: int = 400, architecture: Architecture | None = None, epochs: int = 1
) -> EmpiricalAudit:
    """Train once by `plan` on random canaries and return what the trained model betrays of them.

    A canary is a patient with one image of random black and white pixels and a random label. The attacker knows them all
    and the initial weights, and sees the trained model: the further a canary's loss fell, the surer it was trained on.
    Of the canaries, a quarter is guessed to be in, a quarter to be out. The coins come from the operating system.

    Parameters
    ----------
    plan : about `canaries` / 2 units take part, so its ``expected_batch`` should be ``sample_rate * canaries / 2``
    architecture : the model under attack; None, the default, a linear one, which remembers random images as well as any
        model can, in a second. With classes and channels of its own

    Raises
    ------
    ModelError
        The backbone can't be trained privately.
    """
    classes = _CLASSES if architecture is None else architecture.num_classes
    channels, side = (1, _SIDE) if architecture is None else (architecture.in_chans, architecture.image_size)
    generator = np.random.default_rng(secrets.randbits(128))
    pixels = generator.integers(0, 2, (canaries, channels, side, side), dtype=np.uint8) * 255
    images = torch.from_numpy(pixels)
    labels = torch.from_numpy(generator.integers(0, classes, canaries))
    inside = generator.random(canaries) < 0.5
    model, mode = _model(architecture, channels * side * side, classes)
    before = _losses(model, images, labels)
    rows = np.flatnonzero(inside)
    patients = np.array([f"canary-{row}" for row in rows])
    cases = Cases(images[rows], labels[rows], patients)
    recipe = TrainingRecipe(
        seed=0,
        epochs=epochs,
        batch_size=max(1, round(plan.expected_batch)),
        learning_rate=2e-3,
        weight_decay=0.0,
        augmentation="none",
        precision="fp32",
        threads=torch.get_num_threads(),
        class_balance="none",
        label_fraction=1.0,
    )
    private = PrivateTraining(plan, mode)
    train(model, cases, recipe, _CrossEntropy(), "audit", private=private)
    fell = (before - _losses(model, images, labels)).numpy()
    order = np.argsort(-fell, kind="stable")
    quarter = canaries // 4
    correct = int(inside[order[:quarter]].sum() + (~inside[order[-quarter:]]).sum())
    return EmpiricalAudit(
        claimed=spent([plan.mechanism], plan.delta),
        measured=epsilon_lower_bound(canaries, 2 * quarter, correct, plan.delta),
        confidence=CONFIDENCE,
        canaries=canaries,
        guesses=2 * quarter,
        correct=correct,
    )


class _CrossEntropy(Objective):
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch.view()).float(), batch.labels, reduction="none")


def _model(architecture: Architecture | None, inputs: int, classes: int) -> tuple[nn.Module, GradSampleMode]:
    if architecture is not None:
        return build_model(architecture, seed=0), check_private_ready(architecture)
    linear = nn.Linear(inputs, classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Flatten(), linear), "hooks"


@torch.no_grad()
def _losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    model.eval()
    return torch.cat(
        [
            functional.cross_entropy(model(to_float(some)).float(), of_some, reduction="none")
            for some, of_some in zip(images.split(64), labels.split(64), strict=True)
        ]
    )
