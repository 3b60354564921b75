"""`chainward attack`: whom a simulated run's models were trained on, guessed from the models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm
from typer.testing import CliRunner

from chainward_client.data.site_data import SPLITS
from chainward_client.private_training import keeps_labels
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.models import build_model, resolve_architecture
from chainward_shared.privacy.calibration import analytic_noise
from chainward_simulations import attack as attack_module
from chainward_simulations.attack import ALL_SITES, Bound, attack_run
from chainward_simulations.cli import app
from chainward_simulations.runner import open_sites

SETTINGS = {
    "federation.num-sites": 2,
    "chain.backbone": "test_vit",
    "chain.patch-size": 8,
    "chain.epochs": 1,
    "chain.compare-alone": False,
    "chain.label-fraction": 0.3,
    "student.rounds": 1,
    "student.epochs": 1,
    "student.finetune-rounds": 0,
    "federation.deadline": 5.0,
    "federation.threads": 1,
}


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return RunConfig.from_flat(SETTINGS)


@pytest.fixture(scope="module")
def sites(config):
    return open_sites(config)


@pytest.fixture(scope="module")
def untrained(config, sites):
    site = next(iter(sites.values()))
    side = site.splits["train"].images.shape[-1]
    architecture = resolve_architecture(
        "test_vit", num_classes=len(site.classes), in_chans=1, image_size=side, patch_size=8
    )
    return {"chain": (architecture, dict(build_model(architecture, 0).state_dict()))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, coordinated):
    folder, _ = coordinated(SETTINGS | {"output.dir": str(tmp_path_factory.mktemp("runs"))})
    return folder


def test_a_finished_run_is_attacked_by_its_id(finished, sites):
    folder = finished
    words = ["attack", folder.path.name, "--dir", str(folder.path.parent)]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    lines = content["attacks"]
    assert [(one["model"], one["site"]) for one in lines] == [
        (model, site) for model in ("student", "chain") for site in (ALL_SITES, *sites)
    ]
    assert all(one["low"] <= one["auc"] <= one["high"] for one in lines)
    assert lines[0]["members"] == lines[1]["members"] + lines[2]["members"]
    table = CliRunner().invoke(app, ["attack", str(folder.path)])
    assert table.exit_code == 0
    assert "AUC 0.5 is a coin" in table.output


@pytest.mark.slow
def test_a_private_head_is_attacked_beside_what_privacy_allows_at_most_and_references_have_such_a_head(
    tmp_path, coordinated, monkeypatch
):
    private = {"privacy.mode": "dp-sgd", "privacy.epsilon": 3.0, "privacy.delta": 1e-4, "chain.label-fraction": 1.0}
    untrained = {"chain.head": "statistics", "chain.laps": 0, "student.rounds": 0}
    folder, _ = coordinated(SETTINGS | private | untrained | {"output.dir": str(tmp_path)})
    monkeypatch.setattr(attack_module, "train", None)  # nothing is trained
    result = CliRunner().invoke(app, ["attack", str(folder.path), "--calibrate", "--json"])
    assert result.exit_code == 0, result.output
    lines = json.loads(result.stdout)["attacks"]
    assert [one["kind"] for one in lines] == ["loss"] * 3 + ["calibrated"] * 3
    (share, _), noise = lines[0]["bound"]["found"], analytic_noise(3.0, 1e-4)
    assert all(one["bound"] == lines[0]["bound"] for one in lines), "all hospitals spend the same here"
    assert share == pytest.approx(norm.cdf(norm.ppf(0.01) + 1 / noise), rel=0.02)
    assert lines[0]["bound"]["auc"] == pytest.approx(norm.cdf(1 / noise / 2**0.5), rel=0.02)
    assert all(one["low"] <= lines[0]["bound"]["auc"] for one in lines)


@pytest.mark.slow
def test_where_one_hospital_has_no_privacy_there_is_no_bound_for_all(config, sites, untrained):
    first, second = sites
    found = {
        one.site: one.bound for one in attack_run(config, untrained, sites, bounds={first: Bound(0.6, (0.02, 0.002))})
    }
    assert found == {ALL_SITES: None, first: Bound(0.6, (0.02, 0.002)), second: None}


def test_a_run_without_a_model_is_refused(finished, tmp_path):
    folder = RunFolder.open(Path(shutil.copytree(finished.path, tmp_path / finished.path.name)))
    folder.state.models.clear()
    folder._write_state()
    result = CliRunner().invoke(app, ["attack", str(folder.path)])
    assert result.exit_code != 0
    assert "has released no model yet" in str(result.exception)


@pytest.mark.slow
def test_only_patients_whose_labels_were_used_are_members_and_only_strangers_are_outsiders(config, sites, untrained):
    found = {one.site: one.attack for one in attack_run(config, untrained, sites)}
    for site, data in sites.items():
        every = {split: set(map(str, data.splits[split].patients)) for split in SPLITS}
        assert 0 < found[site].members < 0.6 * len(every["train"])
        assert found[site].outsiders == len((every["val"] | every["test"]) - every["train"])


@pytest.mark.slow
def test_of_a_private_site_the_labels_are_those_kept_by_the_patients_hash(sites, untrained):
    private = RunConfig.from_flat(SETTINGS | {"privacy.mode": "dp-sgd", "privacy.delta": 1e-4})
    found = {one.site: one.attack for one in attack_run(private, untrained, sites)}
    for site, data in sites.items():
        patients = data.splits["train"].patients
        assert found[site].members == len(np.unique(patients[keeps_labels(patients, 0.3, private.seed, site)]))


@pytest.mark.slow
def test_an_untrained_model_betrays_nobody(config, sites, untrained):
    (everyone, *_) = attack_run(config, untrained, sites)
    assert everyone.attack.low < 0.5 < everyone.attack.high


@pytest.mark.slow
def test_calibration_trains_references_on_outsiders_only_and_never_uses_one_on_its_own(
    config, sites, untrained, monkeypatch
):
    trained: list[set[str]] = []

    def note(model, cases, *names, **more):
        trained.append(set(map(str, cases.patients)))

    monkeypatch.setattr(attack_module, "train", note)
    monkeypatch.setattr(attack_module, "calibrated", watched := Watched(trained))
    found = attack_run(config, untrained, sites, calibrate=True)
    assert [one.kind for one in found] == ["loss"] * 3 + ["calibrated"] * 3
    first, second = trained
    assert first and second and not first & second
    members = {str(patient) for data in sites.values() for patient in data.splits["train"].patients}
    assert not (first | second) & members
    assert watched.calls == 4, "members and outsiders of two sites"


class Watched:
    """`calibrated`, which notes that each case is compared with one reference."""

    def __init__(self, trained: list[set[str]]) -> None:
        self.trained, self.calls = trained, 0

    def __call__(self, losses: np.ndarray, of_references: np.ndarray) -> np.ndarray:
        self.calls += 1
        assert (np.isnan(of_references).sum(axis=0) == 1).all()
        return np.asarray(losses - np.nanmean(of_references, axis=0))
