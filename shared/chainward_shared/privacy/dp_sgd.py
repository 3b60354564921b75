"""The parameters of DP-SGD that a site derives from what a run asks for, before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from pydantic import Field

from chainward_shared.errors import PolicyRefusal, PrivacyError
from chainward_shared.outside import Figure, Positive, Record
from chainward_shared.privacy.accounting import Mechanism, solve_noise_multiplier, spent
from chainward_shared.privacy.calibration import release_mechanisms, release_noise
from chainward_shared.recipes import PlannedTraining, PrivacyRecipe
from chainward_shared.settings import PrivacyUnit

MOST_STEPS = 1_000_000
"""Private steps of a run at one site: finding the noise for as many takes half a minute, for more it soon takes for ever."""


class DpSgd(Record):
    """DP-SGD of one private training (Abadi et al. 2016). Nothing of it depends on data, and nothing changes on the way.

    `sample_rate`: probability with which a unit is in a step. `expected_batch`: by which the sum of a step's gradients
    is divided, whatever came out of the draw. `noise_multiplier`: standard deviation of the noise over `clip`.
    """

    unit: PrivacyUnit
    delta: float = Field(gt=0, lt=1)
    noise_multiplier: Figure = Field(ge=0)
    sample_rate: float = Field(gt=0, le=1)
    expected_batch: Figure = Field(gt=0)
    steps: Positive
    clip: Figure = Field(gt=0)

    @property
    def mechanism(self) -> Mechanism:
        """What the training costs when it is carried out to the end: to be reserved before the first step."""
        return Mechanism("dp-sgd", self.noise_multiplier, self.sample_rate, self.steps)


def dp_sgd_of(
    recipe: PrivacyRecipe, *, units: int, epochs: int, batch_size: int, before: Sequence[Mechanism] = ()
) -> DpSgd:
    """Return how a site with `units` patients (or images) trains for `epochs` at an expected batch of `batch_size`.

    With an epsilon the noise is the least with which this training alone (or, where the recipe lists the trainings of the
    run, all of them together) stays within it; with `before`, within it after what was spent before.

    Parameters
    ----------
    units : taken as public. Use a declared or a rounded number, see `rounded_units`; the guarantee does not rest on its
        being right
    before : what else is or will be spent: before this training, or, for a run, beside its trainings

    Raises
    ------
    PrivacyError
        There are no units, delta is not below 1 / units, or no noise is enough.
    PolicyRefusal
        The run has more steps than can be accounted for in reasonable time.
    """
    if units < 1:
        raise PrivacyError(f"a private training of {units} {recipe.unit}s is none; expected at least 1")
    if recipe.delta >= 1 / units:
        raise PrivacyError(
            f"delta {recipe.delta:g} is not below 1 / {units}, one over the {recipe.unit}s of this site: at that delta a "
            "mechanism may publish one of them; choose a smaller one"
        )
    sample_rate, steps = _rate_and_steps(units, epochs, batch_size)
    _refuse_too_many_steps(steps)
    noise = recipe.noise_multiplier
    if noise is None:
        assert recipe.epsilon is not None
        trainings = recipe.run or (PlannedTraining(epochs=epochs, batch_size=batch_size),)
        shapes = [(*_rate_and_steps(units, one.epochs, one.batch_size), one.times) for one in trainings]
        _refuse_too_many_steps(sum(count * times for _, count, times in shapes))
        noise = _noise(recipe.epsilon, recipe.delta, tuple(shapes), tuple(before))
    return DpSgd(
        unit=recipe.unit,
        delta=recipe.delta,
        noise_multiplier=noise,
        sample_rate=sample_rate,
        expected_batch=sample_rate * units,
        steps=steps,
        clip=recipe.clip,
    )


STAGES = (0.05, 0.95)
"""Shares of a private statistics round's budget that its two releases have: for the centre of all embeddings, and for
the classes."""


def statistics_mechanisms(recipe: PrivacyRecipe, before: Sequence[Mechanism] = ()) -> list[Mechanism]:
    """Return what all statistics rounds of a run cost together at a site, one mechanism for each of their `STAGES`.

    Parameters
    ----------
    before : the noised scores of the run

    Raises
    ------
    PrivacyError
        No noise is enough.
    """
    if not recipe.statistics:
        return []
    noise = recipe.noise_multiplier
    if noise is None:
        assert recipe.epsilon is not None
        scores = spent(before, recipe.delta)
        most = scores + recipe.statistics_share * max(0.0, recipe.epsilon - scores)
        noise = release_noise(most, recipe.delta, recipe.statistics, before, STAGES)
    return release_mechanisms(noise, recipe.statistics, STAGES)


def run_mechanisms(recipe: PrivacyRecipe, *, units: int, before: Sequence[Mechanism] = ()) -> list[Mechanism]:
    """Return what all trainings that the recipe lists cost together at a site, and `before`.

    Raises
    ------
    PrivacyError
        As `dp_sgd_of`.
    """
    each = [
        (dp_sgd_of(recipe, units=units, epochs=one.epochs, batch_size=one.batch_size, before=before), one.times)
        for one in recipe.run
    ]
    trainings = [Mechanism("dp-sgd", one.noise_multiplier, one.sample_rate, one.steps * times) for one, times in each]
    return [*before, *trainings]


def _refuse_too_many_steps(steps: int) -> None:
    if steps > MOST_STEPS:
        raise PolicyRefusal(
            f"{steps} private steps are more than can be accounted for; at most {MOST_STEPS}: ask for fewer epochs, laps or "
            "rounds, or for a larger privacy.batch-size"
        )


def _rate_and_steps(units: int, epochs: int, batch_size: int) -> tuple[float, int]:
    sample_rate = min(1.0, batch_size / units)
    return sample_rate, max(1, round(epochs / sample_rate))


@lru_cache(maxsize=256)
def _noise(
    epsilon: float, delta: float, shapes: tuple[tuple[float, int, int], ...], before: tuple[Mechanism, ...]
) -> float:
    """Return the noise with which all trainings, (sample rate, steps, times) each, stay within epsilon; seconds."""
    trainings = [(sample_rate, steps * times) for sample_rate, steps, times in shapes]
    return solve_noise_multiplier(epsilon, delta, trainings, before)


def rounded_units(count: int) -> int:
    """Return `count` rounded down to one digit and a half (1, 1.5, 2, .. 9.5 times a power of ten), at least 1.

    The exact number of patients is private. A coarse one hides one patient in nearly every case, not in all: declare
    the number where that matters.
    """
    if count < 10:
        return max(1, count)
    half = 10 ** int(math.log10(count)) // 2
    return count // half * half
