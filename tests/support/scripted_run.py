"""A run folder as a coordinator leaves it at any moment, without a coordinator."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from chainward_server.results import (
    AloneRecord,
    DataSummary,
    LinkMetrics,
    LinkRecord,
    Results,
    SiteScores,
    SiteSummary,
    StudentRound,
)
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.evaluation.scores import Scores

SITES = {"ash": 100, "birch": 200, "cedar": 100}
START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def scores(value: float | None) -> Scores:
    return Scores(n=30, accuracy=value, balanced_accuracy=value, macro_auc=value, ece=0.1)


class ScriptedRun:
    """A coordinator that does nothing but write down what it would have done, at times of the test's choosing."""

    def __init__(self, directory, **settings):
        flat = {"output.dir": str(directory), "chain.compare-alone": False, "student.rounds": 0, **settings}
        self.folder = RunFolder.create(RunConfig.from_flat(flat))
        self.folder.state.started = START.isoformat()
        data = DataSummary(
            source="data.yaml",
            synthetic=False,
            classes=["a", "b"],
            image_size=32,
            channels=1,
            sites=[SiteSummary(site=site, train=train, val=9, test=9) for site, train in SITES.items()],
        )
        self.results = Results(run_id=self.folder.state.run_id, seed=0, data=data)
        self.enter("rendezvous", 0)

    @property
    def path(self):
        return self.folder.path

    def at(self, seconds: float) -> None:
        """Date what was written last."""
        file = self.path / "run.json"
        state = json.loads(file.read_text())
        state["updated"] = (START + timedelta(seconds=seconds)).isoformat()
        file.write_text(json.dumps(state))

    def enter(self, phase, seconds: float) -> None:
        self.folder.enter(phase)
        self.at(seconds)

    def hop(self, site, seconds: float, *, took: float, status="done", value=0.5, step=None, strand=0, **more) -> None:
        done = status in ("done", "retried")
        pooled = scores(value)
        before = [link.site for link in self.results.links if link.metrics and link.strand == strand]
        link = LinkRecord(
            strand=strand,
            lap=0,
            step=len(self.results.links) if step is None else step,
            site=site,
            predecessor=before[-1] if before else None,
            status=status,
            attempts=1,
            seconds=took,
            bytes_down=0,
            bytes_up=0,
            metrics=LinkMetrics(test=SiteScores(sites={}, pooled=pooled), validation=pooled) if done else None,
        ).model_copy(update=more)
        self.results.links.append(link)
        self.folder.commit(self.results, link.key)
        self.at(seconds)

    def alone(self, site, seconds: float, *, took: float) -> None:
        record = AloneRecord(site=site, status="done", seconds=took)
        self.results.alone.append(record)
        self.folder.commit(self.results, record.key)
        self.at(seconds)

    def round(self, number, seconds: float, *, took: float, **more) -> None:
        record = StudentRound(
            round=number,
            stage="distil",
            sites=list(SITES),
            seconds=took,
            bytes_down=0,
            bytes_up=0,
            validation=scores(0.6),
            **more,
        )
        self.results.student_rounds.append(record)
        self.folder.commit(self.results, record.key)
        self.at(seconds)

    def end(self, status, seconds: float, reason=None, *, report=True) -> None:
        if status == "finished":
            self.results.final["chain"] = SiteScores(sites={}, pooled=scores(0.7))
            self.folder.write_results(self.results)
            if report:
                self.folder.write_text("report.html", "<!doctype html>")
        self.folder.end(status, reason)
        self.at(seconds)
