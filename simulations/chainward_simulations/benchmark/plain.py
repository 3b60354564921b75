"""A link in plain PyTorch, the obvious way: what Chainward's training loop is measured against."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from chainward_client.data.site_data import SiteData
from chainward_client.precision import best_device
from chainward_client.training.augmentation import STRENGTHS, Strength
from chainward_shared.models import Architecture, build_model
from chainward_shared.recipes import LinkRecipe
from chainward_shared.weights import StateDict


def train_plain_link(
    data: SiteData,
    architecture: Architecture,
    recipe: LinkRecipe,
    predecessor: StateDict | None,
    *,
    start: StateDict | None = None,
) -> tuple[StateDict, float]:
    """Train a link as `recipe` says, in fp32, and return its weights and the seconds of the loop.

    Same losses, optimiser, schedule and augmentation as Chainward's; other random numbers. Of the recipe's choices it
    knows the defaults only: warm start, cross-entropy adjusted by the class frequencies, trust by label. `start`: weights to
    begin with, where there is no predecessor that also teaches.
    """
    device = best_device()
    model, teacher = build_model(architecture, recipe.seed), None
    if start is not None:
        model.load_state_dict(start)
    if predecessor is not None:
        model.load_state_dict(predecessor)
        teacher = build_model(architecture, recipe.seed)
        teacher.load_state_dict(predecessor)
    started = time.perf_counter()
    _train(model, teacher, data, recipe, device)
    model.to("cpu").eval()
    return dict(model.state_dict()), time.perf_counter() - started


def _train(
    model: nn.Module, teacher: nn.Module | None, data: SiteData, recipe: LinkRecipe, device: torch.device
) -> None:
    cases = data.splits["train"]
    images = (cases.images.float() / 255 - 0.5) / 0.25
    batches = DataLoader(TensorDataset(images, cases.labels), batch_size=recipe.batch_size, shuffle=True)
    counts = torch.bincount(cases.labels, minlength=len(data.classes)).to(device)
    log_prior = (counts / counts.sum()).log()
    strength = STRENGTHS.get(recipe.augmentation)

    model.to(device).train()
    if teacher is not None:
        teacher.to(device).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, epochs=recipe.epochs, steps_per_epoch=len(batches)
    )
    for epoch in range(recipe.epochs):
        temperature = max(1.0, recipe.temperature * recipe.temperature_decay**epoch)
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            if strength is not None:
                x = _augment(x, strength)
            logits = model(x)
            loss = functional.cross_entropy(logits + log_prior, y)
            if teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher(x)
                    probabilities = teacher_logits.softmax(dim=1)
                    trust = probabilities.gather(1, y[:, None]).squeeze(1) / probabilities.max(dim=1).values
                divergence = functional.kl_div(
                    functional.log_softmax(logits / temperature, dim=1),
                    functional.softmax(teacher_logits / temperature, dim=1),
                    reduction="none",
                ).sum(dim=1)
                distillation = (trust * temperature**2 * divergence).mean()
                loss = (1 - recipe.distillation_weight) * loss + recipe.distillation_weight * distillation
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _augment(images: Tensor, strength: Strength) -> Tensor:
    """Turn, shift and zoom each image of a batch, (n, c, h, w), at random, and change its contrast and brightness."""
    n, device = len(images), images.device
    angle = torch.empty(n, device=device).uniform_(-strength.rotation, strength.rotation).deg2rad()
    zoom = torch.empty(n, device=device).uniform_(1 - strength.zoom, 1 + strength.zoom)
    mirror = torch.ones(n, device=device)
    if strength.flips:
        mirror[torch.rand(n, device=device) < 0.5] = -1
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = zoom * angle.cos() * mirror
    theta[:, 0, 1] = -zoom * angle.sin()
    theta[:, 1, 0] = zoom * angle.sin() * mirror
    theta[:, 1, 1] = zoom * angle.cos()
    theta[:, :, 2].uniform_(-2 * strength.shift, 2 * strength.shift)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    images = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast = torch.empty(n, 1, 1, 1, device=device).uniform_(1 - strength.contrast, 1 + strength.contrast)
    brightness = torch.empty(n, 1, 1, 1, device=device).uniform_(-strength.brightness, strength.brightness)
    return images * contrast + brightness / 0.25
