"""A whole run in this process, and all the models that it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from chainward_client.data.site_data import SiteData
from chainward_server.method import run_method
from chainward_shared.config import RunConfig
from chainward_shared.models import Architecture
from chainward_shared.models.of_run import student_architecture
from chainward_shared.protocol import TrainingLog
from chainward_shared.weights import StateDict
from chainward_simulations.runner import in_process


@dataclass
class Outcome:
    """What a run trained: the model after each hop (by its key), the last model of each strand, the chain's model,
    the students, the sites alone.

    `logs`: how every training went, by hop key, `alone-SITE` or `student-round-N-SITE`.
    """

    architecture: Architecture
    links: dict[str, StateDict] = field(default_factory=dict)
    alone: dict[str, StateDict] = field(default_factory=dict)
    strands: list[StateDict] = field(default_factory=list)
    chain: StateDict = field(default_factory=dict)
    student_architecture: Architecture | None = None
    student: StateDict | None = None
    logs: dict[str, TrainingLog] = field(default_factory=dict)


def run_in_process(
    config: RunConfig,
    sites: Mapping[str, SiteData],
) -> Outcome:
    """Run the method of `config` over `sites`; models are scored only where a score decides how the chain goes on."""
    with in_process(config, sites) as (run, trained):
        finished = run_method(run)
    models, links = run.checkpoints, [link for link in run.results.links if link.succeeded]
    first = {link.site: link.key for link in links if link.predecessor is None}
    return Outcome(
        run.architecture,
        links={link.key: models.load_model(link.key, run.template) for link in links},
        alone={
            record.site: trained.alone.get(record.site) or models.load_model(first[record.site], run.template)
            for record in run.results.alone
            if record.status == "done"
        },
        strands=finished.chain.strands,
        chain=finished.chain.model,
        student_architecture=None
        if finished.student is None
        else student_architecture(config.student, run.architecture),
        student=finished.student,
        logs=trained.logs,
    )


def equal(first: StateDict, second: StateDict) -> bool:
    """Return whether two state dicts have the same names and, bit for bit, the same values."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
