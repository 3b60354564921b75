"""Where a model looks: attention of a transformer, gradient class-activation maps of others, at the size of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from chainward_shared.errors import ModelError
from chainward_shared.models.taps import (
    attention_probabilities,
    block_attentions,
    check_feature_map,
    conv_stages,
    hook_queries_and_keys,
    hooked,
    is_transformer,
    reads_class_token,
)

if TYPE_CHECKING:  # timm takes seconds to import: see `models.architecture`
    from timm.models.vision_transformer import VisionTransformer

MIN_SIDE = 4
"""Positions per side below which a feature map only names a corner. On small images a convolutional network's last stage may
be 2 x 2 (ConvNeXt, 64 px): no map of it finds a region (phantoms: lift 0.99 of the last stage, 1.14 of the 4 x 4 before)."""

CONSTANT = 1e-6
"""A map whose values differ by less than this, relative to the largest, is constant: the rest is rounding."""


def attention_maps(
    model: nn.Module,
    images: Tensor,
    *,
    classes: Tensor | Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Return where `model` looks in each image, float32 (n, H, W) in [0, 1], on the device of `images`.

    Vision transformer: attention over the patches in the last block, mean over the heads, of the class token where the
    classifier reads it, else mean over the patches' own queries; of no class. Convolutional network: Grad-CAM,
    ``relu(sum_k a_k F_k)``, F the output of the last stage that has at least `MIN_SIDE` positions per side, a_k the mean over
    all positions of the gradient of the class's logit (Selvaraju et al. 2017, eq. 1 and 2).

    Maps are computed on the model's own grid (its patches, or a feature map), upsampled bilinearly to the image,
    then scaled to run from 0 to 1 in each image. A map that is the same everywhere becomes zeros: the model looks nowhere
    in particular. The model is run in evaluation mode and in float32, and left as it was found: mode, gradients, hooks.

    Parameters
    ----------
    model : a timm model, on any device
    images : what the model eats, float (n, channels, H, W); see `chainward_shared.preprocessing.to_float`
    classes : class index of each image, (n,), for Grad-CAM. Default: the class that the model predicts
    size : height and width of the maps. Default: those of the images
    batch_size : images that go through the model at once

    Raises
    ------
    ModelError
        The model is of a kind that is not supported, or there are more or fewer classes than images.
    """
    chosen = None if classes is None else torch.as_tensor(classes, dtype=torch.int64)
    if chosen is not None and len(chosen) != len(images):
        raise ModelError(f"{len(chosen)} classes were given for {len(images)} images: give one for each")
    size = size or (int(images.shape[-2]), int(images.shape[-1]))
    if len(images) == 0:
        return torch.zeros(0, *size, device=images.device)
    device = next(model.parameters()).device
    maps = []
    with _as_for_scoring(model, device):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size].to(device, torch.float32, copy=images.is_inference())
            if is_transformer(model):
                grid = _attention(model, batch)
            else:
                grid = _gradcam(model, batch, None if chosen is None else chosen[start : start + batch_size].to(device))
            maps.append(_upsampled(grid, size).to(images.device))
    return torch.cat(maps)


def check_mappable(model: nn.Module) -> None:
    """Check that `attention_maps` can be made of a model, which may be on the meta device.

    Raises
    ------
    ModelError
        The model is of a kind that is not supported.
    """
    if is_transformer(model):
        block_attentions(model)
    else:
        conv_stages(model)


@contextmanager
def _as_for_scoring(model: nn.Module, device: torch.device) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required in trainable:
            parameter.requires_grad_(required)


def _gradcam(model: nn.Module, images: Tensor, classes: Tensor | None) -> Tensor:
    features: list[Tensor] = []

    def begin_graph_here(stage: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        check_feature_map(stage, output)
        if features and min(output.shape[2:]) < MIN_SIDE:  # the first is better than none
            return None
        features[:] = [output.detach().requires_grad_()]
        return features[0]

    with hooked(conv_stages(model), begin_graph_here), torch.enable_grad():
        logits = model(images)
        if classes is None:
            classes = logits.argmax(dim=1)
        of_class = logits.gather(1, classes[:, None]).sum()  # in evaluation mode an image has no part in another's
        (gradient,) = torch.autograd.grad(of_class, features)
    return (gradient.mean(dim=(2, 3), keepdim=True) * features[0].detach()).sum(dim=1).relu()


def _attention(model: VisionTransformer, images: Tensor) -> Tensor:
    prefix = model.num_prefix_tokens
    queries_read = slice(0, 1) if reads_class_token(model) else slice(prefix, None)
    found: list[Tensor] = []

    def keep(queries: Tensor, keys: Tensor) -> None:
        found.append(attention_probabilities(queries[:, :, queries_read], keys).mean(dim=1))

    with hook_queries_and_keys(block_attentions(model)[-1], keep):
        model(images)
    height, width = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    return found[0][..., prefix:].mean(dim=1).unflatten(1, (height, width))


def _upsampled(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (n, h, w) at the size of the image, each scaled to run from 0 to 1."""
    flat = grid.flatten(1)
    varies = flat.amax(dim=1) - flat.amin(dim=1) > CONSTANT * flat.abs().amax(dim=1)
    maps = functional.interpolate(grid[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    span = torch.where(varies[:, None, None], high - low, 1.0)
    return torch.where(varies[:, None, None], (maps - low) / span, 0.0)
