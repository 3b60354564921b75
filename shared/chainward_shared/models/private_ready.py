"""Which backbones can be trained privately: found out by running them, never by the names of their layers.

Private training clips the gradient of every example. Opacus computes those gradients in one pass in several ways
("modes"), each of which is wrong, or crashes, for some timm models; a wrong one does not clip what it should, and the
guarantee is void without any sign of it. So each mode is compared with the gradients of the examples one by one, on the
architecture itself at its own image size.

A backbone with batch norm is refused, not converted. A layer put in its place would make a model that
``timm.create_model`` can't rebuild from the architecture that travels with the weights, and the sites of one chain that
train without privacy would have another one. The family resnetv2 has group norm by an argument of timm's, which does
travel (`resolve_architecture` sets it).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from chainward_shared.errors import ModelError
from chainward_shared.models.architecture import Architecture, build_model, count_parameters, skeleton
from chainward_shared.models.ghost import GhostClipping, expandable, padded
from chainward_shared.models.taps import Taps

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleHooks

GradSampleMode = Literal["ghost", "hooks", "functorch", "ew"]
"""ghost: lengths and clipped sums without the gradients of single examples, see `models.ghost`. The others compute those:
hooks: Opacus' formula of each kind of layer (with a repair for convolutions). functorch: every layer through `vmap`.
ew: PyTorch's expanded weights."""
MODES: tuple[GradSampleMode, ...] = ("ghost", "hooks", "functorch", "ew")

READY = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "convnext_atto",
    "convnext_femto",
    "convnext_pico",
    "convnext_nano",
    "convnext_tiny",
    "resnetv2_18",
    "resnetv2_34",
    "resnetv2_50",
)
"""Backbones to name in a refusal. Whether one is ready is decided by running it, as for any other."""

GRADIENT_BYTES = 2**29
"""Gradients of single examples in memory at once, about; decides how many examples are computed together."""
MOST_TOGETHER = 64

_EXAMPLES = 3
_TIMED_EXAMPLES = 16
_TIMED_SECONDS = 0.5
_TOLERANCE = 1e-3
_MIXERS = (nn.modules.batchnorm._BatchNorm,)


def check_private_ready(architecture: Architecture, device: str = "cpu") -> GradSampleMode:
    """Return the fastest mode whose per-example gradients are right for this architecture; remembered in the process.

    The batch is three random images: their gradients, and their sums with all of them clipped, some, and none, are compared
    with those computed one by one. The loss reaches into the model as `Taps` do where it has any. Weights are moved off
    their initial values, so that a layer that starts at zero can't hide another's error. Buffers must be as before: what
    training writes into them is a function of many records. Time is taken on up to 16 images, as many as are computed
    together in training.

    Raises
    ------
    ModelError
        No mode is right. Says why, and which ready backbone is nearest.
    """
    return _checked(architecture.model_dump_json(), device)


def right_modes(architecture: Architecture, device: str = "cpu") -> dict[GradSampleMode, float | str]:
    """Return for each mode its seconds per image, forward, backward and clipping, where it is right, else what is wrong."""
    return {mode: _seconds_or_problem(architecture, mode, device) for mode in MODES}


class PerExampleGradients:
    """Clips the gradient of every example of a backward pass and adds them up.

    Parameters
    ----------
    model : its trainable parameters get per-example gradients; call `forward_of` instead of it
    mode : see `GradSampleMode`
    others : further modules, a projector say; by hooks unless the mode is ghost

    Losses are to be added up over the examples, not averaged, before the backward pass. Every mode but ghost puts the
    gradient of every example into each parameter's ``grad_sample``, (n, *shape).
    """

    def __init__(self, model: nn.Module, mode: GradSampleMode, others: Iterable[nn.Module] = ()) -> None:
        self.modules = [model, *others]
        self.forward_of: nn.Module = model
        self._hooks: list[GradSampleHooks] = []
        self._ghost: GhostClipping | None = None
        hooked = list(others)
        if mode == "ghost":
            self._ghost, hooked = GhostClipping(self.modules), []
        elif mode == "ew":
            self.forward_of = _expanded_weights(model)
        else:
            hooked.append(model)
        for module in hooked:
            self._hooks.append(
                _hooks_class()(module, loss_reduction="sum", strict=False, force_functorch=mode != "hooks")
            )

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of all modules."""
        return [p for module in self.modules for p in module.parameters() if p.requires_grad]

    def most_together(self) -> int:
        """Return how many examples fit into memory together: `GRADIENT_BYTES` of gradients, at most `MOST_TOGETHER`.

        In mode ghost only the gradients of layers without a formula count; what else it keeps is about as large as what a
        backward pass keeps anyway.
        """
        of_layers = self.modules if self._ghost is None else self._ghost.slow
        values = sum(p.numel() for layer in of_layers for p in layer.parameters() if p.requires_grad)
        return max(1, min(MOST_TOGETHER, GRADIENT_BYTES // max(1, 4 * values)))

    def clipped_sum(self, examples: int, clip: float) -> list[Tensor]:
        """Return the sum of the gradients of the last backward pass, each clipped to `clip`, and forget them.

        The length of an example's gradient is that over all of `parameters` together. An example whose gradient is not
        finite drops out.

        Returns
        -------
        One tensor for each of `parameters`, in its shape.

        Raises
        ------
        ModelError
            As `take`; in mode ghost also where a parameter is used outside of its own layer.
        """
        parameters = self.parameters()
        if self._ghost is not None:
            return self._ghost.clipped_sum(parameters, examples, clip, clip_factors)
        gradients = self.take(examples)
        factors = clip_factors(torch.stack([g.reshape(examples, -1).square().sum(dim=1) for g in gradients]), clip)
        dropped = factors == 0
        if bool(dropped.any()):  # zero times infinity is no zero
            for gradient in gradients:
                gradient[dropped] = 0.0
        return [torch.einsum("n,n...->...", factors, gradient) for gradient in gradients]

    def take(self, examples: int) -> list[Tensor]:
        """Return the gradients of the last backward pass, (examples, *shape) for each of `parameters`, and forget them.

        A parameter that the examples did not reach has zeros; one that only the first of them reached (a projector, which
        sees no image without label) has zeros for the rest.

        Raises
        ------
        ModelError
            A parameter has a gradient but no per-example gradients, or more of them than there are examples.
        """
        if self._ghost is not None:
            return self._ghost.of_each(self.parameters(), examples)
        taken = []
        for parameter in self.parameters():
            found = getattr(parameter, "grad_sample", None)
            if found is None and parameter.grad is not None:
                raise ModelError(
                    f"a parameter of shape {tuple(parameter.shape)} has a gradient but none of each example: the backbone "
                    "can't be trained privately"
                )
            if isinstance(found, list) or (found is not None and len(found) > examples):
                raise ModelError(
                    f"per-example gradients of {examples} examples come more than once; that is a fault here"
                )
            if found is None:
                found = parameter.new_zeros((examples, *parameter.shape))
            elif len(found) < examples:
                found = torch.cat([found, found.new_zeros((examples - len(found), *parameter.shape))])
            taken.append(found)
        self.forget()
        return taken

    def forget(self) -> None:
        """Drop gradients, per example and summed."""
        if self._ghost is not None:
            self._ghost.forget()
        for parameter in self.parameters():
            parameter.grad = None
            if hasattr(parameter, "grad_sample"):
                parameter.grad_sample = None

    def close(self) -> None:
        """Leave the modules as they were."""
        self.forget()
        if self._ghost is not None:
            self._ghost.close()
        for hooks in self._hooks:
            hooks.cleanup()
        self._hooks = []
        for parameter in self.parameters():
            for name in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, name):
                    delattr(parameter, name)


def clip_factors(squares: Tensor, clip: float) -> Tensor:
    """Return by what each example's gradient is multiplied to be no longer than `clip`, (n,).

    Parameters
    ----------
    squares : the squared lengths of the gradients with respect to each of p parameters, (p, n)

    An example whose gradient is not finite drops out, with the factor 0: a function of that example alone, as clipping is.
    """
    lengths = squares.sum(dim=0).sqrt()
    return torch.where(lengths.isfinite(), clip / lengths.clamp(min=clip), torch.zeros_like(lengths))


@lru_cache(maxsize=64)
def _checked(architecture_json: str, device: str) -> GradSampleMode:
    architecture = Architecture.model_validate_json(architecture_json)
    found = right_modes(architecture, device)
    seconds = {mode: value for mode, value in found.items() if isinstance(value, float)}
    if seconds:
        return min(seconds, key=lambda mode: seconds[mode])
    reason = _batch_norm(architecture) or str(found["hooks"])
    raise ModelError(
        f"backbone '{architecture.name}' can't be trained privately: {reason}; use a backbone that can, "
        f"e.g. '{_nearest_ready(architecture)}'"
    )


def _batch_norm(architecture: Architecture) -> str:
    if any(isinstance(module, _MIXERS) for module in skeleton(architecture).modules()):
        return "its batch norm mixes the images of a batch, so that no image has a gradient of its own"
    return ""


def _nearest_ready(architecture: Architecture) -> str:
    """Return the ready backbone nearest in size: of the same kind where that is attention, else a convolutional one."""
    attends = any("attn" in name for name, _ in skeleton(architecture).named_modules())
    size = math.log(count_parameters(skeleton(architecture)))

    def distance(name: str) -> float:
        ready = Architecture(name=name, num_classes=architecture.num_classes, in_chans=3, image_size=224)
        return abs(math.log(count_parameters(skeleton(ready))) - size)

    return min((name for name in READY if name.startswith(("vit", "deit")) == attends), key=distance)


def _seconds_or_problem(architecture: Architecture, mode: GradSampleMode, device: str) -> float | str:
    level = logging.getLogger("opacus").level
    logging.getLogger("opacus").setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]):
            return _compare(architecture, mode, device)
    except Exception as error:  # whatever Opacus, timm or PyTorch raise: the mode does not work for this model
        return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    finally:
        logging.getLogger("opacus").setLevel(level)


def _compare(architecture: Architecture, mode: GradSampleMode, device: str) -> float | str:
    model = build_model(architecture, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    _without_chance(model)
    shape = (_TIMED_EXAMPLES, architecture.in_chans, architecture.image_size, architecture.image_size)
    images = torch.randn(shape, generator=generator).to(device)
    labels = (torch.arange(_TIMED_EXAMPLES) % architecture.num_classes).to(device)
    model = model.to(device).train()
    before = [buffer.clone() for buffer in model.buffers()]
    taps = _taps(model)
    expected = [_gradients(model, images[i : i + 1], labels[i : i + 1], taps) for i in range(_EXAMPLES)]
    if taps is not None:
        taps.close()  # Opacus copies layers, hooks included, but can't copy what those hold
    taps = _taps(model)
    per_example = PerExampleGradients(model, mode)

    def backward(n: int) -> None:
        per_example.forget()
        _loss(per_example.forward_of, images[:n], labels[:n], taps).backward()

    try:
        if problem := _problem(model, per_example, lambda: backward(_EXAMPLES), expected):
            return f"{problem} (mode {mode})"
        if any(not torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True)):
            return "training writes into its buffers, which then hold something of every image"
        seconds, n = math.inf, _EXAMPLES
        for _ in range(3):
            started = time.perf_counter()
            backward(n)
            per_example.clipped_sum(n, 1.0)
            seconds = min(seconds, (time.perf_counter() - started) / n)
            n = max(1, min(_TIMED_EXAMPLES, per_example.most_together(), int(_TIMED_SECONDS / seconds)))
        return seconds
    finally:
        per_example.close()
        if taps is not None:
            taps.close()


def _problem(
    model: nn.Module, per_example: PerExampleGradients, backward: Callable[[], None], expected: list[list[Tensor]]
) -> str:
    """Return what is wrong with the gradients of single examples, or with their clipped sums; empty if all is right."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    lengths = [math.sqrt(sum(float(g.square().sum()) for g in one)) for one in expected]
    whole = max(lengths)

    def apart(mine: Tensor, theirs: Tensor, scale: float) -> bool:
        near = _TOLERANCE * (float(theirs.norm()) + 1e-2 * scale)
        return mine.shape != theirs.shape or not float((mine - theirs).norm()) <= near

    backward()
    for i, (name, mine) in enumerate(zip(names, per_example.take(_EXAMPLES), strict=True)):
        if apart(mine, torch.stack([one[i] for one in expected]), whole):
            return f"the gradients of single images for '{name}' are wrong"
    for clip in (0.5 * min(lengths), math.sqrt(min(lengths) * whole), 2 * whole):
        backward()
        factors = [min(1.0, clip / length) for length in lengths]
        for i, (name, mine) in enumerate(zip(names, per_example.clipped_sum(_EXAMPLES, clip), strict=True)):
            theirs = torch.stack([f * one[i] for f, one in zip(factors, expected, strict=True)]).sum(dim=0)
            if apart(mine, theirs, min(clip, whole)):
                return f"the sum of clipped gradients for '{name}' is wrong"
    return ""


def _loss(model: nn.Module, images: Tensor, labels: Tensor, taps: Taps | None) -> Tensor:
    logits = model(images)
    logits = logits[0] if isinstance(logits, tuple) else logits
    loss = logits.sum() if logits.shape[1] == 1 else functional.cross_entropy(logits, labels, reduction="sum")
    if taps is not None:  # attention transfer and privileged teachers reach into the model
        loss = loss + sum(
            (functional.normalize(one, dim=1)[:, ::2].sum() for one in taps.attention), loss.new_zeros(())
        )
        loss = loss + functional.normalize(taps.embedding, dim=1)[:, ::2].sum()
    return loss


def _taps(model: nn.Module) -> Taps | None:
    try:
        return Taps(model, attention=True, embedding=True)
    except ModelError:  # nothing can look into this model, and nothing will
        return None


def _gradients(model: nn.Module, images: Tensor, labels: Tensor, taps: Taps | None) -> list[Tensor]:
    model.zero_grad()
    _loss(model, images, labels, taps).backward()
    return [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for parameter in model.parameters()
        if parameter.requires_grad
    ]


def _without_chance(model: nn.Module) -> None:
    """Switch off dropout and stochastic depth, which treat each image on its own but can't be compared."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _expanded_weights(model: nn.Module) -> nn.Module:
    from opacus.grad_sample import GradSampleModuleExpandedWeights

    return GradSampleModuleExpandedWeights(model, loss_reduction="sum")


@lru_cache(maxsize=1)
def _hooks_class() -> type[GradSampleHooks]:
    """Return Opacus' hooks, made right for this project's models; Opacus is imported only where it is used.

    * The gradient of a layer's output is read from the tensor, not from a module's backward hook: that one misses what
      reaches the output through a `Taps` (attention transfer on queries and keys), and forbids in-place residuals.
    * A parameter with a leading 1 beside other layers (class token, position embedding) is expanded over the batch and
      gets its gradients from that. Opacus hands its whole module, for a ViT the whole model, to functorch, which runs
      everything twice and sees nothing but the module's output: attention transfer would be left out without a sign.
    * Convolutions: see `_convolution`.
    """
    from opacus.grad_sample import GradSampleHooks
    from opacus.grad_sample.functorch import prepare_layer

    class Hooks(GradSampleHooks):  # type: ignore[misc]
        GRAD_SAMPLERS: dict[type[nn.Module], Callable[..., Any]] = {  # noqa: RUF012
            **GradSampleHooks.GRAD_SAMPLERS,
            nn.Conv2d: _convolution,
        }

        def iterate_submodules(self, module: nn.Module) -> Iterable[nn.Module]:
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own and not expandable(module):
                yield module
                if type(module) not in self.GRAD_SAMPLERS:
                    return
            for child in module.children():
                yield from self.iterate_submodules(child)

        def add_hooks(self, *, loss_reduction: str, batch_first: bool, force_functorch: bool) -> None:
            handles: list[Any] = []
            self._module.autograd_grad_sample_hooks = self.autograd_grad_sample_hooks = handles
            for module in self.iterate_submodules(self._module):
                if force_functorch or type(module) not in self.GRAD_SAMPLERS:
                    prepare_layer(module, batch_first=batch_first)
                handles.append(module.register_forward_hook(self._watch_output))
            for module in self._module.modules():
                if expandable(module):
                    handles.append(module.register_forward_pre_hook(self._expand))
                    handles.append(module.register_forward_hook(_contract, always_call=True))
            self.enable_hooks()

        def _watch_output(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not (self.hooks_enabled and module.training and torch.is_grad_enabled() and output.requires_grad):
                return
            self.capture_activations_hook(module, list(inputs), output)

            def on_gradient(gradient: Tensor) -> None:
                self.capture_backprops_hook(
                    module, None, (gradient,), loss_reduction=self.loss_reduction, batch_first=self.batch_first
                )

            output.register_hook(on_gradient)

        def _expand(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not (self.hooks_enabled and module.training and torch.is_grad_enabled()):
                return
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    expanded = parameter.expand(len(inputs[0]), *parameter.shape[1:])
                    expanded.register_hook(_keeper(parameter))
                    module.__dict__[name] = expanded  # found before the parameter, which stays registered

    return Hooks


def _keeper(parameter: nn.Parameter) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        of_each = gradient.unsqueeze(1).clone()  # (n, 1, ...): the parameter's own leading 1 became the batch
        found = getattr(parameter, "grad_sample", None)
        parameter.grad_sample = of_each if found is None else [found, of_each]  # type: ignore[attr-defined]

    return keep


def _contract(module: nn.Module, *_: object) -> None:
    for name, _parameter in module.named_parameters(recurse=False):
        module.__dict__.pop(name, None)


def _convolution(layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Return the per-example gradients of a convolution.

    Opacus 1.6 reads the pixels of an input without padding in the order of memory, whatever that is: wrong for
    channels-last inputs, such as those behind timm's ``LayerNorm2d``. And it computes all pairs of groups to keep those of
    a group with itself, out of reach for a depthwise convolution.
    """
    gradients: dict[Tensor, Tensor] = {}
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[layer.bias] = backprops.sum(dim=(2, 3))
    if not layer.weight.requires_grad:
        return gradients
    images, padding = padded(layer, activations[0].to(backprops.dtype))
    patches = functional.unfold(images, layer.kernel_size, layer.dilation, padding, layer.stride)
    n, groups = len(images), layer.groups
    patches = patches.reshape(n, groups, -1, patches.shape[-1])
    outputs = backprops.reshape(n, groups, -1, patches.shape[-1])
    gradients[layer.weight] = torch.einsum("ngol,ngkl->ngok", outputs, patches).reshape(n, *layer.weight.shape)
    return gradients
