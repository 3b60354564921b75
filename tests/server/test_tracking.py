"""A run in MLflow and TensorBoard: read back by their own clients, under the names of metrics.json."""

from __future__ import annotations

import json
import os
import socket

import pytest
from whole_run import CHAIN_ONLY

from chainward_server import tracking as tracking_package
from chainward_server.results import Results
from chainward_server.tracking import check_trackers
from chainward_server.tracking import tracking as tracking_module
from chainward_server.tracking.tracking import figures
from chainward_shared.config import RunConfig
from chainward_shared.errors import ConfigError


@pytest.fixture
def short(settings, tmp_path):
    return settings | {
        "chain.epochs": 1,
        "student.rounds": 1,
        "student.finetune-rounds": 0,
        "output.track-to": str(tmp_path / "tracked"),
    }


@pytest.fixture
def shortest(short):
    return short | CHAIN_ONLY | {"federation.sites": "ash,birch"}


def read_tensorboard(folder):
    """Return {name: {step: value}} and the names of the texts, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    scalars = {name: {one.step: one.value for one in accumulator.Scalars(name)} for name in tags["scalars"]}
    return scalars, {name.removesuffix("/text_summary") for name in tags["tensors"]}


def mlflow_client(folder):
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    mlflow = pytest.importorskip("mlflow")
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def at(content, figure):
    """Return what metrics.json has at the place that a figure names."""
    for part in figure.name.split("/"):
        if isinstance(content, list):
            by_site = next((one for one in content if one.get("site") == part), None)
            content = by_site if figure.step == 0 and by_site else content[figure.step - 1][part]
        else:
            content = content[part]
    return content


def test_every_number_that_was_measured_is_tracked_by_both_under_its_name_in_metrics_json(short, coordinated, tmp_path):
    pytest.importorskip("tensorboard")
    client = mlflow_client(tmp_path / "tracked")
    folder, results = coordinated(short | {"output.track": "mlflow, tensorboard", "output.track-models": True})
    expected = {(one.name, one.step): one.value for one in figures(results)}
    content = json.loads((folder.path / "metrics.json").read_text())
    assert len(expected) > 200
    for one in figures(results):
        assert at(content, one) == pytest.approx(one.value), one
    for name, step in (
        ("links/metrics/validation/balanced_accuracy", 3),
        ("links/metrics/test/sites/ash/macro_auc", 4),
        ("alone/birch/metrics/test/pooled/accuracy", 0),
        ("student_rounds/validation/balanced_accuracy", 1),
        ("final/student/pooled/balanced_accuracy", 0),
    ):
        assert (name, step) in expected

    scalars, texts = read_tensorboard(tmp_path / "tracked" / "tensorboard" / folder.state.run_id)
    found = {(name, step): value for name, steps in scalars.items() for step, value in steps.items()}
    timings = {key for key in expected if key[0].startswith("timings/")}
    assert found.keys() >= expected.keys() - timings
    for key in expected.keys() - timings:
        assert found[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6)
    assert texts == {"settings", "files", "models", "status"}

    experiment = client.get_experiment_by_name("chainward")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.tags["chainward.status"]) == ("FINISHED", "finished")
    assert run.data.params["chain.epochs"] == "1"
    assert run.data.tags["sha256/student"] == folder.state.models["student"]
    history = client.get_metric_history(run.info.run_id, "links/metrics/validation/balanced_accuracy")
    assert {one.step: one.value for one in history} == {
        number: link.metrics.validation.balanced_accuracy for number, link in enumerate(results.links, 1)
    }
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert kept == {
        "report.html",
        "metrics.json",
        "privacy.json",
        "config.toml",
        "chain.safetensors",
        "student.safetensors",
    }


class Failing:
    """A tracker that works until it doesn't."""

    known = False

    def __init__(self, after):
        self.calls, self.after = 0, after

    def _call(self, *arguments):
        self.calls += 1
        if self.calls > self.after:
            raise OSError("no space left\non the tracker")

    parameters = log = artefacts = end = _call


@pytest.mark.parametrize("after", [0, 2, 100])
def test_a_tracker_that_fails_does_not_end_the_run(shortest, coordinated, monkeypatch, caplog, after):
    tracker = Failing(after)
    monkeypatch.setattr(tracking_module, "_opened", lambda name, folder: tracker)
    folder, _ = coordinated(shortest | {"output.track": "mlflow"})
    assert folder.state.status == "finished"
    assert ("tracking with mlflow failed (OSError: no space left)" in caplog.text) == (after < 100)
    assert after < tracker.calls <= after + tracking_module.FAILURES or after == 100


def test_a_tracker_that_can_not_begin_does_not_end_the_run(shortest, coordinated, monkeypatch, caplog):
    def broken(name, folder):
        raise ValueError("no such server")

    monkeypatch.setattr(tracking_module, "_opened", broken)
    folder, _ = coordinated(shortest | {"output.track": "mlflow"})
    assert folder.state.status == "finished"
    assert "tracking with mlflow can't begin (ValueError: no such server)" in caplog.text


@pytest.mark.parametrize("name", ["mlflow", "tensorboard"])
def test_a_library_that_is_missing_is_said_in_one_line_before_the_run_begins(monkeypatch, tmp_path, name):
    monkeypatch.setattr(tracking_module.importlib.util, "find_spec", lambda library: None)
    config = RunConfig.from_flat({"output.track": name, "output.dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=rf"{name} is not installed; pip install 'chainward\[track-{name}\]'"):
        check_trackers(config)
    check_trackers(RunConfig.from_flat({"output.dir": str(tmp_path)}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"output.track": "mlfow"}, "there is no tracker 'mlfow' .did you mean 'mlflow'"),
        ({"output.track": "none, mlflow"}, "'none' and a tracker"),
        ({"output.track-to": "/tmp/x"}, "output.track is 'none'"),
        ({"output.track-models": True, "output.track": "tensorboard"}, "output.track-models"),
        ({"output.track": "tensorboard", "output.track-to": "https://a.example"}, "TensorBoard writes into a folder"),
        ({"output.track": "mlflow", "output.track-to": "here"}, "expected an absolute path"),
        ({"output.track": "mlflow", "output.track-to": "databricks://x"}, "expected an absolute path"),
    ],
)
def test_settings_of_tracking_that_can_not_hold_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        RunConfig.from_flat(settings)


def test_nothing_is_tracked_unless_it_is_asked_for(shortest, coordinated, monkeypatch):
    monkeypatch.setattr(tracking_module, "_opened", lambda name, folder: pytest.fail("a tracker was opened"))
    folder, _ = coordinated({key: value for key, value in shortest.items() if key != "output.track-to"})
    assert not (folder.path.parent / "tracking").exists()


@pytest.mark.slow
def test_local_tracking_uses_no_network(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("tensorboard")
    from chainward_server.run_folder import RunFolder

    def refused(self, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    config = RunConfig.from_flat({"output.track": "mlflow,tensorboard", "output.dir": str(tmp_path)})
    folder = RunFolder.create(config)
    results = Results.model_validate(
        {
            "run_id": folder.state.run_id,
            "seed": 0,
            "data": {"source": "x", "synthetic": True, "classes": ["a"], "image_size": 8, "channels": 1, "sites": []},
            "timings": {"chain": 2.5},
        }
    )
    with tracking_package.Tracking(folder):
        folder.commit(results)
        folder.state.status = "incomplete"
    with tracking_package.Tracking(folder):  # resumed: the same run goes on in both
        folder.commit(results.model_copy(update={"timings": {"chain": 4.5}}))
    client = mlflow_client(tmp_path / "tracking")
    (run,) = client.search_runs([client.get_experiment_by_name("chainward").experiment_id])
    assert [one.value for one in client.get_metric_history(run.info.run_id, "timings/chain")] == [2.5, 4.5]
    scalars, _ = read_tensorboard(tmp_path / "tracking" / "tensorboard" / folder.state.run_id)
    assert scalars == {"timings/chain": {0: 4.5}}
