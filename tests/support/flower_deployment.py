"""A consortium on this machine as it is deployed: SuperLink with TLS and node authentication, a SuperNode per hospital.

Everything lives under one folder and on 127.0.0.1. Each hospital, and the coordinator, has a FLWR_HOME of its own, by which
its processes are found again, whoever started them.
"""

from __future__ import annotations

import csv
import ipaddress
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from chainward_server.run_folder import RunFolder
from chainward_simulations.flower import processes_of, stop_processes

APP = Path(__file__).resolve().parents[2] / "server" / "app"

ADDRESS = "127.0.0.1"


STARTED = "=== started ==="

PATIENCE = float(os.environ.get("CHAINWARD_TEST_PATIENCE", "300"))
"""Seconds after which something that takes a few on an idle machine counts as hanging; a busy one needs minutes."""


class TookTooLong(AssertionError):
    """Something did not happen in time; the message ends with the logs."""


def wait_until(true: Callable[[], Any], what: str, within: float = PATIENCE, logs: Callable[[], str] = str) -> Any:
    """Return what `true` returns as soon as that is true.

    Raises
    ------
    TookTooLong
        It was not `within` seconds.
    """
    end = time.monotonic() + within
    while not (found := true()):
        if time.monotonic() > end:
            raise TookTooLong(f"after {within:g} s still not: {what}\n{logs()}")
        time.sleep(0.2)
    return found


class Authority:
    """A certificate authority in a folder: makes certificates as `server/deploy/make-ca.sh` does."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP384R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        self.certificate = folder / "ca.crt"
        now = datetime.now(UTC)
        usage = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        signed = (
            self._builder(self.name, self.key.public_key(), now - timedelta(days=2), now + timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **usage), critical=True
            )
            .sign(self.key, hashes.SHA384())
        )
        self.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: Any, begin: datetime, end: datetime) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
        )

    def issue(self, name: str, *, begin: timedelta = timedelta(days=-1), end: timedelta = timedelta(days=1)) -> None:
        """Write `name`.crt and `name`.key for localhost and 127.0.0.1; `begin` and `end` count from now."""
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(ADDRESS))])
        signed = (
            self._builder(subject, key.public_key(), now + begin, now + end)
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA384())
        )
        (self.folder / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        (self.folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


def write_node_key(path: Path) -> None:
    """Write what `ssh-keygen -t ecdsa -b 384 -N "" -f PATH` writes: the private key, and the public one as PATH.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    path.touch(mode=0o600)
    path.write_bytes(private)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public + b"\n")


@dataclass
class Service:
    """A process that can be started, killed, stopped and started again; `home` is its FLWR_HOME."""

    name: str
    command: list[str]
    home: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """All that it has printed, over all its starts."""
        return self.home.parent / f"{self.name}.log"

    @property
    def printed(self) -> str:
        """The log as text."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def printed_since_start(self) -> str:
        """What it has printed since it was last started."""
        return self.printed.rpartition(STARTED)[2]

    @property
    def running(self) -> bool:
        """Whether the process itself, not its children, is there."""
        return self.process is not None and self.process.poll() is None

    @property
    def processes(self) -> list[psutil.Process]:
        """The process and all that it has started, also those that outlived it."""
        return processes_of(self.home)

    def start(self) -> None:
        """Start it; it must not be running."""
        assert not self.running, f"{self.name} is running already"
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"{STARTED}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                self.command,
                env={**flower_environment(self.home), **self.environment},
                cwd=self.home.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL the process alone, as a crash does; what it started notices by itself, or does not."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=20)

    def wait(self, within: float) -> int:
        """Return the exit code, once it has ended by itself."""
        wait_until(lambda: not self.running, f"{self.name} has ended", within, lambda: self.printed[-3000:])
        assert self.process is not None
        return int(self.process.returncode)

    def stop(self) -> None:
        """End the process and everything that it started; harmless where nothing is left."""
        if self.running:
            assert self.process is not None
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        stop_processes(self.home, grace=10.0)
        if self.process is not None:
            self.process.wait(timeout=20)

    def restart(self) -> None:
        """Stop, where it runs, and start."""
        self.stop()
        self.start()


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment of a Flower command whose FLWR_HOME is `home`, as the kits set it."""
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nothing listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((ADDRESS, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class Supervisor:
    """Starts a service again, `every` seconds after it has ended, as its systemd unit does; while it is `on`."""

    def __init__(self, service: Service, every: float = 30.0) -> None:
        self.service, self.every = service, every
        self._on, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def on(self) -> None:
        """Look after the service from now on."""
        self._on.set()

    def off(self) -> None:
        """Leave the service alone from now on."""
        self._on.clear()

    def end(self) -> None:
        """Look after nothing any more."""
        self._ended.set()
        self._on.set()
        self._thread.join(timeout=self.every + 30)

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            self._on.wait()
            if not self.service.running and not self._ended.wait(self.every) and self._on.is_set():
                self.service.restart()


class Line:
    """The line between a hospital and the SuperLink: all bytes pass through here, unless it is cut.

    A cut line is a hole: nothing is refused, nothing is answered, as where a VPN is down. What was on its way arrives later.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self._up = threading.Event()
        self._up.set()
        self._listener = socket.create_server((ADDRESS, 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Let nothing pass from now on."""
        self._up.clear()

    def mend(self) -> None:
        """Let everything pass again."""
        self._up.set()

    def close(self) -> None:
        """Take no further connections."""
        self._up.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        self._up.wait()
        try:
            far = socket.create_connection((ADDRESS, self.target))
        except OSError:
            near.close()
            return
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._up.wait()
                sink.sendall(data)
            self._up.wait()
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def write_site(folder: Path, site: str, data: Path, policy: Mapping[str, Any] | None = None) -> Path:
    """Write a hospital's site.yaml and data into the new `folder`; return the path of site.yaml.

    The data are the rows of the manifest of the consortium's data file `data` whose hospital is `site`.
    """
    folder.mkdir(parents=True)
    description = yaml.safe_load(data.read_text())
    with (data.parent / description["manifest"]).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["hospital"] == site]
    assert rows, f"the consortium's manifest has no hospital '{site}'"
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "label", "patient", "split"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    del description["columns"]["site"]
    description["images"] = str(data.parent / description["images"])
    (folder / "data.yaml").write_text(yaml.safe_dump(description))
    content: dict[str, Any] = {"site": site, "data": "data.yaml", "state": "state"}
    if policy is not None:
        content["privacy"] = dict(policy)
    (folder / "site.yaml").write_text(yaml.safe_dump(content))
    return folder / "site.yaml"


class Deployment:
    """A consortium under `folder`: `start_superlink`, `add_site` and `start_site` for each hospital, then `run`."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.runs = folder / "coordinator" / "runs"
        self.home = folder / "coordinator" / "flwr"
        self.authority = Authority(folder / "certificates")
        self.authority.issue("superlink")
        self.port, self.health_port = free_ports(2)
        self.sites: dict[str, Service] = {}
        self.nodes: dict[str, int] = {}
        certificates = self.authority.folder
        self.superlink = Service(
            "superlink",
            [
                "flower-superlink",
                *("--host", ADDRESS, "--port", str(self.port)),
                *("--ssl-ca-certfile", str(certificates / "ca.crt")),
                *("--ssl-certfile", str(certificates / "superlink.crt")),
                *("--ssl-keyfile", str(certificates / "superlink.key")),
                "--enable-supernode-auth",
                *("--database", str(folder / "coordinator" / "superlink.db")),
                "--disable-runtime-dependency-installation",
                *("--health-server-address", f"{ADDRESS}:{self.health_port}"),
            ],
            self.home,
        )

    # --- coordinator ---

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers."""
        self.home.mkdir(parents=True, exist_ok=True)
        connection = f'address = "{ADDRESS}:{self.port}"\nroot-certificates = "{self.authority.certificate}"\n'
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "consortium"\n\n[superlink.consortium]\n{connection}'
        )
        self.superlink.start()
        wait_until(self._listening, "the SuperLink listens", logs=self.logs)

    def _listening(self) -> bool:
        assert self.superlink.running, f"the SuperLink ended: {self.superlink.printed[-3000:]}"
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((ADDRESS, self.port)) == 0

    def flwr(self, *words: str, timeout: float = PATIENCE) -> str:
        """Run `flwr WORDS` as the coordinator's administrator; return what it printed.

        Raises
        ------
        AssertionError
            Its exit code is not 0.
        """
        done = subprocess.run(
            ["flwr", *words],
            env=flower_environment(self.home),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd=self.home.parent,
        )
        assert done.returncode == 0, (
            f"flwr {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}"
        )
        return done.stdout

    def register(self, site: str) -> int:
        """Tell the SuperLink the site's public key; return the node's id."""
        answer = json.loads(
            self.flwr("supernode", "register", str(self.site_dir(site) / "node.key.pub"), "--format", "json")
        )
        self.nodes[site] = int(answer["node-id"])
        return self.nodes[site]

    def unregister(self, site: str) -> None:
        """Take the site's key back."""
        self.flwr("supernode", "unregister", str(self.nodes.pop(site)))

    def submit(self, settings: Mapping[str, Any], app: Path = APP) -> int:
        """Start a run with `flwr run` and return Flower's id of it."""
        flat = {"output.dir": str(self.runs), **settings}
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in flat.items())
        answer = json.loads(self.flwr("run", str(app), "consortium", "--run-config", pairs, "--format", "json"))
        return int(answer["run-id"])

    def run_folders(self) -> list[Path]:
        """Paths of the run folders, oldest first."""
        return sorted(path.parent for path in self.runs.glob("*/run.json"))

    def wait_for_run(self, within: float = 4 * PATIENCE, *, count: int = 1) -> RunFolder:
        """Return the last of `count` run folders once it has ended, well or not."""

        def ended() -> RunFolder | None:
            paths = self.run_folders()
            if len(paths) < count:
                return None
            folder = RunFolder.open(paths[-1])
            return folder if folder.state.status != "running" else None

        found: RunFolder = wait_until(ended, f"run {count} has ended", within, self.logs)
        return found

    def flower_status(self, run: int) -> str:
        """What Flower says of a run, e.g. "finished:completed"."""
        listed = json.loads(self.flwr("list", "--format", "json"))
        (status,) = (entry["status"] for entry in listed["runs"] if int(entry["run-id"]) == run)
        return str(status)

    # --- sites ---

    def site_dir(self, site: str) -> Path:
        """Folder of a hospital: site.yaml, data, state, key."""
        return self.folder / site

    def add_site(self, site: str, policy: Mapping[str, Any] | None = None, *, register: bool = True) -> Service:
        """Write the hospital's site.yaml, data and key; make its ledger if it has a policy; register its key.

        The data are the rows of the consortium's manifest whose hospital is `site`.
        """
        folder = self.site_dir(site)
        write_site(folder, site, self.data, policy)
        if policy is not None:
            subprocess.run(
                ["chainward-site", "keys", str(folder / "site.yaml")], check=True, env=flower_environment(folder)
            )
        write_node_key(folder / "node.key")
        if register:
            self.register(site)
        self.sites[site] = self.supernode(site)
        return self.sites[site]

    def supernode(
        self, site: str, *, key: Path | None = None, authority: Path | None = None, through: Line | None = None
    ) -> Service:
        """Return the SuperNode of a hospital, not started; `key` and `authority`: others than its own; `through`: a line to the
        SuperLink that can be cut."""
        folder = self.site_dir(site)
        (port,) = free_ports(1)
        return Service(
            site,
            [
                "chainward-supernode",
                *("--superlink", f"{ADDRESS}:{self.port if through is None else through.port}"),
                *("--root-certificates", str(authority or self.authority.certificate)),
                *("--auth-supernode-private-key", str(key or folder / "node.key")),
                *("--node-config", f'site-config="{folder / "site.yaml"}"'),
                *("--host", ADDRESS, "--port", str(port)),
            ],
            folder / "flwr",
        )

    def start_site(self, site: str, *, online: bool = True) -> None:
        """Start a hospital's SuperNode and wait until the SuperLink knows that it is there."""
        self.sites[site].start()
        if online:
            self.wait_online(site)

    def is_online(self, site: str) -> bool:
        """Whether the SuperLink counts the site's node as connected."""
        listed = json.loads(self.flwr("supernode", "list", "--format", "json"))
        return any(int(node["node-id"]) == self.nodes[site] and node["status"] == "online" for node in listed["nodes"])

    def wait_online(self, site: str, within: float = PATIENCE) -> None:
        """Wait until the SuperNode, since it was last started, has said that it is connected."""
        service = self.sites[site]

        def connected() -> bool:
            assert service.running, f"{site}'s SuperNode ended: {service.printed[-3000:]}"
            return "SuperNode ID:" in service.printed_since_start

        wait_until(connected, f"{site} is connected", within, self.logs)

    # --- all ---

    def logs(self, characters: int = 2500) -> str:
        """The ends of all logs, for a message."""
        services = [self.superlink, *self.sites.values()]
        return "\n".join(f"--- {service.name} ---\n{service.printed[-characters:]}" for service in services)

    def stop(self) -> None:
        """End every process, hospitals first."""
        for service in (*self.sites.values(), self.superlink):
            service.stop()


@contextmanager
def deployed(folder: Path, data: Path) -> Iterator[Deployment]:
    """Yield a deployment, and leave no process of it behind."""
    deployment = Deployment(folder, data)
    try:
        yield deployment
    finally:
        deployment.stop()
