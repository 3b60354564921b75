"""Does a model see the whole image? Patches that don't fill it leave a border out, silently, in most of timm's transformers."""

from __future__ import annotations

import torch
from torch import nn

from chainward_shared.models.taps import hooked

_BLOCKS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def unfilled_patches(model: nn.Module, images: torch.Tensor) -> int:
    """Return from patch to patch how many pixels, where patches of an image, or of a map of it, don't reach its end; else 0.

    Parameters
    ----------
    model : may be on the meta device
    images : (n, channels, side, side)

    A remainder does not mean that pixels are lost: layers before it may have spread them. `border_is_lost` tells.
    """
    found: list[int] = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        kernel, stride, padding = (_side(getattr(module, name)) for name in ("kernel_size", "stride", "padding"))
        if kernel < 2 or not stride or not inputs or inputs[0].ndim != 4:
            return
        side = inputs[0].shape[-1]
        last = (side + 2 * padding - kernel) // stride * stride + kernel - 1 - padding
        if last < side - 1:
            found.append(stride)

    with hooked((module for module in model.modules() if isinstance(module, _BLOCKS)), look), torch.no_grad():
        model(images)
    return found[0] if found else 0


def _side(size: object) -> int:
    """Return the side of a kernel, stride or padding; 0 where it is not square, or a word."""
    if isinstance(size, int):
        return size
    if isinstance(size, tuple) and size and all(isinstance(part, int) and part == size[0] for part in size):
        return int(size[0])
    return 0


def border_is_lost(model: nn.Module, in_chans: int, side: int) -> bool:
    """Return whether what the model makes of an image does not depend on its outermost rows and columns at all.

    Parameters
    ----------
    model : timm's, with any weights but all zeros, in evaluation mode, on the CPU
    in_chans, side : channels and side of an image
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, in_chans, side, side, generator=generator, requires_grad=True)
    with torch.enable_grad():
        seen = model.forward_features(images)  # type: ignore[operator]
        parts = seen if isinstance(seen, list | tuple) else [seen]
        total = sum((part.square().sum() for part in parts if isinstance(part, torch.Tensor)), torch.zeros(()))
        (gradient,) = torch.autograd.grad(total, images)
    strength = gradient.abs().sum(dim=(0, 1))
    edges = (strength[0], strength[-1], strength[:, 0], strength[:, -1])
    return any(not bool(edge.any()) for edge in edges)
