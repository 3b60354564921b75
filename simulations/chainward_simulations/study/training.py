"""Training of one arm for one seed, and what is measured of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import save as safetensors_bytes

from chainward_client.data.site_data import SiteData
from chainward_client.training.features import Features
from chainward_server.chain import ChainOutcome
from chainward_server.context import Run
from chainward_server.method import run_method
from chainward_server.schedule import site_order
from chainward_server.students import run_students
from chainward_shared.config import RunConfig
from chainward_shared.models import Architecture, build_model, count_parameters
from chainward_shared.models.of_run import student_architecture
from chainward_shared.protocol import TrainingLog
from chainward_shared.weights import StateDict
from chainward_simulations import runner
from chainward_simulations.data_notes import data_notes
from chainward_simulations.in_process_sites import InProcessSites
from chainward_simulations.study import baselines
from chainward_simulations.study.arms import WITHOUT_TRAINING
from chainward_simulations.study.configured_arms import ConfiguredArm
from chainward_simulations.study.further import further_baselines
from chainward_simulations.study.predictions import predict_all, save_predictions
from chainward_simulations.study.records import ArmRecord, BestSite, mean_scores
from chainward_simulations.study.start import Start, refitted, start_of
from chainward_simulations.study.store import Chain
from chainward_simulations.study.without_training import PictureModel, linear_probe, picture_model

OnStep = Callable[[str], None]
ChainOf = Callable[[ConfiguredArm, "Bench"], Chain]


@dataclass(frozen=True)
class Trained:
    """The models of an arm, by name (of their site, or of what they are), and how all trainings that led to them went.

    Attributes
    ----------
    architecture : of the models; None where they have no network
    shared : whether all trainings went into each model; otherwise each model has a part of its own
    """

    architecture: Architecture | None
    models: Mapping[str, StateDict | PictureModel]
    logs: list[TrainingLog]
    shared: bool = True


@dataclass(frozen=True)
class Bench:
    """What an arm is trained with.

    Attributes
    ----------
    sites : the data of all sites, in the order of the study
    chain_of : returns the arm's chain, trained before or now
    on_step : called with a line of progress after each training
    state_dir : folder in which the sites keep their privileged teachers; None: trained anew whenever they are needed
    features : where the output of frozen trunks is kept; None: nowhere
    """

    sites: Mapping[str, SiteData]
    chain_of: ChainOf
    on_step: OnStep
    state_dir: Path | None = None
    features: Features | None = None


def train_chain(configured: ConfiguredArm, bench: Bench) -> Chain:
    """Return what the chain of an arm comes to, without students and sites alone."""
    chain = configured.config.chain.model_copy(update={"compare_alone": False})
    with _run(configured.config.model_copy(update={"chain": chain}), bench) as (run, trained):
        outcome = run_method(run, students=False).chain
    return Chain(run.architecture, outcome.model, outcome.strands, trained.logs)


def _run(config: RunConfig, bench: Bench) -> AbstractContextManager[tuple[Run, InProcessSites]]:
    return runner.in_process(config, bench.sites, bench.on_step, state_dir=bench.state_dir, features=bench.features)


def train_arm(configured: ConfiguredArm, bench: Bench) -> Trained:
    """Train the models of an arm."""
    trained = _TRAINERS.get(configured.arm.trainer, _further)(configured, bench)
    if not configured.arm.refit:
        return trained
    ((name, state),) = trained.models.items()
    assert not isinstance(state, PictureModel)
    return replace(trained, models={name: refitted(configured.config, bench.sites, state, bench.features)})


def _chain(configured: ConfiguredArm, bench: Bench) -> Trained:
    chain = bench.chain_of(configured, bench)
    return Trained(chain.architecture, {"chain": chain.model}, list(chain.logs.values()))


def _student(configured: ConfiguredArm, bench: Bench) -> Trained:
    chain = bench.chain_of(configured, bench)
    with _run(configured.config, bench) as (run, trained):
        student = run_students(run, ChainOutcome(chain.model, None, chain.strands))
    small = student_architecture(configured.config.student, run.architecture)
    return Trained(small, {"student": student}, [*chain.logs.values(), *trained.logs.values()])


def _alone(configured: ConfiguredArm, bench: Bench) -> Trained:
    recipe, sites, start = configured.plain_recipe, bench.sites, _start(configured, bench, statistics=False)
    steps = baselines.chain_steps(sites, recipe) if configured.arm.trainer == "alone-long" else None
    with runner.private_sites(configured.config, sites) as private:
        models, logs = baselines.train_alone(sites, start, recipe, bench.on_step, steps=steps, private=private)
    return Trained(start.architecture, models, logs, shared=False)


def _cyclic(configured: ConfiguredArm, bench: Bench) -> Trained:
    config, start = configured.config, _start(configured, bench)
    sizes = {site: len(data.splits["train"]) for site, data in bench.sites.items()}
    order = site_order(list(bench.sites), sizes, config.chain, config.seed)
    laps = configured.arm.laps
    state, logs = baselines.train_cyclic(bench.sites, order, start, configured.plain_recipe, laps, bench.on_step)
    return Trained(start.architecture, {"cyclic": state}, logs)


def _federated(configured: ConfiguredArm, bench: Bench) -> Trained:
    start, mu = _start(configured, bench), configured.arm.mu if configured.arm.mu > 0 else None
    state, logs = baselines.train_federated(
        bench.sites, start, configured.plain_recipe, configured.rounds, bench.on_step, mu=mu
    )
    return Trained(start.architecture, {"federated": state}, logs)


def _further(configured: ConfiguredArm, bench: Bench) -> Trained:
    start, trainer = _start(configured, bench), configured.arm.trainer
    state, logs = further_baselines()[trainer].train(bench.sites, start, configured.plain_recipe, bench.on_step)
    return Trained(start.architecture, {trainer: state}, logs)


def _statistics(configured: ConfiguredArm, bench: Bench) -> Trained:
    """The start, with nothing trained: its head is that of all sites, or each site's own."""
    alone = configured.arm.trainer == "alone-statistics"
    whose = {site: {site: data} for site, data in bench.sites.items()} if alone else {"statistics": bench.sites}
    starts = {
        name: start_of(configured.config, sites, bench.features, statistics=True) for name, sites in whose.items()
    }
    architecture = next(iter(starts.values())).architecture
    return Trained(architecture, {name: start.state or {} for name, start in starts.items()}, [], shared=not alone)


def _probe(configured: ConfiguredArm, bench: Bench) -> Trained:
    start = _start(configured, bench, statistics=False)
    state = linear_probe(start, bench.sites, configured.plain_recipe)
    return Trained(start.architecture, {"linear-probe": state}, [])


def _pictures(configured: ConfiguredArm, bench: Bench) -> Trained:
    name, recipe = configured.arm.trainer, configured.plain_recipe
    return Trained(None, {name: picture_model(name, bench.sites, recipe)}, [])


_TRAINERS: Mapping[str, Callable[[ConfiguredArm, Bench], Trained]] = {
    "chain": _chain,
    "student": _student,
    "alone": _alone,
    "alone-long": _alone,
    "cyclic": _cyclic,
    "federated": _federated,
    "statistics": _statistics,
    "alone-statistics": _statistics,
    "linear-probe": _probe,
    "thumbnails": _pictures,
    "linear-pixels": _pictures,
}


def _start(configured: ConfiguredArm, bench: Bench, *, statistics: bool | None = None) -> Start:
    return start_of(configured.config, bench.sites, bench.features, statistics=statistics)


def measure_arm(configured: ConfiguredArm, trained: Trained, bench: Bench, folder: Path) -> ArmRecord:
    """Score an arm's models on the test and validation images, and keep the predictions in the study folder.

    Raises
    ------
    OSError
        The predictions can't be written.
    """
    config, threads = configured.config, configured.config.federation.cpu_threads
    what = trained.models, trained.architecture, bench.sites
    test = predict_all(*what, "test", threads, regions=True, features=bench.features)
    validation = predict_all(*what, "val", threads, regions=False, features=bench.features)
    name = f"{configured.name}-seed-{config.seed}.safetensors"
    save_predictions(test, folder / "predictions" / name)
    pooled = test.pooled()
    images = sum(log.images for log in trained.logs)
    parameters, file_bytes = _size_of(trained)
    return ArmRecord(
        arm=configured.name,
        seed=config.seed,
        digest=configured.digest(),
        about=configured.arm.about,
        overrides=dict(configured.arm.overrides),
        pooled=mean_scores(pooled),
        sites={site: mean_scores(test.of_site(index)) for index, site in enumerate(test.sites)},
        validation=mean_scores(validation.pooled()),
        best=None if trained.shared else BestSite(site=test.models[test.best], pooled=pooled[test.best]),
        localisation=test.localised(),
        models=len(trained.models),
        steps=sum(log.steps for log in trained.logs),
        images=images,
        images_per_model=images if trained.shared else images / len(trained.models),
        seconds=math.fsum(log.seconds for log in trained.logs),
        parameters=parameters,
        file_bytes=file_bytes,
        architecture=trained.architecture,
        precision=trained.logs[0].precision if trained.logs else "fp32",
        predictions=name,
        data_notes=tuple(data_notes(bench.sites)),
        classes=next(iter(bench.sites.values())).classes,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _size_of(trained: Trained) -> tuple[int, int]:
    """Return the numbers that one of the models consists of, and their bytes: of a network, of its file."""
    model = next(iter(trained.models.values()))
    if isinstance(model, PictureModel):
        return model.head.weight.size + model.head.bias.size, model.head.weight.nbytes + model.head.bias.nbytes
    assert trained.architecture is not None
    contiguous = {key: tensor.contiguous() for key, tensor in model.items()}
    return count_parameters(build_model(trained.architecture, seed=0)), len(safetensors_bytes(contiguous))


@dataclass(frozen=True)
class Work:
    """What an arm is expected to take: images, in units of one site's training images, in so many trainings."""

    images: float
    trainings: int

    @property
    def per_training(self) -> float:
        """The images of one of its trainings; 0 where nothing is trained (``chain.laps = 0``)."""
        return self.images / self.trainings if self.trainings else 0.0


def chain_work(configured: ConfiguredArm, sites: int) -> Work:
    """Return what the chain of an arm takes."""
    chain = configured.config.chain
    with_teacher = 1.4 if chain.distillation_weight > 0 or chain.attention_weight > 0 else 1.0
    trainings = chain.laps * chain.strands * sites
    return Work(chain.epochs * trainings * with_teacher, trainings)


def expected_work(configured: ConfiguredArm, sites: int) -> Work:
    """Return what an arm takes itself: a student without its chain. Only progress depends on it."""
    config, trainer = configured.config, configured.arm.trainer
    if trainer == "chain":
        return chain_work(configured, sites)
    if trainer == "student":
        trainings = (config.student.rounds + config.student.finetune_rounds) * sites
        return Work(0.5 * trainings * config.student.epochs, trainings)  # a student is smaller
    images = float(config.chain.epochs * config.chain.laps * sites)
    if trainer == "alone-long":
        return Work(images * sites, sites)
    if trainer in WITHOUT_TRAINING:
        return Work(0.1 * images, 1)  # the time goes into images, and into what of it features know already
    counts = {
        "federated": configured.rounds * sites,
        "scaffold": config.chain.epochs * sites,
        "cyclic": configured.arm.laps * sites,
        "union": 1,
    }
    return Work(images, counts.get(trainer, sites))
