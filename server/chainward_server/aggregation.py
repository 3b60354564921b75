"""The average of the sites' students, in which no single hospital can take over.

Three things bound what one site can do to an average: its share of the weight (`capped`), how far its update may go beyond
those of the others (`shortened`), and, where the configuration says so, a mean that leaves the extremes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from chainward_server.results import Influence
from chainward_shared.errors import ChainwardError
from chainward_shared.weights import StateDict, weighted_average

TRIMMED = 0.2
"""Fraction of the sites that a trimmed mean leaves out at each end, at least one of three or more."""

EXACT = 2**53
"""Whole numbers up to this are floats as they are."""


def capped(sizes: Sequence[int], most: float) -> list[float]:
    """Return the weights of sites in an average: their sizes, of which none is more than `most` of all.

    What a site has above that is spread over the others, in proportion to their sizes. Sizes that keep to it are returned
    as they are. Of so few sites that each would have to have more, all weigh the same.

    Parameters
    ----------
    sizes : what each site declares; less than 1 counts as 1
    most : largest share of the whole, above 0
    """
    known = [max(1, size) for size in sizes]
    most = max(most, 1 / len(known))
    if max(known) / sum(known) <= most:
        return [size / sum(known) for size in known] if sum(known) > EXACT else [float(size) for size in known]
    at_most: set[int] = set()
    while True:
        rest = sum(size for index, size in enumerate(known) if index not in at_most)
        free = 1 - most * len(at_most)
        shares = [most if index in at_most else free * (size / rest) for index, size in enumerate(known)]
        above = {index for index, share in enumerate(shares) if share > most * (1 + 1e-9)}
        if not above:
            return shares
        at_most |= above


def length(state: Mapping[str, Tensor]) -> float:
    """Return the Euclidean length of a model's weights, over all floating-point tensors."""
    return math.sqrt(
        sum(float(tensor.double().square().sum()) for tensor in state.values() if tensor.is_floating_point())
    )


def distance(state: StateDict, start: StateDict) -> float:
    """Return how far a model is from the one that it started from: the length of the difference."""
    return length(
        {name: tensor.double() - start[name].double() for name, tensor in state.items() if tensor.is_floating_point()}
    )


def check_drift(state: StateDict, start: StateDict, allowed: float, key: str) -> None:
    """Refuse weights that are implausibly far from those that a training started with.

    Parameters
    ----------
    allowed : in lengths of `start`
    key : of the configuration, which sets it

    Raises
    ------
    ChainwardError
        They are further.
    """
    moved, before = distance(state, start), length(start)
    if moved > allowed * before:
        raise ChainwardError(
            f"its weights are {moved / before:.3g} times their former length away from where it started; "
            f"{key} allows {allowed:g}"
        )


def shortened(state: StateDict, start: StateDict, factor: float) -> StateDict:
    """Return ``start + factor (state - start)``, in the tensors' own dtypes."""
    return {
        name: (start[name].double() + factor * (tensor.double() - start[name].double())).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }


def shortening(lengths: Sequence[float], most: float) -> list[float]:
    """Return the factor by which each update must be shortened to be at most `most` times as long as the median of all.

    Of an even number the lower of the two middle ones counts, so that of two sites the longer update does not set the
    measure (norm bounding: Sun et al. 2019, arXiv:1911.07963). Where that median is 0, nothing is shortened.
    """
    median = sorted(lengths)[(len(lengths) - 1) // 2]
    return [1.0 if median == 0 or long <= most * median else most * median / long for long in lengths]


def median(states: Sequence[StateDict], weights: Sequence[float]) -> StateDict:
    """Return the median of each weight over the sites, all of which count alike (Yin et al. 2018, arXiv:1803.01498)."""
    return _each(states, lambda values: values.quantile(0.5, dim=0))


def trimmed_mean(states: Sequence[StateDict], weights: Sequence[float]) -> StateDict:
    """Return the mean of each weight without the highest and lowest `TRIMMED` of the sites, which count alike (as `median`).

    One at each end is left out at least; of one or two sites it is their mean.
    """
    out = max(1, int(TRIMMED * len(states))) if len(states) > 2 else 0
    return _each(states, lambda values: values.sort(dim=0).values[out : len(states) - out].mean(dim=0))


MEANS: Mapping[str, Callable[[Sequence[StateDict], Sequence[float]], StateDict]] = {
    "mean": weighted_average,
    "median": median,
    "trimmed-mean": trimmed_mean,
}
"""By the names of ``student.aggregation``."""


def aggregate(
    models: Mapping[str, StateDict],
    start: StateDict,
    sizes: Mapping[str, int],
    *,
    mean: str,
    max_share: float,
    max_update: float,
) -> tuple[StateDict, dict[str, Influence]]:
    """Return the bounded mean of the sites' models, and what part each of them had in it.

    The models come in the order of the sites: sums of floats depend on the order, and a run must be repeatable.

    Parameters
    ----------
    models : of each site, one at least
    start : the model that all of them started from
    sizes : what each site has declared when it joined
    mean : a name of `MEANS`
    max_share, max_update : see `capped` and `shortening`
    """
    moved = [distance(state, start) for state in models.values()]
    factors = shortening(moved, max_update)
    states = [
        state if factor == 1 else shortened(state, start, factor)
        for state, factor in zip(models.values(), factors, strict=True)
    ]
    weights = capped([sizes[site] for site in models], max_share)
    before, total = length(start) or 1.0, sum(weights)
    shares = [weight / total if mean == "mean" else 1 / len(weights) for weight in weights]
    parts = {
        site: Influence(share=share, moved=far / before, factor=factor)
        for site, share, far, factor in zip(models, shares, moved, factors, strict=True)
    }
    return MEANS[mean](states, weights), parts


def _each(states: Sequence[StateDict], mean: Callable[[Tensor], Tensor]) -> StateDict:
    return {
        name: mean(torch.stack([state[name].double() for state in states])).to(first.dtype)
        if first.is_floating_point()
        else first.clone()
        for name, first in states[0].items()
    }
