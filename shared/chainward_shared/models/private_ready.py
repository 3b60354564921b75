"""Which backbones can be trained privately: found out by running them, never by the names of their layers.

Private training clips the gradient of every example (`models.ghost`). A layer whose gradients were computed wrongly would
not be clipped as it should, and the guarantee would be void without any sign of it. So the clipped sums are compared with
gradients of the examples one by one, on the architecture itself at its own image size.

A backbone with batch norm is refused, not converted. A layer put in its place would make a model that
``timm.create_model`` can't rebuild from the architecture that travels with the weights, and the sites of one chain that
train without privacy would have another one. The family resnetv2 has group norm by an argument of timm's, which does
travel (`resolve_architecture` sets it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from chainward_shared.errors import ModelError
from chainward_shared.models.architecture import Architecture, build_model, count_parameters, skeleton
from chainward_shared.models.ghost import ROOM, GhostClipping
from chainward_shared.models.parts import batch_norms
from chainward_shared.models.start import train_mode
from chainward_shared.models.taps import Taps

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

_EXAMPLES = 3
_TOLERANCE = 1e-3


def check_private_ready(architecture: Architecture, device: str = "cpu") -> None:
    """Check that private training clips this architecture's gradients as it should; the answer is remembered.

    The batch is three random images: the sums of their gradients, with all of them clipped, some, and none, are compared
    with those computed one by one. The loss reaches into the model as `Taps` do where it has any. Weights are moved off
    their initial values, so that a layer that starts at zero can't hide another's error. Buffers must be as before: what
    training writes into them is a function of many records.

    Raises
    ------
    ModelError
        Says what is wrong, and which ready backbone is nearest.
    """
    if problem := _problem_of(architecture.model_dump_json(), device):
        raise ModelError(
            f"backbone '{architecture.name}' can't be trained privately: {problem}; use a backbone that can, "
            f"e.g. '{_nearest_ready(architecture)}'"
        )


@lru_cache(maxsize=64)
def _problem_of(architecture_json: str, device: str) -> str:
    """Return what is wrong with private training of an architecture; empty if nothing is."""
    architecture = Architecture.model_validate_json(architecture_json)
    if architecture.start is None and any(True for _ in batch_norms(skeleton(architecture))):
        return "its batch norm mixes the images of a batch, so that no image has a gradient of its own"
    try:
        with torch.random.fork_rng(devices=[]):
            return _compare(architecture, device)
    except ModelError as error:
        return str(error)
    except Exception as error:  # whatever timm or PyTorch raise: private training does not work for this model
        return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _nearest_ready(architecture: Architecture) -> str:
    """Return the ready backbone nearest in size: of the same kind where that is attention, else a convolutional one."""
    attends = any("attn" in name for name, _ in skeleton(architecture).named_modules())
    size = math.log(count_parameters(skeleton(architecture)))

    def distance(name: str) -> float:
        ready = Architecture(name=name, num_classes=architecture.num_classes, in_chans=3, image_size=224)
        return abs(math.log(count_parameters(skeleton(ready))) - size)

    return min((name for name in READY if name.startswith(("vit", "deit")) == attends), key=distance)


def _compare(architecture: Architecture, device: str) -> str:
    model = build_model(architecture, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    _without_randomness(model)
    shape = (_EXAMPLES, architecture.in_chans, architecture.image_size, architecture.image_size)
    images = torch.randn(shape, generator=generator).to(device)
    labels = (torch.arange(_EXAMPLES) % architecture.num_classes).to(device)
    _normalise(model.to(device), images)
    train_mode(model)
    before = [buffer.clone() for buffer in model.buffers()]
    taps = _taps(model)
    expected = [_gradients(model, images[i : i + 1], labels[i : i + 1], taps) for i in range(_EXAMPLES)]
    model.zero_grad()
    ghost = GhostClipping([model])
    try:
        problem = _problem(model, ghost, lambda: _loss(model, images, labels, taps).backward(), expected)
    finally:
        ghost.close()
        if taps is not None:
            taps.close()
    if not problem and any(not torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True)):
        return "training writes into its buffers, which then hold something of every image"
    return problem


def _normalise(model: nn.Module, images: Tensor) -> None:
    """Give batch norm the statistics of `images`, as pretrained ones are of images, too.

    With those that a layer is initialised with nothing would be normalised, and gradients might vanish or run off.
    """
    layers = [layer for layer in batch_norms(model) if isinstance(layer, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    model.train()
    if layers:
        with torch.no_grad():
            model(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def _problem(model: nn.Module, ghost: GhostClipping, backward: Callable[[], None], expected: list[list[Tensor]]) -> str:
    """Return what is wrong with the clipped sums of gradients; empty if all is right."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    lengths = [math.sqrt(sum(float(g.square().sum()) for g in one)) for one in expected]
    whole = max(lengths)
    for clip in (0.5 * min(lengths), math.sqrt(min(lengths) * whole), 2 * whole):
        backward()
        factors = [min(1.0, ROOM * clip / length) for length in lengths]
        for i, (name, mine) in enumerate(zip(names, ghost.clipped_sum(_EXAMPLES, clip), strict=True)):
            theirs = torch.stack([f * one[i] for f, one in zip(factors, expected, strict=True)]).sum(dim=0)
            near = _TOLERANCE * (float(theirs.norm()) + 1e-2 * min(clip, whole))
            if mine.shape != theirs.shape or not float((clip * mine - theirs).norm()) <= near:
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


def _without_randomness(model: nn.Module) -> None:
    """Switch off dropout and stochastic depth, which treat each image on its own but can't be compared."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
