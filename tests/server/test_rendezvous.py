"""Which node is which site, and what is said when it can't be settled."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message

from chainward_server.rendezvous import meet
from chainward_shared import __version__
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError
from chainward_shared.protocol import CardRequest, Hello, HelloRequest, SiteCard, kind_of, pack, unpack


def hospitals(*names, **changes):
    """Answer for deployed nodes, in the order of their ids, that say they are `names`."""

    def interfere(message, answer):
        node = message.metadata.dst_node_id - 101
        if kind_of(message.content) == HelloRequest.KIND:
            version = changes.get(names[node], {}).get("version", __version__)
            return Message(pack(Hello(site=names[node], version=version)), reply_to=message)
        assert unpack(message.content, CardRequest)[0].simulated is None, "a deployed site is never told who it is"
        card = {
            "site": names[node],
            "classes": ["a", "b"],
            "image_size": 32,
            "channels": 1,
            "train": 10,
            "val": 2,
            "test": 3,
            "class_counts": {"train": [5, 5]},
            "synthetic": False,
            "notes": [],
        }
        of_the_card = {key: value for key, value in changes.get(names[node], {}).items() if key != "version"}
        return Message(pack(SiteCard(**(card | of_the_card))), reply_to=message)

    return interfere


def settings(**changes):
    return RunConfig.from_flat({"federation.deadline": 1.0} | changes)


def test_deployed_sites_are_found_by_their_own_word(loopback, tmp_path):
    grid = loopback(3, hospitals("north", "south", "east"))
    sites = meet(grid, settings(**{"federation.sites": "south,north,east"}), tmp_path)
    assert sites.ids == ["south", "north", "east"]
    assert [sites.exchange.members[site].node_id for site in sites.ids] == [102, 101, 103]


def test_two_nodes_that_claim_one_site_are_refused_by_name(loopback, tmp_path):
    with pytest.raises(ChainwardError, match=r"nodes 101 and 102 both say they are site 'north'"):
        meet(loopback(2, hospitals("north", "north")), settings(), tmp_path)


def test_the_deadline_names_who_is_missing(loopback, tmp_path):
    config = settings(**{"federation.sites": "north,south,west"})
    with pytest.raises(ChainwardError, match=r"'west' is missing; connected: north, south"):
        meet(loopback(2, hospitals("north", "south")), config, tmp_path)


def test_a_number_of_sites_is_waited_for(loopback, tmp_path):
    with pytest.raises(ChainwardError, match=r"1 more site\(s\) is missing"):
        meet(loopback(2, hospitals("north", "south")), settings(**{"federation.num-sites": 3}), tmp_path)


def test_a_late_site_is_waited_for(loopback, tmp_path, monkeypatch):
    grid = loopback(2, hospitals("north", "south"))
    asked = []

    def connected():
        asked.append(None)
        return grid.nodes if len(asked) > 2 else grid.nodes[:1]

    monkeypatch.setattr(grid, "get_node_ids", connected)
    config = settings(**{"federation.sites": "north,south", "federation.deadline": 10.0})
    assert meet(grid, config, tmp_path).ids == ["north", "south"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ["a", "c"]}, "classes"),
        ({"image_size": 64}, "image size"),
        ({"channels": 3}, "channels"),
    ],
)
def test_sites_that_do_not_agree_on_the_data_are_named(loopback, tmp_path, change, words):
    with pytest.raises(ChainwardError, match=rf"site 'south' has {words}.*site 'north'"):
        meet(loopback(2, hospitals("north", "south", south=change)), settings(), tmp_path)


MAJOR, MINOR = (int(part) for part in __version__.split(".")[:2])


@pytest.mark.parametrize(
    "version", [f"{MAJOR}.{MINOR + 1}.0", f"{MAJOR + 1}.{MINOR}.0", f"{MAJOR}.{MINOR}0.0", "", "x" * 9999]
)
def test_a_site_of_another_version_is_refused_by_name(loopback, tmp_path, version):
    grid = loopback(2, hospitals("north", "south", south={"version": version}))
    with pytest.raises(ChainwardError, match=rf"site 'south' runs chainward .*{MAJOR}\.{MINOR}") as refusal:
        meet(grid, settings(), tmp_path)
    assert version[:40] in str(refusal.value)
    assert len(str(refusal.value)) < 250


def test_another_patch_version_takes_part(loopback, tmp_path):
    grid = loopback(2, hospitals("north", "south", south={"version": f"{MAJOR}.{MINOR}.9"}))
    assert meet(grid, settings(), tmp_path).ids == ["north", "south"]


def test_the_version_of_a_site_that_takes_no_part_does_not_matter(loopback, tmp_path):
    grid = loopback(3, hospitals("north", "south", "old", old={"version": f"{MAJOR + 1}.0.0"}))
    assert meet(grid, settings(**{"federation.sites": "north,south"}), tmp_path).ids == ["north", "south"]


def test_a_simulated_node_of_another_version_is_refused(loopback, tmp_path):
    def outdated(message, answer):
        if kind_of(message.content) == HelloRequest.KIND and message.metadata.dst_node_id == 102:
            return Message(
                pack(Hello(site=None, simulated_sites=["a"], version=f"{MAJOR}.{MINOR + 1}.0")), reply_to=message
            )
        return answer()

    with pytest.raises(ChainwardError, match="node 102 runs chainward"):
        meet(loopback(2, outdated), settings(), tmp_path)


def test_simulated_and_deployed_nodes_do_not_mix(loopback, tmp_path):
    def mixed(message, answer):
        if kind_of(message.content) == HelloRequest.KIND and message.metadata.dst_node_id == 101:
            return Message(pack(Hello(site="north")), reply_to=message)
        return answer()

    with pytest.raises(ChainwardError, match="start all alike"):
        meet(loopback(2, mixed), settings(), tmp_path)


def test_a_node_that_fails_is_named_at_the_deadline(loopback, tmp_path):
    def broken(message, answer):
        return Message(Error(code=2, reason="ImportError: no module named chainward_client"), reply_to=message)

    with pytest.raises(ChainwardError, match="no module named chainward_client"):
        meet(loopback(1, broken), settings(), tmp_path)


@pytest.mark.parametrize("nodes", [1, 2, 4, 6, 9])
def test_six_sites_are_simulated_whatever_the_number_of_nodes(loopback, tmp_path, nodes):
    sites = meet(loopback(nodes), settings(**{"federation.deadline": 30.0}), tmp_path)
    assert sites.ids == [f"site-{i}" for i in range(1, 7)]
    used = {member.node_id for member in sites.exchange.members.values()}
    assert len(used) == min(nodes, 6), "the sites are spread over the nodes"
