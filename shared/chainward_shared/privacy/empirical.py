"""What `audit --empirical` found: the private training tried by checks and by attack, as it is and broken on purpose."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Attack:
    """What an attack on one private training found.

    Attributes
    ----------
    claimed : epsilon of the training's DP-SGD at its delta, as accounted
    measured : lower bound on epsilon, refuted at `confidence`
    ceiling : what `measured` were if every guess had been right: no more can be shown with so many guesses
    confidence : of the lower bound
    canaries, guesses, correct : how many there were, how many of them were guessed about, how many guesses were right
    """

    claimed: float
    measured: float
    ceiling: float
    confidence: float
    canaries: int
    guesses: int
    correct: int

    @property
    def problem(self) -> str | None:
        """One sentence where the measured bound is above the claim, else None."""
        if self.measured <= self.claimed:
            return None
        return (
            f"an attack on the trained model guesses {self.correct} of {self.guesses} coins: epsilon is at least "
            f"{self.measured:.2f} at {self.confidence:.0%} confidence, claimed is {self.claimed:.2f}"
        )

    @property
    def blind(self) -> bool:
        """Whether not even an attack that is always right could have refuted the claim."""
        return self.ceiling <= self.claimed


@dataclass(frozen=True)
class Trial:
    """One version of the training code under trial.

    Attributes
    ----------
    name : "as installed", or how it was broken
    honest : False: broken on purpose, to see that it is found out
    problems : what the checks of the private step found, one sentence each
    attack : what the attack found; None for a version that is broken where this attack is blind
    """

    name: str
    honest: bool
    problems: tuple[str, ...]
    attack: Attack | None

    @property
    def caught(self) -> bool:
        """Whether a check or the attack found something."""
        return bool(self.problems) or bool(self.attack and self.attack.problem)


@dataclass(frozen=True)
class Empirical:
    """The trials of an audit.

    Attributes
    ----------
    source : where the attacked epsilon comes from: the policy, say
    delta, noise_multiplier, steps : of the attacked training, in which everybody is in every step
    checks : how many properties of the private step were checked in each trial
    trials : the honest one first
    """

    source: str
    delta: float
    noise_multiplier: float
    steps: int
    checks: int
    trials: tuple[Trial, ...]

    @property
    def attack(self) -> Attack:
        """The attack on the training as it is installed."""
        attack = self.trials[0].attack
        assert attack is not None, "the honest trial is attacked"
        return attack

    @property
    def problems(self) -> list[str]:
        """What is wrong, one sentence each: with the code as installed, or with a trial that should have failed."""
        found: list[str] = []
        for trial in self.trials:
            if trial.honest:
                found += [*trial.problems, *([self.attack.problem] if self.attack.problem else [])]
            elif not trial.caught:
                found.append(f"training {trial.name} was not found out: the checks can't be relied on here")
        return found

    @property
    def remarks(self) -> list[str]:
        """What limits the trials, one sentence each."""
        attack = self.attack
        if not attack.blind:
            return []
        return [
            f"with {attack.canaries} canaries no attack can show an epsilon above {attack.ceiling:.2f}, which is below the "
            f"claimed {attack.claimed:.2f}: here only the checks of the step can fail. Try more --canaries, or a smaller "
            "--epsilon: the code is the same"
        ]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        trials = [{**asdict(trial), "problems": list(trial.problems), "caught": trial.caught} for trial in self.trials]
        return {**asdict(self), "trials": trials}
