"""The optimiser's parameters, and the learning rate from step to step."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from chainward_client.training.objective import Objective


def parameter_groups(
    model: nn.Module, objective: Objective, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of one weight decay and one ``lr_scale``, a factor on the learning rate."""
    # seconds of CPU: see `chainward_shared.models.architecture`
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    groups: list[dict[str, Any]] = (
        param_groups_weight_decay(model, weight_decay)
        if layer_decay == 1
        else param_groups_layer_decay(model, weight_decay, layer_decay=layer_decay)
    )
    if extra := objective.extra_parameters():
        groups.append({"params": extra, "weight_decay": weight_decay})
    return groups


def one_cycle(
    optimizer: torch.optim.Optimizer, peak: float, steps: int, part: tuple[int, int]
) -> torch.optim.lr_scheduler.OneCycleLR:
    """Return the schedule of part `part[0]` of `part[1]`, of `steps` each.

    A training of one step gets the first of two: the last of a cycle has a rate at which nothing is learned.
    """
    index, of = part
    peaks = [peak * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=max(2, of * steps))
    skip_steps(schedule, index * steps)
    return schedule


def skip_steps(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    """Move a schedule on by steps that were done elsewhere: in another part, or before a crash."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step")
        for _ in range(steps):
            schedule.step()
