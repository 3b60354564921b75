"""What the phases of a run share."""

from __future__ import annotations

from dataclasses import dataclass, field

from chainward_server.privacy import RunPrivacy
from chainward_server.progress import Progress
from chainward_server.rendezvous import Consortium
from chainward_server.results import Results, SiteLocalisation, SiteScores
from chainward_server.run_folder import RunFolder
from chainward_server.schedule import site_order
from chainward_server.scoring import Split, localise_everywhere, score_everywhere
from chainward_shared.config import RunConfig
from chainward_shared.models import Architecture, skeleton
from chainward_shared.weights import StateDict

LINK_WORK, ALONE_WORK, STUDENT_WORK = 1.35, 1.0, 0.5
"""Cost of one image in one epoch with a predecessor, without, and of a student, relative; only for the expected end."""


@dataclass
class Run:
    """A run in progress: who takes part, what was asked for, where it is written down.

    Attributes
    ----------
    architecture : of the large model that travels along the chain
    template : its names, shapes and dtypes, without values
    privacy : what the sites have signed
    """

    consortium: Consortium
    config: RunConfig
    architecture: Architecture
    folder: RunFolder
    results: Results
    progress: Progress = field(default_factory=lambda: Progress(0.0))
    template: StateDict = field(init=False)
    privacy: RunPrivacy = field(init=False)

    def __post_init__(self) -> None:
        self.privacy = RunPrivacy(self.folder, self.consortium)
        self.template = skeleton(self.architecture).state_dict()

    @property
    def order(self) -> list[str]:
        """The sites in the order of a lap."""
        sizes = {site: card.train for site, card in self.consortium.cards.items()}
        return site_order(self.consortium.sites, sizes, self.config.chain, self.config.seed)

    def score(self, architecture: Architecture, state: StateDict, splits: list[Split]) -> dict[Split, SiteScores]:
        """Return the scores of a model at all sites; see `score_everywhere`."""
        federation = self.config.federation
        return score_everywhere(
            self.consortium,
            self.privacy,
            architecture,
            state,
            splits,
            run_id=self.folder.state.run_id,
            threads=federation.threads,
            deadline=federation.hop_deadline,
        )

    def localise(self, architecture: Architecture, state: StateDict) -> SiteLocalisation | None:
        """Return where a model looks, at all sites; see `localise_everywhere`."""
        federation = self.config.federation
        return localise_everywhere(
            self.consortium,
            self.privacy,
            architecture,
            state,
            run_id=self.folder.state.run_id,
            threads=federation.threads,
            deadline=federation.hop_deadline,
        )

    def link_work(self, site: str) -> float:
        """Return the cost of one link at `site`, in images times epochs, relative to training without a teacher."""
        return LINK_WORK * self.config.chain.epochs * self.consortium.cards[site].train

    def alone_work(self, site: str) -> float:
        """Return the cost of training `site` alone, in the unit of `link_work`."""
        return ALONE_WORK * self.config.chain.epochs * self.config.chain.laps * self.consortium.cards[site].train

    def student_work(self, site: str) -> float:
        """Return the cost of one student round at `site`, in the unit of `link_work`."""
        return STUDENT_WORK * self.config.student.epochs * self.consortium.cards[site].train

    def work_left(self) -> float:
        """Return the work that is still to be done, in the unit of `link_work`."""
        config, sites = self.config, self.consortium.sites
        work = config.chain.laps * config.chain.strands * sum(map(self.link_work, sites))
        work -= sum(self.link_work(link.site) for link in self.results.links)
        if config.chain.compare_alone:
            work += sum(
                self.alone_work(site)
                for site in sites
                if not self.folder.is_finished(f"alone-{site}") and not self.privacy.is_private(site)
            )
        if config.student.rounds:
            rounds = config.student.rounds + config.student.finetune_rounds - len(self.results.student_rounds)
            work += rounds * sum(map(self.student_work, sites))
        return work
