"""Training of one arm for one seed, and what is measured of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import save as safetensors_bytes

from chainward_client.data.site_data import SiteData, copies_between_splits
from chainward_server.schedule import site_order
from chainward_shared.models import Architecture, build_model, count_parameters
from chainward_shared.pretrained.begin import Beginning, begin
from chainward_shared.protocol import TrainingLog
from chainward_shared.weights import StateDict
from chainward_shared.words import listed
from chainward_simulations import runner
from chainward_simulations.runner import Outcome
from chainward_simulations.study import baselines
from chainward_simulations.study.further import further_baselines
from chainward_simulations.study.planned_arms import PlannedArm
from chainward_simulations.study.predictions import predict_all, save_predictions
from chainward_simulations.study.records import ArmRecord, BestSite, mean_scores

OnStep = Callable[[str], None]
ChainOf = Callable[[PlannedArm], Outcome]


@dataclass(frozen=True)
class Trained:
    """The models of an arm, by name (of their site, or of what they are), and how all trainings that led to them went.

    Attributes
    ----------
    shared : whether all trainings went into each model; otherwise each model has a part of its own
    """

    architecture: Architecture
    models: Mapping[str, StateDict]
    logs: list[TrainingLog]
    shared: bool = True


def train_chain(
    planned: PlannedArm, sites: Mapping[str, SiteData], on_step: OnStep, state_dir: Path | None = None
) -> Outcome:
    """Return what the chain of an arm comes to, without students and sites alone."""
    return runner.run_in_process(planned.chain_config, sites, on_step, state_dir=state_dir, students=False)


def train_arm(
    planned: PlannedArm,
    sites: Mapping[str, SiteData],
    chain_of: ChainOf,
    on_step: OnStep,
    state_dir: Path | None = None,
) -> Trained:
    """Train the models of an arm.

    Parameters
    ----------
    sites : the data of all sites, in the order of the study
    chain_of : returns the outcome of the arm's chain, trained before or now
    on_step : called with a line of progress after each training
    state_dir : folder in which the sites keep their privileged teachers; None: trained anew whenever they are needed
    """
    config, arm, recipe = planned.config, planned.arm, planned.plain_recipe
    if arm.trainer in ("chain", "student"):
        outcome = chain_of(planned)
        if arm.trainer == "chain":
            return Trained(outcome.architecture, {"chain": outcome.chain}, list(outcome.logs.values()))
        outcome = runner.add_students(config, sites, outcome, on_step, state_dir=state_dir)
        assert outcome.student is not None
        assert outcome.student_architecture is not None
        return Trained(outcome.student_architecture, {"student": outcome.student}, list(outcome.logs.values()))
    begun = beginning_of(planned, sites)
    architecture, base = begun.architecture, begun.base
    if arm.trainer in ("alone", "alone-long"):
        steps = baselines.chain_steps(sites, recipe) if arm.trainer == "alone-long" else None
        with runner.private_sites(config, sites) as private:
            models, logs = baselines.train_alone(
                sites, architecture, recipe, on_step, base=base, steps=steps, private=private
            )
        return Trained(architecture, models, logs, shared=False)
    if arm.trainer in further_baselines():
        state, logs = further_baselines()[arm.trainer].train(sites, architecture, recipe, on_step, base)
    elif arm.trainer == "cyclic":
        sizes = {site: len(data.splits["train"]) for site, data in sites.items()}
        order = site_order(list(sites), sizes, config.chain, config.seed)
        state, logs = baselines.train_cyclic(sites, order, architecture, recipe, arm.laps, on_step, base=base)
    else:
        mu = arm.mu if arm.mu > 0 else None
        state, logs = baselines.train_federated(sites, architecture, recipe, planned.rounds, on_step, base=base, mu=mu)
    return Trained(architecture, {arm.trainer: state}, logs)


def beginning_of(planned: PlannedArm, sites: Mapping[str, SiteData]) -> Beginning:
    """Return what the arm begins with for these images."""
    some_site = next(iter(sites.values()))
    images = some_site.splits["train"].images
    return begin(planned.config, classes=len(some_site.classes), channels=images.shape[1], image_size=images.shape[-1])


def measure_arm(planned: PlannedArm, trained: Trained, sites: Mapping[str, SiteData], folder: Path) -> ArmRecord:
    """Score an arm's models on the test and validation images, and keep the predictions in the study folder.

    Raises
    ------
    OSError
        The predictions can't be written.
    """
    config, threads = planned.config, planned.config.federation.threads
    test = predict_all(trained.models, trained.architecture, sites, "test", threads, regions=True)
    validation = predict_all(trained.models, trained.architecture, sites, "val", threads, regions=False)
    name = f"{planned.name}-seed-{config.seed}.safetensors"
    save_predictions(test, folder / "predictions" / name)
    pooled = test.pooled()
    best = max(range(len(pooled)), key=lambda index: pooled[index].balanced_accuracy or 0.0)
    state = next(iter(trained.models.values()))
    images = sum(log.images for log in trained.logs)
    return ArmRecord(
        arm=planned.name,
        seed=config.seed,
        digest=planned.digest(),
        about=planned.arm.about,
        overrides=dict(planned.arm.overrides),
        pooled=mean_scores(pooled),
        sites={site: mean_scores(test.of_site(index)) for index, site in enumerate(test.sites)},
        validation=mean_scores(validation.pooled()),
        best=None if trained.shared else BestSite(site=test.models[best], pooled=pooled[best]),
        localisation=test.localised(),
        models=len(trained.models),
        steps=sum(log.steps for log in trained.logs),
        images=images,
        images_per_model=images if trained.shared else images / len(trained.models),
        seconds=math.fsum(log.seconds for log in trained.logs),
        parameters=count_parameters(build_model(trained.architecture, seed=0)),
        file_bytes=len(safetensors_bytes({key: tensor.contiguous() for key, tensor in state.items()})),
        architecture=trained.architecture,
        precision=trained.logs[0].precision,
        predictions=name,
        data_notes=data_notes(sites),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def data_notes(sites: Mapping[str, SiteData]) -> tuple[str, ...]:
    """Return what makes scores on these data too good: copies in two splits, of one hospital or of two, and no patients."""
    notes = []
    copies = copies_between_splits([site.splits for site in sites.values()])
    if copies:
        what = "picture is" if copies == 1 else "pictures are"
        notes.append(
            f"{copies} {what} in two splits, pixel for pixel, of one hospital or of two, under two names or patients: scores on "
            "them are too good"
        )
    without = [name for name, site in sites.items() if not site.has_patient_ids]
    if without:
        notes.append(f"no patients at {listed(without, 6)}: images of one patient may be on both sides of a split")
    return tuple(notes)


@dataclass(frozen=True)
class Work:
    """What an arm is expected to take: images, in units of one site's training images, in so many trainings."""

    images: float
    trainings: int


def chain_work(planned: PlannedArm, sites: int) -> Work:
    """Return what the chain of an arm takes."""
    chain = planned.config.chain
    with_teacher = 1.4 if chain.distillation_weight > 0 or chain.attention_weight > 0 else 1.0
    trainings = chain.laps * chain.strands * sites
    return Work(chain.epochs * trainings * with_teacher, trainings)


def expected_work(planned: PlannedArm, sites: int) -> Work:
    """Return what an arm takes itself: a student without its chain. Only progress depends on it."""
    config, trainer = planned.config, planned.arm.trainer
    if trainer == "chain":
        return chain_work(planned, sites)
    if trainer == "student":
        trainings = (config.student.rounds + config.student.finetune_rounds) * sites
        return Work(0.5 * trainings * config.student.epochs, trainings)  # a student is smaller
    images = float(config.chain.epochs * config.chain.laps * sites)
    if trainer == "alone-long":
        return Work(images * sites, sites)
    counts = {"federated": planned.rounds * sites, "cyclic": planned.arm.laps * sites, "union": 1}
    return Work(images, counts.get(trainer, sites))
