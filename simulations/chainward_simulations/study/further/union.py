"""All sites' labelled images together: what could be had if images might leave a hospital."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from chainward_client.data.site_data import SiteData
from chainward_client.training.link import labelled_cases
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import LinkRecipe
from chainward_shared.weights import StateDict
from chainward_simulations.study.baselines import together, train_from
from chainward_simulations.study.further import baseline
from chainward_simulations.study.start import Start


@baseline("union", "all sites' labelled images together, in one training")
def train_union(
    sites: Mapping[str, SiteData], start: Start, recipe: LinkRecipe, on_step: Callable[[str], None]
) -> tuple[StateDict, list[TrainingLog]]:
    """Train one model on the labelled images of all sites, as if they lay in one place."""
    cases = together([labelled_cases(data, recipe) for data in sites.values()])
    state, log = train_from(start, cases, recipe, "union")
    on_step("union")
    return state, [log]
