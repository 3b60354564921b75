"""What a study found, put together from its records: for the table, the picture, and scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from chainward_shared.errors import StudyError
from chainward_shared.evaluation.scores import Scores
from chainward_simulations.study.configured_arms import ConfiguredArm
from chainward_simulations.study.predictions import Predictions, load_predictions
from chainward_simulations.study.records import ArmRecord
from chainward_simulations.study.statistics import COMPARED, Difference, Metric, PairedBootstrap, Spread, spread
from chainward_simulations.study.store import StudyFolder

FEWEST_CASES = 10
"""Test images of a class below which arms are not ranked: one image more or less right would be 10 points of its recall."""

METRICS = ("balanced_accuracy", "macro_auc", "accuracy", "ece")
Records = Mapping[str, tuple[ArmRecord, ...]]
"""What is finished of each arm, by seed."""


@dataclass(frozen=True)
class ArmResult:
    """One arm over its seeds.

    Attributes
    ----------
    same_as : an arm before it that is the same training in this study; None
    pooled, site_mean, validation, best : spread of each figure over the seeds; `best` only for arms of several models
    differences : to the reference arm, by figure
    over_best : to the best site alone, by figure
    """

    name: str
    about: str
    same_as: str | None
    records: tuple[ArmRecord, ...]
    pooled: Mapping[str, Spread | None]
    site_mean: Mapping[str, Spread | None]
    validation: Mapping[str, Spread | None]
    best: Mapping[str, Spread | None] | None
    localisation: Mapping[str, Spread | None]
    differences: Mapping[Metric, Difference]
    over_best: Mapping[Metric, Difference]
    latency_ms: float | None


@dataclass(frozen=True)
class Rarest:
    """The class that the fewest test images are of, of all seeds; multi-label: have."""

    name: str
    cases: int


@dataclass(frozen=True)
class StudyResult:
    """A study's arms, and what went wrong with others, by arm and seed.

    Attributes
    ----------
    reference : arm that the others are compared with; None: there is none
    alone : the arm out of which the best site comes; None: none of it is there
    rarest : None: no arm is finished
    """

    arms: tuple[ArmResult, ...]
    reference: str | None
    failures: tuple[tuple[str, int, str], ...]
    data_notes: tuple[str, ...] = ()
    alone: str | None = None
    rarest: Rarest | None = None

    @property
    def unranked(self) -> str | None:
        """Why the arms can't be ranked on their test images, in words; None where they can."""
        if self.rarest is None or self.rarest.cases >= FEWEST_CASES:
            return None
        return (
            f"no ranking: class '{self.rarest.name}' has {self.rarest.cases} test images, and balanced accuracy and macro AUC "
            f"give it as much weight as any other; with fewer than {FEWEST_CASES} differences between arms are not shown"
        )


def collect(
    folder: StudyFolder,
    configured: Sequence[ConfiguredArm],
    seeds: Sequence[int],
    reference: str | None,
    failures: Sequence[tuple[str, int, str]],
) -> StudyResult:
    """Return the results of these arms and seeds, as far as they are finished.

    Raises
    ------
    StudyError
        A file of predictions is damaged.
    """
    found = {arm.name: tuple(filter(None, (folder.record_of(arm.name, seed) for seed in seeds))) for arm in configured}
    records = {name: its for name, its in found.items() if its}
    every = [record for its in records.values() for record in its]
    rarest = min((_rarest(folder, record) for record in every), key=lambda one: one.cases, default=None)
    reference = reference if reference in records else None
    alone = next((name for name, its in records.items() if its[0].best), None)
    compared: dict[str, dict[Metric, Difference]] = {}
    over_best: dict[str, dict[Metric, Difference]] = {}
    if reference:
        compared = _compared(folder, records, reference, _predictions(folder, records[reference]))
    if alone:
        best = {seed: found.only(found.best) for seed, found in _predictions(folder, records[alone]).items()}
        over_best = _compared(folder, records, alone, best)
    latency = folder.state.latency_ms
    return StudyResult(
        tuple(
            _arm_result(arm, records, compared.get(arm.name, {}), over_best.get(arm.name, {}), latency)
            for arm in configured
            if arm.name in records
        ),
        reference,
        tuple(failures),
        tuple(dict.fromkeys(note for record in every for note in record.data_notes)),
        alone,
        rarest,
    )


def _rarest(folder: StudyFolder, record: ArmRecord) -> Rarest:
    index, cases = load_predictions(folder.path / "predictions" / record.predictions).rarest()
    return Rarest(record.classes[index] if index < len(record.classes) else str(index), cases)


def _compared(
    folder: StudyFolder, records: Records, reference: str, predictions: Mapping[int, Predictions]
) -> dict[str, dict[Metric, Difference]]:
    """Return the differences of all arms but `reference` to `predictions`, by seed."""
    bootstrap = PairedBootstrap(predictions)
    compared: dict[str, dict[Metric, Difference]] = {}
    first_of: dict[tuple[str, ...], str] = {}
    for name, its in records.items():
        if name != reference:
            twin = first_of.setdefault(tuple(record.digest for record in its), name)
            compared[name] = compared[twin] if twin != name else _differences(bootstrap, folder, its)
    return compared


def _predictions(folder: StudyFolder, records: Sequence[ArmRecord]) -> dict[int, Predictions]:
    return {record.seed: load_predictions(folder.path / "predictions" / record.predictions) for record in records}


def _differences(
    bootstrap: PairedBootstrap, folder: StudyFolder, records: Sequence[ArmRecord]
) -> dict[Metric, Difference]:
    predictions = _predictions(folder, records)
    try:
        found = {metric: bootstrap.difference(predictions, metric) for metric in COMPARED}
    except ValueError as error:
        raise StudyError(f"{folder.path}: arm '{records[0].arm}', {error}; run the study with --fresh") from error
    return {metric: difference for metric, difference in found.items() if difference is not None}


def _arm_result(
    arm: ConfiguredArm,
    records: Records,
    differences: Mapping[Metric, Difference],
    over_best: Mapping[Metric, Difference],
    latency_ms: Mapping[str, float],
) -> ArmResult:
    its = records[arm.name]
    same = next(name for name, others in records.items() if _digests(others) == _digests(its))
    best = [record.best.pooled for record in its if record.best]
    places = sorted({place for record in its for place in record.localisation or {}})
    return ArmResult(
        name=arm.name,
        about=arm.arm.about,
        same_as=None if same == arm.name else same,
        records=its,
        pooled=_spreads([record.pooled for record in its]),
        site_mean=_spreads([record.site_mean for record in its]),
        validation=_spreads([record.validation for record in its]),
        best=_spreads(best) if best else None,
        localisation={place: spread([(r.localisation or {}).get(place) for r in its]) for place in places},
        differences=differences,
        over_best=over_best,
        latency_ms=None if its[0].architecture is None else latency_ms.get(its[0].architecture.model_dump_json()),
    )


def _digests(records: Sequence[ArmRecord]) -> dict[int, str]:
    return {record.seed: record.digest for record in records}


def _spreads(scores: Sequence[Scores]) -> dict[str, Spread | None]:
    return {metric: spread([getattr(one, metric) for one in scores]) for metric in METRICS}


def results_json(result: StudyResult, folder: StudyFolder) -> bytes:
    """Return the results as JSON for scripts; `schema` counts the versions of this layout."""
    arms = {arm.name: TypeAdapter(ArmResult).dump_python(arm, mode="json", exclude={"name"}) for arm in result.arms}
    content = {
        "schema": 1,
        "folder": str(folder.path),
        "settings": folder.state.settings,
        "tuned": folder.state.tuned,
        "reference": result.reference,
        "arms": {name: {**arm, "over_best_site": arm.pop("over_best")} for name, arm in arms.items()},
        "best_site_of": result.alone,
        "rarest_class": None if result.rarest is None else asdict(result.rarest),
        "no_ranking": result.unranked,
        "data_notes": list(result.data_notes),
        "failures": [{"arm": arm, "seed": seed, "reason": reason} for arm, seed, reason in result.failures],
    }
    return (json.dumps(content, indent=1) + "\n").encode()
