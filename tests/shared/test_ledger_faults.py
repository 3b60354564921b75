"""The ledger when its process is killed, the power fails, the disk is full, or others want it at the same time.

Whatever happens, it must never say less than was spent. The faults are not chosen by hand: at every system call with which
the ledger changes the disk, before, in its middle and after it, it is noted what a kill, or a power cut, would leave.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ledgers import KEY

from chainward_shared import files as files_module
from chainward_shared.errors import LedgerError
from chainward_shared.privacy import ledger_file as ledger_module
from chainward_shared.privacy.accounting import Mechanism
from chainward_shared.privacy.ledger import Ledger

WORK: dict[str, Any] = {"run": "r", "phase": "chain", "unit": "patient", "delta": 1e-5}
Hit = Callable[[], None]


class Disk:
    """Stands in for the module `os`: counts the calls that change the disk, and strikes at one of them, or at all.

    It also keeps what a power cut would leave: of a file what was last synced, of a folder the names that were in it
    when it was last synced.
    """

    CHANGES = ("open", "write", "fsync", "ftruncate", "replace", "close")

    def __init__(self, strike_at: int | None = None, strike: Hit | None = None) -> None:
        self.strike_at, self.strike = strike_at, strike
        self.points: list[str] = []
        self.paths: dict[int, Path] = {}
        self.synced: dict[int, bytes] = {}  # by inode
        self.names: dict[Path, int] = {}  # as the folder was last synced

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return (lambda *args: self._call(name, real, *args)) if name in self.CHANGES else real

    def point(self, name: str) -> None:
        self.points.append(name)
        if self.strike is not None and self.strike_at in (None, len(self.points) - 1):
            self.strike()

    def _call(self, name: str, real: Any, *args: Any) -> Any:
        self.point(f"before {name}")
        if name == "write":
            half = real(args[0], args[1][: len(args[1]) // 2])
            self.point("in the middle of write")
            return half + real(args[0], args[1][half:])
        if name == "fsync":  # noted, not done: it would only take time
            self._note_sync(args[0])
            self.point("after fsync")
            return None
        result = real(*args)
        if name == "open":
            self.paths[result] = Path(args[0])
        self.point(f"after {name}")
        return result

    def _note_sync(self, descriptor: int) -> None:
        path = self.paths[descriptor]
        if path.is_dir():
            self.names = {file: file.stat().st_ino for file in path.iterdir()}
        else:
            self.synced[os.fstat(descriptor).st_ino] = path.read_bytes()

    def after_power_cut(self) -> dict[str, bytes]:
        """What is on the disk if everything that was not synced is lost."""
        return {path.name: self.synced[inode] for path, inode in self.names.items() if inode in self.synced}


def put_in(patch: pytest.MonkeyPatch, disk: Disk) -> None:
    """Let everything that the ledger writes go through `disk`."""
    for module in (ledger_module, files_module):
        patch.setattr(module, "os", disk)


@pytest.fixture(autouse=True)
def disk_that_works(monkeypatch):
    """Unless a test brings another."""
    put_in(monkeypatch, Disk())


def work(ledger: Ledger, tell: Callable[[str, int], None]) -> None:
    """A life: a link, a release, two metrics, and a last link that doesn't end. `tell` hears the truth."""

    def train(hop: str, steps: int, done: int | None) -> None:
        reservation = ledger.reserve(Mechanism("dp-sgd", 1.0, 0.01, steps), hop=hop, **WORK)
        reservation.begin()
        tell(hop, steps if done is None else done)
        if done is not None:
            ledger.commit(reservation, done)

    train("link-1", 50, 30)
    ledger.release(ledger.reserve(Mechanism("dp-sgd", 1.0, 0.01, 999), hop="never", **WORK))
    train("link-2", 20, 20)
    train("link-3", 7, None)


def life(path: Path, tell: Callable[[str, int], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chainward_shared.privacy.ledger.now", lambda: datetime(2026, 1, 1, tzinfo=UTC))
        work(Ledger.create(path, "oak", KEY), tell)


@dataclass(frozen=True)
class Moment:
    """A point of a life: where, what a fault there would leave, and what had been spent until then."""

    number: int
    point: str
    files: dict[str, bytes]
    truth: dict[str, int]


class Observer:
    """Notes a moment at each point of a disk's life; those after which the same is left and spent count once."""

    def __init__(self, disk: Disk, left: Callable[[], dict[str, bytes]]) -> None:
        self.disk, self.left = disk, left
        self.truth: dict[str, int] = {}
        self.seen: dict[Any, Moment] = {}
        disk.strike = self.note

    def note(self) -> None:
        moment = Moment(len(self.disk.points) - 1, self.disk.points[-1], self.left(), dict(self.truth))
        self.seen.setdefault((*sorted(moment.files.items()), *sorted(moment.truth.items())), moment)

    @property
    def moments(self) -> list[Moment]:
        return list(self.seen.values())


def on(folder: Path) -> dict[str, bytes]:
    """What a process that is killed leaves: all that was written."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, power: bool) -> list[Moment]:
    """All different moments of a life; left is what was written or, after a cut of the `power`, what was synced."""
    disk, folder = Disk(), tmp_path / "observed"
    observer = Observer(disk, disk.after_power_cut if power else lambda: on(folder))
    with monkeypatch.context() as patch:
        put_in(patch, disk)
        life(folder / "ledger.jsonl", observer.truth.__setitem__)
    assert len(disk.points) > 150
    return observer.moments


def put_back(moment: Moment, folder: Path) -> Path:
    folder.mkdir()
    for name, content in moment.files.items():
        (folder / name).write_bytes(content)
    return folder / "ledger.jsonl"


def points_of_a_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    disk = Disk()
    with monkeypatch.context() as patch:
        put_in(patch, disk)
        life(tmp_path / "counted" / "ledger.jsonl", lambda hop, steps: None)
    assert len(disk.points) > 150
    return disk.points


def steps_in(ledger: Ledger) -> int:
    return sum(mechanism.steps for mechanism in ledger.mechanisms())


def open_or_create(path: Path) -> Ledger:
    """As a restarted site would: nothing was ever trained where no ledger was made."""
    try:
        return Ledger.open(path, KEY, "oak")
    except LedgerError as error:
        assert "there is no ledger" in str(error) or "its creation was interrupted" in str(error), str(error)
        return Ledger.create(path, "oak", KEY)


def check_survivor(path: Path, truth: dict[str, int], where: str) -> None:
    """The ledger says at least the truth, hop by hop, and can be written on."""
    ledger = open_or_create(path)
    said: dict[str, int] = {}
    for spending in ledger.spendings():
        counted = spending.counted.steps if spending.counted else 0
        said[spending.reserved.hop] = said.get(spending.reserved.hop, 0) + counted
    for hop, steps in truth.items():
        assert said.get(hop, 0) >= steps, f"{where}: {hop} did {steps} steps, the ledger says {said.get(hop, 0)}"
    before = steps_in(ledger)
    reservation = ledger.reserve(Mechanism("dp-sgd", 1.0, 0.01, 5), hop="after", **WORK)
    reservation.begin()
    ledger.commit(reservation, 5)
    again = Ledger.open(path, KEY, "oak")
    assert steps_in(again) == before + 5, f"{where}: the ledger goes on"
    assert again.torn_bytes == 0


def test_killed_at_any_point_the_ledger_never_says_less_than_was_spent(tmp_path, monkeypatch):
    moments = observed(tmp_path, monkeypatch, power=False)
    assert len(moments) > 40
    for moment in moments:
        path = put_back(moment, tmp_path / f"killed-{moment.number}")
        check_survivor(path, moment.truth, f"killed {moment.point} ({moment.number})")


def test_a_process_that_is_really_killed_leaves_what_was_noted(tmp_path, monkeypatch):
    """At one point of each kind, in the middle of the life."""
    of_each_kind = {moment.point: moment for moment in observed(tmp_path, monkeypatch, power=False)[10:]}
    assert len(of_each_kind) >= 4
    for moment in of_each_kind.values():
        folder = tmp_path / f"killed-{moment.number}"
        child = os.fork()
        if not child:
            ledger_module.os = files_module.os = Disk(moment.number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            life(folder / "ledger.jsonl", lambda hop, steps: None)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the child was killed {moment.point}"
        found = {name.replace(f".{child}.", f".{os.getpid()}."): content for name, content in on(folder).items()}
        assert found == moment.files, f"killed {moment.point} ({moment.number})"


class PowerCut(BaseException):
    """The process is no more."""


def cut() -> None:
    raise PowerCut


def test_when_the_power_fails_at_any_point_what_was_synced_never_says_less_than_was_spent(tmp_path, monkeypatch):
    moments = observed(tmp_path, monkeypatch, power=True)
    assert len(moments) >= 20
    for moment in moments:
        path = put_back(moment, tmp_path / f"cut-{moment.number}")
        check_survivor(path, moment.truth, f"power cut {moment.point} ({moment.number})")


def test_when_the_power_fails_again_while_a_killed_process_is_made_up_for(tmp_path, monkeypatch):
    """Killed between entry and head, restarted, and a power cut while the head is brought up to the entry."""
    # the first entry "reserved" is written, its head is not
    points = points_of_a_life(tmp_path, monkeypatch)
    writes = [number for number, point in enumerate(points) if point == "in the middle of write"]
    path, disk = tmp_path / "again" / "ledger.jsonl", Disk()
    observer = Observer(disk, disk.after_power_cut)
    with monkeypatch.context() as patch:
        put_in(patch, disk)
        # head 0, created, head 1, reserved: after the line, before it is synced
        disk.strike_at, disk.strike = writes[3] + 1, cut
        with pytest.raises(PowerCut):
            life(path, observer.truth.__setitem__)
        disk.strike_at, disk.strike = None, observer.note
        work(open_or_create(path), observer.truth.__setitem__)
    assert len(observer.moments) >= 15
    for moment in observer.moments:
        left = put_back(moment, tmp_path / f"again-{moment.number}")
        check_survivor(left, moment.truth, f"second power cut, {moment.point} ({moment.number})")


@pytest.mark.slow
def test_a_disk_that_fails_at_any_point_stops_the_training_in_one_line(tmp_path, monkeypatch):
    points = points_of_a_life(tmp_path, monkeypatch)
    failing = [number for number, point in enumerate(points) if not point.startswith("after")]
    for turn, number in enumerate(failing):
        code = (errno.ENOSPC, errno.EROFS, errno.EIO)[turn % 3]
        path, truth = tmp_path / f"full-{number}" / "ledger.jsonl", dict[str, int]()

        def fail(code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            put_in(patch, Disk(number, fail))
            with pytest.raises(LedgerError) as caught:
                life(path, truth.__setitem__)
        message = str(caught.value)
        assert f"can't be written ({os.strerror(code)}); nothing is trained" in message
        assert "\n" not in message
        check_survivor(path, truth, f"{os.strerror(code)} {points[number]} ({number})")


def test_a_folder_that_can_not_be_locked_stops_the_training(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.create(path, "oak", KEY)
    (tmp_path / "ledger.jsonl.lock").unlink(missing_ok=True)
    (tmp_path / "ledger.jsonl.lock").mkdir()
    with pytest.raises(LedgerError, match=r"can't be written .*; nothing is trained"):
        ledger.reserve(Mechanism("dp-sgd", 1.0, 0.01, 5), hop="x", **WORK)
    assert steps_in(Ledger.open(path, KEY, "oak")) == 0


# --- several processes ---

HOLDER = """
import sys, time
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from chainward_shared.privacy.ledger import Ledger
ledger = Ledger.open(Path(sys.argv[1]), Ed25519PrivateKey.from_private_bytes(bytes([1] * 32)), "oak")
with ledger.exclusive():
    print("held", flush=True)
    time.sleep(60)
"""


def test_who_waits_too_long_for_the_ledger_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "PATIENCE", 0.3)
    path = tmp_path / "ledger.jsonl"
    Ledger.create(path, "oak", KEY)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        waiting = Ledger.open(path, KEY, "oak")
        started = time.monotonic()
        with pytest.raises(LedgerError, match=r"another process has held it for 0\.3 s; wait for it, or end it"):
            waiting.reserve(Mechanism("dp-sgd", 1.0, 0.01, 5), hop="x", **WORK)
        assert time.monotonic() - started < 10
    finally:
        holder.kill()
        holder.wait()
    waiting.reserve(Mechanism("dp-sgd", 1.0, 0.01, 5), hop="x", **WORK)  # a dead process holds nothing


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger.create(path, "oak", KEY)
    children = []
    for number in range(4):
        child = os.fork()
        if not child:
            ledger = Ledger.open(path, KEY, "oak")
            for turn in range(10):
                reservation = ledger.reserve(Mechanism("dp-sgd", 1.0, 0.01, 10), hop=f"{number}-{turn}", **WORK)
                reservation.begin()
                ledger.commit(reservation, 3)
            os._exit(0)
        children.append(child)
    while True:  # readers take no lock
        assert steps_in(Ledger.open(path, KEY, "oak")) <= 40 * 10
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
        if not children:
            break
    ledger = Ledger.open(path, KEY, "oak")
    assert len(ledger.entries) == 1 + 4 * 10 * 2
    assert steps_in(ledger) == 4 * 10 * 3
