"""Sums of clipped gradients without the gradients themselves: equal to those clipped one by one, on every kind of layer."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import Conv2dSame, LayerNorm2d, LayerScale, StdConv2d
from timm.layers.norm_act import GroupNormAct
from torch import nn
from torch.nn import functional

from chainward_shared.errors import ModelError
from chainward_shared.models import Start, build_model, per_example, private_ready, resolve_architecture
from chainward_shared.models.ghost import ROOM, GhostClipping
from chainward_shared.models.private_ready import check_private_ready
from chainward_shared.models.taps import Taps
from chainward_shared.models.trunk import trunk_of

N = 5


def clipped_one_by_one(modules, losses, images, clip):
    """The obvious way; also returns how long each gradient is."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    total, lengths = [torch.zeros_like(p) for p in parameters], []
    for i in range(len(images)):
        for parameter in parameters:
            parameter.grad = None
        losses(modules[0], images[i : i + 1]).sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        lengths.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
        for sum_of, gradient in zip(total, gradients, strict=True):
            sum_of += gradient * min(1.0, ROOM * clip / lengths[-1])
    for parameter in parameters:
        parameter.grad = None
    return total, sorted(lengths)


def assert_clips_as_one_by_one(modules, losses, images, rtol=1e-3):
    """At a clipping norm that all exceed, one that some exceed, and one that none exceeds."""
    _, lengths = clipped_one_by_one(modules, losses, images, 1.0)
    assert lengths[0] < lengths[-1]
    for clip in (0.5 * lengths[0], (lengths[0] + lengths[-1]) / 2, 2 * lengths[-1]):
        expected, _ = clipped_one_by_one(modules, losses, images, clip)
        whole = math.sqrt(sum(float(e.square().sum()) for e in expected))
        ghost = GhostClipping(modules)
        losses(modules[0], images).sum().backward()
        found = [clip * one for one in ghost.clipped_sum(len(images), clip)]
        ghost.close()
        assert [f.shape for f in found] == [e.shape for e in expected]
        for mine, theirs in zip(found, expected, strict=True):
            assert float((mine - theirs).norm()) <= rtol * (float(theirs.norm()) + 1e-2 * whole)


def noisy(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def pictures(channels=3, size=32, n=N):
    images = torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(2))
    return images * torch.linspace(0.3, 2.0, n)[:, None, None, None]


def squares(model, images):
    return model(images).flatten(1).square().sum(dim=1)


BACKBONES = [("convnext_atto", 64, 0), ("test_convnext", 32, 0), ("test_vit", 32, 8), ("vit_tiny_patch16_224", 32, 8)]


def architecture_of(name, size, patch):
    return resolve_architecture(name, num_classes=3, in_chans=3, image_size=size, patch_size=patch)


def backbone_of(name, size, patch):
    return noisy(build_model(architecture_of(name, size, patch), 0))


SMALL_RESNETV2 = architecture_of("resnetv2_18", 32, 0).model_copy(
    update={
        "options": {"norm_layer": "groupnorm", "channels": [32, 32, 64, 64], "layers": [1, 1, 1, 1], "stem_chs": 32}
    }
)


def small_resnetv2():
    return noisy(build_model(SMALL_RESNETV2, 0))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "patch"), BACKBONES)
def test_backbones_clip_as_one_by_one_with_a_projector_and_taps(name, size, patch):
    torch.manual_seed(0)
    model, projector = backbone_of(name, size, patch), nn.Linear(3, 4, bias=False)
    taps = Taps(model, attention=True, embedding=True)

    def losses(called, images):
        logits = called(images)
        loss = logits.square().sum(dim=1) + projector(logits).square().sum(dim=1)
        loss = loss + 10 * functional.normalize(taps.embedding, dim=1)[:, ::2].sum(dim=1)
        return loss + sum(10 * functional.normalize(one, dim=1)[:, ::2].sum(dim=1) for one in taps.attention)

    assert_clips_as_one_by_one([model, projector], losses, pictures(size=size))
    taps.close()


def test_a_vision_transformer_clips_as_one_by_one_on_what_its_frozen_trunk_made_of_the_images():
    start = Start(name="test_vit", file="0" * 64, digest="0" * 64, part="last-2")
    model = noisy(build_model(architecture_of("test_vit", 32, 8).model_copy(update={"start": start}), 0))
    trunk = trunk_of(model)
    assert_clips_as_one_by_one([model], lambda _, features: squares(trunk.rest, features), trunk(pictures()).detach())


def test_resnetv2_clips_as_one_by_one():
    assert_clips_as_one_by_one([small_resnetv2()], squares, pictures())


@pytest.mark.parametrize(("name", "size", "patch"), BACKBONES)
def test_backbones_have_no_layer_that_needs_the_gradients_of_single_images(name, size, patch):
    ghost = GhostClipping([backbone_of(name, size, patch)])
    assert ghost.slow == []
    ghost.close()


class Tokens(nn.Module):
    def forward(self, images):
        return images.flatten(2).transpose(1, 2)


LAYERS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, padding=1, dilation=2),
    nn.Conv2d(4, 64, 2, stride=2, bias=False),
    nn.Conv2d(4, 64, 3, stride=2, padding=1),
    nn.Conv2d(4, 128, 3, padding=(2, 1)),
    nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2),
    nn.Conv2d(4, 4, 5, padding="same", groups=4),
    nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False),
    nn.Conv2d(4, 4, (3, 2), stride=(2, 1), dilation=(1, 2), groups=4),
    nn.Conv2d(4, 8, 3, groups=4),
    nn.Conv2d(4, 4, (3, 1), padding=(1, 0), padding_mode="reflect"),
    Conv2dSame(4, 6, 3, stride=2),
    Conv2dSame(4, 4, 5, stride=2, groups=4, bias=False),
    nn.Conv2d(4, 96, 1),
    nn.Conv2d(4, 5, 1, stride=2),
    LayerNorm2d(4),
    nn.GroupNorm(2, 4),
    GroupNormAct(4, group_size=2),
    StdConv2d(4, 6, 3),
    nn.Sequential(Tokens(), nn.Linear(4, 64)),
    nn.Sequential(Tokens(), nn.Linear(4, 3, bias=False)),
    nn.Sequential(Tokens(), nn.LayerNorm(4)),
    nn.Sequential(Tokens(), nn.LayerNorm(4, bias=False)),
    nn.Sequential(Tokens(), LayerScale(4, 0.5)),
    nn.Sequential(nn.Flatten(), nn.Linear(4 * 81, 7)),
    nn.Sequential(Tokens(), nn.RMSNorm(4)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels-last"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "inside"])
def test_a_layer_clips_as_one_by_one(layer, memory, first):
    torch.manual_seed(0)
    model = noisy(nn.Sequential(nn.Identity() if first else nn.Conv2d(4, 4, 1), layer))
    assert_clips_as_one_by_one([model], squares, pictures(4, 9).contiguous(memory_format=memory), rtol=1e-4)


class Doubled(nn.Module):
    """A parameter with no layer of its own, a layer that is called twice, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.linear, self.other, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.other.weight = self.linear.weight

    def forward(self, tokens):
        return self.head(self.other(torch.tanh(self.linear(torch.tanh(self.linear(tokens))))))


class Own(nn.Module):
    """A layer of a kind that is not known here, with layers inside."""

    def __init__(self):
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

    def forward(self, tokens):
        return self.linear(tokens * self.weight.cos()) + tokens


def test_layers_called_twice_and_weights_that_are_shared_are_added_up_before_they_are_measured():
    torch.manual_seed(0)
    model = Doubled()
    del model.weight
    assert_clips_as_one_by_one([model], squares, torch.randn(N, 7, 6) * torch.arange(1, N + 1)[:, None, None])


def test_an_unknown_layer_in_the_middle_is_computed_example_by_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Own(), nn.Linear(6, 2))
    ghost = GhostClipping([model])
    assert [type(layer) for layer in ghost.slow] == [Own]
    ghost.close()
    assert_clips_as_one_by_one([model], squares, torch.randn(N, 7, 6) * torch.arange(1, N + 1)[:, None, None])


def test_a_layer_that_only_the_first_examples_reach_adds_nothing_to_the_others():
    torch.manual_seed(0)
    model, projector = nn.Linear(6, 6), nn.Linear(6, 3)
    tokens, clip = torch.randn(N, 6), 3.0
    rows = iter([1, 1, 0, 0, 0])

    def one_loss(called, some):
        outputs = called(some)
        loss = outputs.square().sum(dim=1)
        return loss + projector(outputs).square().sum(dim=1) if next(rows) else loss

    expected, _ = clipped_one_by_one([model, projector], one_loss, tokens, clip)
    ghost = GhostClipping([model, projector])
    outputs = model(tokens)
    loss = outputs.square().sum(dim=1)
    torch.cat([loss[:2] + projector(outputs[:2]).square().sum(dim=1), loss[2:]]).sum().backward()
    for mine, theirs in zip(ghost.clipped_sum(N, clip), expected, strict=True):
        torch.testing.assert_close(clip * mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_parameter_used_outside_of_its_layer_is_refused():
    model = nn.Linear(6, 6)
    ghost = GhostClipping([model])
    (model(torch.randn(N, 6)).square().sum() + model.weight.sum()).backward()
    with pytest.raises(ModelError, match="used outside of its layer"):
        ghost.clipped_sum(N, 1.0)


def test_a_layer_whose_rows_are_no_examples_is_refused():
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 6))
    ghost = GhostClipping([model])
    model(torch.randn(N, 3, 6)).square().sum().backward()
    with pytest.raises(ModelError, match=f"15 gradients of {N} examples"):
        ghost.clipped_sum(N, 1.0)


def test_an_input_that_is_changed_in_place_is_refused():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = self.other(x)
            y = self.linear(x)
            return x.mul_(2.0) + y

    model = InPlace()
    GhostClipping([model])
    with pytest.raises(ModelError, match="changed in place"):
        model(torch.randn(N, 6)).square().sum().backward()


def test_a_gradient_that_cancels_over_its_tokens_is_never_taken_for_shorter_than_it_is():
    """Two tokens, all but the same, with opposite gradients of length 1e4: what is left is lost in a (T, T) matrix."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    tokens = torch.randn(1, 1, 64).repeat(1, 2, 1)
    tokens[:, 1] += 1e-5 * torch.randn(64)
    signs = 1e4 * torch.tensor([1.0, -1.0])[None, :, None]
    ghost = GhostClipping([model])
    (model(tokens) * signs).sum().backward()
    (total,) = ghost.clipped_sum(1, 1.0)
    assert float(total.norm()) <= 1.0


@pytest.mark.parametrize(
    "make", [small_resnetv2, lambda: backbone_of("test_convnext", 32, 0), lambda: nn.Sequential(Own())]
)
def test_a_model_is_as_before_after_closing_also_after_an_error_in_the_middle(make):
    class Stop(nn.Module):
        def forward(self, x):
            raise RuntimeError("stop")

    model = make()
    images = torch.randn(2, 3, 6) if isinstance(model, nn.Sequential) else pictures(n=2)
    expected = model(images)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    ghost = GhostClipping([model])
    assert all(p.requires_grad for p in ghost.parameters)
    last = list(model.modules())[-1]
    forward, last.forward = last.forward, Stop().forward
    with pytest.raises(RuntimeError, match="stop"):
        model(images)
    last.forward = forward
    del last.forward
    ghost.close()
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(model(images), expected)
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_a_kept_loss_keeps_no_activations_of_a_step_that_is_done():
    import gc
    import weakref

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    ghost, kept = GhostClipping([model]), []
    handle = model[0].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    loss = model(torch.randn(N, 3, 6)).square().sum()
    loss.backward()
    ghost.clipped_sum(N, 1.0)
    handle.remove()
    gc.collect()
    assert loss.requires_grad
    assert kept[0]() is None


def test_as_many_images_are_computed_together_as_their_gradients_fit_into_memory():
    known = GhostClipping([nn.Linear(4096, 4096, bias=False)])  # 64 MiB, which nobody holds for each image
    unknown = GhostClipping([nn.ModuleList([nn.Bilinear(256, 256, 256, bias=False)])])
    assert (known.most_together(), unknown.most_together()) == (64, 8)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["OfTokens", "OfConvolution", "Held"])
def test_the_check_of_a_backbone_finds_lengths_that_are_too_short(monkeypatch, broken):
    kind = getattr(per_example, broken)
    honest = kind.lengths
    monkeypatch.setattr(kind, "lengths", lambda self: 0.9 * honest(self))
    private_ready._problem_of.cache_clear()
    try:
        with pytest.raises(ModelError, match="the sum of clipped gradients"):
            check_private_ready(SMALL_RESNETV2 if broken == "OfConvolution" else architecture_of("test_vit", 32, 8))
    finally:
        private_ready._problem_of.cache_clear()
