"""Whether what a site says with an answer can be true, beside what it declared in its card.

A site could as well declare a lie that holds together; what its word can weigh is then bounded by its card, which the report
shows, and by `chain.max-drift` and the scores of the other sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chainward_shared.discriminant import LARGEST, HeadSums
from chainward_shared.errors import ProtocolError
from chainward_shared.evaluation.localisation import LocalisationSums
from chainward_shared.evaluation.scores import Scores
from chainward_shared.privacy.statements import Statement
from chainward_shared.protocol import SharedNoise, SiteCard, Split, TrainingLog

NOISED_CASES = 10
"""A split of a site that withholds its counts has at most this many times the units it declares for training, plus a thousand:
more than that is neither a usual split nor noise."""


def check_card(card: SiteCard) -> None:
    """Check that a card does not contradict itself.

    Raises
    ------
    ProtocolError
        It has no classes or no training cases, or counts that can't be those of its splits.
    """
    if card.train < 1 or not card.classes:
        raise ProtocolError(f"it declares {card.train} training cases of {len(card.classes)} classes")
    for split, counts in card.class_counts.items():
        size: int | None = getattr(card, split)
        if len(counts) != len(card.classes):
            raise ProtocolError(f"it counts {len(counts)} classes in '{split}'; it has {len(card.classes)}")
        most = max(counts) if card.task == "multilabel" else sum(counts)
        if size is not None and most > size:
            raise ProtocolError(f"it counts {most} cases in '{split}', of which it declares {size}")


def check_training(log: TrainingLog, card: SiteCard, epochs: int, elapsed: float) -> None:
    """Check what a site says of a training.

    Parameters
    ----------
    epochs : how many were asked for
    elapsed : seconds since the run was first started

    Raises
    ------
    ProtocolError
        It trained otherwise than asked, on more images than it has, or for longer than the run has lasted.
    """
    if log.epochs != epochs:
        raise ProtocolError(f"it was trained for {log.epochs} epochs; {epochs} were asked for")
    if log.seconds > 1.01 * elapsed + 60:
        raise ProtocolError(f"it says it trained for {log.seconds:.0f} s; the run began {elapsed:.0f} s ago")
    for name in ("loss", "temperature", "teacher_trust", "attention", "unlabelled_loss", "privileged"):
        if len(values := getattr(log, name)) > epochs:
            raise ProtocolError(f"it sent {len(values)} values of '{name}' for {epochs} epochs")
    if log.privacy is None and card.val is None:
        return  # trained without privacy by a site that declares units and no counts: there is nothing to compare with
    # a private training is planned in whole steps, which may come to a little more
    most = card.train * (epochs + (log.privacy is not None))
    steps = max(most, epochs) if log.privacy is None else log.privacy.steps
    for what, said, limit in (
        ("images", log.images, most),
        ("images without labels", log.unlabelled, card.train),
        ("steps", log.steps, steps),
    ):
        if said > limit:
            raise ProtocolError(f"it says it trained with {said} {what}; at most {limit} follow from its card")


def check_counted(scores: Mapping[Any, Scores], card: SiteCard) -> None:
    """Check that a model was not scored on more images than a site has.

    Raises
    ------
    ProtocolError
        It was.
    """
    for split, found in scores.items():
        declared: int | None = getattr(card, split)
        most = NOISED_CASES * card.train + 1_000 if declared is None else declared
        if found.n > most:
            raise ProtocolError(f"it scored {found.n} images of '{split}'; at most {most} follow from its card")


def check_sums(sums: HeadSums, split: Split, stated: int, card: SiteCard, *, rounding: float = 0.0) -> None:
    """Check that sums over embeddings can be those of a site's images.

    Parameters
    ----------
    stated : how many images they go over, in the site's own words
    rounding : by how much sums over the classes may differ from those over all images beside floating-point errors

    Raises
    ------
    ProtocolError
        They go over more images than it has, of other classes, or no images have such sums.
    """
    images, counts = float(sums.images), sums.counts
    declared: int | None = getattr(card, split)
    most = NOISED_CASES * card.train + 1_000 if declared is None else declared
    if images != stated or images > most:
        raise ProtocolError(
            f"its sums go over {images:g} images of '{split}'; it says {stated}, and has at most {most}"
        )
    if bool((counts < 0).any()) or bool((counts != counts.round()).any()) or float(counts.max()) > images:
        raise ProtocolError(f"its sums over '{split}' have counts that are none of {images:g} images")
    for place, known in enumerate(card.class_counts.get(split, [])):
        if float(counts[place]) > known:
            raise ProtocolError(
                f"its sums go over {float(counts[place]):g} images of '{split}' of class '{card.classes[place]}'; it has {known}"
            )
    _check_moments(sums, split, multilabel=card.task == "multilabel", rounding=rounding)


def _check_moments(sums: HeadSums, split: Split, *, multilabel: bool, rounding: float) -> None:
    images, size = float(sums.images), len(sums.total)
    if not multilabel:
        apart = (sums.sums.sum(dim=0) - sums.total).abs() > 1e-6 * (1 + sums.total.abs()) + rounding
        if float(sums.counts.sum()) != images or bool(apart.any()):
            raise ProtocolError(f"its sums over the classes of '{split}' don't come to its sums over all images")
    total = sums.total.numpy()
    level = float(sums.second_moments.trace())
    around = sums.second_moments - np.outer(total, total) / max(1.0, images) if sums.weights is None else sums.scatter()
    lowest = float(np.linalg.eigvalsh(around)[0])
    if level > LARGEST**2 * images * size or lowest < -1e-6 * (level + 1e-9) - size * rounding:
        raise ProtocolError(f"no {images:g} images of '{split}' have such sums and second moments")


def check_noise(noise: float, statement: Statement | None, *, private: bool, shared: SharedNoise | None = None) -> None:
    """Check that a release has the noise that its site's statement accounts for.

    Parameters
    ----------
    private : whether it must have noise
    shared : the share of it that each site was asked to add, and that counts with those of others

    Raises
    ------
    ProtocolError
        It has none, or other noise than was paid for.
    """
    if shared is not None:
        if noise != shared.each:
            raise ProtocolError(f"its sums have noise of {noise:g}; expected its share of {shared.each:g}")
        return
    paid = () if statement is None else statement.of_run
    if private and not any(one.kind == "gaussian" and one.noise_multiplier == noise > 0 for one in paid):
        raise ProtocolError(f"its sums have noise of {noise:g}, which its privacy statement doesn't account for")
    if not private and noise:
        raise ProtocolError(f"its sums have noise of {noise:g}, and it trains without privacy")


def check_length(release: Tensor, noise: float, card: SiteCard) -> None:
    """Check that bounded sums with noise of this standard deviation are no longer than so many units can make them.

    Raises
    ------
    ProtocolError
        They are.
    """
    most = NOISED_CASES * card.train + 1_000 + noise * (len(release) ** 0.5 + 10)
    if not float(torch.linalg.vector_norm(release)) <= most:
        raise ProtocolError(f"its sums are longer than {most:g}, which {card.train} units and their noise can't be")


def check_looks(sums: LocalisationSums, card: SiteCard, image_size: int) -> None:
    """Check that the figures on where a model looks can be those of a site's test images.

    Parameters
    ----------
    image_size : side of the images that the model saw, pixels

    Raises
    ------
    ProtocolError
        They are of more images than it has, or higher than any attention on images of that size can be.
    """
    images = sums.n + sums.left_out
    if card.test is None or images > card.test:
        raise ProtocolError(f"it scored {images} test images; it declares {card.test or 'none'}")
    # all attention on one marked pixel: attention over chance is then the number of pixels
    highest = max(card.image_size, image_size) ** 2
    if sums.lift.sum > sums.n * highest * (1 + 1e-6) or sums.lift.squares > sums.lift.sum * highest * (1 + 1e-6):
        raise ProtocolError(
            f"its lift sums to {sums.lift.sum:g} over {sums.n} images; in one of {highest} pixels it is at most {highest}"
        )
