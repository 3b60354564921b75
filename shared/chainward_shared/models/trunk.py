"""A model with a frozen trunk in two: what never changes, whose output can be kept, and the rest, which is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chainward_shared.models.architecture import architecture_of
from chainward_shared.models.parts import HEAD

Step = Callable[[Tensor], Tensor]

_TOLERANCE = 1e-5


class Rest(nn.Module):
    """What of a model comes after its trunk, on the trunk's output; parameters and hooks are the model's own."""

    def __init__(self, model: nn.Module, steps: Sequence[Step]) -> None:
        super().__init__()
        self.model, self._steps = model, list(steps)

    def forward(self, features: Tensor) -> Tensor:
        return _through(self._steps, features)


class Trunk:
    """The frozen first part of a model, from images to features, and the `rest`. Make it with `trunk_of`."""

    def __init__(self, steps: Sequence[Step], rest: Rest) -> None:
        self._steps, self.rest = list(steps), rest

    def __call__(self, images: Tensor) -> Tensor:
        return _through(self._steps, images)


def trunk_of(model: nn.Module) -> Trunk | None:
    """Return the trunk of a model of which the head or the last blocks are trained; None where none is frozen as a whole, or
    such a model can't be divided.

    That both parts do what the model does is tried out on two images.
    """
    architecture = architecture_of(model)
    if architecture is None or architecture.start is None:
        return None
    part = architecture.start.part
    if part != HEAD and not part.startswith("last-"):
        return None
    steps = _of_head(model) if part == HEAD else _of_blocks(model, int(part.removeprefix("last-")))
    if steps is None:
        return None
    trunk = Trunk(steps[0], Rest(model, steps[1]))
    size = architecture.image_size
    images = torch.randn(2, architecture.in_chans, size, size, generator=torch.Generator().manual_seed(0))
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            expected, found = model(images.to(device)), trunk.rest(trunk(images.to(device)))
    finally:
        model.train(training)
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
    return trunk if same else None


def _of_head(model: Any) -> tuple[list[Step], list[Step]] | None:
    """Divide before the classifier."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(classifier, nn.Module) or not hasattr(model, "forward_head"):
        return None
    return [model.forward_features, partial(model.forward_head, pre_logits=True)], [classifier]


def _of_blocks(model: Any, last: int) -> tuple[list[Step], list[Step]] | None:
    """Divide before the last blocks of a vision transformer, or the last stages of a ConvNeXt or an EfficientNet."""
    from timm.models.convnext import ConvNeXt
    from timm.models.efficientnet import EfficientNet
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(model, VisionTransformer):
        before: list[Step] = [model.patch_embed, model._pos_embed, model.patch_drop, model.norm_pre]
        blocks, after = list(model.blocks), [model.norm]
    elif isinstance(model, ConvNeXt):
        before, blocks, after = [model.stem], list(model.stages), [model.norm_pre]
    elif isinstance(model, EfficientNet):
        before, blocks, after = [model.conv_stem, model.bn1], list(model.blocks), [model.conv_head, model.bn2]
    else:
        return None
    return [*before, *blocks[:-last]], [*blocks[-last:], *after, model.forward_head]


def _through(steps: Sequence[Step], values: Tensor) -> Tensor:
    for step in steps:
        values = step(values)
    return values
