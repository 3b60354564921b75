"""Which node is which site, and what is said when it can't be settled."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Error, Message

from chainward_server.rendezvous import meet
from chainward_shared import __version__
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError
from chainward_shared.identity import proven_key, signed_hello
from chainward_shared.privacy.signing import public_text
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
    return RunConfig.from_flat({"federation.deadline": 0.1} | changes)


def test_deployed_sites_are_found_by_their_own_word(loopback, tmp_path):
    grid = loopback(3, hospitals("north", "south", "east"))
    sites = meet(grid, settings(**{"federation.sites": "south,north,east"}), tmp_path)
    assert sites.ids == ["south", "north", "east"]
    assert [sites.exchange.members[site].node_id for site in sites.ids] == [102, 101, 103]


def signing(keys, *names):
    """As `hospitals`, with nodes that sign who they are: each with the key of `keys` at its place; None: with none."""
    plain = hospitals(*names)

    def interfere(message, answer):
        reply = plain(message, answer)
        node = message.metadata.dst_node_id
        key = keys[node - 101]
        if kind_of(message.content) == HelloRequest.KIND and key is not None:
            request, hello = unpack(message.content, HelloRequest)[0], unpack(reply.content, Hello)[0]
            reply.content = pack(signed_hello(hello, key, nonce=request.nonce, node=node))
        return reply

    return interfere


KEYS = [Ed25519PrivateKey.generate() for _ in range(3)]
PUBLIC = [public_text(key) for key in KEYS]


def test_of_two_nodes_that_claim_one_site_the_second_is_refused_by_name_and_the_run_goes_on(loopback, tmp_path, caplog):
    sites = meet(loopback(3, signing(KEYS, "north", "north", "south")), settings(), tmp_path)
    assert {site: sites.exchange.members[site].node_id for site in sites.ids} == {"north": 101, "south": 103}
    assert "node 102 says that it is site 'north', which node 101 is; it is refused" in caplog.text
    assert sites.keys == {"north": PUBLIC[0], "south": PUBLIC[2]}


def test_of_two_nodes_that_claim_one_site_the_one_that_earlier_runs_know_is_taken(loopback, tmp_path, caplog):
    grid = loopback(2, signing(KEYS[:2], "north", "north"))
    sites = meet(grid, settings(), tmp_path, earlier={"north": PUBLIC[1]})
    assert sites.exchange.members["north"].node_id == 102
    assert "node 101 says that it is site 'north', which node 102 is; it is refused" in caplog.text


def test_a_site_with_another_key_than_in_earlier_runs_is_noticed(loopback, tmp_path, caplog):
    grid = loopback(1, signing(KEYS, "north"))
    assert meet(grid, settings(), tmp_path, earlier={"north": PUBLIC[1]}).ids == ["north"]
    assert "site 'north' shows another key than in earlier runs" in caplog.text


@pytest.mark.parametrize("impostor", [KEYS[1], None], ids=["another key", "no key"])
def test_nobody_else_is_taken_for_a_site_with_which_the_run_has_begun(loopback, tmp_path, impostor):
    bound = {"north": PUBLIC[0]}
    grid = loopback(2, signing([impostor, KEYS[0]], "north", "north"))
    assert meet(grid, settings(), tmp_path, bound=bound).exchange.members["north"].node_id == 102
    alone = loopback(2, signing([impostor, KEYS[2]], "north", "south"))
    config = settings(**{"federation.sites": "north,south"})
    with pytest.raises(
        ChainwardError, match=r"'north'.* is missing.*node 101 says that it is site 'north' and can't show"
    ):
        meet(alone, config, tmp_path, bound=bound)


def test_an_answer_to_another_question_or_of_another_node_proves_nothing():
    asked = {"nonce": "ab" * 32, "node": 101}
    hello = signed_hello(Hello(site="north"), KEYS[0], **asked)
    assert proven_key(hello, **asked) == PUBLIC[0]
    assert proven_key(hello, nonce="cd" * 32, node=101) is None
    assert proven_key(hello, nonce="ab" * 32, node=102) is None
    assert proven_key(hello.model_copy(update={"site": "south"}), **asked) is None
    assert proven_key(hello.model_copy(update={"key": PUBLIC[1]}), **asked) is None
    assert proven_key(Hello(site="north"), **asked) is None


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


@pytest.mark.parametrize("nodes", [1, 3, 4, 6])
def test_all_sites_are_simulated_whatever_the_number_of_nodes(small_consortium, loopback, tmp_path, nodes):
    config = settings(**{"data.source": str(small_consortium), "federation.deadline": 30.0})
    sites = meet(loopback(nodes), config, tmp_path)
    assert sites.ids == ["ash", "birch", "cedar", "dogwood"]
    used = {member.node_id for member in sites.exchange.members.values()}
    assert len(used) == min(nodes, 4), "the sites are spread over the nodes"
