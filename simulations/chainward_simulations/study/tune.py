"""The search for settings of the chain with Optuna, on the validation images of seed 0; test images are not even there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from chainward_client.data.site_data import SiteData
from chainward_shared.config import ConfigScalar, RunConfig
from chainward_shared.console import PlainConsole
from chainward_shared.errors import ChainwardError, StudyError
from chainward_shared.seeds import derive_seed
from chainward_simulations import runner
from chainward_simulations.study.configured_arms import ConfiguredArm, configure_arms
from chainward_simulations.study.progress import StudyProgress
from chainward_simulations.study.settings import Goal
from chainward_simulations.study.store import write_output
from chainward_simulations.study.training import Bench, chain_work, train_chain
from chainward_simulations.study.workers import Event, Report, Step, Tried, Workers, open_sites

SEED = 0
_NAME = "chain"
_JOURNAL, _SUMMARY = "tuning.log", "tuning.json"


SPACE: dict[str, FloatDistribution] = {
    "chain.learning-rate": FloatDistribution(1e-4, 1e-2, log=True),
    "chain.distillation-weight": FloatDistribution(0.05, 0.95),
    "chain.temperature": FloatDistribution(1.0, 10.0, log=True),
    "chain.temperature-decay": FloatDistribution(0.7, 1.0),
    "chain.attention-weight": FloatDistribution(0.0, 3.0),
}
"""Where settings are searched."""


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes
    ----------
    settings : the best trial's
    value : the objective with them, on the validation images
    before : the objective with the settings that the study was given; None if they could not be trained
    trials : finished trials
    """

    settings: dict[str, ConfigScalar]
    value: float
    before: float | None
    trials: int
    objective: Goal

    def as_set(self) -> str:
        """Return the settings as they are typed after ``--set``."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


@dataclass(frozen=True)
class TrialUnit:
    """One trial: a chain with some settings, trained and scored on validation images by a worker."""

    number: int
    configured: ConfiguredArm
    objective: Goal

    def run(self, folder: Path, report: Report) -> None:
        """Train and score; a chain that can't be trained (its loss is not finite, say) has no value."""
        config = self.configured.config
        sites = without_test(open_sites(config))
        work = chain_work(self.configured, len(sites))

        def on_step(what: str) -> None:
            report(Step(f"trial {self.number + 1}", config.seed, what, work.per_training))

        try:
            with tempfile.TemporaryDirectory(prefix="chainward-study-") as state_dir:
                chain = train_chain(self.configured, Bench(sites, train_chain, on_step, Path(state_dir)))
            _, pooled = runner.score(chain.model, chain.architecture, sites, config, "val")
        except ChainwardError as error:
            report(Tried(self.number, None, str(error)))
            return
        value = pooled.balanced_accuracy if self.objective == "balanced-accuracy" else pooled.macro_auc
        reason = "the validation images don't allow this objective" if value is None else ""
        report(Tried(self.number, value, reason))


def without_test(sites: Mapping[str, SiteData]) -> dict[str, SiteData]:
    """Return the sites with an empty test split: what is not there can't be looked at."""
    return {
        name: replace(data, splits={**data.splits, "test": data.splits["test"].take([])})
        for name, data in sites.items()
    }


def tune(
    base: Mapping[str, ConfigScalar],
    trials: int,
    objective: Goal,
    folder: Path,
    jobs: int,
    sites: int,
    console: PlainConsole,
) -> Tuned:
    """Search the chain's settings until there are `trials` finished trials, those of an earlier search counted.

    The first trial has the settings that were given. Trials that run side by side are drawn without knowing of each other's
    results, so a search depends on `jobs`.

    Raises
    ------
    StudyError
        The search's file is damaged or of another search, or no trial could be trained.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    given = RunConfig.from_flat({**base, "seed": SEED})
    study = _open_study(folder / _JOURNAL, objective)
    as_given = _within_space(given.to_flat())
    if not _finished(study) and not any(trial.state == TrialState.WAITING for trial in study.trials):
        study.enqueue_trial(as_given)
    missing = trials - len(_finished(study))
    if missing > 0:
        _search(study, base, objective, missing, folder, jobs, sites, console)
    finished = _finished(study)
    valued = [trial for trial in finished if trial.value is not None and trial.state == TrialState.COMPLETE]
    if not valued:
        reason = finished[0].user_attrs.get("reason", "") if finished else "none was finished"
        raise StudyError(f"--tune: no trial could be trained: {reason}")
    best = max(valued, key=lambda trial: trial.value or 0.0)
    before = finished[0].value if as_given == _settings(finished[0]) else None
    tuned = Tuned(_settings(best), best.value or 0.0, before, len(finished), objective)
    _write_summary(folder / _SUMMARY, tuned, finished)
    return tuned


def _open_study(file: Path, objective: Goal) -> optuna.Study:
    damaged = f"{file}: the file of the search for settings is damaged"
    advice = "start anew with --fresh or name another --out"
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))),
            study_name=_NAME,
            direction="maximize",
            load_if_exists=True,
        )
        stored = study.user_attrs.get("objective")
        list(study.trials)
    except OSError as error:
        raise StudyError(f"{file}: can't be written ({error.strerror or error})") from error
    except Exception as error:  # whatever Optuna stumbles over in a foreign file
        raise StudyError(f"{damaged} ({' '.join(str(error).split())[:120]}); {advice}") from error
    if stored is None and not study.trials:
        study.set_user_attr("objective", objective)
    elif stored != objective:
        raise StudyError(f"{file}: the search there has objective {stored!r}, not {objective!r}; {advice}")
    return study


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return [trial for trial in study.trials if trial.state in (TrialState.COMPLETE, TrialState.FAIL)]


def _search(
    study: optuna.Study,
    base: Mapping[str, ConfigScalar],
    objective: Goal,
    missing: int,
    folder: Path,
    jobs: int,
    sites: int,
    console: PlainConsole,
) -> None:
    images = chain_work(_configured(base, {}), sites).images
    values: dict[int, Tried] = {}
    with StudyProgress(console, missing, missing * images, what="trials") as progress:

        def on_event(event: Event) -> None:
            if isinstance(event, Tried):
                values[event.number] = event
            progress.on_event(event)

        with Workers(min(jobs, missing), folder, on_event) as workers:
            while missing > 0:
                # Named by what is finished: a search that was interrupted goes on with draws of its own.
                study.sampler = optuna.samplers.TPESampler(
                    seed=derive_seed(SEED, "study", "tuning", len(study.trials)) % 2**32, n_startup_trials=8
                )
                asked = [study.ask({**SPACE}) for _ in range(min(jobs, missing))]
                workers.run(
                    [TrialUnit(trial.number, _configured(base, _settings(trial)), objective) for trial in asked]
                )
                for trial in asked:
                    tried = values[trial.number]
                    if tried.value is None:
                        trial.set_user_attr("reason", tried.reason)
                        study.tell(trial, state=TrialState.FAIL)
                    else:
                        study.tell(trial, tried.value)
                missing -= len(asked)


def _configured(base: Mapping[str, ConfigScalar], settings: Mapping[str, ConfigScalar]) -> ConfiguredArm:
    (configured,) = configure_arms(["chain"], [], {**base, **settings}, SEED)
    return configured


def _within_space(flat: Mapping[str, ConfigScalar]) -> dict[str, float]:
    """Return the given settings that the search can try."""
    given = {key: float(f"{float(flat[key]):.4g}") for key in SPACE}
    return {key: value for key, value in given.items() if SPACE[key].low <= value <= SPACE[key].high}


def _settings(trial: optuna.Trial | FrozenTrial) -> dict[str, ConfigScalar]:
    """Return the trial's settings, in four digits: what is trained is what is printed."""
    return {key: float(f"{trial.params[key]:.4g}") for key in SPACE}


def _write_summary(file: Path, tuned: Tuned, finished: list[FrozenTrial]) -> None:
    summary = {
        "schema": 1,
        "objective": tuned.objective,
        "split": "val",
        "seed": SEED,
        "settings": tuned.settings,
        "set": tuned.as_set(),
        "value": tuned.value,
        "value_before": tuned.before,
        "trials": [
            {"settings": _settings(trial), "value": trial.value, "reason": trial.user_attrs.get("reason")}
            for trial in finished
        ],
    }
    write_output(file, (json.dumps(summary, indent=1) + "\n").encode())
