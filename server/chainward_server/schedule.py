"""Which link is trained where and when: order of the sites, laps and strands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chainward_shared.config import ChainConfig
from chainward_shared.hops import link_key
from chainward_shared.seeds import numpy_generator

LINK_WORK, ALONE_WORK, STUDENT_WORK = 1.35, 1.0, 0.5
"""Cost of one image in one epoch with a predecessor, without, and of a student, relative; only for the expected end."""


@dataclass(frozen=True)
class Hop:
    """One place of the chain; all counts are 0-based, `step` within the lap."""

    strand: int
    lap: int
    step: int
    site: str

    @property
    def key(self) -> str:
        """Name of the hop in files and messages."""
        return link_key(self.strand, self.lap, self.step)


def site_order(sites: Sequence[str], sizes: dict[str, int], chain: ChainConfig, seed: int) -> list[str]:
    """Return the sites in the order of a lap.

    Parameters
    ----------
    sizes : training cases of each site
    """
    if chain.order == "reversed":
        return list(reversed(sites))
    if chain.order == "shuffled":
        return [sites[i] for i in numpy_generator(seed, "chain", "order").permutation(len(sites))]
    if chain.order == "largest-first":
        return sorted(sites, key=lambda site: -sizes[site])
    if chain.order == "smallest-first":
        return sorted(sites, key=lambda site: sizes[site])
    return list(sites)


def schedule(order: Sequence[str], laps: int, strands: int) -> list[list[Hop]]:
    """Return the turns of the chain; the hops of a turn run at the same time.

    Strand s visits site (s + t) mod N at turn t: a Latin square, so no site ever holds two strands at once.
    """
    n = len(order)
    return [
        [Hop(strand, turn // n, turn % n, order[(strand + turn) % n]) for strand in range(strands)]
        for turn in range(laps * n)
    ]
