"""Six trainings as one round of Flower's FedAvg: its ServerApp and ClientApp, as Flower's own examples have them."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from chainward_simulations.benchmark.peers.work import SITES, initial, train

server = ServerApp()
client = ClientApp()

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "peer"
version = "0.1.0"
dependencies = []
[tool.flwr.app]
publisher = "chainward"
[tool.flwr.app.components]
serverapp = "chainward_simulations.benchmark.peers.flower_app:server"
clientapp = "chainward_simulations.benchmark.peers.flower_app:client"
[tool.flwr.app.config]
"""


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Average one round of all sites."""
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=SITES, min_available_nodes=SITES)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(initial()), num_rounds=1)


@client.train()
def train_here(message: Message, context: Context) -> Message:
    """Train at one site."""
    arrays = message.content.array_records["arrays"]
    state, cases = train(int(context.node_config["partition-id"]), dict(arrays.to_torch_state_dict()))
    content = RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": cases})})
    return Message(content=content, reply_to=message)
