"""Time the plain in-process runner on the configuration of a finished run, in a process of its own.

``python -m chainward_simulations.benchmark.reference RUN_FOLDER`` prints one JSON object, a `Reference`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from chainward_client.data.site_data import SplitName
from chainward_server.run_folder import RunFolder
from chainward_shared.models import Architecture
from chainward_shared.weights import StateDict, digest
from chainward_simulations.runner import open_sites, run_in_process, score


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
    """Run the configuration of `run_folder` with `run_in_process`, score what the coordinator scores, and time it."""
    config = RunFolder.open(run_folder).config
    started = time.monotonic()
    sites = open_sites(config)
    opened = time.monotonic()
    phases = dict.fromkeys(("chain", "alone", "students", "evaluation"), 0.0)
    last = opened

    def note(phase: str) -> None:
        nonlocal last
        now = time.monotonic()
        phases[phase] += now - last
        last = now

    def on_step(step: str) -> None:
        first_word = step.partition(" ")[0]
        note({"alone": "alone", "student": "students"}.get(first_word, "chain"))
        print(f"in process: {step}", file=sys.stderr, flush=True)

    outcome = run_in_process(config, sites, on_step)

    def evaluate(
        phase: str, states: Sequence[StateDict], architecture: Architecture, splits: Sequence[SplitName]
    ) -> None:
        for state in states:
            for split in splits:
                score(state, architecture, sites, config, split)
        note(phase)

    links = list(outcome.links.values())
    evaluate("chain", links, outcome.architecture, ("val", "test"))
    alone = [state for state in outcome.alone.values() if not any(state is link for link in links)]
    evaluate("alone", alone, outcome.architecture, ("val", "test"))
    digests = {"chain": digest(outcome.chain)}
    if outcome.student is not None and outcome.student_architecture is not None:
        rounds = config.student.rounds + config.student.finetune_rounds
        evaluate("students", [outcome.student] * rounds, outcome.student_architecture, ("val",))
        evaluate("evaluation", [outcome.student], outcome.student_architecture, ("test",))
        digests["student"] = digest(outcome.student)
    return Reference(phases=phases, data_seconds=opened - started, digests=digests)


if __name__ == "__main__":
    print(time_reference(Path(sys.argv[1])).model_dump_json())
