"""What privacy costs: one private step beside a plain one."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional

from chainward_client.precision import training_environment
from chainward_client.private_training import PrivateTraining
from chainward_shared.config import StudentConfig
from chainward_shared.models import Architecture, build_model, resolve_architecture
from chainward_shared.models.of_run import student_architecture
from chainward_shared.privacy.dp_sgd import DpSgd
from chainward_simulations.benchmark.figures import Aim, Measured, Table
from chainward_simulations.benchmark.training import Backbone

StepKind = Literal["plain", "private"]
KINDS: tuple[StepKind, ...] = ("plain", "private")

PRIVATE_AIM = Aim("at most", 1.5)
CLASSES, CHANNELS = 4, 1
MIB = 2**20


@dataclass(frozen=True)
class PrivateStepWorkload:
    """What to measure.

    Parameters
    ----------
    backbones : the default student of the first is measured too
    image_size : pixels
    batch : images of a step; the private one is of exactly as many, not of a sample
    threads : CPU threads of a step, one after the other
    repeats : measured steps of each kind; one more comes first and isn't counted
    """

    backbones: tuple[Backbone, ...] = (
        Backbone("convnext_atto"),
        Backbone("vit_tiny_patch16_224", 8),
        Backbone("resnetv2_18"),
    )
    image_size: int = 64
    batch: int = 32
    threads: tuple[int, ...] = (1, 2)
    repeats: int = 7

    @classmethod
    def quick(cls) -> PrivateStepWorkload:
        """Return a workload of a few seconds that exercises everything; its figures say nothing."""
        return cls((Backbone("test_convnext"),), image_size=32, batch=4, threads=(1,), repeats=2)

    def models(self) -> dict[str, Architecture]:
        """Return what is measured, by name."""
        found = {str(one): self._resolved(one) for one in self.backbones}
        student = student_architecture(StudentConfig(), self._resolved(self.backbones[0]))
        return {**found, f"student of {self.backbones[0]}": student}

    def _resolved(self, backbone: Backbone) -> Architecture:
        return resolve_architecture(
            backbone.name,
            num_classes=CLASSES,
            in_chans=CHANNELS,
            image_size=self.image_size,
            patch_size=backbone.patch_size,
        )


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

    def to_json(self) -> dict[str, Any]:
        """Return every measurement, and the median ratio to a plain step."""
        return {**asdict(self), "ratio_to_plain": self.ratio.median}


class _Steps:
    """One model and its optimiser, ready to do steps of one kind on one batch."""

    def __init__(self, architecture: Architecture, kind: StepKind, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (batch, architecture.in_chans, architecture.image_size, architecture.image_size)
        self.images = torch.randn(shape, generator=generator)
        self.labels = torch.arange(batch) % architecture.num_classes
        self.model = build_model(architecture, seed=0).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.noise_seconds = 0.0
        self.private: PrivateTraining | None = None
        if kind != "plain":
            dp_sgd = DpSgd(
                unit="image",
                delta=1e-5,
                noise_multiplier=1.0,
                sample_rate=1.0,
                expected_batch=float(batch),
                steps=10**6,
                clip=1.0,
            )
            self.private = PrivateTraining(dp_sgd)
            patients = np.array([str(row) for row in range(batch)])
            self.private.start(self.model, [], list(self.model.parameters()), patients)

    def step(self) -> float:
        """Do a step and return its seconds."""
        started = time.perf_counter()
        if self.private is None:
            self.optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(self.model(self.images), self.labels).backward()
        else:
            for rows in self.private.parts(torch.arange(len(self.images))):
                self.private.accumulate(self._losses(rows))
            before = time.perf_counter()
            self.private.finish_step()
            self.noise_seconds = time.perf_counter() - before
        self.optimizer.step()
        return time.perf_counter() - started

    def close(self) -> None:
        if self.private is not None:
            self.private.close()

    def _losses(self, rows: Tensor) -> Tensor:
        return functional.cross_entropy(self.model(self.images[rows]), self.labels[rows], reduction="none")


def measure_private_steps(
    workload: PrivateStepWorkload, on_step: Callable[[str], None] = lambda step: None
) -> list[StepCost]:
    """Return the cost of a private step for each model and number of threads of the workload.

    In each repeat both kinds do one step; the order changes, so that a machine that slows down does so for both.
    """
    measured = []
    for name, architecture in workload.models().items():
        peaks = {kind: peak_bytes(architecture, kind, workload.batch) for kind in KINDS}
        on_step(f"memory of a step of {name}")
        for threads in workload.threads:
            with training_environment(threads, 0), _all_of(architecture, workload.batch) as steps:
                times: dict[StepKind, list[float]] = {kind: [] for kind in KINDS}
                noises: list[float] = []
                for repeat in range(-1, workload.repeats):
                    for kind in KINDS if repeat % 2 else KINDS[::-1]:
                        taken = steps[kind].step()
                        if repeat >= 0:
                            times[kind].append(taken)
                    if repeat >= 0:
                        noises.append(steps["private"].noise_seconds)
                    on_step(f"steps of {name}, {threads} thread(s): {repeat + 1} of {workload.repeats}")
            measured.append(
                StepCost(
                    model=name,
                    parameters=sum(p.numel() for p in steps["plain"].model.parameters()),
                    threads=threads,
                    seconds={kind: Measured(tuple(values)) for kind, values in times.items()},
                    noise_seconds=Measured(tuple(noises)),
                    peak_bytes=peaks,
                )
            )
    return measured


@contextmanager
def _all_of(architecture: Architecture, batch: int) -> Iterator[dict[StepKind, _Steps]]:
    steps = {kind: _Steps(architecture, kind, batch) for kind in KINDS}
    try:
        yield steps
    finally:
        for one in steps.values():
            one.close()


def peak_bytes(architecture: Architecture, kind: StepKind, batch: int) -> int:
    """Return by how much resident memory grows during two steps, at its largest, in a process of its own, one thread."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_growth, architecture.model_dump_json(), kind, batch).result()


def _growth(architecture_json: str, kind: StepKind, batch: int) -> int:
    with training_environment(1, 0):
        steps = _Steps(Architecture.model_validate_json(architecture_json), kind, batch)
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
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def private_table(measured: Sequence[StepCost], workload: PrivateStepWorkload) -> Table:
    """Return the table of private steps beside plain ones."""
    table = Table(
        "Cost of privacy, one step",
        ("model", "threads", "step", "ms", "ratio to plain", "of it noise, ms", "aim", "memory, MiB"),
        notes=[
            f"Median (smallest to largest) of {workload.repeats} steps of {workload.batch} images of "
            f"{workload.image_size} pixels, fp32, both kinds in one process in turn: forward, backward, clipping, noise, AdamW. "
            "Ratios are taken within a repeat. "
            "Memory: by how much a fresh process grows at most during two steps, beyond the model."
        ],
    )
    for cost in measured:
        for kind, seconds in cost.seconds.items():
            plain = kind == "plain"
            table.rows.append(
                (
                    f"{cost.model} ({cost.parameters / 1e6:.1f} M)",
                    str(cost.threads),
                    kind,
                    _milliseconds(seconds),
                    "-" if plain else cost.ratio.text(2),
                    "-" if plain else f"{1e3 * cost.noise_seconds.median:.1f}",
                    "-" if plain else PRIVATE_AIM.text(cost.ratio.median),
                    f"{cost.peak_bytes[kind] / MIB:.0f}",
                )
            )
    return table


def _milliseconds(seconds: Measured) -> str:
    return Measured(tuple(1e3 * value for value in seconds.values)).text(1)


def with_choices(
    workload: PrivateStepWorkload, backbones: tuple[Backbone, ...], repeats: int | None, threads: int
) -> PrivateStepWorkload:
    """Return the workload with what the command line chose; steps are measured with one thread and with `threads`."""
    return replace(
        workload,
        backbones=backbones or workload.backbones,
        repeats=repeats or workload.repeats,
        threads=tuple(sorted({*workload.threads[:1], threads})) if len(workload.threads) > 1 else workload.threads,
    )
