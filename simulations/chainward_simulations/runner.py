"""The plain in-process runner: the same recipes in one loop, without Flower, messages, checkpoints or retries.

It is the reference that `flwr run` must equal bit for bit, and the base of studies. It reads top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from chainward_client.data.site_data import SiteData, SplitName
from chainward_client.data.sources import simulated_site, simulated_site_ids
from chainward_client.evaluation import class_probabilities
from chainward_client.training.link import train_link
from chainward_client.training.student import train_student
from chainward_server.schedule import plan, site_order
from chainward_server.students import initial_students, student_architecture
from chainward_shared.config import RunConfig
from chainward_shared.evaluation.classification import PredictionCounts, evaluate, pool
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import Architecture, build_model, resolve_architecture
from chainward_shared.weights import StateDict


@dataclass
class Outcome:
    """What a run trained: the model after each hop (by its key), the chain's model, the students, the sites alone."""

    architecture: Architecture
    links: dict[str, StateDict] = field(default_factory=dict)
    alone: dict[str, StateDict] = field(default_factory=dict)
    chain: StateDict = field(default_factory=dict)
    student_architecture: Architecture | None = None
    student: StateDict | None = None


def open_sites(config: RunConfig) -> dict[str, SiteData]:
    """Return the data of all simulated sites of a configuration, in the order of the chain's first lap."""
    count = 0 if config.expected_sites else config.federation.num_sites
    source, skew = config.data.source, config.data.label_skew
    available = simulated_site_ids(source, num_sites=count, label_skew=skew)
    return {
        site: simulated_site(source, available.index(site), num_sites=count, label_skew=skew, seed=config.seed)
        for site in config.expected_sites or available
    }


def run_in_process(
    config: RunConfig, sites: Mapping[str, SiteData], on_step: Callable[[str], None] = lambda step: None
) -> Outcome:
    """Run the chain, the sites alone and the students of `config` over `sites`.

    Parameters
    ----------
    on_step : called with a line of progress after each training
    """
    some_site = next(iter(sites.values()))
    images = some_site.splits["train"].images
    architecture = resolve_architecture(
        config.chain.backbone,
        num_classes=len(some_site.classes),
        in_chans=images.shape[1],
        image_size=images.shape[-1],
        patch_size=config.chain.patch_size,
    )
    outcome = Outcome(architecture)
    sizes = {site: len(data.splits["train"]) for site, data in sites.items()}
    order = site_order(list(sites), sizes, config.chain, config.seed)
    carried: list[StateDict | None] = [None] * config.chain.strands
    for turn in plan(order, config.chain.laps, config.chain.strands):
        for hop in turn:
            state, _ = train_link(
                sites[hop.site],
                architecture,
                config.link_recipe(),
                carried[hop.strand],
                strand=hop.strand,
                lap=hop.lap,
            )
            carried[hop.strand] = outcome.links[hop.key] = state
            on_step(f"{hop.key} {hop.site}")
    last = [state for state in carried if state is not None]
    outcome.chain = last[0] if len(last) == 1 else max(last, key=lambda s: _validation(s, architecture, sites, config))
    if config.chain.compare_alone:
        for site, data in sites.items():
            if config.chain.laps == 1 and site in order[: config.chain.strands]:
                outcome.alone[site] = outcome.links[f"strand-{order.index(site)}-lap-0-step-0"]
                continue
            outcome.alone[site], _ = train_link(
                data, architecture, config.link_recipe(laps=config.chain.laps), None, strand=0, lap=0, alone=True
            )
            on_step(f"alone {site}")
    if config.student.rounds:
        _run_students(config, sites, outcome, on_step)
    return outcome


def _run_students(
    config: RunConfig, sites: Mapping[str, SiteData], outcome: Outcome, on_step: Callable[[str], None]
) -> None:
    small = student_architecture(config.student, outcome.architecture)
    student, selected = initial_students(config.student, outcome.architecture, outcome.chain, config.seed)
    auxiliaries: dict[str, StateDict | None] = dict.fromkeys(sites, selected)
    for index in range(config.student.rounds + config.student.finetune_rounds):
        stage: Literal["distil", "finetune"] = "distil" if index < config.student.rounds else "finetune"
        recipe = config.student_recipe(stage)
        trained = []
        for site, data in sites.items():
            teacher = auxiliaries[site] if stage == "distil" else None
            result = train_student(data, small, recipe, student, teacher, round_index=index)
            auxiliaries[site] = result.auxiliary
            trained.append(result.student)
            on_step(f"student round {index + 1} {site}")
        student = weighted_average(trained, [len(data.splits["train"]) for data in sites.values()])
    outcome.student_architecture, outcome.student = small, student


def weighted_average(states: Sequence[StateDict], weights: Sequence[float]) -> StateDict:
    """Return the average of state dicts, summed in the order given, in the tensors' own precision."""
    total = sum(weights)
    average = {name: tensor * (weights[0] / total) for name, tensor in states[0].items()}
    for state, weight in zip(states[1:], weights[1:], strict=True):
        for name, tensor in state.items():
            average[name] += tensor * (weight / total)
    return average


def score(
    state: StateDict,
    architecture: Architecture,
    sites: Mapping[str, SiteData],
    config: RunConfig,
    split: SplitName = "test",
) -> tuple[dict[str, Scores], Scores]:
    """Return a model's scores at every site and pooled over them."""
    model = build_model(architecture, seed=0)
    model.load_state_dict(state)
    scores, counts = {}, []
    for site, data in sites.items():
        cases = data.splits[split]
        probabilities = class_probabilities(model, cases, len(data.classes), config.federation.threads)
        scores[site] = evaluate(probabilities, cases.labels.numpy())
        counts.append(PredictionCounts.of(probabilities, cases.labels.numpy()))
    return scores, pool(counts)


def _validation(
    state: StateDict, architecture: Architecture, sites: Mapping[str, SiteData], config: RunConfig
) -> float:
    return score(state, architecture, sites, config, "val")[1].balanced_accuracy or 0.0


def equal(first: StateDict, second: StateDict) -> bool:
    """Return whether two state dicts have the same names and, bit for bit, the same values."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
