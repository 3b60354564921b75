"""The seam between the method and the hospitals: what may be asked of them, and what comes back.

The method (`chain`, `baseline`, `students`, `scoring`) is written once, against `Sites`. Over Flower's grid it is
`flower_sites.FlowerSites`; in one process, for studies and tests, the plain runner of the simulations. A further stage of the
method is a further kind of task in `protocol`, and a further method here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from chainward_shared.errors import ChainwardError
from chainward_shared.evaluation.classification import PredictionCounts
from chainward_shared.models import Architecture
from chainward_shared.outside import Shown
from chainward_shared.protocol import (
    EvaluateResult,
    EvaluateTask,
    LinkResult,
    LinkTask,
    MaskedSum,
    SiteCard,
    StatisticsResult,
    StatisticsTask,
    StudentResult,
    StudentTask,
)
from chainward_shared.weights import StateDict


class TooFewSitesError(ChainwardError):
    """A secure sum ended before it was known. `failed`: why sites are missing."""

    def __init__(self, reason: str, failed: Mapping[str, Failure]) -> None:
        super().__init__(reason)
        self.failed = dict(failed)


Task = TypeVar("Task", LinkTask, StudentTask, EvaluateTask, StatisticsTask)
Summable = TypeVar("Summable", StudentTask, EvaluateTask, StatisticsTask)
"""What yields numbers that are added up over the sites."""
Result = TypeVar("Result", LinkResult, StudentResult, StatisticsResult)


@dataclass(frozen=True)
class Work(Generic[Task]):
    """What one site is asked for: the task, and the models that go with it by the names under which they travel."""

    task: Task
    models: Mapping[str, StateDict] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained(Generic[Result]):
    """A site's answer to a task of training or of statistics, not checked yet but for the names, shapes and finiteness of
    its tensors.

    `model`: the weights that were trained, or the sums.

    `seconds`: from asking to the answer; `bytes_down`, `bytes_up`: of the models that travelled for it.
    """

    result: Result
    model: StateDict
    seconds: float
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True)
class Scored:
    """A site's scores of a model, and the counts of each split from which scores over several sites follow."""

    result: EvaluateResult
    counts: Mapping[str, PredictionCounts] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure(Shown):
    """Why there is no usable answer, in one line. `refused`: the site itself said no; `final`: and will say so again;
    `lost`: Flower did not bring the request there, or the answer back; `waiting`: a person there has not approved the run yet;
    `malformed`: what came is not an answer. Seconds and bytes as of `Trained`."""

    reason: str
    seconds: float
    refused: bool = False
    final: bool = False
    lost: bool = False
    waiting: bool = False
    malformed: bool = False
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def unreached(self) -> bool:
        """Whether the site did not say no and did not fail, so that the work may be made up for later."""
        return self.lost or self.waiting


@dataclass(frozen=True)
class Summed:
    """What the tensors of several sites add up to (`chainward_shared.summands`), where those of a single site are never seen.

    `sites`: whose they are; `members`: who was asked; `noise`: standard deviation of the noise that is in each number of the
    sum; `failed`: why others are missing. Seconds and bytes as of `Trained`, of all sites.
    """

    state: StateDict
    sites: list[str]
    members: list[str]
    noise: float
    failed: Mapping[str, Failure]
    seconds: float
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def reasons(self) -> dict[str, str]:
        """Why sites are missing, in words."""
        return {site: failure.reason for site, failure in self.failed.items()}

    @property
    def unreached(self) -> list[str]:
        """The sites that are missing because they, or the persons who approve runs there, could not be reached."""
        return [site for site, failure in self.failed.items() if failure.unreached]

    @property
    def account(self) -> dict[str, Any]:
        """What the record of a round keeps of it: who took part, why others are missing, and the bytes."""
        return {
            "sites": self.sites,
            "failed": self.reasons,
            "unreached": self.unreached,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
        }


class Sites(ABC):
    """The hospitals that take part.

    Whoever implements it answers every site that is asked exactly once, with what the site has made of its task or with the
    reason why there is nothing; no failure of one site is an exception.

    Parameters
    ----------
    cards : what each site said of itself, in the order in which the sites were given
    """

    def __init__(self, cards: Mapping[str, SiteCard]) -> None:
        self.cards = dict(cards)

    @property
    @abstractmethod
    def simulated(self) -> bool:
        """Whether the sites are simulated, all on one machine."""

    @property
    def ids(self) -> list[str]:
        """Ids of the sites, in the order in which they were given."""
        return list(self.cards)

    @property
    def any_card(self) -> SiteCard:
        """One card, for what all sites have in common: task, classes, image size, channels."""
        return next(iter(self.cards.values()))

    @property
    def sizes(self) -> dict[str, int]:
        """Training cases (or patients) that each site has declared."""
        return {site: card.train for site, card in self.cards.items()}

    @abstractmethod
    def share(self, architecture: Architecture, base: StateDict) -> dict[str, int]:
        """See to it that every site has the pretrained weights that models of an architecture start from, and return how many
        bytes were sent to each. A site that can't take them fails when it is asked for work."""

    @abstractmethod
    def train_links(self, work: Mapping[str, Work[LinkTask]]) -> Iterator[tuple[str, Trained[LinkResult] | Failure]]:
        """Train one link at each site that `work` names, all at once, and yield the answers as they come."""

    @abstractmethod
    def train_students(
        self, work: Mapping[str, Work[StudentTask]]
    ) -> Iterator[tuple[str, Trained[StudentResult] | Failure]]:
        """Train one round of the student at each site that `work` names, and yield the answers as they come."""

    @abstractmethod
    def statistics(
        self, work: Mapping[str, Work[StatisticsTask]]
    ) -> Iterator[tuple[str, Trained[StatisticsResult] | Failure]]:
        """Have each site that `work` names sum up a model's embeddings, and yield the sums as they come."""

    @abstractmethod
    def summed(
        self,
        work: Mapping[str, Work[Summable]],
        *,
        weights: Mapping[str, float] | None = None,
        check: Callable[[str, MaskedSum], None] = lambda site, answer: None,
    ) -> Summed:
        """Return what the numbers of the sites that `work` names add up to, by a secure sum (`chainward_shared.secure_sums`).

        Parameters
        ----------
        work : the same of all sites
        weights : what those of each site are multiplied by; default 1
        check : raises `ChainwardError` where what a site says beside its numbers can't be; these are left out then

        Raises
        ------
        TooFewSitesError
            Those that took part to the end are too few for one.
        """

    @abstractmethod
    def evaluate(self, work: Mapping[str, Work[EvaluateTask]]) -> dict[str, Scored | Failure]:
        """Return what each site that `work` names says of a model on its own images, in that order."""
