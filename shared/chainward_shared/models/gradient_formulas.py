"""From a layer, its input and the gradient at its output to the gradients of single examples: one formula a kind of layer.

Where the gradients themselves are cheaper than the (T, T) matrices of their ghost norms (early convolutions, depthwise
ones, norms, biases) they are held. A layer of another kind is run through `torch.func`, example by example in one pass.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from chainward_shared.errors import ModelError
from chainward_shared.models.per_example import Gradients, Held, OfConvolution, OfTokens, ghost_is_cheaper

if TYPE_CHECKING:  # timm takes seconds to import: see `architecture`
    from timm.layers import LayerNorm2d, LayerScale
    from timm.models.convnext import ConvNeXtBlock

Formula = Callable[[Any, Tensor, Tensor], dict[nn.Parameter, Gradients]]
"""From a layer, its input (k, ...) and the gradient at its output (k, ...) to the gradients of its trainable parameters."""


def _linear(layer: nn.Linear, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    n = len(activation)
    tokens = activation.reshape(n, -1, activation.shape[-1])
    backprops = backprops.reshape(n, -1, backprops.shape[-1])
    return _of_tokens(layer, tokens, backprops)


def _of_tokens(layer: nn.Linear | nn.Conv2d, tokens: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    gradients: dict[nn.Parameter, Gradients] = {}
    if layer.weight.requires_grad:
        cheaper = ghost_is_cheaper(tokens.shape[1], tokens.shape[2], backprops.shape[2])
        of_weight = OfTokens(tokens, backprops) if cheaper else Held(torch.bmm(backprops.transpose(1, 2), tokens))
        gradients[_parameter(layer, "weight")] = of_weight
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[_parameter(layer, "bias")] = Held(backprops.sum(dim=1))
    return gradients


def _convolution(layer: nn.Conv2d, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    images, padding = _padded(layer, activation)
    if layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1 and padding == (0, 0):
        return _of_tokens(layer, *(t.flatten(2).transpose(1, 2) for t in (images, backprops)))
    gradients: dict[nn.Parameter, Gradients] = {}
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[_parameter(layer, "bias")] = Held(backprops.sum(dim=(2, 3)))
    if not layer.weight.requires_grad:
        return gradients
    places, patch = backprops.shape[2] * backprops.shape[3], layer.weight[0].numel()
    of_weight: Gradients
    if layer.groups == layer.in_channels == layer.out_channels:
        of_weight = Held(_depthwise(layer, images, padding, backprops))
    elif layer.groups == 1 and ghost_is_cheaper(places, patch, layer.out_channels):
        of_weight = OfConvolution(layer, images, padding, backprops)
    else:
        of_weight = Held(_grouped(layer, images, padding, backprops))
    gradients[_parameter(layer, "weight")] = of_weight
    return gradients


def _padded(layer: nn.Conv2d, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return a convolution's input and the zeros that are still to be put around it."""
    from timm.layers import Conv2dSame, pad_same  # seconds of CPU: see `architecture`

    if isinstance(layer, Conv2dSame):  # TensorFlow's way: so much, on each side, that every pixel is used
        return pad_same(images, list(layer.kernel_size), list(layer.stride), list(layer.dilation)), (0, 0)
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return images, (int(layer.padding[0]), int(layer.padding[1]))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(images, layer._reversed_padding_repeated_twice, mode=mode), (0, 0)


def _depthwise(layer: nn.Conv2d, images: Tensor, padding: tuple[int, int], backprops: Tensor) -> Tensor:
    """Return the gradients of a depthwise weight, (n, c, 1, i, j): each channel of each image, convolved with its own
    gradient as the kernel; stride and dilation change places."""
    n, channels = images.shape[:2]
    # The channels of all images as those of one, last in memory: the layout that depthwise convolutions are fast in
    one = images.permute(2, 3, 0, 1).reshape(1, *images.shape[2:], n * channels).permute(0, 3, 1, 2)
    kernels = backprops.reshape(n * channels, 1, *backprops.shape[2:])
    found = functional.conv2d(one, kernels, None, layer.dilation, padding, layer.stride, n * channels)
    height, width = layer.kernel_size
    return found[0, :, :height, :width].contiguous().reshape(n, channels, 1, height, width)


def _grouped(layer: nn.Conv2d, images: Tensor, padding: tuple[int, int], backprops: Tensor) -> Tensor:
    """Return the gradients of a weight, (n, *shape): those of a convolution in which each image is a group."""
    n = len(images)
    one = images.reshape(1, -1, *images.shape[2:])
    found = conv2d_weight(
        one,
        (n * layer.out_channels, *layer.weight.shape[1:]),
        backprops.reshape(1, -1, *backprops.shape[2:]),
        layer.stride,
        padding,
        layer.dilation,
        n * layer.groups,
    )
    return found.reshape(n, *layer.weight.shape)


def _layer_norm(layer: nn.LayerNorm, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    n, shape = len(activation), tuple(layer.normalized_shape)
    backprops = backprops.reshape(n, -1, *shape)
    return _of_norm(
        layer, lambda: functional.layer_norm(activation, shape, eps=layer.eps).reshape(n, -1, *shape), backprops
    )


def _layer_norm_2d(layer: LayerNorm2d, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    return _layer_norm(layer, activation.permute(0, 2, 3, 1), backprops.permute(0, 2, 3, 1))


def group_norm(layer: nn.GroupNorm, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    def normalised() -> Tensor:
        return functional.group_norm(activation, layer.num_groups, eps=layer.eps).flatten(2).transpose(1, 2)

    return _of_norm(layer, normalised, backprops.flatten(2).transpose(1, 2))


def frozen_batch_norm(layer: nn.BatchNorm2d, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    """Return the gradients of a batch norm with fixed statistics, to which each image is its own.

    Raises
    ------
    ModelError
        It normalises by the statistics of the batch, in which images have no gradients of their own.
    """
    if layer.training or layer.running_mean is None or layer.running_var is None:
        raise ModelError("its batch norm mixes the images of a batch, so that no image has a gradient of its own")
    mean, variance = layer.running_mean, layer.running_var

    def normalised() -> Tensor:
        return functional.batch_norm(activation, mean, variance, eps=layer.eps).flatten(2).transpose(1, 2)

    return _of_norm(layer, normalised, backprops.flatten(2).transpose(1, 2))


def _of_norm(layer: Any, normalised: Callable[[], Tensor], backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    gradients: dict[nn.Parameter, Gradients] = {}
    if layer.weight is not None and layer.weight.requires_grad:
        gradients[_parameter(layer, "weight")] = Held((normalised() * backprops).sum(dim=1))
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[_parameter(layer, "bias")] = Held(backprops.sum(dim=1))
    return gradients


def _layer_scale(layer: LayerScale, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    n, width = len(activation), layer.gamma.numel()
    return {_parameter(layer, "gamma"): Held((activation * backprops).reshape(n, -1, width).sum(dim=1))}


def block_scale(block: ConvNeXtBlock, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    outputs = activation if block.use_conv_mlp else activation.permute(0, 3, 1, 2)
    return {_parameter(block, "gamma"): Held((outputs * backprops).sum(dim=(2, 3)))}


def of_any_layer(layer: nn.Module) -> Formula:
    """Return the formula of a layer of a kind that is not known here."""
    bare = _without_hooks(layer)

    def formula(layer: nn.Module, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
        trainable = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
        values = {name: parameter.detach() for name, parameter in trainable.items()}

        def of_one(one: Tensor, backprop: Tensor) -> dict[str, Tensor]:
            gradients = vjp(lambda values: functional_call(bare, values, (one[None],)), values)[1]
            found: dict[str, Tensor] = gradients(backprop[None])[0]
            return found

        found = vmap(of_one, randomness="different")(activation, backprops)
        return {parameter: Held(found[name].detach()) for name, parameter in trainable.items()}

    return formula


def _without_hooks(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer without what is attached to it, which may hold tensors that can't be copied."""
    attached = [(module, module._forward_hooks, module._forward_pre_hooks) for module in layer.modules()]
    try:
        for module, _, _ in attached:
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        return copy.deepcopy(layer)
    finally:
        for module, after, before in attached:
            module._forward_hooks, module._forward_pre_hooks = after, before


def _parameter(layer: nn.Module, name: str) -> nn.Parameter:
    parameter = layer._parameters[name]
    assert parameter is not None
    return parameter


@cache
def formulas() -> dict[type[nn.Module], Formula]:
    """Return the layers that have a formula, by their exact type: a subclass may compute something else."""
    from timm import layers

    return {
        nn.Linear: _linear,
        layers.Linear: _linear,
        nn.Conv2d: _convolution,
        layers.Conv2dSame: _convolution,
        nn.LayerNorm: _layer_norm,
        layers.LayerNorm: _layer_norm,
        layers.LayerNorm2d: _layer_norm_2d,
        nn.GroupNorm: group_norm,
        layers.LayerScale: _layer_scale,
    }
