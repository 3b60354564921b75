"""Checks that one patient more or less changes what it may and nothing else, also where a coordinator means harm.

Like those in `checks`, they run the step and the functions that trainings run, and need no data of the hospital.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.data.splits import split_by_key
from chainward_client.private_training import PrivateTraining
from chainward_client.training.link import labelled_rows
from chainward_client.training.objective import Batch, Objective
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_shared.recipes import TrainingRecipe

RECIPE = TrainingRecipe(
    seed=11,
    epochs=2,
    batch_size=8,
    learning_rate=1e-3,
    weight_decay=0.0,
    augmentation="none",
    precision="fp32",
    threads=1,
    class_balance="none",
    label_fraction=1.0,
)
"""Of the trainings of all checks."""


class CrossEntropy(Objective):
    """The cross-entropy of each image times `scale`: with a large one gradients are far longer than the clipping norm."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.scale * functional.cross_entropy(model(batch.view()), batch.labels, reduction="none")


MakeTraining = Callable[[DpSgd], PrivateTraining]

_HARM = ((1e-25, 1e-33), (1e-12, 1e-24), (1e-30, 1e-30), (1e25, 1e-3), (1e-40, 1e-45), (1e38, 1.0))
"""Scales of the loss, and clipping norms, at which squares of float32 are 0 or infinite."""
_IMAGES, _SIDE, _CLASSES = 6, 8, 3


def extremes_problem(training: MakeTraining) -> str:
    """No image moves the sum of gradients by more than the clipping norm, however a recipe scales losses and norm."""
    for scale, clip in _HARM:
        for row in range(_IMAGES):
            model, cases = _model(), _cases([row])
            moved = _gradient(training, clip, model, cases, partial(_losses, model, cases, scale))
            if not float(moved.norm()) <= 1.001 * clip:
                return (
                    f"with the loss times {scale:g} and a clipping norm of {clip:g}, one image moves the sum of gradients by "
                    f"{float(moved.norm()) / clip:.3g} times the norm"
                )
    return ""


def failures_problem(training: MakeTraining) -> str:
    """An image whose loss can't be computed, or is not finite, neither fails the step nor changes what the others add."""

    def failing(losses: Tensor, numbers: Tensor) -> Tensor:
        if bool((numbers == 0).any()):
            raise IndexError("no such class")
        return losses

    def infinite(losses: Tensor, numbers: Tensor) -> Tensor:
        return torch.where(numbers == 0, losses * torch.inf, losses)

    for what, harm in (("fails", failing), ("is infinite", infinite)):
        found = []
        for numbers in (list(range(_IMAGES)), list(range(1, _IMAGES))):
            model, cases, names = _model(), _cases(numbers), torch.tensor(numbers)

            def losses(
                rows: Tensor, m: nn.Module = model, c: Cases = cases, n: Tensor = names, h: Harm = harm
            ) -> Tensor:
                return h(_losses(m, c, 1.0, rows), n[rows])

            try:
                with _without_log():
                    found.append(_gradient(training, 1.0, model, cases, losses))
            except Exception as error:  # whatever it is: that it comes tells that the image is there
                kind = type(error).__name__
                return f"a step fails where the loss of one image {what} ({kind}): it tells that the image is there"
        apart = float((found[0] - found[1]).norm())
        if not apart <= 1e-3:
            return f"an image whose loss {what} changes what the others add, by {apart:.3g} times the clipping norm"
    return ""


def choices_problem() -> str:
    """Which patients train, and which keep their labels, is for each patient alone to say, and the site's secret."""
    patients = np.array([f"patient-{i // 2}" for i in range(600)])
    key, other_key = bytes(32), bytes([1] * 32)
    for what, choose in (("is in a split", split_by_key), ("keeps its labels", _labels)):
        whole = choose(patients, key)
        for gone in range(40):
            rest = patients != f"patient-{gone}"
            moved = int((choose(patients[rest], key) != whole[rest]).sum())
            if moved:
                return f"who {what} depends on other patients: without one, {moved} images of others move"
        if np.array_equal(whole, choose(patients, other_key)):
            return f"who {what} does not depend on the site's secret: a coordinator can compute it"
    return ""


Harm = Callable[[Tensor, Tensor], Tensor]


def _labels(patients: np.ndarray, key: bytes) -> np.ndarray:
    cases = Cases(torch.zeros(len(patients), 1, 1, 1, dtype=torch.uint8), torch.arange(len(patients)) % 2, patients)
    data = SiteData("audit", ("a", "b"), {"train": cases, "val": cases, "test": cases}, key=key)
    recipe = RECIPE.model_copy(update={"label_fraction": 0.4})
    kept = np.zeros(len(patients), dtype=bool)
    kept[labelled_rows(data, recipe, private=True)] = True
    return kept


def _gradient(
    training: MakeTraining, clip: float, model: nn.Module, cases: Cases, losses: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return what a step without noise, in which every image is, adds up, float64."""
    dp_sgd = DpSgd(
        unit="patient", delta=1e-5, noise_multiplier=0.0, sample_rate=1.0, expected_batch=1.0, steps=1, clip=clip
    )
    private = training(dp_sgd)
    private.start(model, [], list(model.parameters()), cases.patients)
    try:
        private.step(losses)
        return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    finally:
        private.close()


def _losses(model: nn.Module, cases: Cases, scale: float, rows: Tensor) -> Tensor:
    logits = model(cases.images[rows].float() / 255)
    return scale * functional.cross_entropy(logits, cases.labels[rows], reduction="none")


@contextmanager
def _without_log() -> Iterator[None]:
    """What is done here on purpose is no line for a person."""
    log = logging.getLogger("chainward.client")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(36, _CLASSES)).train()


def _cases(numbers: list[int]) -> Cases:
    """Return some of six images, each of a patient of its own."""
    generator = torch.Generator().manual_seed(8)
    images = torch.randint(0, 256, (_IMAGES, 1, _SIDE, _SIDE), dtype=torch.uint8, generator=generator)
    labels = torch.arange(_IMAGES) % _CLASSES
    return Cases(images[numbers], labels[numbers], np.array([f"patient-{number}" for number in numbers]))
