"""Generated images and starts for benchmarks: random ones cost the same as real ones."""

from __future__ import annotations

import numpy as np
import torch

from chainward_client.data.site_data import Cases, SiteData
from chainward_shared.models import Architecture, Start, build_model, resolve_architecture
from chainward_shared.models.start import travelling_names
from chainward_shared.weights import StateDict


def generated_images(count: int, side: int) -> torch.Tensor:
    """Return uint8 images (count, 3, side, side)."""
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def generated_site(count: int, side: int, classes: int) -> SiteData:
    """Return a site with so many images of each split, each of a patient of its own."""
    patients = np.array([f"p{index}" for index in range(count)])
    cases = Cases(generated_images(count, side), torch.arange(count) % classes, patients)
    return SiteData("north", tuple("abcdefghij"[:classes]), dict.fromkeys(("train", "val", "test"), cases))


def started(backbone: str, part: str, side: int, classes: int) -> Architecture:
    """Return the architecture of a timm model that starts from pretrained weights, of which `part` is trained."""
    plain = resolve_architecture(backbone, num_classes=classes, in_chans=3, image_size=side, pretrained=True)
    return plain.model_copy(update={"start": Start(name=backbone, file="0" * 64, digest="0" * 64, part=part)})


def base_of(architecture: Architecture, seed: int) -> StateDict:
    """Return random weights in the place of the pretrained ones that an architecture starts from: all but the classifier's."""
    assert architecture.start is not None
    head = architecture.start.model_copy(update={"part": "head"})
    classifier = travelling_names(architecture.model_copy(update={"start": head}))
    state = build_model(architecture, seed=seed).state_dict()
    return {name: tensor for name, tensor in state.items() if name not in classifier}
