"""A classifier head out of sums: the shared-covariance linear discriminant of images that nobody has in one place.

Sums over a model's embeddings add up over hospitals: from their total follows, in closed form, the very head that would follow
from all images together, in whatever order the hospitals are added and whichever of them are missing. In federated learning:
Fed3R (arXiv:2406.01116), AFL (arXiv:2405.16240), FedCOF (arXiv:2412.14326).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from chainward_shared.seeds import numpy_generator

LARGEST = 1e6
"""Values of an embedding are cut off here: of ones that have run away, sums and squares stay finite."""

SHRINKAGES = np.logspace(-4, 0, 65)
"""What validation chooses from. Less than 1e-4 would let rounding errors decide along directions in which nothing varies."""

FEWEST_TO_CHOOSE = 20
"""Validation images below which neither shrinkage nor temperature is chosen by them."""

TEMPERATURES = np.logspace(-0.5, 1, 31)
"""What validation chooses from, once it has chosen the shrinkage."""

DRAWS = 2048
"""Normal draws of each class out of which expectations are taken, the same for every candidate; fewer with many classes."""

UNSEEN = -20.0
"""Logarithm of the prior of a class of which there is no image; its mean is taken to be that of all images."""


def finite(embeddings: Tensor) -> Tensor:
    """Return embeddings as float64 with NaN as 0, and what is beyond `LARGEST`, infinity too, as that."""
    return torch.nan_to_num(embeddings.double(), nan=0.0, posinf=LARGEST, neginf=-LARGEST).clamp(-LARGEST, LARGEST)


def symmetric(triangle: np.ndarray, size: int) -> np.ndarray:
    """Return the symmetric matrix, (size, size), of its upper triangle by rows, (size (size + 1) / 2,)."""
    matrix = np.zeros((size, size))
    rows, columns = np.triu_indices(size)
    matrix[rows, columns] = matrix[columns, rows] = triangle
    return matrix


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
    weights : how much an image of each class counts in `moments`, and there only, (classes,); None: each the same. Known to
        whoever asked for the sums, it doesn't travel with them
    """

    images: Tensor
    total: Tensor
    counts: Tensor
    sums: Tensor
    moments: Tensor
    weights: Tensor | None = None

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
    def of(cls, embeddings: Tensor, labels: Tensor, classes: int, weights: Tensor | None = None) -> HeadSums:
        """Return the sums over `embeddings`, (n, d), made `finite`.

        Parameters
        ----------
        labels : class of each, integers (n,); multi-label: which findings each has, (n, classes) of 0 and 1, without weights
        """
        values = finite(embeddings)
        one_hot = labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels.long(), classes)
        members = one_hot.to(torch.float64)
        rows, columns = np.triu_indices(values.shape[1])
        weighted = values if weights is None else values * (members @ weights)[:, None]
        return cls(
            torch.tensor(float(len(values)), dtype=torch.float64),
            values.sum(dim=0),
            members.sum(dim=0),
            members.T @ values,
            (values.T @ weighted)[rows, columns],
            weights,
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], prefix: str, weights: Tensor | None = None) -> HeadSums:
        """Return the sums that `state` made tensors of."""
        return cls(**{name: state[f"{prefix}.{name}"] for name in _SUMS}, weights=weights)

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Return the sums as tensors, named ``PREFIX.images`` and so on."""
        return {f"{prefix}.{name}": getattr(self, name) for name in _SUMS}

    def __add__(self, other: HeadSums) -> HeadSums:
        weights = other.weights if not float(self.images) else self.weights
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMS}
        return HeadSums(**sums, weights=weights)

    @property
    def counted(self) -> float:
        """How many images `moments` goes over, each as much as its class counts there."""
        return float(self.images if self.weights is None else self.counts @ self.weights)

    def scatter(self, finding: int | None = None) -> np.ndarray:
        """Return the sum of squares and products around the means of the groups, (d, d), weighted as `moments`."""
        counts, sums = self.groups(finding)
        means = sums / np.maximum(counts, 1)[:, None]
        counted = counts if self.weights is None else counts * self.weights.numpy()
        found: np.ndarray = self.second_moments - (means.T * counted) @ means
        return found

    @cached_property
    def second_moments(self) -> np.ndarray:
        """The whole symmetric matrix of `moments`, (d, d)."""
        return symmetric(self.moments.numpy(), len(self.total))

    def groups(self, finding: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return counts and sums, (k,) and (k, d), of the classes, or of the images without and with a finding."""
        counts, sums = self.counts.numpy(), self.sums.numpy()
        if finding is None:
            return counts, sums
        without = float(self.images) - counts[finding], self.total.numpy() - sums[finding]
        return np.array([without[0], counts[finding]]), np.stack([without[1], sums[finding]])


_SUMS = ("images", "total", "counts", "sums", "moments")
"""What of `HeadSums` travels."""


def class_weights(counts: np.ndarray, strength: float) -> Tensor:
    """Return how much an image of each class counts in the covariance, between 0 and 1, (classes,).

    As much as priors are evened out, so are the classes in the covariance: with a strength of 1 each has the same part in it,
    however many images it has; with 0 each image.

    Parameters
    ----------
    counts : images of each class, about
    """
    present = counts[counts > 0]
    least = present.min() if len(present) else 1.0
    return torch.from_numpy((least / np.maximum(counts, least)) ** strength)


def sums_template(classes: int, size: int) -> dict[str, Tensor]:
    """Return names, shapes and dtypes of the sums over training and validation images, as they travel."""
    return HeadSums.none(classes, size).state("train") | HeadSums.none(classes, size).state("val")


@dataclass(frozen=True)
class Head:
    """A linear classifier: logits are ``weight @ embedding + bias``, float64 (classes, d) and (classes,).

    `shrinkage`: of its covariance, `temperature`: by which the part of the embedding was divided; multi-label: means over the
    findings.
    """

    weight: np.ndarray
    bias: np.ndarray
    shrinkage: float
    temperature: float = 1.0


def discriminant(
    train: HeadSums, validation: HeadSums | None, *, multilabel: bool = False, prior_strength: float = 1.0
) -> Head:
    """Return the linear discriminant of normal classes with one covariance (Fisher 1936; Hastie et al. 2009, eq. 4.10).

    Its softmax is the posterior of the classes. Multi-label: a discriminant for each finding, with against without, whose
    sigmoid is that of the finding. A class without an image gets weights of 0 and a prior of ``exp(UNSEEN)``; a finding that no
    image or every one has, weights of 0 and its smoothed log odds.

    The covariance is ``(1 - s) S + s tr(S) / d I``, S that within the classes (the maximum-likelihood estimate, each image
    counted as `HeadSums.weights` say). Of `SHRINKAGES` that s is taken with which most validation images are expected to be right
    (each class counts by its frequency to the power of ``1 - prior_strength``), and then of `TEMPERATURES` the one
    with the least expected cross-entropy. Both expectations follow from the sums alone: scores of a class are taken to be
    normal, with the mean and the covariance that the validation images give them. Where several s are as good, the one nearest
    to the oracle-approximating shrinkage (Chen et al. 2010, arXiv:0907.4698, eq. 23), which follows from S and the number of
    training images; with fewer than `FEWEST_TO_CHOOSE` validation images s is that one, and the temperature 1.

    Parameters
    ----------
    train, validation : sums over the images of each
    prior_strength : 1: all classes have the same prior; 0: their frequencies; between: frequencies to the power of the rest
    """
    if not multilabel:
        return _fit(train, validation, None, prior_strength)
    fits = [_fit(train, validation, finding, prior_strength) for finding in range(len(train.counts))]
    return Head(
        np.stack([fit.weight[1] - fit.weight[0] for fit in fits]),
        np.array([fit.bias[1] - fit.bias[0] for fit in fits]),
        float(np.mean([fit.shrinkage for fit in fits])),
        float(np.mean([fit.temperature for fit in fits])),
    )


def _fit(train: HeadSums, validation: HeadSums | None, finding: int | None, strength: float) -> Head:
    """Return the discriminant between classes, or without and with a finding."""
    counts, sums = train.groups(finding)
    n, size = float(train.images), len(train.total)
    middle = train.total.numpy() / n
    means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], middle)
    prior = _log_prior(counts, n, strength, smoothed=finding is not None)
    nothing = Head(np.zeros((len(counts), size)), prior, 1.0)
    if finding is not None and not counts.all():
        return nothing
    values, basis = np.linalg.eigh(train.scatter(finding) / train.counted)
    values = values.clip(min=0)
    level = values.mean()
    if level <= np.finfo(float).tiny:  # all images of a class are alike: there is nothing to measure differences by
        return nothing

    def candidate(shrinkage: float) -> Head:
        inverse = 1 / ((1 - shrinkage) * values + shrinkage * level)
        # around the mean of all images, which adds the same to every class: differences keep their digits
        weight = ((means - middle) @ basis * inverse) @ basis.T
        return Head(weight, -((means + middle) * weight).sum(axis=1) / 2, shrinkage)

    oracle = _oracle_approximating(values, n)
    chooses = validation is not None and float(validation.images) >= FEWEST_TO_CHOOSE
    if validation is None or not chooses or (expected := _Expected.of(validation, finding, strength)) is None:
        found = candidate(oracle)
        return replace(found, bias=found.bias + prior)
    right = np.array([expected.accuracy(candidate(float(shrinkage)), prior) for shrinkage in SHRINKAGES])
    as_good = SHRINKAGES[right >= right.max() - 0.5 / len(expected.draws)]
    found = candidate(float(as_good[np.abs(np.log(as_good / oracle)).argmin()]))
    costs = [expected.cross_entropy(found, prior, temperature) for temperature in TEMPERATURES]
    temperature = float(TEMPERATURES[int(np.argmin(costs))])
    return Head(found.weight / temperature, found.bias / temperature + prior, found.shrinkage, temperature)


@dataclass(frozen=True)
class _Expected:
    """What is expected of images like the validation images, whose scores are taken to be normal with one covariance.

    Attributes
    ----------
    means, covariance : of their embeddings, (k, d) for the classes that there are, and (d, d) within the classes
    places : indices of these classes, (k,)
    parts : how much each counts, (k,), 1 in all
    draws : standard normal numbers, (draws, classes)
    """

    means: np.ndarray
    covariance: np.ndarray
    places: np.ndarray
    parts: np.ndarray
    draws: np.ndarray

    @classmethod
    def of(cls, validation: HeadSums, finding: int | None, strength: float) -> _Expected | None:
        """Return what follows from sums; None where all images are of one class."""
        counts, sums = validation.groups(finding)
        places = np.flatnonzero(counts > 0)
        if len(places) < 2:
            return None
        parts = counts[places] ** (1 - strength)
        draws = max(64, min(DRAWS, 1_000_000 // len(counts) ** 2))  # with many classes, few of each are many in all
        return cls(
            sums[places] / counts[places, None],
            validation.scatter(finding) / validation.counted,
            places,
            parts / parts.sum(),
            numpy_generator(0, "discriminant", "draws").standard_normal((draws, len(counts))),
        )

    def _scores(self, head: Head) -> np.ndarray:
        """Return draws of the scores of each class, (k, draws, classes)."""
        values, axes = np.linalg.eigh(head.weight @ self.covariance @ head.weight.T)
        around = self.draws * np.sqrt(values.clip(min=0)) @ axes.T
        found: np.ndarray = (self.means @ head.weight.T + head.bias)[:, None] + around
        return found

    def accuracy(self, head: Head, prior: np.ndarray) -> float:
        """Return how many are classified rightly."""
        scores = self._scores(head) + prior
        right = (scores.argmax(axis=2) == self.places[:, None]).mean(axis=1)
        return float(right @ self.parts)

    def cross_entropy(self, head: Head, prior: np.ndarray, temperature: float) -> float:
        """Return the mean negative logarithm of what is given to the right class."""
        scores = self._scores(head) / temperature + prior
        scores = scores - scores.max(axis=2, keepdims=True)
        right = np.take_along_axis(scores, self.places[:, None, None], axis=2)[..., 0]
        return float((np.log(np.exp(scores).sum(axis=2)) - right).mean(axis=1) @ self.parts)


def _log_prior(counts: np.ndarray, n: float, strength: float, *, smoothed: bool) -> np.ndarray:
    if smoothed and not counts.all():
        return np.log((counts + 0.5) / (n + 1))
    return np.where(counts > 0, (1 - strength) * np.log(np.maximum(counts, 1) / n), UNSEEN)


def _oracle_approximating(values: np.ndarray, n: float) -> float:
    size, level = len(values), float(values.mean())
    square = float(np.square(values).sum()) / size**2
    gap = (n + 1) * (square - level**2 / size)
    return float(np.clip((square + level**2) / gap, SHRINKAGES[0], 1)) if gap > 0 else 1.0
