"""What needs no training by gradient: linear models on embeddings of the start, on pixels and on thumbnails.

A critic asks for them: a method that they beat has shown nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.training.link import labelled_cases
from chainward_client.training.passes import passes
from chainward_server.heads import balance_strength
from chainward_shared.discriminant import UNSEEN, Head, HeadSums, discriminant
from chainward_shared.evaluation.classification import evaluate
from chainward_shared.models.heads import check_head, with_head
from chainward_shared.models.taps import Taps
from chainward_shared.preprocessing import resized
from chainward_shared.recipes import LinkRecipe
from chainward_shared.weights import StateDict, rounded
from chainward_simulations.study.baselines import state_of, together
from chainward_simulations.study.start import Start

THUMBNAIL = 14
"""Side of a thumbnail, pixels."""

PERCENTILES = (5, 25, 50, 75, 95)
"""Of each channel, beside a thumbnail."""

PIXELS = 32
"""Side of the images that the linear model on pixels sees."""

INVERSE_PENALTIES = np.logspace(-4, 1, 6)
"""What validation chooses from for a logistic regression: C of scikit-learn, on standardised values."""


@dataclass(frozen=True)
class PictureModel:
    """A linear model on what is read off images without a network.

    Attributes
    ----------
    read : from uint8 images (n, c, h, w) to values, float64 (n, d)
    head : the model
    multilabel : whether each class is a question of its own
    """

    read: Callable[[Tensor], np.ndarray]
    head: Head
    multilabel: bool

    def probabilities(self, cases: Cases) -> np.ndarray:
        """Return the probabilities of the classes, float64 (n, classes)."""
        if not len(cases):
            return np.zeros((0, len(self.head.bias)))
        return _probabilities(self.read(cases.images), self.head, self.multilabel)


def thumbnails(images: Tensor) -> np.ndarray:
    """Return pixels of thumbnails and percentiles of each channel, between 0 and 1, (n, d)."""
    small = resized(images, THUMBNAIL).flatten(1).double().numpy() / 255
    channels = images.flatten(2).numpy()
    levels = np.percentile(channels, PERCENTILES, axis=2).transpose(1, 0, 2).reshape(len(images), -1) / 255
    return np.concatenate([small, levels], axis=1)


def pixels(images: Tensor) -> np.ndarray:
    """Return the pixels of small images, between 0 and 1, (n, d)."""
    return resized(images, PIXELS).flatten(1).double().numpy() / 255


def picture_model(name: str, sites: Mapping[str, SiteData], recipe: LinkRecipe) -> PictureModel:
    """Return the discriminant on thumbnails, from the sites' sums ("thumbnails"), or the logistic regression on the union's
    pixels ("linear-pixels")."""
    classes, multilabel = _task(sites)
    if name == "linear-pixels":
        return PictureModel(pixels, logistic(lambda cases: pixels(cases.images), sites, recipe), multilabel)
    sums = [
        HeadSums.of(torch.from_numpy(thumbnails(cases.images)), cases.labels, classes)
        for cases in _of_all(sites, recipe)
    ]
    strength = balance_strength(recipe.class_balance, recipe.prior_strength)
    head = discriminant(sums[0], sums[1], multilabel=multilabel, prior_strength=strength)
    return PictureModel(thumbnails, head, multilabel)


def linear_probe(start: Start, sites: Mapping[str, SiteData], recipe: LinkRecipe) -> StateDict:
    """Return the start with the head of a logistic regression on the union's embeddings.

    Raises
    ------
    ModelError
        The model's classifier isn't one linear layer.
    """
    check_head(start.architecture)
    head = logistic(lambda cases: embeddings(start, cases, recipe.threads), sites, recipe)
    return rounded(with_head(state_of(start.model(recipe.seed)), start.architecture, head), recipe.transfer)


def embeddings(start: Start, cases: Cases, threads: int) -> np.ndarray:
    """Return what the classifier of the start reads of each image, float64 (n, d)."""
    model = start.model(0)
    if not len(cases):
        return np.zeros((0, check_head(start.architecture)))
    with Taps(model, embedding=True) as taps:
        batches = passes(model, cases.images, threads, start.architecture.image_size, start.features)
        return np.concatenate([taps.embedding.double().cpu().numpy() for _ in batches])


def logistic(read: Callable[[Cases], np.ndarray], sites: Mapping[str, SiteData], recipe: LinkRecipe) -> Head:
    """Return the logistic regression whose penalty gives the highest balanced accuracy on the validation images.

    Classes are weighted as much as the recipe balances them; values are standardised, and the head takes them as they are.

    Parameters
    ----------
    read : from cases to values, float64 (n, d)
    """
    (classes, multilabel), (train, validation) = _task(sites), _of_all(sites, recipe)
    found, held_out = read(train), read(validation)
    mean, scale = found.mean(axis=0), found.std(axis=0) + 1e-6
    values, strength = (found - mean) / scale, balance_strength(recipe.class_balance, recipe.prior_strength)
    heads = []
    for inverse in INVERSE_PENALTIES:
        weight, bias = np.zeros((classes, values.shape[1])), np.full(classes, UNSEEN)
        if multilabel:
            for finding in range(classes):
                of = train.labels[:, finding].numpy().astype(int)
                weight[[finding]], bias[[finding]] = _binary(values, of, inverse, strength)
        else:
            present, rows, offsets = _multinomial(values, train.labels.numpy(), inverse, strength)
            weight[present], bias[present] = rows, offsets
        weight = weight / scale
        heads.append(Head(weight, bias - weight @ mean, 1 / float(inverse)))

    def score(head: Head) -> float:
        if not len(held_out):
            return 0.0
        scores = evaluate(_probabilities(held_out, head, multilabel), validation.labels.numpy())
        return scores.balanced_accuracy or 0.0

    return max(heads, key=score)


def _multinomial(
    values: np.ndarray, labels: np.ndarray, inverse: float, strength: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which classes there are, and the weights and biases of each."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    present, counts = np.unique(labels, return_counts=True)
    if len(present) == 1:
        return present, np.zeros((1, values.shape[1])), np.zeros(1)
    weights = dict(zip(present.tolist(), (len(labels) / len(present) / counts) ** strength, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=inverse, class_weight=weights, max_iter=300).fit(values, labels)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(present) == 2:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return present, weight, bias


def _binary(values: np.ndarray, labels: np.ndarray, inverse: float, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of the log odds of a finding."""
    present, weight, bias = _multinomial(values, labels, inverse, strength)
    if len(present) == 1:
        smoothed = np.log((labels.sum() + 0.5) / (len(labels) - labels.sum() + 0.5))
        return np.zeros((1, values.shape[1])), np.array([smoothed])
    return weight[[1]] - weight[[0]], bias[[1]] - bias[[0]]


def _probabilities(values: np.ndarray, head: Head, multilabel: bool) -> np.ndarray:
    logits = torch.from_numpy(values @ head.weight.T + head.bias)
    found: np.ndarray = (logits.sigmoid() if multilabel else logits.softmax(dim=1)).numpy()
    return found


def _of_all(sites: Mapping[str, SiteData], recipe: LinkRecipe) -> tuple[Cases, Cases]:
    """Return the labelled training images and the validation images of all sites."""
    labelled = together([labelled_cases(data, recipe) for data in sites.values()])
    return labelled, together([data.splits["val"] for data in sites.values()])


def _task(sites: Mapping[str, SiteData]) -> tuple[int, bool]:
    """Return the number of classes, and whether each is a question of its own."""
    data = next(iter(sites.values()))
    return len(data.classes), data.splits["train"].labels.ndim == 2
