"""All sites' labelled images together: what could be had if images might leave a hospital."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from chainward_client.data.site_data import SiteData
from chainward_client.training.link import labelled_cases
from chainward_client.training.loop import train
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import LinkRecipe
from chainward_shared.weights import StateDict
from chainward_simulations.study.baselines import cross_entropy, number_of_classes, state_of, together
from chainward_simulations.study.further import baseline
from chainward_simulations.study.start import Start


@baseline("union", "all sites' labelled images together, in one training")
def train_union(
    sites: Mapping[str, SiteData],
    start: Start,
    recipe: LinkRecipe,
    on_step: Callable[[str], None],
) -> tuple[StateDict, list[TrainingLog]]:
    """Train one model on the labelled images of all sites, as if they lay in one place."""
    cases = together([labelled_cases(data, recipe) for data in sites.values()])
    model = start.model(recipe.seed)
    objective = cross_entropy(model, cases, number_of_classes(sites), recipe)
    seen, trunk = start.seen(model, cases, recipe)
    log = train(model, seen, recipe, objective, "union", trunk=trunk)
    on_step("union")
    return state_of(model), [log]
