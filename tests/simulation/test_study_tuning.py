"""The search for settings: on validation images alone, continued, and refused where its file is damaged."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO

import pytest

from chainward_client.data.scale import Scale
from chainward_client.data.site_data import PrivilegedSetup, SiteData
from chainward_shared.config import RunConfig
from chainward_shared.console import PlainConsole
from chainward_shared.errors import StudyError
from chainward_shared.preparation import Preparation
from chainward_simulations import runner
from chainward_simulations.runner import open_sites
from chainward_simulations.study import workers
from chainward_simulations.study.study import StudyRequest, run_study
from chainward_simulations.study.tune import tune, without_test


@pytest.fixture
def base(small_consortium) -> dict:
    """Settings of a chain that is trained in half a second."""
    return {
        "data.source": str(small_consortium),
        "federation.sites": "ash,birch",
        "chain.backbone": "test_convnext",
        "chain.epochs": 1,
        "chain.batch-size": 16,
        "federation.precision": "fp32",
        "federation.threads": 1,
    }


@pytest.fixture(autouse=True)
def _open_anew():
    workers._opened.cache_clear()
    yield
    workers._opened.cache_clear()


def search(base, folder, trials=2, objective="balanced-accuracy"):
    folder.mkdir(exist_ok=True)
    return tune(base, trials, objective, folder, 1, 2, PlainConsole(file=StringIO()))


def with_test_split(sites, change):
    return {
        name: dataclasses.replace(data, splits={**data.splits, "test": change(data.splits["test"])})
        for name, data in sites.items()
    }


def test_a_site_without_its_test_images_is_otherwise_the_same(base):
    """Whatever a site's data hold: its task, teachers and patient ids decide what is trained."""
    (data, *_) = open_sites(RunConfig.from_flat(base)).values()
    other = {
        "synthetic": True,
        "notes": ("a note",),
        "task": "multilabel",
        "privileged": PrivilegedSetup(label_words=("tumour",)),
        "has_patient_ids": False,
        "key": b"x" * 32,
        "left_out": ("row 7: no image",),
        "scale": Scale(0, 4095),
        "preparation": Preparation(fit="crop"),
    }
    assert other.keys() | {"site", "classes", "splits"} == {field.name for field in dataclasses.fields(SiteData)}
    changed = dataclasses.replace(data, **other)
    (bare,) = without_test({"ash": changed}).values()
    assert len(bare.splits["test"]) == 0
    assert len(data.splits["test"]) > 0
    assert bare.splits["train"] is changed.splits["train"]
    assert dataclasses.replace(bare, splits=changed.splits) == changed


@pytest.mark.slow
@pytest.mark.parametrize("poison", ["other labels", "no test images"])
def test_the_search_never_looks_at_the_test_images(base, tmp_path, monkeypatch, poison):
    before = search(base, tmp_path / "before")
    workers._opened.cache_clear()

    def poisoned(cases):
        if poison == "no test images":
            return cases.take([])
        return dataclasses.replace(cases, labels=(cases.labels + 1) % 3, images=255 - cases.images)

    monkeypatch.setattr(runner, "open_sites", lambda config: with_test_split(open_sites(config), poisoned))
    assert search(base, tmp_path / "after") == before


@pytest.mark.slow
def test_the_search_does_look_at_the_validation_images(base, tmp_path, monkeypatch):
    before = search(base, tmp_path / "before", trials=1)
    workers._opened.cache_clear()

    def other(config):
        return {
            name: dataclasses.replace(
                data,
                splits={
                    **data.splits,
                    "val": dataclasses.replace(data.splits["val"], labels=(data.splits["val"].labels + 1) % 3),
                },
            )
            for name, data in open_sites(config).items()
        }

    monkeypatch.setattr(runner, "open_sites", other)
    assert search(base, tmp_path / "after", trials=1).value != before.value


@pytest.mark.slow
def test_the_search_starts_with_the_settings_as_given_and_goes_on_where_it_stopped(base, tmp_path):
    first = search(base, tmp_path / "study", trials=1)
    assert first.before == first.value
    assert first.settings["chain.temperature"] == 4.0
    more = search(base, tmp_path / "study", trials=3)
    assert more.trials == 3
    assert more.before == first.value
    assert more.value >= first.value
    summary = json.loads((tmp_path / "study" / "tuning.json").read_text())
    assert summary["split"] == "val"
    assert summary["trials"][0]["value"] == first.value
    assert summary["set"] == more.as_set()
    assert summary["trials"][1]["settings"] != summary["trials"][2]["settings"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["nonsense\n" * 3, '{"op_code": 77}\n', '{"op_code": 0}\n{"op_code"'])
def test_a_damaged_file_of_a_search_is_one_line(base, tmp_path, damage):
    search(base, tmp_path / "study", trials=1)
    (tmp_path / "study" / "tuning.log").write_text(damage)
    with pytest.raises(StudyError, match=r"tuning\.log") as refused:
        search(base, tmp_path / "study", trials=1)
    assert "\n" not in str(refused.value)


def test_a_search_does_not_go_on_with_another_objective(base, tmp_path):
    search(base, tmp_path / "study", trials=1)
    with pytest.raises(StudyError, match="has objective 'balanced-accuracy', not 'macro-auc'"):
        search(base, tmp_path / "study", trials=2, objective="macro-auc")


@pytest.mark.slow
def test_arms_are_trained_with_what_the_search_found(base, tmp_path):
    request = StudyRequest(base, ["chain"], (), [3], folder=tmp_path / "study", jobs=1, tune=2)
    report = run_study(request, PlainConsole(file=StringIO()))
    (arm,) = report.result.arms
    with_found = StudyRequest({**base, **report.tuned.settings}, ["chain"], (), [3], folder=tmp_path / "other", jobs=1)
    (same,) = run_study(with_found, PlainConsole(file=StringIO())).result.arms
    assert arm.records[0].digest == same.records[0].digest
    assert arm.records[0].pooled == same.records[0].pooled
