"""A final model class by class: what the report says of it, and what it must not claim."""

from __future__ import annotations

import numpy as np
import pytest

from chainward_server.by_class import by_class, model_record
from chainward_server.report import class_rows
from chainward_server.report.formats import threshold
from chainward_server.report.page import render_report
from chainward_server.results import (
    AloneRecord,
    ByClass,
    DataSummary,
    LinkMetrics,
    Results,
    SiteScores,
    SiteSummary,
    named,
)
from chainward_server.scoring import Counted
from chainward_shared.errors import ModelError
from chainward_shared.evaluation.classification import PredictionCounts, evaluate
from chainward_shared.evaluation.intervals import wilson
from chainward_shared.evaluation.scores import Scores
from chainward_shared.model_record import ModelRecord
from chainward_shared.models import resolve_architecture
from chainward_shared.preparation import Preparation
from chainward_shared.privacy.record import PrivacyRecord

CLASSES = ["normal", "mass", "rare <b>"]
SITES = ["ash", "birch"]


def case_counts(n: int, *, rare: int = 12, seed: int = 0, task: str = "single") -> tuple[PredictionCounts, Scores]:
    """A model that misses most of the normal images, as a chain with balanced accuracy 0.43 did."""
    generator = np.random.default_rng(seed)
    labels = np.array([0] * (n // 2) + [1] * (n - n // 2 - rare) + [2] * rare)
    logits = generator.normal(0, 1, (n, 3))
    logits[np.arange(n), labels] += 1.5
    logits[:, 0] -= 2.5
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = (np.eye(3)[labels]).astype(np.float32) if task == "multilabel" else labels
    return PredictionCounts.of(shares, truth), evaluate(shares, truth)


def counted(*sites: str, n: int = 200, noised: tuple[str, ...] = (), **more) -> Counted:
    found = Counted()
    for index, site in enumerate(sites):
        counts, scores = case_counts(n, seed=index, **more)
        if site in noised:
            counts = PredictionCounts(counts.confusion, counts.calibration * 0, counts.histograms * 0)
        found.counts[site], found.scores[site] = counts, scores
    return found


def results(found: ByClass | None, test: Counted, **fields) -> Results:
    data = DataSummary(
        source="ward/data.yaml",
        synthetic=False,
        classes=CLASSES,
        image_size=32,
        channels=1,
        sites=[SiteSummary(site=site, train=9, val=9, test=9, preparation=Preparation(fit="crop")) for site in SITES],
    )
    content = {"run_id": "r", "seed": 0, "data": data, "final": {"chain": test.site_scores}}
    return Results(**content | ({} if found is None else {"by_class": {"chain": found}}) | fields)


def page(of: Results) -> str:
    privacy = PrivacyRecord.model_validate({"mode": "off", "statement": "none", "sites": {}})
    html = render_report(of, status="finished", reason=None, config={}, privacy=privacy, started="x", finished=None)
    return " ".join(html.split())


def test_each_class_is_reported_with_its_sensitivity_and_specificity_and_their_intervals(drawn):
    validation, test = counted(*SITES), counted(*SITES, n=220)
    of = results(by_class({"val": validation, "test": test}, 3), test)
    html = page(of)
    confusion = sum(counts.confusion for counts in test.counts.values())
    found, cases = int(confusion[0, 0]), int(confusion[0].sum())
    low, high = wilson(found, cases)
    assert found / cases < 0.4, "the model misses most of the normal images"
    assert f"{found / cases:.3f}<small>{low:.2f} to {high:.2f}</small>" in html
    point = of.by_class["chain"].points[0]
    at_point = of.by_class["chain"].pooled[0].at_point
    assert at_point.sensitivity > 0.6, "its operating point finds them"
    assert f"{threshold(point.threshold)}</td>" in html and f"{at_point.sensitivity:.3f}<small>" in html
    assert "rare &lt;b&gt;" in html and "rare <b>" not in html
    for site in SITES:
        alone = of.by_class["chain"].sites[site][0].at_point
        assert f"{alone.sensitivity:.3f} ({alone.cases})<small>{alone.specificity:.3f}</small>" in html
    assert html.count("<svg") >= 5, "reliability, and a decision curve for each class"


@pytest.mark.parametrize("task", ["single", "multilabel"])
def test_pooled_figures_are_sums_over_the_sites(task):
    test = counted(*SITES, task=task)
    found = by_class({"val": counted(*SITES, task=task), "test": test}, 3)
    for k, pooled in enumerate(found.pooled):
        for kind in ("decided", "at_point"):
            parts = [getattr(scores[k], kind) for scores in found.sites.values()]
            for count in ("cases", "others", "found", "cleared"):
                assert getattr(getattr(pooled, kind), count) == sum(getattr(part, count) for part in parts)
    recalls = [scores.decided for scores in found.pooled]
    halves = [t.sensitivity if task == "single" else (t.sensitivity + t.specificity) / 2 for t in recalls]
    assert np.mean(halves) == pytest.approx(test.site_scores.pooled.balanced_accuracy)


def test_a_class_with_too_few_cases_is_called_so_on_top_and_in_its_row():
    test = counted("ash", rare=4)
    of = results(by_class({"val": counted("ash", rare=4), "test": test}, 3), test)
    html = page(of)
    assert "4 test images, 196 of others. Too few to say" in html
    assert "nothing can be said: rare &lt;b&gt; (4)" in html
    assert "No operating point of rare &lt;b&gt;: 4 validation images of the class" in html
    assert "no counts of birch (withheld, or not reached)" in html


def test_scores_with_noise_choose_no_operating_point_and_the_report_says_why():
    test = counted(*SITES, noised=("ash", "birch"))
    of = results(by_class({"val": counted(*SITES, noised=("ash", "birch")), "test": test}, 3), test)
    html = page(of)
    assert "no calibration: 0 validation images whose scores may be seen" in html
    assert all(scores.at_point is None for scores in of.by_class["chain"].pooled)
    assert of.by_class["chain"].pooled[0].decided.cases > 0


def test_without_counts_the_report_says_so_and_stands():
    html = page(results(None, counted(*SITES)))
    assert "nothing class by class: the run kept no counts" in html
    withheld = by_class({"val": Counted(), "test": Counted()}, 3)
    assert "no counts of test images could be seen" in page(results(withheld, Counted()))


def test_the_intervals_of_ten_cases_are_wide():
    test = counted("ash", n=30, rare=10)
    of = results(by_class({"val": counted("ash"), "test": test}, 3), test)
    low, high = class_rows.interval_of(of, "chain", "ash")
    assert high - low > 0.2
    assert low < test.scores["ash"].balanced_accuracy < high


def test_better_than_every_hospital_is_taken_back_in_the_same_sentence_where_the_small_print_would():
    def site_scores(pooled: float, ash: float, birch: float) -> SiteScores:
        def one(value: float) -> Scores:
            return Scores(n=50, accuracy=value, balanced_accuracy=value, macro_auc=value, ece=0.1)

        return SiteScores(sites={"ash": one(ash), "birch": one(birch)}, pooled=one(pooled))

    def alone(site: str, value: float, own: float) -> AloneRecord:
        metrics = LinkMetrics(
            test=site_scores(value, own, own),
            validation=Scores(n=0, accuracy=None, balanced_accuracy=None, macro_auc=None, ece=None),
        )
        return AloneRecord(site=site, status="done", seconds=1.0, metrics=metrics)

    of = results(None, counted(*SITES), alone=[alone("ash", 0.5, 0.9), alone("birch", 0.5, 0.4)])
    of.final["chain"] = site_scores(0.7, 0.6, 0.6)
    assert "better than every hospital alone, and on their own images 1 of 2 do better with their own model" in page(of)
    of.data.sites[0].class_counts = {"test": [5, 5, 5]}
    of.final["chain"] = site_scores(0.52, 0.95, 0.6)
    assert "better than every hospital alone, by less than these test images can tell" in page(of)


def test_a_models_record_survives_its_file_and_a_damaged_one_is_refused():
    architecture = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32, patch_size=0)
    of = results(by_class({"val": counted(*SITES), "test": counted(*SITES)}, 3), counted(*SITES))
    record = model_record("r", "chain", architecture, of.data, of.by_class["chain"])
    assert ModelRecord.from_metadata(record.to_metadata()) == record
    assert record.preparation == Preparation(fit="crop")
    assert ModelRecord.from_metadata({}) is None
    for damaged in ('{"version": 2}', "not JSON", record.model_dump_json().replace('"crop"', '"fold"')):
        with pytest.raises(ModelError, match=r"'chainward.record' is damaged"):
            ModelRecord.from_metadata({"chainward.record": damaged})


@pytest.mark.parametrize(
    ("source", "name"), [("/data/ward/data.yaml", "ward/data.yaml"), ("/cases.yaml", "cases.yaml")]
)
def test_data_are_named_by_their_folder_too_since_most_files_are_called_alike(source, name):
    assert named(source) == name


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (0.25, "0.250"), (0.00001, "0.000010"), (0.99999, "0.999990")]
)
def test_a_threshold_is_told_apart_from_never_and_always(value, shown):
    assert threshold(value) == shown
