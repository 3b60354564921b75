"""What privacy costs: one private step beside a plain one."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch.nn import functional

from chainward_client.precision import training_environment
from chainward_client.private_training import PrivateTraining
from chainward_shared.config import StudentConfig
from chainward_shared.models import Architecture, build_model, count_parameters, resolve_architecture
from chainward_shared.models.of_run import student_architecture
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_simulations.benchmark.figures import (
    Aim,
    Backbone,
    Measured,
    Options,
    Report,
    Table,
    in_fresh_process,
    in_turn,
)

StepKind = Literal["plain", "private"]
KINDS: tuple[StepKind, ...] = ("plain", "private")

AIM = Aim("at most", 1.5)
BACKBONES = (Backbone("convnext_atto"), Backbone("vit_tiny_patch16_224", 8), Backbone("resnetv2_18"))
CLASSES, CHANNELS = 4, 1
MIB, MILLISECOND = 2**20, 1e-3


@dataclass(frozen=True)
class StepCost:
    """One model's steps with one number of threads.

    Attributes
    ----------
    seconds : of a whole step, forward, backward, noise and optimiser, by kind
    noise_seconds : of these in a private step for noise and division
    peak_bytes : largest resident memory of a fresh process during two steps, less that of the model before the first
    """

    model: str
    parameters: int
    threads: int
    seconds: dict[StepKind, Measured]
    noise_seconds: Measured
    peak_bytes: dict[StepKind, int]

    @property
    def ratio(self) -> Measured:
        """The ratio of the private step's seconds to those of a plain step, repeat by repeat."""
        return self.seconds["private"].ratio_to(self.seconds["plain"])

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row for each kind of step."""
        noise = f"{self.noise_seconds.median / MILLISECOND:.1f}"
        compared = {"plain": ("-", "-", "-"), "private": (self.ratio.text(2), noise, AIM.text(self.ratio.median))}
        model = f"{self.model} ({self.parameters / 1e6:.1f} M)"
        found: list[tuple[str, ...]] = []
        for kind, seconds in self.seconds.items():
            memory = f"{self.peak_bytes[kind] / MIB:.0f}"
            found.append((model, str(self.threads), kind, seconds.text(1, MILLISECOND), *compared[kind], memory))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return every measurement, and the median ratio to a plain step."""
        return {**asdict(self), "ratio_to_plain": self.ratio.median}


@dataclass
class Steps:
    """One model and its optimiser, ready to do steps of one kind on one batch; the private ones of exactly so many images, not of
    a sample. `noise_seconds`: of each private step."""

    architecture: Architecture
    kind: StepKind
    batch: int
    noise_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (self.batch, CHANNELS, self.architecture.image_size, self.architecture.image_size)
        self.images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(self.batch) % CLASSES
        self.model = build_model(self.architecture, seed=0).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        if self.kind == "private":
            dp_sgd = DpSgd(
                unit="image",
                delta=1e-5,
                noise_multiplier=1.0,
                sample_rate=1.0,
                expected_batch=float(self.batch),
                steps=10**6,
                clip=1.0,
            )
            self.private = PrivateTraining(dp_sgd)
            patients = np.array([str(row) for row in range(self.batch)])
            self.private.start(self.model, [], list(self.model.parameters()), patients)

    def step(self) -> float:
        """Do a step and return its seconds."""
        started = time.perf_counter()
        if self.kind == "plain":
            self.optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(self.model(self.images), self.labels).backward()
        else:
            for rows in self.private.parts(torch.arange(len(self.images))):
                logits = self.model(self.images[rows])
                self.private.accumulate(functional.cross_entropy(logits, self.labels[rows], reduction="none"))
            before = time.perf_counter()
            self.private.finish_step()
            self.noise_seconds.append(time.perf_counter() - before)
        self.optimizer.step()
        return time.perf_counter() - started

    def close(self) -> None:
        """Take what a private step needs off the model again."""
        if self.kind == "private":
            self.private.close()


def models(backbones: tuple[Backbone, ...], image_size: int) -> dict[str, Architecture]:
    """Return the architectures of backbones by name, and that of the default student of the first."""
    found = {
        str(one): resolve_architecture(
            one.name, num_classes=CLASSES, in_chans=CHANNELS, image_size=image_size, patch_size=one.patch_size
        )
        for one in backbones
    }
    first = str(backbones[0])
    return {**found, f"student of {first}": student_architecture(StudentConfig(), found[first])}


def measure(options: Options) -> Report:
    """Return the cost of a private step for each model, with one thread and with as many as are asked for."""
    backbones = options.backbones or ((Backbone("test_convnext"),) if options.quick else BACKBONES)
    image_size, batch = (32, 4) if options.quick else (64, 32)
    repeats = options.repeats or (2 if options.quick else 7)
    threads = [1] if options.quick else sorted({1, options.threads})
    costs = [
        cost_of(name, architecture, batch, count, repeats, options.say)
        for name, architecture in models(backbones, image_size).items()
        for count in threads
    ]
    table = Table(
        "Cost of privacy, one step",
        ("model", "threads", "step", "ms", "ratio to plain", "of it noise, ms", "aim", "memory, MiB"),
        [row for cost in costs for row in cost.rows()],
        [
            f"Median (smallest to largest) of {repeats} steps of {batch} images of "
            f"{image_size} pixels, fp32, both kinds in one process in turn: forward, backward, clipping, noise, AdamW. "
            "Ratios are taken within a repeat. "
            "Memory: by how much a fresh process grows at most during two steps, beyond the model."
        ],
    )
    return [table], [cost.to_json() for cost in costs]


def cost_of(
    name: str, architecture: Architecture, batch: int, threads: int, repeats: int, say: Callable[[str], None]
) -> StepCost:
    """Return what steps of one model cost, with so many threads."""
    peaks = {kind: peak_bytes(architecture.model_dump_json(), kind, batch) for kind in KINDS}
    with training_environment(threads, 0), ExitStack() as stack:
        steps = {kind: stack.enter_context(closing(Steps(architecture, kind, batch))) for kind in KINDS}
        told = f"steps of {name}, {threads} thread(s)"
        seconds = in_turn(KINDS, repeats, lambda kind: steps[kind].step(), lambda line: say(f"{told}: {line}"))
        noise = Measured(tuple(steps["private"].noise_seconds[1:]))
        parameters = count_parameters(steps["plain"].model)
    return StepCost(name, parameters, threads, seconds, noise, peaks)


@cache
def peak_bytes(architecture_json: str, kind: StepKind, batch: int) -> int:
    """Return by how much resident memory grows during two steps, at its largest, in a process of its own, one thread."""
    return in_fresh_process(_growth, architecture_json, kind, batch)


def _growth(architecture_json: str, kind: StepKind, batch: int) -> int:
    with training_environment(1, 0):
        steps = Steps(Architecture.model_validate_json(architecture_json), kind, batch)
        before = int(psutil.Process().memory_info().rss)
        steps.step()
        steps.step()
        return _largest_resident() - before


def _largest_resident() -> int:
    """Return the largest resident memory of this process: on Linux since it started its program, not its parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
