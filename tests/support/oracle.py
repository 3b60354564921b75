"""The method written out by hand, without any of the code that runs it: what whoever runs it must equal, bit for bit.

Only what a site trains, and what is selected out of a model, is taken from the product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from chainward_client.data.site_data import SiteData
from chainward_client.training.link import train_link
from chainward_client.training.student import train_student
from chainward_server.students import initial_students
from chainward_shared.config import RunConfig
from chainward_shared.models import Architecture, resolve_architecture
from chainward_shared.models.of_run import student_architecture
from chainward_shared.weights import rounded

State = dict[str, torch.Tensor]


def backbone(config: RunConfig, sites: Mapping[str, SiteData]) -> Architecture:
    """The large model for these images."""
    site = next(iter(sites.values()))
    _, channels, _, size = site.splits["train"].images.shape
    return resolve_architecture(
        config.chain.backbone, num_classes=len(site.classes), in_chans=channels, image_size=size
    )


def chain(config: RunConfig, sites: Mapping[str, SiteData], order: list[list[str]]) -> dict[str, State]:
    """The model after each hop, of strands that visit the sites in `order` (each strand's, lap after lap)."""
    models = {}
    for strand, visits in enumerate(order):
        carried = None
        for turn, site in enumerate(visits):
            lap, step = divmod(turn, len(sites))
            state, _ = train_link(
                sites[site], backbone(config, sites), config.link_recipe(), carried, strand=strand, lap=lap
            )
            carried = models[f"strand-{strand}-lap-{lap}-step-{step}"] = rounded(state)
    return models


def alone(config: RunConfig, sites: Mapping[str, SiteData]) -> dict[str, State]:
    """The model of each site without the others."""
    recipe = config.link_recipe(laps=config.chain.laps)
    return {
        name: rounded(train_link(data, backbone(config, sites), recipe, None, strand=0, lap=0, alone=True)[0])
        for name, data in sites.items()
    }


def student(config: RunConfig, sites: Mapping[str, SiteData], selected_from: State, large: list[State]) -> State:
    """The student after all rounds."""
    architecture = backbone(config, sites)
    small = student_architecture(config.student, architecture)
    current, selection = initial_students(config.student, architecture, selected_from, config.seed, "half")
    auxiliaries = dict.fromkeys(sites, selection)
    total = sum(len(data.splits["train"]) for data in sites.values())
    for index in range(config.student.rounds + config.student.finetune_rounds):
        distils = index < config.student.rounds
        recipe = config.student_recipe("distil" if distils else "finetune")
        summed: State = {}
        for name, data in sites.items():
            result = train_student(
                data,
                small,
                recipe,
                current,
                auxiliaries[name] if distils else None,
                round_index=index,
                large=large if distils else [],
                large_architecture=architecture,
            )
            auxiliaries[name] = result.auxiliary
            weight = len(data.splits["train"]) / total
            part = {key: tensor * weight for key, tensor in rounded(result.student).items()}
            summed = {key: summed[key] + tensor for key, tensor in part.items()} if summed else part
        current = rounded(summed)
    return current
