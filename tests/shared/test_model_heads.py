"""A head that is put into a model gives the logits that it gives on the model's embeddings, whatever the backbone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chainward_shared.discriminant import Head
from chainward_shared.errors import ModelError
from chainward_shared.models import build_model, resolve_architecture
from chainward_shared.models.heads import check_head, with_head
from chainward_shared.models.taps import Taps


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "resnetv2_50", "resnet18", "test_efficientnet"])
def test_logits_are_those_of_the_head_on_the_embedding(name):
    architecture = resolve_architecture(name, num_classes=3, in_chans=1, image_size=32)
    size = check_head(architecture)
    generator = np.random.default_rng(0)
    head = Head(generator.normal(size=(3, size)), generator.normal(size=3), 0.5)
    model = build_model(architecture, 1).eval()
    before = dict(model.state_dict())
    state = with_head(before, architecture, head)
    changed = {key for key in before if not torch.equal(before[key], state[key])}
    assert len(changed) == 2
    model.load_state_dict(state)
    with Taps(model, embedding=True) as taps, torch.no_grad():
        logits = model(torch.randn(5, 1, 32, 32))
        expected = taps.embedding.double().numpy() @ head.weight.T + head.bias
    assert np.allclose(logits.numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_backbone_with_two_classifiers_is_refused_in_words():
    architecture = resolve_architecture("deit_tiny_distilled_patch16_224", num_classes=3, in_chans=1, image_size=32)
    with pytest.raises(ModelError, match="one layer with a weight and a bias"):
        check_head(architecture)
