"""All that a hospital writes while it answers is for its own account alone, whatever the umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from private_hospital import answer, architecture, failing, hospital, link, scores, state_of, student

from chainward_client import checkpoint
from chainward_client.private_training import PrivateTraining
from chainward_shared.protocol import kind_of


@pytest.fixture(params=[0o000, 0o002, 0o022], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def readable_by_others(folder: Path) -> list[str]:
    found = [folder, *folder.rglob("*")]
    return [f"{path} {stat.S_IMODE(path.stat().st_mode):04o}" for path in found if path.stat().st_mode & 0o077]


@pytest.mark.slow
def test_nothing_in_the_state_folder_of_a_private_run_may_be_read_by_others(tmp_path, umask, monkeypatch):
    node, model = hospital(tmp_path / "site"), architecture()
    state = state_of(model, "as they come")
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    for request in (link, student, scores):
        assert kind_of(answer(node, *request(model, state))).endswith("-result")
    monkeypatch.setattr(PrivateTraining, "step", failing(2, RuntimeError("as a crash leaves it"), PrivateTraining.step))
    kind, task, arrays = link(model, state)
    answer(node, kind, task.model_copy(update={"hop": "another"}), arrays)
    folder = tmp_path / "site" / "state"
    written = {path.name.split("-")[0] for path in folder.rglob("*") if path.is_file()}
    assert written >= {"ledger.jsonl", "ledger.key", "site.key", "link", "student", "evaluate", "auxiliary", "half"}
    assert readable_by_others(folder) == []
    assert os.umask(umask) == umask, "the umask is what it was"
