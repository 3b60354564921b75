"""The Flower `ClientApp` of a simulation: its nodes play the sites that messages name, with the files that messages name.

No hospital runs it: it works only on a node that Flower's simulation has started.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from chainward_client.bases import Bases
from chainward_client.data.site_data import SiteData
from chainward_client.handlers import client_app
from chainward_client.node import Node, Task
from chainward_client.request_check import Described
from chainward_client.site import OpenSite
from chainward_shared.errors import ChainwardError, DataError, PolicyRefusal, ProtocolError
from chainward_shared.pretrained.store import WeightsStore
from chainward_shared.protocol import AtWork, AtWorkRequest, BaseTask, Hello, HelloRequest, Refusal, SimulatedSite
from chainward_shared.protocol.run_plan import RunPlan, RunPlanState
from chainward_simulations.data_notes import keep_pictures
from chainward_simulations.simulated_sites import simulated_site, simulated_site_ids

SIMULATED_NODE = {"partition-id", "num-partitions"}
"""The configuration of a node that Flower's simulation starts has these keys, and no others."""


class SimulatedNode(Node):
    """A node of Flower's simulation, which is whatever site a message says.

    Raises
    ------
    ProtocolError
        The node is not one that Flower's simulation has started.
    """

    def __init__(self, node_config: Mapping[str, Any]) -> None:
        if set(node_config) != SIMULATED_NODE:
            raise ProtocolError(
                "this app plays simulated sites, and only on the nodes that Flower's simulation starts "
                "(`flwr run simulations/six_sites`); a hospital's node takes part in runs of `server/app`"
            )
        self._partition = int(node_config["partition-id"])

    def hello(self, request: HelloRequest, node: int) -> Hello:
        try:
            sites = simulated_site_ids(request.source, num_sites=request.num_sites, label_skew=request.label_skew)
        except DataError as error:
            return Hello(site=None, problem=str(error), partition=self._partition)
        return Hello(site=None, simulated_sites=list(sites), partition=self._partition)

    def at_work(self, request: AtWorkRequest) -> AtWork:
        raise ProtocolError("a simulated site was asked whether it is at work: only deployed ones are")

    def open(self, simulated: SimulatedSite | None) -> OpenSite:
        if simulated is None:
            raise ProtocolError("this node of a simulation was not told which site to be")
        data = _opened(simulated.model_copy(update={"policy": None}), _stamp(simulated.source))
        state_dir, bases = Path(simulated.state_dir) / data.site, _bases(simulated)
        return OpenSite(data.site, Described.of(data), lambda: data, state_dir, bases, simulated.policy, simulated=True)

    def bases(self, task: BaseTask) -> tuple[str, Bases]:
        if task.simulated is None:
            raise ProtocolError("this node of a simulation was not told which site to be")
        return f"simulated-{task.simulated.index}", _bases(task.simulated)

    def consider(self, plan: RunPlan) -> RunPlanState:
        raise ProtocolError("a simulated site was asked for its approval: only deployed ones have people")

    @contextmanager
    def at_work_on(self, task: Task, seconds: float) -> Iterator[OpenSite]:
        yield self.open(task.simulated)

    @staticmethod
    def refusal(error: Exception) -> Refusal | None:
        """Say all of what a person can act on; anything else is a defect and stays an exception."""
        if not isinstance(error, ChainwardError):
            return None
        return Refusal(reason=str(error), final=isinstance(error, PolicyRefusal))


def _bases(simulated: SimulatedSite) -> Bases:
    """Simulated sites share one folder: what one has got, all have."""
    folder = Path(simulated.state_dir) / "bases"
    return Bases(folder, WeightsStore(folder / "reviewed"))


def _stamp(source: str) -> float:
    path = Path(source)
    return path.stat().st_mtime if path.is_file() else 0.0


@lru_cache(maxsize=64)
def _opened(simulated: SimulatedSite, stamp: float) -> SiteData:
    data = simulated_site(
        simulated.source,
        simulated.index,
        num_sites=simulated.num_sites,
        label_skew=simulated.label_skew,
        seed=simulated.seed,
    )
    keep_pictures(data, Path(simulated.state_dir) / data.site)
    return data


app = client_app(SimulatedNode)
