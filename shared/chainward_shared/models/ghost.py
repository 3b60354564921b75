"""Clipped sums of gradients without the gradients of the single examples: ghost clipping with book-keeping.

Private training needs two things of a backward pass: how long the gradient of each example is, over all parameters, and the
sum of these gradients, each scaled so that it is no longer than the clipping norm. For a layer that multiplies tokens
``a`` (T, d) by a weight, the gradient of an example is ``b^T a`` (p, d), where ``b`` (T, p) is the gradient at the layer's
output. Its length follows from two (T, T) matrices, ``|b^T a|^2 = sum((a a^T) * (b b^T))`` (ghost norm: Goodfellow 2015,
arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679, section 4; for convolutions Bu et al. 2022, arXiv:2205.10683), and with
``a`` and ``b`` kept, the clipped sum is one product of matrices, the same as in plain training, without a second backward
pass (book-keeping: Bu et al. 2023, arXiv:2210.00038, section 2.2).

While a layer runs, its parameters are hidden from autograd: what autograd would compute for them is not needed. In return a
parameter that does get a gradient from autograd was used in a way that is not seen here, and the step is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chainward_shared.errors import ModelError
from chainward_shared.models.gradient_formulas import (
    Formula,
    block_scale,
    formulas,
    frozen_batch_norm,
    group_norm,
    of_any_layer,
)
from chainward_shared.models.per_example import Gradients, Held, of_views

GRADIENT_BYTES = 2**29
"""Gradients of single examples in memory at once, about; decides how many examples are computed together."""
MOST_TOGETHER = 64
ROOM = 0.995
"""A clipped gradient has this share of the clipping norm, not all of it: sums in float32 round."""
_LARGEST_FACTOR = 2.0**1000


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
    example by example before they are measured. Of layers of unknown types the gradients of each example are computed.
    Losses are to be added up over the examples, not averaged.

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

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of all modules."""
        return [p for module in self._modules for p in module.parameters() if p.requires_grad]

    def most_together(self) -> int:
        """Return how many examples fit into memory together: `GRADIENT_BYTES` of gradients, at most `MOST_TOGETHER`.

        Only the gradients of layers without a formula count; what else is kept is about as large as what a backward pass
        keeps anyway.
        """
        values = sum(p.numel() for layer in self.slow for p in layer.parameters() if p.requires_grad)
        return max(1, min(MOST_TOGETHER, GRADIENT_BYTES // max(1, 4 * values)))

    def clipped_sum(self, examples: int, clip: float, views: int = 1) -> list[Tensor]:
        """Return the sum of the gradients of the last backward pass, each clipped, in units of `clip`, and forget them.

        The length of an example's gradient is that over all of `parameters` together. What an example adds has a length of
        at most 1, whatever its gradient: one that is not finite adds nothing. In units of `clip`, so that no clipping norm
        is too small or too large for the numbers of a step.

        Parameters
        ----------
        examples : number of losses that were added up before the backward pass; a parameter that only the first of them
            reached (a projector, which sees no image without label) has zeros for the rest
        clip : above 0
        views : rows of each example, one after another; its gradient is that of the sum of their losses

        Returns
        -------
        One tensor for each of `parameters`, in its shape.

        Raises
        ------
        ModelError
            A parameter was used in a way that is not seen here, or there are more gradients than examples.
        """
        parameters = self.parameters
        found = [self._gradients_of(parameter, examples, views) for parameter in parameters]
        self.forget()
        with torch.no_grad(), _full_precision():
            lengths = torch.zeros(len(parameters), examples, dtype=torch.float64, device=parameters[0].device)
            for row, gradients in zip(lengths, found, strict=True):
                if gradients is not None:
                    row[: gradients.examples] = gradients.lengths()
            factors = clip_factors(lengths, clip)
            all_count = bool((factors > 0).all())
            sums = []
            for i, parameter in enumerate(parameters):
                gradients, found[i] = found[i], None  # what is done makes room
                if gradients is None:
                    sums.append(torch.zeros_like(parameter))
                    continue
                of_these = factors[: gradients.examples]
                rows = None if all_count else of_these.nonzero().squeeze(1)  # zero times infinity is no zero
                sums.append(gradients.weighted_sum(of_these, rows).reshape(parameter.shape))
        return sums

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
            self._watch_between(module, group_norm, "drop")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and known in (nn.BatchNorm2d, norm_act.BatchNormAct2d):
            self._hide(module, [module])
            if known is nn.BatchNorm2d:
                self._handles.append(module.register_forward_hook(partial(self._watch, frozen_batch_norm)))
            else:
                self._watch_between(module, frozen_batch_norm, "drop")
        elif known is convnext.ConvNeXtBlock:
            self._hide(module, [module])
            self._watch_between(module, block_scale, "drop_path", source="mlp")
        elif _expandable(module):
            self._handles.append(module.register_forward_pre_hook(self._expand))
            self._handles.append(module.register_forward_hook(_show, always_call=True))
        else:
            formula = of_any_layer(module)
            self.slow.append(module)
            self._hide(module, list(module.modules()))
            self._handles.append(module.register_forward_hook(partial(self._watch, formula)))
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

    def _gradients_of(self, parameter: nn.Parameter, examples: int, views: int) -> Gradients | None:
        if parameter.grad is not None:
            raise ModelError(
                f"a parameter of shape {tuple(parameter.shape)} is used outside of its layer, where the gradients of "
                "single images are not seen: the backbone can't be trained privately"
            )
        found = [of_views(gradients, views) for gradients in self._found.get(parameter, [])]
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


def _expandable(module: nn.Module) -> bool:
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
    # batch norm with the statistics of pretrained weights trains in evaluation mode: `models.start.train_mode`
    return (module.training or isinstance(module, nn.modules.batchnorm._BatchNorm)) and torch.is_grad_enabled()


def _show(module: nn.Module, *_: object) -> None:
    """Let a module's parameters be seen again; also a hook after its pass."""
    for name in dict(module.named_parameters(recurse=False)):
        module.__dict__.pop(name, None)


def clip_factors(lengths: Tensor, clip: float) -> Tensor:
    """Return by what each example's gradient is multiplied so that its length is at most 1, float64 (n,).

    Parameters
    ----------
    lengths : of the gradients with respect to each of p parameters, float64 (p, n)
    clip : the length that becomes 1

    An example whose gradient is not finite drops out, with the factor 0: a function of that example alone, as clipping is.
    """
    whole = torch.linalg.vector_norm(lengths, dim=0)
    factors = (ROOM / whole.clamp(min=ROOM * clip)).clamp(max=_LARGEST_FACTOR)
    return torch.where(whole.isfinite(), factors, 0.0)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply in float32 on every device: cuDNN's convolutions would keep ten bits of each number (TF32)."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
