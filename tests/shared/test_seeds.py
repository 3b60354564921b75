"""Named seeds: every choice has its own, the same one on every machine."""

from __future__ import annotations

import hashlib
from itertools import combinations

import numpy as np
import torch

from chainward_shared.seeds import derive_seed, numpy_generator, torch_generator


def test_a_seed_is_the_same_today_and_tomorrow():
    assert derive_seed(7, "oak", "lap", 0, "batches") == 4788097269143562717


def test_a_seed_is_the_hash_of_the_names_with_their_lengths():
    text = b"7" + b"\x00\x00\x00\x03oak" + b"\x00\x00\x00\x01" + b"2"
    assert derive_seed(7, "oak", 2) == int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def test_choices_of_other_names_have_other_seeds():
    seeds = {
        name: derive_seed(*name)
        for name in [
            (0,),
            (1,),
            (0, ""),
            (0, "a"),
            (0, "ab", "c"),
            (0, "a", "bc"),
            (0, "abc"),
            (0, "c", "ab"),
            (1, "a"),
            (0, 1, 2),
            (0, 12),
            (0, "a", ""),
            (0, "", "a"),
            (10,),
            (1, 0),
            (0, "ä"),
        ]
    }
    assert [pair for pair in combinations(seeds, 2) if seeds[pair[0]] == seeds[pair[1]]] == []


def test_seeds_fit_a_signed_integer_of_64_bits():
    seeds = [derive_seed(0, "n", i) for i in range(200)]
    assert min(seeds) >= 0
    assert 2**62 < max(seeds) < 2**63


def test_generators_of_one_name_repeat_and_of_two_names_differ():
    one, again = torch_generator(3, "batches"), torch_generator(3, "batches")
    other = torch_generator(3, "augmentation")
    drawn = torch.rand(8, generator=one)
    assert torch.equal(drawn, torch.rand(8, generator=again))
    assert not torch.equal(drawn, torch.rand(8, generator=other))
    assert np.array_equal(numpy_generator(3, "split").random(8), numpy_generator(3, "split").random(8))
    assert not np.array_equal(numpy_generator(3, "split").random(8), numpy_generator(4, "split").random(8))


def test_drawing_leaves_the_global_generators_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    torch.rand(4, generator=torch_generator(0, "x"))
    numpy_generator(0, "x").random(4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
