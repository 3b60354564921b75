"""What a site keeps between messages: finished work, the auxiliary teachers of the last two rounds, and no more."""

from __future__ import annotations

import errno
import os
import time

import pytest
import torch

from chainward_client.store import SiteStore
from chainward_shared import weights
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError, StoreError
from chainward_shared.models import Architecture
from chainward_shared.protocol import StudentResult, StudentTask, TrainingLog

ARCHITECTURE = Architecture(name="test_convnext", num_classes=3, in_chans=1, image_size=32)


def save(store: SiteStore, after_round: int) -> None:
    store.save_auxiliary({"w": torch.full((2,), float(after_round))}, ARCHITECTURE, after_round)


def loaded(store: SiteStore, before_round: int) -> float | None:
    state = store.load_auxiliary(before_round)
    return None if state is None else state["w"][0].item()


def kept(store: SiteStore) -> list[str]:
    return sorted(path.name.removeprefix("auxiliary-round-") for path in store.folder.iterdir())


def test_before_the_first_round_there_is_none(tmp_path):
    assert loaded(SiteStore(tmp_path, "run"), before_round=1) is None


def test_the_selection_of_the_start_serves_the_first_round(tmp_path):
    store = SiteStore(tmp_path, "run")
    save(store, 0)
    assert loaded(store, before_round=1) == 0.0


def test_the_last_two_rounds_are_kept(tmp_path):
    store = SiteStore(tmp_path, "run")
    counts = []
    for after_round in range(5):
        save(store, after_round)
        counts.append(len(kept(store)))
    assert counts == [1, 2, 2, 2, 2]
    assert kept(store) == ["0003.safetensors", "0004.safetensors"]


def test_a_round_that_is_asked_for_again_gets_what_it_had(tmp_path):
    store = SiteStore(tmp_path, "run")
    for after_round in range(4):
        save(store, after_round)
    assert loaded(store, before_round=4) == 3.0
    assert loaded(store, before_round=3) == 2.0, "not what this round itself has left behind"


def test_a_site_that_missed_rounds_goes_on_with_the_newest(tmp_path):
    store = SiteStore(tmp_path, "run")
    save(store, 1)
    assert loaded(store, before_round=6) == 1.0


def test_what_is_too_new_is_not_taken(tmp_path):
    store = SiteStore(tmp_path, "run")
    save(store, 3)
    assert loaded(store, before_round=3) is None


def test_a_round_again_replaces_its_file(tmp_path):
    store = SiteStore(tmp_path, "run")
    save(store, 1)
    store.save_auxiliary({"w": torch.full((2,), 9.0)}, ARCHITECTURE, 1)
    assert loaded(store, before_round=2) == 9.0


def test_another_process_finds_it(tmp_path):
    save(SiteStore(tmp_path, "run"), 2)
    assert loaded(SiteStore(tmp_path, "run"), before_round=3) == 2.0


def test_runs_do_not_see_each_other(tmp_path):
    save(SiteStore(tmp_path, "run-1"), 0)
    assert loaded(SiteStore(tmp_path, "run-2"), before_round=1) is None


@pytest.mark.parametrize("run_id", ["../../etc", "/etc", "..", ".", "", "a/b", "..\\up", "run\0", "läuft", "..."])
def test_no_run_id_leads_out_of_the_sites_folder(tmp_path, run_id):
    store = SiteStore(tmp_path / "state", run_id)
    assert store.folder.resolve().parent == (tmp_path / "state" / "runs").resolve()
    save(store, 0)
    assert loaded(store, before_round=1) == 0.0


@pytest.mark.parametrize(
    "name", ["privacy", "privileged", "images", "features", "bases", "weights", "runs", "journal.jsonl"]
)
def test_a_run_named_like_something_of_the_sites_own_does_not_touch_it(tmp_path, name):
    own = a_run(tmp_path / name, days=999)
    save(SiteStore(tmp_path, name), 0)
    SiteStore(tmp_path, "another").tidy()
    assert [path.name for path in own.iterdir() if path.is_file()] == ["link-task-abc.safetensors"]


def test_a_file_tells_its_architecture(tmp_path):
    store = SiteStore(tmp_path, "run")
    save(store, 0)
    _, metadata = weights.load_file(next(store.folder.iterdir()))
    assert Architecture.from_metadata(metadata) == ARCHITECTURE


def one_line_refusal(store: SiteStore) -> str:
    with pytest.raises(ChainwardError) as caught:
        save(store, 2)
    message = str(caught.value)
    assert message.startswith(f"{store.folder}: can't be written (")
    assert "\n" not in message, "a refusal is one line"
    return message


def test_a_state_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "state").write_text("")
    assert "free space or fix its rights" in one_line_refusal(SiteStore(tmp_path / "state", "run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in one_line_refusal(SiteStore(tmp_path, "run"))
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_is_refused_and_keeps_the_rounds_before(tmp_path, monkeypatch):
    store = SiteStore(tmp_path, "run")
    save(store, 0)
    save(store, 1)

    def disk_full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        assert "No space left" in one_line_refusal(store)
    assert kept(store) == ["0000.safetensors", "0001.safetensors"]
    assert loaded(store, before_round=3) == 1.0


def test_a_damaged_file_is_refused(tmp_path):
    store = SiteStore(tmp_path, "run")
    save(store, 0)
    path = next(store.folder.iterdir())
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StoreError, match="not a readable safetensors file"):
        store.load_auxiliary(before_round=1)


# --- what other runs left ---


def a_run(folder, *, days=0.0, name="link-task-abc.safetensors", size=10):
    folder.mkdir(parents=True)
    (folder / name).write_bytes(bytes(size))
    past = time.time() - days * 86_400
    os.utime(folder / name, (past, past))
    return folder


def test_runs_of_long_ago_are_removed_and_younger_ones_are_not(tmp_path):
    old, young, own = (a_run(tmp_path / "runs" / name, days=days) for name, days in (("a", 31), ("b", 29), ("own", 99)))
    SiteStore(tmp_path, "own").tidy()
    assert (old.exists(), young.exists(), own.exists()) == (False, True, True)


def test_the_oldest_runs_beyond_the_size_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(SiteStore, "KEPT_BYTES", 25)
    runs = [a_run(tmp_path / "runs" / name, days=days) for name, days in (("a", 3), ("b", 2), ("c", 1))]
    SiteStore(tmp_path, "own").tidy()
    assert [run.exists() for run in runs] == [False, True, True]


def test_what_lies_beside_the_runs_is_never_removed(tmp_path):
    beside = [a_run(tmp_path / name, days=999) for name in ("privacy", "privileged", "images")]
    elsewhere = a_run(tmp_path / "elsewhere", days=999)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(elsewhere)
    SiteStore(tmp_path, "own").tidy()
    assert all(folder.exists() for folder in (*beside, elsewhere))


def test_an_answer_is_found_for_the_same_task_only_and_a_damaged_one_is_not_used(tmp_path):
    store = SiteStore(tmp_path, "run")
    task = StudentTask(
        run_id="run",
        round=1,
        architecture=ARCHITECTURE,
        recipe=RunConfig().student_recipe("distil"),
        student_digest="ab" * 32,
        auxiliary_digest="cd" * 32,
    )
    body = StudentResult(
        round=1,
        site="oak",
        digest="0" * 64,
        training=TrainingLog(epochs=1, steps=1, images=1, loss=[0.5], seconds=1.0, precision="fp32"),
        auxiliary_kept=None,
    )
    store.save_answer(task, body, {"weight": torch.ones(3)})
    found, state = store.load_answer(task, StudentResult)
    assert found == body
    assert torch.equal(state["weight"], torch.ones(3))
    again = task.model_copy(update={"auxiliary_digest": None})
    assert store.load_answer(again, StudentResult) is not None, "the site has its own auxiliary teacher by now"
    assert store.load_answer(task.model_copy(update={"student_digest": "other"}), StudentResult) is None
    path = next(store.folder.glob("student-task-*"))
    path.write_bytes(path.read_bytes()[:-1])
    assert store.load_answer(task, StudentResult) is None
