"""A classifier head out of sums: the shared-covariance linear discriminant of images that nobody has in one place.

Sums over a model's embeddings add up over hospitals: from their total follows, in closed form, the very head that would follow
from all images together, in whatever order the hospitals are added and whichever of them are missing. In federated learning:
Fed3R (arXiv:2406.01116), AFL (arXiv:2405.16240), FedCOF (arXiv:2412.14326).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

LARGEST = 1e6
"""Values of an embedding are cut off here: of ones that have run away, sums and squares stay finite."""

SHRINKAGES = np.logspace(-4, 0, 65)
"""What validation chooses from. Less than 1e-4 would let rounding errors decide along directions in which nothing varies."""

FEWEST_TO_CHOOSE = 20
"""Validation images below which shrinkage is not chosen by them."""

UNSEEN = -20.0
"""Logarithm of the prior of a class of which there is no image; its mean is taken to be that of all images."""


def finite(embeddings: Tensor) -> Tensor:
    """Return embeddings as float64 with NaN as 0, and what is beyond `LARGEST`, infinity too, as that."""
    return torch.nan_to_num(embeddings.double(), nan=0.0, posinf=LARGEST, neginf=-LARGEST).clamp(-LARGEST, LARGEST)


@dataclass(frozen=True)
class HeadSums:
    """Sums over images, all float64.

    Attributes
    ----------
    images : how many there are, ()
    total : sum of their embeddings, (d,)
    counts : images of each class, (classes,); multi-label: with each finding
    sums : sum of the embeddings of each class, (classes, d)
    moments : sum of the products of the embeddings' values with each other, upper triangle by rows, (d (d + 1) / 2,)
    """

    images: Tensor
    total: Tensor
    counts: Tensor
    sums: Tensor
    moments: Tensor

    @classmethod
    def none(cls, classes: int, size: int) -> HeadSums:
        """Return the sums over no image; `size`: d."""
        return cls(
            *(
                torch.zeros(shape, dtype=torch.float64)
                for shape in ((), (size,), (classes,), (classes, size), (size * (size + 1) // 2,))
            )
        )

    @classmethod
    def of(cls, embeddings: Tensor, labels: Tensor, classes: int) -> HeadSums:
        """Return the sums over `embeddings`, (n, d), made `finite`.

        Parameters
        ----------
        labels : class of each, integers (n,); multi-label: which findings each has, (n, classes) of 0 and 1
        """
        values = finite(embeddings)
        one_hot = labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels.long(), classes)
        members = one_hot.to(torch.float64)
        rows, columns = np.triu_indices(values.shape[1])
        return cls(
            torch.tensor(float(len(values)), dtype=torch.float64),
            values.sum(dim=0),
            members.sum(dim=0),
            members.T @ values,
            (values.T @ values)[rows, columns],
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], prefix: str) -> HeadSums:
        """Return the sums that `state` made tensors of."""
        return cls(*(state[f"{prefix}.{name}"] for name in cls.__dataclass_fields__))

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Return the sums as tensors, named ``PREFIX.images`` and so on."""
        return {f"{prefix}.{name}": getattr(self, name) for name in self.__dataclass_fields__}

    def __add__(self, other: HeadSums) -> HeadSums:
        return HeadSums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @cached_property
    def second_moments(self) -> np.ndarray:
        """The whole symmetric matrix of `moments`, (d, d)."""
        size = len(self.total)
        matrix = np.zeros((size, size))
        rows, columns = np.triu_indices(size)
        matrix[rows, columns] = matrix[columns, rows] = self.moments.numpy()
        return matrix

    def groups(self, finding: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return counts and sums, (k,) and (k, d), of the classes, or of the images without and with a finding."""
        counts, sums = self.counts.numpy(), self.sums.numpy()
        if finding is None:
            return counts, sums
        without = float(self.images) - counts[finding], self.total.numpy() - sums[finding]
        return np.array([without[0], counts[finding]]), np.stack([without[1], sums[finding]])


def sums_template(classes: int, size: int) -> dict[str, Tensor]:
    """Return names, shapes and dtypes of the sums over training and validation images, as they travel."""
    return HeadSums.none(classes, size).state("train") | HeadSums.none(classes, size).state("val")


@dataclass(frozen=True)
class Head:
    """A linear classifier: logits are ``weight @ embedding + bias``, float64 (classes, d) and (classes,).

    `shrinkage`: of its covariance; multi-label: the mean over the findings.
    """

    weight: np.ndarray
    bias: np.ndarray
    shrinkage: float


def discriminant(
    train: HeadSums, validation: HeadSums | None, *, multilabel: bool = False, prior_strength: float = 1.0
) -> Head:
    """Return the linear discriminant of normal classes with one covariance (Fisher 1936; Hastie et al. 2009, eq. 4.10).

    Its softmax is the posterior of the classes. Multi-label: a discriminant for each finding, with against without, whose
    sigmoid is that of the finding. A class without an image gets weights of 0 and a prior of ``exp(UNSEEN)``; a finding that no
    image or every one has, weights of 0 and its smoothed log odds.

    The covariance is ``(1 - s) S + s tr(S) / d I``, S that within the classes (the maximum-likelihood estimate). Of `SHRINKAGES`
    that s is taken under which the validation images are most likely, which follows from their sums alone. With fewer than
    `FEWEST_TO_CHOOSE` of them s is the oracle-approximating shrinkage (Chen et al. 2010, arXiv:0907.4698, eq. 23), which follows
    from S and the number of training images.

    Parameters
    ----------
    train, validation : sums over the images of each
    prior_strength : 1: all classes have the same prior; 0: their frequencies; between: frequencies to the power of the rest
    """
    if not multilabel:
        weight, bias, shrinkage = _fit(train, validation, None, prior_strength)
        return Head(weight, bias, shrinkage)
    fits = [_fit(train, validation, finding, prior_strength) for finding in range(len(train.counts))]
    return Head(
        np.stack([weight[1] - weight[0] for weight, _, _ in fits]),
        np.array([bias[1] - bias[0] for _, bias, _ in fits]),
        float(np.mean([shrinkage for _, _, shrinkage in fits])),
    )


def _fit(
    train: HeadSums, validation: HeadSums | None, finding: int | None, strength: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return weights, biases and shrinkage of the discriminant between classes, or without and with a finding."""
    counts, sums = train.groups(finding)
    n, size = float(train.images), len(train.total)
    middle = train.total.numpy() / n
    means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], middle)
    prior = _log_prior(counts, n, strength, smoothed=finding is not None)
    if finding is not None and not counts.all():
        return np.zeros((2, size)), prior, 1.0
    scatter = train.second_moments - (means.T * counts) @ means
    values, basis = np.linalg.eigh(scatter / n)
    values = values.clip(min=0)
    level = values.mean()
    if level <= np.finfo(float).tiny:  # all images of a class are alike: there is nothing to measure differences by
        return np.zeros((len(counts), size)), prior, 1.0
    shrinkage = _oracle_approximating(values, n)
    if validation is not None and float(validation.images) >= FEWEST_TO_CHOOSE:
        shrinkage = _most_likely(values, level, _spread(validation, finding, means, basis), float(validation.images))
    inverse = 1 / ((1 - shrinkage) * values + shrinkage * level)
    # around the mean of all images, which adds the same to every class: differences keep their digits
    weight = ((means - middle) @ basis * inverse) @ basis.T
    return weight, prior - ((means + middle) * weight).sum(axis=1) / 2, shrinkage


def _log_prior(counts: np.ndarray, n: float, strength: float, *, smoothed: bool) -> np.ndarray:
    if smoothed and not counts.all():
        return np.log((counts + 0.5) / (n + 1))
    return np.where(counts > 0, (1 - strength) * np.log(np.maximum(counts, 1) / n), UNSEEN)


def _spread(validation: HeadSums, finding: int | None, means: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return the sum of the squared distances of validation images from the means of their classes along each axis, (d,)."""
    counts, sums = validation.groups(finding)
    cross = sums.T @ means
    around = validation.second_moments - cross - cross.T + (means.T * counts) @ means
    found: np.ndarray = np.einsum("ij,ik,kj->j", basis, around, basis, optimize=True)
    return found.clip(min=0)


def _most_likely(values: np.ndarray, level: float, spread: np.ndarray, images: float) -> float:
    """Return the shrinkage under which images with this spread have the highest likelihood."""
    variances = (1 - SHRINKAGES[:, None]) * values + SHRINKAGES[:, None] * level
    cost = (images * np.log(variances) + spread / variances).sum(axis=1)
    return float(SHRINKAGES[cost.argmin()])


def _oracle_approximating(values: np.ndarray, n: float) -> float:
    size, level = len(values), float(values.mean())
    square = float(np.square(values).sum()) / size**2
    gap = (n + 1) * (square - level**2 / size)
    return float(np.clip((square + level**2) / gap, SHRINKAGES[0], 1)) if gap > 0 else 1.0
