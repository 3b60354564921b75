"""Order of the sites, laps and strands."""

from __future__ import annotations

import itertools

import pytest

from chainward_server.schedule import schedule, site_order
from chainward_shared.config import ChainConfig

SITES = ["a", "b", "c", "d", "e"]
SIZES = {"a": 30, "b": 10, "c": 50, "d": 20, "e": 40}


@pytest.mark.parametrize("strands", range(1, 6))
@pytest.mark.parametrize("laps", [1, 3])
def test_no_site_ever_holds_two_strands_at_once_and_every_strand_visits_every_site_in_every_lap(laps, strands):
    turns = schedule(SITES, laps, strands)
    for turn in turns:
        sites = [hop.site for hop in turn]
        assert len(set(sites)) == len(sites) == strands
    hops = list(itertools.chain.from_iterable(turns))
    for strand, lap in itertools.product(range(strands), range(laps)):
        visited = [hop.site for hop in hops if (hop.strand, hop.lap) == (strand, lap)]
        assert sorted(visited) == SITES
    assert len({hop.key for hop in hops}) == len(hops)


def test_one_strand_visits_the_sites_in_their_order():
    assert [turn[0].site for turn in schedule(SITES, 2, 1)] == SITES * 2


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("given", ["a", "b", "c", "d", "e"]),
        ("reversed", ["e", "d", "c", "b", "a"]),
        ("largest-first", ["c", "e", "a", "d", "b"]),
        ("smallest-first", ["b", "d", "a", "e", "c"]),
    ],
)
def test_the_order_of_a_lap(order, expected):
    assert site_order(SITES, SIZES, ChainConfig(order=order), seed=0) == expected


def test_a_shuffled_order_depends_on_the_seed_alone():
    chain = ChainConfig(order="shuffled")
    orders = [tuple(site_order(SITES, SIZES, chain, seed)) for seed in range(20)]
    assert orders == [tuple(site_order(SITES, SIZES, chain, seed)) for seed in range(20)]
    assert len(set(orders)) > 10
    assert all(sorted(order) == SITES for order in orders)
