"""The classifier of a model, to be put in from outside."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from chainward_shared.discriminant import Head
from chainward_shared.errors import ModelError
from chainward_shared.models.architecture import Architecture, skeleton
from chainward_shared.models.parts import classifier_names
from chainward_shared.models.taps import embedding_size


def check_head(architecture: Architecture) -> int:
    """Return the width d of the embedding on which the classifier of a backbone works.

    Raises
    ------
    ModelError
        The classifier isn't one linear layer with a bias.
    """
    model = skeleton(architecture)
    size = embedding_size(model)
    _names(model, architecture)
    return size


def with_head(state: Mapping[str, Tensor], architecture: Architecture, head: Head) -> dict[str, Tensor]:
    """Return a state dict with another classifier, in the dtypes and shapes of the one that it replaces.

    Raises
    ------
    ModelError
        The classifier isn't one linear layer with a bias.
    """
    weight, bias = _names(skeleton(architecture), architecture)
    put_in = {weight: torch.from_numpy(head.weight), bias: torch.from_numpy(head.bias)}
    return {
        name: put_in[name].to(tensor.dtype).reshape(tensor.shape) if name in put_in else tensor
        for name, tensor in state.items()
    }


def _names(model: nn.Module, architecture: Architecture) -> tuple[str, str]:
    names = sorted(classifier_names(model))
    if len(names) != 2 or not names[0].endswith(".bias") or not names[1].endswith(".weight"):
        raise ModelError(
            f"the classifier of '{architecture.name}' is {', '.join(names)}; statistics need one layer with a weight "
            "and a bias: set chain.head and student.head to 'trained', or choose another backbone"
        )
    return names[1], names[0]
