"""The certificates on the way to the coordinator, the site's own file and what the server shows, and the site's key."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from cryptography.x509.oid import NameOID

from chainward_client.doctor.report import Check, ok, problem, warning
from chainward_shared.words import listed

SOON = timedelta(days=30)
"""A certificate that expires within this time is worth a warning."""


def check_root_certificates(path: Path) -> Check:
    """Check the file with the certificates by which the coordinator's is to be verified."""
    name = "root certificates"
    ask = "ask the coordinator for the root certificate (a PEM file), and compare its fingerprint by phone"
    now = datetime.now(UTC)
    try:
        content = path.read_bytes()
    except OSError as error:
        return problem(name, f"{path}: can't be read ({error.strerror})", ask)
    if b"PRIVATE KEY" in content:
        return problem(name, f"{path}: holds a private key", "delete it, tell the coordinator at once, and " + ask)
    try:
        certificates = x509.load_pem_x509_certificates(content)
    except ValueError:
        return problem(name, f"{path}: not a PEM file with certificates", ask)
    found = listed([f"{_subject(one)}, valid until {day(one.not_valid_after_utc)}" for one in certificates], 3)
    for one in certificates:
        if one.not_valid_after_utc < now:
            return problem(name, f"{_subject(one)}: expired on {day(one.not_valid_after_utc)}", ask)
        if one.not_valid_before_utc > now:
            return problem(
                name,
                f"{_subject(one)}: not valid before {day(one.not_valid_before_utc)}",
                f"check the clock, or {ask}",
            )
    if soon := [one for one in certificates if one.not_valid_after_utc < now + SOON]:
        return warning(name, f"{_subject(soon[0])}: expires on {day(soon[0].not_valid_after_utc)}", ask)
    return ok(name, found)


def day(time: datetime) -> str:
    """Return the day of a moment, YYYY-MM-DD."""
    return time.strftime("%Y-%m-%d")


def _subject(certificate: x509.Certificate) -> str:
    return common_name(certificate.subject) or certificate.subject.rfc4514_string() or "a certificate without a name"


def common_name(name: x509.Name) -> str:
    """Return the common name in a name, or an empty string."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def alternative_names(certificate: x509.Certificate) -> list[str]:
    """Return the names and addresses that a certificate is for (SAN)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [str(name.value) for name in names]


def check_server_certificate(der: bytes) -> Check:
    """Check the certificate that a server showed, which has been verified."""
    certificate = x509.load_der_x509_certificate(der)
    until = certificate.not_valid_after_utc
    found = f"for {listed(alternative_names(certificate), 4)}, valid until {day(until)}"
    if until < datetime.now(UTC) + SOON:
        return warning("server certificate", found, "tell the coordinator that it has to be renewed soon")
    return ok("server certificate", found)


def check_auth_key(path: Path) -> Check:
    """Check the key with which the SuperNode proves which hospital it is."""
    name = "SuperNode key"
    make = f"make one here, it never travels: ssh-keygen -t ecdsa -b 384 -N '' -f {path}"
    try:
        content = path.read_bytes()
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        return problem(name, f"{path}: can't be read ({error.strerror})", make)
    try:
        key = load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if content.startswith((b"ecdsa-", b"ssh-")):
            return problem(name, f"{path}: the public half", "give the private key, the file without .pub")
        return problem(name, f"{path}: not a private key without passphrase in OpenSSH's format", make)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return problem(name, f"{path}: a key of another kind than ECDSA, which Flower wants", make)
    if mode & 0o077:
        return problem(name, f"{path}: others may read it (mode {mode:04o})", f"chmod 600 {path}")
    return ok(
        name,
        f"{key.curve.name}, only its owner may read it; fingerprint: ssh-keygen -l -f {path}. Whether the coordinator has "
        "registered it shows when the SuperNode connects",
    )
