"""The arms of a study with their configurations, checked, and which of them are the same training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chainward_shared.config import ConfigScalar, RunConfig
from chainward_shared.errors import ConfigError, StudyError
from chainward_shared.recipes import LinkRecipe
from chainward_simulations.study.arms import ARMS, EACH_EPOCH, Arm, custom_arm, find_arm

PRIVATE_TRAINERS = ("alone", "alone-long", "chain", "student")
ROUNDS = 4
"""Rounds of FedAvg, as nearly as the epochs allow."""

_CYCLIC: Mapping[str, ConfigScalar] = {
    "chain.distillation-weight": 0.0,
    "chain.attention-weight": 0.0,
    "chain.unlabelled-weight": 0.0,
    "chain.start": "warm",
    "chain.max-forgetting": 1.0,
    "chain.strands": 1,
    "chain.merge": "best",
    "privileged.mode": "off",
}


@dataclass(frozen=True)
class ConfiguredArm:
    """An arm with its whole configuration, checked; `config` has the first seed until `of_seed` sets another.

    Attributes
    ----------
    rounds : of federated arms, a divisor of the epochs; 0 otherwise
    """

    arm: Arm
    config: RunConfig
    rounds: int

    @property
    def name(self) -> str:
        """The arm's name."""
        return self.arm.name

    def of_seed(self, seed: int) -> ConfiguredArm:
        """Return the same arm for another seed."""
        return replace(self, config=self.config.model_copy(update={"seed": seed}))

    @property
    def plain_recipe(self) -> LinkRecipe:
        """The recipe of a baseline's training: a link's, for all its laps, without any teacher."""
        return self.config.link_recipe(laps=self.config.chain.laps).model_copy(
            update={
                "start": "warm",
                "distillation_weight": 0.0,
                "attention_weight": 0.0,
                "unlabelled_weight": 0.0,
                "privileged": None,
                # without a teacher these do nothing; the same everywhere, they don't make it another training
                "temperature": 1.0,
                "temperature_decay": 1.0,
                "teacher_trust": "none",
            }
        )

    def chain_digest(self) -> str:
        """Return the digest of all that decides the chain's model."""
        return _digest(self._of_chain())

    def digest(self) -> str:
        """Return the digest of all that decides what is trained: arms with the same are trained once.

        One lap of cyclic weight transfer, with the head that it trained, is a chain without teachers, to the bit; a test holds
        this.
        """
        arm, config = self.arm, self.config
        refit, recipe = ["refit"] if arm.refit else [], self.plain_recipe.model_dump()
        one_lap = arm.laps == 1 and config.chain.head == "trained" and not arm.refit
        if arm.trainer == "chain" or (arm.trainer == "cyclic" and one_lap):
            return _digest(self._of_chain())
        if arm.trainer == "cyclic":
            return _digest(["cyclic", arm.laps, config.chain.order, *self._of_sites(), recipe, *refit])
        if arm.trainer == "student":
            recipes = [config.student_recipe(stage).model_dump() for stage in ("distil", "finetune")]
            return _digest([self._of_chain(), config.student.model_dump(), recipes])
        return _digest([arm.trainer, self.rounds, arm.mu, *refit, *self._of_sites(), recipe])

    def _of_sites(self) -> list[Any]:
        """What decides the sites' data and the backbone."""
        config = self.config
        return [
            config.data.model_dump(),
            config.federation.model_dump(include={"num_sites", "sites"}),
            [config.chain.backbone, config.chain.patch_size],
            *([[config.chain.start_from, config.chain.trainable]] if config.chain.start_from else []),
            *([config.chain.head] if config.chain.head != "trained" else []),
        ]

    def _of_chain(self) -> list[Any]:
        aside = {"retries", "on_failure", "on_failure_at", "max_drift", "compare_alone"}
        recipe = self.config.link_recipe()
        chain = self.config.chain.model_dump(exclude=aside | set(recipe.model_dump()))
        return ["chain", chain, *self._of_sites(), recipe.model_dump()]


def _digest(deciding: object) -> str:
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def configure_arms(
    names: Sequence[str],
    definitions: Sequence[str],
    base: Mapping[str, ConfigScalar],
    seed: int,
    *,
    may_be_none: bool = False,
) -> list[ConfiguredArm]:
    """Return the arms of a study, checked, in the order they were named; arms that were defined follow.

    Parameters
    ----------
    names : names of arms, also of those in `definitions`
    definitions : ``NAME=key=value key=value``, see `custom_arm`
    base : the study's settings as flat run config

    Raises
    ------
    StudyError, ConfigError
        One line: an unknown arm, one named twice, or one that the configuration doesn't allow.
    """
    custom: dict[str, Arm] = {}
    for definition in definitions:
        arm = custom_arm(definition)
        if arm.name in ARMS or arm.name in custom:
            raise StudyError(f"--arm {arm.name}: there is an arm of this name already; choose another name")
        custom[arm.name] = arm
    wanted = list(names)
    if twice := next((name for name in wanted if wanted.count(name) > 1), None):
        raise StudyError(f"--arms: '{twice}' is named twice; name each arm once")
    wanted += [name for name in custom if name not in wanted]
    if not wanted and not may_be_none:
        raise StudyError("no arms: name some with --arms alone,chain or define one with --arm")
    RunConfig.from_flat({**base, "seed": seed})  # what is wrong with the settings is not an arm's fault
    return [_configured(custom[name] if name in custom else find_arm(name), base, seed) for name in wanted]


def _configured(arm: Arm, base: Mapping[str, ConfigScalar], seed: int) -> ConfiguredArm:
    flat = {**base, "seed": seed, **arm.overrides}
    given = RunConfig.from_flat({**base, "seed": seed})
    epochs = given.chain.epochs * given.chain.laps if "chain.epochs" not in arm.overrides else None
    if arm.trainer == "cyclic":
        flat |= _CYCLIC
        flat["chain.order"] = "given" if given.chain.order == "weakest-next" else given.chain.order
    if arm.long:
        student = given.student
        passes = student.epochs * (student.rounds + student.finetune_rounds)
        flat |= {"chain.laps": 1, "chain.epochs": given.chain.epochs * given.chain.laps * given.chain.strands + passes}
    if arm.laps:
        total = epochs if epochs is not None else int(flat["chain.epochs"])
        if total % arm.laps:
            raise StudyError(
                f"arm '{arm.name}': {arm.laps} laps can't share {total} epochs (chain.epochs times chain.laps) evenly; "
                f"set a multiple of {arm.laps}"
            )
        flat |= {"chain.laps": arm.laps, "chain.epochs": total // arm.laps}
    if arm.trainer == "student" and given.student.rounds == 0 and "student.rounds" not in arm.overrides:
        raise StudyError(f"arm '{arm.name}': student.rounds = 0 trains no students; set it to at least 1")
    try:
        config = RunConfig.from_flat(flat)
    except ConfigError as error:
        raise StudyError(f"arm '{arm.name}': {error}") from None
    if config.privacy.mode != "off" and arm.trainer not in PRIVATE_TRAINERS:
        raise StudyError(
            f"arm '{arm.name}' can't be trained privately; arms that can: alone, chain..., student..., or set privacy.mode=off"
        )
    rounds = _rounds(arm, config.chain.epochs * config.chain.laps) if arm.trainer == "federated" else 0
    return ConfiguredArm(arm, config, rounds)


def _rounds(arm: Arm, epochs: int) -> int:
    """Return the rounds among which the epochs are shared evenly."""
    if arm.rounds == EACH_EPOCH:
        return epochs
    if arm.rounds:
        if epochs % arm.rounds:
            raise StudyError(
                f"arm '{arm.name}': {arm.rounds} rounds can't share {epochs} epochs (chain.epochs times chain.laps) evenly; "
                "set a divisor"
            )
        return arm.rounds
    divisors = [count for count in range(2, epochs + 1) if epochs % count == 0] or [1]
    return min(divisors, key=lambda count: (abs(count - ROUNDS), -count))
