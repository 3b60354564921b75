"""The ledger when its process is killed, the power fails, the disk is full, or others want it at the same time.

Whatever happens, it must never say less than was spent. The faults are not chosen by hand: a first pass counts all
system calls with which the ledger changes the disk, and each of them is then hit, before, in the middle and after.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chainward_shared import files as files_module
from chainward_shared.errors import LedgerError
from chainward_shared.privacy import ledger as ledger_module
from chainward_shared.privacy.accounting import Mechanism
from chainward_shared.privacy.ledger import Ledger

KEY = Ed25519PrivateKey.from_private_bytes(bytes([1] * 32))
WORK: dict[str, Any] = {"run": "r", "phase": "chain", "unit": "patient", "delta": 1e-5}
Hit = Callable[[], None]


class Disk:
    """Stands in for the module `os`: counts the calls that change the disk, and strikes at one of them.

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
        if len(self.points) - 1 == self.strike_at and self.strike is not None:
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
    work(Ledger.create(path, "oak", KEY), tell)


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
    points = points_of_a_life(tmp_path, monkeypatch)
    for number, point in enumerate(points):
        path = tmp_path / f"killed-{number}" / "ledger.jsonl"
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            ledger_module.os = files_module.os = Disk(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            life(path, lambda hop, steps, fd=writing: os.write(fd, f"{hop} {steps}\n".encode()) and None)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            told = dict(line.split() for line in pipe.read().splitlines())
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the child was killed {point}"
        check_survivor(path, {hop: int(steps) for hop, steps in told.items()}, f"killed {point} ({number})")


class PowerCut(BaseException):
    """The process is no more."""


def cut() -> None:
    raise PowerCut


def test_when_the_power_fails_at_any_point_what_was_synced_never_says_less_than_was_spent(tmp_path, monkeypatch):
    points = points_of_a_life(tmp_path, monkeypatch)
    for number, point in enumerate(points):
        path = tmp_path / f"cut-{number}" / "ledger.jsonl"
        disk, truth = Disk(number, cut), {}
        with monkeypatch.context() as patch:
            put_in(patch, disk)
            with pytest.raises(PowerCut):
                life(path, truth.__setitem__)
        left = tmp_path / f"left-{number}"
        left.mkdir()
        for name, content in disk.after_power_cut().items():
            (left / name).write_bytes(content)
        check_survivor(left / path.name, truth, f"power cut {point} ({number})")


def test_when_the_power_fails_again_while_a_killed_process_is_made_up_for(tmp_path, monkeypatch):
    """Killed between entry and head, restarted, and a power cut while the head is brought up to the entry."""

    def lives(path: Path, disk: Disk, truth: dict[str, int], kill_at: int) -> None:
        with monkeypatch.context() as patch:
            put_in(patch, disk)
            first, disk.strike_at, disk.strike = disk.strike_at, kill_at, cut
            try:
                life(path, truth.__setitem__)
            except PowerCut:
                disk.strike_at = None if first is None else len(disk.points) + first
            work(open_or_create(path), truth.__setitem__)

    # the first entry "reserved" is written, its head is not
    points = points_of_a_life(tmp_path, monkeypatch)
    writes = [number for number, point in enumerate(points) if point == "in the middle of write"]
    kill_at = writes[3] + 1  # head 0, created, head 1, reserved: after the line, before it is synced
    count = Disk()
    lives(tmp_path / "counted-again" / "ledger.jsonl", count, {}, kill_at)
    later = len(count.points) - kill_at - 1
    assert later > 100
    for number in range(60):
        path, truth = tmp_path / f"again-{number}" / "ledger.jsonl", dict[str, int]()
        disk = Disk(number)
        with pytest.raises(PowerCut):
            lives(path, disk, truth, kill_at)
        left = tmp_path / f"left-again-{number}"
        left.mkdir()
        for name, content in disk.after_power_cut().items():
            (left / name).write_bytes(content)
        check_survivor(left / path.name, truth, f"second power cut, {number} calls later")


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


def test_who_waits_too_long_for_the_ledger_is_told_in_one_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger.create(path, "oak", KEY)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        waiting = Ledger.open(path, KEY, "oak", patience=0.3)
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
