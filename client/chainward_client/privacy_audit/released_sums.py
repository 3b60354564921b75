"""Checks of, and an attack on, the releases of statistics rounds as they are made here.

The attacked patient has 40 images, of one class and with embeddings as long as can be, all in one direction; the attacker knows
everybody else. In each of many releases a coin decides whether the patient is there, and the attacker guesses it from how far the
release lies in the patient's direction. Guesses about independent releases are those of one run with as many canaries, so their
bound is that of `one_run`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from chainward_client.bounded_sums import SumsRelease
from chainward_client.entropy import Entropy
from chainward_client.privacy_audit.one_run import epsilon_lower_bound
from chainward_shared.privacy.calibration import analytic_noise
from chainward_shared.private_sums import LENGTH, SumsForm
from chainward_shared.settings import PrivacyUnit

MakeRelease = Callable[[SumsForm, PrivacyUnit], SumsRelease]

_CLASSES, _DIMENSION = 3, 5
_FORM = SumsForm(dimension=_DIMENSION, labels=True, moments=True)
_IMAGES = 40
_RELEASES = 400
_EPSILON, _DELTA = 1.0, 1e-5
_Z = 5.5


def sums_bound_problem(release: MakeRelease = SumsRelease) -> str:
    """One patient, whatever the images, changes the exact sums by a vector no longer than 1."""
    one = release(_FORM, "patient")
    for name, value in (("1", 1.0), ("a thousand", 1e3), ("next to nothing", 1e-30)):
        moved = float((_sums(one, value, there=True) - _sums(one, value, there=False)).norm())
        if not moved <= LENGTH:
            return (
                f"a patient with {_IMAGES} images whose embeddings are of length {name} changes the sums by {moved:.3g}; "
                f"at most {LENGTH:g} is accounted for"
            )
    return ""


def sums_noise_problem(release: MakeRelease = SumsRelease) -> str:
    """The noise on sums of nobody has the standard deviation that is accounted for, in every number, and is never the same."""
    one, zeros = release(_FORM, "patient"), torch.zeros(20_000, dtype=torch.float64)
    first, second = (one.noised(zeros, 3.0, Entropy()) / 3.0 for _ in range(2))
    for noise in (first, second, (first - second) / math.sqrt(2)):
        apart = (float(noise.square().mean()) - 1) / math.sqrt(2 / len(noise))
        if abs(apart) > _Z:
            return f"the noise on sums has {float(noise.std()):.3f} times the specified standard deviation"
    return ""


def sums_attack_problem(release: MakeRelease = SumsRelease) -> str:
    """Who guesses from releases whether a patient is there is right no more often than epsilon allows."""
    one, noise = release(_FORM, "patient"), analytic_noise(_EPSILON, _DELTA)
    without, with_patient = (_sums(one, 1.0, there=there) for there in (False, True))
    direction = with_patient - without
    middle = float(direction @ (with_patient + without)) / 2
    correct = 0
    for _ in range(_RELEASES):
        there = bool(secrets.randbits(1))
        seen = one.noised(with_patient if there else without, noise, Entropy())
        correct += (float(direction @ seen) > middle) == there
    measured = epsilon_lower_bound(_RELEASES, _RELEASES, correct, _DELTA)
    if measured <= _EPSILON:
        return ""
    return (
        f"an attack on releases of sums guesses {correct} of {_RELEASES} coins: epsilon is at least {measured:.2f}, claimed is "
        f"{_EPSILON:g}"
    )


SUMS_CHECKS: tuple[Callable[[MakeRelease], str], ...] = (sums_bound_problem, sums_noise_problem, sums_attack_problem)


def _sums(release: SumsRelease, length: float, *, there: bool) -> Tensor:
    """Return the exact sums of 30 others and, perhaps, of the patient."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(30, _DIMENSION, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, _CLASSES, (30,), generator=generator)
    patients = [f"other-{number // 2}" for number in range(30)]
    if there:
        values = torch.cat([values, torch.full((_IMAGES, _DIMENSION), length / math.sqrt(_DIMENSION)).double()])
        labels = torch.cat([labels, torch.full((_IMAGES,), 1)])
        patients += ["patient"] * _IMAGES
    return release.exact(values, labels, np.array(patients), _CLASSES)
