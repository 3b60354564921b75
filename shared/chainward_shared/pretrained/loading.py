"""Weights of a file into a backbone, in timm's own way: with the model's filter, resampled positions and patches, a stem for
other channels, and without the classifier where the classes are others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from chainward_shared.errors import ModelError, WeightsError, nearest
from chainward_shared.models import Architecture, skeleton
from chainward_shared.models.parts import classifier_names
from chainward_shared.pretrained.card import WeightsCard
from chainward_shared.words import first_line, listed

_SHOWN = 3


def split_name(name: str) -> tuple[str, str]:
    """Return the plain name of a timm model and the tag, perhaps empty, of ``NAME.TAG``.

    Raises
    ------
    WeightsError
        timm has no such model, or no such weights of it.
    """
    import timm

    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        raise WeightsError(f"timm {timm.__version__} has no model '{plain}'{nearest(plain, timm.list_models())}")
    known = [other.partition(".")[2] for other in timm.list_pretrained(f"{plain}.*")]
    if tag and tag not in known:
        raise WeightsError(
            f"timm {timm.__version__} has no weights '{tag}' of '{plain}'; it has {', '.join(known) or 'none'}"
        )
    return plain, tag


def timm_config(name: str) -> dict[str, Any]:
    """Return what timm knows of the weights ``NAME.TAG``; without a tag, of the model's usual ones."""
    import timm

    config: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    return {} if config is None else dict(config.to_dict())


def own_classes(weights: Mapping[str, Tensor], backbone: str) -> list[int]:
    """Return how many classes the file's classifier may have, the likeliest first; 0: it has none."""
    weight = _weight_of(weights, backbone, "classifier")
    if weight is not None and weight.ndim:
        return [int(weight.shape[0])]
    return list(
        dict.fromkeys([0, int(timm_config(backbone).get("num_classes") or 0)])
    )  # the model's filter may rename it


def own_channels(weights: Mapping[str, Tensor], backbone: str) -> int:
    """Return the channels of the images that the file's first convolution reads."""
    weight = _weight_of(weights, backbone, "first_conv")
    return int(weight.shape[1]) if weight is not None and weight.ndim == 4 else input_size(backbone)[0]


def _weight_of(weights: Mapping[str, Tensor], backbone: str, layer: str) -> Tensor | None:
    """Return the weight in the file of the first layer to which timm's configuration gives this name."""
    names = timm_config(backbone).get(layer) or ()
    return weights.get(f"{next(iter((names,) if isinstance(names, str) else names), '')}.weight")


def input_size(backbone: str) -> tuple[int, int, int]:
    """Return channels, height and width of the images that timm's weights of this model were trained on."""
    channels, height, width = timm_config(backbone).get("input_size") or (3, 224, 224)
    return int(channels), int(height), int(width)


def load_plain(weights: Mapping[str, Tensor], backbone: str, classes: int, channels: int) -> nn.Module:
    """Return the backbone as timm names it with all weights of the file, none missing and none left over.

    Raises
    ------
    WeightsError
        The file is not of this backbone; names the first tensors that show it.
    """
    return _created(weights, backbone, classes, channels, {"num_classes": classes, "in_chans": channels})


def start_state(weights: Mapping[str, Tensor], card: WeightsCard, architecture: Architecture) -> dict[str, Tensor]:
    """Return the tensors with which models of `architecture` start: float32, by name, the same for every seed.

    A classifier for another number of classes is left out: it starts at random.

    Raises
    ------
    WeightsError
        The weights are not of this backbone.
    ModelError
        The backbone is built otherwise than that of the file.
    """
    if architecture.name != card.backbone:
        raise WeightsError(
            f"the weights {card.name} are of the backbone '{card.backbone}', the model is '{architecture.name}': "
            f"set chain.backbone = '{card.backbone}'"
        )
    classifier = classifier_names(skeleton(architecture))
    plain = Architecture(
        name=card.backbone, num_classes=architecture.num_classes, in_chans=3, image_size=architecture.image_size
    )
    if differing := sorted(set(skeleton(plain).state_dict()) ^ set(skeleton(architecture).state_dict())):
        raise ModelError(
            f"'{architecture.name}' is built otherwise than the pretrained one: only one of them has '{differing[0]}'"
        )
    model = _created(weights, card.backbone, card.num_classes, card.input_size[0], architecture.timm_kwargs())
    kept = card.num_classes == architecture.num_classes
    return {
        name: tensor.detach().clone() for name, tensor in model.state_dict().items() if kept or name not in classifier
    }


def _created(
    weights: Mapping[str, Tensor], backbone: str, classes: int, channels: int, kwargs: Mapping[str, Any]
) -> nn.Module:
    import timm

    overlay = {
        # a state dict goes before all places that timm could load from
        "state_dict": {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()
        },
        "num_classes": classes,
        "input_size": (channels, *input_size(backbone)[1:]),
        "label_offset": 0,
        "custom_load": False,
    }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model: nn.Module = timm.create_model(backbone, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except Exception as error:  # the filters of timm's models answer a foreign file with whatever they stumble over
        raise WeightsError(f"the file is not of '{backbone}': {_explained(error, weights, backbone)}") from error
    return model.eval()


def _explained(error: Exception, weights: Mapping[str, Tensor], backbone: str) -> str:
    """Return in one line what in a file does not fit a backbone."""
    text = str(error)
    parts = []
    for what, pattern in (
        ("missing", r"Missing key\(s\)[^:]*: (.*)"),
        ("unexpected", r"Unexpected key\(s\)[^:]*: (.*)"),
    ):
        if found := re.search(pattern, text):
            parts.append(_listed(what, re.findall(r'"([^"]+)"', found[1])))
    shapes = re.findall(
        r"size mismatch for (\S+): .*?shape (torch\.Size\(\[.*?\]\)).*?shape in current model is (torch\.Size\(\[.*?\]\))",
        text,
    )
    if shapes:
        words = [f"{name} has {_shape(found)}, the model {_shape(wanted)}" for name, found, wanted in shapes]
        parts.append(_listed("of another shape", words))
    if parts:
        return "; ".join(parts)
    plain = skeleton(Architecture(name=backbone, num_classes=2, in_chans=3, image_size=224))
    known = {*weights, *classifier_names(plain)}
    if theirs := [name for name in plain.state_dict() if name not in known]:
        return _listed("missing", theirs)
    return first_line(error)[:200]


def _listed(what: str, names: list[str]) -> str:
    return f"{len(names)} {what}, first {listed(names[:_SHOWN])}"


def _shape(text: str) -> str:
    return text.removeprefix("torch.Size(").removesuffix(")")
