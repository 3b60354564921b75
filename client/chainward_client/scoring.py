"""The answer to a request for scores: as they are, with noise, or none, as the site's policy says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from torch import nn

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.entropy import Entropy
from chainward_client.evaluation import class_probabilities, localisation_values
from chainward_client.limits import admit_model, coarse, too_few_cases
from chainward_client.policy import check_scale
from chainward_client.private_site import PrivateSite
from chainward_client.request_check import check_architecture, incoming_state
from chainward_client.site import OpenSite
from chainward_client.store import SiteStore
from chainward_client.training.features import Features
from chainward_shared.errors import SpentError
from chainward_shared.evaluation.classification import PredictionCounts, counts_to_arrays, evaluate, pool
from chainward_shared.evaluation.localisation import LocalisationSums
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import build_model
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.protocol import EvaluateResult, EvaluateTask, pack
from chainward_shared.summands import counts_in, counts_summand

Counts = dict[str, PredictionCounts]
"""Of each split."""


def scored(task: EvaluateTask, arrays: dict[str, ArrayRecord], site: OpenSite) -> RecordDict:
    """Return the answer: scores as they are, with noise, or none."""
    result, counts = scores_and_counts(task, arrays, site)
    return pack(result, {f"counts_{split}": counts_to_arrays(of_split) for split, of_split in counts.items()})


def scores_and_counts(
    task: EvaluateTask, arrays: dict[str, ArrayRecord], site: OpenSite
) -> tuple[EvaluateResult, Counts]:
    """Return the scores as they are, with noise, or none, and the counts of each split that they follow from."""
    release = "exact" if site.policy is None else site.policy.metrics
    if release == "withhold" or (release == "noised" and not task.splits):
        return EvaluateResult(site=site.site, scores={}, release="withhold"), {}
    check_architecture(task.architecture, site.described, any_size=True)
    if release == "noised":
        return _noised_scores(task, site, arrays)
    model = scored_model(task, arrays, site)
    if site.scores is not None and (
        too_few_cases(site.data, task, site.scores)
        or not admit_model(site.state_dir, task.run_id, task.digest, site.scores)
    ):
        return EvaluateResult(site=site.site, scores={}, release="withhold"), {}
    return exact_scores(task, site.data, model, site.features, rounded=site.scores is not None)


def exact_scores(
    task: EvaluateTask, data: SiteData, model: nn.Module, features: Features | None = None, *, rounded: bool = False
) -> tuple[EvaluateResult, Counts]:
    """Return the scores as they are, and the counts of each split that they follow from; `rounded`: `coarse` ones.

    `features`: where the output of a frozen trunk is kept; None: nowhere.
    """
    scores: dict[str, Scores] = {}
    counts: Counts = {}
    size = task.architecture.image_size
    for split in task.splits:
        cases = data.splits[split]
        probabilities = class_probabilities(
            model, cases, len(data.classes), task.threads, image_size=size, features=features
        )
        labels = cases.labels.numpy()
        scores[split] = evaluate(probabilities, labels)
        counts[split] = PredictionCounts.of(probabilities, labels)
        if rounded:
            counts[split] = coarse(counts[split])
            scores[split] = scores[split].model_copy(update={"ece": pool([counts[split]]).ece})
    values = None
    if task.localisation:
        values = localisation_values(model, data.splits["test"], task.threads, image_size=size)
    sums = None if values is None else LocalisationSums.of(values)
    return EvaluateResult(site=data.site, scores=scores, localisation=sums), counts


def noised_scores(
    task: EvaluateTask, data: SiteData, privacy: PrivateSite, model: nn.Module, features: Features | None = None
) -> tuple[EvaluateResult, Counts]:
    """Return scores of counts with noise, and the counts; the release must have been charged before."""
    if privacy.policy.unit == "patient":
        data = replace(data, splits={split: one_image_each(cases) for split, cases in data.splits.items()})
    _, exact = exact_scores(task.model_copy(update={"localisation": False}), data, model, features)
    counts = {split: noised(of_split, privacy.policy, privacy.entropy) for split, of_split in exact.items()}
    scores = {split: pool([of_split]) for split, of_split in counts.items()}
    return EvaluateResult(site=data.site, scores=scores, release="noised"), counts


def _noised_scores(task: EvaluateTask, site: OpenSite, arrays: dict[str, ArrayRecord]) -> tuple[EvaluateResult, Counts]:
    """Return scores with noise, charged to the ledger; the stored ones where the same was asked before."""
    privacy = site.open_privacy()
    assert privacy is not None
    if task.seen_head is not None:
        privacy.ledger.require(task.seen_head)
    work, store = privacy.work(task.run_id, task.hop), SiteStore(site.state_dir, task.run_id)
    answer = store.load_answer(task, EvaluateResult)
    if answer is None:
        model, data = scored_model(task, arrays, site), site.data
        check_scale(measured=data.scale is not None)
        if not work.release():
            return EvaluateResult(site=site.site, scores={}, release="withhold"), {}
        try:
            result, counts = noised_scores(task, data, privacy, model, site.features)
        except Exception as error:
            raise SpentError(f"scoring failed after its release was charged: {error}") from error
        answer = result, counts_summand(counts)
        store.save_answer(task, *answer)
    result, stored = answer
    return result.model_copy(update={"statement": work.statement()}), counts_in(stored, task)


def one_image_each(cases: Cases) -> Cases:
    """Return the first image of each patient: what a patient adds to a noised release must not grow with the images."""
    _, first = np.unique(cases.patients, return_index=True)
    return cases.take(np.sort(first))


def noised(counts: PredictionCounts, policy: PrivacyPolicy, entropy: Entropy) -> PredictionCounts:
    """Return the counts with a confusion matrix that one release with Laplace noise covers, and nothing else.

    One case adds 1 to one cell, or, multi-label, to one cell for each finding: that is the sensitivity (Dwork et al. 2006),
    and the noise has this scale over ``metrics_epsilon``. Rounding and cutting below zero are post-processing. Histograms
    and calibration have too many cells for noise to leave anything of them; they are zero.

    Parameters
    ----------
    counts : of one image for each unit. Splits share no patient, so that one charge covers the counts of several
    """
    assert policy.metrics_epsilon is not None
    cells_of_a_case = 1 if counts.confusion.ndim == 2 else len(counts.confusion)
    noise = laplace(counts.confusion.size, cells_of_a_case / policy.metrics_epsilon, entropy)
    confusion = np.rint(counts.confusion + noise.reshape(counts.confusion.shape)).clip(min=0).astype(np.int64)
    return PredictionCounts(confusion, np.zeros_like(counts.calibration), np.zeros_like(counts.histograms))


def laplace(n: int, scale: float, entropy: Entropy) -> np.ndarray:
    """Return `n` draws of Laplace noise, float64 (n,): the difference of two exponential ones."""
    first, second = (-np.log1p(-entropy.uniform(n)) for _ in range(2))
    noise: np.ndarray = scale * (first - second)
    return noise


@dataclass(frozen=True)
class _Held:
    """A model, and what it came as: of which architecture, with which digest, in which bytes.

    In a simulation one process is many hospitals, and each is asked to score the same model in turn. Building it and checking
    what came takes longer than a small hospital's images do, so what a process has checked last it recognises by its bytes.
    """

    architecture: str
    digest: str
    sent: Mapping[str, bytes]
    model: nn.Module


_last: _Held | None = None


def scored_model(task: EvaluateTask, arrays: Mapping[str, ArrayRecord], site: OpenSite) -> nn.Module:
    """Return the model that a task is about, on the CPU. It is the process's own: look at it, and don't change it.

    Raises
    ------
    ProtocolError, WeightsError
        As `incoming_state`.
    """
    global _last
    architecture, base = task.architecture.model_dump_json(), site.bases.load(task.architecture)
    record = arrays.get("model")
    sent = {name: array.data for name, array in record.items()} if record is not None else {}
    held = _last if _last is not None and _last.architecture == architecture else None
    if held is not None and sent and (held.digest, held.sent) == (task.digest, sent):
        return held.model
    state = incoming_state(record, "model", task.architecture, task.digest, base)
    model = build_model(task.architecture) if held is None else held.model
    _last = None
    model.load_state_dict(state)
    _last = _Held(architecture, task.digest, sent, model)
    return model
