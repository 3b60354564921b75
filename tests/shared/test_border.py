"""A backbone either sees every pixel of its images or is refused."""

from __future__ import annotations

import pytest
import torch

from chainward_shared.errors import ModelError
from chainward_shared.models import build_model, resolve_architecture

# families that cut images into patches or windows in different ways, at sizes that these don't fill
AWKWARD = [
    ("beit_base_patch16_224", 28),
    ("cait_xxs24_224", 28),
    ("eva02_tiny_patch14_224", 64),
    ("pit_ti_224", 28),
    ("vit_relpos_small_patch16_224", 28),
    ("vit_tiny_patch16_224", 40),
    ("mixer_s16_224", 40),
    ("xcit_tiny_12_p16_224", 40),
    ("test_vit", 40),
]
SEEING = [
    ("pit_ti_224", 32),
    ("vit_relpos_small_patch16_224", 32),
    ("convnext_atto", 60),
    ("pvt_v2_b0", 60),
    ("poolformer_s12", 60),
]


def resolved(name: str, side: int) -> torch.nn.Module:
    return build_model(resolve_architecture(name, num_classes=2, in_chans=1, image_size=side), 0).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), AWKWARD)
def test_a_backbone_that_would_not_see_the_border_is_refused(name: str, side: int) -> None:
    with pytest.raises(ModelError):
        resolve_architecture(name, num_classes=2, in_chans=1, image_size=side)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), SEEING)
def test_a_backbone_that_is_not_refused_answers_to_every_pixel_of_the_border(name: str, side: int) -> None:
    """Against the plain trial: change one row or column of the border, and look whether anything changes."""
    model = resolved(name, side)
    image = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model.forward_features(image)
        for index in (0, side - 1):
            for axis in (2, 3):
                changed = image.clone()
                changed.select(axis, index).add_(5.0)
                assert not torch.equal(model.forward_features(changed), before)


@pytest.mark.slow
def test_the_refusal_names_sizes_that_work() -> None:
    with pytest.raises(ModelError, match=r"does not see the border of images of 28 pixels.*choose images of 16 or 32"):
        resolve_architecture("cait_xxs24_224", num_classes=2, in_chans=1, image_size=28)
    for side in (16, 32):
        resolve_architecture("cait_xxs24_224", num_classes=2, in_chans=1, image_size=side)
