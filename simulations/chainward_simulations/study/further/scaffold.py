"""SCAFFOLD: federated averaging in which each site's steps are corrected by how its gradients differ from everybody's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from chainward_client.data.site_data import SiteData
from chainward_client.training.link import labelled_cases
from chainward_client.training.loop import train
from chainward_client.training.objective import Batch
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import LinkRecipe
from chainward_shared.weights import StateDict, rounded, weighted_average
from chainward_simulations.study.baselines import CrossEntropy, state_of
from chainward_simulations.study.further import baseline
from chainward_simulations.study.start import Start


class CorrectedObjective(CrossEntropy):
    """``L + <c - c_i, w>``, whose gradient is that of L plus ``c - c_i`` (Karimireddy et al. 2020, arXiv:1910.06378, eq. 3).

    The site's next control variate is the mean of L's gradients over its steps: the paper's option II, in a form that holds for
    any optimiser, and is the paper's own with plain gradient descent.

    Attributes
    ----------
    corrections : c - c_i, of the model's trainable parameters in their order; to be set before the training
    """

    corrections: list[Tensor]

    def start(self, device: torch.device, steps_per_epoch: int) -> None:
        super().start(device, steps_per_epoch)
        self.corrections = [tensor.to(device) for tensor in self.corrections]
        self.gradients = [torch.zeros_like(correction) for correction in self.corrections]
        self.steps = 0

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        pairs = zip(self.corrections, self.parameters, strict=True)
        return super().losses(model, batch) + torch.stack([(c * p).sum() for c, p in pairs]).sum()

    def after_step(self, model: nn.Module) -> None:
        for total, parameter, correction in zip(self.gradients, self.parameters, self.corrections, strict=True):
            if parameter.grad is not None:
                total += parameter.grad - correction
        self.steps += 1

    def control(self) -> list[Tensor]:
        """Return the site's next control variate."""
        return [total.cpu() / self.steps for total in self.gradients]


@baseline("scaffold", "SCAFFOLD (Karimireddy et al. 2020), one epoch a round")
def train_scaffold(
    sites: Mapping[str, SiteData], start: Start, recipe: LinkRecipe, on_step: Callable[[str], None]
) -> tuple[StateDict, list[TrainingLog]]:
    """Train in as many rounds as the recipe has epochs; averages are weighted by labelled images, c by sites as in the paper."""
    per_round = recipe.model_copy(update={"epochs": 1})
    own = {site: labelled_cases(data, recipe) for site, data in sites.items()}
    model = start.model(recipe.seed)
    average = rounded(state_of(model), recipe.transfer)
    zeros = [torch.zeros_like(parameter) for parameter in model.parameters() if parameter.requires_grad]
    controls, everybody, logs = dict.fromkeys(own, zeros), zeros, []
    for number in range(recipe.epochs):
        trained = []
        for site, cases in own.items():
            model = start.model(recipe.seed)
            model.load_state_dict(average)
            objective = CorrectedObjective(model, cases, start.architecture.num_classes, recipe)
            objective.corrections = [c - c_i for c, c_i in zip(everybody, controls[site], strict=True)]
            seen, trunk = start.seen(model, cases, recipe)
            names = ("scaffold", site, "round", number)
            logs.append(train(model, seen, per_round, objective, *names, part=(number, recipe.epochs), trunk=trunk))
            trained.append(rounded(state_of(model), recipe.transfer))
            controls = {**controls, site: objective.control()}
            on_step(f"round {number + 1} {site}")
        everybody = [torch.stack(tensors).mean(dim=0) for tensors in zip(*controls.values(), strict=True)]
        average = rounded(weighted_average(trained, [len(cases) for cases in own.values()]), recipe.transfer)
    return average, logs
