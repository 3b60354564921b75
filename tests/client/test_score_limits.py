"""Exact scores: of enough cases, for not too many models, and their sums of confidences rounded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from small_tables import make

from chainward_client import limits as limits_module
from chainward_client.app import app
from chainward_client.limits import FILE, KEPT_DAYS, admit_model, coarse
from chainward_client.site_config import ScoreLimits
from chainward_shared.errors import StoreError
from chainward_shared.evaluation.classification import PredictionCounts, check_scores, counts_from_arrays
from chainward_shared.models import Architecture, build_model
from chainward_shared.protocol import EvaluateResult, EvaluateTask, pack, unpack
from chainward_shared.weights import digest, to_arrays

VIT = {"img_size": 8, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3}
MODEL = Architecture(name="vit_tiny_patch16_224", num_classes=2, in_chans=1, image_size=8, options=VIT)


def hospital(folder: Path, tested: int, scores: dict | None = None) -> dict[str, str]:
    """Write a hospital without a privacy policy that has so many test cases."""
    rows = [f"{('healthy', 'ill')[n % 2]},p{n},{'train' if n >= tested else 'test'}," for n in range(tested + 4)]
    site = {"site": "ash", "data": make(folder, rows, site=None), "state": "state"}
    (folder / "site.yaml").write_text(yaml.safe_dump(site if scores is None else site | {"scores": scores}))
    return {"site-config": str(folder / "site.yaml")}


def asked(node_config: dict[str, str], seed: int = 0, run: str = "r", **changes):
    state = build_model(MODEL, seed).state_dict()
    fields = {"run_id": run, "splits": ["test"], "threads": 1, "digest": digest(state)} | changes
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    content = pack(EvaluateTask(architecture=MODEL, **fields), {"model": to_arrays(state)})
    message = Message(content, dst_node_id=7, message_type="evaluate", ttl=3600.0)
    context = Context(run_id=1, node_id=7, node_config=dict(node_config), state=RecordDict(), run_config={})
    return unpack(app(message, context).content, EvaluateResult)


@pytest.mark.parametrize(
    ("tested", "scores", "release"),
    [
        (1, None, "withhold"),
        (9, None, "withhold"),
        (10, None, "exact"),
        (1, {"min_cases": 1}, "exact"),
        (10, {"min_cases": 11}, "withhold"),
    ],
)
def test_exact_scores_of_fewer_cases_than_the_site_allows_are_withheld(tmp_path, tested, scores, release):
    result, arrays = asked(hospital(tmp_path, tested, scores))
    assert result.release == release
    assert bool(result.scores) == bool(arrays) == (release == "exact")


def test_a_split_without_cases_tells_nothing_and_is_no_reason_to_withhold(tmp_path):
    result, _ = asked(hospital(tmp_path, 10), splits=["val", "test"])
    assert (result.release, result.scores["val"].n, result.scores["test"].n) == ("exact", 0, 10)


def test_where_attention_is_scored_the_test_split_counts_too(tmp_path):
    result, _ = asked(hospital(tmp_path, 3), splits=["val"], localisation=True)
    assert result.release == "withhold"


def test_a_model_beyond_the_limit_of_a_run_or_a_day_is_not_scored(tmp_path):
    node = hospital(tmp_path, 10, {"per_run": 2, "per_day": 3})
    told = [
        asked(node, seed, run)[0].release for run, seed in [("a", 0), ("a", 1), ("a", 2), ("a", 0), ("b", 3), ("b", 4)]
    ]
    assert told == ["exact", "exact", "withhold", "exact", "exact", "withhold"]


def test_the_sums_of_confidences_are_rounded_and_the_scores_follow_from_them(tmp_path):
    result, arrays = asked(hospital(tmp_path, 12))
    counts = counts_from_arrays(arrays["counts_test"], 2)
    sums = counts.calibration[:, 1]
    assert sums.sum() > 0
    np.testing.assert_array_equal(sums, np.round(sums, 2))
    check_scores(result.scores["test"], counts)


def test_rounding_changes_nothing_else():
    generator = np.random.default_rng(0)
    counts = PredictionCounts.of(generator.dirichlet([1, 1, 1], 40), generator.integers(0, 3, 40))
    rounded = coarse(counts)
    assert np.abs(rounded.calibration - counts.calibration).max() <= 0.005
    assert not np.array_equal(rounded.calibration, counts.calibration)
    np.testing.assert_array_equal(rounded.calibration[:, [0, 2]], counts.calibration[:, [0, 2]])
    assert rounded.confusion is counts.confusion
    assert rounded.histograms is counts.histograms


def test_days_and_runs_are_counted_each_for_itself_and_old_days_forgotten(tmp_path, monkeypatch):
    day = ["2026-01-01"]
    monkeypatch.setattr(limits_module, "_today", lambda: day[0])
    limits = ScoreLimits(per_run=3, per_day=2)
    assert [admit_model(tmp_path, "a", f"m{n}", limits) for n in range(3)] == [True, True, False]
    day[0] = "2026-01-02"
    assert [admit_model(tmp_path, "a", f"n{n}", limits) for n in range(2)] == [True, False], "the run's own limit"
    assert admit_model(tmp_path, "b", "m0", limits)
    for number in range(KEPT_DAYS):
        day[0] = f"2027-01-{number + 1:02d}"
        assert admit_model(tmp_path, f"run-{number}", "m", limits)
    assert "2026" not in (tmp_path / FILE).read_text()


def test_processes_that_ask_at_the_same_time_are_counted_together(tmp_path):
    limits = ScoreLimits(per_run=5, per_day=100)
    with ThreadPoolExecutor(8) as pool:
        admitted = list(pool.map(lambda n: admit_model(tmp_path, "r", f"m{n}", limits), range(20)))
    assert sum(admitted) == 5


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"day": "x"}]', "[[]]"])
def test_a_damaged_count_lets_no_scores_out(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(StoreError, match="damaged"):
        admit_model(tmp_path, "r", "m", ScoreLimits())
