"""Private training that is broken on purpose, so that an audit can show that it would have found it out.

Each is made of settings that no recipe, message or site.yaml reaches. None of them is marked as broken: the checks have to
find it out by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from chainward_client.bounded_sums import SumsRelease
from chainward_client.entropy import Entropy, SeededForTests
from chainward_client.privacy_audit.neighbours import MakeTraining
from chainward_client.privacy_audit.released_sums import MakeRelease
from chainward_client.private_training import PrivateTraining
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_shared.privacy.entries import MechanismRecord
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.private_sums import GRAIN, SumsForm, vectors
from chainward_shared.settings import PrivacyUnit

_BEYOND_CLIPPING = 1e9


class _Silence(Entropy):
    def normal(self, shapes: list[torch.Size], device: torch.device) -> list[Tensor]:
        return [torch.zeros(shape, device=device) for shape in shapes]


class _HalfTheNoise(Entropy):
    def normal(self, shapes: list[torch.Size], device: torch.device) -> list[Tensor]:
        return [0.5 * noise for noise in super().normal(shapes, device)]


class _OneNumber(Entropy):
    def normal(self, shapes: list[torch.Size], device: torch.device) -> list[Tensor]:
        number = super().normal([torch.Size([])], device)[0]
        return [number.expand(shape).clone() for shape in shapes]


class _HiddenSeed(SeededForTests):
    seeded = False


class _FixedSize(Entropy):
    def uniform(self, n: int) -> np.ndarray:
        return np.argsort(super().uniform(n)) / n


class _TwiceAsOften(Entropy):
    def uniform(self, n: int) -> np.ndarray:
        return super().uniform(n) / 2


class _TorchsGenerator(Entropy):
    def normal(self, shapes: list[torch.Size], device: torch.device) -> list[Tensor]:
        return [torch.randn(shape, device=device) for shape in shapes]


class _FromTorchsGenerator(PrivateTraining):
    def __init__(self, dp_sgd: DpSgd) -> None:
        super().__init__(dp_sgd, entropy=_TorchsGenerator())

    def secret_generator(self, device: torch.device) -> torch.Generator:
        return torch.Generator()


class _ImagesAsPatients(PrivateTraining):
    def start(
        self, model: nn.Module, others: Sequence[nn.Module], parameters: Sequence[nn.Parameter], patients: np.ndarray
    ) -> None:
        super().start(model, others, parameters, np.arange(len(patients)).astype(str))


class _DividedByTheSample(PrivateTraining):
    _sampled = 0

    def accumulate(self, losses: Tensor) -> None:
        self._sampled += len(losses)
        super().accumulate(losses)

    def finish_step(self) -> None:
        super().finish_step()
        for parameter in self._parameters:
            assert parameter.grad is not None
            parameter.grad *= self.dp_sgd.expected_batch / max(1, self._sampled)
        self._sampled = 0


class _QuietWhenEmpty(PrivateTraining):
    def finish_step(self) -> None:
        empty = not self._sums
        super().finish_step()
        for parameter in self._parameters if empty else ():
            parameter.grad = torch.zeros_like(parameter)


class _StopsAtABadImage(PrivateTraining):
    def _add(self, losses: Callable[[Tensor], Tensor], rows: Tensor) -> None:
        self.accumulate(losses(rows))


class _LosesOthersWithABadImage(PrivateTraining):
    def _add(self, losses: Callable[[Tensor], Tensor], rows: Tensor) -> None:
        try:
            self.accumulate(losses(rows))
        except IndexError:
            assert self._ghost is not None
            self._ghost.forget()


class ForgetfulLedger(Ledger):
    """A ledger whose accountant starts anew with every reservation."""

    def records(self, run: str | None = None, upto: int | None = None) -> tuple[MechanismRecord, ...]:
        spent = [spending.counted for spending in self.spendings(upto) if run in (None, spending.reserved.run)]
        return tuple(record for record in spent[-1:] if record is not None)


def _with(entropy: type[Entropy]) -> MakeTraining:
    return lambda dp_sgd: PrivateTraining(dp_sgd, entropy=entropy())


def without_clipping(dp_sgd: DpSgd) -> PrivateTraining:
    """The noise is as specified, and no gradient is shortened."""
    loose = {"clip": dp_sgd.clip * _BEYOND_CLIPPING, "noise_multiplier": dp_sgd.noise_multiplier / _BEYOND_CLIPPING}
    return PrivateTraining(dp_sgd.model_copy(update=loose))


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
    """One way to break private work.

    Attributes
    ----------
    name : what is broken
    training, ledger, release : how a training is made, which ledger counts, how a release of sums is made
    attacked : whether trained models are attacked, too; where one image is in every step, as in an attack, most faults don't show
    """

    name: str
    training: MakeTraining = PrivateTraining
    ledger: type[Ledger] = Ledger
    release: MakeRelease = SumsRelease
    attacked: bool = False


without_noise = _with(_Silence)

SABOTAGES = (
    Sabotage("without noise", without_noise, attacked=True),
    Sabotage("without clipping", without_clipping, attacked=True),
    Sabotage("with half the noise", _with(_HalfTheNoise)),
    Sabotage("with one number as the noise of all weights", _with(_OneNumber)),
    Sabotage("with noise from a seed", lambda dp_sgd: PrivateTraining(dp_sgd, entropy=_HiddenSeed(3)), attacked=True),
    Sabotage("with noise from PyTorch's own generator", _FromTorchsGenerator),
    Sabotage("without noise where nobody was sampled", _QuietWhenEmpty),
    Sabotage("with a sample of fixed size", _with(_FixedSize)),
    Sabotage("with patients sampled twice as often", _with(_TwiceAsOften)),
    Sabotage("with each image counted as a patient", _ImagesAsPatients),
    Sabotage("with the sum divided by the sample's own size", _DividedByTheSample),
    Sabotage("that stops at an image without a loss", _StopsAtABadImage),
    Sabotage("that loses others with an image without a loss", _LosesOthersWithABadImage),
    Sabotage("with teachers trained without privacy", lambda dp_sgd: PrivateTraining(dp_sgd, private_teachers=True)),
    Sabotage("with an accountant that is reset each round", ledger=ForgetfulLedger),
    Sabotage("with sums without noise", release=NoiselessSums),
    Sabotage("with sums without bounds", release=UnboundedSums),
    Sabotage("with sums bounded for each image, not each patient", release=sums_by_image),
)
