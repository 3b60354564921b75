"""The tables of the run configuration: what a run decides beside the settings of trainings, which they inherit."""

from __future__ import annotations

from typing import Annotated, Literal, cast, get_args

from pydantic import ConfigDict, Field

from chainward_shared.bounds import Epsilon, LabelSkew, Part, PositiveFraction, SiteCount
from chainward_shared.errors import ConfigError
from chainward_shared.privacy.policy import MetricsRelease, PrivacyPolicy
from chainward_shared.recipes import PrivilegedRecipe
from chainward_shared.settings import (
    AugmentationSettings,
    ChannelSelection,
    HeadSelection,
    LayerSelection,
    LinkSettings,
    PrivacySettings,
    PrivilegedSettings,
    RunArithmetic,
    SecureSumsSettings,
    Settings,
    StudentSettings,
    values_of,
)

ChainHead = Literal["trained", "statistics"]
Refit = Literal["no", "end", "links"]
OnFailure = Literal["skip", "revisit", "stop"]
SiteOrder = Literal["given", "reversed", "shuffled", "largest-first", "smallest-first", "weakest-next"]
StrandMerge = Literal["best", "average", "ensemble"]
StudentSource = Literal["chain", "start"]
StudentStart = Literal["dual", "single", "random"]
Aggregation = Literal["mean", "median", "trimmed-mean"]


def kebab(name: str) -> str:
    return name.replace("_", "-")


def ids_in(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


class Table(Settings):
    """Base of the tables: kebab-case keys, unknown ones refused, immutable."""

    model_config = ConfigDict(alias_generator=kebab, populate_by_name=True)


class FederationConfig(Table, SecureSumsSettings, RunArithmetic):
    """Who takes part, and how long the coordinator waits."""

    sites: str = Field(
        "", description="Ids of the sites that take part, comma-separated, in chain order. Empty: all that there are"
    )
    num_sites: SiteCount = Field(
        0, description="Number of sites. 0: six phantoms, or as many as the data file's site column has"
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
    approval_patience: float = Field(
        3_600.0,
        ge=0,
        le=2_592_000,
        description="Seconds from the start of a run for which work at a hospital waits until a person there has approved the "
        "run, where that is asked for; later chain.on-failure decides, and the hospital takes part as soon as it has approved",
    )
    contact: str = Field(
        "",
        max_length=500,
        description="Who runs this, and how to be reached: shown, unchecked, to the people who approve the run at hospitals",
    )
    check_every: float = Field(
        120.0,
        ge=0,
        le=604_800,
        description="Seconds between two questions to a silent site whether it is still at work; where it is not, twice in a "
        "row, it is asked for the work again. 0: never. Each costs the site a few seconds of a processor",
    )
    min_complete: float = Field(
        0.75,
        ge=0,
        le=1,
        description="Share of the hops, of the sites, of the hospitals alone, of the sites in a student round and of the scored "
        "sites that must succeed; a run with less ends as incomplete, not as finished",
    )


class DataConfig(Table, AugmentationSettings):
    """What a simulation trains on. A deployed hospital knows its data from its own site.yaml."""

    source: str = Field("phantom", description="`phantom`, or the absolute path of a data file (YAML)")
    label_skew: LabelSkew = Field(
        0.0,
        description="Dirichlet alpha by which cases are dealt to simulated sites; 0: by the data file's site column",
    )


class ChainConfig(Table, LinkSettings):
    """The chain of links."""

    laps: Annotated[int, Field(ge=0, le=100)] = Field(
        1,
        description="Passes over all sites. 0: no link is trained; the chain's model is the start with a head from statistics",
    )

    backbone: str = Field("convnext_atto", description="timm model that travels along the chain")
    patch_size: int = Field(0, ge=0, le=64, description="Patch size of a ViT, in pixels. 0: the backbone's own")
    start_from: str = Field(
        "",
        max_length=4_096,
        description="Pretrained weights that the chain starts from: a name or digest in the coordinator's weights store "
        "(`chainward weights list`), or the path of a file there. Empty: random weights",
    )
    trainable: Part = Field(
        "all",
        description="Which part of a backbone with pretrained weights is trained, and travels. all; last-N: the last N blocks "
        "or stages; norms-and-biases; head. The classifier always is",
    )
    strands: int = Field(1, ge=1, le=512, description="Chains that run at the same time, each starting at another site")
    merge: StrandMerge = Field(
        "best",
        description="What comes of several strands. best: the one with the highest validation score; average: the mean of "
        "their weights; ensemble: the best one, and the students learn from all of them (student.large-weight)",
    )
    head: ChainHead = Field(
        "trained",
        description="Where the classifier comes from. trained: from the links; statistics: in closed form from the sums of all "
        "sites over the model's embeddings, for the model that the first link starts from, and again at the end",
    )
    refit: Refit = Field(
        "end",
        description="When chain.head = 'statistics' computes the classifier anew. no: only that of the start; end: of the chain; "
        "links: after every link, whose successor then starts from it",
    )
    order: SiteOrder = Field(
        "given",
        description="Order of the sites in a lap; shuffled: by the seed; largest-first, smallest-first: by training cases; "
        "weakest-next: the site where the predecessor's validation score is lowest (one strand only)",
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
        for part in ids_in(self.on_failure_at):
            site, _, what = (word.strip() for word in part.rpartition("="))
            if not site or set(site) & set("= ") or what not in get_args(OnFailure):
                raise ConfigError(
                    f"chain.on-failure-at = {self.on_failure_at!r}: found {part!r}, expected SITE=skip, SITE=revisit or "
                    "SITE=stop"
                )
            found[site] = cast(OnFailure, what)
        return found


class PrivilegedConfig(Table, PrivilegedSettings):
    """Teachers that read reports or tables at the site."""

    mode: Literal["off", "text", "table", "all"] = Field(
        "off",
        description="Which privileged data the sites' teachers read: text (reports), table, all that a site has, or off. "
        "A site without takes part without",
    )
    target: Literal["links", "students", "both"] = Field(
        "both", description="Which trainings the privileged teachers guide: the chain's links, the students, or both"
    )

    def recipe_for(self, target: Literal["links", "students"]) -> PrivilegedRecipe | None:
        """Return how privileged teachers guide trainings of this kind; None where they don't."""
        if self.mode == "off" or self.target not in (target, "both"):
            return None
        return PrivilegedRecipe(use=self.mode, **values_of(self, PrivilegedSettings))


class StudentConfig(Table, StudentSettings):
    """The compact students."""

    model: str = Field(
        "",
        description="timm model of the chain's family for the student. Empty: the backbone narrowed by width and depth",
    )
    source: StudentSource = Field(
        "chain",
        description="Whose weights the student is selected out of: the chain's model, or the pretrained start itself",
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
    head: ChainHead = Field(
        "trained",
        description="Where the student's classifier comes from. trained: from its rounds; statistics: at the end in closed form "
        "from the sums of all sites over the student's own embeddings",
    )
    finetune_rounds: int = Field(
        1, ge=0, le=10_000, description="Rounds of fine-tuning without a teacher after the self-distillation"
    )
    finetune_factor: float = Field(0.1, ge=1e-3, le=1, description="Factor on the learning rate in fine-tuning")
    quorum: int = Field(
        1, ge=1, le=512, description="Sites that a round needs; with fewer the run stops, and can be resumed"
    )
    aggregation: Aggregation = Field(
        "mean",
        description="Of the sites' students. mean: weighted by the training cases that the sites declare; median, trimmed-mean "
        "(without the highest and lowest fifth, one at least): of each weight, all sites alike. The last two hold against sites "
        "that lie, and cost accuracy where sites differ much",
    )
    max_share: PositiveFraction = Field(
        0.5, description="Largest share that one site has of the mean, whatever it declares. Of two sites each has half"
    )
    max_update: float = Field(
        3.0,
        ge=1,
        le=1e6,
        description="A site's update that is longer than so many times the median of all sites' is shortened to that",
    )
    max_drift: float = Field(
        10.0,
        gt=0,
        le=1e6,
        description="A student that is further from the one it started from than this, in lengths of the latter, is refused",
    )


class PrivacyConfig(Table, PrivacySettings):
    """Differential privacy. Every site enforces its own policy; what is asked here can't go beyond it."""

    mode: Literal["off", "by-policy", "dp-sgd"] = Field(
        "off",
        description="off: no site trains privately, and one whose policy requires it refuses; by-policy: sites with a "
        "privacy policy train privately (DP-SGD), the others without; dp-sgd: all do, and one without a policy refuses",
    )
    epsilon: Epsilon = Field(
        8.0,
        description="Epsilon that each private site may spend in this run: trainings, statistics and noised scores together",
    )
    split: PositiveFraction = Field(
        0.5,
        description="Of that, without noised scores, the share that statistics rounds may cost; links, students and teachers "
        "share what is left. Where nothing is trained statistics have all of it",
    )
    simulated_sites: str = Field(
        "", description="Simulations only: the sites that have a privacy policy, comma-separated. Empty: all"
    )
    simulated_budget: str = Field(
        "",
        description="Simulations only: the lifetime budgets in the policies, one number for all, or by site "
        "('site-1=8, site-3=0.5'). Empty: privacy.epsilon",
    )
    simulated_metrics: MetricsRelease = Field(
        "exact",
        description="Simulations only: what of scores and counts the policies let out: withhold, noised or exact",
    )
    simulated_metrics_epsilon: Epsilon = Field(
        0.5, description="Simulations only: what one release of noised scores costs"
    )

    @property
    def simulated_site_ids(self) -> tuple[str, ...]:
        """The ids in ``simulated-sites``."""
        return ids_in(self.simulated_sites)

    def simulated_budgets(self) -> dict[str, float]:
        """Return the lifetime budgets of ``simulated-budget`` by site; "" is that of all others.

        Raises
        ------
        ConfigError
            It is neither a number nor a list of SITE=NUMBER.
        """
        budgets = {"": self.epsilon}
        for part in ids_in(self.simulated_budget):
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
