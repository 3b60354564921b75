"""Attention transfer: a link attends to what its predecessor found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from chainward_shared.errors import ModelError


def attention_transfer(link: Sequence[Tensor], predecessor: Sequence[Tensor]) -> Tensor:
    """Return the sum over the stages of ``|| q/||q|| - p/||p|| ||^2`` of each example, (n,), float32.

    Zagoruyko & Komodakis 2017, eq. 2, with the squared norm as in their code; q and p are the spatial attention maps of
    `chainward_shared.models.taps.Taps`. Each value is a function of its own example only, between 0 and 4 per stage (2 for
    maps that are nowhere negative). A map of zeros has no direction: it stays zeros, and gets no gradient.

    Parameters
    ----------
    link : maps of the link that trains, (n, positions) each, one of each stage
    predecessor : the same of the frozen predecessor. No gradient flows into them

    Raises
    ------
    ModelError
        The two don't have the same stages and positions, or there are none.
    """
    found, expected = [tuple(map_.shape) for map_ in link], [tuple(map_.shape) for map_ in predecessor]
    if found != expected or not found:
        raise ModelError(
            f"attention maps of the link {found} don't match those of its predecessor {expected}: "
            "attention transfer needs the same stages and positions in both; set chain.attention-weight to 0"
        )
    stages = [
        (_normalised(q) - _normalised(p.detach())).square().sum(dim=1) for q, p in zip(link, predecessor, strict=True)
    ]
    return torch.stack(stages).sum(dim=0)


def _normalised(maps: Tensor) -> Tensor:
    """Return each row over its norm. The largest value goes first: squares of small activations vanish in float32."""
    maps = maps.float()
    peak = maps.detach().abs().amax(dim=1, keepdim=True)
    scaled = torch.where(peak > 0, maps / torch.where(peak > 0, peak, 1.0), 0.0)
    return functional.normalize(scaled, dim=1)
