"""The Flower `ClientApp` of a deployed hospital."""

from __future__ import annotations

from chainward_client.handlers import client_app
from chainward_client.node import DeployedNode

app = client_app(DeployedNode)
