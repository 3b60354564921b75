"""What a site tells of a model on its own images: scores, and sums over embeddings."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from chainward_shared.bounds import PositiveFraction, Seed, Sha256, Threads
from chainward_shared.evaluation.localisation import LocalisationSums
from chainward_shared.evaluation.scores import Scores
from chainward_shared.hops import scores_key
from chainward_shared.models import Architecture
from chainward_shared.outside import MAX_CLASSES, MAX_SITES, Count, Digest, Figure, HopKey, Record, SiteId
from chainward_shared.privacy.policy import MetricsRelease
from chainward_shared.privacy.statements import Statement
from chainward_shared.private_sums import SumsForm
from chainward_shared.protocol.envelope import Body
from chainward_shared.protocol.joining import RunTask
from chainward_shared.recipes import PrivacyRecipe
from chainward_shared.task import Split


class EvaluateTask(RunTask):
    """Score a model on the site's own images of `splits`; `localisation`: also its attention on the test images' regions."""

    KIND: ClassVar[str] = "evaluate-task"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"model"})

    architecture: Architecture
    splits: Annotated[list[Literal["val", "test"]], Field(max_length=2)]
    localisation: bool = False
    threads: Threads
    digest: Sha256

    @property
    def hop(self) -> str:
        """Name of this piece of work: the model, and what of it is asked."""
        return scores_key(self.splits, self.digest)


class EvaluateResult(Body):
    """Scores of each split, and the counts from which scores over several sites follow (`counts_<split>` arrays).

    `release`: as they are, with noise (then only what follows from the confusion matrix), or withheld: without any. With
    noise that was charged to the site's budget comes its `statement`.

    `localisation`: how well the model's attention finds the regions of interest, summed over the test images; None where it
    was not asked for or the site has no regions. No map, mask or image's own value is sent."""

    KIND: ClassVar[str] = "evaluate-result"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"counts_val", "counts_test"})

    site: SiteId
    scores: dict[Split, Scores] = Field(max_length=3)
    localisation: LocalisationSums | None = None
    release: MetricsRelease = "exact"
    statement: Statement | None = None


class SharedNoise(Record):
    """Noise that the sites of a secure sum add together: each adds `each`, and that of any `sites` of them is enough.

    `each`: standard deviation of the Gaussian noise in every number, as of one site (Goryczka and Xiong 2017, section 4).
    """

    sites: int = Field(ge=2, le=MAX_SITES)
    each: Annotated[float, Field(ge=1e-6, le=1e9, allow_inf_nan=False)]

    @classmethod
    def of(cls, noise: float, sites: int) -> SharedNoise:
        """Return the shares of which `sites` together have a standard deviation of `noise`."""
        return cls(sites=sites, each=noise / sites**0.5)

    def is_enough(self, noise: float) -> bool:
        """Whether the shares of `sites` sites have together a standard deviation of `noise` at least."""
        return self.each * self.sites**0.5 >= noise * (1 - 1e-9)


class StatisticsTask(RunTask):
    """Send the sums over a model's embeddings of the site's labelled training images, and of its validation images.

    `label_fraction`, `seed`: which training images have a label, as in a link. `class_weights`: how much an image of each class
    counts in the second moments of the training images; empty: each the same.

    `privacy`: the run is private: sums of that `form`, over embeddings in the frame that comes along (`frame_digest`), with noise
    at sites that train privately. See `chainward_shared.private_sums`. `shared_noise`: in a secure sum, where each adds a share
    of the noise only.
    """

    KIND: ClassVar[str] = "statistics-task"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"model", "frame"})

    hop: HopKey
    architecture: Architecture
    label_fraction: PositiveFraction
    seed: Seed
    class_weights: tuple[PositiveFraction, ...] = Field((), max_length=MAX_CLASSES)
    threads: Threads
    digest: Sha256
    privacy: PrivacyRecipe | None = None
    form: SumsForm | None = None
    frame_digest: Sha256 | None = None
    shared_noise: SharedNoise | None = None

    @model_validator(mode="after")
    def _private_sums_are_complete(self) -> StatisticsTask:
        if len({self.privacy is None, self.form is None, self.frame_digest is None}) > 1:
            raise ValueError("privacy, form and frame_digest belong together: all of them or none")
        if self.shared_noise is not None and self.privacy is None:
            raise ValueError("shared_noise goes with privacy")
        return self


class StatisticsResult(Body):
    """The sums of one site, as the tensors of `discriminant.HeadSums` for "train" and "val". `digest`: of these tensors;
    `images`, `validation`: over how many images they go.

    Of a private run: one tensor, `release`, in which each number has noise of the standard deviation `noise`; 0 at a site without
    a privacy policy. `images`, `validation` are then 0, as nobody is told. `statement`: what the site has spent, signed."""

    KIND: ClassVar[str] = "statistics-result"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"sums"})

    hop: HopKey
    site: SiteId
    digest: Digest
    images: Count
    validation: Count
    noise: Figure = Field(default=0.0, ge=0)
    statement: Statement | None = None
