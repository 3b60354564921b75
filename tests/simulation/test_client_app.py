"""The client of a simulation plays the site that a message names, on the nodes of a simulation and on no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from chainward_shared.errors import DataError, ProtocolError
from chainward_shared.protocol import SimulatedSite
from chainward_simulations.client_app import SimulatedNode

NODE = {"partition-id": 0, "num-partitions": 2}


@pytest.fixture
def simulated(small_consortium, tmp_path) -> SimulatedSite:
    return SimulatedSite(
        index=1, source=str(small_consortium), num_sites=0, label_skew=0.0, seed=0, state_dir=str(tmp_path / "state")
    )


@pytest.mark.parametrize(
    "node_config",
    [
        {},
        {"partition-id": 0},
        {"site-config": "/etc/site.yaml"},
        {"site_config": "/etc/site.yaml"},
        NODE | {"site-config": "/etc/site.yaml"},
        NODE | {"site_config": "/etc/site.yaml"},
    ],
)
def test_a_node_that_no_simulation_started_plays_nothing(node_config):
    with pytest.raises(ProtocolError, match="only on the nodes that Flower's simulation starts"):
        SimulatedNode(node_config)


def test_a_simulated_node_is_refused_when_nobody_says_who_to_be():
    with pytest.raises(ProtocolError, match="was not told which site to be"):
        SimulatedNode(NODE).open(None)


def test_a_simulated_node_is_the_site_that_the_message_names(simulated):
    site = SimulatedNode(NODE).open(simulated)
    assert site.data.site == "birch"
    assert site.state_dir == Path(simulated.state_dir) / "birch"


def test_two_simulated_sites_have_cases_and_state_of_their_own(simulated):
    one, other = (SimulatedNode(NODE).open(simulated.model_copy(update={"index": index})) for index in (1, 2))
    assert one.state_dir != other.state_dir
    first, second = (set(site.data.splits["train"].patients) for site in (one, other))
    assert not first & second


def test_a_simulated_site_is_the_same_when_asked_again(simulated):
    one, again = SimulatedNode(NODE).open(simulated).data, SimulatedNode(NODE).open(simulated).data
    assert torch.equal(one.splits["train"].images, again.splits["train"].images)
    assert np.array_equal(one.splits["train"].patients, again.splits["train"].patients)


def test_a_simulated_site_that_does_not_exist_is_refused(simulated):
    with pytest.raises(DataError, match="no site 9: this simulation has 4 sites"):
        SimulatedNode(NODE).open(simulated.model_copy(update={"index": 9}))
