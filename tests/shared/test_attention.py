"""Attention transfer against a slow reference."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from chainward_shared.distillation.attention import attention_transfer
from chainward_shared.errors import ModelError
from chainward_shared.models.taps import Taps


def maps_of(seed: int, rows: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(rows, positions, generator=generator) for positions in (64, 16, 4)]


def slow_attention_transfer(link: list[torch.Tensor], predecessor: list[torch.Tensor]) -> list[float]:
    totals = []
    for row in range(len(link[0])):
        total = 0.0
        for q_maps, p_maps in zip(link, predecessor, strict=True):
            q, p = q_maps[row].double().numpy(), p_maps[row].double().numpy()
            q = q / np.sqrt((q**2).sum()) if q.any() else q
            p = p / np.sqrt((p**2).sum()) if p.any() else p
            total += float(((q - p) ** 2).sum())
        totals.append(total)
    return totals


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e15])
def test_it_equals_the_slow_one_whatever_the_size_of_the_activations(scale):
    link, predecessor = [scale * map_ for map_ in maps_of(0)], maps_of(1)
    found = attention_transfer(link, predecessor)
    assert found.shape == (5,)
    torch.testing.assert_close(found.double(), torch.tensor(slow_attention_transfer(link, predecessor)).double())


def test_orthogonal_maps_are_at_two_and_equal_ones_at_zero():
    q, p = torch.tensor([[3.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.0, 7.0], [5.0, 5.0]])
    assert attention_transfer([q], [p]).tolist() == pytest.approx([2.0, 0.0])


def test_a_map_of_zeros_stays_zeros_and_gets_no_gradient():
    link = [torch.stack([torch.zeros(16), torch.rand(16)]).requires_grad_()]
    loss = attention_transfer(link, [torch.rand(2, 16)])
    loss.sum().backward()
    assert loss[0].item() == pytest.approx(1.0)
    assert torch.all(link[0].grad[0] == 0)
    assert torch.all(link[0].grad[1] != 0)
    assert attention_transfer([torch.zeros(1, 4)], [torch.zeros(1, 4)]).item() == 0


def test_each_value_is_a_function_of_its_own_example():
    link, predecessor = maps_of(0), maps_of(1)
    alone = [attention_transfer([q[i : i + 1] for q in link], [p[i : i + 1] for p in predecessor]) for i in range(5)]
    torch.testing.assert_close(attention_transfer(link, predecessor), torch.cat(alone), rtol=0, atol=0)


def test_gradients_are_those_of_the_formula():
    link, predecessor = [q.double().requires_grad_() for q in maps_of(0, rows=2)], maps_of(1, rows=2)

    def formula() -> torch.Tensor:
        stages = zip(link, predecessor, strict=True)
        return sum(
            (q / q.norm(dim=1, keepdim=True) - p.double() / p.double().norm(dim=1, keepdim=True)).square().sum()
            for q, p in stages
        )

    expected = torch.autograd.grad(formula(), link)
    found = torch.autograd.grad(attention_transfer(link, predecessor).sum(), link)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_gradients_flow_to_the_link_only(name):
    options = {"img_size": 64} if name == "test_vit" else {}
    link, predecessor = timm.create_model(name, **options), timm.create_model(name, **options)
    images = torch.randn(4, 3, 64, 64)
    with Taps(link, attention=True) as own, Taps(predecessor, attention=True) as before:
        link(images)
        predecessor(images)
        attention_transfer(own.attention, before.attention).sum().backward()
    assert all(p.grad is None for p in predecessor.parameters())
    assert any(p.grad is not None and p.grad.any() for p in link.parameters())


def test_a_model_compared_with_itself_has_nothing_to_learn():
    model = timm.create_model("test_vit", img_size=64).eval()
    with Taps(model, attention=True) as taps:
        model(torch.randn(3, 3, 64, 64))
        assert attention_transfer(taps.attention, taps.attention).max() < 1e-10


@pytest.mark.parametrize(
    ("link", "predecessor"),
    [
        ([torch.rand(2, 4)], [torch.rand(2, 9)]),
        ([torch.rand(2, 4)], [torch.rand(2, 4), torch.rand(2, 4)]),
        ([torch.rand(2, 4)], [torch.rand(3, 4)]),
        ([], []),
    ],
)
def test_maps_that_dont_match_are_refused(link, predecessor):
    with pytest.raises(ModelError, match="same stages and positions"):
        attention_transfer(link, predecessor)
