"""Time the plain in-process runner on the configuration of a finished run, in a process of its own.

``python -m chainward_simulations.benchmark.reference RUN_FOLDER`` prints one JSON object, a `Reference`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from chainward_server.method import run_method
from chainward_server.run_folder import RunFolder
from chainward_shared.models.of_run import student_architecture
from chainward_shared.weights import digest
from chainward_simulations.runner import in_process, open_sites


class Reference(BaseModel):
    """Seconds of the coordinator's phases without Flower, and digests of the models that came out.

    Attributes
    ----------
    phases : "chain", "alone", "students", "evaluation"; each with the scoring that the coordinator does in it
    data_seconds : making or reading the data of all sites, in no phase
    """

    model_config = ConfigDict(extra="forbid")

    phases: dict[str, float]
    data_seconds: float
    digests: dict[str, str]


def time_reference(run_folder: Path) -> Reference:
    """Run the configuration of `run_folder` in this process, scoring all that the coordinator scores, and time it."""
    config = RunFolder.open(run_folder).config
    started = time.monotonic()
    sites = open_sites(config)
    data_seconds = time.monotonic() - started
    phases = dict.fromkeys(("chain", "alone", "students", "evaluation"), 0.0)

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        phases[phase] += time.monotonic() - began

    with in_process(config, sites, on_step, score_all=True) as (run, _):
        finished = run_method(run, timed)
        models = {"chain": (run.architecture, finished.chain.model)}
        with timed("evaluation"):
            if finished.student is not None:
                small = student_architecture(config.student, run.architecture)
                models["student"] = small, finished.student
                run.score(small, finished.student, ["test"])
            for model in models.values():
                run.localise(*model)
    digests = {name: digest(state) for name, (_, state) in models.items()}
    return Reference(phases=phases, data_seconds=data_seconds, digests=digests)


def on_step(step: str) -> None:
    """Say on stderr what was trained."""
    print(f"in process: {step}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(time_reference(Path(sys.argv[1])).model_dump_json())
