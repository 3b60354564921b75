"""The benchmark measures what it says; its timings themselves are not tested."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chainward_shared.models import build_model
from chainward_simulations.benchmark.figures import Aim, Measured, Table
from chainward_simulations.benchmark.training import (
    VARIANTS,
    Backbone,
    TrainingPlan,
    accuracy_table,
    architecture_for,
    measure_accuracy,
    measure_throughput,
    throughput_table,
    train_variant,
)
from chainward_simulations.runner import open_sites

BENCHMARK = Path(__file__).parents[2] / "simulations" / "benchmark"
PLAN = replace(TrainingPlan.quick(), augmentations=("upright",), sites="site-6", threads=1)


def test_every_loop_has_a_throughput_and_a_ratio_for_each_repeat():
    (throughput,) = measure_throughput(PLAN)
    for variant in VARIANTS:
        for figure in (throughput.images_per_second[variant], throughput.speed_up(variant)):
            assert len(figure.values) == PLAN.repeats
            assert all(math.isfinite(value) and value > 0 for value in figure.values)
    assert set(throughput.speed_up("plain fp32").values) == {1.0}
    assert len(throughput_table([throughput], PLAN).rows) == len(VARIANTS)


def test_every_loop_has_an_accuracy_for_each_seed():
    accuracy = measure_accuracy(PLAN)
    for variant in VARIANTS:
        (value,) = accuracy.balanced_accuracy[variant].values
        assert 0 < value <= 1
    assert accuracy_table(accuracy).markdown().count("test_convnext") == len(VARIANTS)


def test_without_random_choices_the_plain_loop_trains_what_chainwards_does():
    config = PLAN.config(Backbone("test_convnext"), "none", seed=0, epochs=3)
    (data,) = open_sites(config).values()
    architecture = architecture_for(config, data)
    recipe = config.link_recipe().model_copy(update={"batch_size": len(data.splits["train"]), "weight_decay": 0.0})
    predecessor = dict(build_model(architecture, seed=1).state_dict())
    plain, _ = train_variant("plain fp32", data, architecture, recipe, predecessor)
    chainward, _ = train_variant("chainward fp32", data, architecture, recipe, predecessor)
    moved = max(float((chainward[name] - predecessor[name]).abs().max()) for name in chainward)
    apart = max(float((chainward[name] - plain[name]).abs().max()) for name in chainward)
    assert moved > 1e-3
    assert apart < moved / 100
    torch.testing.assert_close(dict(plain), dict(chainward), rtol=0, atol=moved / 100)


def test_figures_are_medians_with_their_spread_and_aims_say_whether_they_are_met():
    fast, slow = Measured((4.0, 9.0, 5.0)), Measured((2.0, 3.0, 1.0))
    assert fast.ratio_to(slow).text(1) == "3.0 (2.0 to 5.0)"
    assert Aim("at least", 1.5).text(1.49) == "at least 1.5: missed"
    assert Aim("at most", 6, " GiB").text(3.0) == "at most 6 GiB: met"


def test_a_table_in_markdown_has_its_figures_on_the_right():
    table = Table("Speed", ("loop", "images/s"), rows=[("plain", "12.5")], notes=["Two repeats."])
    assert table.markdown() == "### Speed\n\n| loop | images/s |\n| --- | ---: |\n| plain | 12.5 |\n\nTwo repeats.\n"


def test_a_run_is_known_by_its_flwr_home_and_its_processes_are_stopped(tmp_path):
    memory = pytest.importorskip("chainward_simulations.benchmark.memory", reason="needs psutil")
    flower = pytest.importorskip("chainward_simulations.flower", reason="needs psutil")
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
    for word in ("training", "accuracy", "memory", "--quick", "--json", "--markdown"):
        assert word in shown.stdout
