"""Models that start from pretrained weights: what of them both ends know already, and what has to travel."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from chainward_shared.errors import WeightsError
from chainward_shared.models.architecture import Architecture, architecture_of, build_model, skeleton
from chainward_shared.models.parts import batch_norms, trained_names


def initial_model(architecture: Architecture, seed: int, base: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return the model that a chain begins with: fresh weights by `seed`, and over them what the start gives, `base`.

    Raises
    ------
    ModelError
        timm can't build it.
    WeightsError
        There is a base without a start, or a start without its base.
    """
    if (base is None) != (architecture.start is None):
        raise WeightsError(
            f"'{architecture.name}' {'lacks' if base is None else 'has no use for'} the weights it starts from"
        )
    model = build_model(architecture, seed)
    if base is not None:
        model.load_state_dict({**model.state_dict(), **base})
    return model


def travelling_names(architecture: Architecture) -> frozenset[str]:
    """Return the names of the tensors that training may change: those that travel. The others both ends know by the digest of
    the start.

    Without a start these are all. From a start on no buffer changes: the statistics of batch norm are frozen.
    """
    if architecture.start is None:
        return frozenset(skeleton(architecture).state_dict())
    return trained_names(skeleton(architecture), architecture.start.part)


def travelling_template(architecture: Architecture) -> dict[str, Tensor]:
    """Return names, shapes and dtypes of the tensors that travel, without values."""
    names = travelling_names(architecture)
    return {name: tensor for name, tensor in skeleton(architecture).state_dict().items() if name in names}


def travelling(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Return a state dict without what both ends know; what is none of the model's stays, for whoever checks it to find."""
    known = frozenset(skeleton(architecture).state_dict()) - travelling_names(architecture)
    return {name: tensor for name, tensor in state.items() if name not in known}


def whole(
    part: Mapping[str, Tensor], architecture: Architecture, base: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return the whole state dict, in the model's order, of a part that travelled and the base that it goes on.

    Raises
    ------
    WeightsError
        A tensor is in neither.
    """
    known = {**(base or {}), **part}
    names = list(skeleton(architecture).state_dict())
    if missing := [name for name in names if name not in known]:
        raise WeightsError(
            f"the weights of '{architecture.name}' lack '{missing[0]}' ({len(missing)} missing in all): the base they go on is "
            "another one"
        )
    return {name: known[name] for name in names}


def train_mode(model: nn.Module) -> None:
    """Put a model into training mode; batch norm with the statistics of pretrained weights stays in evaluation mode.

    Such a layer treats each image for itself, in training as in use, and no statistic of a site's images gets into it.
    """
    model.train()
    if has_start(model):
        for layer in batch_norms(model):
            layer.eval()


def mixes_images(model: nn.Module) -> bool:
    """Tell whether what the model makes of one image in training depends on the others of the batch."""
    return not has_start(model) and any(True for _ in batch_norms(model))


def has_start(model: nn.Module) -> bool:
    """Tell whether a model that `build_model` built starts from pretrained weights."""
    architecture = architecture_of(model)
    return architecture is not None and architecture.start is not None
