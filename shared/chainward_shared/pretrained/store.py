"""The weights store: a folder of weights files, each with its card, known by digest."""

# What reads or checks tensors needs PyTorch, which takes seconds to import; what reads cards does without.

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from chainward_shared.errors import WeightsError, nearest
from chainward_shared.files import write_atomically, written
from chainward_shared.pretrained.card import UNKNOWN, WeightsCard
from chainward_shared.words import first_problem

if TYPE_CHECKING:
    from torch import Tensor

PLACE = "CHAINWARD_WEIGHTS"
"""Environment variable that names another folder than the usual one."""
SUFFIX = ".safetensors"
_DIGEST_LETTERS = 8


def usual_place() -> Path:
    """Return the folder of this user's store: the one that `PLACE` names, or ``~/.chainward/weights``."""
    return Path(os.environ.get(PLACE) or "~/.chainward/weights").expanduser()


def default_store() -> WeightsStore:
    """Return the store of this user: the folder in `usual_place`."""
    return WeightsStore(usual_place())


class WeightsStore:
    """Weights files with their cards in one folder, which needs not be there yet.

    A file counts from the moment that its card is written; it is read back with its digest.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self,
        file: Path,
        backbone: str,
        *,
        licence: str | None = None,
        source: str | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> WeightsCard:
        """Check a file of weights, take a copy of it (converted to safetensors where it is not) and write its card.

        Parameters
        ----------
        backbone : timm model that the weights are of, perhaps with the tag, ``NAME.TAG``
        licence, source : what the card says; None: what timm knows of these weights
        mean, std : of the images' channels; None: as timm has them for this model

        Raises
        ------
        WeightsError
            The file can't be used or is not of this backbone, or the store can't be written. Nothing is left behind.
        """
        from safetensors.torch import save

        from chainward_shared.pretrained.files import precision_of, read_weights, sha256_of
        from chainward_shared.pretrained.loading import input_size, split_name, timm_config

        plain, tag = split_name(backbone)
        weights = read_weights(file)
        config = timm_config(backbone)
        channels, classes = _fitting(weights, plain)
        converted = file.suffix.lower() != SUFFIX
        contents = save(weights) if converted else file.read_bytes()
        try:
            card = WeightsCard(
                backbone=plain,
                tag=tag,
                sha256=hashlib.sha256(contents).hexdigest(),
                original_sha256=sha256_of(file) if converted else None,
                bytes=len(contents),
                licence=licence or (config.get("license") if tag else None) or UNKNOWN,
                source=source or UNKNOWN,
                mean=mean or _per_channel(config.get("mean") or (0.5,) * 3, channels),
                std=std or _per_channel(config.get("std") or (0.5,) * 3, channels),
                input_size=(channels, *input_size(backbone)[1:]),
                interpolation=config.get("interpolation") or UNKNOWN,
                num_classes=classes,
                parameters=sum(tensor.numel() for tensor in weights.values() if tensor.is_floating_point()),
                precision=precision_of(weights),
            )
        except ValidationError as error:
            raise WeightsError(f"the weights card: {first_problem(error)}") from error
        with written(self.root, WeightsError):
            self.root.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path(card.sha256), contents)
            write_atomically(self._card_path(card.sha256), card.model_dump_json(by_alias=True, indent=1).encode())
        return card

    def cards(self) -> list[WeightsCard]:
        """Return the cards of all files, by name.

        Raises
        ------
        WeightsError
            A card is damaged.
        """
        return sorted(map(self._read, self.root.glob("*.json")), key=lambda card: (card.name, card.sha256))

    def find(self, reference: str) -> WeightsCard:
        """Return the card of one file, by name (``NAME`` or ``NAME.TAG``) or by digest, of which 8 letters suffice.

        Raises
        ------
        WeightsError
            There is none, or there are several.
        """
        cards = self.cards()
        named = [card for card in cards if reference in (card.name, card.backbone)]
        digits = reference.lower().removeprefix("sha256:")
        if not named and len(digits) >= _DIGEST_LETTERS:
            named = [
                card
                for card in cards
                if digits in (card.sha256[: len(digits)], (card.original_sha256 or "")[: len(digits)])
            ]
        exact = [card for card in named if card.name == reference]
        if len(found := exact or named) == 1:
            return found[0]
        if found:
            several = ", ".join(f"{card.name} {card.sha256[:12]}" for card in found)
            raise WeightsError(f"'{reference}' may be {several}: give the digest")
        known = [card.name for card in cards]
        have = f"it has {', '.join(known)}" if known else "it is empty; `chainward weights add FILE --backbone NAME`"
        raise WeightsError(f"the weights store {self.root} has no '{reference}'{nearest(reference, known)}: {have}")

    def with_digest(self, sha256: str) -> WeightsCard | None:
        """Return the card of the file with this SHA-256; None if there is none."""
        return self._read(self._card_path(sha256)) if self._card_path(sha256).is_file() else None

    def load(self, card: WeightsCard) -> dict[str, Tensor]:
        """Return the tensors of a file.

        Raises
        ------
        WeightsError
            The file is missing, or no longer the one that its card describes.
        """
        from chainward_shared.pretrained.files import read_weights, sha256_of

        path = self.path(card.sha256)
        if sha256_of(path) != card.sha256:
            raise WeightsError(
                f"{path}: its SHA-256 is not that of its card; the file is damaged. Remove it and add it anew"
            )
        return read_weights(path)

    def remove(self, reference: str) -> WeightsCard:
        """Remove one file and its card; the card first, without which a file doesn't count."""
        card = self.find(reference)
        self._card_path(card.sha256).unlink(missing_ok=True)
        self.path(card.sha256).unlink(missing_ok=True)
        return card

    def path(self, sha256: str) -> Path:
        """Return the path of the file with this SHA-256."""
        return self.root / f"{sha256}{SUFFIX}"

    def _card_path(self, sha256: str) -> Path:
        return self.root / f"{sha256}.json"

    def _read(self, path: Path) -> WeightsCard:
        try:
            card = WeightsCard.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise WeightsError(
                f"{path}: not a weights card ({first_problem(error)}); remove it and add the file anew"
            ) from error
        if card.sha256 != path.stem:
            raise WeightsError(f"{path}: the card is that of another file, {card.sha256[:12]}; remove it")
        return card


def _fitting(weights: dict[str, Tensor], backbone: str) -> tuple[int, int]:
    """Return the channels of the weights, and the number of classes with which the backbone takes all of them."""
    from chainward_shared.pretrained.loading import load_plain, own_channels, own_classes

    refusals, channels = [], own_channels(weights, backbone)
    for count in own_classes(weights, backbone):
        try:
            load_plain(weights, backbone, count, channels)
            return channels, count
        except WeightsError as error:
            refusals.append(error)
    raise refusals[0]


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
