"""The benchmark measures what it says; its timings themselves are not tested."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from chainward_server.results import DataSummary, HeadRecord, Results
from chainward_shared.models import build_model
from chainward_simulations import flower
from chainward_simulations.benchmark import memory, private
from chainward_simulations.benchmark.backbones import backbones_table, examined
from chainward_simulations.benchmark.features import link_of
from chainward_simulations.benchmark.figures import Aim, Backbone, Measured, Options, Table, in_turn
from chainward_simulations.benchmark.flower_run import FlowerRun, hops_table
from chainward_simulations.benchmark.training import (
    VARIANTS,
    a_site,
    architecture_for,
    config_of,
    throughput,
    train_variant,
)

BENCHMARK = Path(__file__).parents[2] / "simulations" / "benchmark"
SMALL = Backbone("test_convnext")
ONE_THREAD = Options(quick=True, threads=1)


def quiet(line: str) -> None:
    """Say nothing."""


@pytest.mark.slow
def test_every_loop_has_a_throughput_and_a_ratio_for_each_repeat():
    found = throughput(SMALL, "upright", a_site("site-6"), 1, 2, ONE_THREAD)
    for variant in VARIANTS:
        for figure in (found.images_per_second[variant], found.speed_up(variant)):
            assert len(figure.values) == 2
            assert all(math.isfinite(value) and value > 0 for value in figure.values)
    assert set(found.speed_up("plain fp32").values) == {1.0}
    assert len(found.rows("fp32")) == len(VARIANTS)


@pytest.mark.slow
def test_without_random_choices_the_plain_loop_trains_what_chainwards_does():
    config, data = config_of(SMALL, epochs=3), a_site("site-6")
    architecture = architecture_for(config, data)
    changes = {"batch_size": len(data.splits["train"]), "weight_decay": 0.0, "augmentation": "none", "threads": 1}
    recipe = config.link_recipe().model_copy(update=changes)
    predecessor = dict(build_model(architecture, seed=1).state_dict())
    plain, _ = train_variant("plain fp32", data, architecture, recipe, predecessor)
    chainward, _ = train_variant("chainward fp32", data, architecture, recipe, predecessor)
    moved = max(float((chainward[name] - predecessor[name]).abs().max()) for name in chainward)
    apart = max(float((chainward[name] - plain[name]).abs().max()) for name in chainward)
    assert moved > 1e-3
    assert apart < moved / 100
    torch.testing.assert_close(dict(plain), dict(chainward), rtol=0, atol=moved / 100)


@pytest.mark.slow
def test_a_private_step_is_measured_and_costs_more_than_a_plain_one(monkeypatch):
    monkeypatch.setattr(private, "peak_bytes", lambda architecture, kind, batch: 1)  # a new process each takes seconds
    cost, student = (
        private.cost_of(name, architecture, 16, 1, 2, quiet)
        for name, architecture in private.models((SMALL,), 32).items()
    )
    assert set(cost.seconds) == {"plain", "private"}
    assert student.parameters < cost.parameters
    for kind, seconds in cost.seconds.items():
        assert len(seconds.values) == 2
        assert cost.peak_bytes[kind] == 1
    assert cost.ratio.median > 1
    assert all(0 < n < s for n, s in zip(cost.noise_seconds.values, cost.seconds["private"].values, strict=True))
    assert [row[2] for row in cost.rows()] == ["plain", "private"]


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_process_and_grows_with_the_batch():
    (architecture, _) = private.models((SMALL,), 32).values()
    few, many = (private.peak_bytes(architecture.model_dump_json(), "plain", batch) for batch in (4, 256))
    assert many - few > 20 * 2**20


def test_each_kind_has_its_turn_in_every_repeat_and_the_first_is_not_counted():
    turns = []

    def once(kind):
        turns.append(kind)
        return float(len(turns))

    found = in_turn(("a", "b", "c"), 2, once, quiet)
    assert "".join(turns) == "cababcbca"
    assert found == {"a": Measured((4.0, 9.0)), "b": Measured((5.0, 7.0)), "c": Measured((6.0, 8.0))}


def test_figures_are_medians_with_their_spread_and_aims_say_whether_they_are_met():
    fast, slow = Measured((4.0, 9.0, 5.0)), Measured((2.0, 3.0, 1.0))
    assert fast.ratio_to(slow).text(1) == "3.0 (2.0 to 5.0)"
    assert Aim("at least", 1.5).text(1.49) == "at least 1.5: missed"
    assert Aim("at most", 6, " GiB").text(3.0) == "at most 6 GiB: met"


def test_a_table_in_markdown_has_its_figures_on_the_right():
    table = Table("Speed", ("loop", "images/s"), rows=[("plain", "12.5")], notes=["Two repeats."])
    assert table.markdown() == "### Speed\n\n| loop | images/s |\n| --- | ---: |\n| plain | 12.5 |\n\nTwo repeats.\n"


@pytest.mark.slow
def test_a_run_is_known_by_its_flwr_home_and_its_processes_are_stopped(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    command = [sys.executable, "-c", child]
    mine = subprocess.Popen(command, env=os.environ | {"FLWR_HOME": str(tmp_path)})
    other = subprocess.Popen(command, env=os.environ | {"FLWR_HOME": str(tmp_path / "other")})
    try:
        with memory.MemorySampler(tmp_path) as sampler:
            while sampler.peak.processes < 2 and mine.poll() is None:
                time.sleep(0.1)
        flower.stop_processes(tmp_path, grace=1.0)
        assert mine.wait(10) is not None
        assert other.poll() is None
        assert sampler.peak.bytes > 2**20
        assert flower.processes_of(tmp_path) == []
    finally:
        flower.stop_processes(tmp_path / "other", grace=1.0)
        for process in (mine, other):
            process.kill()
            process.wait()


def test_help_names_what_can_be_measured():
    shown = subprocess.run([sys.executable, str(BENCHMARK), "--help"], capture_output=True, text=True, check=True)
    for word in ("training", "memory", "private", "peers", "images"):
        assert word in shown.stdout
    for word in ("--quick", "--json", "--markdown"):
        assert word in shown.stdout


def test_a_run_is_measured_with_settings_that_are_checked_before_anything_starts(tmp_path):
    settings = tmp_path / "run.toml"
    settings.write_text("chain.epochs = 1\n")
    main = runpy.run_path(str(BENCHMARK / "__main__.py"))
    found = main["_settings_of_run"](main["SIX_SITES"], [str(settings), "student.rounds=0"], False, 1)
    assert found == {"federation.threads": 1, "chain.epochs": 1, "student.rounds": 0}
    wrong = CliRunner().invoke(main["cli"], ["--only", "memory", "--set", "chain.lap=2"])
    assert wrong.exit_code == 2 and "chain.laps" in wrong.output


def test_statistics_rounds_are_hops_too():
    head = HeadRecord(
        key="head-start", sites=["a", "b"], images=9, validation=9, seconds=2.0, bytes_down=5400, bytes_up=3
    )
    data = DataSummary(source="phantom", synthetic=True, classes=["a"], image_size=32, channels=1, sites=[])
    results = Results(run_id="r", seed=0, data=data, heads=[head])
    run = FlowerRun(1.0, results, memory.MemoryPeak(), None, None)
    assert hops_table(run).rows == [("head-start", "2 sites", "2.0", "-", "0.0054", "3e-06")]
    assert [hop["hop"] for hop in run.to_json()["hops"]] == ["head-start"]


def test_a_link_is_measured_with_and_without_kept_features():
    links = [link_of(part, "test_vit", 32, 24, 1, ONE_THREAD) for part in ("head", "last-2")]
    for link in links:
        assert all(seconds > 0 for seconds in (*link.epoch, *link.first))
        assert link.stored >= 2 * 24, "a number of two bytes for each image at least"
        assert link.row()[0] == link.part
    assert links[0].stored < links[1].stored, "one row of numbers an image, and one for each patch"


@pytest.mark.slow
def test_what_a_backbone_can_do_is_found_by_doing_it():
    vit, grouped = examined("test_vit"), examined("resnet18")
    assert {what for what, why in vit.answers.items() if why} == set()
    assert {what for what, why in grouped.answers.items() if why} == {"private", "student"}
    table = backbones_table([vit, grouped])
    assert next(row[2:] for row in table.rows) == ("yes",) * 7
    assert any("batch norm mixes the images" in note for note in table.notes)


def test_a_backbone_that_can_not_be_built_can_do_nothing():
    unknown = examined("no_such_model")
    assert set(unknown.answers.values()) == {next(iter(unknown.answers.values()))}
    assert "has no model 'no_such_model'" in unknown.answers["chain"]
