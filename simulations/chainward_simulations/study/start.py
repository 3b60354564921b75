"""What every arm of a study starts from: the same model, and the features of its frozen trunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.training.features import Features
from chainward_server.heads import with_statistics_head
from chainward_shared.config import RunConfig
from chainward_shared.hops import END_HEAD, START_HEAD
from chainward_shared.models import Architecture
from chainward_shared.models.start import initial_model
from chainward_shared.models.trunk import Trunk
from chainward_shared.recipes import LinkRecipe
from chainward_shared.weights import StateDict, rounded
from chainward_simulations import runner


@dataclass(frozen=True)
class Start:
    """The model that trainings start from.

    Attributes
    ----------
    base : the pretrained weights of its trunk; None where it starts at random
    state : the whole model, where it is not the fresh one of a seed: with a head from statistics
    features : where the output of a frozen trunk is kept; None: every image goes through it in every epoch
    """

    architecture: Architecture
    base: StateDict | None = None
    state: StateDict | None = None
    features: Features | None = None

    def model(self, seed: int) -> nn.Module:
        """Return the model, ready to be trained."""
        model = initial_model(self.architecture, seed, self.base)
        if self.state is not None:
            model.load_state_dict(self.state)
        return model

    def seen(self, model: nn.Module, cases: Cases, recipe: LinkRecipe) -> tuple[Cases, Trunk | None]:
        """Return what `model` is trained on: the cases, or their features by its frozen trunk, with it."""
        of = None
        if self.features is not None:
            of = self.features.of(model, cases.images, recipe.augmentation, recipe.threads)
        return (cases, None) if of is None else (replace(cases, images=of[0]), of[1])


def start_of(
    config: RunConfig, sites: Mapping[str, SiteData], features: Features | None, *, statistics: bool | None = None
) -> Start:
    """Return what the arms of a configuration start from.

    Parameters
    ----------
    statistics : with the head that follows from the sums of all sites; None: as ``chain.head`` says
    """
    with runner.in_process(config, sites, features=features) as (run, _):
        state = None
        if config.chain.head == "statistics" if statistics is None else statistics:
            state = with_statistics_head(run, START_HEAD, rounded(run.initial(), config.federation.transfer))
        return Start(run.architecture, run.base, state, features)


def refitted(
    config: RunConfig, sites: Mapping[str, SiteData], state: StateDict, features: Features | None
) -> StateDict:
    """Return a model with the head that follows from the sums of all sites over its own embeddings."""
    with runner.in_process(config, sites, features=features) as (run, _):
        return with_statistics_head(run, END_HEAD, rounded(state, config.federation.transfer))
