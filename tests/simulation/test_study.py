"""A study as a whole: trained once, interrupted and continued, told apart, written down; and its command."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from in_process_run import equal, run_in_process
from typer.testing import CliRunner

from chainward_shared.config import RunConfig
from chainward_shared.console import PlainConsole
from chainward_shared.errors import ChainwardError, StudyError
from chainward_simulations.cli import app
from chainward_simulations.runner import open_sites, score
from chainward_simulations.study import training
from chainward_simulations.study.configured_arms import configure_arms
from chainward_simulations.study.predictions import load_predictions
from chainward_simulations.study.store import load_chain, save_chain
from chainward_simulations.study.study import StudyRequest, run_study
from chainward_simulations.study.training import Bench, train_arm, train_chain
from chainward_simulations.study.workers import Workers, make_units


@pytest.fixture
def base(small_consortium: Path) -> dict:
    """Settings of a study that takes a second or two an arm."""
    return {
        "data.source": str(small_consortium),
        "federation.sites": "ash,birch",
        "chain.backbone": "test_convnext",
        "chain.epochs": 1,
        "chain.batch-size": 16,
        "student.rounds": 1,
        "student.finetune-rounds": 0,
        "student.epochs": 1,
        "federation.precision": "fp32",
        "federation.threads": 1,
    }


@pytest.fixture
def study(base, tmp_path):
    """Run a study in this process."""

    def run(arms: str, seeds=(0,), settings=None, **more):
        request = StudyRequest(
            {**base, **(settings or {})}, arms.split(","), (), seeds, folder=tmp_path / "study", jobs=1, **more
        )
        return run_study(request, PlainConsole(file=StringIO()))

    return run


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of the arms that were trained, in order, and `chain of` for each chain."""
    seen: list[str] = []
    from chainward_simulations.study import workers

    def arm(configured, *rest):
        seen.append(f"{configured.name} {configured.config.seed}")
        return train_arm(configured, *rest)

    def chain(configured, *rest):
        seen.append(f"chain of {configured.name} {configured.config.seed}")
        return train_chain(configured, *rest)

    monkeypatch.setattr(workers, "train_arm", arm)
    monkeypatch.setattr(workers, "train_chain", chain)
    return seen


@pytest.mark.slow
def test_the_chain_of_a_study_is_the_chain_of_a_run(study, base, tmp_path):
    report = study("chain")
    config = RunConfig.from_flat({**base, "seed": 0, "student.rounds": 0, "chain.compare-alone": False})
    sites = open_sites(config)
    outcome = run_in_process(config, sites)
    (file,) = (tmp_path / "study" / "chains").iterdir()
    assert equal(load_chain(file).model, outcome.chain)
    scores, pooled = score(outcome.chain, outcome.architecture, sites, config)
    record = report.folder.record_of("chain", 0)
    assert record.sites == scores
    assert record.pooled.balanced_accuracy == pooled.balanced_accuracy
    assert record.pooled.macro_auc == pytest.approx(
        pooled.macro_auc, abs=0.01
    )  # the pooled one counts near scores as ties
    assert record.images == sum(len(data.splits["train"]) for data in sites.values())


@pytest.mark.slow
def test_one_lap_of_cyclic_transfer_is_a_chain_without_teachers_to_the_bit(base):
    cyclic, without = configure_arms(["cyclic", "chain-no-distillation"], [], base, 0)
    sites = open_sites(cyclic.config)

    bench = Bench(sites, train_chain, print)
    first, second = (train_arm(arm, bench) for arm in (cyclic, without))
    assert equal(first.models["cyclic"], second.models["chain"])


@pytest.mark.slow
def test_what_is_the_same_training_is_trained_once(study, trained):
    report = study("chain,student,student-random,chain-no-attention,cyclic,chain-no-distillation")
    assert trained.count("chain of chain 0") == 1
    assert sum(name.startswith("chain of") for name in trained) == 1
    assert len(trained) == 5  # one chain; chain, two students and cyclic on top
    same = {arm.name: arm.same_as for arm in report.result.arms if arm.same_as}
    assert same == {"chain-no-attention": "chain", "chain-no-distillation": "cyclic"}


@pytest.mark.slow
def test_every_arm_yields_all_figures_and_predictions_that_give_them_again(study, tmp_path):
    report = study("alone,union,chain")
    alone, union, chain = (report.folder.record_of(name, 0) for name in ("alone", "union", "chain"))
    assert alone.models == 2
    assert alone.best.site in ("ash", "birch")
    assert alone.best.pooled.balanced_accuracy >= alone.pooled.balanced_accuracy
    assert alone.images == union.images == chain.images
    assert alone.images_per_model == pytest.approx(union.images_per_model / 2)
    for record in (alone, union, chain):
        predictions = load_predictions(tmp_path / "study" / "predictions" / record.predictions)
        means = np.mean([scores.balanced_accuracy for scores in predictions.pooled()])
        assert record.pooled.balanced_accuracy == pytest.approx(means)
        assert record.pooled.n == len(predictions.labels)
        assert set(record.sites) == {"ash", "birch"}
        assert record.validation.n > 0
        assert record.parameters * 4 < record.file_bytes < record.parameters * 4 + 50_000


@pytest.mark.slow
def test_a_chain_of_no_laps_is_an_arm_with_the_figures_of_the_head_from_statistics(study):
    settings = {"chain.head": "statistics", "chain.laps": 0, "chain.compare-alone": False}
    report = study("chain,statistics", settings=settings)
    chain, statistics = report.result.arms
    assert not report.result.failures
    assert chain.records[0].steps == 0
    assert chain.pooled["macro_auc"] == statistics.pooled["macro_auc"]


@pytest.mark.slow
def test_an_interrupted_study_goes_on_without_losing_a_finished_arm(study, trained, monkeypatch, tmp_path):
    measured = training.measure_arm
    from chainward_simulations.study import workers

    def interrupted(configured, *rest):
        if configured.name == "union":
            raise KeyboardInterrupt
        return measured(configured, *rest)

    monkeypatch.setattr(workers, "measure_arm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study("chain,union,student")
    finished = {record["arm"] for record in json.loads((tmp_path / "study" / "study.json").read_text())["records"]}
    assert "union" not in finished
    monkeypatch.setattr(workers, "measure_arm", measured)
    trained.clear()
    again = study("chain,union,student")
    assert trained == [f"{name} 0" for name in ("union", "chain", "student") if name not in finished]
    assert [arm.name for arm in again.result.arms] == ["chain", "union", "student"]


@pytest.mark.slow
def test_arms_and_seeds_are_added_to_a_finished_study_and_its_chain_is_not_trained_again(study, trained):
    study("chain")
    trained.clear()
    report = study("chain,student", seeds=(0,))
    assert trained == ["student 0"]
    assert report.folder.record_of("student", 0).images > report.folder.record_of("chain", 0).images


@pytest.mark.slow
def test_a_study_does_not_go_on_with_other_settings_and_names_the_first(study, tmp_path, monkeypatch):
    study("union")
    with pytest.raises(StudyError, match=r"chain\.batch-size was 16 and is 8"):
        study("union", settings={"chain.batch-size": 8})
    monkeypatch.setattr("chainward_simulations.study.store.__version__", "9.9")
    with pytest.raises(StudyError, match=r"chainward was '.*' and is '9\.9'"):
        study("union")
    assert study("union", settings={"chain.batch-size": 8}, resume=False).result.arms


@pytest.mark.slow
def test_a_study_does_not_go_on_with_another_manifest(small_consortium, tmp_path, study):
    folder = tmp_path / "data"
    shutil.copytree(small_consortium.parent, folder)
    settings = {"data.source": str(folder / "data.yaml")}
    study("union", settings=settings)
    rows = (folder / "cases.csv").read_text().splitlines()
    (folder / "cases.csv").write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(StudyError, match="sha256 of the manifest was"):
        study("union", settings=settings)


@pytest.mark.slow
def test_an_arm_that_is_finished_with_another_definition_is_not_taken_for_it(base, tmp_path):
    def run(definition):
        request = StudyRequest(base, (), (definition,), (0,), folder=tmp_path / "study", jobs=1)
        return run_study(request, PlainConsole(file=StringIO()))

    run("mine=arm=union chain.learning-rate=0.002")
    with pytest.raises(StudyError, match="arm 'mine' is finished for seed 0 with another definition"):
        run("mine=arm=union chain.learning-rate=0.003")


@pytest.mark.parametrize("damage", ["{", "[]", '{"schema": 2}', ""])
def test_a_damaged_study_file_is_one_line(study, tmp_path, damage):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text(damage)
    with pytest.raises(StudyError, match=r"study\.json: damaged") as refused:
        study("union")
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_two_processes_do_not_write_one_study(study, tmp_path):
    report = study("union")
    from chainward_simulations.study.store import StudyFolder

    held = StudyFolder.open(tmp_path / "study", report.folder.state.settings, resume=True)
    with pytest.raises(StudyError, match="another process is running this study"):
        study("union")
    held.close()
    assert study("union").result.arms


@pytest.mark.slow
def test_an_arm_that_fails_does_not_cost_the_others(study, monkeypatch):
    from chainward_shared.errors import ModelError
    from chainward_simulations.study import further

    def fail(*_, **__):
        raise ModelError("the loss became nan")

    monkeypatch.setitem(further._REGISTERED, "union", further.Baseline("broken", fail))
    report = study("union,cyclic")
    assert [arm.name for arm in report.result.arms] == ["cyclic"]
    assert report.result.failures == (("union", 0, "the loss became nan"),)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_finished_arms_are_kept(study, monkeypatch, tmp_path):
    study("union")
    from chainward_simulations.study import predictions

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predictions, "save_file", full)
    with pytest.raises(StudyError, match="No space left on device"):
        study("union,cyclic")
    assert "union" in (tmp_path / "study" / "study.json").read_text()


@pytest.mark.slow
def test_a_chain_is_kept_to_the_bit_with_its_strands(base, tmp_path):
    (configured,) = configure_arms(["chain-strands-average"], [], base, 0)
    chain = train_chain(configured, Bench(open_sites(configured.config), train_chain, print))
    save_chain(chain, tmp_path / "chain.safetensors")
    again = load_chain(tmp_path / "chain.safetensors")
    assert equal(again.model, chain.model)
    assert len(again.strands) == 2
    assert all(equal(one, other) for one, other in zip(again.strands, chain.strands, strict=True))
    assert again.architecture == chain.architecture
    assert again.logs == chain.logs
    (tmp_path / "chain.safetensors").write_bytes(b"damaged")
    assert load_chain(tmp_path / "chain.safetensors") is None


@pytest.mark.slow
def test_the_order_of_the_arms_changes_no_figure(study, base, tmp_path):
    first = study("chain,union", seeds=(1, 0))
    figures = {(r.arm, r.seed): r.pooled for r in first.folder.state.records}
    second = study("union,chain", seeds=(0, 1), resume=False)
    assert {(r.arm, r.seed): r.pooled for r in second.folder.state.records} == figures
    difference = first.result.arms[1].differences["macro_auc"]
    assert set(difference.per_seed) == {0, 1}
    assert difference.low <= difference.mean <= difference.high


def test_units_are_ordered_by_seed_and_the_longest_first(base):
    arms = configure_arms(["alone", "chain", "student", "alone-long"], [], base, 0)
    units = make_units([arm.of_seed(seed) for seed in (5, 2) for arm in arms])
    named = [(unit.seed, [arm.name for arm in unit.arms]) for unit in units]
    assert named[:3] == [(5, ["alone-long"]), (5, ["chain", "student"]), (5, ["alone"])]
    assert [seed for seed, _ in named] == [5, 5, 5, 2, 2, 2]


@pytest.mark.slow
def test_a_worker_that_dies_is_one_line(tmp_path, monkeypatch):
    source = "import os\nclass Dies:\n    def run(self, folder, report):\n        os._exit(9)\n"
    (tmp_path / "deadly.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)  # workers look for modules where this process does
    unit = importlib.import_module("deadly").Dies()
    with pytest.raises(StudyError, match="a worker process died"), Workers(2, tmp_path, print) as workers:
        workers.run([unit])


def typed_command(*words: str):
    """Type `chainward study`, in this process; errors as they are raised."""
    return CliRunner().invoke(app, ["study", *words], catch_exceptions=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", "chian"], "did you mean 'chain'"),
        (["--arms", "chain", "--seeds", "0,0"], "--seeds: 0 is given twice"),
        ([], "no arms"),
        (["--arms", "chain", "--sites", "7"], "found 7, but the site column of data.yaml names 4"),
        (["--arms", "chain", "--label-fraction", "0"], "chain.label-fraction = 0.0"),
        (["--arms", "chain", "--reference", "union"], "--reference union: not among the arms"),
        (["--arms", "chain", "--set", "chain.epoch=1"], "did you mean 'chain.epochs'"),
        (["--arms", "chain", "--out", "/proc/nowhere"], "the study's folder can't be written"),
        (["--arms", "chain", "--json", "/proc/nowhere/a.json"], "--json /proc/nowhere/a.json: can't be written"),
        (["--arms", "chain", "--resume"], "there is no study to resume"),
        (["--arms", "chain", "--set", "federation.sites=ash,oak"], "there is no site 'oak'"),
    ],
)
def test_bad_input_is_one_line(small_consortium, tmp_path, words, said):
    if "--out" not in words:
        words = [*words, "--out", str(tmp_path / "study")]
    result = typed_command("--data", str(small_consortium), *words)
    assert isinstance(result.exception, ChainwardError)
    assert said in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_data_file_that_is_not_there_is_one_line(tmp_path):
    result = typed_command("--data", str(tmp_path / "none.yaml"), "--arms", "chain", "--out", str(tmp_path / "study"))
    assert isinstance(result.exception, ChainwardError)
    assert "none.yaml" in str(result.exception)


@pytest.mark.slow
def test_the_command_trains_in_workers_what_this_process_trains(study, base, tmp_path):
    """The whole of it, as it is typed: two workers, table, JSON, picture; the figures are those of one process."""
    script = Path(sys.executable).with_name("chainward")
    words = [f"{key}={value}" for key, value in base.items() if key not in ("data.source", "federation.threads")]
    out, results = tmp_path / "typed", tmp_path / "results.json"
    typed = subprocess.run(
        [
            *(str(script), "study", "--data", base["data.source"], "--arms", "chain,union", "--jobs", "2"),
            *("--out", str(out), "--json", str(results), "--set", " ".join(words)),
        ],
        capture_output=True,
        text=True,
        timeout=900,  # three processes that import everything, perhaps on a busy machine
        check=False,
    )
    assert typed.returncode == 0, typed.stderr
    assert "union" in typed.stdout
    assert "no ranking: class" in typed.stdout, "there are few test images"
    assert "2 of 2: " in typed.stderr
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(results.read_text())
    assert found["schema"] == 1
    assert list(found["arms"]) == ["chain", "union"]
    here = study("chain,union")
    for arm in here.result.arms:
        assert found["arms"][arm.name]["records"][0]["pooled"] == arm.records[0].pooled.model_dump()
        assert found["arms"][arm.name]["pooled"]["macro_auc"]["mean"] == arm.pooled["macro_auc"].mean
