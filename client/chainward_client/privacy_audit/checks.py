"""Checks of the private step itself, each of which fails when its part of the step is sabotaged.

They look at the real `PrivateTraining` through the real `train`, on a model of a few thousand weights, in seconds. Their
false-alarm rate is below one in a million each.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from chainward_client.bounded_sums import SumsRelease
from chainward_client.data.site_data import Cases
from chainward_client.privacy_audit.neighbours import (
    RECIPE,
    CrossEntropy,
    MakeTraining,
    choices_problem,
    extremes_problem,
    failures_problem,
)
from chainward_client.privacy_audit.released_sums import SUMS_CHECKS, MakeRelease
from chainward_client.private_training import PrivateTraining
from chainward_client.training.loop import train
from chainward_client.training.objective import Batch
from chainward_shared.errors import PrivacyError
from chainward_shared.privacy.accounting import Mechanism, spent
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.recipes import PrivilegedRecipe

_SIDE = 16
_CLASSES = 8
_Z = 5.5  # standard deviations: two-sided, 4 in 10^8
_LONG = CrossEntropy(100.0)
_DP_SGD = DpSgd(
    unit="patient", delta=1e-5, noise_multiplier=2.0, sample_rate=0.25, expected_batch=8.0, steps=8, clip=0.5
)


def mechanism_problems(
    training: MakeTraining = PrivateTraining, ledger: type[Ledger] = Ledger, release: MakeRelease = SumsRelease
) -> list[str]:
    """Return what is wrong with the private step and with releases of sums as they run here, one sentence each; none if all is
    well.

    Parameters
    ----------
    training, ledger, release : what is checked, by default what is installed; see `sabotage`
    """
    problems = [check(training) for check in _STEP_CHECKS]
    problems += [check(release) for check in SUMS_CHECKS]
    return [problem for problem in [*problems, choices_problem(), accounting_problem(ledger)] if problem]


def noise_problem(training: MakeTraining = PrivateTraining) -> str:
    """The noise of a step without any image has the standard deviation asked for, and no structure."""
    scaled = (
        torch.cat([_step(_DP_SGD, [], training) for _ in range(8)])
        * _DP_SGD.expected_batch
        / (_DP_SGD.noise_multiplier * _DP_SGD.clip)
    )
    n = len(scaled)
    apart = (float(scaled.square().mean()) - 1) / math.sqrt(2 / n)
    if abs(apart) > _Z:
        return (
            f"the noise has {float(scaled.std()):.3f} times the specified standard deviation (of {n} numbers, "
            f"{apart:+.1f} standard errors)"
        )
    together = float((scaled[:-1] * scaled[1:]).mean()) * math.sqrt(n)
    if abs(together) > _Z:
        return f"neighbouring numbers of the noise depend on one another ({together:+.1f} standard errors)"
    return ""


def clipping_problem(training: MakeTraining = PrivateTraining) -> str:
    """Without noise, one image moves the sum by the clipping norm and not more, and n images by at most n times that."""
    dp_sgd = _DP_SGD.model_copy(update={"noise_multiplier": 0.0})
    for rows in ([0], [1], [0, 1, 2, 3]):
        length = float(_step(dp_sgd, rows, training).norm()) * dp_sgd.expected_batch
        if not length <= len(rows) * dp_sgd.clip * 1.001:
            who = "1 image" if len(rows) == 1 else f"{len(rows)} images"
            return (
                f"{who} can move the sum of gradients by {length:.3f}; clipped by {len(rows) * dp_sgd.clip:g} at most"
            )
    return ""


def normalisation_problem(training: MakeTraining = PrivateTraining) -> str:
    """The same image yields the same gradient in a step alone as its share in a step of many: the divisor is fixed."""
    dp_sgd = _DP_SGD.model_copy(update={"noise_multiplier": 0.0})
    apart = _step(dp_sgd, [0], training) + _step(dp_sgd, [1], training) - _step(dp_sgd, [0, 1], training)
    if not float(apart.norm()) <= 1e-3 * dp_sgd.clip / dp_sgd.expected_batch:
        return "the sum of gradients is not divided by the expected batch but by something that depends on the sample"
    return ""


def sampling_problem(training: MakeTraining = PrivateTraining) -> str:
    """Every patient is sampled with the specified probability, independently, and yields one image."""
    private, model, cases = training(_DP_SGD), _model(), _cases()
    private.start(model, [], list(model.parameters()), cases.patients)
    draws = 3000
    patients = cases.patients
    names = sorted(set(patients))
    seen = np.zeros((draws, len(names)))
    for draw in range(draws):
        whose = [names.index(patients[row]) for row in private.sample().tolist()]
        if len(set(whose)) < len(whose):
            return "a step holds two images of one patient"
        seen[draw, whose] = 1.0
    private.close()
    q = _DP_SGD.sample_rate
    apart = (seen.mean(axis=0) - q) / math.sqrt(q * (1 - q) / draws)
    if np.abs(apart).max() > _Z:
        return f"a patient is sampled {np.abs(apart).max():.1f} standard errors more or less often than specified"
    sizes = seen.sum(axis=1)
    expected = len(names) * q * (1 - q)
    if abs(sizes.var() / expected - 1) > _Z * math.sqrt(2 / draws) * 1.2:
        return f"the number of patients in a step varies by {sizes.var():.2f}, of independent ones by {expected:.2f}"
    return ""


def entropy_problem(training: MakeTraining = PrivateTraining) -> str:
    """Two trainings with the same run seed end with different weights: the seed reaches neither noise nor sampling."""
    ends, firsts = [], []
    for _ in range(2):
        model = _model()
        private = training(_DP_SGD)
        train(model, _cases(), RECIPE, _LONG, "audit", private=private)
        if private.entropy.seeded:
            return "the noise comes from a seeded generator, which is for tests only"
        ends.append(parameters_to_vector(model.parameters()).detach())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            firsts.append(_step(_DP_SGD, [], training))
    if torch.equal(*ends) or torch.equal(*firsts):
        return "two trainings with one seed draw the same noise: whoever knows the seed can take it off again"
    return ""


def empty_batch_problem(training: MakeTraining = PrivateTraining) -> str:
    """A step whose sample is empty still adds noise, is counted, and changes the weights."""
    dp_sgd = _DP_SGD.model_copy(update={"sample_rate": 1e-9, "steps": 2})
    model, private = _model(), training(dp_sgd)
    before = parameters_to_vector(model.parameters()).detach()
    train(model, _cases(), RECIPE, _LONG, "audit", private=private)
    if private.steps_done != 2:
        return f"2 steps with empty samples are counted as {private.steps_done}"
    if torch.equal(before, parameters_to_vector(model.parameters()).detach()):
        return "a step whose sample is empty leaves the weights as they were, which tells that it is empty"
    return ""


def buffers_problem(training: MakeTraining = PrivateTraining) -> str:
    """Training leaves buffers untouched."""
    model = _model()
    model.register_buffer("note", torch.ones(3))
    train(model, _cases(), RECIPE, _LONG, "audit", private=training(_DP_SGD))
    if not torch.equal(dict(model.named_buffers())["note"], torch.ones(3)):
        return "training changes buffers, which are neither clipped nor noised"
    return ""


def teachers_problem(training: MakeTraining = PrivateTraining) -> str:
    """A privileged teacher is not let in unless it was said to be trained privately: it has seen every patient."""
    teacher = PrivilegedRecipe(use="all", logit_weight=1.0, embedding_weight=0.0, temperature=2.0, epochs=1)
    taught = RECIPE.model_copy(update={"privileged": teacher})
    try:
        train(_model(), _cases(), taught, _LONG, "audit", private=training(_DP_SGD))
    except PrivacyError:
        return ""
    return "a privileged teacher that was trained without privacy is let in"


def accounting_problem(ledger: type[Ledger] = Ledger) -> str:
    """Ten rounds cost what their steps cost together, also when the ledger is opened anew for each of them."""
    rounds, steps, delta = 10, 10, 1e-5
    key = Ed25519PrivateKey.generate()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        Ledger.create(path, "audit", key)
        for turn in range(rounds):
            opened = ledger.open(path, key, "audit")
            mechanism = Mechanism("dp-sgd", 1.0, 0.1, steps)
            reservation = opened.reserve(
                mechanism, run="audit", phase="link", hop=f"round-{turn}", unit="patient", delta=delta
            )
            reservation.begin()
            opened.commit(reservation, steps)
        stated = spent(ledger.open(path, key, "audit").mechanisms(), delta)
    true = spent([Mechanism("dp-sgd", 1.0, 0.1, rounds * steps)], delta)
    if math.isclose(stated, true, rel_tol=1e-6):
        return ""
    return f"{rounds} rounds are accounted as epsilon {stated:.2f}; together they cost {true:.2f}"


_STEP_CHECKS: tuple[Callable[[MakeTraining], str], ...] = (
    noise_problem,
    clipping_problem,
    normalisation_problem,
    sampling_problem,
    entropy_problem,
    empty_batch_problem,
    buffers_problem,
    teachers_problem,
    extremes_problem,
    failures_problem,
)
CHECKS = len(_STEP_CHECKS) + len(SUMS_CHECKS) + 2
"""How many properties `mechanism_problems` checks."""


def _step(dp_sgd: DpSgd, rows: list[int], training: MakeTraining) -> Tensor:
    """Return the gradient, all parameters in one vector, that a private step of exactly these images yields."""
    model, private, cases = _model(), training(dp_sgd), _cases()
    private.start(model, [], list(model.parameters()), cases.patients)
    for part in private.parts(torch.tensor(rows, dtype=torch.int64)):
        batch = Batch(cases.images[part], cases.labels[part], part, None, "none", torch.Generator())
        private.accumulate(_LONG.losses(model, batch))
    private.finish_step()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    private.close()
    return gradient


def _model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(4 * 49, 24),
            nn.GELU(),
            nn.Linear(24, _CLASSES),
        ).train()


def _cases() -> Cases:
    """40 images of 32 patients, eight of whom have two."""
    generator = torch.Generator().manual_seed(6)
    images = torch.randint(0, 256, (40, 1, _SIDE, _SIDE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, _CLASSES, (40,), generator=generator)
    return Cases(images, labels, np.array([f"patient-{i % 32}" for i in range(40)]))
