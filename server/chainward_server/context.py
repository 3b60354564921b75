"""What the stages of the method share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from chainward_server.checkpoints import Checkpoints
from chainward_server.privacy import RunPrivacy
from chainward_server.results import (
    DataSummary,
    LinkMetrics,
    LinkRecord,
    Results,
    SiteLocalisation,
    SiteScores,
    SiteSummary,
)
from chainward_server.schedule import site_order
from chainward_server.scoring import Counted, Scorer, Split
from chainward_server.sites import Sites
from chainward_server.standing import Standing, expected_end
from chainward_shared import __version__
from chainward_shared.config import RunConfig
from chainward_shared.data_notes import notes_on_all
from chainward_shared.familiarity import Familiarity
from chainward_shared.model_record import ModelRecord
from chainward_shared.models import Architecture, skeleton
from chainward_shared.models.start import initial_model
from chainward_shared.pixels import preprocessing_metadata
from chainward_shared.progress import end_in_words
from chainward_shared.protocol import SiteCard
from chainward_shared.task import Task
from chainward_shared.weights import StateDict, digest


@dataclass
class Run:
    """A run in progress: who takes part, what was asked for, where it is written down.

    Attributes
    ----------
    architecture : of the large model that travels along the chain
    privacy : what the sites have signed
    base : the pretrained weights that this starts from; None where it starts at random
    score_all : score every model that is trained at all sites, for the results; False: only where a score decides how the
        chain goes on
    template : names, shapes and dtypes of the large model, without values
    """

    sites: Sites
    config: RunConfig
    architecture: Architecture
    checkpoints: Checkpoints
    results: Results
    privacy: RunPrivacy
    base: StateDict | None = None
    score_all: bool = True
    template: StateDict = field(init=False)
    _validation: dict[str, SiteScores] = field(init=False, default_factory=dict)
    _last: tuple[str, dict[Split, Counted]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.template = skeleton(self.architecture).state_dict()

    def initial(self) -> StateDict:
        """Return the large model as it is before the first link."""
        return dict(initial_model(self.architecture, self.config.seed, self.base).state_dict())

    @property
    def order(self) -> list[str]:
        """The sites in the order of a lap."""
        return site_order(self.sites.ids, self.sites.sizes, self.config.chain, self.config.seed)

    @property
    def secure(self) -> bool:
        """Whether what is a sum is added up in secret: because the run says so, or a site gives it in no other way."""
        mode = self.config.federation.secure_sums
        return mode == "on" or (
            mode == "required-by-site" and any(card.secure_sums for card in self.sites.cards.values())
        )

    def save_model(
        self, name: str, state: StateDict, architecture: Architecture, record: ModelRecord | Familiarity | None = None
    ) -> None:
        """Keep a model; it counts once its piece of work is committed. `record`: what its file says of it."""
        data = self.results.data
        self.checkpoints.save_model(
            name, state, architecture, model_metadata(architecture, data.classes, data.task, record)
        )

    def score(self, architecture: Architecture, state: StateDict, splits: list[Split]) -> dict[Split, SiteScores]:
        """Return the scores of a model at all sites; see `Scorer.everywhere`."""
        return {split: found.site_scores for split, found in self._count(architecture, state, splits).items()}

    def counted(self, architecture: Architecture, state: StateDict) -> dict[Split, Counted]:
        """Return the predictions of a model on all sites' validation and test images, counted.

        Those of the model that was scored last are at hand. Of another the sites are asked anew that let out exact scores; not
        those that add noise, whom another answer might cost some of their budget.
        """
        if self._last is not None and self._last[0] == digest(state):
            return self._last[1]
        cards = self.sites.cards.values()
        exact = [card.site for card in cards if card.privacy is None or card.privacy.terms.metrics == "exact"]
        return self._count(architecture, state, ["val", "test"], exact)

    def _count(
        self, architecture: Architecture, state: StateDict, splits: list[Split], asked: list[str] | None = None
    ) -> dict[Split, Counted]:
        scorer = self._scorer
        found = (scorer.in_secret if self.secure else scorer.everywhere)(architecture, state, splits, asked)
        if {*splits} == {"val", "test"} and asked is None:
            self._last = digest(state), found
        return found

    def localise(self, architecture: Architecture, state: StateDict) -> SiteLocalisation | None:
        """Return where a model looks, at all sites; see `Scorer.localised`. Nothing where sums are secure: this isn't one."""
        return None if self.secure else self._scorer.localised(architecture, state)

    @property
    def _scorer(self) -> Scorer:
        threads, retries = self.config.federation.cpu_threads, self.config.chain.retries
        return Scorer(self.sites, self.privacy, self.checkpoints.run_id, threads, retries)

    def link(self, key: str | None) -> LinkRecord | None:
        """Return the record of the hop called `key`; None where there is none yet."""
        return next((link for link in reversed(self.results.links) if link.key == key), None)

    def metrics(self, key: str | None) -> LinkMetrics | None:
        """Return the scores of the large model that a hop or a statistics round left; None where it was not scored."""
        heads = {head.key: head for head in self.results.heads}
        record = heads.get(key) if key in heads else self.link(key)
        return None if record is None else record.metrics

    def validation(self, key: str) -> SiteScores:
        """Return the validation scores of the large model that the piece of work `key` left, made now if not before."""
        if (metrics := self.metrics(key)) is not None:
            return SiteScores(sites=metrics.validation_sites, pooled=metrics.validation)
        if key not in self._validation:
            model = self.checkpoints.load_model(key, self.template)
            self._validation[key] = self.score(self.architecture, model, ["val"])["val"]
        return self._validation[key]

    def expected_end(self, phase: str) -> str:
        """Return when the run is expected to end, now that it is in `phase`, in words."""
        now = datetime.now(UTC)
        standing = Standing(
            config=self.config,
            phase=phase,
            results=self.results,
            private=frozenset(filter(self.privacy.is_private, self.sites.ids)),
            one_machine=self.sites.simulated,
            started=now - timedelta(seconds=self.checkpoints.age),
            updated=now,
            time=now,
        )
        end = expected_end(standing)
        return end_in_words(None if end is None else (end - now).total_seconds())


def model_metadata(
    architecture: Architecture, classes: list[str], task: Task, record: ModelRecord | Familiarity | None = None
) -> dict[str, str]:
    """Return what a model's file says of it beside its weights."""
    return {
        **architecture.to_metadata(),
        **preprocessing_metadata(architecture.pixels),
        "chainward.classes": json.dumps(classes),
        "chainward.task": task,
        "chainward.version": __version__,
        **({} if record is None else record.to_metadata()),
    }


def data_summary(cards: Sequence[SiteCard], source: str, notes: Sequence[str] | None = None) -> DataSummary:
    """Return what a run is trained and scored on, as the sites have said it.

    Parameters
    ----------
    notes : what makes scores on the data too good; default: what the cards say of that
    """
    first = cards[0]
    return DataSummary(
        source=source,
        synthetic=any(card.synthetic for card in cards),
        task=first.task,
        classes=first.classes,
        image_size=first.image_size,
        channels=first.channels,
        sites=[SiteSummary.model_validate(card, from_attributes=True) for card in cards],
        notes=list(notes_on_all({card.site: card.notes for card in cards}) if notes is None else notes),
    )
