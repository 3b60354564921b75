"""The kits in server/deploy and client/deploy: scripts do what they say, and what they configure exists in this Flower."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import re
import shutil
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from cryptography.x509.verification import PolicyBuilder, Store
from flower_deployment import ADDRESS, PATIENCE, Authority, free_ports, wait_until
from flwr.cli.build import build_fab_from_disk, build_fab_from_files

from chainward_client.site_ledger import create_site_ledger, open_site_ledger

ROOT = Path(__file__).resolve().parents[2]
SERVER, CLIENT = ROOT / "server" / "deploy", ROOT / "client" / "deploy"
SCRIPTS = sorted([*SERVER.glob("*.sh"), *CLIENT.glob("*.sh")])
UNITS = sorted([*SERVER.glob("*.service"), *CLIENT.glob("*.service")])


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def script(path: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [str(path), *map(str, words)],
        env={**os.environ, "PATH": programs, "CHAINWARD_CA_PASSPHRASE": "pass:words", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def fine(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.parent.name}-{path.name}")
def test_scripts_say_in_one_line_what_they_expect(path):
    refused(script(path), f"{path.name}: expected")
    assert os.access(path, os.X_OK)


@needs("shellcheck")
def test_scripts_pass_shellcheck():
    fine(subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True, check=False))


# --- certificates and keys ---


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authority")
    fine(script(SERVER / "make-ca.sh", folder / "ca", "Oak and Elm"))
    return folder / "ca"


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@needs("openssl")
def test_a_certificate_by_request_is_one_that_a_hospital_accepts(authority, tmp_path):
    fine(script(SERVER / "make-request.sh", tmp_path, "chain.example.org"))
    printed = fine(
        script(SERVER / "sign-request.sh", authority, tmp_path / "superlink.csr", tmp_path / "superlink.crt", 30)
    )
    assert "chain.example.org" in printed
    signed = certificate(tmp_path / "superlink.crt")
    store = Store([certificate(authority / "ca.crt")])
    for name in ("chain.example.org", "localhost"):
        PolicyBuilder().store(store).build_server_verifier(x509.DNSName(name)).verify(signed, [])
    with pytest.raises(x509.verification.VerificationError):
        PolicyBuilder().store(store).build_server_verifier(x509.DNSName("other.example.org")).verify(signed, [])
    for secret in (authority / "ca.key", tmp_path / "superlink.key"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert b"ENCRYPTED" in (authority / "ca.key").read_bytes()
    assert b"PRIVATE" not in (tmp_path / "superlink.csr").read_bytes()


@needs("openssl")
def test_a_request_to_become_an_authority_is_signed_for_serving_only(authority, tmp_path):
    asked = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "subjectAltName=DNS:greedy.example.org"]
    new = [
        "openssl",
        "req",
        "-new",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=greedy",
    ]
    files = ["-keyout", tmp_path / "k", "-out", tmp_path / "greedy.csr"]
    subprocess.run([*new, *asked, *files], check=True, capture_output=True)
    fine(script(SERVER / "sign-request.sh", authority, tmp_path / "greedy.csr", tmp_path / "greedy.crt"))
    constraints = certificate(tmp_path / "greedy.crt").extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.value.ca is False


@needs("openssl")
def test_an_authority_and_keys_are_never_replaced(authority, tmp_path):
    before = (authority / "ca.key").read_bytes()
    refused(script(SERVER / "make-ca.sh", authority, "Another"), "holds an authority already")
    assert (authority / "ca.key").read_bytes() == before
    fine(script(SERVER / "make-request.sh", tmp_path, "a.example.org"))
    key = (tmp_path / "superlink.key").read_bytes()
    fine(script(SERVER / "make-request.sh", tmp_path, "a.example.org"))
    assert (tmp_path / "superlink.key").read_bytes() == key, "a renewal keeps the key"


@needs("openssl")
@pytest.mark.parametrize("name", ["", "a,DNS:evil", "a b", "-a", "$(id)", "x" * 65])
def test_names_that_are_no_dns_names_are_refused(tmp_path, name):
    refused(script(SERVER / "make-request.sh", tmp_path / "new", name), "make-request.sh: '")
    assert not (tmp_path / "new").exists()


@needs("openssl")
@pytest.mark.parametrize("days", ["0", "399", "-1", "1e2", "9999"])
def test_certificates_are_signed_for_a_year_at_most(authority, tmp_path, days):
    refused(script(SERVER / "sign-request.sh", authority, "x.csr", tmp_path / "x.crt", days), "expected 1 to 398")


@needs("ssh-keygen")
def test_a_node_key_is_one_that_flower_reads_and_names_nobody(tmp_path):
    fine(script(CLIENT / "make-node-key.sh", tmp_path))
    key = load_ssh_private_key((tmp_path / "supernode").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    assert stat.S_IMODE((tmp_path / "supernode").stat().st_mode) == 0o600
    assert len((tmp_path / "supernode.pub").read_text().split()) == 2, "no user and host name behind the key"
    refused(script(CLIENT / "make-node-key.sh", tmp_path), "is there already")


# --- backups ---


@needs("flock")
def test_a_backup_of_a_site_holds_ledger_head_and_key_and_can_be_opened(tmp_path):
    state = tmp_path / "state"
    head = create_site_ledger(state, "oak").head
    printed = fine(script(CLIENT / "backup.sh", state, tmp_path / "copy"))
    assert printed.startswith("1 ledger entries")
    restored = tmp_path / "restored"
    shutil.copytree(tmp_path / "copy", restored / "privacy")
    assert open_site_ledger(restored, "oak")[0].head == head
    refused(script(CLIENT / "backup.sh", state, tmp_path / "copy"), "is there already")
    (state / "privacy" / "ledger.jsonl").write_bytes(b"")
    refused(script(CLIENT / "backup.sh", state, tmp_path / "empty"), "ledger.jsonl: missing")
    assert not list(tmp_path.glob("empty*"))


def test_a_backup_of_the_coordinator_is_taken_while_the_database_is_written(tmp_path):
    writer = sqlite3.connect(tmp_path / "superlink.db", isolation_level=None)
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("CREATE TABLE node (id)")
    writer.execute("INSERT INTO node VALUES (7)")
    writer.execute("BEGIN")
    writer.execute("INSERT INTO node VALUES (8)")
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "run.json").write_text("{}")
    printed = fine(script(SERVER / "backup.sh", tmp_path / "copy", tmp_path / "superlink.db", tmp_path / "runs"))
    assert "1 runs" in printed
    assert sqlite3.connect(tmp_path / "copy" / "superlink.db").execute("SELECT id FROM node").fetchall() == [(7,)]


# --- services ---


@needs("systemd-analyze")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: f"{path.parent.parent.name}-{path.name}")
def test_systemd_understands_every_line_of_the_units(path, tmp_path):
    unit = tmp_path / path.name
    unit.write_text(re.sub(r"/opt/chainward/bin/", "/bin/true ", path.read_text()))  # which is not installed here
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False, timeout=60)
    assert path.name not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["flower-superlink", "chainward-supernode"])
def test_every_option_that_the_kits_give_is_one_of_this_flower(command):
    known = subprocess.run(
        [Path(sys.executable).with_name(command), "--help"], capture_output=True, text=True, timeout=120
    )
    side = SERVER if command == "flower-superlink" else CLIENT
    files = [path for path in (*side.glob("*.service"), side / "Containerfile") if command in path.read_text()]
    assert len(files) == 2
    for path in files:
        lines = re.sub(r"\\\n", " ", path.read_text()).splitlines()
        (start,) = (line for line in lines if re.match(r"(ExecStart=|CMD).*" + command, line))
        options = set(re.findall(r"(--[a-z-]+)", start))
        assert options, path
        assert options <= set(re.findall(r"--[a-z-]+", known.stdout)), path
        assert "--insecure" not in options and "--allow-runtime-dependency-installation" not in options


def test_both_sides_have_the_same_probe():
    for name in ("probe.sh", "chainward-probe@.service", "chainward-probe@.timer"):
        assert (SERVER / name).read_bytes() == (CLIENT / name).read_bytes(), name


@pytest.mark.parametrize(("answers", "superexec", "restarts"), [(True, True, 0), (False, True, 1), (True, False, 1)])
def test_the_probe_restarts_what_no_longer_works(tmp_path, answers, superexec, restarts):
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for name, code in (("curl", not answers), ("pgrep", not superexec), ("systemctl", False)):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{calls}\nexit {int(code)}\n')
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    command = [str(SERVER / "probe.sh"), "x.service", "https://localhost/health", "--cacert", "a"]
    environment = os.environ | {"PATH": path, "PROBE_PAUSE": "0"}
    fine(subprocess.run(command, env=environment, capture_output=True, text=True, check=False))
    called = calls.read_text().splitlines()
    assert called.count("systemctl restart x.service") == restarts
    assert sum(call.startswith("curl") for call in called) == (3 if restarts else 1)


def test_telemetry_and_the_update_check_are_off_in_every_kit():
    for path in (
        SERVER / "superlink.env",
        CLIENT / "supernode.env",
        SERVER / "Containerfile",
        CLIENT / "Containerfile",
    ):
        assert {"FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1"} <= set(path.read_text().split()), path


def test_the_coordinators_flwr_speaks_to_the_superlink_that_its_kit_starts():
    config = tomllib.loads((SERVER / "config.toml").read_text())["superlink"]
    chosen = config[config["default"]]
    host, _, port = chosen["address"].partition(":")
    for name in ("flower-superlink.service", "Containerfile"):
        words = re.findall(r"[^\s\",\\]+", (SERVER / name).read_text())
        given = {option: words[words.index(option) + 1] for option in ("--host", "--port", "--ssl-ca-certfile")}
        assert given == {"--host": host, "--port": port, "--ssl-ca-certfile": chosen["root-certificates"]}, name


# --- what reaches the SuperLink, and what runs at a hospital ---


@pytest.mark.parametrize("side", ["ssl", "proxy_ssl"])
def test_the_proxy_speaks_tls_with_forward_secrecy_and_authenticated_encryption_only(side):
    configuration = (SERVER / "nginx.conf").read_text()
    (protocols,) = re.findall(rf"^\s+{side}_protocols (.+);$", configuration, re.MULTILINE)
    assert protocols.split() == ["TLSv1.2", "TLSv1.3"]
    (listed,) = re.findall(rf"^\s+{side}_ciphers (\S+);$", configuration, re.MULTILINE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers(listed)  # OpenSSL's, as in nginx
    known = {cipher["name"]: cipher for cipher in context.get_ciphers() if cipher["protocol"] == "TLSv1.2"}
    assert sorted(known) == sorted(listed.split(":")), "OpenSSL drops names that it does not know in silence"
    assert all(cipher["aead"] and cipher["kea"] == "kx-ecdhe" for cipher in known.values())


@needs("nginx")
def test_the_proxy_lets_hospitals_to_the_fleet_interface_and_the_health_page_and_nowhere_else(tmp_path):
    authority, (inner, outer) = Authority(tmp_path / "tls"), free_ports(2)
    authority.issue("superlink")
    upstream = http.server.ThreadingHTTPServer((ADDRESS, inner), Answering)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "tls" / "superlink.crt", tmp_path / "tls" / "superlink.key")
    upstream.socket = tls.wrap_socket(upstream.socket, server_side=True)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    configuration = (SERVER / "nginx.conf").read_text().replace("/etc/chainward/tls", str(tmp_path / "tls"))
    configuration = configuration.replace("8443", f"{ADDRESS}:{outer}").replace("127.0.0.1:8000", f"{ADDRESS}:{inner}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = " ".join(f"{kind}_temp_path {tmp_path / kind};" for kind in kinds)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path / 'pid'}; error_log {tmp_path / 'log'}; events {{}}\n"
        f"http {{ access_log off; {folders}\n{configuration} }}\n"
    )
    proxy = subprocess.Popen(["nginx", "-c", tmp_path / "nginx.conf", "-e", tmp_path / "log"])
    try:
        trusted = ssl.create_default_context(cafile=str(authority.certificate))

        def ask(path: str, method: str = "POST") -> int:
            connection = http.client.HTTPSConnection("localhost", outer, context=trusted, timeout=20)
            try:
                connection.request(method, path, body=b"")
                return connection.getresponse().status
            except ConnectionError:
                return 0
            finally:
                connection.close()

        wait_until(lambda: ask("/v1/fleet/pull-messages") == 200, "nginx answers", logs=(tmp_path / "log").read_text)
        reached.clear()
        assert ask("/v1/fleet/pull-messages") == 200
        inside = (
            "/v1/control/start-run",
            "/v1/control/register-node",
            "/v1/runtime/acquire-task",
            "/docs",
            "/health/x",
            "/",
        )
        around = (
            "/v1/fleet/../control/start-run",
            "/v1/fleet/%2e%2e/control/start-run",
            "//v1/control/start-run",
            "/V1/FLEET/x",
        )
        for path in (*inside, *around):
            assert ask(path) == 404, path
        assert reached == ["/v1/fleet/pull-messages"]
        assert (ask("/health"), ask("/health", "GET")) == (403, 200)
        assert reached == ["/v1/fleet/pull-messages", "/health"]
    finally:
        proxy.terminate()
        proxy.wait(timeout=20)
        upstream.shutdown()


reached: list[str] = []


class Answering(http.server.BaseHTTPRequestHandler):
    """Stands for the SuperLink: notes what reaches it."""

    def do_POST(self) -> None:
        reached.append(self.path)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *words: object) -> None:
        """Stay silent."""


def bundle(publisher: str) -> bytes:
    """Return a Flower app bundle with code, as somebody might send it."""
    code = b"from flwr.clientapp import ClientApp\napp = ClientApp()\n"
    config = (
        (ROOT / "server/app/pyproject.toml")
        .read_text()
        .replace('publisher = "chainward"', f'publisher = "{publisher}"')
    )
    config = config.replace("chainward_client.app:app", "code:app").replace("chainward_server.app:app", "code:app")
    return build_fab_from_files({"pyproject.toml": config.encode(), "code.py": code, "README.md": b""})[0]


UNPACKING = """
import ctypes, json, os, sys
if sys.argv[1] != "again":
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: root, too, is to obey the folders' modes
    os.execv(sys.executable, [sys.executable, __file__, "again", *sys.argv[1:]])
from pathlib import Path
from flwr.cli.install import install_from_fab  # what the process of a ClientApp calls before it loads the app
home, own, foreign = map(Path, sys.argv[2:])
os.environ["FLWR_HOME"] = str(home)

def unpacked(bundle):
    try:
        return install_from_fab(bundle.read_bytes(), skip_prompt=True).name
    except OSError as error:
        return type(error).__name__

writable = unpacked(foreign)
for folder in (home, home / "apps", *(home / "apps").iterdir()):
    folder.chmod(0o555)
foreign.write_bytes(foreign.with_name("other.fab").read_bytes())
print(json.dumps({"writable": writable, "foreign": unpacked(foreign), "own": unpacked(own)}))
for folder in (home, home / "apps", *(home / "apps").iterdir()):
    folder.chmod(0o755)
"""


@pytest.mark.slow
def test_at_a_hospital_with_a_pinned_app_nothing_else_can_be_unpacked(tmp_path):
    home = tmp_path / "flower"
    printed = fine(script(CLIENT / "pin-app.sh", ROOT, home))
    (pinned,) = (home / "apps").iterdir()
    assert printed.startswith("installed chainward.consortium.") and f"{pinned.suffix}.fab" in printed
    assert [path.name for path in pinned.iterdir()] == ["pyproject.toml"]
    own, foreign = tmp_path / "own.fab", tmp_path / "foreign.fab"
    own.write_bytes(build_fab_from_disk(ROOT / "server" / "app"))
    foreign.write_bytes(bundle("somebody"))
    (tmp_path / "other.fab").write_bytes(bundle("another"))
    (tmp_path / "unpacking.py").write_text(UNPACKING)
    command = [sys.executable, tmp_path / "unpacking.py", home, own, foreign]
    done = fine(subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False))
    outcome = json.loads(done.splitlines()[-1])
    assert outcome["writable"].startswith("somebody."), (
        "where the folder may be written, Flower unpacks what it is sent"
    )
    assert outcome["foreign"] == "PermissionError"
    assert outcome["own"] == pinned.name
    assert not list((home / "apps").glob("another*"))


@pytest.mark.slow
def test_a_checkout_with_code_in_its_app_is_not_pinned(tmp_path):
    shutil.copytree(ROOT / "server" / "app", tmp_path / "checkout" / "server" / "app")
    (tmp_path / "checkout" / "server" / "app" / "extra.py").write_text("print('here')\n")
    refused(script(CLIENT / "pin-app.sh", tmp_path / "checkout", tmp_path / "flower"), "holds more than configuration")
    assert not (tmp_path / "flower" / "apps").exists()
