"""All sites' labelled images together: what could be had if images might leave a hospital."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from chainward_client.data.site_data import SiteData
from chainward_client.training.link import labelled_cases
from chainward_client.training.loop import train
from chainward_shared.models import Architecture
from chainward_shared.models.start import initial_model
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import LinkRecipe
from chainward_shared.weights import StateDict
from chainward_simulations.study.baselines import cross_entropy, number_of_classes, state_of, together
from chainward_simulations.study.further import baseline


@baseline("union", "all sites' labelled images together, in one training")
def train_union(
    sites: Mapping[str, SiteData],
    architecture: Architecture,
    recipe: LinkRecipe,
    on_step: Callable[[str], None],
    base: StateDict | None = None,
) -> tuple[StateDict, list[TrainingLog]]:
    """Train one model on the labelled images of all sites, as if they lay in one place."""
    cases = together([labelled_cases(data, recipe) for data in sites.values()])
    model = initial_model(architecture, recipe.seed, base)
    log = train(model, cases, recipe, cross_entropy(model, cases, number_of_classes(sites), recipe), "union")
    on_step("union")
    return state_of(model), [log]
