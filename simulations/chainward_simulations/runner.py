"""The plain in-process runner: the same recipes in one loop, without Flower, messages, checkpoints or retries.

It is the reference that `flwr run` must equal bit for bit, and the base of studies. It reads top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from chainward_client.data.site_data import SiteData, SplitName
from chainward_client.evaluation import class_probabilities, localisation_values
from chainward_client.private_site import PrivateSite, PrivateWork
from chainward_client.training.link import train_link
from chainward_client.training.student import train_student
from chainward_server.decisions import best_strand, forgetting, weakest_site
from chainward_server.schedule import plan, site_order
from chainward_server.students import initial_students
from chainward_shared.config import RunConfig
from chainward_shared.evaluation.classification import PredictionCounts, evaluate, pool
from chainward_shared.evaluation.localisation import LocalisationScores, LocalisationValues
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import Architecture, build_model
from chainward_shared.models.planned import chain_architecture, student_architecture
from chainward_shared.protocol import TrainingLog
from chainward_shared.weights import StateDict, rounded, weighted_average
from chainward_simulations.simulated_sites import simulated_site, simulated_site_ids

RUN = "in-process"
"""What the ledgers of private sites call a run of this runner."""


@dataclass
class Outcome:
    """What a run trained: the model after each hop (by its key), the last model of each strand, the chain's model,
    the students, the sites alone.

    `logs`: how every training went, by hop key, `alone-SITE` or `student-round-N-SITE`.
    """

    architecture: Architecture
    links: dict[str, StateDict] = field(default_factory=dict)
    alone: dict[str, StateDict] = field(default_factory=dict)
    strands: list[StateDict] = field(default_factory=list)
    chain: StateDict = field(default_factory=dict)
    student_architecture: Architecture | None = None
    student: StateDict | None = None
    logs: dict[str, TrainingLog] = field(default_factory=dict)


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
    config: RunConfig,
    sites: Mapping[str, SiteData],
    on_step: Callable[[str], None] = lambda step: None,
    *,
    state_dir: Path | None = None,
    students: bool = True,
) -> Outcome:
    """Run the chain, the sites alone and the students of `config` over `sites`.

    Private sites have ledgers that last as long as this call, and are not trained alone.

    Parameters
    ----------
    on_step : called with a line of progress after each training
    state_dir : folder in which the sites keep their privileged teachers; None: trained anew whenever they are needed
    students : False: without them, but with what they will cost in the plans of the private sites
    """
    some_site = next(iter(sites.values()))
    images = some_site.splits["train"].images
    architecture = chain_architecture(
        config.chain, classes=len(some_site.classes), channels=images.shape[1], image_size=images.shape[-1]
    )
    outcome = Outcome(architecture)
    sizes = {site: len(data.splits["train"]) for site, data in sites.items()}
    order = site_order(list(sites), sizes, config.chain, config.seed)
    with private_sites(config, sites) as private:
        _run_chain(config, sites, order, outcome, on_step, state_dir, private)
        _run_alone(config, sites, order, outcome, on_step, state_dir, private)
        if config.student.rounds and students:
            run_students(config, sites, outcome, on_step, state_dir, private)
    return outcome


@contextmanager
def private_sites(config: RunConfig, sites: Mapping[str, SiteData]) -> Iterator[dict[str, PrivateSite]]:
    """Hand out the private sites of a configuration, with new ledgers in a folder that goes away again."""
    with TemporaryDirectory(prefix="chainward-ledgers-") as folder:
        private = {}
        for site in sites:
            policy = config.privacy.simulated_policy(site)
            if policy is not None:
                private[site] = PrivateSite.open(policy, Path(folder) / site, site, create=True)
        yield private


def work_at(private: Mapping[str, PrivateSite], site: str, hop: str) -> PrivateWork | None:
    """Return what a piece of work at a site spends through; None where the site is not private."""
    return private[site].work(RUN, hop) if site in private else None


def _run_alone(
    config: RunConfig,
    sites: Mapping[str, SiteData],
    order: Sequence[str],
    outcome: Outcome,
    on_step: Callable[[str], None],
    state_dir: Path | None,
    private: Mapping[str, PrivateSite],
) -> None:
    architecture, transfer = outcome.architecture, config.federation.transfer
    if config.chain.compare_alone:
        for site, data in sites.items():
            if site in private:
                continue
            if config.chain.laps == 1 and site in order[: config.chain.strands]:
                outcome.alone[site] = outcome.links[f"strand-{order.index(site)}-lap-0-step-0"]
                continue
            state, outcome.logs[f"alone-{site}"] = train_link(
                data,
                architecture,
                config.link_recipe(laps=config.chain.laps),
                None,
                strand=0,
                lap=0,
                alone=True,
                state_dir=_site_dir(state_dir, site),
            )
            outcome.alone[site] = rounded(state, transfer)
            on_step(f"alone {site}")


def _run_chain(
    config: RunConfig,
    sites: Mapping[str, SiteData],
    order: Sequence[str],
    outcome: Outcome,
    on_step: Callable[[str], None],
    state_dir: Path | None,
    private: Mapping[str, PrivateSite],
) -> None:
    chain, architecture, transfer = config.chain, outcome.architecture, config.federation.transfer
    carried: list[StateDict | None] = [None] * chain.strands
    trained_at: list[list[str]] = [[] for _ in range(chain.strands)]
    validation: list[Mapping[str, Scores]] = [{} for _ in range(chain.strands)]
    scores_decide = chain.order == "weakest-next" or chain.max_forgetting < 1
    remaining = list(order)
    for turn in plan(order, chain.laps, chain.strands):
        for hop in turn:
            site = hop.site
            if chain.order == "weakest-next":
                remaining = list(order) if hop.step == 0 else remaining
                site = weakest_site(remaining, validation[hop.strand])
                remaining.remove(site)
            state, outcome.logs[hop.key] = train_link(
                sites[site],
                architecture,
                config.link_recipe(),
                carried[hop.strand],
                strand=hop.strand,
                lap=hop.lap,
                state_dir=_site_dir(state_dir, site),
                work=work_at(private, site, hop.key),
            )
            state = rounded(state, transfer)
            on_step(f"{hop.key} {site}")
            if scores_decide:
                after, _ = score(state, architecture, sites, config, "val")
                forgot = forgetting(trained_at[hop.strand], validation[hop.strand], after)
                if forgot is not None and forgot.lost > chain.max_forgetting:
                    continue
                validation[hop.strand] = after
            carried[hop.strand] = outcome.links[hop.key] = state
            trained_at[hop.strand].append(site)
    outcome.strands = [state for state in carried if state is not None]
    if chain.merge == "average":
        outcome.chain = rounded(weighted_average(outcome.strands, [1.0] * len(outcome.strands)), transfer)
    elif len(outcome.strands) == 1:
        outcome.chain = outcome.strands[0]
    else:
        pooled = [score(state, architecture, sites, config, "val")[1] for state in outcome.strands]
        outcome.chain = outcome.strands[best_strand(dict(enumerate(pooled)))]


def _site_dir(state_dir: Path | None, site: str) -> Path | None:
    return None if state_dir is None else state_dir / site


def run_students(
    config: RunConfig,
    sites: Mapping[str, SiteData],
    outcome: Outcome,
    on_step: Callable[[str], None],
    state_dir: Path | None,
    private: Mapping[str, PrivateSite],
) -> None:
    """Train the students of a chain that `outcome` holds, and put student and architecture into it."""
    small = student_architecture(config.student, outcome.architecture)
    transfer = config.federation.transfer
    student, selected = initial_students(config.student, outcome.architecture, outcome.chain, config.seed, transfer)
    auxiliaries: dict[str, StateDict | None] = dict.fromkeys(sites, selected)
    large = outcome.strands if config.chain.merge == "ensemble" else [outcome.chain]
    for index in range(config.student.rounds + config.student.finetune_rounds):
        stage: Literal["distil", "finetune"] = "distil" if index < config.student.rounds else "finetune"
        recipe = config.student_recipe(stage)
        trained = []
        for site, data in sites.items():
            teacher = auxiliaries[site] if stage == "distil" else None
            result = train_student(
                data,
                small,
                recipe,
                student,
                teacher,
                round_index=index,
                large=large,
                large_architecture=outcome.architecture,
                state_dir=_site_dir(state_dir, site),
                work=work_at(private, site, f"student-round-{index + 1}"),
            )
            auxiliaries[site] = result.auxiliary
            outcome.logs[f"student-round-{index + 1}-{site}"] = result.log
            trained.append(rounded(result.student, transfer))
            on_step(f"student round {index + 1} {site}")
        weights = [
            private[site].units(data) if site in private else len(data.splits["train"]) for site, data in sites.items()
        ]
        student = rounded(weighted_average(trained, weights), transfer)
    outcome.student_architecture, outcome.student = small, student


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
        probabilities = class_probabilities(
            model, cases, len(data.classes), config.federation.threads, image_size=architecture.image_size
        )
        scores[site] = evaluate(probabilities, cases.labels.numpy())
        counts.append(PredictionCounts.of(probabilities, cases.labels.numpy()))
    return scores, pool(counts)


def localise(
    state: StateDict,
    architecture: Architecture,
    sites: Mapping[str, SiteData],
    config: RunConfig,
    split: SplitName = "test",
) -> tuple[LocalisationValues, LocalisationScores]:
    """Return where a model looks in the images with a region of interest: each image's scores, and their means.

    The values of all sites as one, in the order of `sites`; `rows` count on from site to site, over the sites that have
    regions. Images are the same for every model, so the values of two models can be compared in pairs.
    """
    model = build_model(architecture, seed=0)
    model.load_state_dict(state)
    threads, size = config.federation.threads, architecture.image_size
    found = [localisation_values(model, data.splits[split], threads, image_size=size) for data in sites.values()]
    values = LocalisationValues.joined(part for part in found if part is not None)
    return values, LocalisationScores.of(values, split, seed=config.seed)


def equal(first: StateDict, second: StateDict) -> bool:
    """Return whether two state dicts have the same names and, bit for bit, the same values."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
