"""The privacy ledger: what counts as spent, and that nothing but what the site wrote is read."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledgers import KEY, OTHER_KEY, spend

from chainward_shared.errors import LedgerError
from chainward_shared.privacy.accounting import Mechanism
from chainward_shared.privacy.entries import Head
from chainward_shared.privacy.ledger import Ledger, Reservation
from chainward_shared.privacy.signing import canonical_json, sign

WORK = {"run": "r", "phase": "chain", "hop": "lap-1", "unit": "patient", "delta": 1e-5}


def training(steps: int) -> Mechanism:
    return Mechanism("dp-sgd", 1.0, 0.01, steps)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "privacy" / "ledger.jsonl"


@pytest.fixture
def ledger(path) -> Ledger:
    return Ledger.create(path, "oak", KEY)


def spent(ledger: Ledger, steps: int = 100, done: int | None = None, **work: str) -> Reservation:
    """Reserve, begin and, if `done` is given, commit."""
    return spend(ledger, training(steps), done, **{**WORK, **work})


def steps_of(ledger: Ledger, **which: object) -> int:
    return sum(mechanism.steps for mechanism in ledger.mechanisms(**which))


def reopened(path: Path) -> Ledger:
    return Ledger.open(path, KEY, "oak")


def refusal_of(path: Path, key: Ed25519PrivateKey = KEY, site: str = "oak") -> str:
    with pytest.raises(LedgerError) as caught:
        Ledger.open(path, key, site)
    message = str(caught.value)
    assert "\n" not in message, "a refusal is one line"
    return message


def head_file(path: Path) -> Path:
    return path.with_name("ledger.jsonl.head")


# --- what counts as spent ---


def test_a_new_ledger_has_spent_nothing(ledger):
    assert ledger.mechanisms() == []
    assert ledger.head.sequence == 1


def test_what_is_reserved_counts_in_full_until_it_is_committed(ledger, path):
    reservation = spent(ledger, 100)
    assert steps_of(reopened(path)) == 100
    ledger.commit(reservation, 60)
    assert steps_of(reopened(path)) == 60


def test_what_is_released_before_it_began_does_not_count(ledger, path):
    ledger.release(ledger.reserve(training(100), **WORK))
    assert reopened(path).mechanisms() == []


def test_a_run_counts_its_own_and_the_lifetime_counts_all(ledger, path):
    spent(ledger, 100, 100, run="first")
    spent(ledger, 30, 20, run="second")
    again = reopened(path)
    assert [steps_of(again, run=run) for run in ("first", "second", "third", None)] == [100, 20, 0, 120]


def test_other_noise_is_kept_apart(ledger):
    spent(ledger, 100, 100)
    ledger.reserve(Mechanism("laplace", 10.0, 1.0, 3), **WORK)
    assert sorted(ledger.mechanisms(), key=str) == [training(100), Mechanism("laplace", 10.0, 1.0, 3)]


def test_what_was_spent_at_an_earlier_head_can_be_asked(ledger):
    reservation = spent(ledger, 100)
    before = ledger.head.sequence
    ledger.commit(reservation, 60)
    assert [steps_of(ledger, upto=upto) for upto in (1, before, None)] == [0, 100, 60]


def test_never_more_than_was_reserved_is_committed(ledger):
    reservation = spent(ledger, 100)
    for steps in (101, 0, -1):
        with pytest.raises(LedgerError, match=f"is for 100 steps; {steps} can't be committed"):
            ledger.commit(reservation, steps)


def test_nothing_is_committed_that_never_began(ledger):
    with pytest.raises(LedgerError, match="was never begun: nothing to commit; release it"):
        ledger.commit(ledger.reserve(training(100), **WORK), 100)


def test_nothing_is_released_that_has_begun(ledger):
    with pytest.raises(LedgerError, match="was begun: noisy steps may have been done; commit it"):
        ledger.release(spent(ledger))
    assert steps_of(ledger) == 100


def test_nothing_is_released_by_another_process(ledger):
    reservation = ledger.reserve(training(100), **WORK)
    child = os.fork()
    if not child:
        try:
            ledger.release(reservation)
        except LedgerError as error:
            os._exit(7 if "made by another process" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_reservation_ends_once(ledger):
    reservation = spent(ledger, 100, 60)
    with pytest.raises(LedgerError, match="was committed already; its work must not be used again"):
        ledger.commit(reservation, 50)
    released = ledger.reserve(training(5), **WORK)
    ledger.release(released)
    with pytest.raises(LedgerError, match="was released already"):
        ledger.release(released)


def test_work_whose_process_died_goes_on_inside_its_reservation(ledger, path):
    spent(ledger, 100, 100, hop="lap-1")
    spent(ledger, 70, hop="lap-2")  # its process dies here
    again = reopened(path)
    resumed = again.resume("r", "chain", "lap-2")
    assert resumed.mechanism == training(70)
    with pytest.raises(LedgerError, match="was begun"):
        again.release(resumed)
    again.commit(resumed, 70)
    assert steps_of(again) == 170, "resumed work is paid once"


@pytest.mark.parametrize("work", [("r", "chain", "lap-1"), ("r", "chain", "lap-9"), ("other", "chain", "lap-2")])
def test_there_is_nothing_to_resume_in_finished_or_other_work(ledger, work):
    spent(ledger, 100, 100, hop="lap-1")
    spent(ledger, 70, hop="lap-2")
    assert ledger.resume(*work) is None


def test_a_ledger_counts_in_one_unit(ledger):
    spent(ledger)
    with pytest.raises(LedgerError, match="counts per patient; it can't also count per image"):
        ledger.reserve(training(1), **{**WORK, "unit": "image"})


@pytest.mark.parametrize(
    ("field", "value"), [("delta", 0.0), ("delta", 1.0), ("delta", -1.0), ("unit", "hospital"), ("run", "x" * 300)]
)
def test_an_entry_out_of_range_is_refused_and_nothing_written(ledger, path, field, value):
    before = path.read_bytes()
    with pytest.raises(LedgerError):
        ledger.reserve(training(1), **{**WORK, field: value})
    assert path.read_bytes() == before


def test_an_entry_says_what_was_spent_with_which_software(ledger, path):
    ledger.reserve(training(100), **WORK, clip_norm=0.5, seeded=True)
    entry = json.loads(path.read_text().splitlines()[-1])
    assert entry["mechanism"] == {
        "kind": "dp-sgd",
        "noise_multiplier": 1.0,
        "sample_rate": 0.01,
        "steps": 100,
        "clip_norm": 0.5,
    }
    assert {name: entry[name] for name in ("site", "run", "phase", "hop", "unit", "delta", "state", "seeded")} == {
        "site": "oak",
        "run": "r",
        "phase": "chain",
        "hop": "lap-1",
        "unit": "patient",
        "delta": 1e-5,
        "state": "reserved",
        "seeded": True,
    }
    assert set(entry["versions"]) == {"python", "chainward", "torch", "opacus", "dp-accounting"}
    assert datetime.fromisoformat(entry["time"]).utcoffset() == timedelta(0)


def test_with_the_public_key_a_ledger_is_read_and_not_written(ledger, path):
    spent(ledger)
    reader = Ledger.open(path, KEY.public_key(), "oak")
    assert steps_of(reader) == 100
    with pytest.raises(LedgerError, match="opened with the public key only"):
        reader.reserve(training(1), **WORK)


def test_opening_changes_nothing(ledger, path):
    spent(ledger)
    path.write_bytes(path.read_bytes() + b'{"torn')
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    reopened(path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_second_ledger_is_not_made_over_the_first(ledger, path):
    spent(ledger)
    with pytest.raises(LedgerError, match="there is a ledger already"):
        Ledger.create(path, "oak", KEY)
    head_file(path).unlink()
    with pytest.raises(LedgerError, match=r"ledger\.jsonl\.head is missing; restore it"):
        Ledger.create(path, "oak", KEY)
    assert path.read_bytes().count(b"\n") == 2


def test_a_ledger_that_vanished_is_not_replaced_by_an_empty_one(ledger, path):
    spent(ledger)
    path.unlink()
    with pytest.raises(LedgerError, match="it holds 0 entries, but its head counts 2"):
        Ledger.create(path, "oak", KEY)
    with pytest.raises(LedgerError, match="it holds 0 entries, but its head counts 2"):
        ledger.reserve(training(1), **WORK)


# --- damage ---


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def resigned(line: bytes, key: Ed25519PrivateKey, **changes: object) -> bytes:
    """The same entry with changes, hash and signature made anew as the ledger would."""
    content = {name: value for name, value in json.loads(line).items() if name not in ("hash", "signature")} | changes
    digest = hashlib.sha256(canonical_json(content)).hexdigest()
    signature = sign(key, "ledger entry", digest.encode())
    return canonical_json({**content, "hash": digest, "signature": signature}) + b"\n"


@pytest.fixture
def filled(ledger, path) -> Path:
    """Six entries: created, reserved, committed, reserved, committed, reserved."""
    spent(ledger, 100, 100)
    spent(ledger, 50, 40)
    spent(ledger, 7)
    assert len(lines_of(path)) == 6
    return path


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_any_edited_character_is_refused_with_the_number_of_its_entry(filled, number):
    lines = lines_of(filled)
    for position in range(0, len(lines[number - 1]) - 1, 7):
        edited = bytearray(lines[number - 1])
        edited[position] ^= 1
        filled.write_bytes(b"".join([*lines[: number - 1], bytes(edited), *lines[number:]]))
        assert f"entry {number} " in refusal_of(filled), position


def test_fewer_steps_written_in_by_hand_are_refused(filled):
    filled.write_bytes(filled.read_bytes().replace(b'"steps":100', b'"steps":1'))
    assert "entry 2 is damaged (its content does not match its hash: it was edited)" in refusal_of(filled)


def test_the_same_content_written_otherwise_is_refused(filled):
    lines = lines_of(filled)
    lines[1] = json.dumps(json.loads(lines[1])).encode() + b"\n"
    filled.write_bytes(b"".join(lines))
    assert "entry 2 is damaged (it is not written as a ledger writes)" in refusal_of(filled)


@pytest.mark.parametrize(
    ("order", "bad"),
    [([0, 1, 2, 4, 3, 5], 4), ([0, 2, 1, 3, 4, 5], 2), ([1, 0, 2, 3, 4, 5], 1), ([0, 3, 1, 2, 4, 5], 2)],
)
def test_reordered_entries_are_refused(filled, order, bad):
    lines = lines_of(filled)
    filled.write_bytes(b"".join(lines[index] for index in order))
    assert f"entry {bad} is damaged (it is numbered" in refusal_of(filled)


@pytest.mark.parametrize("removed", [0, 1, 3])
def test_an_entry_taken_out_of_the_middle_is_refused(filled, removed):
    lines = lines_of(filled)
    filled.write_bytes(b"".join(lines[:removed] + lines[removed + 1 :]))
    assert f"entry {removed + 1} is damaged (it is numbered {removed + 2}" in refusal_of(filled)


@pytest.mark.parametrize("kept", [0, 1, 3, 5])
def test_entries_taken_off_the_end_are_noticed_through_the_head(filled, kept):
    filled.write_bytes(b"".join(lines_of(filled)[:kept]))
    assert f"it holds {kept} entr" in (message := refusal_of(filled))
    assert "its head counts 6: entries were removed at its end, or an older copy was put back" in message


def test_a_torn_end_of_an_entry_that_the_head_counts_is_no_torn_write(filled):
    filled.write_bytes(filled.read_bytes()[:-20])
    assert "entry 6 is damaged" in refusal_of(filled)


def test_an_entry_twice_is_refused(filled):
    filled.write_bytes(filled.read_bytes() + lines_of(filled)[-1])
    assert "entry 7 is damaged (it is numbered 6" in refusal_of(filled)


def test_a_ledger_signed_anew_with_another_key_is_refused(filled):
    filled.write_bytes(resigned(lines_of(filled)[0], OTHER_KEY))
    head_file(filled).unlink()
    forged = Ledger.create(filled.with_name("forged.jsonl"), "oak", OTHER_KEY)
    spent(forged, 1, 1)
    filled.write_bytes(forged.path.read_bytes())
    head_file(filled).write_bytes(forged.path.with_name("forged.jsonl.head").read_bytes())
    assert "is not signed with the key SHA256:" in refusal_of(filled)
    assert steps_of(Ledger.open(filled, OTHER_KEY, "oak")) == 1, "under its own key the forgery is a whole ledger"


def test_an_entry_signed_with_another_key_is_refused(filled):
    lines = lines_of(filled)
    lines[5] = resigned(lines[5], OTHER_KEY)
    filled.write_bytes(b"".join(lines))
    assert "entry 6 is not signed with the key SHA256:" in refusal_of(filled)


def test_another_key_does_not_open_a_ledger(filled):
    assert "not signed with the key SHA256:" in refusal_of(filled, key=OTHER_KEY)


def test_another_sites_ledger_is_refused(filled):
    assert "is of site 'oak', expected 'elm'" in refusal_of(filled, site="elm")


def test_another_sites_entries_under_the_own_head_are_refused(filled):
    lines = lines_of(filled)
    lines[3] = resigned(lines[3], KEY, site="elm")
    filled.write_bytes(b"".join(lines))
    assert "entry 4 is of site 'elm', expected 'oak'" in refusal_of(filled)


def test_a_newer_version_is_refused_as_such(filled):
    lines = lines_of(filled)
    lines[5] = resigned(lines[5], KEY, schema=2)
    filled.write_bytes(b"".join(lines))
    assert "entry 6 is of schema 2, expected 1; a newer Chainward wrote it: update this one" in refusal_of(filled)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"state": "committed", "reservation": 2}, "it ends reservation 2 a second time"),
        ({"state": "committed", "reservation": 1}, "entry 1, which it ends, is no reservation"),
        ({"state": "committed", "reservation": 9}, "entry 9, which it ends, is no reservation"),
        ({"state": "released"}, "a commitment or release names its reservation"),
        ({"state": "reserved", "mechanism": None}, "'reserved' without mechanism"),
        ({"surprise": 1}, "surprise: extra inputs"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused_though_it_is_signed(filled, changes, problem):
    lines = lines_of(filled)
    lines[5] = resigned(lines[5], KEY, **changes)
    filled.write_bytes(b"".join(lines))
    assert f"entry 6 is damaged ({problem}" in refusal_of(filled).replace("value error, ", "")


@pytest.mark.parametrize(("steps", "noise"), [(51, 1.0), (50, 2.0)])
def test_a_commitment_to_something_else_than_was_reserved_is_refused(filled, steps, noise):
    lines = lines_of(filled)
    mechanism = json.loads(lines[4])["mechanism"] | {"steps": steps, "noise_multiplier": noise}
    lines[4] = resigned(lines[4], KEY, mechanism=mechanism)
    filled.write_bytes(b"".join(lines))
    assert "entry 5 is damaged (it commits something else than entry 4 reserved)" in refusal_of(filled)


@pytest.mark.parametrize("content", [b"", b"{", b"null\n", b"{}\n", b"\0" * 90])
def test_a_damaged_head_is_refused(filled, content):
    head_file(filled).write_bytes(content)
    assert "ledger.jsonl.head" in refusal_of(filled) or "the head is of schema None" in refusal_of(filled)


def test_an_edited_head_is_refused(filled):
    head_file(filled).write_bytes(head_file(filled).read_bytes().replace(b'"sequence":6', b'"sequence":5'))
    assert "head: damaged (it is not signed with the key" in refusal_of(filled)


def test_a_missing_head_is_refused(filled):
    head_file(filled).unlink()
    assert "head: missing; without it a shortened ledger can't be told" in refusal_of(filled)


def test_a_missing_ledger_is_refused(tmp_path):
    assert "there is no ledger; `chainward-site keys` makes" in refusal_of(tmp_path / "ledger.jsonl")


# --- copies from a backup ---


def test_an_older_copy_of_the_ledger_is_refused(ledger, path):
    spent(ledger, 100, 100)
    backup = path.read_bytes()
    spent(ledger, 50, 50)
    path.write_bytes(backup)
    assert "an older copy was put back" in refusal_of(path)
    with pytest.raises(LedgerError, match="an older copy was put back"):
        ledger.reserve(training(1), **WORK)


def test_an_older_copy_of_the_head_is_refused(ledger, path):
    spent(ledger, 100, 100)
    backup = head_file(path).read_bytes()
    spent(ledger, 50, 50)
    head_file(path).write_bytes(backup)
    assert "it counts 3 entries and the ledger holds 5: an older head was put back" in refusal_of(path)


def test_an_older_copy_that_was_written_on_is_refused_by_the_newest_head(ledger, path):
    spent(ledger, 100, 100)
    backup = {file: file.read_bytes() for file in (path, head_file(path))}
    spent(ledger, 50, 50)
    newest_head = head_file(path).read_bytes()
    for file, content in backup.items():
        file.write_bytes(content)
    spent(reopened(path), 1, 1)
    head_file(path).write_bytes(newest_head)
    assert "entry 5 is not the one that its head counts" in refusal_of(path)


def test_an_older_pair_of_ledger_and_head_is_noticed_by_whoever_saw_a_newer_head(ledger, path):
    spent(ledger, 100, 100)
    backup = {file: file.read_bytes() for file in (path, head_file(path))}
    spent(ledger, 50, 50)
    seen = ledger.head
    ledger.require(seen)
    for file, content in backup.items():
        file.write_bytes(content)
    old = reopened(path)
    with pytest.raises(
        LedgerError, match=r"holds 3 entries, but a signed statement shows that entry 5 was .*older copy"
    ):
        old.require(seen)
    spent(old, 1, 1)
    with pytest.raises(LedgerError, match="a signed statement shows that entry 5"):
        old.require(seen)  # as long as before, but another
    with pytest.raises(LedgerError, match=r"replaced while it was in use|an older copy was put back"):
        ledger.reserve(training(1), **WORK)


def test_a_head_that_was_seen_stays_true_while_the_ledger_grows(ledger):
    heads = [ledger.head]
    for _ in range(3):
        spent(ledger, 5, 5)
        heads.append(ledger.head)
    for head in heads:
        ledger.require(head)
    with pytest.raises(LedgerError, match="entry 2 was 000000000000"):
        ledger.require(Head(sequence=2, hash="0" * 64))


# --- a line that was cut ---


@pytest.mark.parametrize("tail", [b"{", b'{"delta":1e-05,"hash":"', b"\0" * 300, b'{"delta"' + b"\0" * 50 + b"}\n"])
def test_a_torn_line_is_reported_left_out_and_cut_off_before_the_next_entry(ledger, path, tail, caplog):
    spent(ledger, 100)
    path.write_bytes(path.read_bytes() + tail)
    with caplog.at_level("WARNING", "chainward"):
        again = reopened(path)
    assert f"the last line ({len(tail)} bytes) was cut" in caplog.text
    assert again.torn_bytes == len(tail)
    assert steps_of(again) == 100
    spent(again, 50)
    assert steps_of(reopened(path)) == 150
    assert f"{len(tail)} bytes of an entry that was cut while being written" in again.entries[-1].note
    assert again.torn_bytes == 0


def test_a_whole_entry_without_its_newline_is_a_torn_line(ledger, path):
    spent(ledger, 100)
    head = head_file(path).read_bytes()
    spent(ledger, 50)
    path.write_bytes(path.read_bytes()[:-1])
    head_file(path).write_bytes(head)
    assert steps_of(reopened(path)) == 100


def test_anything_else_at_the_end_is_damage(ledger, path):
    spent(ledger, 100)
    whole = path.read_bytes()
    for tail in (b"{}\n", b"\n", b"{\n{", b"x\ny"):
        path.write_bytes(whole + tail)
        assert "entry 3 is" in refusal_of(path)


# --- the clock ---


def test_a_clock_that_goes_back_is_noted_and_order_is_by_number(path, monkeypatch):
    times = iter(
        [datetime(2030, 1, 1, tzinfo=UTC), datetime(2029, 12, 31, 23, tzinfo=UTC), datetime(2030, 1, 2, tzinfo=UTC)]
    )
    monkeypatch.setattr("chainward_shared.privacy.ledger.now", lambda: next(times))
    ledger = Ledger.create(path, "oak", KEY)
    ledger.reserve(training(1), **WORK)
    ledger.reserve(training(1), **WORK)
    entries = reopened(path).entries
    assert [entry.sequence for entry in entries] == [1, 2, 3]
    assert [entry.note for entry in entries] == ["", "the clock went back by 3600 s since the entry before", ""]
