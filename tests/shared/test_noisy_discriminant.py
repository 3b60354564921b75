"""Heads out of sums with noise: without noise they are those of all images; with it, whatever it is, they are numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chainward_shared.noisy_discriminant import (
    FEWEST_AXES,
    MOST_AXES,
    USUAL_LENGTH,
    axes_for,
    centred,
    moments_help,
    noisy_discriminant,
    public_frame,
)
from chainward_shared.private_sums import NoisySums, SumsForm, memberships, shortened, vectors
from chainward_shared.public_images import public_images

CLASSES, SIZE = 3, 6
WHOLE = SumsForm(dimension=SIZE, labels=True, moments=True)
MEANS = SumsForm(dimension=SIZE, labels=True, moments=False)


def images(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings that vary by a factor of 30 between directions, around a mean far from 0, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    spread = torch.logspace(0, -1.5, SIZE, dtype=torch.float64)
    away = torch.randn(CLASSES, SIZE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    values = torch.randn(n, SIZE, generator=generator, dtype=torch.float64) + 1.2 * away[labels]
    return 5.0 + values * spread, labels


def sums(frame, values, labels, form, noise: float = 0.0, seed: int = 0) -> NoisySums:
    short, octaves = shortened(frame.within(values))
    exact = vectors(short, octaves, memberships(labels, CLASSES, form), form).sum(dim=0).numpy()
    drawn = np.random.default_rng(seed).normal(size=exact.shape)
    return NoisySums.of(exact + noise * drawn, noise, form, form.groups(CLASSES, multilabel=labels.ndim == 2))


def frame_of(values):
    public, _ = images(200, seed=77)
    return public_frame(public + 1.0, SIZE)


def right(head, values, labels) -> float:
    logits = values.numpy() @ head.weight.T + head.bias
    return float((logits.argmax(axis=1) == labels.numpy()).mean())


def textbook(values, labels) -> np.ndarray:
    """Return the classes that Fisher's discriminant with a pooled covariance gives, by the book."""
    x, y = values.numpy(), labels.numpy()
    means = np.stack([x[y == k].mean(axis=0) for k in range(CLASSES)])
    within = np.linalg.inv(np.cov((x - means[y]).T, bias=True))
    return np.argmin([np.einsum("ij,jk,ik->i", x - m, within, x - m) for m in means], axis=0)


def test_without_noise_the_head_decides_as_the_textbooks_discriminant_does():
    values, labels = images(3000)
    frame = frame_of(values)
    centre = centred(frame, sums(frame, values, labels, SumsForm(dimension=SIZE, labels=False, moments=False)))
    wide = type(centre)(centre.centre, centre.axes / 8)  # nothing is shortened
    head = noisy_discriminant(wide, sums(wide, values, labels, WHOLE))
    decided = (values.numpy() @ head.weight.T + head.bias).argmax(axis=1)
    assert (decided == textbook(values, labels)).mean() > 0.995


def test_the_smaller_release_moves_the_frame_to_the_centre_of_the_images():
    values, labels = images(2000)
    frame = frame_of(values)
    apart = float((frame.within(values.mean(dim=0, keepdim=True))).norm())
    form = SumsForm(dimension=SIZE, labels=False, moments=False)
    moved = centred(frame, sums(frame, values, labels, form))
    assert float(moved.within(values.mean(dim=0, keepdim=True)).norm()) < 0.35 * apart


def test_shortened_embeddings_and_a_little_noise_cost_little():
    values, labels = images(3000)
    tests, truth = images(3000, seed=5)
    frame = frame_of(values)
    frame = centred(frame, sums(frame, values, labels, SumsForm(dimension=SIZE, labels=False, moments=False), 3.0))
    best = float((textbook(tests, truth) == truth.numpy()).mean())
    assert right(noisy_discriminant(frame, sums(frame, values, labels, WHOLE, 2.0)), tests, truth) > best - 0.05
    assert right(noisy_discriminant(frame, sums(frame, values, labels, MEANS, 2.0)), tests, truth) > 1 / CLASSES + 0.2


def test_findings_have_a_discriminant_each():
    values, labels = images(3000)
    findings = torch.stack([(labels == k).long() for k in range(CLASSES)], dim=1)
    frame = frame_of(values)
    frame = centred(frame, sums(frame, values, labels, SumsForm(dimension=SIZE, labels=False, moments=False)))
    head = noisy_discriminant(frame, sums(frame, values, findings, WHOLE, 1.0), multilabel=True)
    decided = values.numpy() @ head.weight.T + head.bias > 0
    balanced = [
        (decided[findings[:, k] == 1, k].mean() + (~decided)[findings[:, k] == 0, k].mean()) / 2 for k in range(3)
    ]
    assert min(balanced) > 0.7


@pytest.mark.parametrize("form", [WHOLE, MEANS])
@pytest.mark.parametrize("noise", [0.0, 1.0, 1e5])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_the_head_is_finite_whatever_the_noise_with_classes_that_all_lack_and_equal_images(form, noise, count):
    for scale in (0.0, 1.0, 1e6):
        public = scale * images(64)[0]
        frame = public_frame(public, SIZE)
        values = torch.full((count, SIZE), 3.0, dtype=torch.float64)
        own = SumsForm(dimension=len(frame.axes), labels=True, moments=form.moments)
        centre = SumsForm(dimension=len(frame.axes), labels=False, moments=False)
        labels = torch.zeros(count, dtype=torch.int64)
        frame = centred(frame, sums(frame, values, labels, centre, noise))
        head = noisy_discriminant(frame, sums(frame, values, labels, own, noise), prior_strength=0.3)
        assert np.isfinite(head.weight).all() and np.isfinite(head.bias).all()


def test_more_units_and_less_noise_afford_more_axes_and_second_moments():
    assert axes_for(10, 100.0) == FEWEST_AXES and axes_for(10**6, 1.0) == MOST_AXES
    found = [axes_for(1000, noise) for noise in (8.0, 3.0, 1.5)]
    assert found == sorted(found) and len(set(found)) == 3
    assert moments_help(5000, 1.0, 64) and not moments_help(5000, 300.0, 64)


def test_public_images_are_the_same_for_everyone_and_make_a_frame_in_which_they_have_the_usual_length():
    first = public_images(3, 16, count=40)
    public_images.cache_clear()
    second = public_images(3, 16, count=40)
    assert torch.equal(first, second) and first.dtype == torch.uint8 and first.shape == (40, 3, 16, 16)
    assert len({image.numpy().tobytes() for image in first}) == 40
    assert public_images(1, 9, count=3).shape == (3, 1, 9, 9)
    values = first.flatten(1).double()
    lengths = public_frame(values, 12).within(values).norm(dim=1)
    assert float(lengths.log().mean().exp()) == pytest.approx(USUAL_LENGTH, rel=1e-6)
