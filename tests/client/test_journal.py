"""What a hospital writes down of what it was asked and what it sent."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from chainward_client import journal as journal_module
from chainward_client.approval.web import at_work
from chainward_client.journal import Journal
from chainward_shared.models import Start, resolve_architecture
from chainward_shared.protocol import (
    BaseState,
    BaseTask,
    CardRequest,
    EvaluateResult,
    EvaluateTask,
    LinkResult,
    Refusal,
    Round,
    SumKeysTask,
    SumShares,
    SumSharesTask,
    SumTask,
    SumUnmaskTask,
    TrainingLog,
    pack,
)

MODEL = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)
TASK = EvaluateTask(run_id="run-1", architecture=MODEL, splits=["val"], threads=1, digest="a" * 64)
ANSWER = pack(EvaluateResult(site="ash", scores={}))


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path)


def test_a_request_and_its_answer_are_written_down_with_names_sizes_and_times(journal):
    log = TrainingLog(epochs=1, steps=1, images=1, loss=[1.0], seconds=1.0, precision="fp32")
    result = LinkResult(hop="h", site="ash", digest="a" * 64, training=log)
    arrays = ArrayRecord({"x": Array(np.zeros(1000, dtype=np.float32))})
    journal.note(pack(TASK))
    journal.note(pack(TASK), pack(result, {"model": arrays}), 2.5)
    sent, begun = journal.last(10)
    assert (begun.outcome, begun.kind, begun.run, begun.hop) == ("begun", "evaluate-task", "run-1", TASK.hop)
    assert (sent.outcome, sent.seconds, sent.reason) == ("sent", 2.5, None)
    assert sent.bytes >= 4000
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600


def test_a_refusal_is_written_down_with_its_reason_and_waiting_apart_from_it(journal):
    journal.note(pack(TASK), pack(Refusal(reason="no", final=True)), 0.0)
    journal.note(pack(TASK), pack(Refusal(reason="later", waiting=True)), 0.0)
    assert [(one.outcome, one.reason) for one in journal.last(9)] == [("waits", "later"), ("refused", "no")]


def test_what_is_asked_all_the_time_is_not_written_down(journal):
    journal.note(pack(CardRequest()))
    start = Start(name="w", file="1" * 64, digest="2" * 64)
    base = BaseTask(run_id="r", architecture=MODEL.model_copy(update={"start": start}), bytes=9, sha256="0" * 64)
    journal.note(pack(base))
    journal.note(pack(base), pack(BaseState(site="ash", complete=False, received=3)), 0.0)
    assert journal.last(9) == []
    journal.note(pack(base), pack(BaseState(site="ash", complete=True, received=9)), 0.0)
    assert [one.kind for one in journal.last(9)] == ["base-task"]


def test_a_request_that_can_not_be_read_is_not_called_a_journal_that_can_not_be_written(journal, caplog):
    request = pack(TASK)
    request.config_records["chainward"]["body"] = '{"run_id": "\\n"}'
    journal.note(request)
    journal.note(request, pack(Refusal(reason="a bad field")), 0.0)
    assert caplog.text == ""
    assert journal.last(9) == []


def test_work_goes_on_where_the_journal_can_not_be_written(tmp_path, caplog):
    (tmp_path / "journal.jsonl").mkdir()
    Journal(tmp_path).note(pack(TASK))
    assert "can't be written" in caplog.text
    Journal(tmp_path / "nowhere").note(pack(TASK))
    assert not (tmp_path / "nowhere").exists()
    assert Journal(tmp_path / "nowhere").last(3) == []


def test_the_journal_is_cut_when_it_is_long_and_keeps_the_newest_lines(journal, monkeypatch):
    monkeypatch.setattr(journal_module, "MOST_BYTES", 5_000)
    for number in range(100):
        journal.note(pack(TASK.model_copy(update={"run_id": f"run-{number}"})))
        assert journal.path.stat().st_size <= 5_000 + 300
    assert [one.run for one in journal.last(2)] == ["run-99", "run-98"]
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600


def test_lines_that_can_not_be_read_are_left_out(journal):
    journal.note(pack(TASK))
    with journal.path.open("ab") as file:
        file.write(b'{"half\n\xff\n[]\n')
    journal.note(pack(TASK), ANSWER, 1.0)
    assert [one.outcome for one in journal.last(10)] == ["sent", "begun"]


def test_what_was_begun_and_not_answered_is_being_worked_on(journal):
    now = datetime.now(UTC)
    journal.note(pack(TASK))
    assert at_work(journal.last(9), now).run == "run-1"
    assert at_work(journal.last(9), now + timedelta(days=8)) is None, "its process was killed long ago"
    journal.note(pack(TASK), ANSWER, 1.0)
    assert at_work(journal.last(9), now) is None


@pytest.mark.parametrize("step", [SumKeysTask, SumSharesTask, SumUnmaskTask, SumTask])
def test_every_message_of_a_secure_sum_is_written_down_with_its_run_and_hop(journal, step):
    round_ = Round(run_id="run-1", hop="head", task="0" * 64, members=("ash", "birch", "cedar"), threshold=2)
    further = {SumSharesTask: {"offers": []}, SumUnmaskTask: {"answered": []}, SumTask: {"shares": {}, "scores": TASK}}
    asked = pack(step(round=round_, **further.get(step, {})))
    journal.note(asked)
    journal.note(asked, pack(SumShares(site="ash", shares={})), 0.1)
    newest, *earlier = journal.last(9)
    hop = TASK.hop if step is SumTask else "head"
    assert (newest.kind, newest.run, newest.hop, newest.outcome) == (step.KIND, "run-1", hop, "sent")
    assert len(earlier) == (step is SumTask), "of what needs no work the answer alone is written down"
