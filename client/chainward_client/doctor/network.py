"""The way to the coordinator, a step at a time: name, port, certificates, TLS, the SuperLink behind it, the clock, health.

Nothing of the site is sent: a TLS handshake, ``GET /health`` and a gRPC health request.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import os
import socket
import ssl
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from chainward_client.doctor.certificates import (
    alternative_names,
    check_auth_key,
    check_root_certificates,
    check_server_certificate,
    common_name,
    day,
)
from chainward_client.doctor.report import Check, ok, problem, skipped, warning
from chainward_shared.errors import ConfigError
from chainward_shared.words import listed

TIMEOUT = 8.0
"""Seconds to wait for an answer of the network."""

AHEAD, BEHIND = 5, 300
"""Seconds by which a site's clock may differ from the SuperLink's: Flower refuses signed requests beyond (flwr 1.41 and 1.42)."""

_NAMES = ("clock", "TLS", "SuperLink")


@dataclass(frozen=True)
class Endpoint:
    """A host and a port, as ``HOST:PORT``; an IPv6 address in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, option: str) -> Endpoint:
        """Return what `text` names.

        Raises
        ------
        ConfigError
            It is not ``HOST:PORT``.
        """
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if "/" in text or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
            raise ConfigError(
                f"{option} {text}: expected HOST:PORT without a prefix such as https://, e.g. superlink.example.org:9092"
            )
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_network(
    superlink: Endpoint | None, root_certificates: Path | None, auth_key: Path | None, health: Endpoint | None
) -> list[Check]:
    """Return what was found on the way to the SuperLink; what has no option is skipped, and says so.

    Parameters
    ----------
    superlink : the SuperLink's Fleet API, as of ``flower-supernode --superlink``
    root_certificates : as of ``flower-supernode --root-certificates``; None: those of the machine
    auth_key : as of ``flower-supernode --auth-supernode-private-key``
    health : as of ``flower-superlink --health-server-address``
    """
    checks = [] if root_certificates is None else [check_root_certificates(root_certificates)]
    if superlink is None:
        checks.append(skipped("network", "DNS, port, TLS, clock and SuperLink: not looked at", "give --superlink"))
    else:
        checks += check_superlink(superlink, root_certificates)
    if auth_key is None:
        checks.append(skipped("SuperNode key", "not looked at", "give --auth-key"))
    else:
        checks.append(check_auth_key(auth_key))
    checks.append(skipped("health", "not looked at", "give --health") if health is None else check_health(health))
    return checks


# --- the SuperLink ---


def check_superlink(endpoint: Endpoint, root_certificates: Path | None) -> list[Check]:
    """Check name, port, TLS, SuperLink and clock, in this order; what comes after a failure is skipped."""
    checks = [*_proxies(endpoint)]
    dns, addresses = _resolve(endpoint)
    checks.append(dns)
    if not addresses:
        return checks + [
            skipped(name, "not looked at: the host has no address") for name in ("port", *reversed(_NAMES))
        ]
    port = _knock(endpoint)
    checks.append(port)
    if port.outcome == "problem":
        return checks + [skipped(name, "not looked at: the port doesn't answer") for name in reversed(_NAMES)]
    tls, context = _handshake(endpoint, root_certificates)
    checks += tls
    if context is None:
        return checks + [skipped(name, "not looked at: TLS failed") for name in ("SuperLink", "clock")]
    return checks + _ask_health_page(endpoint, context)


def _proxies(endpoint: Endpoint) -> list[Check]:
    proxy = urllib.request.getproxies().get("https")
    if not proxy or urllib.request.proxy_bypass(endpoint.host):
        return []
    return [
        warning(
            "proxy",
            f"HTTPS_PROXY is set here, and {endpoint.host} is not in NO_PROXY: Flower goes through the proxy, these checks "
            "connect directly",
            f"add {endpoint.host} to NO_PROXY, or make sure that the proxy only tunnels (CONNECT) and doesn't open TLS",
        )
    ]


def _resolve(endpoint: Endpoint) -> tuple[Check, list[str]]:
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return problem(
            "DNS",
            f"{endpoint.host}: this machine's DNS knows no such host ({reason})",
            "check the spelling with the coordinator; else the hospital's DNS must resolve it, or /etc/hosts",
        ), []
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    return ok("DNS", f"{endpoint.host} is {listed(addresses, 3)}"), addresses


def _knock(endpoint: Endpoint) -> Check:
    firewall = f"let the hospital's firewall open TCP port {endpoint.port} outwards to {endpoint.host}"
    try:
        socket.create_connection((endpoint.host, endpoint.port), timeout=TIMEOUT).close()
    except ConnectionRefusedError:
        return problem(
            "port",
            f"{endpoint}: refused; the host is there, and nothing listens on this port",
            "ask the coordinator whether the SuperLink runs and on which port; some firewalls refuse like this, too",
        )
    except TimeoutError:
        return problem("port", f"{endpoint}: no answer within {TIMEOUT:g} s", firewall)
    except OSError as error:
        return problem("port", f"{endpoint}: can't be reached ({error.strerror or error})", firewall)
    return ok("port", f"{endpoint} is open")


def _handshake(endpoint: Endpoint, roots: Path | None) -> tuple[list[Check], ssl.SSLContext | None]:
    """Return what TLS says and, where it succeeded, the context with which it did."""
    try:
        context = ssl.create_default_context(cafile=None if roots is None else str(roots))
    except (OSError, ssl.SSLError):
        return [skipped("TLS", "not looked at: the root certificates can't be used")], None
    try:
        version, der = _shown(endpoint, context)
    except (OSError, ValueError) as error:
        return [_tls_problem(endpoint, roots, error)], None
    assert der is not None
    return [ok("TLS", f"{version}, verified by {_trust(roots)}"), check_server_certificate(der)], context


def _shown(endpoint: Endpoint, context: ssl.SSLContext) -> tuple[str | None, bytes | None]:
    """Return the version of TLS, and the certificate that the server shows."""
    with (
        socket.create_connection((endpoint.host, endpoint.port), timeout=TIMEOUT) as raw,
        context.wrap_socket(raw, server_hostname=endpoint.host) as tls,
    ):
        return tls.version(), tls.getpeercert(binary_form=True)


def _trust(roots: Path | None) -> str:
    return "the certificates of this machine (no --root-certificates)" if roots is None else roots.name


def _tls_problem(endpoint: Endpoint, roots: Path | None, error: Exception) -> Check:
    """Return in plain words why a handshake failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _verification_problem(endpoint, roots, error)
    reason = str(getattr(error, "reason", "") or "")
    if isinstance(error, ssl.SSLError) and any(
        part in reason for part in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH")
    ):
        return problem(
            "TLS",
            f"{endpoint} answers without TLS (plain HTTP, or another service)",
            "the SuperLink must run with --ssl-certfile; never start the SuperNode with --insecure",
        )
    if isinstance(error, TimeoutError):
        return problem(
            "TLS", f"{endpoint}: open, but silent for {TIMEOUT:g} s", "a firewall that inspects TLS, or another service"
        )
    if isinstance(error, ConnectionResetError | ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return problem(
            "TLS",
            f"{endpoint}: hung up in the handshake",
            "a firewall or proxy that inspects TLS is the usual cause: exempt this host from it; else another service",
        )
    return problem("TLS", f"the handshake failed: {reason or error}", "ask the coordinator")


def _verification_problem(endpoint: Endpoint, roots: Path | None, error: ssl.SSLCertVerificationError) -> Check:
    """Return in plain words why the server's certificate is refused, by OpenSSL's codes (X509_V_ERR_...)."""
    coordinator = "ask the coordinator"
    shown = _unverified(endpoint)
    code = error.verify_code
    if code == 10:
        expired = f" on {day(shown.not_valid_after_utc)}" if shown else ""
        if shown and shown.not_valid_after_utc > datetime.now(UTC):
            return problem("TLS", "a certificate between the server's and the root expired", "renew it: " + coordinator)
        return problem(
            "TLS",
            f"the server's certificate expired{expired}",
            "the coordinator must renew it (or this clock is wrong)",
        )
    if code == 9:
        start = f" before {day(shown.not_valid_before_utc)}" if shown else " yet"
        return problem("TLS", f"the server's certificate is not valid{start}", "check this machine's clock")
    if code in (62, 64):
        names = listed(alternative_names(shown), 4) if shown else ""
        return problem(
            "TLS",
            f"wrong name: the server's certificate is for {names or 'no name at all'}, not for {endpoint.host}",
            f"use one of these names in --superlink, or {coordinator} for a certificate with this one (SAN)",
        )
    if code in (2, 18, 19, 20, 21):
        signer = common_name(shown.issuer) or shown.issuer.rfc4514_string() if shown else "somebody else"
        return problem(
            "TLS",
            f"wrong CA: the server's certificate is signed by '{signer}', which {_trust(roots)} doesn't hold",
            "use the root certificate that the coordinator sent for this server; if it is the right one, a proxy of the "
            "hospital opens TLS: exempt this host from it",
        )
    return problem("TLS", f"the server's certificate is refused: {error.verify_message}", coordinator)


def _unverified(endpoint: Endpoint) -> x509.Certificate | None:
    """Return the certificate that the server shows, whoever signed it: to say what is wrong with it, for nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        _, der = _shown(endpoint, context)
        return None if der is None else x509.load_der_x509_certificate(der)
    except (OSError, ValueError):
        return None


def _ask_health_page(endpoint: Endpoint, context: ssl.SSLContext) -> list[Check]:
    """Ask the SuperLink's Fleet API whether it is well, and compare its clock with this one."""
    connection = http.client.HTTPSConnection(endpoint.host, endpoint.port, timeout=TIMEOUT, context=context)
    try:
        sent = datetime.now(UTC)
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read(65_536)
        received = datetime.now(UTC)
    except (OSError, http.client.HTTPException) as error:
        return [
            problem(
                "SuperLink",
                f"{endpoint}: TLS works, and HTTP doesn't ({error or type(error).__name__})",
                "is it the port of the SuperLink's Fleet API? ask the coordinator",
            ),
            skipped("clock", "not compared with the server: no answer"),
        ]
    finally:
        connection.close()
    superlink = ok("SuperLink", f"{endpoint}: GET /health answers {answer.status}")
    if answer.status != 200:
        superlink = problem(
            "SuperLink",
            f"{endpoint}: GET /health answers {answer.status} {answer.reason}; expected 200",
            "another service, or a proxy in front that lets other paths through only; ask the coordinator",
        )
    return [superlink, compare_clocks(answer.getheader("Date"), sent, received)]


def compare_clocks(date: str | None, sent: datetime, received: datetime) -> Check:
    """Compare this machine's clock with the ``Date`` of a server's answer, which is in whole seconds.

    Parameters
    ----------
    date : the header; None where there was none
    sent, received : when the question went out and the answer came, by this machine's clock, UTC
    """
    try:
        theirs = email.utils.parsedate_to_datetime(date or "")
    except ValueError:
        return skipped("clock", "not compared: the server's answer has no Date")
    theirs = theirs if theirs.tzinfo else theirs.replace(tzinfo=UTC)
    # the header was cut to a second, and may have been written any time between the two, by servers that keep it for one
    ahead = (sent - theirs - timedelta(seconds=2)).total_seconds()
    behind = (theirs - received).total_seconds()
    compared = "compared with the server's Date"
    fix = "switch on time synchronisation (timedatectl set-ntp true), or ask the coordinator if the server's is wrong"
    if ahead > AHEAD:
        return problem("clock", f"{ahead:.0f} s ahead, {compared}; Flower refuses more than {AHEAD} s", fix)
    if behind > BEHIND:
        return problem("clock", f"{behind:.0f} s behind, {compared}; Flower refuses more than {BEHIND} s", fix)
    if ahead > 1 or behind > 60:
        side, apart = ("ahead", ahead) if ahead > 1 else ("behind", behind)
        return warning(
            "clock", f"{apart:.0f} s {side}, {compared}; Flower refuses {AHEAD} s ahead, {BEHIND} s behind", fix
        )
    return ok("clock", f"right to within 2 s and the time of the answer, {compared}")


# --- key and health ---


def check_health(endpoint: Endpoint) -> Check:
    """Ask the SuperLink's gRPC health server, which has no TLS and is for the coordinator's own network."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it writes to stderr from C++
    import grpc
    from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
    from grpc_health.v1.health_pb2_grpc import HealthStub

    options = [("grpc.enable_http_proxy", 0)] if _is_local(endpoint.host) else []
    with grpc.insecure_channel(str(endpoint), options=options) as channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=TIMEOUT)
        except grpc.RpcError as error:
            code = error.code().name.lower().replace("_", " ")
            return problem(
                "health",
                f"{endpoint}: no answer of a gRPC health server ({code}: {_short(error.details())})",
                "ask the coordinator whether the SuperLink runs with --health-server-address, and whether you may reach it",
            )
    status = HealthCheckResponse.ServingStatus.Name(answer.status)
    if status != "SERVING":
        return problem("health", f"{endpoint}: {status}", "ask the coordinator: the SuperLink is not working")
    return ok("health", f"{endpoint}: SERVING (gRPC health)")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _short(text: str | None) -> str:
    text = " ".join((text or "").split())
    return text if len(text) <= 120 else f"{text[:120]}..."
