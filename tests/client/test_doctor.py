"""``chainward-site check``: what is wrong with a hospital is named in plain words, each with what to do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import chainward_client.site
from chainward_client import cli
from chainward_client.data.description import ImageShape
from chainward_client.doctor import examination, machine
from chainward_client.doctor.data import Header, odd_headers, open_data
from chainward_client.doctor.examination import examine
from chainward_client.doctor.machine import GIB, Need, SuperNode, check_disk, check_flower, check_memory, check_state
from chainward_client.doctor.report import Check, Diagnosis
from chainward_client.planned_run import read_plan
from chainward_client.policy import reserve
from chainward_client.site import open_site
from chainward_client.site_config import load_site_config
from chainward_client.site_key import site_key
from chainward_client.site_ledger import create_site_ledger, key_path, ledger_path, open_site_ledger
from chainward_shared.errors import ChainwardError
from chainward_shared.privacy.accounting import Mechanism, spent

SMALL = "chain.backbone='test_convnext' chain.batch-size=8 student.batch-size=8"
PRIVATE = f"{SMALL} privacy.mode='dp-sgd' privacy.epsilon=3 chain.epochs=2 student.rounds=0"
POLICY = {"epsilon": 10, "delta": 1e-5, "epsilon_per_run": 4}


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """Path of a hospital's site.yaml: 24, 6 and 6 images of 32 px, a policy, key and ledger."""
    (tmp_path / "scans").mkdir()
    generator = np.random.default_rng(3)
    rows = ["scan,finding,person,part"]
    for split, count in (("train", 24), ("val", 6), ("test", 6)):
        for i in range(count):
            pixels = generator.normal(90, 25, (32, 32)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "scans" / f"{split}-{i}.png")
            rows.append(f"{split}-{i},{'ab'[i % 2]},{split}-person-{i},{split}")
    (tmp_path / "cases.csv").write_text("\n".join(rows) + "\n")
    description = {
        "format": "csv",
        "manifest": "cases.csv",
        "images": "scans",
        "classes": ["a", "b"],
        "columns": {"image": "scan", "label": "finding", "patient": "person", "split": "part"},
        "image": {"size": 32, "channels": 1},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(description))
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({"site": "oak", "data": "data.yaml", "state": "state", "privacy": POLICY}))
    create_site_ledger(tmp_path / "state", "oak")
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No SuperNode of somebody else plays a role, and no site of another test."""
    monkeypatch.setattr(examination, "running_supernodes", list)
    yield
    chainward_client.site._local_site.cache_clear()


def changed(site_yaml: Path, **keys: Any) -> Path:
    content = yaml.safe_load(site_yaml.read_text()) | keys
    site_yaml.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return site_yaml


def by_name(diagnosis: Diagnosis) -> dict[str, Check]:
    return {check.name: check for check in diagnosis.checks}


def problems(diagnosis: Diagnosis) -> list[str]:
    return [check.name for check in diagnosis.checks if check.outcome == "problem"]


# --- a site that is ready, and sites that aren't ---


@pytest.mark.slow
def test_a_hospital_as_it_should_be_is_ready(hospital):
    diagnosis = examine(hospital, plan=read_plan(PRIVATE))
    assert problems(diagnosis) == []
    assert diagnosis.exit_code == 0
    checks = by_name(diagnosis)
    assert checks["cases: train"].found == "24 images of 24 patients: a 12, b 12"
    assert "epsilon 0 of 10 spent" in checks["ledger"].found
    assert "epsilon 3 at delta 1e-05 per patient" in checks["plan: epsilon"].found
    assert "fits" in checks["plan: epsilon"].found
    assert checks["network"].outcome == "skipped"
    assert not [path for path in hospital.parent.rglob("*") if path.name.startswith(".")], "and nothing is left behind"


def test_it_says_what_the_decoded_images_take_and_makes_none(hospital):
    site_key(hospital.parent / "state")
    assert "not there yet" in by_name(examine(hospital))["images: decoded"].found
    assert not (hospital.parent / "state/images").exists()
    assert open_site(hospital).data
    assert "nothing has changed since" in by_name(examine(hospital))["images: decoded"].found


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("sitee: oak\n", "did you mean 'site'"),
        ("site: oak\n", "data"),
        ("{", "not a YAML file"),
        ("site: oak\ndata: data.yaml\nprivacy: {epsilon: -1, delta: 1e-5}\n", "privacy.epsilon"),
    ],
)
def test_a_wrong_site_yaml_is_a_problem_and_the_rest_is_looked_at_all_the_same(hospital, content, says):
    hospital.write_text(content)
    diagnosis = examine(hospital)
    assert problems(diagnosis) == ["configuration"]
    assert says in by_name(diagnosis)["configuration"].found
    assert {"GPU", "Flower telemetry", "network"} <= set(by_name(diagnosis))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("train-0,a", "train-0,zebra", "zebra"),
        ("train-0,", "gone,", "not found"),
        ("test-0,a,test-person-0", "test-0,a,train-person-0", "train-person-0"),
    ],
)
def test_data_that_can_not_be_used_are_a_problem_that_names_the_row(hospital, old, new, says):
    manifest = hospital.parent / "cases.csv"
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    diagnosis = examine(hospital, plan=read_plan(SMALL))
    assert problems(diagnosis) == ["data"]
    assert says in by_name(diagnosis)["data"].found
    assert by_name(diagnosis)["plan"].outcome == "skipped"


def test_an_image_that_can_not_be_read_is_counted_and_named(hospital):
    (hospital.parent / "scans/train-3.png").write_bytes(b"no picture")
    _, checks = open_data(hospital.parent / "data.yaml", "oak", hospital.parent / "state")
    assert [check.outcome for check in checks] == ["problem"]
    assert "1 unreadable image" in checks[0].found and "train-3" in checks[0].found


def test_there_is_no_site_yaml_is_bad_input(tmp_path):
    result = CliRunner().invoke(cli.app, ["check", str(tmp_path / "absent.yaml")])
    assert isinstance(result.exception, ChainwardError)
    assert "chainward-site init" in str(result.exception)


# --- images and patients ---


def header(name: str = "x", width: int = 100, height: int = 80, mode: str = "RGB", turned: bool = False) -> Header:
    return Header(name, width, height, mode, turned)


@pytest.mark.parametrize(
    ("odd", "name", "says"),
    [
        (header("odd", turned=True), "images: orientation", "EXIF"),
        (header("odd", 80, 100), "images: orientation", "stand where the others lie"),
        (header("odd", 400, 50), "images: shape", "times as long"),
        (header("odd", 30, 20), "images: size", "smaller than the 64 px"),
        (header("odd", 70, 20), "images: size", "a 4th of the others'"),
        (header("odd", mode="L"), "images: colour", "1 of 21 are grey"),
    ],
)
def test_a_picture_unlike_the_others_is_told(odd, name, says):
    usual = [header() for _ in range(20)]
    assert [check.outcome for check in odd_headers(usual, ImageShape())] == ["ok"]
    told = [check for check in odd_headers([*usual, odd], ImageShape()) if check.outcome == "warning"]
    assert name in [check.name for check in told]
    (check,) = (check for check in told if says in check.found)
    assert "odd" in check.found or name == "images: colour"


def test_the_same_picture_in_two_splits_is_told(hospital):
    data, checks = open_data(hospital.parent / "data.yaml", "oak", hospital.parent / "state")
    assert data is not None
    assert "patients: copies" not in [check.name for check in checks]
    train, test = data.splits["train"], data.splits["test"]
    copied = test.images.clone()
    copied[2] = train.images[5]
    assert data.copies() == 0
    assert replace(data, splits={**data.splits, "test": replace(test, images=copied)}).copies() == 1


# --- machine ---


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("ext4", "ok"),
        ("nfs4", "problem"),
        ("cifs", "problem"),
        ("fuse.sshfs", "problem"),
        ("tmpfs", "warning"),
        ("overlay", "warning"),
    ],
)
def test_a_state_folder_on_a_disk_of_the_network_is_a_problem(tmp_path, kind, outcome, monkeypatch):
    monkeypatch.setattr(machine, "mounted", lambda: {"/": "ext4", str(tmp_path): kind})
    folder, disk = check_state(tmp_path / "state")
    assert (disk.name, disk.outcome) == ("state disk", outcome)
    assert folder.outcome == "ok"
    assert not (tmp_path / "state").exists(), "looking makes nothing"


def test_a_state_folder_that_is_a_file_or_that_others_may_read_is_told(tmp_path):
    (tmp_path / "file").touch()
    assert check_state(tmp_path / "file")[0].outcome == "problem"
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    assert check_state(tmp_path / "open")[0].outcome == "warning"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_state_folder_that_can_not_be_written_is_a_problem(tmp_path):
    tmp_path.chmod(0o500)
    assert check_state(tmp_path)[0].outcome == "problem"


@pytest.mark.parametrize(("free", "outcome"), [(GIB // 2, "problem"), (2 * GIB, "warning"), (9 * GIB, "ok")])
def test_the_disk_is_held_against_what_a_run_needs(tmp_path, free, outcome, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert check_disk(tmp_path, Need(disk=GIB, memory=GIB, of="a run")).outcome == outcome


@pytest.mark.parametrize(
    ("available", "total", "limit", "outcome"),
    [
        (GIB, GIB, None, "problem"),
        (8 * GIB, 8 * GIB, GIB, "problem"),
        (GIB, 8 * GIB, None, "warning"),
        (8 * GIB, 8 * GIB, None, "ok"),
    ],
)
def test_memory_or_a_containers_limit_is_held_against_what_a_run_needs(available, total, limit, outcome, monkeypatch):
    memory = SimpleNamespace(available=available, total=total)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(machine, "_container_limit", lambda: limit)
    assert check_memory(Need(disk=GIB, memory=GIB, of="a run")).outcome == outcome


def test_a_clock_that_was_set_back_is_told(tmp_path):
    (tmp_path / "state").mkdir()
    assert machine.check_own_clock(tmp_path / "state").outcome == "skipped"
    (tmp_path / "state" / "file").touch()
    assert machine.check_own_clock(tmp_path / "state").outcome == "ok"
    os.utime(tmp_path / "state" / "file", (time.time() + 86_400,) * 2)
    assert machine.check_own_clock(tmp_path / "state").outcome == "warning"


def flower(arguments: tuple[str, ...] = (), **environment: str) -> dict[str, Check]:
    node = SuperNode(7, ("flower-supernode", *arguments), environment)
    return {check.name: check for check in check_flower([node])}


def test_how_the_running_supernode_was_started_decides(monkeypatch):
    right = flower(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
    assert [right[name].outcome for name in ("Flower telemetry", "Flower update check", "runtime installation")] == [
        "ok"
    ] * 3
    wrong = flower(("--allow-runtime-dependency-installation",))
    assert [wrong[name].outcome for name in ("Flower telemetry", "Flower update check")] == ["warning"] * 2
    assert wrong["runtime installation"].outcome == "problem"
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    nobody = {check.name: check for check in check_flower([])}
    assert (nobody["Flower telemetry"].outcome, nobody["runtime installation"].outcome) == ("ok", "skipped")
    assert "this shell" in nobody["Flower telemetry"].found


@pytest.mark.parametrize(
    ("content", "outcome"),
    [
        ("fpk_1: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4\n", "ok"),
        ("fpk_1: nonsense\n", "warning"),
        ("", "warning"),
        (None, "warning"),
    ],
)
def test_trusted_entities_are_read(tmp_path, content, outcome):
    path = tmp_path / "trusted.yaml"
    if content is not None:
        path.write_text(content)
    assert flower(("--trusted-entities", str(path)))["trusted entities"].outcome == outcome
    assert flower((f"--trusted-entities={path}",))["trusted entities"].outcome == outcome
    assert flower()["trusted entities"].outcome == "warning"


# --- policy, ledger, plan ---


def test_a_ledger_that_is_missing_damaged_or_open_to_others_is_a_problem(hospital):
    state = hospital.parent / "state"
    key_path(state).chmod(0o644)
    assert problems(examine(hospital)) == ["ledger"]
    key_path(state).chmod(0o600)
    ledger_path(state).write_bytes(ledger_path(state).read_bytes()[:-5])
    assert "ledger" in problems(examine(hospital))
    for path in (state / "privacy").iterdir():
        path.unlink()
    check = by_name(examine(hospital))["ledger"]
    assert (check.outcome, "chainward-site keys" in check.advice) == ("problem", True)


@pytest.mark.slow
def test_a_plan_beyond_what_is_left_is_told_with_the_numbers(hospital):
    config = load_site_config(hospital)
    ledger, _ = open_site_ledger(config.state_dir(hospital), "oak")
    assert config.privacy is not None
    policy = config.privacy.model_copy(update={"epsilon_per_run": None})
    mechanism = Mechanism("dp-sgd", 0.9, 0.5, 6)
    reservation = reserve(policy, ledger, mechanism, run="earlier", phase="link", hop="one", clip_norm=1.0)
    reservation.begin()
    ledger.commit(reservation, 6)
    changed(hospital, privacy={**POLICY, "epsilon": 1.02 * spent(ledger.mechanisms(), 1e-5)})
    check = by_name(examine(hospital, plan=read_plan(PRIVATE)))["plan: epsilon"]
    assert check.outcome == "problem"
    for word in ("would refuse: over budget", "epsilon 3", "left", "longest training"):
        assert word in f"{check.found} {check.advice}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "name", "says"),
    [
        (SMALL, "plan: privacy", "requires differential privacy"),
        (f"{PRIVATE} federation.threads=65", "plan: limits", "threads = 65"),
        (f"{PRIVATE} student.rounds=1001", "plan: limits", "rounds = 1001"),
        (f"{PRIVATE} privacy.unit='image'", "plan: privacy", "protects one image"),
        (f"{PRIVATE} privileged.mode='all'", "plan: privacy", "privileged_teachers: false"),
        (PRIVATE.replace("epsilon=3", "epsilon=5"), "plan: epsilon", "in this run"),
        (PRIVATE.replace("test_convnext", "convnext_atoo"), "plan: backbone", "convnext_atto"),
    ],
)
def test_a_plan_that_this_site_would_refuse_is_a_problem(hospital, plan, name, says):
    check = by_name(examine(hospital, plan=read_plan(plan)))[name]
    assert check.outcome == "problem", check
    assert says in check.found


def test_a_site_without_a_policy_is_told_what_that_means(hospital):
    diagnosis = examine(changed(hospital, privacy=None), plan=read_plan(PRIVATE))
    assert by_name(diagnosis)["policy"].outcome == "warning"
    assert problems(diagnosis) == ["plan: privacy"]


def test_a_delta_that_publishes_a_patient_is_a_problem(hospital):
    diagnosis = examine(changed(hospital, privacy={**POLICY, "delta": 0.1}))
    assert problems(diagnosis) == ["policy: data"]


# --- the command ---


def test_the_command_prints_a_table_or_json_and_ends_with_what_was_found(hospital):
    result = CliRunner().invoke(cli.app, ["check", str(hospital)])
    assert result.exit_code == 0, result.output
    assert "site oak: ready" in result.output
    (hospital.parent / "cases.csv").unlink()
    result = CliRunner().invoke(cli.app, ["check", str(hospital), "--json"])
    written = json.loads(result.stdout[result.stdout.index("{\n") :])
    assert (result.exit_code, written["verdict"]) == (1, "problem")
    assert {"name", "outcome", "found", "advice", "items"} == set(written["checks"][0])


@pytest.mark.parametrize("words", [("--superlink", "here"), ("--health", "https://x:1"), ("--plan", "x.y=1")])
def test_options_that_can_not_be_read_are_bad_input(hospital, words):
    result = CliRunner().invoke(cli.app, ["check", str(hospital), *words])
    assert isinstance(result.exception, ChainwardError)
