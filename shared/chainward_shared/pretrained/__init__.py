"""Pretrained weights as reviewed files: read, described by a card, kept in a store, and loaded into a backbone.

Nothing here uses the network but `download`, and that only when a person asks for it.
"""

from chainward_shared.pretrained.card import WeightsCard
from chainward_shared.pretrained.loading import start_state
from chainward_shared.pretrained.store import WeightsStore, default_store

__all__ = ["WeightsCard", "WeightsStore", "default_store", "start_state"]
