"""What an image adds to a private step is no longer than the clipping norm: whatever the weights, the images, the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.layers import LayerNorm2d, LayerScale, StdConv2d
from timm.layers.norm_act import GroupNormAct
from torch import nn
from torch.nn import functional

from chainward_client.private_training import PrivateTraining
from chainward_shared.models import build_model, resolve_architecture
from chainward_shared.models.ghost import GhostClipping
from chainward_shared.privacy.dp_sgd import DpSgd

SMALLEST, LARGEST = 1.4e-45, 3.4e38
LOSS_SCALES = (1e-45, 1e-38, 1e-30, 1e-25, 1e-23, 1e-19, 1e-10, 1.0, 1e10, 1e19, 1e25, 1e38)
CLIPS = (5e-324, 1e-300, 1e-45, 1e-33, 1e-10, 1.0, 1e10, 1e38, 1e308)
GROUP_NORM = {"norm_layer": "groupnorm", "channels": [32, 32, 64, 64], "layers": [1, 1, 1, 1], "stem_chs": 32}


class Tokens(nn.Module):
    def forward(self, images):
        return images.flatten(2).transpose(1, 2)


class Own(nn.Module):
    """A layer of a kind that has no formula."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(9))

    def forward(self, images):
        return images * self.weight.cos()


LAYERS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4 * 81, 7)),
    "linear on tokens": lambda: nn.Sequential(Tokens(), nn.Linear(4, 3)),
    "linear on few tokens": lambda: nn.Sequential(nn.AvgPool2d(4), Tokens(), nn.Linear(4, 16)),
    "convolution by patches": lambda: nn.Conv2d(4, 64, 3, stride=2, padding=1),
    "convolution by pixels": lambda: nn.Sequential(nn.AvgPool2d(3), nn.Conv2d(4, 64, 2, padding=1)),
    "convolution, held": lambda: nn.Conv2d(4, 2, 3),
    "convolution, depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "convolution, standardised": lambda: StdConv2d(4, 6, 3),
    "layer norm": lambda: nn.Sequential(Tokens(), nn.LayerNorm(4)),
    "layer norm 2d": lambda: LayerNorm2d(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "group norm and activation": lambda: GroupNormAct(4, group_size=2),
    "layer scale": lambda: nn.Sequential(Tokens(), LayerScale(4, 0.5)),
    "unknown": Own,
}


def pictures(channels=4, size=9, n=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(2))


def squares(model, images):
    return model(images).float().flatten(1).square().mean(dim=1)


def contributions(modules, losses, images, clip):
    """What each image adds to the sum, in units of the clipping norm, (n,): of the real sum, of one image."""
    ghost, added = GhostClipping(modules), []
    parameters = ghost.parameters
    for i in range(len(images)):
        losses(modules[0], images[i : i + 1]).sum().backward()
        sums = ghost.clipped_sum(1, clip)
        assert [one.shape for one in sums] == [one.shape for one in parameters]
        assert all(one.dtype == torch.float32 for one in sums)
        added.append(torch.cat([one.double().flatten() for one in sums]))
    ghost.close()
    return torch.stack(added)


def assert_bounded(modules, losses, images, clip):
    added = contributions(modules, losses, images, clip)
    assert bool(added.isfinite().all())
    assert float(added.norm(dim=1).max()) <= 1.0
    ghost = GhostClipping(modules)
    losses(modules[0], images).sum().backward()
    together = torch.cat([one.double().flatten() for one in ghost.clipped_sum(len(images), clip)])
    ghost.close()
    assert float((together - added.sum(dim=0)).norm()) <= 1e-3 * len(images)
    return added


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("inside", [False, True], ids=["first", "inside"])
def test_no_layer_lets_an_image_add_more_than_the_clipping_norm_at_any_size_of_loss_image_or_norm(kind, inside):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1) if inside else nn.Identity(), LAYERS[kind]()).train()
    images = pictures()
    for i, scale in enumerate(LOSS_SCALES):
        for clip in (1e-33, CLIPS[i % len(CLIPS)]):
            assert_bounded([model], lambda called, some, scale=scale: scale * squares(called, some), images, clip)
        sizes = scale * torch.tensor([1e-20, 1.0, 1e20])[:, None, None, None]
        assert_bounded([model], squares, images * sizes, 1.0)


@pytest.mark.parametrize(
    ("tokens", "backprops"),
    [
        (torch.tensor([[1.0, 0.0], [1e-30, 0.0]]), torch.tensor([[1e-30, 0.0], [1.0, 0.0]])),
        (torch.tensor([[1.0, 0.0], [1e-44, 0.0]]), torch.tensor([[1e-44, 0.0], [1.0, 0.0]])),
        (torch.tensor([[1e38, 0.0], [SMALLEST, 0.0]]), torch.tensor([[SMALLEST, 0.0], [LARGEST, 0.0]])),
        (torch.tensor([[1e30, 0.0], [1.0, 1.0]]), torch.tensor([[1e-40, 0.0], [1e-20, 1e-20]])),
        (torch.tensor([[LARGEST, LARGEST], [1.0, 0.0]]), torch.tensor([[LARGEST, 1.0], [1.0, 0.0]])),
        (torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[1e4, 1e4], [-1e4, -1e4 - 1e-3]])),
        (torch.tensor([[1e-23, 0.0], [0.0, 1e-23]]), torch.tensor([[1e-23, 0.0], [0.0, 1e-23]])),
    ],
)
def test_tokens_that_are_large_where_their_gradients_are_small_are_measured_all_the_same(tokens, backprops):
    layer = nn.Linear(2, 2, bias=False)
    for clip in (1e-40, 1e-30, 1.0, 1e30):
        assert_bounded(
            [layer], lambda called, some: (called(some) * backprops).flatten(1).sum(dim=1), tokens[None], clip
        )


def test_a_gradient_longer_than_the_norm_becomes_the_norm_and_a_shorter_one_stays_at_every_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 64, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(64 * 25, 3)).train()
    images = pictures(n=3)
    double = nn.Sequential(nn.Conv2d(4, 64, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(64 * 25, 3)).double()
    double.load_state_dict(model.state_dict())
    for scale in (1e-30, 1e-25, 1e-15, 1.0, 1e15):
        for i in range(3):
            double.zero_grad()
            squares(double, images[i : i + 1].double()).sum().backward()
            true = torch.cat([p.grad.flatten() for p in double.parameters()]) * scale
            for clip in (float(true.norm()) * 0.1, float(true.norm()) * 10):
                (found,) = contributions(
                    [model], lambda called, some, scale=scale: scale * squares(called, some), images[i : i + 1], clip
                )
                expected = true / max(clip, float(true.norm()))
                torch.testing.assert_close(found, expected, rtol=1e-2, atol=6e-3 * float(expected.abs().max()))


def backbone(name, size=32, patch=0):
    found = resolve_architecture(name, num_classes=3, in_chans=1, image_size=size, patch_size=patch)
    if name.startswith("resnetv2"):
        found = found.model_copy(update={"options": GROUP_NORM})
    if name.startswith("deit"):
        found = found.model_copy(update={"options": found.options | {"depth": 3}})  # of 12 that are alike
    return build_model(found, 1).train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "patch"),
    [("test_vit", 8), ("deit_tiny_patch16_224", 16), ("test_convnext", 0), ("resnetv2_18", 0)],
)
def test_every_family_keeps_to_the_norm_with_projector_images_without_label_and_extreme_settings(name, patch):
    """Two patients with several images; the step of one sampled image less is the step, less at most the norm."""
    torch.manual_seed(0)
    projector = nn.Linear(3, 4, bias=False)
    images = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0])
    patients, beside = np.array(["a", "a", "b", "c"]), np.array(["b", "d"])

    def step(rows, scale, clip):
        model = backbone(name, patch=patch)
        dp_sgd = DpSgd.model_construct(  # not validated: also of norms that no request may have
            unit="patient",
            delta=1e-5,
            noise_multiplier=0.0,
            sample_rate=1.0,
            expected_batch=1.0,
            steps=1,
            clip=clip,
        )
        private = PrivateTraining(dp_sgd, unlabelled_patients=beside, together=4)
        parameters = [*model.parameters(), *projector.parameters()]
        private.start(model, [projector], parameters, patients)
        for part in private.parts(torch.tensor(rows)):
            logits, n = model(images[part]), int((part < 4).sum())
            loss = functional.cross_entropy(logits[:n], labels[part[part < 4]], reduction="none")
            loss = loss + projector(logits[:n]).square().sum(dim=1)
            private.accumulate(torch.cat([loss, scale * logits[n:].square().sum(dim=1)]) * scale)
        sums = torch.cat([one.double().flatten() for one in private._sums])
        private.close()
        return sums

    for scale, clip in ((1e-25, 1e-33), (1.0, 1e-3), (1e30, 1.0), (1e-30, 1e38), (1e-40, 5e-324), (1.0, 1e308)):
        whole = step([0, 1, 2, 3, 4, 5], scale, clip)
        assert bool(whole.isfinite().all())
        for gone in (0, 4):
            apart = whole - step([row for row in range(6) if row != gone], scale, clip)
            assert float(apart.norm()) <= 1.0, (scale, clip, gone)
