"""What a consortium survives, on a real SuperLink with TLS, node authentication and a database, and three SuperNodes.

Each drill breaks something in the middle of a run and looks at what was lost. `docs/reliability.md` has the figures: set
CHAINWARD_DRILL_FIGURES to a file, and each drill adds a line of JSON. They take minutes, and an idle machine:
`pytest -m deployment tests/deployment/test_drills.py`.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from flower_deployment import (
    ADDRESS,
    Deployment,
    Line,
    Service,
    Supervisor,
    deployed,
    flower_environment,
    wait_until,
    write_node_key,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from chainward_client.store import SiteStore
from chainward_server.run_folder import RunFolder

pytestmark = pytest.mark.deployment

SITES = ("ash", "birch", "cedar")
VICTIM = "birch"
EPOCHS = 8
IMAGES = {"ash": 48, "birch": 1200, "cedar": 48}
"""For training; birch's link takes most of a run's time, and is what is broken."""

SETTINGS = {
    "federation.sites": ",".join(SITES),
    "federation.deadline": 300.0,
    "federation.hop-deadline": 900.0,
    "federation.patience": 240.0,
    "federation.check-every": 60.0,
    "federation.precision": "fp32",
    "federation.threads": 1,
    "chain.epochs": EPOCHS,
    "chain.compare-alone": False,
    "student.rounds": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a data file: three hospitals, three classes of 64 px blobs."""
    folder = tmp_path_factory.mktemp("hospitals")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "patient", "split", "hospital"])
        for site, train in IMAGES.items():
            for split, count in (("train", train), ("val", 24), ("test", 24)):
                for number in range(count):
                    name, label = f"{site}-{split}-{number}", number % 3
                    pixels = generator.normal(90, 25, (64, 64))
                    row, column = generator.integers(8, 40, 2)
                    size = (20, 12, 20)[label]
                    pixels[row : row + size, column : column + size] += (60, 90, -60)[label]
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{name}.png")
                    writer.writerow([name, "abc"[label], name, split, site])
    description = {
        "format": "csv",
        "manifest": "cases.csv",
        "images": "images",
        "classes": ["a", "b", "c"],
        "columns": {"image": "image", "label": "label", "patient": "patient", "split": "split", "site": "hospital"},
        "image": {"size": 64, "channels": 1},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(description))
    return folder / "data.yaml"


@dataclass
class Drilled:
    """A consortium that is up, birch behind a line that can be cut, and the run that nothing disturbed."""

    deployment: Deployment
    line: Line
    supervisor: Supervisor
    undisturbed: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    started: float = 0.0
    expected_runs: int = 0

    @property
    def victim(self) -> Service:
        return self.deployment.sites[VICTIM]

    def kept(self) -> Path:
        """What the victim keeps of the last run."""
        return SiteStore(self.deployment.site_dir(VICTIM) / "state", self.deployment.run_folders()[-1].name).folder

    def begin(self, **settings: Any) -> int:
        """Start a run; return Flower's id of it."""
        self.make_whole()
        self.started, self.expected_runs = time.monotonic(), len(self.deployment.run_folders()) + 1
        return self.deployment.submit(SETTINGS | settings)

    def resume(self, **settings: Any) -> int:
        """Go on with the last run."""
        run = self.deployment.run_folders()[-1].name
        return self.deployment.submit(SETTINGS | settings | {"output.resume": run})

    def make_whole(self) -> None:
        """Start what does not run."""
        self.line.mend()
        self.supervisor.off()
        if not self.deployment.superlink.running:
            self.deployment.start_superlink()
        for site, service in self.deployment.sites.items():
            if not service.running:
                wait_until(lambda site=site: self._is_back(site), f"{site} is connected", 300, self.deployment.logs)
        self.supervisor.on()

    def _is_back(self, site: str) -> bool:
        """Start a SuperNode, and again where the SuperLink, which has not missed it yet, has refused it; as its unit would."""
        service = self.deployment.sites[site]
        if not service.running:
            time.sleep(5)
            service.restart()
        return "SuperNode ID:" in service.printed_since_start

    def take_down(self) -> None:
        """Stop the victim's SuperNode, for good."""
        self.supervisor.off()
        self.victim.stop()

    def ended(self) -> RunFolder:
        return self.deployment.wait_for_run(900, count=self.expected_runs)

    def at_work(self) -> int | None:
        """Return the process that is at work on the victim's link, if there is one."""
        for lock in self.kept().glob("at-work-*.lock"):
            try:
                pid = int(json.loads(lock.read_text())["pid"])
            except (OSError, ValueError):
                continue
            if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return pid
        return None

    def epochs_written(self) -> int:
        """Return the epochs of the victim's link that its checkpoint holds; 0: there is none."""
        for half in self.kept().glob("half-*.safetensors"):
            try:
                with safe_open(half, "pt") as file:
                    return int(json.loads(file.metadata()["training"])["epoch"])
            except (OSError, ValueError, KeyError):
                continue
        return 0

    def in_mid_link(self) -> int:
        """Wait until the victim's link is half done; return the process that is at work on it."""
        wait_until(
            lambda: len(self.deployment.run_folders()) == self.expected_runs, "a run folder", 400, self.deployment.logs
        )
        wait_until(lambda: self.epochs_written() >= EPOCHS // 2, "half a link", 400, self.deployment.logs)
        pid = self.at_work()
        assert pid is not None
        return pid

    def at_work_again(self, than: int | None, within: float = 500) -> float:
        """Wait until another process than `than` is at work on the victim's link; return the seconds that took."""
        start = time.monotonic()
        wait_until(lambda: self.at_work() not in {None, than}, "work goes on", within, self.deployment.logs)
        return time.monotonic() - start


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Drilled]:
    """The consortium, up."""
    with deployed(tmp_path_factory.mktemp("drills") / "deployment", data) as deployment:
        deployment.start_superlink()
        line = Line(deployment.port)
        for site in SITES:
            deployment.add_site(site)
        deployment.sites[VICTIM] = deployment.supernode(VICTIM, through=line)
        supervisor = Supervisor(deployment.sites[VICTIM])
        drilled = Drilled(deployment, line, supervisor)
        drilled.make_whole()
        try:
            yield drilled
        finally:
            supervisor.end()
            line.close()


@pytest.fixture(scope="module")
def undisturbed(drilled: Drilled) -> Drilled:
    """The consortium after a run that nothing disturbed; of an earlier session where CHAINWARD_DRILL_UNDISTURBED names its run
    folder."""
    if earlier := os.environ.get("CHAINWARD_DRILL_UNDISTURBED"):
        folder = RunFolder.open(Path(earlier))
        training = folder.load_results().links[1].training
        assert training is not None
        drilled.undisturbed = load_file(folder.model_path("chain"))
        drilled.epoch_seconds = training.seconds / EPOCHS
        return drilled
    drilled.begin()
    folder = drilled.ended()
    assert folder.state.status == "finished", folder.state.reason
    links = folder.load_results().links
    assert [(link.site, link.status) for link in links] == [(site, "done") for site in SITES]
    drilled.undisturbed = load_file(folder.model_path("chain"))
    drilled.seconds = time.monotonic() - drilled.started
    assert links[1].training is not None
    drilled.epoch_seconds = links[1].training.seconds / EPOCHS
    note("nothing", drilled, folder, recovered=None, repeated=0.0)
    return drilled


def note(
    drill: str, drilled: Drilled, folder: RunFolder, *, recovered: float | None, repeated: float | None
) -> dict[str, Any]:
    """Write down what came of a drill. `recovered`: seconds until work went on; `repeated`: epochs done twice, at most."""
    links = folder.load_results().links
    models = folder.state.models
    row = {
        "drill": drill,
        "status": folder.state.status,
        "hops": len(links),
        "lost": sum(link.status not in {"done", "retried"} for link in links),
        "links": [(link.site, link.status, link.attempts) for link in links],
        "repeated": repeated,
        "recovered": recovered,
        "seconds": time.monotonic() - drilled.started,
        "undisturbed seconds": drilled.seconds,
        "epoch seconds": drilled.epoch_seconds,
        "equal": "chain" in models and same(load_file(folder.model_path("chain")), drilled.undisturbed),
    }
    print(json.dumps(row))
    if path := os.environ.get("CHAINWARD_DRILL_FIGURES"):
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


def same(model: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return model.keys() == other.keys() and all(torch.equal(model[name], other[name]) for name in model)


def check_nothing_lost(row: dict[str, Any]) -> None:
    assert row["status"] == "finished"
    assert row["lost"] == 0
    assert row["equal"], "the final model is that of the undisturbed run, bit for bit"


def goes_on_from(drilled: Drilled, epochs: int) -> None:
    """Look whether the victim's second process took up the first one's work."""
    wait_until(lambda: drilled.epochs_written() > epochs or not drilled.at_work(), "the next epoch", 400)
    log = drilled.victim.printed
    assert f"goes on after epoch {epochs}" in log, log[-3000:]


# -- processes that die


@pytest.mark.usefixtures("undisturbed")
def test_a_killed_client_process_costs_the_unfinished_epoch(drilled):
    drilled.begin()
    pid = drilled.in_mid_link()
    time.sleep(drilled.epoch_seconds / 2)
    epochs = drilled.epochs_written()
    os.kill(pid, signal.SIGKILL)
    recovered = drilled.at_work_again(pid)
    goes_on_from(drilled, epochs)
    check_nothing_lost(note("client process killed", drilled, drilled.ended(), recovered=recovered, repeated=1.0))


@pytest.mark.usefixtures("undisturbed")
def test_a_killed_supernode_that_is_started_again_costs_the_unfinished_epoch(drilled):
    drilled.begin(**{"federation.check-every": 20.0})
    pid = drilled.in_mid_link()
    time.sleep(drilled.epoch_seconds / 2)
    drilled.victim.kill()
    start = time.monotonic()
    epochs = drilled.epochs_written()
    drilled.at_work_again(pid)
    recovered = time.monotonic() - start
    goes_on_from(drilled, epochs)
    row = note("SuperNode killed, restarted by its unit", drilled, drilled.ended(), recovered=recovered, repeated=1.0)
    check_nothing_lost(row)


@pytest.mark.usefixtures("undisturbed")
def test_a_killed_superexec_ends_its_supernode_which_is_let_in_again_at_once(drilled):
    drilled.begin(**{"federation.check-every": 20.0})
    pid = drilled.in_mid_link()
    (superexec,) = (one for one in drilled.victim.processes if "chainward_client.superexec" in one.cmdline())
    superexec.kill()
    start = time.monotonic()
    drilled.at_work_again(pid)
    recovered = time.monotonic() - start
    assert "the process that starts the work has ended (exit code -9); start it again" in drilled.victim.printed
    assert "Failed to activate SuperNode" not in drilled.victim.printed_since_start
    row = note("SuperExec killed, restarted by its unit", drilled, drilled.ended(), recovered=recovered, repeated=1.0)
    check_nothing_lost(row)


@pytest.mark.usefixtures("undisturbed")
def test_a_supernode_that_is_stopped_and_started_costs_the_unfinished_epoch(drilled):
    drilled.begin(**{"federation.check-every": 20.0})
    pid = drilled.in_mid_link()
    start = time.monotonic()
    drilled.victim.restart()
    epochs = drilled.epochs_written()
    drilled.at_work_again(pid)
    recovered = time.monotonic() - start
    goes_on_from(drilled, epochs)
    check_nothing_lost(note("SuperNode restarted", drilled, drilled.ended(), recovered=recovered, repeated=1.0))


def server_app(drilled: Drilled) -> psutil.Process:
    found = [
        process
        for process in drilled.deployment.superlink.processes
        if process.status() != psutil.STATUS_ZOMBIE and any("flwr-serverapp" in word for word in process.cmdline())
    ]
    assert len(found) == 1, [process.cmdline() for process in found]
    return found[0]


@pytest.mark.usefixtures("undisturbed")
def test_a_killed_server_app_is_resumed_with_one_command(drilled):
    drilled.begin()
    drilled.in_mid_link()
    server_app(drilled).kill()
    start = time.monotonic()
    drilled.resume()
    wait_until(
        lambda: RunFolder.open(drilled.deployment.run_folders()[-1]).load_results().links[1:], "birch's hop", 600
    )
    recovered = time.monotonic() - start
    row = note("ServerApp killed, resumed at once", drilled, drilled.ended(), recovered=recovered, repeated=0.0)
    check_nothing_lost(row)


@pytest.mark.usefixtures("undisturbed")
def test_a_killed_superlink_is_started_again_and_the_run_resumed(drilled):
    drilled.begin()
    drilled.in_mid_link()
    drilled.deployment.superlink.kill()
    start = time.monotonic()
    time.sleep(5)
    drilled.deployment.superlink.stop()
    drilled.deployment.start_superlink()
    drilled.resume()
    wait_until(
        lambda: RunFolder.open(drilled.deployment.run_folders()[-1]).load_results().links[1:], "birch's hop", 600
    )
    recovered = time.monotonic() - start
    row = note("SuperLink killed, back after 5 s, resumed", drilled, drilled.ended(), recovered=recovered, repeated=1.0)
    check_nothing_lost(row)


# -- lines that are cut


@pytest.mark.parametrize("seconds", [30, 100])
@pytest.mark.usefixtures("undisturbed")
def test_a_cut_line_costs_nothing(drilled, seconds):
    drilled.begin()
    drilled.in_mid_link()
    drilled.line.cut()
    time.sleep(seconds)
    drilled.line.mend()
    start = time.monotonic()
    wait_for_links(drilled, 2)
    recovered = time.monotonic() - start
    row = note(f"line cut for {seconds} s", drilled, drilled.ended(), recovered=recovered, repeated=0.0)
    check_nothing_lost(row)


def wait_for_links(drilled: Drilled, count: int) -> RunFolder:
    def there() -> RunFolder | None:
        paths = drilled.deployment.run_folders()
        if len(paths) < drilled.expected_runs:
            return None
        folder = RunFolder.open(paths[-1])
        results = folder.load_results()
        there = results is not None and len(results.links) >= count
        return folder if there or folder.state.status != "running" else None

    found: RunFolder = wait_until(there, f"{count} hops", 900, drilled.deployment.logs)
    return found


# -- sites that are late, away, or hang


@pytest.mark.usefixtures("undisturbed")
def test_a_site_that_comes_late_is_waited_for(drilled):
    drilled.make_whole()
    drilled.take_down()
    drilled.started, drilled.expected_runs = time.monotonic(), len(drilled.deployment.run_folders()) + 1
    drilled.deployment.submit(SETTINGS)
    time.sleep(45)
    drilled.victim.start()
    recovered = drilled.at_work_again(None)
    check_nothing_lost(note("site comes 45 s late", drilled, drilled.ended(), recovered=recovered, repeated=0.0))


def test_a_run_without_an_expected_site_ends_with_a_line_that_names_it(drilled):
    drilled.make_whole()
    drilled.take_down()
    run = drilled.deployment.submit(SETTINGS | {"federation.deadline": 40.0})
    wait_until(lambda: drilled.deployment.flower_status(run).startswith("finished"), "the run has ended", 300)
    assert drilled.deployment.flower_status(run) == "finished:failed"
    said = drilled.deployment.flwr("log", str(run), "--show")
    assert "(federation.deadline) 'birch' is missing" in said
    assert "Traceback" not in said


def test_a_site_that_goes_for_good_is_skipped_and_the_run_says_that_it_is_incomplete(drilled):
    drilled.begin(**{"federation.patience": 20.0})
    drilled.in_mid_link()
    drilled.take_down()
    start = time.monotonic()
    folder = wait_for_links(drilled, 2)
    row = note("site goes and stays away", drilled, folder, recovered=time.monotonic() - start, repeated=None)
    folder = drilled.ended()
    assert folder.state.status == "incomplete"
    assert [link["status"] if isinstance(link, dict) else link[1] for link in row["links"]][1] == "skipped"
    assert [link.status for link in folder.load_results().links] == ["done", "skipped", "done"]


@pytest.mark.usefixtures("undisturbed")
def test_a_client_that_hangs_is_ended_after_the_hops_deadline(drilled):
    deadline = 4 * drilled.epoch_seconds + 8 * drilled.epoch_seconds + 45
    drilled.begin(**{"federation.hop-deadline": deadline})
    pid = drilled.in_mid_link()
    os.kill(pid, signal.SIGSTOP)
    epochs = drilled.epochs_written()
    recovered = drilled.at_work_again(pid)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    goes_on_from(drilled, epochs)
    row = note(
        f"client hangs, hop-deadline {deadline:.0f} s", drilled, drilled.ended(), recovered=recovered, repeated=1.0
    )
    check_nothing_lost(row)


# -- disks and clocks


@pytest.fixture
def small_disk(request, tmp_path):
    """A disk of so many MiB, or a skip where this user can't mount one. The model is one of 13."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", str(folder)], check=False
        ).returncode
    ):
        pytest.skip("needs a file system of its own: only root may mount one")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("small_disk", [8], indirect=True, ids=["8 MiB"])
def test_a_full_disk_at_a_site_costs_that_link_and_the_run_goes_on(drilled, small_disk):
    drilled.make_whole()
    site_yaml = drilled.deployment.site_dir(VICTIM) / "site.yaml"
    content = site_yaml.read_text()
    site_yaml.write_text(content.replace("state: state", f"state: {small_disk}"))
    try:
        drilled.begin(**{"chain.on-failure": "revisit"})
        folder = wait_for_links(drilled, 2)
        link = folder.load_results().links[1]
        assert (link.site, link.status) == (VICTIM, "refused")
        assert str(small_disk) not in link.reason, "no path of a hospital"
        assert "can't be written" in drilled.victim.printed
        assert "Traceback" not in drilled.victim.printed_since_start
        folder = drilled.ended()
    finally:
        site_yaml.write_text(content)
    row = note("disk full at the site", drilled, folder, recovered=None, repeated=None)
    assert row["status"] == "incomplete"
    assert row["lost"] == 1


@pytest.mark.parametrize("small_disk", [24], indirect=True, ids=["24 MiB"])
@pytest.mark.usefixtures("undisturbed")
def test_a_full_disk_at_the_coordinator_stops_the_run_and_it_goes_on_when_there_is_room(drilled, small_disk):
    before = len(drilled.deployment.run_folders())
    run = drilled.begin(**{"output.dir": str(small_disk)})
    wait_until(lambda: drilled.deployment.flower_status(run).startswith("finished"), "the run has ended", 600)
    assert drilled.deployment.flower_status(run) == "finished:failed"
    said = drilled.deployment.flwr("log", str(run), "--show")
    assert "No space left" in said
    assert "Traceback" not in said
    start = time.monotonic()
    (folder,) = small_disk.glob("*/run.json")
    shutil.copytree(folder.parent, drilled.deployment.runs / folder.parent.name)
    drilled.expected_runs = before + 1
    drilled.resume()
    wait_until(
        lambda: RunFolder.open(drilled.deployment.runs / folder.parent.name).state.status == "running",
        "the run goes on",
        400,
        drilled.deployment.logs,
    )
    row = note(
        "disk full at the coordinator, resumed elsewhere", drilled, drilled.ended(), recovered=None, repeated=0.0
    )
    row["recovered"] = time.monotonic() - start
    check_nothing_lost(row)


def doctor(drilled: Drilled, **environment: str) -> dict[str, tuple[str, str]]:
    """Return what `chainward-site check` finds at the victim: name of a check -> its outcome and words."""
    site = drilled.deployment.site_dir(VICTIM)
    done = subprocess.run(
        [
            *("chainward-site", "check", str(site / "site.yaml"), "--json"),
            *("--superlink", f"{ADDRESS}:{drilled.line.port}"),
            *("--root-certificates", str(drilled.deployment.authority.certificate)),
            *("--auth-key", str(site / "node.key")),
        ],
        env=flower_environment(site / "flwr") | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode in {0, 1}, done.stderr
    return {check["name"]: (check["outcome"], json.dumps(check)) for check in json.loads(done.stdout)["checks"]}


def stays_out(service: Service, seconds: float) -> str:
    """Start a SuperNode that must not get in; return what it printed within `seconds`."""
    service.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end and service.running:
        time.sleep(0.5)
    said = service.printed_since_start
    service.stop()
    assert "SuperNode ID:" not in said, said[-2000:]
    return said


def test_a_clock_that_is_an_hour_wrong_keeps_the_site_out_and_is_named(drilled):
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("needs libfaketime (Debian's package faketime)")
    drilled.make_whole()
    drilled.take_down()
    wrong = {"LD_PRELOAD": str(library), "FAKETIME": "+1h"}
    skewed = drilled.deployment.supernode(VICTIM, through=drilled.line)
    skewed.environment = wrong
    print(stays_out(skewed, 40)[-1500:])
    status, words = doctor(drilled, **wrong)["clock"]
    print(words)
    assert status == "problem"
    drilled.make_whole()
    assert doctor(drilled)["clock"][0] == "ok"


# -- certificates and keys


def test_an_expired_certificate_keeps_sites_out_until_it_is_renewed(drilled):
    drilled.make_whole()
    deployment = drilled.deployment
    drilled.take_down()
    deployment.superlink.stop()
    good, expired = deployment.superlink.command, "expired"
    deployment.authority.issue(expired, begin=timedelta(days=-2), end=timedelta(hours=-1))
    folder = str(deployment.authority.folder)
    deployment.superlink.command = [word.replace(f"{folder}/superlink.", f"{folder}/{expired}.") for word in good]
    try:
        deployment.start_superlink()
        print(stays_out(deployment.supernode(VICTIM, through=drilled.line), 30)[-1500:])
        status, words = doctor(drilled)["TLS"]
        print(words)
        assert status == "problem"
        assert "expired" in words
    finally:
        deployment.superlink.stop()
        deployment.superlink.command = good
    deployment.start_superlink()
    drilled.make_whole()
    for site in SITES:
        wait_until(lambda site=site: drilled.deployment.is_online(site), f"{site} is connected again", 300)


def test_a_key_that_the_superlink_does_not_know_is_refused(drilled):
    drilled.make_whole()
    drilled.take_down()
    key = drilled.deployment.folder / "wrong.key"
    write_node_key(key)
    said = stays_out(drilled.deployment.supernode(VICTIM, key=key, through=drilled.line), 60)
    print(said[-1500:])
    drilled.make_whole()


def test_a_revoked_site_is_skipped_and_the_run_says_that_it_is_incomplete(drilled):
    drilled.begin(**{"federation.patience": 20.0})
    drilled.in_mid_link()
    drilled.deployment.unregister(VICTIM)
    start = time.monotonic()
    folder = wait_for_links(drilled, 2)
    note("site revoked", drilled, folder, recovered=time.monotonic() - start, repeated=None)
    folder = drilled.ended()
    assert folder.state.status == "incomplete"
    assert [link.status for link in folder.load_results().links] == ["done", "skipped", "done"]
    drilled.take_down()
    key = drilled.deployment.site_dir(VICTIM) / "node.key"
    again = json.loads(drilled.deployment.flwr("supernode", "register", f"{key}.pub", "--format", "json"))
    print(again)
    assert "node-id" not in again, "Flower takes no key twice"
    key.unlink()
    write_node_key(key)
    drilled.deployment.register(VICTIM)
    drilled.make_whole()
