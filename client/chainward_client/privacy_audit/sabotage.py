"""Private training that is broken on purpose, so that an audit can show that it would have found it out.

Each is made of settings that no recipe, message or site.yaml reaches. None of them is marked as broken: the checks have to
find it out by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chainward_client.bounded_sums import SumsRelease
from chainward_client.entropy import Entropy, OperatingSystem, SeededForTests
from chainward_client.privacy_audit.neighbours import MakeTraining
from chainward_client.privacy_audit.released_sums import MakeRelease
from chainward_client.private_training import PrivateTraining
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_shared.privacy.entries import MechanismRecord
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.private_sums import GRAIN, SumsForm, vectors
from chainward_shared.settings import PrivacyUnit

_BEYOND_CLIPPING = 1e9


class _Silence(OperatingSystem):
    def normal(self, shapes: list[torch.Size], device: torch.device) -> list[Tensor]:
        return [torch.zeros(shape, device=device) for shape in shapes]


class _HiddenSeed(SeededForTests):
    seeded = False


class ForgetfulLedger(Ledger):
    """A ledger whose accountant starts anew with every reservation."""

    def records(self, run: str | None = None, upto: int | None = None) -> tuple[MechanismRecord, ...]:
        spent = [spending.counted for spending in self.spendings(upto) if run in (None, spending.reserved.run)]
        return tuple(record for record in spent[-1:] if record is not None)


def without_noise(dp_sgd: DpSgd) -> PrivateTraining:
    """Every step's noise is zero."""
    return PrivateTraining(dp_sgd, entropy=_Silence())


def without_clipping(dp_sgd: DpSgd) -> PrivateTraining:
    """The noise is as specified, and no gradient is shortened."""
    loose = {"clip": dp_sgd.clip * _BEYOND_CLIPPING, "noise_multiplier": dp_sgd.noise_multiplier / _BEYOND_CLIPPING}
    return PrivateTraining(dp_sgd.model_copy(update=loose))


def noise_from_a_seed(dp_sgd: DpSgd) -> PrivateTraining:
    """Noise and sampling can be replayed by whoever knows the seed."""
    return PrivateTraining(dp_sgd, entropy=_HiddenSeed(3))


def any_teacher(dp_sgd: DpSgd) -> PrivateTraining:
    """Privileged teachers that were trained without privacy are let in."""
    return PrivateTraining(dp_sgd, private_teachers=True)


class NoiselessSums(SumsRelease):
    """Sums leave as they are."""

    def noised(self, exact: Tensor, noise: float, entropy: Entropy) -> Tensor:
        return exact


class UnboundedSums(SumsRelease):
    """A patient adds the sum over all images, however long it is."""

    def of_units(self, values: Tensor, members: Tensor, units: list[np.ndarray]) -> Iterator[Tensor]:
        octaves = torch.zeros(len(values), 1, dtype=torch.float64)
        for rows in units:
            some = torch.from_numpy(rows)
            yield vectors(values[some], octaves[some], members[some], self.form).sum(dim=0, keepdim=True)

    def bounded(self, of_units: Tensor) -> Tensor:
        return (of_units / GRAIN).clamp(-(2.0**60), 2.0**60).long()


def sums_by_image(form: SumsForm, unit: PrivacyUnit) -> SumsRelease:
    """A patient adds a vector for each image."""
    return SumsRelease(form, "image")


@dataclass(frozen=True)
class Sabotage:
    """One way to break private work: its name, how a training and a release of sums are made, and which ledger counts."""

    name: str
    training: MakeTraining = PrivateTraining
    ledger: type[Ledger] = Ledger
    release: MakeRelease = SumsRelease


SABOTAGES = (
    Sabotage("without noise", without_noise),
    Sabotage("without clipping", without_clipping),
    Sabotage("with noise from a seed", noise_from_a_seed),
    Sabotage("with teachers trained without privacy", any_teacher),
    Sabotage("with an accountant that is reset each round", ledger=ForgetfulLedger),
    Sabotage("with sums without noise", release=NoiselessSums),
    Sabotage("with sums without bounds", release=UnboundedSums),
    Sabotage("with sums bounded for each image, not each patient", release=sums_by_image),
)
