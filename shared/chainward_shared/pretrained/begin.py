"""What a run begins with: the architecture of the chain's model, and the pretrained weights under it, if it has any."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from chainward_shared.config import RunConfig
from chainward_shared.errors import WeightsError
from chainward_shared.models import Architecture, Start, build_model, skeleton
from chainward_shared.models.of_run import chain_architecture
from chainward_shared.models.parts import classifier_names
from chainward_shared.models.start import travelling_names
from chainward_shared.pretrained.base import started
from chainward_shared.pretrained.card import WeightsCard
from chainward_shared.pretrained.files import sha256_of
from chainward_shared.pretrained.store import WeightsStore, default_store
from chainward_shared.weights import StateDict, digest, rounded

logger = logging.getLogger("chainward")


@dataclass(frozen=True)
class Beginning:
    """What the chain begins with. `base`, `card`: of its pretrained weights; None where it begins at random."""

    architecture: Architecture
    base: StateDict | None = None
    card: WeightsCard | None = None


def begin(config: RunConfig, *, classes: int, channels: int, image_size: int) -> Beginning:
    """Return what a run begins with, for square images of `image_size` pixels; weights are those in this user's store.

    Raises
    ------
    WeightsError
        The weights are not there, or not of this backbone.
    ModelError
        The backbone is unknown, doesn't suit such images, or has no such part to train.
    """
    chain = config.chain
    plain = chain_architecture(chain, classes=classes, channels=channels, image_size=image_size)
    if not chain.start_from:
        return Beginning(plain)
    store = default_store()
    card = _card(chain.start_from, chain.backbone, store)
    architecture, base = started(store.load(card), card, plain, chain.trainable, config.federation.transfer)
    return Beginning(architecture, base, card)


def as_if_begun(config: RunConfig, *, classes: int, channels: int, image_size: int) -> Beginning:
    """Return a beginning of the same shapes and parts, with random weights in place of the pretrained ones, where nothing but
    names, sizes and arithmetic count.

    Raises
    ------
    ModelError
        As `begin`.
    """
    chain = config.chain
    plain = chain_architecture(chain, classes=classes, channels=channels, image_size=image_size)
    if not chain.start_from:
        return Beginning(plain)
    classifier = classifier_names(skeleton(plain))
    fresh = build_model(plain, seed=0).state_dict()
    base = rounded({name: t for name, t in fresh.items() if name not in classifier}, config.federation.transfer)
    start = Start(name=f"{chain.backbone}, random", file="0" * 64, digest=digest(base), part=chain.trainable)
    architecture = plain.model_copy(update={"start": start})
    travelling_names(architecture)  # the backbone has such a part
    return Beginning(architecture, base)


def _card(start_from: str, backbone: str, store: WeightsStore) -> WeightsCard:
    """Return the card of the weights that ``chain.start-from`` names; a file is taken into the store first."""
    path = Path(start_from).expanduser()
    if path.is_absolute():
        sha256 = sha256_of(path)
        if (known := store.with_digest(sha256)) is not None and known.backbone == backbone:
            return known
        card = store.add(path, backbone)
        logger.info("%s is in the weights store now, as %s %s", path.name, card.name, card.sha256[:12])
        return card
    try:
        return store.find(start_from)
    except WeightsError as error:
        raise WeightsError(f"chain.start-from = {start_from!r}: {error}") from error
