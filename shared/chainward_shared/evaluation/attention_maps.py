"""Where a model looks: attention, attention rollout, and gradient class-activation maps, at the size of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

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
    unwrapped,
)

if TYPE_CHECKING:  # timm takes seconds to import: see `models.architecture`
    from timm.models.vision_transformer import VisionTransformer

MIN_SIDE = 4
"""Positions per side below which a feature map only names a corner. On small images a convolutional network's last stage may
be 2 x 2 (ConvNeXt, 64 px): no map of it finds a region (phantoms: lift 0.99 of the last stage, 1.14 of the 4 x 4 before)."""

MapMethod = Literal["auto", "attention", "rollout", "gradcam"]

CONSTANT = 1e-6
"""A map whose values differ by less than this, relative to the largest, is constant: the rest is rounding."""


def attention_maps(
    model: nn.Module,
    images: Tensor,
    *,
    method: MapMethod = "auto",
    classes: Tensor | Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Return where `model` looks in each image, float32 (n, H, W) in [0, 1], on the device of `images`.

    Maps are computed on the model's own grid (its patches, or a feature map), upsampled bilinearly to the image,
    then scaled to run from 0 to 1 in each image. A map that is the same everywhere becomes zeros: the model looks nowhere
    in particular. The model is run in evaluation mode and in float32, and left as it was found: mode, gradients, hooks.

    Parameters
    ----------
    model : a timm model, on any device
    images : what the model eats, float (n, channels, H, W); see `chainward_shared.preprocessing.to_float`
    method :
        "attention": vision transformer: attention over the patches in the last block, mean over the heads, of the class
        token where the classifier reads it, else mean over the patches' own queries. Convolutional network: mean over the
        channels of the squared activation at the end of the last stage (Zagoruyko & Komodakis 2017) that has at least
        `MIN_SIDE` positions per side. Of no class.
        "rollout": vision transformers only: the product over the blocks of ``(A + I) / 2``, A the attention averaged over
        the heads (Abnar & Zuidema 2020, sec. 3). Of no class.
        "gradcam": convolutional networks only: ``relu(sum_k a_k F_k)``, F the output of the same stage, a_k the mean over
        all positions of the gradient of the class's logit (Selvaraju et al. 2017, eq. 1 and 2).
        "auto", the default: attention for a vision transformer, gradcam for a convolutional network.
    classes : class index of each image, (n,), for gradcam. Default: the class that the model predicts
    size : height and width of the maps. Default: those of the images
    batch_size : images that go through the model at once

    Raises
    ------
    ModelError
        The model is of a kind for which the method is not defined, or not supported.
    """
    if method not in get_args(MapMethod):
        raise ModelError(f"attention maps by the method '{method}' don't exist: give one of {get_args(MapMethod)}")
    model = unwrapped(model)
    transformer = is_transformer(model)
    if method == "auto":
        method = "attention" if transformer else "gradcam"
    if method == ("gradcam" if transformer else "rollout"):
        kind = "convolutional networks" if transformer else "vision transformers"
        raise ModelError(f"{method} of {type(model).__name__}: defined for {kind} here, use 'auto' or 'attention'")
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
            if method == "gradcam":
                grid = _gradcam(model, batch, None if chosen is None else chosen[start : start + batch_size].to(device))
            elif is_transformer(model):
                grid = _transformer_map(model, batch, rollout=method == "rollout")
            else:
                grid = _activation_map(model, batch)
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
        if not _is_mapped(output, features):
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


def _activation_map(model: nn.Module, images: Tensor) -> Tensor:
    features: list[Tensor] = []

    def keep(stage: nn.Module, args: Any, output: Tensor) -> None:
        check_feature_map(stage, output)
        if _is_mapped(output, features):
            features[:] = [output]

    with hooked(conv_stages(model), keep):
        model(images)
    return features[0].square().mean(dim=1)


def _is_mapped(output: Tensor, before: list[Tensor]) -> bool:
    """Tell whether a stage's output replaces that of the stages before it; the first is better than none."""
    return not before or min(output.shape[2:]) >= MIN_SIDE


def _transformer_map(model: VisionTransformer, images: Tensor, *, rollout: bool) -> Tensor:
    prefix = model.num_prefix_tokens
    queries_read = slice(0, 1) if reads_class_token(model) else slice(prefix, None)
    layers = block_attentions(model)
    found: list[Tensor] = []

    def keep(queries: Tensor, keys: Tensor) -> None:
        found.append(attention_probabilities(queries[:, :, queries_read], keys).mean(dim=1))

    def roll(queries: Tensor, keys: Tensor) -> None:
        attention = attention_probabilities(queries, keys).mean(dim=1)
        step = (attention + torch.eye(attention.shape[-1], device=attention.device)) / 2
        found[:] = [step @ found[0] if found else step]

    with ExitStack() as hooks:
        for layer in layers if rollout else layers[-1:]:
            hooks.enter_context(hook_queries_and_keys(layer, roll if rollout else keep))
        model(images)
    rows = found[0][:, queries_read] if rollout else found[0]
    height, width = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    return rows[..., prefix:].mean(dim=1).unflatten(1, (height, width))


def _upsampled(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (n, h, w) at the size of the image, each scaled to run from 0 to 1."""
    flat = grid.flatten(1)
    varies = flat.amax(dim=1) - flat.amin(dim=1) > CONSTANT * flat.abs().amax(dim=1)
    maps = functional.interpolate(grid[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    span = torch.where(varies[:, None, None], high - low, 1.0)
    return torch.where(varies[:, None, None], (maps - low) / span, 0.0)
