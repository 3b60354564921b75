"""A half-finished training on disk: what a crash leaves of it, so that it goes on from its last epoch, bit for bit.

Tensors rest as safetensors, the rest as JSON in their metadata; nothing is pickled. A private training goes on inside the
reservation that it began with: its noise is new, its steps are counted on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from chainward_shared.errors import WeightsError
from chainward_shared.files import written
from chainward_shared.weights import StateDict, digest, load_file, save_file

logger = logging.getLogger("chainward.client")

SECONDS = 1.0
"""A training is written down after an epoch, at most this often: short epochs are sooner done again than written."""

SHARE = 0.05
"""Most of a training's time that goes into writing it down."""

_FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """A training as it was after an epoch.

    Attributes
    ----------
    epoch : epochs that were finished
    log : what was noted of them, by name
    reservation : number of the ledger's entry in which it began; None without privacy
    tensors : parameters, buffers, and the states of optimiser, generators and objective
    """

    epoch: int
    log: dict[str, list[float]]
    reservation: int | None
    tensors: StateDict


class Checkpoint:
    """Where one training writes itself down.

    Parameters
    ----------
    path : its file
    key : of all that decides the training: a file with another one is of another training
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.reservation: int | None = None
        """Number of the ledger's entry in which the training began; set by whoever reserved it."""
        self._written, self._cost = time.monotonic(), 0.0

    def load(self) -> Saved | None:
        """Return what was written; None if there is nothing, or nothing that can be used."""
        if not self.path.exists():
            return None
        try:
            tensors, metadata = load_file(self.path)
            meta = json.loads(metadata.get("training", "null"))
            if not isinstance(meta, dict) or (meta.get("format"), meta.get("key")) != (_FORMAT, self.key):
                return None
            if metadata.get("digest") != digest(tensors):
                raise WeightsError(f"{self.path}: not what was written")
        except (WeightsError, ValueError) as error:
            logger.warning("%s: damaged (%s); the training starts anew", self.path, error)
            return None
        return Saved(meta["epoch"], meta["log"], meta["reservation"], tensors)

    def save(self, epoch: int, log: Mapping[str, list[float]], tensors: StateDict, *, last: bool) -> None:
        """Write down a training after `epoch` epochs, unless it is the last, or the one before was written just now.

        Raises
        ------
        StoreError
            The site's disk is full or can't be written.
        """
        started = time.monotonic()
        if last or started - self._written < max(SECONDS, self._cost / SHARE):
            return
        meta = {"format": _FORMAT, "key": self.key, "epoch": epoch, "log": log, "reservation": self.reservation}
        with written(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, self.path, {"training": json.dumps(meta), "digest": digest(tensors)})
        self._written = time.monotonic()
        self._cost = self._written - started

    def remove(self) -> None:
        """Forget what was written."""
        self.path.unlink(missing_ok=True)


def training_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
    objective: Mapping[str, Tensor],
) -> StateDict:
    """Return all that a training needs to go on, as tensors on the CPU.

    Parameters
    ----------
    generators : by name; the state of PyTorch's own goes along
    objective : the objective's own state
    """
    tensors = {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}
    for number, parameter in enumerate(optimised(optimizer)):
        tensors[f"parameter.{number}"] = parameter
        tensors |= {f"optimizer.{number}.{name}": value for name, value in optimizer.state[parameter].items()}
    tensors |= {f"objective.{name}": value for name, value in objective.items()}
    tensors |= {f"generator.{name}": generator.get_state() for name, generator in generators.items()}
    tensors["torch.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["torch.cuda"] = torch.cuda.get_rng_state()
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def restore_training(
    tensors: StateDict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
) -> dict[str, Tensor]:
    """Put a training back to where it was, and return the objective's own state.

    Raises
    ------
    WeightsError
        The tensors are not of such a training.
    """
    try:
        for name, buffer in model.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        for number, parameter in enumerate(optimised(optimizer)):
            parameter.copy_(tensors[f"parameter.{number}"])
            start = f"optimizer.{number}."
            values = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            optimizer.state[parameter] = {name: value.clone().to(parameter.device) for name, value in values.items()}
        for name, generator in generators.items():
            generator.set_state(tensors[f"generator.{name}"])
        torch.set_rng_state(tensors["torch.cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["torch.cuda"])
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"a half-finished training does not fit ({error}); it starts anew") from error
    return {name.removeprefix("objective."): value for name, value in tensors.items() if name.startswith("objective.")}


def optimised(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimiser changes, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
