"""A model with a frozen trunk in two: what never changes, whose output can be kept, and the rest, which is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from chainward_shared.models.architecture import architecture_of
from chainward_shared.models.parts import HEAD
from chainward_shared.models.taps import reads_class_token

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
    after: list[Step] = [classifier]
    if isinstance(classifier, nn.Conv2d):  # of a ResNetV2: a map of one place
        after = [_as_map, classifier, partial(torch.flatten, start_dim=1)]
    return [model.forward_features, partial(model.forward_head, pre_logits=True)], after


def _as_map(features: Tensor) -> Tensor:
    return features[:, :, None, None]


def _of_blocks(model: Any, last: int) -> tuple[list[Step], list[Step]] | None:
    """Divide before the last blocks of a transformer, or the last stages of a convolutional network."""
    parts = _in_order(model)
    if parts is None:
        return None
    before, blocks, after = parts
    return _flat([before, *blocks[:-last]]), [*_flat([*blocks[-last:], after]), model.forward_head]


def _in_order(model: Any) -> tuple[list[Step], list[list[Step]], list[Step]] | None:
    """Return what a model does to an image up to its head: before the blocks, in each, after them; None of an unknown kind."""
    from timm import models as kinds

    if isinstance(model, kinds.VisionTransformer):
        before: list[Step] = [model.patch_embed, model._pos_embed, model.patch_drop, model.norm_pre]
        return before, [*_each(model.blocks[:-1]), [_last_block(model)]], [model.norm]
    if isinstance(model, kinds.ConvNeXt):
        return [model.stem], _each(model.stages), [model.norm_pre]
    if isinstance(model, kinds.ResNetV2):
        return [model.stem], _each(model.stages), [model.norm]
    if isinstance(model, kinds.EfficientNet):
        return [model.conv_stem, model.bn1], _each(model.blocks), [model.conv_head, model.bn2]
    if isinstance(model, kinds.MobileNetV3):
        return [model.conv_stem, model.bn1], _each(model.blocks), []
    if isinstance(model, kinds.ResNet):
        stem: list[Step] = [model.conv1, model.bn1, model.act1, model.maxpool]
        return stem, _each(_numbered(model, "layer")), []
    if isinstance(model, kinds.RegNet):
        return [model.stem], _each(_numbered(model, "s")), [model.final_conv]
    if isinstance(model, kinds.DenseNet):
        return _of_densenet(model.features)
    return None


def _last_block(model: Any) -> Step:
    """Return the last block of a vision transformer; of one whose classifier reads the class token, only that token's part."""
    from timm.models.vision_transformer import Attention, Block

    block = model.blocks[-1]
    standard = type(block) is Block and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None
    return partial(_of_first_tokens, block, model.num_prefix_tokens) if standard and reads_class_token(model) else block


def _of_first_tokens(block: Any, first: int, tokens: Tensor) -> Tensor:
    """Return what timm's `Block` makes of the first tokens, (n, first, d).

    The others serve as keys and values only: what the block would make of them, most of its work, nobody reads.
    """
    attention, normed = block.attn, block.norm1(tokens)
    by_head = attention.qkv(normed).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys, values = by_head.unbind(0)
    queries, keys = attention.q_norm(queries[:, :, :first]), attention.k_norm(keys)
    dropout = attention.attn_drop.p if attention.training else 0.0
    found = scaled_dot_product_attention(queries, keys, values, dropout_p=dropout).transpose(1, 2).flatten(2)
    found = attention.proj_drop(attention.proj(attention.norm(found)))
    tokens = tokens[:, :first] + block.drop_path1(block.ls1(found))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def _of_densenet(features: Any) -> tuple[list[Step], list[list[Step]], list[Step]]:
    """A dense block and the transition after it are one stage, as timm counts them."""
    names = [name for name, _ in features.named_children()]
    starts = [index for index, name in enumerate(names) if name.startswith("denseblock")]
    layers, end = list(features), names.index("norm5")
    edges = [*starts, end]
    return layers[: starts[0]], [layers[a:b] for a, b in pairwise(edges)], layers[end:]


def _numbered(model: Any, prefix: str) -> list[Step]:
    return [getattr(model, f"{prefix}{number}") for number in range(1, 5)]


def _each(blocks: Iterable[Step]) -> list[list[Step]]:
    return [[block] for block in blocks]


def _flat(parts: Iterable[Sequence[Step]]) -> list[Step]:
    return [step for part in parts for step in part]


def _through(steps: Sequence[Step], values: Tensor) -> Tensor:
    for step in steps:
        values = step(values)
    return values
