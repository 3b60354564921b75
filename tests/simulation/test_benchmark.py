"""The benchmark measures what it says; its timings themselves are not tested."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from chainward_server.results import LinkRecord
from chainward_server.run_state import RunState
from chainward_shared.config import RunConfig
from chainward_shared.files import write_atomically
from chainward_shared.models import build_model
from chainward_shared.protocol import TrainingLog
from chainward_simulations.benchmark.backbones import backbones_table, examine
from chainward_simulations.benchmark.features import FeaturesWorkload, features_table, measure_features
from chainward_simulations.benchmark.figures import Aim, Measured, Table
from chainward_simulations.benchmark.training import (
    VARIANTS,
    Backbone,
    TrainingWorkload,
    accuracy_table,
    architecture_for,
    measure_accuracy,
    measure_throughput,
    throughput_table,
    train_variant,
)
from chainward_simulations.runner import open_sites
from chainward_simulations.simulated_sites import simulated_site, simulated_site_ids

BENCHMARK = Path(__file__).parents[2] / "simulations" / "benchmark"
WORKLOAD = replace(TrainingWorkload.quick(), augmentations=("upright",), sites="site-6", threads=1)
MOMENT = "2026-01-02T03:04:05+00:00"


@pytest.mark.slow
def test_every_loop_has_a_throughput_and_a_ratio_for_each_repeat():
    (throughput,) = measure_throughput(WORKLOAD)
    for variant in VARIANTS:
        for figure in (throughput.images_per_second[variant], throughput.speed_up(variant)):
            assert len(figure.values) == WORKLOAD.repeats
            assert all(math.isfinite(value) and value > 0 for value in figure.values)
    assert set(throughput.speed_up("plain fp32").values) == {1.0}
    assert len(throughput_table([throughput], WORKLOAD).rows) == len(VARIANTS)


@pytest.mark.slow
def test_every_loop_has_an_accuracy_for_each_seed():
    accuracy = measure_accuracy(WORKLOAD)
    for variant in VARIANTS:
        (value,) = accuracy.balanced_accuracy[variant].values
        assert 0 < value <= 1
    assert accuracy_table(accuracy).markdown().count("test_convnext") == len(VARIANTS)


@pytest.mark.slow
def test_without_random_choices_the_plain_loop_trains_what_chainwards_does():
    config = WORKLOAD.config(Backbone("test_convnext"), "none", seed=0, epochs=3)
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


@pytest.mark.slow
def test_a_private_step_is_measured_and_costs_more_than_a_plain_one(monkeypatch):
    private = pytest.importorskip("chainward_simulations.benchmark.private", reason="needs psutil")
    monkeypatch.setattr(private, "peak_bytes", lambda architecture, kind, batch: 1)  # a new process each takes seconds
    workload = replace(private.PrivateStepWorkload.quick(), batch=16)
    cost, student = private.measure_private_steps(workload)
    assert set(cost.seconds) == {"plain", "private"}
    assert student.parameters < cost.parameters
    for kind, seconds in cost.seconds.items():
        assert len(seconds.values) == workload.repeats
        assert cost.peak_bytes[kind] == 1
    assert cost.ratio.median > 1
    assert all(0 < n < s for n, s in zip(cost.noise_seconds.values, cost.seconds["private"].values, strict=True))
    assert len(private.private_table([cost, student], workload).rows) == len(cost.seconds) + len(student.seconds)


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_process_and_grows_with_the_batch():
    private = pytest.importorskip("chainward_simulations.benchmark.private", reason="needs psutil")
    (architecture, _) = private.PrivateStepWorkload.quick().models().values()
    few, many = (private.peak_bytes(architecture, "plain", batch) for batch in (4, 256))
    assert many - few > 20 * 2**20


def test_the_chosen_threads_are_measured_beside_one():
    private = pytest.importorskip("chainward_simulations.benchmark.private", reason="needs psutil")
    workload = private.PrivateStepWorkload()
    assert private.with_choices(workload, (), None, 2) == workload
    assert private.with_choices(workload, (), 3, 8) == replace(workload, repeats=3, threads=(1, 8))


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


@pytest.fixture
def consortium():
    return pytest.importorskip("chainward_simulations.benchmark.consortium", reason="needs psutil")


@pytest.fixture
def memory():
    return pytest.importorskip("chainward_simulations.benchmark.coordinator_memory", reason="needs psutil")


def link(step, *, lap=0, seconds=3.0, training=1.0):
    log = TrainingLog(epochs=1, steps=1, images=16, loss=[0.7], seconds=training, precision="fp32")
    return LinkRecord(
        strand=0,
        lap=lap,
        step=step,
        site=f"site-{step + 1}",
        predecessor=None,
        status="done",
        attempts=1,
        seconds=seconds,
        bytes_down=2_000_000,
        bytes_up=2_000_000,
        training=log,
    )


def sample(memory, hops, mib, phase="chain"):
    size = int(mib * 2**20)
    return memory.Sample(seconds=0.0, phase=phase, hops=hops, uss=size, rss=2 * size, pss=size)


@pytest.mark.parametrize("sites", [3, 12])
def test_the_consortium_has_the_sites_that_were_asked_for_in_order_each_with_all_splits(consortium, tmp_path, sites):
    data_file = consortium.write_consortium(tmp_path / "data", sites)
    ids = simulated_site_ids(str(data_file), num_sites=0, label_skew=0.0)
    assert [int(site.rpartition("-")[2]) for site in ids] == list(range(1, sites + 1))
    last = simulated_site(str(data_file), sites - 1, num_sites=0, label_skew=0.0, seed=0)
    assert {split: len(cases) for split, cases in last.splits.items()} == consortium.CASES
    assert all(min(last.class_counts(split)) > 0 for split in last.splits)
    assert last.splits["train"].images.shape[1:] == (1, consortium.IMAGE_SIZE, consortium.IMAGE_SIZE)


def test_the_consortium_trains_one_epoch_in_one_strand_and_nothing_but_the_chain(consortium):
    config = RunConfig.from_flat(consortium.ConsortiumWorkload(laps=3).settings(Path("/data/data.yaml")))
    assert (config.chain.laps, config.chain.epochs, config.chain.strands) == (3, 1, 1)
    assert config.student.rounds == 0
    assert not config.chain.compare_alone


def test_what_was_chosen_goes_before_the_plan_of_the_consortium(consortium):
    quick, backbones = consortium.ConsortiumWorkload.quick(), (Backbone("convnext_atto"), Backbone("other"))
    assert (quick.sites, quick.laps) == (6, 1)
    assert consortium.with_choices(quick, None, None, (), quick.threads) == quick
    chosen = consortium.with_choices(quick, 9, 4, backbones, 1)
    assert (chosen.sites, chosen.laps, chosen.backbone, chosen.threads) == (9, 4, backbones[0], 1)


def test_the_seconds_of_a_hop_are_told_apart_by_when_the_models_were_written(consortium):
    exchanges, scorings = (4.0, 2.0, 3.0), (0.5, 0.75, 1.5)
    now, written = 100.0, []
    for exchange, scoring in zip(exchanges, scorings, strict=True):
        written.append(now + exchange)
        now += exchange + scoring
    links = [link(step, seconds=exchange, training=1.25) for step, exchange in enumerate(exchanges)]
    hops = consortium.hop_seconds(links, written, now)
    assert [hop.training for hop in hops] == [1.25] * 3
    assert [hop.exchange for hop in hops] == [2.75, 0.75, 1.75]
    assert [hop.scoring for hop in hops] == list(scorings)
    assert [hop.overhead for hop in hops] == [3.25, 1.5, 3.25]
    assert sum(hop.whole for hop in hops) == now - 100.0


def test_a_consortium_that_lost_a_hop_is_not_measured(consortium):
    lost = link(1).model_copy(
        update={"training": None, "status": "skipped", "reason": "site 'site-2' is not connected"}
    )
    with pytest.raises(consortium.BenchmarkError, match=r"strand-0-lap-0-step-1 at site-2 is 'skipped'.*not connected"):
        consortium.hop_seconds([link(0), lost], [3.0], 9.0)


def test_the_memory_after_a_hop_is_the_median_of_the_samples_until_the_next(memory):
    seen = [(0, 90), (1, 100), (1, 101), (1, 400), (3, 103)]  # no sample between the second hop and the third
    samples = [sample(memory, *one) for one in seen]
    others = [sample(memory, 0, 50, "rendezvous"), sample(memory, 3, 700, "report")]
    assert memory.memory_after_hops(samples + others) == {1: 101.0, 3: 103.0}


def test_growth_is_the_slope_of_least_squares_over_the_hops_of_a_lap(memory):
    random = np.random.default_rng(0)
    of_hops = {hop: 500 + 0.25 * hop + random.normal() for hop in range(1, 21)} | {21: 10_000.0}
    hops, sizes = np.arange(1, 21), np.array([of_hops[hop] for hop in range(1, 21)])
    reference = ((hops - hops.mean()) * (sizes - sizes.mean())).sum() / ((hops - hops.mean()) ** 2).sum()
    found = memory.growth(of_hops, 1, 20)
    assert found.per_hop == pytest.approx(reference)
    assert (found.first, found.half, found.last) == (of_hops[1], of_hops[10], of_hops[20])


def test_growth_is_unknown_where_fewer_than_two_hops_were_sampled(memory):
    assert memory.growth({5: 500.0, 30: 600.0}, 1, 20) == memory.Growth()


def test_a_table_shows_the_memory_of_each_lap_and_what_a_model_kept_per_hop_would_be(consortium, memory):
    workload = consortium.ConsortiumWorkload(sites=4, laps=2)
    samples = [sample(memory, hops, 500 + 2 * min(hops, 4)) for hops in range(8)]
    samples.append(sample(memory, 8, 650, "done"))
    links = [link(step, lap=lap) for lap in range(2) for step in range(4)]
    hops = consortium.hop_seconds(links, [5.0 * number + 3.0 for number in range(8)], 40.0)
    timings = {"rendezvous": 10.0, "chain": 40.0}
    folder = {"models": 3_000_000, "simulated-sites": 2_000_000, "rest": 500_000}
    run = consortium.ConsortiumRun(workload, 60.0, timings, links, hops, 2**20, 40_000, 0.02, folder, samples)
    tables = pytest.importorskip("chainward_simulations.benchmark.consortium_tables")
    shown = tables.coordinator_table(run)
    assert shown.rows == [
        ("lap 1", "4", "502.0", "504.0", "508.0", "2.000"),
        ("lap 2", "4", "508.0", "508.0", "508.0", "0.000"),
        ("whole chain", "8", "502.0", "508.0", "508.0", "1.000"),
    ]
    notes = " ".join(shown.notes)
    assert "650 USS (phase done, after 8 hops)" in notes
    assert "When the chain begins it holds 500.0 MiB" in notes
    assert "would be 1.00 MiB per hop" in notes
    figures = dict(tables.consortium_table(run).rows)
    assert figures["a hop, s"] == "5.00 (5.00 to 5.00)"
    assert figures["overhead of a hop: all but training, s"] == "4.00 (4.00 to 4.00)"
    assert figures["a hop: MB down, up"] == "2.00, 2.00"
    assert figures["run folder, MB"] == "5.5"
    assert run.to_json()["growth"]["lap 2"]["per_hop"] == 0.0


@pytest.mark.slow
def test_the_watch_sees_the_coordinators_process_grow_with_the_hops(memory, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "SAMPLE_SECONDS", 0.05)
    program, output = tmp_path / memory.COORDINATOR, tmp_path / "runs"
    program.write_text("kept = []\nwhile input():\n    kept.append(bytearray(b'x' * 2**26))\n", encoding="utf-8")
    (output / "run-1").mkdir(parents=True)
    environment = os.environ | {"FLWR_HOME": str(tmp_path)}
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], env=environment, stdin=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, str(program)], env=environment, stdin=subprocess.PIPE, text=True)
    try:
        with memory.CoordinatorWatch(tmp_path, output) as watch:
            for hops in range(3):
                seen = len(watch.samples)
                finished = [*(f"strand-0-lap-0-step-{step}" for step in range(hops)), "alone-site-1"]
                state = RunState(run_id="run-1", started=MOMENT, updated=MOMENT, phase="chain", finished=finished)
                write_atomically(output / "run-1" / "run.json", state.model_dump_json(by_alias=True).encode())
                if hops:
                    process.stdin.write("more\n")
                    process.stdin.flush()
                until = time.monotonic() + 30
                while len(watch.samples) < seen + 20 and time.monotonic() < until:
                    time.sleep(0.05)
    finally:
        for child in (bystander, process):
            child.kill()
            child.communicate()
    of_hops = memory.memory_after_hops(watch.samples)
    assert {one.hops for one in watch.samples} == {0, 1, 2}
    assert of_hops[2] - of_hops[1] == pytest.approx(64, abs=2)


def test_help_names_what_can_be_measured():
    shown = subprocess.run([sys.executable, str(BENCHMARK), "--help"], capture_output=True, text=True, check=True)
    for word in ("training", "accuracy", "memory", "private", "consortium", "--sites", "--laps"):
        assert word in shown.stdout
    for word in ("--quick", "--json", "--markdown"):
        assert word in shown.stdout


def test_a_link_is_measured_with_and_without_kept_features():
    links = measure_features(replace(FeaturesWorkload.quick(), threads=1), lambda line: None)
    assert [link.part for link in links] == ["head", "last-2"]
    for link in links:
        assert all(seconds > 0 for seconds in (*link.epoch, *link.first))
        assert link.stored >= 2 * 24, "a number of two bytes for each image at least"
    assert links[0].stored < links[1].stored, "one row of numbers an image, and one for each patch"
    assert len(features_table(links, FeaturesWorkload.quick()).rows) == 2


def test_what_a_backbone_can_do_is_found_by_doing_it():
    vit, grouped = examine(("test_vit", "resnet18"), lambda line: None)
    assert {what for what, why in vit.answers.items() if why} == set()
    assert {what for what, why in grouped.answers.items() if why} == {"private", "student"}
    table = backbones_table([vit, grouped])
    assert next(row[2:] for row in table.rows) == ("yes",) * 7
    assert any("batch norm mixes the images" in note for note in table.notes)


def test_a_backbone_that_can_not_be_built_can_do_nothing():
    (unknown,) = examine(("no_such_model",), lambda line: None)
    assert set(unknown.answers.values()) == {next(iter(unknown.answers.values()))}
    assert "has no model 'no_such_model'" in unknown.answers["chain"]
