"""A classifier head out of sums with noise: what `discriminant` is for exact ones.

Noise is the same in every number, while most of what tells classes apart lies along directions in which embeddings vary
little. So sums are made in a frame whose axes are those along which the model's embeddings of public images vary most, scaled to
vary alike (`public_frame`), around a centre and at a scale that an earlier, smaller release has shown (`centred`); compare
private preconditioning (Kamath, Li, Singhal and Ullman 2019, arXiv:1805.00216). The covariance is raised by what noise could have
made of it, and means of classes are drawn towards that of all images, each by how much of its distance is noise (James and
Stein 1961).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from chainward_shared.discriminant import UNSEEN, Head, finite
from chainward_shared.private_sums import Frame, NoisySums

USUAL_LENGTH = 0.75
"""Geometric mean of the lengths that embeddings are to have in a frame: shorter, and noise weighs more; longer, and more of
them are shortened to 1."""

UNITS_PER_AXIS = 6.0
"""A frame has one axis for so many units over the standard deviation of the noise."""

FEWEST_AXES, MOST_AXES = 8, 256

_RIDGE = 0.25
_LEVEL = 0.3
_LEAST_SIGNAL = 0.05
_LEAST_WITHIN = 0.02
_FEWEST = 10.0


def axes_for(units: float, noise: float) -> int:
    """Return how many axes a frame should have for sums of so many units with noise of this standard deviation."""
    return int(min(MOST_AXES, max(FEWEST_AXES, units / max(noise * UNITS_PER_AXIS, 1e-9))))


def moments_help(units: float, noise: float, dimension: int) -> bool:
    """Return whether second moments tell of a covariance in spite of their noise: what noise alone makes of an eigenvalue is then
    below a quarter of all variance, so that the directions in which embeddings vary most can be seen."""
    return spectral_noise(noise, dimension) / max(units, 1.0) < USUAL_LENGTH**2 / 4


def spectral_noise(noise: float, dimension: int) -> float:
    """Return the largest eigenvalue that noise alone gives a symmetric matrix, about: Wigner's semicircle.

    `noise`: standard deviation on the diagonal; off it, smaller by the square root of 2.
    """
    return noise * math.sqrt(2 * dimension)


def public_frame(embeddings: Tensor, dimension: int) -> Frame:
    """Return the frame of public images, float64, from a model's embeddings of them, (n, d).

    Its axes are the directions in which they vary most, at most `dimension`, scaled to vary alike, the weakest a little less.
    """
    values = finite(embeddings).numpy()
    centre = values.mean(axis=0)
    _, spread, basis = np.linalg.svd(values - centre, full_matrices=False)
    variances = np.square(spread) / max(1, len(values))
    kept = max(1, min(dimension, int((variances > 1e-12 * max(float(variances[0]), 1e-300)).sum())))
    axes = basis[:kept] / np.sqrt(variances[:kept, None] + _LEVEL * variances.sum() / values.shape[1] + 1e-300)
    lengths = np.linalg.norm((values - centre) @ axes.T, axis=1)
    middle = float(np.exp(np.log(np.maximum(lengths, 1e-12)).mean()))
    return Frame(torch.from_numpy(centre), torch.from_numpy(axes * USUAL_LENGTH / max(middle, 1e-12)))


def centred(frame: Frame, sums: NoisySums) -> Frame:
    """Return a frame moved to the mean of the embeddings that `sums` are of."""
    axes = frame.axes.numpy() / max(1.0, sums.length)  # by how much most embeddings were shortened
    mean = sums.sums.sum(axis=0) / max(_FEWEST, float(sums.members.sum()))
    return Frame(frame.centre + torch.from_numpy(np.linalg.pinv(axes) @ mean), torch.from_numpy(axes))


def noisy_discriminant(frame: Frame, sums: NoisySums, *, multilabel: bool = False, prior_strength: float = 1.0) -> Head:
    """Return the linear discriminant of normal classes with one covariance from sums with noise; see `discriminant`.

    Multi-label: a discriminant for each finding, with against without.

    Parameters
    ----------
    sums : in `frame`, of classes; multi-label: of all images and of those with each finding
    prior_strength : as of `discriminant`
    """
    if not multilabel:
        weight, bias, kept = _fit(sums, sums.members, sums.sums, sums.noise, prior_strength)
    else:
        scale = math.sqrt(len(sums.members))  # see `memberships`
        noise = {name: value * (1 if name == "moments" else scale) for name, value in sums.noise.items()}
        members, totals = scale * sums.members, scale * sums.sums
        fits = [
            _fit(
                sums,
                np.array([members[0] - members[k], members[k]]),
                np.stack([totals[0] - totals[k], totals[k]]),
                noise,
                prior_strength,
            )
            for k in range(1, len(members))
        ]
        weight = np.stack([w[1] - w[0] for w, _, _ in fits])
        bias = np.array([b[1] - b[0] for _, b, _ in fits])
        kept = float(np.mean([k for _, _, k in fits]))
    whole = weight @ frame.axes.numpy() / max(1.0, sums.length)
    return Head(whole, bias - whole @ frame.centre.numpy(), 1 - kept)


def _fit(
    sums: NoisySums, members: np.ndarray, totals: np.ndarray, noise: dict[str, float], strength: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return weights and biases in the frame, and the share of the classes' distances that isn't noise."""
    counts = np.maximum(members, max(_FEWEST, 0.5 * noise["members"]))
    units = float(counts.sum())
    mean = totals.sum(axis=0) / units
    variances, basis = _spectrum(sums, units, mean)
    away = (totals / counts[:, None] - mean) @ basis
    uncertain = np.square(noise["sums"] / counts)
    signal = (np.square(away) - uncertain[:, None]).sum(axis=1) / variances.sum()
    signal = np.maximum(signal, _LEAST_SIGNAL * max(float(np.median(signal.clip(min=0))), 1e-3))
    kept = signal[:, None] * variances / (signal[:, None] * variances + uncertain[:, None])
    away = away * kept
    between = (away.T * (counts / units)) @ away
    within, turned = np.linalg.eigh(np.diag(variances) - between)
    within = np.maximum(within, _LEAST_WITHIN * float(variances.min()))
    weight = (away @ turned / within) @ turned.T
    prior = (1 - strength) * np.log(counts / units)
    prior = np.where(members + 2 * noise["members"] > 0.5, prior, UNSEEN)
    bias = prior - ((2 * mean @ basis + away) * weight).sum(axis=1) / 2
    return weight @ basis.T, bias, float(kept.mean())


def _spectrum(sums: NoisySums, units: float, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues and eigenvectors of the covariance of all images; without moments, the same along all axes."""
    size = len(mean)
    if sums.moments is None:
        return np.full(size, max(min(1.0, sums.length) ** 2 - float(mean @ mean), 0.1) / size), np.eye(size)
    values, basis = np.linalg.eigh(sums.moments / units - np.outer(mean, mean))
    ridge = _RIDGE * spectral_noise(sums.noise["moments"], size) / units
    return values.clip(min=0) + max(ridge, 1e-4 * float(values.clip(min=0).mean()), 1e-9), basis
