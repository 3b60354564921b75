"""A lower bound on epsilon, measured by attack on one run of the real training code.

Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run" (NeurIPS 2023): each of m canaries is trained on
or left out by its own fair coin; an attacker who sees the trained model guesses some of the coins; an (epsilon, delta)
private training limits how many of them can be right.
"""

from __future__ import annotations

import math
import secrets

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn

from chainward_client.data.site_data import Cases
from chainward_client.privacy_audit.membership import case_losses
from chainward_client.privacy_audit.neighbours import RECIPE, CrossEntropy, MakeTraining
from chainward_client.private_training import PrivateTraining
from chainward_client.training.loop import train
from chainward_shared.errors import PrivacyError
from chainward_shared.privacy.accounting import spent
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_shared.privacy.empirical import Attack

CONFIDENCE = 0.95
CANARIES = 2000
_CLASSES = 2
_FEWEST = 8
_GREY = 128
_GRADIENT_LENGTH = 100.0  # far above every clipping norm, so that clipping matters


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
    dp_sgd: DpSgd,
    *,
    canaries: int = CANARIES,
    training: MakeTraining = PrivateTraining,
) -> Attack:
    """Train once with `dp_sgd` on random canaries and return what the trained model betrays of them.

    A canary is a patient with one image and a random label. The model is linear, and a canary is grey but for one white pixel,
    each another. Every canary has weights of its own then, which hides none behind the others: the strongest attack, in a
    second. The attacker knows them all and the initial weights, and sees the trained model: the further a canary's loss fell,
    the surer it was trained on. Of the canaries, a quarter is guessed to be in, a quarter to be out. The coins come from the
    operating system.

    Parameters
    ----------
    dp_sgd : about `canaries` / 2 units take part, so its ``expected_batch`` should be ``sample_rate * canaries / 2``
    canaries : at least 8
    training : what is attacked, by default what is installed; see `sabotage`

    Raises
    ------
    PrivacyError
        Too few canaries.
    """
    if canaries < _FEWEST:
        raise PrivacyError(f"an attack on {canaries} canaries says nothing; expected at least {_FEWEST}")
    threads = torch.get_num_threads()
    generator = np.random.default_rng(secrets.randbits(128))
    images, model = _single_pixels(canaries), _linear(canaries)
    labels = torch.from_numpy(generator.integers(0, _CLASSES, canaries))
    inside = generator.random(canaries) < 0.5
    everybody = Cases(images, labels, np.array([f"canary-{row}" for row in range(canaries)]))
    before = case_losses(model, everybody, threads)
    batch = max(1, round(dp_sgd.expected_batch))
    recipe = RECIPE.model_copy(
        update={"seed": 0, "epochs": 1, "batch_size": batch, "learning_rate": 2e-3, "threads": threads}
    )
    cases, objective = everybody.take(np.flatnonzero(inside)), CrossEntropy(_GRADIENT_LENGTH)
    train(model, cases, recipe, objective, "audit", private=training(dp_sgd))
    fell = before - case_losses(model, everybody, threads)
    order = np.argsort(-fell, kind="stable")
    quarter = canaries // 4
    correct = int(inside[order[:quarter]].sum() + (~inside[order[-quarter:]]).sum())
    return Attack(
        claimed=spent([dp_sgd.mechanism], dp_sgd.delta),
        measured=epsilon_lower_bound(canaries, 2 * quarter, correct, dp_sgd.delta),
        ceiling=epsilon_lower_bound(canaries, 2 * quarter, 2 * quarter, dp_sgd.delta),
        confidence=CONFIDENCE,
        canaries=canaries,
        guesses=2 * quarter,
        correct=correct,
    )


def _side(canaries: int) -> int:
    return math.ceil(math.sqrt(canaries))


def _single_pixels(canaries: int) -> Tensor:
    """Return uint8 (n, 1, h, w): image i is grey, and white at pixel i."""
    side = _side(canaries)
    pixels = np.full((canaries, side * side), _GREY, dtype=np.uint8)
    pixels[np.arange(canaries), np.arange(canaries)] = 255
    return torch.from_numpy(pixels.reshape(canaries, 1, side, side))


def _linear(canaries: int) -> nn.Module:
    """Return a linear model that sees grey as nothing: no pixel value is exactly 0, and Adam makes any sum of rests large."""
    linear = nn.Linear(_side(canaries) ** 2, _CLASSES, bias=False)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(nn.Flatten(), nn.Hardshrink(0.5), linear)
