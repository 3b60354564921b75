"""The whole configuration of a run: from Flower's flat keys, and to the recipes that travel to the sites.

Flower hands an app ``{"chain.laps": 2, ...}``. `RunConfig.from_flat` turns that into typed tables, and refuses unknown
keys, values out of range and keys that contradict each other before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from chainward_shared.bounds import Seed
from chainward_shared.config.contradictions import contradictions
from chainward_shared.config.options import ConfigScalar, Option, options_of
from chainward_shared.config.output import OutputConfig
from chainward_shared.config.tables import (
    ChainConfig,
    DataConfig,
    FederationConfig,
    PrivacyConfig,
    PrivilegedConfig,
    StudentConfig,
    Table,
    ids_in,
)
from chainward_shared.errors import ConfigError, nearest
from chainward_shared.recipes import PRIVILEGED_BATCH, LinkRecipe, PlannedTraining, PrivacyRecipe, StudentRecipe
from chainward_shared.settings import (
    ArithmeticSettings,
    AugmentationSettings,
    LabelSettings,
    LinkSettings,
    PrivacySettings,
    StudentSettings,
    values_of,
)
from chainward_shared.words import lower_first


class RunConfig(Table):
    """The whole configuration of a run."""

    seed: Seed = Field(0, description="Every random choice derives from it, but for privacy noise")
    federation: FederationConfig = FederationConfig()
    data: DataConfig = DataConfig()
    chain: ChainConfig = ChainConfig()
    privileged: PrivilegedConfig = PrivilegedConfig()
    student: StudentConfig = StudentConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    output: OutputConfig = OutputConfig()

    @classmethod
    def from_flat(cls, flat: Mapping[str, ConfigScalar]) -> RunConfig:
        """Parse Flower's flat run config.

        Raises
        ------
        ConfigError
            One line that names every offending key, its value, what is allowed, and the nearest known key.
        """
        known = {option.key: option for option in options()}
        problems = [
            f"{key} = {value!r}: there is no such key{nearest(key, known)}"
            for key, value in flat.items()
            if key not in known
        ]
        nested: dict[str, Any] = {}
        for key, value in flat.items():
            table, _, name = key.rpartition(".")
            if key in known:
                (nested.setdefault(table, {}) if table else nested)[name] = value
        config = cls()
        try:
            config = cls.model_validate(nested)
        except ValidationError as error:
            for detail in error.errors():
                key = ".".join(str(part) for part in detail["loc"][:2])
                option = known.get(key)
                allowed = f"; allowed: {option.allowed}, default {option.default!r}" if option else ""
                problems.append(f"{key} = {detail['input']!r}: {lower_first(detail['msg'])}{allowed}")
        if not problems:
            problems = list(contradictions(config))
        if problems:
            count = f"{len(problems)} problems in the run configuration: " if len(problems) > 1 else ""
            raise ConfigError(count + " | ".join(problems))
        return config

    def to_flat(self) -> dict[str, ConfigScalar]:
        """Return ``{"chain.laps": 1, ...}`` with every key, as Flower's run config has it."""
        nested = self.tables()
        places = [option.key.rpartition(".") for option in options()]
        return {table + dot + name: (nested[table] if table else nested)[name] for table, dot, name in places}

    def tables(self) -> dict[str, Any]:
        """Return nested tables with kebab-case keys, as written to ``config.toml``."""
        return self.model_dump(by_alias=True)

    @property
    def expected_sites(self) -> tuple[str, ...]:
        """The ids in ``federation.sites``, in order."""
        return ids_in(self.federation.sites)

    def with_threads(self, threads: int) -> RunConfig:
        """Return the configuration with this number of CPU threads."""
        return self.model_copy(update={"federation": self.federation.model_copy(update={"threads": threads})})

    def _arithmetic(self) -> dict[str, Any]:
        return values_of(self.federation, ArithmeticSettings) | {"threads": self.federation.cpu_threads}

    def link_recipe(self, *, laps: int = 1) -> LinkRecipe:
        """Return how one link is trained; `laps` > 1 gives the budget of several laps (for a site alone)."""
        link = values_of(self.chain, LinkSettings)
        link["epochs"] *= max(1, laps)
        return LinkRecipe(
            seed=self.seed,
            privileged=self.privileged.recipe_for("links"),
            privacy=self.privacy_recipe(),
            **self._arithmetic(),
            **values_of(self.data, AugmentationSettings),
            **link,
        )

    def student_recipe(self, stage: Literal["distil", "finetune"]) -> StudentRecipe:
        """Return how a student is trained at a site in one round of `stage`."""
        student = values_of(self.student, StudentSettings)
        finetune = stage == "finetune"
        if finetune:
            rate = self.student.learning_rate * self.student.finetune_factor
            student |= {"learning_rate": rate, "distillation_weight": 0.0, "large_weight": 0.0}
        return StudentRecipe(
            seed=self.seed,
            stage=stage,
            privileged=None if finetune else self.privileged.recipe_for("students"),
            privacy=self.privacy_recipe(),
            **self._arithmetic(),
            **values_of(self.data, AugmentationSettings),
            **values_of(self.chain, LabelSettings),
            **student,
        )

    def privacy_recipe(self) -> PrivacyRecipe | None:
        """Return how private sites train: with one noise for all trainings that the run asks of each; None where none do."""
        privacy, chain = self.privacy, self.chain
        if privacy.mode == "off":
            return None
        trainings = tuple(self._planned_trainings())
        return PrivacyRecipe(
            sites="all" if privacy.mode == "dp-sgd" else "by-policy",
            epsilon=privacy.epsilon,
            share=1.0 if chain.unlabelled_weight > 0 else chain.label_fraction,
            run=trainings,
            statistics=self.statistics_rounds(),
            statistics_share=privacy.split if trainings else 1.0,
            **values_of(privacy, PrivacySettings),
        )

    def statistics_rounds(self) -> int:
        """Return how many statistics rounds a private run has: before the first link, at the end, and over the student."""
        chain, student = self.chain, self.student
        of_student = int(bool(student.rounds) and student.head == "statistics")
        if chain.head == "trained":
            return of_student
        if not chain.laps:
            return 1 + of_student
        return of_student + {"no": 1, "end": 2, "links": 0}[chain.refit]

    def _planned_trainings(self) -> Iterator[PlannedTraining]:
        """Yield the trainings that a run asks of each private site."""
        chain, student, privileged, batch_size = self.chain, self.student, self.privileged, self.privacy.batch_size
        if chain.laps:
            yield PlannedTraining(
                epochs=chain.epochs, batch_size=batch_size or chain.batch_size, times=chain.laps * chain.strands
            )
        if student.rounds:
            yield PlannedTraining(
                epochs=student.epochs,
                batch_size=batch_size or student.batch_size,
                times=student.rounds + student.finetune_rounds,
            )
        if privileged.mode != "off" and (chain.laps or student.rounds):
            yield PlannedTraining(
                epochs=privileged.epochs, batch_size=PRIVILEGED_BATCH, times=2 if privileged.mode == "all" else 1
            )


def options() -> list[Option]:
    """Return every key of the configuration, in the order of the tables."""
    return options_of(RunConfig)


def table_descriptions() -> dict[str, str]:
    """Return the one-line description of each table."""
    return {
        name: (field.annotation.__doc__ or "").strip()
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Table)
    }
