"""Which tensors of a model are trained, where training is of a part: by timm's own grouping of a model's parameters in layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

from torch import nn

from chainward_shared.errors import ModelError
from chainward_shared.models.architecture import Architecture, skeleton

ALL, HEAD, NORMS = "all", "head", "norms-and-biases"
PART_PATTERN: Final = r"all|head|norms-and-biases|last-[1-9]\d{0,2}"


def classifier_names(architecture: Architecture) -> frozenset[str]:
    """Return the names of the parameters of the last layer, or layers: those that a number of classes decides.

    Raises
    ------
    ModelError
        timm doesn't say which layer of this backbone that is.
    """
    model: Any = skeleton(architecture)
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    layers = (named,) if isinstance(named, str) else tuple(named)
    found = frozenset(
        name for name, _ in model.named_parameters() if any(name.startswith(f"{layer}.") for layer in layers)
    )
    if not found:
        raise ModelError(f"timm does not say what the classifier of '{architecture.name}' is: train all of it")
    return found


def trained_names(architecture: Architecture) -> frozenset[str]:
    """Return the names of the parameters that are trained; `architecture.start` says which part that is.

    "all"; "head": the classifier; "norms-and-biases": every vector (norms, biases, layer scales) and the classifier (BitFit,
    Ben Zaken et al. 2022, arXiv 2106.10199, with norms); "last-N": the last N blocks of a transformer or stages of a
    convolutional network, and what follows them.

    Raises
    ------
    ModelError
        The backbone has fewer blocks, or timm doesn't say what its parts are.
    """
    part = ALL if architecture.start is None else architecture.start.part
    return _trained(architecture.model_dump_json(), part)


@lru_cache(maxsize=64)
def _trained(architecture_json: str, part: str) -> frozenset[str]:
    architecture = Architecture.model_validate_json(architecture_json)
    model = skeleton(architecture)
    if part == ALL:
        return frozenset(name for name, _ in model.named_parameters())
    head = classifier_names(architecture)
    if part == HEAD:
        return head
    if part == NORMS:
        return head | {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
    count = int(part.removeprefix("last-"))
    layers = layer_groups(architecture)
    after = [layers.pop()] if head & set(layers[-1]) else []
    blocks = layers[1:]
    if count > len(blocks):
        raise ModelError(
            f"chain.trainable = 'last-{count}': '{architecture.name}' has {len(blocks)} blocks or stages; give at most that "
            "many, or 'all'"
        )
    return head.union(*blocks[-count:], *after)


def layer_groups(architecture: Architecture) -> list[tuple[str, ...]]:
    """Return the names of the parameters by layer, from the stem to the classifier, as timm groups them.

    A layer is a block of a transformer or a stage of a convolutional network; the first is the stem.

    Raises
    ------
    ModelError
        timm has no grouping for this backbone.
    """
    from timm.models import group_parameters

    model: Any = skeleton(architecture)
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ModelError(
            f"timm does not group the layers of '{architecture.name}': train all, head or norms-and-biases"
        )
    groups: dict[int, list[str]] = group_parameters(model, matcher(coarse=True))
    return [tuple(groups[number]) for number in sorted(groups)]


def freeze(model: nn.Module, architecture: Architecture) -> None:
    """Let only the tensors train that `trained_names` names."""
    if architecture.start is None:
        return
    trained = trained_names(architecture)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def train_mode(model: nn.Module, architecture: Architecture) -> None:
    """Put a model into training mode; batch norm with the statistics of pretrained weights stays in evaluation mode.

    Such a layer then treats each image for itself, in training as in use, and no statistic of a site's images gets into it.
    """
    model.train()
    if architecture.start is not None:
        for layer in batch_norms(model):
            layer.eval()


def batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that normalise over the images of a batch."""
    return (layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm))


def mixes_images(model: nn.Module, architecture: Architecture) -> bool:
    """Tell whether what the model makes of one image in training depends on the others of the batch."""
    return architecture.start is None and any(True for _ in batch_norms(model))


def travelling_names(architecture: Architecture) -> frozenset[str]:
    """Return the names of the tensors that training may change, which are those that travel; the others both ends know.

    Without a start all of them. From a start on, buffers stay: statistics of batch norm are frozen.
    """
    if architecture.start is None:
        return frozenset(skeleton(architecture).state_dict())
    return trained_names(architecture)


def is_part(text: str) -> bool:
    """Tell whether `text` names a part: all, head, norms-and-biases or last-N."""
    return re.fullmatch(PART_PATTERN, text) is not None
