"""The method in one process: its hospitals are data in memory, and nothing is sent or written down.

Studies and tests run on it. It is one implementation of `Sites`; the other is Flower's grid. What is trained in which order,
tried again, refused and merged is the same code, and so are the models, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from chainward_client.data.site_data import SiteData
from chainward_client.private_site import PrivateSite
from chainward_client.training.features import Features
from chainward_server.checkpoints import InMemory
from chainward_server.context import Run, data_summary
from chainward_server.privacy import RunPrivacy
from chainward_server.results import Results
from chainward_server.run_folder import RunFolder
from chainward_server.scoring import Scorer, Split
from chainward_shared.config import RunConfig
from chainward_shared.errors import RunFolderError
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import Architecture
from chainward_shared.pretrained.begin import begin
from chainward_shared.weights import StateDict, load_file
from chainward_simulations.in_process_sites import InProcessSites
from chainward_simulations.simulated_sites import simulated_site, simulated_site_ids

RUN = "in-process"
"""What the ledgers of private sites call a run in this process."""


def open_sites(config: RunConfig, *, tests_only: bool = False) -> dict[str, SiteData]:
    """Return the data of all simulated sites of a configuration, in the order of the chain's first lap.

    `tests_only`: as of `simulated_site`.
    """
    count = 0 if config.expected_sites else config.federation.num_sites
    source, skew = config.data.source, config.data.label_skew
    available = simulated_site_ids(source, num_sites=count, label_skew=skew)
    return {
        site: simulated_site(
            source, available.index(site), num_sites=count, label_skew=skew, seed=config.seed, tests_only=tests_only
        )
        for site in config.expected_sites or available
    }


@contextmanager
def in_process(
    config: RunConfig,
    sites: Mapping[str, SiteData],
    on_step: Callable[[str], None] = lambda step: None,
    *,
    state_dir: Path | None = None,
    features: Features | None = None,
    score_all: bool = False,
) -> Iterator[tuple[Run, InProcessSites]]:
    """Hand out a run over `sites`; the ledgers of private ones last as long as the block."""
    with private_sites(config, sites) as private:
        here = InProcessSites(sites, private, on_step, state_dir, features)
        results = Results(
            run_id=RUN, seed=config.seed, data=data_summary(list(here.cards.values()), config.data.source)
        )
        privacy = RunPrivacy(on=config.privacy.mode != "off", run_id=RUN, cards=here.cards)
        card = here.any_card
        begun = begin(config, classes=len(card.classes), channels=card.channels, image_size=card.image_size)
        if begun.base is not None:
            here.share(begun.architecture, begun.base)
        yield Run(here, config, begun.architecture, InMemory(RUN), results, privacy, begun.base, score_all), here


@contextmanager
def private_sites(config: RunConfig, sites: Mapping[str, SiteData]) -> Iterator[dict[str, PrivateSite]]:
    """Hand out the private sites of a configuration, with new ledgers in a folder that goes away again."""
    with TemporaryDirectory(prefix="chainward-ledgers-") as folder:
        policies = {site: config.privacy.simulated_policy(site) for site in sites}
        yield {
            site: PrivateSite.open(policy, Path(folder) / site, site, create=True)
            for site, policy in policies.items()
            if policy is not None
        }


def score(
    state: StateDict,
    architecture: Architecture,
    sites: Mapping[str, SiteData],
    config: RunConfig,
    split: Split = "test",
) -> tuple[dict[str, Scores], Scores]:
    """Return a model's scores at every site and pooled over them."""
    here = InProcessSites(sites)
    privacy = RunPrivacy(on=False, run_id=RUN, cards=here.cards)
    scorer = Scorer(here, privacy, RUN, config.federation.cpu_threads)
    found = scorer.everywhere(architecture, state, [split])[split].site_scores
    return found.sites, found.pooled


def stored_model(folder: RunFolder, name: str) -> tuple[Architecture, StateDict]:
    """Return the architecture and the weights of a model that a run has released."""
    if name not in folder.state.models:
        raise RunFolderError(f"run {folder.state.run_id} has no model '{name}' yet; let it finish first")
    path = folder.model_path(name)
    state, metadata = load_file(path, folder.state.models[name])
    return Architecture.from_metadata(metadata, path), state
