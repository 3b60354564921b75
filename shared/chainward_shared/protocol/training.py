"""A link of the chain and a round of the students: what is asked of a site, and what it answers."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from chainward_shared.bounds import Sha256
from chainward_shared.hops import student_key
from chainward_shared.models import Architecture
from chainward_shared.outside import Count, Digest, Fraction, HopKey, SiteId
from chainward_shared.privacy.statements import Statement
from chainward_shared.protocol.envelope import Body
from chainward_shared.protocol.joining import RunTask
from chainward_shared.recipes import MAX_ENSEMBLE, LinkRecipe, StudentRecipe
from chainward_shared.training_log import TrainingLog


class LinkTask(RunTask):
    """Train one link. `hop` names it; `trained_alone`: no predecessor, the comparison of a hospital on its own."""

    KIND: ClassVar[str] = "link-task"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"predecessor"})

    hop: HopKey
    strand: Annotated[int, Field(ge=0, lt=512)]
    lap: Annotated[int, Field(ge=0, lt=100)]
    trained_alone: bool = False
    architecture: Architecture
    recipe: LinkRecipe
    predecessor_digest: Sha256 | None = None


class LinkResult(Body):
    """The refined model of a link. `statement`: what the site has spent, signed; None where it trained without privacy."""

    KIND: ClassVar[str] = "link-result"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"model"})

    hop: HopKey
    site: SiteId
    digest: Digest
    training: TrainingLog
    statement: Statement | None = None


class StudentTask(RunTask):
    """Train the compact student for one round. `auxiliary` is sent until the site has finished a round of its own.

    `large_digests`: of the large models that teach the student, which come as the arrays `large_0`, `large_1`, ...; all of
    `large_architecture`. None where the recipe gives them no weight.
    """

    KIND: ClassVar[str] = "student-task"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"student", "auxiliary", *map("large_{}".format, range(MAX_ENSEMBLE))})

    round: Annotated[int, Field(ge=1, le=20_000)]
    architecture: Architecture
    recipe: StudentRecipe
    student_digest: Sha256
    auxiliary_digest: Sha256 | None = None
    large_architecture: Architecture | None = None
    large_digests: list[Sha256] = Field(default_factory=list, max_length=MAX_ENSEMBLE)

    @property
    def hop(self) -> str:
        """Name of this piece of work."""
        return student_key(self.round)

    @model_validator(mode="after")
    def _large_models_are_complete(self) -> StudentTask:
        wanted, sent = self.recipe.large_weight > 0, bool(self.large_digests)
        if (wanted, wanted) != (sent, self.large_architecture is not None):
            raise ValueError(
                f"large models with weight {self.recipe.large_weight:g}, {len(self.large_digests)} digests and "
                f"{'an' if self.large_architecture else 'no'} architecture: all of them belong together"
            )
        return self


class StudentResult(Body):
    """A site's student of one round. The auxiliary teacher stays at the site; `auxiliary_kept` tells what fraction of
    its weights at the round's start the moving average has left in it (None in fine-tuning). `statement`: as of a link. Its
    weight in the average is not in it: that is what the site's card has declared."""

    KIND: ClassVar[str] = "student-result"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"student"})

    round: Count
    site: SiteId
    digest: Digest
    training: TrainingLog
    auxiliary_kept: Fraction | None
    statement: Statement | None = None
