"""Clipped sums of gradients without the gradients of the single examples: ghost clipping with book-keeping.

Private training needs two things of a backward pass: how long the gradient of each example is, over all parameters, and the
sum of these gradients, each scaled so that it is no longer than the clipping norm. For a layer that multiplies tokens
``a`` (T, d) by a weight, the gradient of an example is ``b^T a`` (p, d), where ``b`` (T, p) is the gradient at the layer's
output. Its length follows from two (T, T) matrices, ``|b^T a|^2 = sum((a a^T) * (b b^T))`` (ghost norm: Goodfellow 2015,
arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679, section 4; for convolutions Bu et al. 2022, arXiv:2205.10683), and with
``a`` and ``b`` kept, the clipped sum is one product of matrices, the same as in plain training, without a second backward
pass (book-keeping: Bu et al. 2023, arXiv:2210.00038, section 2.2). Where the gradients themselves are cheaper than the
(T, T) matrices (early convolutions, depthwise ones, norms, biases) they are kept instead, layer by layer.

While a layer runs, its parameters are hidden from autograd: what autograd would compute for them is not needed. In return a
parameter that does get a gradient from autograd was used in a way that is not seen here, and the step is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from chainward_shared.errors import ModelError

if TYPE_CHECKING:  # timm takes seconds to import: see `architecture`
    from timm.layers import LayerNorm2d, LayerScale
    from timm.models.convnext import ConvNeXtBlock

_FEW_PLACES = 4
_ROUNDING = 1e-6
"""Relative error of a float32 product of vectors, generously; see `_ghost_squares`."""

ClipFactors = Callable[[Tensor, float], Tensor]


class Gradients(Protocol):
    """The gradients of k examples with respect to one parameter, in whatever form."""

    @property
    def examples(self) -> int:
        """The number k of examples."""

    def squares(self) -> Tensor:
        """Return the squared length of each, (k,)."""

    def weighted_sum(self, factors: Tensor, rows: Tensor | None) -> Tensor:
        """Return the sum over examples times `factors`, (k,), in the shape of the parameter; only of `rows` if given."""

    def of_each(self) -> Tensor:
        """Return them all, (k, *shape)."""


@dataclass
class Held:
    """Gradients that were computed, (k, *shape)."""

    values: Tensor

    @property
    def examples(self) -> int:
        """The number k of examples."""
        return len(self.values)

    def squares(self) -> Tensor:
        """Return the squared length of each, (k,)."""
        return torch.linalg.vector_norm(self.values.reshape(self.examples, -1), dim=1).square()

    def weighted_sum(self, factors: Tensor, rows: Tensor | None) -> Tensor:
        """Return the sum over examples times `factors`."""
        flat = self.values.reshape(self.examples, -1)
        if rows is not None:
            flat, factors = flat[rows], factors[rows]
        return (factors @ flat).reshape(self.values.shape[1:])

    def of_each(self) -> Tensor:
        """Return them all."""
        return self.values


@dataclass
class OfTokens:
    """Gradients of a linear layer's weight (p, d): tokens (k, T, d) and the gradient at its output (k, T, p)."""

    tokens: Tensor
    backprops: Tensor

    @property
    def examples(self) -> int:
        """The number k of examples."""
        return len(self.tokens)

    def squares(self) -> Tensor:
        """Return the squared length of each, (k,), from matrices (T, T)."""
        return _ghost_squares(_gram(self.tokens), _gram(self.backprops))

    def weighted_sum(self, factors: Tensor, rows: Tensor | None) -> Tensor:
        """Return the sum over examples times `factors`: one product of matrices."""
        tokens, backprops = self.tokens, self.backprops
        if rows is not None:
            tokens, backprops, factors = tokens[rows], backprops[rows], factors[rows]
        if tokens.shape[2] < backprops.shape[2]:  # scale the smaller one: new memory is what costs time
            tokens = tokens * factors[:, None, None]
        else:
            backprops = backprops * factors[:, None, None]
        return backprops.reshape(-1, backprops.shape[2]).T @ tokens.reshape(-1, tokens.shape[2])

    def of_each(self) -> Tensor:
        """Return them all."""
        return torch.bmm(self.backprops.transpose(1, 2), self.tokens)


@dataclass
class OfConvolution:
    """Gradients of a convolution's weight, without groups: its padded input and the gradient at its output."""

    layer: nn.Conv2d
    images: Tensor
    padding: tuple[int, int]
    backprops: Tensor

    @property
    def examples(self) -> int:
        """The number k of examples."""
        return len(self.images)

    def squares(self) -> Tensor:
        """Return the squared length of each, (k,), from matrices (T, T) of the T places of the output."""
        outputs = _gram(self.backprops.flatten(2).transpose(1, 2))
        return _ghost_squares(self._gram_of_patches(), outputs)

    def weighted_sum(self, factors: Tensor, rows: Tensor | None) -> Tensor:
        """Return the sum over examples times `factors`: what plain training computes, of scaled gradients."""
        images, backprops = self.images, self.backprops
        if rows is not None:
            images, backprops, factors = images[rows], backprops[rows], factors[rows]
        if not len(images):
            return torch.zeros_like(self.layer.weight)
        return _weight_gradient(self.layer, images, self.padding, backprops * factors[:, None, None, None])

    def of_each(self) -> Tensor:
        """Return them all."""
        return torch.cat(
            [
                _weight_gradient(self.layer, image[None], self.padding, backprop[None])[None]
                for image, backprop in zip(self.images, self.backprops, strict=True)
            ]
        )

    def _gram_of_patches(self) -> Tensor:
        """Return the products of all pairs of patches, (k, T, T).

        With stride 1 patches overlap: the product of two is a sum of products of pixels, each of which is computed once.
        """
        layer = self.layer
        if layer.stride != (1, 1) or layer.kernel_size == (1, 1):
            patches = functional.unfold(self.images, layer.kernel_size, layer.dilation, self.padding, layer.stride)
            return _gram(patches.transpose(1, 2))
        images = functional.pad(self.images, _both_sides(self.padding))
        n, _, height, width = images.shape
        rows, columns = self.backprops.shape[2:]
        pixels = _gram(images.flatten(2).transpose(1, 2)).reshape(n, height, width, height, width)
        total = pixels.new_zeros(n, rows, columns, rows, columns)
        for i in range(layer.kernel_size[0]):
            for j in range(layer.kernel_size[1]):
                y, x = i * layer.dilation[0], j * layer.dilation[1]
                total += pixels[:, y : y + rows, x : x + columns, y : y + rows, x : x + columns]
        return total.reshape(n, rows * columns, rows * columns)


Formula = Callable[[Any, Tensor, Tensor], dict[nn.Parameter, Gradients]]
"""From a layer, its input (k, ...) and the gradient at its output (k, ...) to the gradients of its trainable parameters."""


@dataclass
class _Pass:
    """A layer's pass forward. The graph of a loss may outlive the step, so the step empties this when it is done."""

    layer: nn.Module
    formula: Formula
    activation: Tensor | None
    version: int


class GhostClipping:
    """Attaches to modules in training mode; after one backward pass of summed losses, `clipped_sum` has the result.

    A layer that is called several times in a pass, and a parameter that several layers share, have their gradients added up
    example by example before they are measured. Layers of unknown types go through functorch: their gradients are computed
    for each example.

    Parameters
    ----------
    modules : their trainable parameters are covered; everything in them must have the examples in its first dimension
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._handles: list[Any] = []
        self._passes: list[_Pass] = []
        self._found: dict[nn.Parameter, list[Gradients]] = {}
        self.slow: list[nn.Module] = []
        """Layers whose gradients are computed for each example, whatever their size."""
        for module in self._modules:
            self._attach(module)

    def clipped_sum(
        self, parameters: Sequence[nn.Parameter], examples: int, clip: float, clip_factors: ClipFactors
    ) -> list[Tensor]:
        """Return the sum of the examples' clipped gradients for each parameter, and forget them.

        Parameters
        ----------
        clip_factors : from squared lengths, (parameters, examples), and `clip` to the factor of each example; 0 leaves it out

        Raises
        ------
        ModelError
            A parameter was used in a way that is not seen here, or there are more gradients than examples.
        """
        found = [self._gradients_of(parameter, examples) for parameter in parameters]
        squares = torch.zeros(len(parameters), examples, device=parameters[0].device)
        for row, gradients in zip(squares, found, strict=True):
            if gradients is not None:
                row[: gradients.examples] = gradients.squares()
        factors = clip_factors(squares, clip)
        dropped = bool((factors == 0).any())
        sums = []
        self.forget()
        for i, parameter in enumerate(parameters):
            gradients, found[i] = found[i], None  # what is done makes room
            if gradients is None:
                sums.append(torch.zeros_like(parameter))
                continue
            of_these = factors[: gradients.examples]
            rows = of_these.nonzero().squeeze(1) if dropped else None  # zero times infinity is no zero
            sums.append(gradients.weighted_sum(of_these, rows).reshape(parameter.shape))
        return sums

    def of_each(self, parameters: Sequence[nn.Parameter], examples: int) -> list[Tensor]:
        """Return the gradients themselves, (examples, *shape) for each parameter, and forget them; for comparison.

        Raises
        ------
        ModelError
            As `clipped_sum`.
        """
        all_of_them = []
        for parameter in parameters:
            values = parameter.new_zeros((examples, *parameter.shape))
            if (gradients := self._gradients_of(parameter, examples)) is not None:
                values[: gradients.examples] = gradients.of_each().reshape(-1, *parameter.shape)
            all_of_them.append(values)
        self.forget()
        return all_of_them

    def forget(self) -> None:
        """Drop what the last pass left."""
        for one in self._passes:
            one.activation = None
        self._passes, self._found = [], {}

    def close(self) -> None:
        """Leave the modules as they were, also after an error in the middle of a pass."""
        self.forget()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module in self._modules:
            for part in module.modules():
                _show(part)
        for layer in self.slow:
            del layer.ft_compute_sample_grad
        self.slow = []

    def _attach(self, module: nn.Module) -> None:
        """Attach to a module, or to what is in it."""
        from timm.layers import norm_act
        from timm.models import convnext

        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        known = type(module)
        if not own:
            pass
        elif known in formulas():
            self._hide(module, [module])
            self._handles.append(module.register_forward_hook(partial(self._watch, formulas()[known])))
        elif known is norm_act.GroupNormAct:
            self._hide(module, [module])
            self._watch_between(module, _group_norm, "drop")
        elif known is convnext.ConvNeXtBlock:
            self._hide(module, [module])
            self._watch_between(module, _block_scale, "drop_path", source="mlp")
        elif expandable(module):
            self._handles.append(module.register_forward_pre_hook(self._expand))
            self._handles.append(module.register_forward_hook(_show_after, always_call=True))
        else:
            from opacus.grad_sample.functorch import prepare_layer

            prepare_layer(module, batch_first=True)
            self.slow.append(module)
            self._hide(module, list(module.modules()))
            self._handles.append(module.register_forward_hook(partial(self._watch, _functorch)))
            return
        for child in module.children():
            self._attach(child)

    def _hide(self, module: nn.Module, parts: list[nn.Module]) -> None:
        """Let autograd see no parameter of `parts` while `module` runs."""

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if _trains(module):
                for part in parts:
                    for name, parameter in part.named_parameters(recurse=False):
                        part.__dict__[name] = parameter.detach()  # found before the parameter, which stays registered

        def after(module: nn.Module, *_: object) -> None:
            for part in parts:
                _show(part)

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def _watch(self, formula: Formula, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Follow a pass through a layer: its input, and later the gradient at its output."""
        if not _trains(module):
            return None
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            raise ModelError(f"a layer {type(module).__name__} has not one tensor as input and one as output")
        return self._follow(module, formula, inputs[0], output)

    def _watch_between(self, layer: nn.Module, formula: Formula, yields: str, source: str | None = None) -> None:
        """Follow a layer that computes something after its parameters: the gradient is that at the input of its part
        `yields`, and the activation its own input, or the output of its part `source`."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], *output: Tensor) -> None:
            if _trains(layer):
                kept[:] = [output[0] if output else inputs[0]]

        def follow(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not _trains(layer):
                return None
            return (self._follow(layer, formula, kept.pop(), inputs[0]), *inputs[1:])

        if source is None:
            self._handles.append(layer.register_forward_pre_hook(keep))
        else:
            self._handles.append(layer.get_submodule(source).register_forward_hook(keep))
        self._handles.append(layer.get_submodule(yields).register_forward_pre_hook(follow))

    def _follow(self, layer: nn.Module, formula: Formula, activation: Tensor, output: Tensor) -> Tensor:
        if not output.requires_grad:  # the layer reads the images, and its own parameters are hidden
            output = _Differentiable.apply(output, torch.zeros((), device=output.device, requires_grad=True))
        this = _Pass(layer, formula, activation.detach(), activation._version)
        self._passes.append(this)

        def on_gradient(gradient: Tensor) -> None:
            with torch.no_grad():
                self._note(this, gradient.detach())

        output.register_hook(on_gradient)
        return output

    def _note(self, this: _Pass, backprops: Tensor) -> None:
        activation, this.activation = this.activation, None
        if activation is None:
            raise ModelError("a second backward pass through one forward pass has no gradients of single examples")
        if activation._version != this.version:
            raise ModelError(
                f"the input of a layer {type(this.layer).__name__} is changed in place before its gradient is known"
            )
        if not len(activation):  # no example reached the layer
            return
        for parameter, gradients in this.formula(this.layer, activation, backprops).items():
            self._found.setdefault(parameter, []).append(gradients)

    def _expand(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Give each example a class token and a position embedding of its own."""
        if not _trains(module):
            return
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                expanded = parameter.detach().expand(len(inputs[0]), *parameter.shape[1:]).requires_grad_()
                expanded.register_hook(partial(self._keep, parameter))
                module.__dict__[name] = expanded

    def _keep(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        self._found.setdefault(parameter, []).append(Held(gradient.detach().unsqueeze(1).clone()))

    def _gradients_of(self, parameter: nn.Parameter, examples: int) -> Gradients | None:
        if parameter.grad is not None:
            raise ModelError(
                f"a parameter of shape {tuple(parameter.shape)} is used outside of its layer, where the gradients of "
                "single images are not seen: the backbone can't be trained privately"
            )
        found = self._found.get(parameter, [])
        if any(gradients.examples > examples for gradients in found):
            raise ModelError(
                f"a layer has {max(g.examples for g in found)} gradients of {examples} examples: what it reads does not "
                "have one example in each row"
            )
        if len(found) < 2:
            return found[0] if found else None
        total = parameter.new_zeros((max(gradients.examples for gradients in found), *parameter.shape))
        for gradients in found:
            total[: gradients.examples] += gradients.of_each().reshape(-1, *parameter.shape)
        return Held(total)


def expandable(module: nn.Module) -> bool:
    """Tell whether all parameters of the module's own have a leading 1, beside other layers: a ViT with its tokens."""
    own = [p for p in module.parameters(recurse=False) if p.requires_grad]
    return bool(own) and any(True for _ in module.children()) and all(p.ndim > 1 and p.shape[0] == 1 for p in own)


class _Differentiable(torch.autograd.Function):
    """Makes a tensor part of the graph, without a copy."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _trains(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _show(module: nn.Module) -> None:
    for name, _ in module.named_parameters(recurse=False):
        module.__dict__.pop(name, None)


def _show_after(module: nn.Module, *_: object) -> None:
    _show(module)


# --- lengths ---


def _gram(rows: Tensor) -> Tensor:
    """Return the products of all pairs of T vectors, (k, T, T), of a tensor (k, T, d)."""
    return torch.bmm(rows, rows.transpose(1, 2))


def _ghost_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return ``|b^T a|^2`` of each example, (k,), from ``a a^T`` and ``b b^T``, (k, T, T): rounded up, never down.

    Terms may cancel, and what rounding leaves must not pass for a short gradient, which would then not be clipped. The
    error is at most that of the products times ``(sum |a_i| |b_i|)^2``, which is added.
    """
    lengths = (inputs.diagonal(dim1=1, dim2=2) * outputs.diagonal(dim1=1, dim2=2)).clamp(min=0).sqrt().sum(dim=1)
    squares = torch.bmm(inputs.flatten(1)[:, None], outputs.flatten(1)[:, :, None]).reshape(-1)
    return squares.clamp(min=0) + _ROUNDING * lengths.square()


def _ghost_is_cheaper(places: int, inputs: int, outputs: int) -> bool:
    """Tell whether two (T, T) matrices cost less than a gradient (p, d) of each example (Bu et al. 2022, section 3.2)."""
    return 2 * places**2 <= inputs * outputs


# --- formulas ---


def _linear(layer: nn.Linear, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    n = len(activation)
    tokens = activation.reshape(n, -1, activation.shape[-1])
    backprops = backprops.reshape(n, -1, backprops.shape[-1])
    return _of_tokens(layer, tokens, backprops)


def _of_tokens(layer: nn.Linear | nn.Conv2d, tokens: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    gradients: dict[nn.Parameter, Gradients] = {}
    if layer.weight.requires_grad:
        of_weight = OfTokens(tokens, backprops)
        cheaper = _ghost_is_cheaper(tokens.shape[1], tokens.shape[2], backprops.shape[2])
        gradients[_parameter(layer, "weight")] = of_weight if cheaper else Held(of_weight.of_each())
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[_parameter(layer, "bias")] = Held(backprops.sum(dim=1))
    return gradients


def _convolution(layer: nn.Conv2d, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    images, padding = padded(layer, activation)
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
    elif layer.groups == 1 and _ghost_is_cheaper(places, patch, layer.out_channels):
        of_weight = OfConvolution(layer, images, padding, backprops)
    else:
        of_weight = Held(_grouped(layer, images, padding, backprops))
    gradients[_parameter(layer, "weight")] = of_weight
    return gradients


def padded(layer: nn.Conv2d, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return a convolution's input and the zeros that are still to be put around it."""
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


def _weight_gradient(layer: nn.Conv2d, images: Tensor, padding: tuple[int, int], backprops: Tensor) -> Tensor:
    """Return the summed gradient of a weight. A large weight over few places is slow as a convolution."""
    if backprops.shape[2] * backprops.shape[3] <= _FEW_PLACES and layer.groups == 1:
        patches = functional.unfold(images, layer.kernel_size, layer.dilation, padding, layer.stride)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
        found = backprops.permute(1, 0, 2, 3).reshape(layer.out_channels, -1) @ rows
        return found.reshape(layer.weight.shape)
    return conv2d_weight(images, layer.weight.shape, backprops, layer.stride, padding, layer.dilation, layer.groups)


def _both_sides(padding: tuple[int, int]) -> list[int]:
    return [padding[1], padding[1], padding[0], padding[0]]


def _layer_norm(layer: nn.LayerNorm, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    n, shape = len(activation), tuple(layer.normalized_shape)
    backprops = backprops.reshape(n, -1, *shape)
    return _of_norm(
        layer, lambda: functional.layer_norm(activation, shape, eps=layer.eps).reshape(n, -1, *shape), backprops
    )


def _layer_norm_2d(layer: LayerNorm2d, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    return _layer_norm(layer, activation.permute(0, 2, 3, 1), backprops.permute(0, 2, 3, 1))


def _group_norm(layer: nn.GroupNorm, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    def normalised() -> Tensor:
        return functional.group_norm(activation, layer.num_groups, eps=layer.eps).flatten(2).transpose(1, 2)

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


def _block_scale(block: ConvNeXtBlock, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    outputs = activation if block.use_conv_mlp else activation.permute(0, 3, 1, 2)
    return {_parameter(block, "gamma"): Held((outputs * backprops).sum(dim=(2, 3)))}


def _functorch(layer: nn.Module, activation: Tensor, backprops: Tensor) -> dict[nn.Parameter, Gradients]:
    from opacus.grad_sample.functorch import ft_compute_per_sample_gradient

    found = ft_compute_per_sample_gradient(layer, [activation], backprops)
    return {parameter: Held(values.detach()) for parameter, values in found.items() if parameter.requires_grad}


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
        nn.Conv2d: _convolution,
        nn.LayerNorm: _layer_norm,
        layers.LayerNorm: _layer_norm,
        layers.LayerNorm2d: _layer_norm_2d,
        nn.GroupNorm: _group_norm,
        layers.LayerScale: _layer_scale,
    }
