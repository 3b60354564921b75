"""The baselines: each trains what its name says, in the chain's own loop and recipe, without any teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from chainward_client.data.site_data import Cases, PrivilegedCases, SiteData
from chainward_client.private_site import PrivateSite
from chainward_client.training.link import LinkObjective, labelled_cases, train_link
from chainward_client.training.loop import train
from chainward_client.training.objective import Batch
from chainward_shared.distillation.losses import class_counts
from chainward_shared.hops import alone_key
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import LinkRecipe
from chainward_shared.weights import StateDict, rounded, weighted_average
from chainward_simulations.runner import RUN
from chainward_simulations.study.start import Start

OnStep = Callable[[str], None]
Sites = Mapping[str, SiteData]


class CrossEntropy(LinkObjective):
    """A link's objective without any teacher."""

    def __init__(self, model: nn.Module, cases: Cases, classes: int, recipe: LinkRecipe) -> None:
        super().__init__(recipe, model, None, class_counts(cases.labels, classes))
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]


class ProximalObjective(CrossEntropy):
    """``L + mu/2 ||w - w_0||^2``: FedProx (Li et al. 2020, arXiv:1812.06127, eq. 2).

    Parameters
    ----------
    model : with the weights w_0 of the aggregated model that the round starts from, and to be trained
    """

    def __init__(self, model: nn.Module, cases: Cases, classes: int, recipe: LinkRecipe, mu: float) -> None:
        super().__init__(model, cases, classes, recipe)
        self.mu, self.start_weights = mu, [parameter.detach().clone() for parameter in self.parameters]

    def start(self, device: torch.device, steps_per_epoch: int) -> None:
        super().start(device, steps_per_epoch)
        self.start_weights = [tensor.to(device) for tensor in self.start_weights]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        losses = super().losses(model, batch)
        pairs = zip(self.parameters, self.start_weights, strict=True)
        distances = [(parameter - before).square().sum() for parameter, before in pairs]
        return losses + self.mu / 2 * torch.stack(distances).sum()


def train_alone(
    sites: Sites,
    start: Start,
    recipe: LinkRecipe,
    on_step: OnStep,
    *,
    steps: int | None = None,
    private: Mapping[str, PrivateSite] | None = None,
) -> tuple[dict[str, StateDict], list[TrainingLog]]:
    """Train one model at each site, on its own labelled images, with no more of the start than its pretrained weights.

    Parameters
    ----------
    steps : steps of the optimiser at each site, as nearly as whole epochs allow; None: the recipe's epochs
    private : the sites that train privately; they spend all the epsilon that is asked for on this one training
    """
    models, logs = {}, []
    for site, data in sites.items():
        its = recipe
        if steps is not None:
            its = recipe.model_copy(update={"epochs": max(1, round(steps / _steps_per_epoch(data, recipe)))})
        work = private[site].work(RUN, alone_key(site)) if private and site in private else None
        if its.privacy is not None:
            its = its.model_copy(update={"privacy": its.privacy.model_copy(update={"run": ()})})
        state, log = train_link(
            data,
            start.architecture,
            its,
            None,
            strand=0,
            lap=0,
            alone=True,
            base=start.base,
            features=start.features,
            work=work,
        )
        models[site] = rounded(state, its.transfer)
        logs.append(log)
        on_step(f"alone {site}")
    return models, logs


def train_cyclic(
    sites: Sites,
    order: Sequence[str],
    start: Start,
    recipe: LinkRecipe,
    laps: int,
    on_step: OnStep,
) -> tuple[StateDict, list[TrainingLog]]:
    """Hand one model from site to site: each goes on from exactly the weights that the one before it handed on.

    (Chang et al. 2018, cyclical weight transfer.) The laps share the recipe's epochs, and the learning rate falls over
    all of them: a site's part in lap l is part l of one schedule.

    Parameters
    ----------
    recipe : its epochs are those of one site over all laps; a multiple of `laps`
    """
    per_lap = recipe.model_copy(update={"epochs": recipe.epochs // laps})
    carried: StateDict | None = None
    logs = []
    for lap in range(laps):
        for site in order:
            names, part = ("link", site, "strand", 0, "lap", lap), (lap, laps)
            cases = labelled_cases(sites[site], recipe)
            state, log = train_from(start, cases, per_lap, *names, weights=carried, part=part)
            carried = rounded(state, recipe.transfer)
            logs.append(log)
            on_step(f"lap {lap + 1} {site}")
    assert carried is not None
    return carried, logs


def train_federated(
    sites: Sites,
    start: Start,
    recipe: LinkRecipe,
    rounds: int,
    on_step: OnStep,
    *,
    mu: float | None = None,
) -> tuple[StateDict, list[TrainingLog]]:
    """Average the sites' models after each round, weighted by their labelled images (McMahan et al. 2017, FedAvg).

    All rounds of a site go through one learning-rate schedule. The optimiser's moments start anew in each round, as
    they do in FedAvg.

    Parameters
    ----------
    recipe : its epochs are those of one site over all rounds; a multiple of `rounds`
    mu : weight of FedProx's proximal term; None: FedAvg
    """
    per_round = recipe.model_copy(update={"epochs": recipe.epochs // rounds})
    average = rounded(state_of(start.model(recipe.seed)), recipe.transfer)
    own = {site: labelled_cases(data, recipe) for site, data in sites.items()}
    logs = []
    for number in range(rounds):
        trained = []
        for site, cases in own.items():
            names, part = ("federated", site, "round", number), (number, rounds)
            state, log = train_from(start, cases, per_round, *names, weights=average, part=part, mu=mu)
            trained.append(rounded(state, recipe.transfer))
            logs.append(log)
            on_step(f"round {number + 1} {site}")
        average = rounded(weighted_average(trained, [len(cases) for cases in own.values()]), recipe.transfer)
    return average, logs


def train_from(
    start: Start,
    cases: Cases,
    recipe: LinkRecipe,
    *names: str | int,
    weights: StateDict | None = None,
    part: tuple[int, int] = (0, 1),
    mu: float | None = None,
) -> tuple[StateDict, TrainingLog]:
    """Train a model on labelled cases, without any teacher.

    Parameters
    ----------
    names, part : as of `train`
    weights : what it goes on from; None: what every arm starts from
    mu : weight of FedProx's proximal term, which holds it near `weights`; None: there is no such term
    """
    model = start.model(recipe.seed)
    if weights is not None:
        model.load_state_dict(weights)
    asked = model, cases, start.architecture.num_classes, recipe
    objective = CrossEntropy(*asked) if mu is None else ProximalObjective(*asked, mu)
    seen, trunk = start.seen(model, cases, recipe)
    log = train(model, seen, recipe, objective, *names, part=part, trunk=trunk)
    return state_of(model), log


def chain_steps(sites: Sites, recipe: LinkRecipe) -> int:
    """Return the optimiser's steps of one strand of a chain; `recipe` has the epochs of a site over all laps."""
    return sum(recipe.epochs * _steps_per_epoch(data, recipe) for data in sites.values())


def _steps_per_epoch(data: SiteData, recipe: LinkRecipe) -> int:
    return math.ceil(len(labelled_cases(data, recipe)) / recipe.batch_size)


def together(parts: Sequence[Cases]) -> Cases:
    """Return the images, labels and patients of all `parts`, one after the other, without their privileged data."""
    return Cases(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        np.concatenate([part.patients for part in parts]),
        PrivilegedCases(),
    )


def state_of(model: nn.Module) -> StateDict:
    """Return the model's weights, detached."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
