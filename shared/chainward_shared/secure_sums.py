"""Secure sums: the coordinator learns what the sites' numbers add up to, and none of the numbers.

The protocol is that of Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning" (CCS 2017):
every two sites agree on a mask that one adds and the other subtracts, and each adds a mask of its own. Both are shared out among
all, so that the own masks of those that answered, and the common masks of those that dropped out, can be removed from the sum
by a threshold of sites. No site ever gives shares of both masks of another.

Key agreement, secret sharing and the encryption of shares are Flower's (`flwr.common.secure_aggregation`). Two of its parts are
not used: its masks come from a Mersenne twister with a seed of 32 bits, which anyone can try; here they are AES-256 in counter
mode. And its quantisation clips to a range that somebody has to know, and rounds at random; here numbers are fixed-point, modulo
2^64, so that counts add up exactly and sums to half of the last bit per site. What would overflow is refused.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from pydantic import Field
from torch import Tensor

from chainward_shared.errors import ModelError, ProtocolError
from chainward_shared.outside import Record, SiteId
from chainward_shared.privacy.signing import canonical_json, is_signed, public_text, sign
from chainward_shared.protocol import Offer, Round

FRACTION_BITS = 24
"""Bits behind the point: a number is rounded to 6e-8."""

_CURVE = ec.SECP384R1()
_KEY_BYTES = 48
_SEED_BYTES = 32
_BLOCK = 1 << 16
_PURPOSE = "secure-sum"


class Secrets(Record):
    """What a site keeps to itself between the messages of a round: private keys and the seed of its own mask, hexadecimal."""

    channel: str = Field(pattern=rf"^[0-9a-f]{{{2 * _KEY_BYTES}}}$")
    mask: str = Field(pattern=rf"^[0-9a-f]{{{2 * _KEY_BYTES}}}$")
    seed: str = Field(pattern=rf"^[0-9a-f]{{{2 * _SEED_BYTES}}}$")

    @classmethod
    def new(cls) -> Secrets:
        """Return new ones, from the operating system's entropy."""
        return cls(channel=_new_key().hex(), mask=_new_key().hex(), seed=os.urandom(_SEED_BYTES).hex())

    def __repr__(self) -> str:
        return "Secrets(...)"

    __str__ = __repr__


def fewest_answers(members: int, share: float) -> int:
    """Return how many of `members` must answer: more than `share` of them, at least two and never more than all.

    More than half, as otherwise a coordinator could ask one half for the shares of a site's own mask, and the other half for
    those of its common ones.
    """
    return min(members, max(2, int(members * max(0.5, share)) + 1))


# A site's part


def offered(secrets: Secrets, round_: Round, site: str, identity: Ed25519PrivateKey | None = None) -> Offer:
    """Return the public keys that go with a site's secrets, signed with its own key where it has one."""
    offer = Offer(site=site, channel=_public(secrets.channel), mask=_public(secrets.mask))
    if identity is None:
        return offer
    signature = sign(identity, _PURPOSE, _signed(round_, offer))
    return offer.model_copy(update={"identity": public_text(identity), "signature": signature})


def is_genuine(offer: Offer, round_: Round) -> bool:
    """Return whether an offer is signed, for this very round, by the key that it names."""
    return (
        offer.identity is not None
        and offer.signature is not None
        and is_signed(offer.identity, _PURPOSE, _signed(round_, offer), offer.signature)
    )


def shares_for_others(secrets: Secrets, round_: Round, site: str, offers: Sequence[Offer]) -> dict[str, str]:
    """Return the shares of a site's secrets, each for one of the sites that offer keys and readable by that one alone.

    Its own share is among them, under its own name: it comes back with those of the others.

    Raises
    ------
    ProtocolError
        A public key is none.
    """
    seeds = create_shares(bytes.fromhex(secrets.seed), round_.threshold, len(offers))
    keys = create_shares(bytes.fromhex(secrets.mask), round_.threshold, len(offers))
    return {
        offer.site: encrypt(
            _agreed(secrets.channel, offer.channel),
            canonical_json({"from": site, "to": offer.site, "seed": seed.hex(), "key": key.hex()}),
        ).decode()
        for offer, seed, key in zip(offers, seeds, keys, strict=True)
    }


@dataclass(frozen=True)
class Held:
    """The shares of another site's secrets that a site holds: of the seed of its own mask, and of the key of the common ones."""

    seed: bytes
    key: bytes


def opened(secrets: Secrets, site: str, offers: Sequence[Offer], received: Mapping[str, str]) -> dict[str, Held]:
    """Return the shares that other sites have sent to a site, by sender.

    Raises
    ------
    ProtocolError
        One can't be read, or was not meant for this site.
    """
    held = {}
    for offer in offers:
        if offer.site not in received:
            continue
        try:
            text = decrypt(_agreed(secrets.channel, offer.channel), received[offer.site].encode())
            share = _Share.model_validate_json(text)
        except (InvalidToken, InvalidTag, ValueError) as error:
            raise ProtocolError(
                f"the shares of site '{offer.site}' can't be read; they are not for this site"
            ) from error
        if (share.sender, share.receiver) != (offer.site, site):
            raise ProtocolError(
                f"the shares of site '{offer.site}' are those of '{share.sender}' for '{share.receiver}'"
            )
        held[offer.site] = Held(bytes.fromhex(share.seed), bytes.fromhex(share.key))
    return held


class _Share(Record):
    sender: SiteId = Field(alias="from")
    receiver: SiteId = Field(alias="to")
    seed: str = Field(pattern=r"^([0-9a-f]{2})+$", max_length=1_024)
    key: str = Field(pattern=r"^([0-9a-f]{2})+$", max_length=1_024)


def masked(
    values: np.ndarray, secrets: Secrets, site: str, offers: Sequence[Offer], senders: Iterable[str]
) -> np.ndarray:
    """Return a site's numbers with its own mask and those in common with the `senders` of shares on them, uint64 (n,)."""
    total = values.copy()
    _add_stream(total, bytes.fromhex(secrets.seed))
    for offer in offers:
        if offer.site != site and offer.site in senders:
            _add_common(total, secrets.mask, offer, above=offer.site > site)
    return total


# The coordinator's part


def unmasked(
    total: np.ndarray,
    round_: Round,
    offers: Sequence[Offer],
    answered: Sequence[str],
    dropped: Sequence[str],
    seeds: Mapping[str, Sequence[bytes]],
    keys: Mapping[str, Sequence[bytes]],
) -> np.ndarray:
    """Return the sum of the numbers of the sites that `answered`, uint64 (n,).

    Parameters
    ----------
    total : sum of what they sent
    dropped : sites that shared out their secrets, and did not answer
    seeds, keys : shares of the seeds of those that answered, and of the mask keys of those that dropped out

    Raises
    ------
    ProtocolError
        There are too few shares of one, or they don't fit together.
    """
    total = total.copy()
    by_site = {offer.site: offer for offer in offers}
    for site in answered:
        _add_stream(total, _combined(seeds.get(site, ()), round_.threshold, site, _SEED_BYTES), opposite=True)
    for site in dropped:
        key = _combined(keys.get(site, ()), round_.threshold, site, _KEY_BYTES).hex()
        if _public(key) != by_site[site].mask:
            raise ProtocolError(f"the shares of the key of site '{site}' don't fit together")
        for other in answered:  # what it added for this site is taken off: the site would have added the opposite
            _add_common(total, key, by_site[other], above=other > site)
    return total


def fixed_point(values: Tensor, members: int, bits: int = FRACTION_BITS) -> np.ndarray:
    """Return numbers as fixed-point ones modulo 2^64, uint64 (n,), each to within ``2**-(bits + 1)``.

    Parameters
    ----------
    members : of whom the numbers are added up; the sum of so many that are let through doesn't overflow
    bits : behind the point

    Raises
    ------
    ModelError
        A number is not finite, or larger than ``2**(62 - bits) / members``.
    """
    most = float(2**62 // max(1, members))
    scaled = values.detach().double().flatten() * 2.0**bits
    if not bool((scaled.abs() <= most).all()):  # also where it is not a number
        raise ModelError(
            f"a number is not finite, or too large to be added up in secret; with {members} sites and {bits} bits behind the "
            f"point it is at most {most * 2.0**-bits:.3g}"
        )
    return scaled.round().to(torch.int64).numpy().view(np.uint64)


def real_numbers(values: np.ndarray, bits: int = FRACTION_BITS) -> Tensor:
    """Return the numbers that `fixed_point` ones stand for, float64 (n,)."""
    return torch.from_numpy(values.view(np.int64).copy()).double() * 2.0**-bits


def as_tensor(values: np.ndarray) -> Tensor:
    """Return fixed-point numbers as the int64 tensor that travels, (n,)."""
    return torch.from_numpy(values.view(np.int64))


def from_tensor(values: Tensor) -> np.ndarray:
    """Return the fixed-point numbers in a tensor that came, uint64 (n,)."""
    return values.contiguous().numpy().view(np.uint64)


def flat(state: Mapping[str, Tensor]) -> Tensor:
    """Return all numbers of some tensors in the order of their names, float64 (n,)."""
    return torch.cat([state[name].detach().double().flatten() for name in sorted(state)])


def shaped(numbers: Tensor, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `flat` numbers as tensors of the template's names, shapes and dtypes."""
    names = sorted(template)
    parts = numbers.split([template[name].numel() for name in names])
    return {
        name: part.view(template[name].shape).to(template[name].dtype) for name, part in zip(names, parts, strict=True)
    }


# Keys and masks


def _new_key() -> bytes:
    return ec.generate_private_key(_CURVE).private_numbers().private_value.to_bytes(_KEY_BYTES, "big")


def _private(key: str) -> ec.EllipticCurvePrivateKey:
    try:
        return ec.derive_private_key(int(key, 16), _CURVE)
    except ValueError as error:
        raise ProtocolError("a private key that is none") from error


def _public(key: str) -> str:
    return base64.b64encode(
        _private(key).public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    ).decode()


def _agreed(private: str, public: str) -> bytes:
    """Return the key, base64, that two sites have in common."""
    try:
        point = ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, base64.b64decode(public, validate=True))
    except ValueError as error:
        raise ProtocolError("a public key for a secure sum is none") from error
    return generate_shared_key(_private(private), point)


def _add_common(total: np.ndarray, private: str, offer: Offer, *, above: bool) -> None:
    """Add the mask in common with another site, or take it off where that site's id is not the later one."""
    _add_stream(total, base64.urlsafe_b64decode(_agreed(private, offer.mask)), opposite=not above)


def _add_stream(total: np.ndarray, key: bytes, *, opposite: bool = False) -> None:
    """Add numbers that nobody without the key can tell from random ones, or take them off: AES-256 in counter mode.

    Block by block: however many numbers there are, a mask takes no more memory than one block.
    """
    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()  # each key is used for one stream
    nothing = memoryview(bytes(8 * min(len(total), _BLOCK)))
    for start in range(0, len(total), _BLOCK):
        part = total[start : start + _BLOCK]
        mask = np.frombuffer(cipher.update(nothing[: 8 * len(part)]), dtype="<u8")
        if opposite:
            part -= mask
        else:
            part += mask


def _combined(shares: Sequence[bytes], threshold: int, site: str, size: int) -> bytes:
    if len(shares) < threshold:
        raise ProtocolError(f"{len(shares)} shares of site '{site}'; {threshold} are needed to take its mask off")
    try:
        secret = combine_shares(list(shares[:threshold]))
    except (ValueError, IndexError) as error:
        raise ProtocolError(f"the shares of site '{site}' don't fit together") from error
    if len(secret) != size:
        raise ProtocolError(f"the shares of site '{site}' don't fit together")
    return secret


def _signed(round_: Round, offer: Offer) -> bytes:
    return canonical_json(
        {"round": round_.model_dump(mode="json"), "site": offer.site, "channel": offer.channel, "mask": offer.mask}
    )
