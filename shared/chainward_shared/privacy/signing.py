"""Ed25519 keys and signatures, and the one way in which signed things are written as bytes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from chainward_shared.errors import PrivacyError
from chainward_shared.files import write_atomically, written


def canonical_json(content: Mapping[str, object]) -> bytes:
    """Return the one JSON text of `content`: sorted keys, no spaces, ASCII, no NaN or infinity.

    Raises
    ------
    ValueError
        A number is NaN or infinite.
    """
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode(
        "ascii"
    )


def create_key(path: Path) -> Ed25519PrivateKey:
    """Make a key pair: the private key in `path` (PEM, mode 0600), the public one beside it as ``<name>.pub``.

    Raises
    ------
    PrivacyError
        There is a key already, or the folder can't be written.
    """
    if path.exists():
        raise PrivacyError(f"{path}: there is a key already; a new one would not match what the old one signed")
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with written(path, PrivacyError, "free space or fix the folder's rights"):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(public_key_path(path), public, mode=0o644)
        write_atomically(path, pem, mode=0o600)  # last: where the private key is, the public one is too
    return key


def public_key_path(path: Path) -> Path:
    """Return where the public half of the private key in `path` lies."""
    return path.with_name(f"{path.name}.pub")


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises
    ------
    PrivacyError
        It is missing, is no Ed25519 key, or others than its owner may read it.
    """
    content = _read(path, "make one with `chainward-site keys`")
    if os.name == "posix" and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        raise PrivacyError(f"{path}: others may read this private key (mode {mode:04o}); expected 0600: chmod 600 it")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        raise PrivacyError(f"{path}: not a private key in PEM format; restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise PrivacyError(f"{path}: a private key of another kind than Ed25519; restore the right one")
    return key


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises
    ------
    PrivacyError
        It is missing, or is no Ed25519 key.
    """
    try:
        key = serialization.load_pem_public_key(_read(path, "`chainward-site keys` makes it"))
    except ValueError as error:
        raise PrivacyError(f"{path}: not a public key in PEM format; restore it") from error
    if not isinstance(key, Ed25519PublicKey):
        raise PrivacyError(f"{path}: a public key of another kind than Ed25519; restore the right one")
    return key


def public_text(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """Return the public key as text: its 32 bytes in hexadecimal."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def fingerprint(public: str) -> str:
    """Return what people compare of a public key: ``SHA256:`` and 43 characters, as ssh-keygen writes them."""
    digest = hashlib.sha256(bytes.fromhex(public)).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def sign(key: Ed25519PrivateKey, purpose: str, message: bytes) -> str:
    """Return the signature of `message`, base64. A signature made for one purpose is none for another."""
    return base64.b64encode(key.sign(_with_purpose(purpose, message))).decode()


def is_signed(public: str, purpose: str, message: bytes, signature: str) -> bool:
    """Return whether `signature` is that of `message`, for `purpose`, by the key whose public half is `public`."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(base64.b64decode(signature, validate=True), _with_purpose(purpose, message))
    except (InvalidSignature, ValueError, binascii.Error):
        return False
    return True


def _with_purpose(purpose: str, message: bytes) -> bytes:
    return f"chainward {purpose}\n".encode() + message


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PrivacyError(f"{path}: can't be read ({error.strerror}); {remedy}") from error
