"""Whether a backbone works on images of a size, cut into patches of a size, and what would fit where it does not."""

from __future__ import annotations

from functools import lru_cache
from inspect import signature

import torch
from torch import nn

from chainward_shared.errors import ModelError
from chainward_shared.models.architecture import Architecture, build_model, output_shape, skeleton
from chainward_shared.models.families import find_family
from chainward_shared.models.taps import hooked
from chainward_shared.words import first_line

_BLOCKS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def takes_argument(model: nn.Module, argument: str) -> bool:
    """Tell whether the class of `model`, or one that it hands its arguments on to, has this argument."""
    own_inits = (vars(cls).get("__init__") for cls in type(model).__mro__)
    return any(argument in signature(init).parameters for init in own_inits if init)


def _takes_image_size(architecture: Architecture) -> bool:
    """Tell whether the model checks and stores its image size; any other works on any size, and has no argument for it."""
    return takes_argument(skeleton(architecture), "img_size")


def with_sizes(plain: Architecture, image_size: int, patch_size: int) -> Architecture:
    """Return the architecture for images of `image_size` pixels; a `patch_size` of 0 leaves the patches as they are."""
    options = dict(plain.options)
    if _takes_image_size(plain):
        options["img_size"] = image_size
    if patch_size:
        options["patch_size"] = patch_size
    return plain.model_copy(update={"image_size": image_size, "options": options})


def check_patch_size_is_used(architecture: Architecture, patch_size: int) -> None:
    """Raise a `ModelError` unless the backbone cuts its images into patches of `patch_size` pixels."""
    plain = architecture.model_copy(update={"options": {}})
    # timm's models pass unknown arguments on to a class that may not have them, or may not use them
    used = takes_argument(skeleton(plain), "patch_size")
    if used and (family := find_family(skeleton(architecture))):
        used = family.patch_size(skeleton(architecture)) == patch_size
    if not used:
        raise ModelError(f"backbone '{architecture.name}' has no patch size to set to {patch_size}: leave it at 0")


def check_image_size(architecture: Architecture) -> None:
    """Raise a `ModelError`, with what would fit, unless the model works on its images and sees all of them."""
    name, image_size, model = architecture.name, architecture.image_size, skeleton(architecture)
    family = find_family(model)
    patch_size = family.patch_size(model) if family else 0
    # a ViT would silently drop the border that does not fill a patch
    if patch_size and _takes_image_size(architecture) and image_size % patch_size:
        fitting = [size for size in range(1, image_size + 1) if image_size % size == 0]
        closest = min(fitting, key=lambda size: abs(size - patch_size))
        raise ModelError(
            f"images of {image_size} pixels can't be cut into the {patch_size}-pixel patches of '{name}': "
            f"choose a patch size that divides {image_size}, e.g. {closest}"
        )
    if problem := _forward_problem(architecture):
        advice = _what_fits(architecture) or problem
        raise ModelError(f"'{name}' can't work on images of {image_size} pixels: {advice}")
    _check_border(architecture)


def _check_border(architecture: Architecture) -> None:
    """Refuse a model that would see only the inner part of its images.

    Patches that don't fill an image leave its border out, silently, in most of timm's transformers.
    """
    side = architecture.image_size
    if patch := _patch_that_loses_the_border(architecture.model_dump_json()):
        raise ModelError(
            f"'{architecture.name}' does not see the border of images of {side} pixels, which don't fill its patches of {patch}: "
            f"choose images of {side // patch * patch or patch} or {(side // patch + 1) * patch} pixels"
        )


@lru_cache(maxsize=64)
def _patch_that_loses_the_border(architecture_json: str) -> int:
    """Return the side of the patches that leave the border of the images out; 0 where the model sees all of them."""
    architecture = Architecture.model_validate_json(architecture_json).model_copy(update={"start": None})
    channels, side = architecture.in_chans, architecture.image_size
    try:
        patch = _unfilled_patches(skeleton(architecture), torch.empty(1, channels, side, side, device="meta"))
    except NotImplementedError:
        return 0  # an operation that the meta device lacks says nothing about the size
    lost = patch and _border_is_lost(build_model(architecture, seed=0).eval(), channels, side)
    return patch if lost else 0


def _unfilled_patches(model: nn.Module, images: torch.Tensor) -> int:
    """Return from patch to patch how many pixels, where patches of an image, or of a map of it, don't reach its end; else 0.

    A remainder does not mean that pixels are lost: layers before it may have spread them. `_border_is_lost` tells.
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


def _border_is_lost(model: nn.Module, in_chans: int, side: int) -> bool:
    """Return whether what the model makes of an image does not depend on its outermost rows and columns at all.

    `model`: in evaluation mode, on the CPU, with any weights but all zeros.
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


def _what_fits(architecture: Architecture) -> str:
    """Return the smallest larger image, and the patch size, with which the model works, or an empty string."""

    def fits(image_size: int, patch_size: int) -> bool:
        try:
            return not _forward_problem(with_sizes(architecture, image_size, patch_size))
        except ModelError:
            return False

    ways = []
    side = architecture.image_size
    larger = range((side // 8 + 1) * 8, 513, 8)
    if image := next((size for size in larger if fits(size, 0)), 0):
        ways.append(f"choose images of at least {image} pixels")
    family = find_family(skeleton(architecture))
    own_patch = family.patch_size(skeleton(architecture)) if family else 0
    if patch := next((size for size in range(own_patch - 1, 0, -1) if side % size == 0 and fits(side, size)), 0):
        ways.append(f"patch size {patch}")
    return " or ".join(ways)


def _forward_problem(architecture: Architecture) -> str:
    """Return why the model can't do a forward pass at its image size, or an empty string if it can."""
    try:
        output_shape(architecture)
    except NotImplementedError:
        return ""  # an operation that the meta device lacks says nothing about the size
    except (RuntimeError, AssertionError, ValueError) as error:
        return first_line(error)
    return ""
