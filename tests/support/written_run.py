"""A run folder with something in every kind of field, for which nothing was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ledgers import statement_of_spending

from chainward_server.results import (
    AloneRecord,
    DataSummary,
    LinkMetrics,
    LinkRecord,
    ModelSummary,
    Results,
    SiteScores,
    SiteSummary,
    StudentRound,
)
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.evaluation.scores import Scores
from chainward_shared.privacy.record import privacy_record
from chainward_shared.privacy.statements import Statements
from chainward_shared.protocol import TrainingLog


def scores(value: float) -> Scores:
    return Scores(n=20, accuracy=value, balanced_accuracy=value, macro_auc=value, ece=0.1)


def everywhere(value: float) -> SiteScores:
    return SiteScores(sites={"ash": scores(value)}, pooled=scores(value))


def a_run(directory: Path) -> RunFolder:
    """A failed run with something in every kind of field; nothing was trained for it."""
    folder = RunFolder.create(RunConfig.from_flat({"output.dir": str(directory)}))
    data = DataSummary(
        source="data.yaml",
        synthetic=False,
        classes=["clear", "mass"],
        image_size=32,
        channels=1,
        sites=[SiteSummary(site="ash", train=90, val=20, test=20, class_counts={"test": [10, 10]}, notes=["a note"])],
    )
    results = Results(run_id=folder.state.run_id, seed=3, data=data)
    log = TrainingLog(
        epochs=1, steps=3, images=90, loss=[0.5], seconds=1.0, precision="fp32", notes=["something was switched off"]
    )
    metrics = LinkMetrics(test=everywhere(0.6), validation=scores(0.6))
    common: dict[str, Any] = {"strand": 0, "lap": 0, "attempts": 1, "seconds": 1.0, "bytes_down": 1, "bytes_up": 1}
    results.links = [
        LinkRecord(step=0, site="ash", predecessor=None, status="done", training=log, metrics=metrics, **common),
        LinkRecord(step=1, site="ash", predecessor="ash", status="skipped", reason="it was away", **common),
    ]
    results.alone = [AloneRecord(site="ash", status="skipped", seconds=1.0, reason="it was away")]
    results.student_rounds = [
        StudentRound(
            round=1, stage="distil", sites=["ash"], failed={"ash": "away"}, seconds=1.0, bytes_down=0, bytes_up=0
        )
    ]
    results.final = {"chain": everywhere(0.6)}
    results.models = {"chain": ModelSummary(architecture="x", parameters=10, file_bytes=40, latency_ms=1.0)}
    folder.commit(results, *(link.key for link in results.links), "alone-ash", "student-round-1")
    statement = statement_of_spending(directory, folder.state.run_id)
    folder.write_privacy(privacy_record(Statements([statement]), ["ash"]))
    folder.end("failed", "the reason")
    return folder
