"""The training that every peer does at one hospital; run as a program, the plain loop: six of them, one after the other.

``python -m chainward_simulations.benchmark.peers.work``
"""

from __future__ import annotations

import os
from functools import cache

import torch

from chainward_shared.config import ConfigScalar, RunConfig
from chainward_shared.models import Architecture, build_model, resolve_architecture
from chainward_shared.recipes import LinkRecipe
from chainward_shared.weights import StateDict
from chainward_simulations.benchmark.figures import Options
from chainward_simulations.benchmark.plain import train_plain_link
from chainward_simulations.runner import open_sites

SITES = 6
SETTINGS: dict[str, ConfigScalar] = {
    "student.rounds": 0,
    "student.finetune-rounds": 0,
    "chain.compare-alone": False,
    "chain.distillation-weight": 0.0,
    "federation.precision": "fp32",
}
"""Of the run that the peers are compared with: the chain alone, without distillation."""


def choose(options: Options) -> None:
    """Hand what was chosen down to the processes of the peers."""
    os.environ["CHAINWARD_PEERS_EPOCHS"] = str(options.epochs or (1 if options.quick else 12))
    os.environ["CHAINWARD_PEERS_THREADS"] = str(options.threads)
    if options.backbones or options.quick:
        os.environ["CHAINWARD_PEERS_BACKBONE"] = options.backbones[0].name if options.backbones else "test_convnext"


def settings() -> dict[str, ConfigScalar]:
    """Return the settings of the comparison, with what was chosen."""
    return SETTINGS | {
        "chain.epochs": int(os.environ.get("CHAINWARD_PEERS_EPOCHS", "12")),
        "chain.backbone": os.environ.get("CHAINWARD_PEERS_BACKBONE", "convnext_atto"),
        "federation.threads": int(os.environ.get("CHAINWARD_PEERS_THREADS", "2")),
    }


@cache
def training_asked() -> tuple[Architecture, LinkRecipe]:
    """Return the model and the recipe of a training; the phantoms have 5 classes, one channel and 64 px."""
    config = RunConfig.from_flat(settings())
    architecture = resolve_architecture(config.chain.backbone, num_classes=5, in_chans=1, image_size=64)
    return architecture, config.link_recipe()


def initial() -> StateDict:
    """Return the weights that the first hospital starts with."""
    architecture, recipe = training_asked()
    return dict(build_model(architecture, recipe.seed).state_dict())


def train(site: int, state: StateDict) -> tuple[StateDict, int]:
    """Train `state` at the hospital with the number `site`, counted from 0; return the weights and its training cases."""
    architecture, recipe = training_asked()
    torch.set_num_threads(recipe.threads)
    config = RunConfig.from_flat(settings() | {"federation.sites": f"site-{site + 1}"})
    (data,) = open_sites(config).values()
    trained, _ = train_plain_link(data, architecture, recipe, None, start=state)
    return trained, len(data.splits["train"])


if __name__ == "__main__":
    model = initial()
    for index in range(SITES):
        model, _ = train(index, model)
    print(f"trained at {SITES} sites", flush=True)
