"""The doctor on the way to the coordinator: a real little server on loopback, wrong in every way that hospitals meet."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from chainward_client.doctor import network
from chainward_client.doctor.certificates import check_auth_key, check_root_certificates
from chainward_client.doctor.network import (
    Endpoint,
    check_health,
    check_network,
    check_superlink,
    compare_clocks,
)
from chainward_client.doctor.report import Check
from chainward_shared.errors import ConfigError

YEAR = timedelta(days=365)


def name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def pem(thing: Any) -> bytes:
    return thing.public_bytes(serialization.Encoding.PEM)


@dataclass
class Authority:
    """A certificate authority of one test."""

    common: str = "Consortium CA"
    start: timedelta = -YEAR
    end: timedelta = YEAR

    def __post_init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._signed(self.common, self.key.public_key(), self.start, self.end, [], ca=True)

    def _signed(self, common, public, start, end, names, *, ca) -> x509.Certificate:
        now = datetime.datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(common))
            .issuer_name(name(self.common))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + start)
            .not_valid_after(now + end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if ca:
            usage = dict.fromkeys(
                (
                    "digital_signature",
                    "content_commitment",
                    "key_encipherment",
                    "data_encipherment",
                    "key_agreement",
                    "encipher_only",
                    "decipher_only",
                ),
                False,
            )
            builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def server(self, folder: Path, *names: str, start: timedelta = -YEAR, end: timedelta = YEAR) -> Path:
        """Return a PEM file with a server's key and certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives: list[x509.GeneralName] = []
        for one in names:
            try:
                alternatives.append(x509.IPAddress(ip_address(one)))
            except ValueError:
                alternatives.append(x509.DNSName(one))
        certificate = self._signed("server", key.public_key(), start, end, alternatives, ca=False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = folder / "server.pem"
        path.write_bytes(private + pem(certificate))
        return path

    def roots(self, folder: Path) -> Path:
        path = folder / f"{self.common.replace(' ', '-')}.pem"
        path.write_bytes(pem(self.certificate))
        return path


class SuperLink(BaseHTTPRequestHandler):
    """Answers as Flower's Fleet API does to GET /health; `ahead`: seconds by which its clock is."""

    ahead = 0.0
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        now = datetime.datetime.now(UTC).timestamp()
        return super().date_time_string((timestamp or now) + self.ahead)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(certificate: Path | None, handler: type[BaseHTTPRequestHandler] = SuperLink) -> Iterator[int]:
    """Run a server on loopback, with TLS if it has a certificate; hand out its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # a client that hangs up is what the tests are about
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def looked(tmp_path: Path) -> Iterator[Callable[..., dict[str, Check]]]:
    """Look at a server; return the checks by name."""
    with ExitStack() as stack:

        def look(
            certificate: Path | None, roots: Path | None, host: str = "127.0.0.1", handler: Any = SuperLink
        ) -> dict[str, Check]:
            port = stack.enter_context(serving(certificate, handler))
            return {check.name: check for check in check_superlink(Endpoint(host, port), roots)}

        yield look


def assert_problem(check: Check, *words: str) -> None:
    assert check.outcome == "problem", check
    for word in words:
        assert word in check.found, check
    assert check.advice, "a problem says what to do"
    assert "\n" not in check.found + check.advice


# --- TLS ---


def test_a_superlink_as_it_should_be_is_fine_in_every_step(looked, tmp_path):
    authority = Authority()
    checks = looked(authority.server(tmp_path, "127.0.0.1", "superlink.example.org"), authority.roots(tmp_path))
    assert list(checks) == ["DNS", "port", "TLS", "server certificate", "SuperLink", "clock"]
    assert {check.outcome for check in checks.values()} == {"ok"}
    assert "superlink.example.org" in checks["server certificate"].found
    assert "compared with the server's Date" in checks["clock"].found


def test_another_ca_is_named_with_whose_signature_was_found(looked, tmp_path):
    server = Authority("Somebody Else").server(tmp_path, "127.0.0.1")
    checks = looked(server, Authority().roots(tmp_path))
    assert_problem(checks["TLS"], "wrong CA", "signed by 'Somebody Else'", "Consortium-CA.pem")
    assert (checks["SuperLink"].outcome, checks["clock"].outcome) == ("skipped", "skipped")


def test_another_ca_of_the_same_name_is_found_out_too(looked, tmp_path):
    server = Authority().server(tmp_path, "127.0.0.1")
    assert_problem(looked(server, Authority().roots(tmp_path))["TLS"])


def test_an_expired_certificate_is_named_with_its_day(looked, tmp_path):
    authority = Authority()
    server = authority.server(tmp_path, "127.0.0.1", start=-YEAR, end=-timedelta(days=3))
    day = (datetime.datetime.now(UTC) - timedelta(days=3)).strftime("%Y-%m-%d")
    assert_problem(looked(server, authority.roots(tmp_path))["TLS"], "expired", day)


def test_a_certificate_of_tomorrow_points_to_the_clock(looked, tmp_path):
    authority = Authority()
    server = authority.server(tmp_path, "127.0.0.1", start=timedelta(days=1))
    check = looked(server, authority.roots(tmp_path))["TLS"]
    assert_problem(check, "not valid before")
    assert "clock" in check.advice


def test_a_certificate_that_expires_soon_is_a_warning(looked, tmp_path):
    authority = Authority()
    checks = looked(authority.server(tmp_path, "127.0.0.1", end=timedelta(days=9)), authority.roots(tmp_path))
    assert (checks["TLS"].outcome, checks["server certificate"].outcome) == ("ok", "warning")


@pytest.mark.parametrize("names", [("superlink.example.org", "10.0.0.1"), ()])
def test_a_certificate_for_another_name_is_told_with_the_names_it_has(looked, tmp_path, names):
    authority = Authority()
    check = looked(authority.server(tmp_path, *names), authority.roots(tmp_path))["TLS"]
    assert_problem(check, "wrong name", "127.0.0.1", *(names or ("no name at all",)))


def test_plain_http_on_the_port_is_called_so(looked, tmp_path):
    check = looked(None, Authority().roots(tmp_path))["TLS"]
    assert_problem(check, "without TLS")
    assert "--ssl-certfile" in check.advice


def test_a_server_that_hangs_up_is_called_so(looked, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            for _ in range(2):
                listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        checks = check_superlink(Endpoint("127.0.0.1", listener.getsockname()[1]), Authority().roots(tmp_path))
        thread.join()
    assert_problem(next(check for check in checks if check.name == "TLS"), "hung up")


def test_a_server_that_says_nothing_is_called_so(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        checks = check_superlink(Endpoint("127.0.0.1", listener.getsockname()[1]), Authority().roots(tmp_path))
    assert_problem(next(check for check in checks if check.name == "TLS"), "silent")


# --- name, port, what answers ---


def test_a_port_on_which_nothing_listens_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    checks = {check.name: check for check in check_superlink(Endpoint("127.0.0.1", port), None)}
    assert_problem(checks["port"], "refused", str(port))
    assert checks["TLS"].outcome == "skipped"


def test_an_unknown_host_is_named():
    checks = {check.name: check for check in check_superlink(Endpoint("superlink.invalid", 9092), None)}
    assert_problem(checks["DNS"], "superlink.invalid")
    assert {checks[one].outcome for one in ("port", "TLS", "SuperLink", "clock")} == {"skipped"}


def test_a_port_behind_a_firewall_is_told_from_one_that_refuses(monkeypatch):
    def swallowed(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(network.socket, "create_connection", swallowed)
    check = network._knock(Endpoint("127.0.0.1", 9092))
    assert_problem(check, "no answer")
    assert "firewall" in check.advice


def test_another_service_with_a_right_certificate_is_not_taken_for_a_superlink(looked, tmp_path):
    authority = Authority()
    other = type("Other", (SuperLink,), {"status": 404})
    check = looked(authority.server(tmp_path, "127.0.0.1"), authority.roots(tmp_path), handler=other)["SuperLink"]
    assert_problem(check, "404")


def test_a_proxy_in_the_environment_is_told(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("NO_PROXY", "")
    (check,) = network._proxies(Endpoint("superlink.example.org", 9092))
    assert (check.outcome, "HTTPS_PROXY" in check.found) == ("warning", True)
    monkeypatch.setenv("NO_PROXY", "superlink.example.org")
    assert network._proxies(Endpoint("superlink.example.org", 9092)) == []


# --- clock ---


@pytest.mark.parametrize(
    ("ahead", "outcome", "side"),
    [(-60, "problem", "ahead"), (20, "ok", ""), (200, "warning", "behind"), (900, "problem", "behind")],
)
def test_a_clock_is_compared_with_the_servers(looked, tmp_path, ahead, outcome, side):
    """Flower refuses a site's signature from 5 s ahead and from 300 s behind."""
    authority = Authority()
    other = type("Other", (SuperLink,), {"ahead": ahead})
    check = looked(authority.server(tmp_path, "127.0.0.1"), authority.roots(tmp_path), handler=other)["clock"]
    assert check.outcome == outcome, check
    assert side in check.found


@pytest.mark.parametrize("date", [None, "", "yesterday", "Mon, 99 Foo 2030"])
def test_an_answer_without_a_date_is_compared_with_nothing(date):
    now = datetime.datetime.now(UTC)
    assert compare_clocks(date, now, now).outcome == "skipped"


# --- files ---


def test_root_certificates_are_read_and_dated(tmp_path):
    assert check_root_certificates(Authority().roots(tmp_path)).outcome == "ok"
    expired = Authority("Old CA", end=-timedelta(days=1))
    assert_problem(check_root_certificates(expired.roots(tmp_path)), "Old CA", "expired")
    soon = Authority("Late CA", end=timedelta(days=5))
    assert check_root_certificates(soon.roots(tmp_path)).outcome == "warning"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a PEM file"),
        (b"\x30\x82 der", "not a PEM file"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "not a PEM file"),
        (b"-----BEGIN PRIVATE KEY-----\n", "holds a private key"),
        (None, "can't be read"),
    ],
)
def test_what_is_no_root_certificate_is_told(tmp_path, content, says):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    assert_problem(check_root_certificates(path), says, str(path))


def ssh_key(path: Path, key: Any, mode: int = 0o600) -> Path:
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    path.chmod(mode)
    return path


def test_the_supernodes_key_must_be_ecdsa_and_its_owners_alone(tmp_path):
    key = ec.generate_private_key(ec.SECP384R1())
    assert check_auth_key(ssh_key(tmp_path / "right", key)).outcome == "ok"
    assert_problem(check_auth_key(ssh_key(tmp_path / "open", key, 0o644)), "others may read it", "0644")
    assert_problem(check_auth_key(ssh_key(tmp_path / "ed", ed25519.Ed25519PrivateKey.generate())), "another kind")
    public = tmp_path / "right.pub"
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    assert_problem(check_auth_key(public), "the public half")
    assert_problem(check_auth_key(tmp_path / "absent"), "can't be read")
    (tmp_path / "junk").write_bytes(b"junk")
    assert_problem(check_auth_key(tmp_path / "junk"), "not a private key")


# --- health ---


@contextmanager
def health_server(status: int) -> Iterator[int]:
    import grpc
    from grpc_health.v1.health_pb2 import HealthCheckResponse
    from grpc_health.v1.health_pb2_grpc import HealthServicer, add_HealthServicer_to_server

    class Servicer(HealthServicer):
        def Check(self, request: Any, context: Any) -> Any:
            return HealthCheckResponse(status=status)

    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    add_HealthServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


@pytest.mark.parametrize(("status", "outcome"), [(1, "ok"), (2, "problem")])
def test_the_health_server_is_asked(status, outcome):
    with health_server(status) as port:
        assert check_health(Endpoint("127.0.0.1", port)).outcome == outcome


def test_what_is_no_health_server_is_told(monkeypatch):
    monkeypatch.setattr(network, "TIMEOUT", 2.0)
    with serving(None) as port:
        assert_problem(check_health(Endpoint("127.0.0.1", port)), "no answer of a gRPC health server")


# --- what is not asked for ---


def test_without_options_nothing_is_connected_to_and_each_says_which_option_it_wants(monkeypatch):
    def no_socket(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(network.socket, "socket", no_socket)
    checks = check_network(None, None, None, None)
    assert {check.outcome for check in checks} == {"skipped"}
    assert [check.advice for check in checks] == ["give --superlink", "give --auth-key", "give --health"]


@pytest.mark.parametrize(
    "text", ["superlink", "superlink:", ":9092", "superlink:0", "superlink:99999", "https://x:1", "x:²"]
)
def test_an_endpoint_must_have_host_and_port(text):
    with pytest.raises(ConfigError, match="expected HOST:PORT") as caught:
        Endpoint.parse(text, "--superlink")
    assert "\n" not in str(caught.value)


def test_endpoints_are_written_as_they_are_read():
    assert str(Endpoint.parse("[::1]:9092", "--superlink")) == "[::1]:9092"
    assert Endpoint.parse("superlink.example.org:9092", "--superlink") == Endpoint("superlink.example.org", 9092)
