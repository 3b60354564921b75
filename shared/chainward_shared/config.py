"""The configuration of a run: one pydantic model per table, parsed from Flower's flat run config.

Flower hands an app ``{"chain.laps": 2, ...}``. `RunConfig.from_flat` turns that into typed tables, and refuses unknown
keys, values out of range and keys that contradict each other before anything is trained.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from chainward_shared.errors import ConfigError, nearest
from chainward_shared.privacy.policy import MetricsRelease, PrivacyPolicy
from chainward_shared.recipes import (
    MAX_ENSEMBLE,
    PRIVILEGED_BATCH,
    Augmentation,
    AuxiliaryTeacher,
    ChannelSelection,
    ClassBalance,
    EmaSchedule,
    HeadSelection,
    LayerSelection,
    LearningRateCycle,
    LinkRecipe,
    PlannedTraining,
    Precision,
    PrivacyRecipe,
    PrivacyUnit,
    PrivilegedRecipe,
    SiteOrder,
    StrandMerge,
    StudentRecipe,
    StudentStart,
    TeacherTrust,
    Transfer,
)

ConfigScalar = bool | int | float | str
OnFailure = Literal["skip", "revisit", "stop"]


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _ids(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


class Table(BaseModel):
    """Base of the tables: kebab-case keys, unknown ones refused, immutable."""

    model_config = ConfigDict(alias_generator=_kebab, populate_by_name=True, extra="forbid", frozen=True)


class FederationConfig(Table):
    """Who takes part, and how long the coordinator waits."""

    sites: str = Field(
        "", description="Ids of the sites that take part, comma-separated, in chain order. Empty: all that there are"
    )
    num_sites: int = Field(
        0, ge=0, le=512, description="Number of sites. 0: six phantoms, or as many as the data file's site column has"
    )
    deadline: float = Field(
        120.0, gt=0, le=86_400, description="Seconds to wait at the start until the expected sites are there"
    )
    hop_deadline: float = Field(
        7_200.0, gt=0, le=604_800, description="Seconds to wait for one site's training before it counts as failed"
    )
    patience: float = Field(
        300.0,
        ge=0,
        le=604_800,
        description="Seconds to wait for a site that is not connected, before an attempt to train there counts as failed",
    )
    check_every: float = Field(
        120.0,
        ge=0,
        le=604_800,
        description="Seconds between two questions to a silent site whether it is still at work; where it is not, twice in a "
        "row, it is asked for the work again. 0: never. Each costs the site a few seconds of a processor",
    )
    precision: Precision = Field(
        "auto", description="Arithmetic of training: auto takes bf16 where the hardware computes it, fp32 elsewhere"
    )
    threads: int = Field(
        2, ge=1, le=256, description="CPU threads of a training. Results are repeatable only for the same number"
    )
    transfer: Transfer = Field(
        "half",
        description="How models travel. half: every tensor that float16 holds to 11 significant bits is rounded to it before "
        "the model is stored, scored and sent; full: as they are, in twice the bytes",
    )


class DataConfig(Table):
    """What a simulation trains on. A deployed hospital knows its data from its own site.yaml."""

    source: str = Field("phantom", description="`phantom`, or the absolute path of a data file (YAML)")
    label_skew: float = Field(
        0.0,
        ge=0,
        le=1_000,
        description="Dirichlet alpha by which cases are dealt to simulated sites; 0: by the data file's site column",
    )
    augmentation: Augmentation = Field(
        "upright",
        description="none; upright: small shifts, turns and changes of brightness; "
        "all-orientations: also flips and any turn (skin, cells)",
    )


class ChainConfig(Table):
    """The chain of links."""

    backbone: str = Field("convnext_atto", description="timm model that travels along the chain")
    patch_size: int = Field(0, ge=0, le=64, description="Patch size of a ViT, in pixels. 0: the backbone's own")
    laps: int = Field(1, ge=1, le=100, description="Passes over all sites")
    strands: int = Field(1, ge=1, le=512, description="Chains that run at the same time, each starting at another site")
    merge: StrandMerge = Field(
        "best",
        description="What comes of several strands. best: the one with the highest validation score; average: the mean of "
        "their weights; ensemble: the best one, and the students learn from all of them (student.large-weight)",
    )
    order: SiteOrder = Field(
        "given",
        description="Order of the sites in a lap; shuffled: by the seed; largest-first, smallest-first: by training cases; "
        "weakest-next: the site where the predecessor's validation score is lowest (one strand only)",
    )
    epochs: int = Field(12, ge=1, le=10_000, description="Epochs of one link")
    batch_size: int = Field(32, ge=1, le=4_096, description="Images per step; a site with fewer takes all it has")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="Peak of the one-cycle learning rate (AdamW)")
    cycle: LearningRateCycle = Field(
        "link",
        description="link: the learning rate goes through a one-cycle in every link; laps: a site's links of all laps share "
        "one, so that later laps change less",
    )
    weight_decay: float = Field(0.05, ge=0, le=1, description="Decoupled weight decay; not on norms and biases")
    start: Literal["warm", "fresh"] = Field(
        "warm", description="warm: a link starts from the predecessor's weights; fresh: from the run's initial weights"
    )
    label_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Fraction of each site's training cases whose labels are used, by class, at least one each",
    )
    unlabelled_weight: float = Field(
        0.0,
        ge=0,
        le=100,
        description="Weight c of the distillation from the predecessor on the images that the label fraction leaves "
        "without a label. 0: they are not used",
    )
    distillation_weight: float = Field(
        0.5, ge=0, le=1, description="Weight a of the distillation; cross-entropy has 1-a. 0: no teacher"
    )
    temperature: float = Field(4.0, ge=1, le=100, description="Temperature of the distillation in the first epoch")
    temperature_decay: float = Field(
        1.0, gt=0, le=1, description="Factor on the temperature from epoch to epoch, down to 1. 1: no annealing"
    )
    attention_weight: float = Field(
        0.0,
        ge=0,
        le=10_000,
        description="Weight b of the attention transfer: a link attends to what its predecessor found. 0: none",
    )
    teacher_trust: TeacherTrust = Field(
        "label",
        description="label: the predecessor counts less where it contradicts the label; none: the same everywhere",
    )
    class_balance: ClassBalance = Field(
        "site-prior",
        description="site-prior: cross-entropy adjusted by the logarithm of the site's class frequencies; "
        "weighted: inverse class frequencies as weights; none",
    )
    prior_strength: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Strength of the site-prior adjustment. 1: predictions as if all classes were equally frequent; "
        "less: part of the sites' own class mix stays in them",
    )
    max_forgetting: float = Field(
        1.0,
        ge=0,
        le=1,
        description="A link after which the validation balanced accuracy, mean over the sites before it, is lower by more "
        "than this is refused, and the chain goes on from its predecessor. 1: no link is refused",
    )
    max_drift: float = Field(
        10.0,
        gt=0,
        le=1e6,
        description="A link whose weights are further from those it started with than this, in lengths of the latter, is "
        "refused: an honest one moves by less than one",
    )
    on_failure: OnFailure = Field(
        "skip",
        description="What follows when a link has failed for good. skip: go on with the next site; revisit: that too, and try "
        "again at the end of the lap; stop: stop the run, which can be resumed",
    )
    on_failure_at: str = Field(
        "", description="The same for single sites, where it differs: 'site-a=stop, site-b=revisit'"
    )
    retries: int = Field(1, ge=0, le=100, description="Further attempts after a link has failed")
    compare_alone: bool = Field(
        True, description="Also train each site alone, with the same budget, to compare the chain with"
    )

    def on_failure_of(self, site: str) -> OnFailure:
        """Return what follows when a link at `site` has failed for good.

        Raises
        ------
        ConfigError
            ``on-failure-at`` is not a list of SITE=WHAT.
        """
        return self.failures_at().get(site, self.on_failure)

    def failures_at(self) -> dict[str, OnFailure]:
        """Return ``on-failure-at`` by site.

        Raises
        ------
        ConfigError
            It is not a list of SITE=WHAT.
        """
        found: dict[str, OnFailure] = {}
        for part in _ids(self.on_failure_at):
            site, _, what = (word.strip() for word in part.rpartition("="))
            if not site or set(site) & set("= ") or what not in get_args(OnFailure):
                raise ConfigError(
                    f"chain.on-failure-at = {self.on_failure_at!r}: found {part!r}, expected SITE=skip, SITE=revisit or "
                    "SITE=stop"
                )
            found[site] = cast(OnFailure, what)
        return found


class PrivilegedConfig(Table):
    """Teachers that read reports or tables at the site."""

    mode: Literal["off", "text", "table", "all"] = Field(
        "off",
        description="Which privileged data the sites' teachers read: text (reports), table, all that a site has, or off. "
        "A site without takes part without",
    )
    target: Literal["links", "students", "both"] = Field(
        "both", description="Which trainings the privileged teachers guide: the chain's links, the students, or both"
    )
    logit_weight: float = Field(
        0.5, ge=0, le=100, description="Weight of the distillation from the privileged teacher's logits"
    )
    embedding_weight: float = Field(
        0.5, ge=0, le=100, description="Weight of the cosine distance to the privileged teacher's embedding"
    )
    temperature: float = Field(2.0, ge=1, le=100, description="Temperature of the distillation of logits")
    epochs: int = Field(60, ge=1, le=10_000, description="Epochs of a privileged teacher at the site")
    text_features: int = Field(1_024, ge=16, le=65_536, description="Length of the hashed vector of a report")
    hidden: int = Field(64, ge=4, le=1_024, description="Units of a privileged teacher's hidden layer")
    blank_label_words: bool = Field(
        False, description="Blank the class names, and the words that a site lists, in reports before they are read"
    )

    def recipe_for(self, target: Literal["links", "students"]) -> PrivilegedRecipe | None:
        """Return how privileged teachers guide trainings of this kind; None where they don't."""
        if self.mode == "off" or self.target not in (target, "both"):
            return None
        return PrivilegedRecipe(
            use=self.mode,
            logit_weight=self.logit_weight,
            embedding_weight=self.embedding_weight,
            temperature=self.temperature,
            epochs=self.epochs,
            text_features=self.text_features,
            hidden=self.hidden,
            blank_label_words=self.blank_label_words,
        )


class StudentConfig(Table):
    """The compact students."""

    model: str = Field(
        "",
        description="timm model of the chain's family for the student. Empty: the backbone narrowed by width and depth",
    )
    width: float = Field(0.5, gt=0, le=1, description="Width of the student as a fraction of the backbone's")
    depth: float = Field(0.67, gt=0, le=1, description="Depth of the student's stages as a fraction of the backbone's")
    image_size: int = Field(
        0, ge=0, le=1_024, description="Side of the images that the student sees, in pixels. 0: as the data"
    )
    patch_size: int = Field(0, ge=0, le=64, description="Patch size of a ViT student, in pixels. 0: the backbone's")
    start: StudentStart = Field(
        "dual",
        description="dual: student and auxiliary teacher are complementary selections of the chain's weights; "
        "single: both the same selection; random: neither (a control)",
    )
    selection: ChannelSelection = Field(
        "strided",
        description="Channels of the student and of the auxiliary teacher. strided: evenly spread, even and odd; "
        "consecutive: the first, and those after them; random: drawn by the seed, the same wherever an axis occurs; "
        "random-inconsistent: drawn for each tensor anew (a control)",
    )
    heads: HeadSelection = Field(
        "whole",
        description="Attention of a ViT. whole: whole heads, the same channels in each; "
        "mixed: channels of all heads laid end to end, as in the paper, which mixes neighbouring heads",
    )
    layers: LayerSelection = Field(
        "first",
        description="first: the first layers (of each stage); spread: evenly over the depth, first and last included",
    )
    rounds: int = Field(3, ge=0, le=10_000, description="Rounds of self-distillation. 0: no students")
    epochs: int = Field(4, ge=1, le=10_000, description="Epochs at each site in a round")
    finetune_rounds: int = Field(
        1, ge=0, le=10_000, description="Rounds of fine-tuning without a teacher after the self-distillation"
    )
    finetune_factor: float = Field(0.1, gt=0, le=1, description="Factor on the learning rate in fine-tuning")
    batch_size: int = Field(32, ge=1, le=4_096, description="Images per step; a site with fewer takes all it has")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="Peak of the one-cycle learning rate (AdamW)")
    weight_decay: float = Field(0.05, ge=0, le=1, description="Decoupled weight decay; not on norms and biases")
    distillation_weight: float = Field(
        1.0, ge=0, le=100, description="Weight of the distillation from the auxiliary teacher"
    )
    large_weight: float = Field(
        0.0, ge=0, le=100, description="Weight of the distillation from the chain's large model(s) into the student"
    )
    temperature: float = Field(2.0, ge=1, le=100, description="Temperature of these distillations")
    auxiliary: AuxiliaryTeacher = Field(
        "ema",
        description="ema: the auxiliary teacher follows the student as a moving average; frozen: stays as it was selected",
    )
    ema_schedule: EmaSchedule = Field(
        "cosine",
        description="Decay of the moving average. cosine: from student.ema-decay to 1; constant: student.ema-decay",
    )
    ema_decay: float = Field(
        0.996, ge=0, lt=1, description="Decay of the auxiliary teacher's moving average (at the start, if it rises)"
    )
    quorum: int = Field(
        1, ge=1, le=512, description="Sites that a round needs; with fewer the run stops, and can be resumed"
    )
    frozen_epochs: int = Field(
        1, ge=0, le=10_000, description="First epochs in which the auxiliary teacher stays as it was selected"
    )


class PrivacyConfig(Table):
    """Differential privacy. Every site enforces its own policy; what is asked here can't go beyond it."""

    mode: Literal["off", "by-policy", "dp-sgd"] = Field(
        "off",
        description="off: no site trains privately, and one whose policy requires it refuses; by-policy: sites with a "
        "privacy policy train privately (DP-SGD), the others without; dp-sgd: all do, and one without a policy refuses",
    )
    epsilon: float = Field(
        8.0,
        gt=0,
        le=1_000,
        description="Epsilon that each private site may spend in this run, all its trainings together",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="Delta of it; below 1 over the patients of every private site")
    clip: float = Field(1.0, gt=0, le=1_000, description="Length to which the gradient of each example is clipped")
    unit: PrivacyUnit = Field(
        "patient",
        description="Who is protected: a patient with all images, or one image. A site with another unit refuses",
    )
    batch_size: int = Field(
        0,
        ge=0,
        le=65_536,
        description="Patients (or images) expected in a step of a private training, instead of chain.batch-size and "
        "student.batch-size. 0: those",
    )
    simulated_sites: str = Field(
        "", description="Simulations only: the sites that have a privacy policy, comma-separated. Empty: all"
    )
    simulated_budget: str = Field(
        "",
        description="Simulations only: the lifetime budgets in the policies, one number for all, or by site "
        "('site-1=8, site-3=0.5'). Empty: privacy.epsilon, with noised scores twice that",
    )
    simulated_metrics: MetricsRelease = Field(
        "exact",
        description="Simulations only: what of scores and counts the policies let out: withhold, noised or exact",
    )
    simulated_metrics_epsilon: float = Field(
        0.5, gt=0, le=1_000, description="Simulations only: what one release of noised scores costs"
    )

    @property
    def simulated_site_ids(self) -> tuple[str, ...]:
        """The ids in ``simulated-sites``."""
        return _ids(self.simulated_sites)

    def simulated_budgets(self) -> dict[str, float]:
        """Return the lifetime budgets of ``simulated-budget`` by site; "" is that of all others.

        Raises
        ------
        ConfigError
            It is neither a number nor a list of SITE=NUMBER.
        """
        budgets = {"": self.epsilon * (2 if self.simulated_metrics == "noised" else 1)}
        for part in _ids(self.simulated_budget):
            site, _, number = part.rpartition("=")
            try:
                budgets[site.strip()] = float(number)
            except ValueError:
                budgets[site.strip()] = 0.0
            if not 0 < budgets[site.strip()] < float("inf"):
                raise ConfigError(
                    f"privacy.simulated-budget = {self.simulated_budget!r}: found {part!r}, expected an epsilon above 0, or "
                    "SITE=EPSILON for some sites"
                )
        return budgets

    def simulated_policy(self, site: str) -> PrivacyPolicy | None:
        """Return the policy of a simulated site; None where it has none."""
        if self.mode == "off" or (self.simulated_site_ids and site not in self.simulated_site_ids):
            return None
        budgets = self.simulated_budgets()
        noised = self.simulated_metrics == "noised"
        return PrivacyPolicy(
            epsilon=budgets.get(site, budgets[""]),
            delta=self.delta,
            unit=self.unit,
            metrics=self.simulated_metrics,
            metrics_epsilon=self.simulated_metrics_epsilon if noised else None,
            privileged_teachers=True,
        )


class OutputConfig(Table):
    """Where the run folder goes."""

    dir: str = Field(
        "~/.chainward/runs", description="Folder of the run folders: absolute, or under the home folder with ~"
    )
    resume: str = Field("", description="Id (or absolute path) of a stopped run to continue. Empty: a new run")


class RunConfig(Table):
    """The whole configuration of a run."""

    seed: int = Field(0, ge=0, lt=2**63, description="Every random choice derives from it, but for privacy noise")
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
                problems.append(f"{key} = {detail['input']!r}: {_lower_first(detail['msg'])}{allowed}")
        if not problems:
            problems = list(_contradictions(config))
        if problems:
            count = f"{len(problems)} problems in the run configuration: " if len(problems) > 1 else ""
            raise ConfigError(count + " | ".join(problems))
        return config

    def to_flat(self) -> dict[str, ConfigScalar]:
        """Return ``{"chain.laps": 1, ...}`` with every key, as Flower's run config has it."""
        flat: dict[str, ConfigScalar] = {}
        for name, value in self.model_dump(by_alias=True).items():
            if isinstance(value, dict):
                flat.update({f"{name}.{key}": item for key, item in value.items()})
            else:
                flat[name] = value
        return flat

    def tables(self) -> dict[str, Any]:
        """Return nested tables with kebab-case keys, as written to ``config.toml``."""
        return self.model_dump(by_alias=True)

    @property
    def expected_sites(self) -> tuple[str, ...]:
        """The ids in ``federation.sites``, in order."""
        return _ids(self.federation.sites)

    def link_recipe(self, *, laps: int = 1) -> LinkRecipe:
        """Return how one link is trained; `laps` > 1 gives the budget of several laps (for a site alone)."""
        chain = self.chain
        return LinkRecipe(
            seed=self.seed,
            epochs=chain.epochs * laps,
            batch_size=chain.batch_size,
            learning_rate=chain.learning_rate,
            weight_decay=chain.weight_decay,
            augmentation=self.data.augmentation,
            precision=self.federation.precision,
            threads=self.federation.threads,
            transfer=self.federation.transfer,
            class_balance=chain.class_balance,
            prior_strength=chain.prior_strength,
            label_fraction=chain.label_fraction,
            start=chain.start,
            laps=1 if laps > 1 else chain.laps,
            cycle=chain.cycle,
            distillation_weight=chain.distillation_weight,
            temperature=chain.temperature,
            temperature_decay=chain.temperature_decay,
            attention_weight=chain.attention_weight,
            unlabelled_weight=chain.unlabelled_weight,
            teacher_trust=chain.teacher_trust,
            privileged=self.privileged.recipe_for("links"),
            privacy=self.privacy_recipe(),
        )

    def privacy_recipe(self) -> PrivacyRecipe | None:
        """Return how private sites train: with one noise for all trainings that the run asks of each; None where none do."""
        privacy, chain, student = self.privacy, self.chain, self.student
        if privacy.mode == "off":
            return None
        trainings = [
            PlannedTraining(
                epochs=chain.epochs,
                batch_size=privacy.batch_size or chain.batch_size,
                times=chain.laps * chain.strands,
            )
        ]
        if student.rounds:
            trainings.append(
                PlannedTraining(
                    epochs=student.epochs,
                    batch_size=privacy.batch_size or student.batch_size,
                    times=student.rounds + student.finetune_rounds,
                )
            )
        if self.privileged.mode != "off":
            trainings.append(
                PlannedTraining(
                    epochs=self.privileged.epochs,
                    batch_size=PRIVILEGED_BATCH,
                    times=2 if self.privileged.mode == "all" else 1,
                )
            )
        return PrivacyRecipe(
            sites="all" if privacy.mode == "dp-sgd" else "by-policy",
            unit=privacy.unit,
            delta=privacy.delta,
            epsilon=privacy.epsilon,
            clip=privacy.clip,
            batch_size=privacy.batch_size,
            share=1.0 if chain.unlabelled_weight > 0 else chain.label_fraction,
            run=tuple(trainings),
        )

    def student_recipe(self, stage: Literal["distil", "finetune"]) -> StudentRecipe:
        """Return how a student is trained at a site in one round of `stage`."""
        student = self.student
        finetune = stage == "finetune"
        return StudentRecipe(
            seed=self.seed,
            epochs=student.epochs,
            batch_size=student.batch_size,
            learning_rate=student.learning_rate * (student.finetune_factor if finetune else 1.0),
            weight_decay=student.weight_decay,
            augmentation=self.data.augmentation,
            precision=self.federation.precision,
            threads=self.federation.threads,
            transfer=self.federation.transfer,
            class_balance=self.chain.class_balance,
            prior_strength=self.chain.prior_strength,
            label_fraction=self.chain.label_fraction,
            privileged=None if finetune else self.privileged.recipe_for("students"),
            privacy=self.privacy_recipe(),
            stage=stage,
            distillation_weight=0.0 if finetune else student.distillation_weight,
            large_weight=0.0 if finetune else student.large_weight,
            temperature=student.temperature,
            auxiliary=student.auxiliary,
            ema_schedule=student.ema_schedule,
            ema_decay=student.ema_decay,
            frozen_epochs=student.frozen_epochs,
            rounds=student.rounds,
        )


def _contradictions(config: RunConfig) -> Iterator[str]:
    """Yield one line for each pair of keys that can't both hold."""
    sites, num_sites = config.expected_sites, config.federation.num_sites
    if len(set(sites)) != len(sites):
        yield f"federation.sites = {config.federation.sites!r} names a site twice; name each once"
    if sites and num_sites and len(sites) != num_sites:
        yield (
            f"federation.num-sites = {num_sites} contradicts federation.sites, which names {len(sites)}; drop one of the two"
        )
    count = num_sites or len(sites)
    if count and config.chain.strands > count:
        yield (
            f"chain.strands = {config.chain.strands} contradicts the number of sites, {count}: "
            "no site holds two strands at once; allowed: at most the number of sites"
        )
    if config.data.source == "phantom":
        if config.data.label_skew > 0:
            yield (
                f"data.label-skew = {config.data.label_skew} contradicts data.source = 'phantom': "
                "phantom sites have a class mix of their own; set data.label-skew=0 or name a data file"
            )
    elif not Path(config.data.source).is_absolute():
        yield (
            f"data.source = {config.data.source!r} is not an absolute path (Flower runs apps in a folder of its own); "
            "give the absolute path of a data file, or 'phantom'"
        )
    yield from _chain_contradictions(config)
    if config.chain.start == "fresh" and config.chain.distillation_weight == config.chain.attention_weight == 0:
        yield (
            "chain.start = 'fresh' contradicts chain.distillation-weight = 0.0: nothing would pass from link to link; "
            "set chain.start='warm' or a distillation weight above 0"
        )
    student = config.student
    default = StudentConfig()
    if student.model and (student.width, student.depth) != (default.width, default.depth):
        yield (
            f"student.model = {student.model!r} contradicts student.width = {student.width} and student.depth = "
            f"{student.depth}: a named model has a size of its own; set either"
        )
    if student.rounds == 0 and student.finetune_rounds > default.finetune_rounds:
        yield (
            f"student.finetune-rounds = {student.finetune_rounds} contradicts student.rounds = 0, which trains no student"
        )
    yield from _contradictions_of_students(student)
    yield from _privacy_contradictions(config)
    output = Path(config.output.dir)
    if not output.is_absolute() and not config.output.dir.startswith("~"):
        yield (
            f"output.dir = {config.output.dir!r} is relative, and Flower runs apps in a folder of its own; "
            "give an absolute path, or one that starts with ~"
        )


def _chain_contradictions(config: RunConfig) -> Iterator[str]:
    chain, privileged = config.chain, config.privileged
    sites, count = config.expected_sites, config.federation.num_sites or len(config.expected_sites)
    try:
        stray = [site for site in chain.failures_at() if site not in sites]
        if sites and stray:
            yield f"chain.on-failure-at names '{stray[0]}'{nearest(stray[0], sites)}, which federation.sites does not"
    except ConfigError as error:
        yield str(error)
    if count and config.student.rounds and config.student.quorum > count:
        yield f"student.quorum = {config.student.quorum} contradicts the number of sites, {count}; allowed: at most that"
    if chain.unlabelled_weight > 0 and chain.label_fraction == 1:
        yield (
            f"chain.unlabelled-weight = {chain.unlabelled_weight} contradicts chain.label-fraction = 1.0, which leaves no "
            "image without a label; lower the fraction or set chain.unlabelled-weight=0"
        )
    if chain.merge != "best" and chain.strands == 1:
        yield f"chain.merge = '{chain.merge}' contradicts chain.strands = 1: there is nothing to merge; set chain.strands"
    if chain.merge == "ensemble" and (config.student.rounds == 0 or config.student.large_weight == 0):
        yield (
            "chain.merge = 'ensemble' needs students that learn from the strands; "
            "set student.rounds and student.large-weight above 0"
        )
    if chain.merge == "ensemble" and chain.strands > MAX_ENSEMBLE:
        yield f"chain.merge = 'ensemble' takes at most {MAX_ENSEMBLE} strands, found chain.strands = {chain.strands}"
    if chain.order == "weakest-next" and chain.strands > 1:
        yield (
            f"chain.order = 'weakest-next' contradicts chain.strands = {chain.strands}: two strands could want the same "
            "site; set chain.strands=1 or another order"
        )
    if privileged.mode != "off" and privileged.logit_weight == 0 and privileged.embedding_weight == 0:
        yield (
            f"privileged.mode = '{privileged.mode}' contradicts privileged.logit-weight = 0 and "
            "privileged.embedding-weight = 0: nothing would be learnt from the teachers; set one of them, or mode off"
        )


def _privacy_contradictions(config: RunConfig) -> Iterator[str]:
    privacy, default = config.privacy, PrivacyConfig()
    if privacy.mode == "off":
        given = [name for name in PrivacyConfig.model_fields if getattr(privacy, name) != getattr(default, name)]
        for name in given:
            yield (
                f"privacy.{_kebab(name)} = {getattr(privacy, name)!r} contradicts privacy.mode = 'off', under which nothing is "
                "private; set privacy.mode to 'dp-sgd' or 'by-policy'"
            )
        return
    if config.federation.precision == "bf16":
        yield "federation.precision = 'bf16' is not verified for private training; set it to 'auto' or 'fp32'"
    try:
        budgets = privacy.simulated_budgets()
    except ConfigError as error:
        yield str(error)
        return
    private = privacy.simulated_site_ids
    if private and (stray := [site for site in budgets if site and site not in private]):
        yield (
            f"privacy.simulated-budget names '{stray[0]}', which privacy.simulated-sites doesn't; a site without a policy "
            "has no budget"
        )


def _contradictions_of_students(student: StudentConfig) -> Iterator[str]:
    default = StudentConfig()
    for key in ("selection", "heads", "layers"):
        if student.start == "random" and getattr(student, key) != getattr(default, key):
            yield (
                f"student.{key} = {getattr(student, key)!r} contradicts student.start = 'random', which selects nothing; "
                "drop one of the two"
            )
    if student.auxiliary == "frozen":
        for key in ("ema_schedule", "ema_decay", "frozen_epochs"):
            if getattr(student, key) != getattr(default, key):
                yield (
                    f"student.{_kebab(key)} = {getattr(student, key)!r} contradicts student.auxiliary = 'frozen', which "
                    "never moves; drop one of the two"
                )


class Option(BaseModel):
    """One key of the configuration, for documentation and for error messages."""

    key: str
    kind: str
    allowed: str
    default: ConfigScalar
    description: str


def options() -> list[Option]:
    """Return every key of the configuration, in the order of the tables."""
    found: list[Option] = []
    for name, field in RunConfig.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Table):
            found += [_option(f"{name}.{_kebab(key)}", inner) for key, inner in annotation.model_fields.items()]
        else:
            found.append(_option(_kebab(name), field))
    return found


def table_descriptions() -> dict[str, str]:
    """Return the one-line description of each table."""
    return {
        name: (field.annotation.__doc__ or "").strip()
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Table)
    }


_KINDS = {bool: "true or false", int: "integer", float: "number", str: "text"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _option(key: str, field: FieldInfo) -> Option:
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        kind, allowed = "choice", ", ".join(str(value) for value in get_args(annotation))
    else:
        assert get_origin(annotation) not in (Union, types.UnionType), f"{key}: a key has one type"
        kind = _KINDS[annotation] if annotation in _KINDS else str(annotation)
        bounds = [
            f"{words} {_plain(getattr(constraint, name))}"
            for constraint in field.metadata
            for name, words in _BOUNDS.items()
            if getattr(constraint, name, None) is not None
        ]
        allowed = f"{kind} {', '.join(bounds)}".strip()
    return Option(key=key, kind=kind, allowed=allowed, default=field.default, description=field.description or "")


def _plain(value: float) -> str:
    if value == 2**63:
        return "2^63"
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:g}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
