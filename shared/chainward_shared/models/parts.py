"""Which tensors of a model are trained, where training is of a part: by timm's own grouping of a model's parameters in layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from chainward_shared.errors import ModelError

ALL, HEAD, NORMS = "all", "head", "norms-and-biases"


def classifier_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters of the last layer, or layers: those that a number of classes decides.

    Raises
    ------
    ModelError
        timm doesn't say which layer of this backbone that is.
    """
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    layers = tuple(f"{layer}." for layer in ((named,) if isinstance(named, str) else named))
    found = frozenset(name for name, _ in model.named_parameters() if name.startswith(layers))
    if not found:
        raise ModelError(
            f"timm does not say which layer of {type(model).__name__} is the classifier: choose another backbone"
        )
    return found


def trained_names(model: nn.Module, part: str) -> frozenset[str]:
    """Return the names of the parameters that are trained where `part` of a timm model is.

    "all"; "head": the classifier; "norms-and-biases": every vector (norms, biases, layer scales) and the classifier (BitFit,
    Ben Zaken et al. 2022, arXiv 2106.10199, with norms); "last-N": the last N blocks of a transformer or stages of a
    convolutional network, and what follows them.

    Raises
    ------
    ModelError
        The backbone has fewer blocks, or timm doesn't say what its parts are.
    """
    if part == ALL:
        return frozenset(name for name, _ in model.named_parameters())
    head = classifier_names(model)
    if part == HEAD:
        return head
    if part == NORMS:
        return head | {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
    count = int(part.removeprefix("last-"))
    layers = layer_groups(model)
    after = [layers.pop()] if head & set(layers[-1]) else []
    blocks = layers[1:]
    if count > len(blocks):
        raise ModelError(
            f"the last {count} blocks of {type(model).__name__} are to be trained, it has {len(blocks)} blocks or stages: "
            "choose fewer, or all"
        )
    return head.union(*blocks[-count:], *after)


def layer_groups(model: Any) -> list[tuple[str, ...]]:
    """Return the names of the parameters by layer, from the stem to the classifier, as timm groups them.

    A layer is a block of a transformer or a stage of a convolutional network; the first is the stem.

    Raises
    ------
    ModelError
        timm has no grouping for this backbone.
    """
    from timm.models import group_parameters  # seconds of CPU: see `architecture`

    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ModelError(
            f"timm does not group the layers of {type(model).__name__}: train all, head or norms-and-biases"
        )
    groups: dict[int, list[str]] = group_parameters(model, matcher(coarse=True))
    return [tuple(groups[number]) for number in sorted(groups)]


def batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that normalise over the images of a batch."""
    return (layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm))
