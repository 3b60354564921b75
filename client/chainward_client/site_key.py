"""A hospital's secret: which patients train, validate and test, and keep their labels, follows from it and the patient alone.

A coordinator that could compute it, or influence it, could choose who is in a training. It is made once, at random, and
lies beside ledger and key in the state folder; without it every patient would be dealt anew, so it belongs in the backup.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from chainward_client.kept_records import for_the_owner_alone
from chainward_shared.errors import StoreError

logger = logging.getLogger("chainward.client")

_BYTES = 32


def site_key_path(state_dir: Path) -> Path:
    """Return where the secret of a site with this state folder lies."""
    return state_dir / "privacy" / "site.key"


def site_key(state_dir: Path) -> bytes:
    """Return the site's secret, 32 bytes, made and written with mode 0600 if there is none yet.

    Processes that make it at the same time agree on one.

    Raises
    ------
    StoreError
        It is damaged, others may read it, or it can't be written.
    """
    path = site_key_path(state_dir)
    try:
        if not path.exists():
            _make(path)
        if os.name == "posix" and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            raise StoreError(f"{path}: others may read this secret (mode {mode:04o}); expected 0600: chmod 600 it")
        text = path.read_text(encoding="ascii").strip()
        key = bytes.fromhex(text)
    except (ValueError, UnicodeDecodeError):
        key = b""
    except OSError as error:
        raise StoreError(f"{path}: can't be used ({error.strerror}); free space or fix its rights") from error
    if len(key) != _BYTES:
        raise StoreError(f"{path}: damaged, expected {2 * _BYTES} hexadecimal digits; restore it from a backup")
    return key


def identity(state_dir: Path) -> Ed25519PrivateKey:
    """Return the key by which a coordinator knows this site again; it follows from the site's secret.

    Raises
    ------
    StoreError
        As of `site_key`.
    """
    derived = HKDF(SHA256(), 32, salt=None, info=b"chainward identity").derive(site_key(state_dir))
    return Ed25519PrivateKey.from_private_bytes(derived)


def site_key_to_look_with(state_dir: Path) -> bytes:
    """Return the site's secret, or one for the moment where there is none yet; nothing is written.

    Raises
    ------
    StoreError
        It is damaged, others may read it, or it can't be read.
    """
    return site_key(state_dir) if site_key_path(state_dir).exists() else secrets.token_bytes(_BYTES)


@for_the_owner_alone()
def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_bytes(_BYTES).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)  # whole or not at all, and never over one that another process has just made
        except FileExistsError:
            return
    finally:
        part.unlink(missing_ok=True)
    logger.debug("%s: made; patients are dealt to train, val and test by it. Back it up with the ledger", path)
