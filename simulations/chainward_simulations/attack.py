"""The membership-inference attack on a finished simulated run: on the models that it released.

Members are each site's training cases whose labels were used, outsiders its validation and test cases. In a simulation
all of them lie on this machine; a real coordinator has neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import nn

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.privacy_audit.membership import (
    FALSE_POSITIVE_RATES,
    MembershipAttack,
    attack_membership,
    calibrated,
    case_losses,
)
from chainward_client.training.link import labelled_cases
from chainward_client.training.loop import train
from chainward_client.training.passes import passes
from chainward_server.heads import balance_strength
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.discriminant import HeadSums, discriminant
from chainward_shared.errors import DataError, RunFolderError
from chainward_shared.models import Architecture, build_model
from chainward_shared.models.heads import check_head, with_head
from chainward_shared.models.start import initial_model
from chainward_shared.models.taps import Taps
from chainward_shared.preprocessing import resized
from chainward_shared.privacy.guessing import most_auc, most_found
from chainward_shared.privacy.record import read_privacy_record
from chainward_shared.privacy.statements import parse_statement
from chainward_shared.seeds import numpy_generator
from chainward_shared.weights import StateDict
from chainward_simulations.runner import open_sites, stored_model
from chainward_simulations.study.baselines import CrossEntropy, together

MODELS = ("student", "chain")
ALL_SITES = "all"
Losses = Mapping[str, tuple[Cases, np.ndarray]]
"""Cases of each site, and what each of them costs a model, (n,)."""


@dataclass(frozen=True)
class Bound:
    """What no attack on everything that the sites of a line have let out can exceed, see `chainward_shared.privacy.guessing`;
    names as of `MembershipAttack`."""

    auc: float
    found: tuple[float, ...]


@dataclass(frozen=True)
class Attacked:
    """One line of the outcome: which model, whose patients ("all": of every site), the attack by the loss alone or
    by the loss against that of reference models, and what privacy allows; None where a site has none, or protects images."""

    model: str
    site: str
    kind: str
    attack: MembershipAttack
    bound: Bound | None = None


def attack_run(
    config: RunConfig,
    models: Mapping[str, tuple[Architecture, StateDict]],
    sites: Mapping[str, SiteData],
    *,
    base: StateDict | None = None,
    calibrate: bool = False,
    bounds: Mapping[str, Bound] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Attacked]:
    """Attack `models` with the patients of each site and of all sites together.

    Parameters
    ----------
    config : the run's; decides which labels were used
    models : what was released, by name
    base : the pretrained weights that the run started from; None where it started at random
    calibrate : also compare each loss with that of a reference model that has not seen the patient, which finds more: two
        are trained for each model, each on half of the outsiders
    bounds : of the sites that have trained privately, by site
    say : called with a line of progress

    Raises
    ------
    DataError
        A site, or all of them, has no members or no outsiders.
    """
    members = {
        site: labelled_cases(data, config.link_recipe(), private=config.privacy.simulated_policy(site) is not None)
        for site, data in sites.items()
    }
    trained_on = {str(patient) for data in sites.values() for patient in data.splits["train"].patients}
    outsiders = {site: _outside(data, trained_on) for site, data in sites.items()}
    found = []
    for name, (architecture, state) in models.items():
        model = build_model(architecture, seed=0)
        model.load_state_dict(state)
        losses_of = partial(case_losses, threads=config.federation.cpu_threads, image_size=architecture.image_size)
        inside: Losses = {site: (cases, losses_of(model, cases)) for site, cases in members.items()}
        outside: Losses = {site: (cases, losses_of(model, cases)) for site, cases in outsiders.items()}
        found += _lines(name, "loss", config.seed, inside, outside)
        if calibrate:
            say(f"attack: training two reference models for the {name}")
            start = base if architecture.start else None
            references = _references(config, architecture, outsiders, start, trained=name)
            against = _against(references, losses_of, config.seed, inside, outside)
            found += _lines(name, "calibrated", config.seed, *against)
    return [replace(one, bound=_bound_of(one, list(members), bounds or {})) for one in found]


def _bound_of(line: Attacked, sites: Sequence[str], bounds: Mapping[str, Bound]) -> Bound | None:
    """Return what holds for the patients of each site of a line; None where one of them has no bound."""
    of = [bounds.get(site) for site in (sites if line.site == ALL_SITES else [line.site])]
    known = [one for one in of if one is not None]
    if len(known) < len(of):
        return None
    return Bound(max(one.auc for one in known), tuple(map(max, zip(*(one.found for one in known), strict=True))))


def _lines(model: str, kind: str, seed: int, inside: Losses, outside: Losses) -> list[Attacked]:
    def of(side: Losses, group: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        losses, patients = [side[site][1] for site in group], [side[site][0].patients for site in group]
        return np.concatenate(losses), np.concatenate(patients)

    groups = {ALL_SITES: list(inside)} | {site: [site] for site in inside if len(inside) > 1}
    return [
        Attacked(model, name, kind, attack_membership(*of(inside, group), *of(outside, group), seed=seed))
        for name, group in groups.items()
        if all(len(inside[site][0]) and len(outside[site][0]) for site in group) or name == ALL_SITES
    ]


def _outside(data: SiteData, trained_on: set[str]) -> Cases:
    """The validation and test cases of patients on whom no site trained."""
    parts = []
    for split in ("val", "test"):
        cases = data.splits[split]
        parts.append(cases.take([row for row, patient in enumerate(cases.patients) if str(patient) not in trained_on]))
    return together(parts)


def _half(seed: int, patients: np.ndarray) -> np.ndarray:
    """Return in which half each case's patient is, 0 or 1: a fair coin for each patient."""
    names, which = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    return np.asarray(numpy_generator(seed, "membership", "halves").integers(0, 2, len(names))[which])


def _references(
    config: RunConfig,
    architecture: Architecture,
    outsiders: Mapping[str, Cases],
    base: StateDict | None,
    *,
    trained: str,
) -> list[nn.Module]:
    """Train a model on each half of the outsiders of all sites, as a hospital alone would train it, with a head from statistics
    where that under attack (`trained`: "chain" or "student") has one."""
    head = config.student.head if trained == "student" else config.chain.head
    everyone = together(list(outsiders.values()))
    half = _half(config.seed, everyone.patients)
    recipe = config.link_recipe(laps=config.chain.laps).model_copy(
        update={"privileged": None, "privacy": None, "label_fraction": 1.0}
    )
    references = []
    for index in (0, 1):
        cases = everyone.take(np.flatnonzero(half == index))
        if len(cases) < recipe.batch_size // 4 or len(cases) < 2:
            raise DataError(
                f"{len(cases)} held-out images are too few to train a reference model on; attack without it"
            )
        cases = replace(cases, images=resized(cases.images, architecture.image_size))
        model = initial_model(architecture, config.seed, base)
        if config.chain.laps or trained == "student":
            objective = CrossEntropy(model, cases, architecture.num_classes, recipe)
            train(model, cases, recipe, objective, "membership", "reference", index)
        if head == "statistics":
            _give_head(model, architecture, cases, config)
        references.append(model)
    return references


def _give_head(model: nn.Module, architecture: Architecture, cases: Cases, config: RunConfig) -> None:
    """Give a model the head that follows from sums over its embeddings of `cases`, without noise."""
    classes, none = architecture.num_classes, HeadSums.none(architecture.num_classes, check_head(architecture))
    sums, start = none, 0
    with Taps(model, embedding=True) as taps:
        for _ in passes(model, cases.images, config.federation.cpu_threads, architecture.image_size):
            assert taps.embedding is not None
            embedded = taps.embedding.cpu()
            sums += HeadSums.of(embedded, cases.labels[start : start + len(embedded)], classes)
            start += len(embedded)
    strength = balance_strength(config.chain.class_balance, config.chain.prior_strength)
    head = discriminant(sums, None, multilabel=cases.labels.ndim == 2, prior_strength=strength)
    model.load_state_dict(with_head(dict(model.state_dict()), architecture, head))


def _against(
    references: list[nn.Module],
    losses_of: Callable[[nn.Module, Cases], np.ndarray],
    seed: int,
    inside: Losses,
    outside: Losses,
) -> tuple[Losses, Losses]:
    """Return all losses less that of a reference that has not seen the patient.

    Of members neither has; one is taken by lot nevertheless, so that both sides are compared with one reference each.
    """
    everyone = together([cases for cases, _ in outside.values()]).patients
    trained = dict(zip(map(str, everyone), _half(seed, everyone), strict=True))

    def less(cases: Cases, losses: np.ndarray, left_out: np.ndarray) -> tuple[Cases, np.ndarray]:
        of = np.stack([losses_of(one, cases) for one in references]).reshape(len(references), len(cases))
        of[left_out, np.arange(len(cases))] = np.nan
        return cases, calibrated(losses, of)

    return (
        {site: less(cases, losses, _half(seed, cases.patients)) for site, (cases, losses) in inside.items()},
        {
            site: less(cases, losses, np.array([trained[str(one)] for one in cases.patients], dtype=np.int64))
            for site, (cases, losses) in outside.items()
        },
    )


def attack_stored(folder: RunFolder, *, calibrate: bool, say: Callable[[str], None]) -> list[Attacked]:
    """Attack the models that a simulated run has released.

    Parameters
    ----------
    calibrate, say : as of `attack_run`

    Raises
    ------
    RunFolderError
        There are none yet, or a file is not what it should be.
    """
    models = {name: stored_model(folder, name) for name in MODELS if name in folder.state.models}
    if not models:
        raise RunFolderError(f"run {folder.state.run_id} has released no model yet; let it finish first")
    begun = folder.beginning()
    base = None if begun is None else begun.base
    sites = open_sites(folder.config)
    return attack_run(folder.config, models, sites, base=base, calibrate=calibrate, bounds=_bounds(folder), say=say)


def _bounds(folder: RunFolder) -> dict[str, Bound]:
    """Return what privacy allows an attacker at each site that protects its patients, by all that it has spent in the run."""
    record = folder.path / "privacy.json"
    statements = read_privacy_record(record).statements if record.exists() else ()
    last = {statement.site: statement for statement in map(parse_statement, statements)}
    found = {}
    for site, statement in last.items():
        if statement.terms.unit == "patient":
            spent = [record.mechanism for record in statement.of_run]
            delta = statement.terms.delta
            found[site] = Bound(most_auc(spent, delta), tuple(most_found(spent, delta, FALSE_POSITIVE_RATES)))
    return found
