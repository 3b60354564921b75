"""MLflow: a database file on this machine, or the server whose address is set."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from chainward_server.run_folder import RunFolder
from chainward_server.tracking.tracking import Figure

EXPERIMENT = "chainward"
TAG = "chainward.run"
AT_ONCE = 500
"""Metrics in one request; MLflow takes at most 1000."""
_QUIETLY = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_DB_SDK": "false",
}
_ENDS = {"finished": "FINISHED", "incomplete": "FINISHED", "stopped": "KILLED"}


class MLflow:
    """One run in MLflow.

    Parameters
    ----------
    folder : of the run; `output.track_to` of its configuration may be a server's address
    local : where to write on this machine, where it is none
    """

    def __init__(self, folder: RunFolder, local: Path) -> None:
        for name, value in _QUIETLY.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        where = folder.config.output.track_to
        artefacts = None
        if not re.match(r"https?://", where):
            local.mkdir(parents=True, exist_ok=True)
            where, artefacts = f"sqlite:///{local / 'mlflow.db'}", (local / "mlflow-artefacts").as_uri()
        self._client = MlflowClient(tracking_uri=where)
        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT, artefacts)
        run_id = folder.state.run_id
        runs = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run_id}'", max_results=1)
        self.known = bool(runs)
        run = runs[0] if runs else self._client.create_run(experiment, run_name=run_id, tags={TAG: run_id})
        self.run = run.info.run_id
        self._client.update_run(self.run, status="RUNNING")

    def parameters(self, values: Mapping[str, str]) -> None:
        """Note the settings of the run; a resumed one keeps those it has."""
        from mlflow.entities import Param

        if not self.known:
            new = [Param(_name(name), value[:5_000]) for name, value in values.items()]
            for part in _parts(new, 100):
                self._client.log_batch(self.run, params=part)

    def log(self, found: list[Figure]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_name(figure.name), figure.value, now, figure.step) for figure in found]
        for part in _parts(metrics, AT_ONCE):
            self._client.log_batch(self.run, metrics=part)

    def artefacts(self, files: list[Path], digests: Mapping[str, str]) -> None:
        """Keep files, and the SHA-256 of each model file as a tag."""
        for name, digest in digests.items():
            self._client.set_tag(self.run, _name(f"sha256/{name}"), digest)
        for file in files:
            self._client.log_artifact(self.run, str(file))

    def end(self, status: str) -> None:
        self._client.set_tag(self.run, "chainward.status", status)
        self._client.set_terminated(self.run, _ENDS.get(status, "FAILED"))


def _parts(items: list, size: int) -> Iterator[list]:  # type: ignore[type-arg]
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _name(name: str) -> str:
    """Return a name as MLflow takes it: other characters, as a hospital's id may have, are written as their code."""
    return re.sub(r"[^A-Za-z0-9_\-. /]", lambda found: f"_u{ord(found[0]):04x}", name)[:250]
