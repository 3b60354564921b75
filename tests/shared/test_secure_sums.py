"""Secure sums: the masks cancel to the last bit, whoever drops out, and without them nothing can be told."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chainward_shared.errors import ModelError, ProtocolError
from chainward_shared.protocol import Round
from chainward_shared.secure_sums import (
    FRACTION_BITS,
    Secrets,
    fewest_answers,
    fixed_point,
    flat,
    is_genuine,
    masked,
    offered,
    opened,
    real_numbers,
    shaped,
    shares_for_others,
    unmasked,
)
from chainward_shared.summands import UPDATE_BITS

NUMBERS = 300


class Consortium:
    """Some sites in one round, with the coordinator's part played by the test."""

    def __init__(self, sites, threshold=0.5):
        self.round = Round(
            run_id="r", hop="head", task="0" * 64, members=tuple(sites), threshold=fewest_answers(len(sites), threshold)
        )
        self.secrets = {site: Secrets.new() for site in sites}
        self.offers = [offered(self.secrets[site], self.round, site) for site in sites]
        generator = np.random.default_rng(len(sites))
        self.values = {site: torch.from_numpy(generator.normal(0, 1e4, NUMBERS)) for site in sites}

    def sum_of(self, sharing, answering):
        """Return what the coordinator finds when these share their secrets out, and these of them answer."""
        shares = {site: shares_for_others(self.secrets[site], self.round, site, self.offers) for site in sharing}
        received = {site: {sender: shares[sender][site] for sender in sharing} for site in sharing}
        held = {site: opened(self.secrets[site], site, self.offers, received[site]) for site in sharing}
        self.sent = {site: self.masked(site, sharing) for site in answering}
        total = sum(self.sent.values())
        dropped = [site for site in sharing if site not in answering]
        return real_numbers(
            unmasked(
                total,
                self.round,
                self.offers,
                answering,
                dropped,
                {site: [held[other][site].seed for other in answering] for site in answering},
                {site: [held[other][site].key for other in answering] for site in dropped},
            )
        )

    def masked(self, site, sharing):
        numbers = fixed_point(self.values[site], len(self.round.members))
        return masked(numbers, self.secrets[site], site, self.offers, sharing)


SITES = ["ash", "birch", "cedar", "dogwood", "elm"]


@pytest.mark.parametrize(
    ("sharing", "answering"),
    [(SITES, SITES), *((SITES, list(some)) for some in itertools.combinations(SITES, 3)), (SITES[:4], SITES[1:4])],
)
def test_the_sum_over_those_that_answered_is_theirs_whoever_dropped_out(sharing, answering):
    consortium = Consortium(SITES)
    expected = sum(consortium.values[site] for site in answering)
    found = consortium.sum_of(sharing, answering)
    assert torch.allclose(found, expected, rtol=0, atol=len(answering) * 2.0**-FRACTION_BITS)


def test_what_a_site_sends_looks_like_noise_whatever_its_numbers():
    consortium = Consortium(SITES[:3])
    consortium.values = dict.fromkeys(SITES[:3], torch.zeros(20_000, dtype=torch.float64))
    consortium.sum_of(SITES[:3], SITES[:3])
    for sent in consortium.sent.values():
        bits = np.unpackbits(sent.view(np.uint8))
        assert abs(bits.mean() - 0.5) < 0.005
        assert len(np.unique(sent)) == len(sent)


def test_two_rounds_mask_the_same_numbers_differently():
    first, second = Consortium(SITES[:3]), Consortium(SITES[:3])
    assert torch.equal(first.values["ash"], second.values["ash"])
    for consortium in (first, second):
        consortium.sum_of(SITES[:3], SITES[:3])
    assert not np.any(first.sent["ash"] == second.sent["ash"])


def test_fewer_shares_than_the_threshold_take_no_mask_off():
    consortium = Consortium(SITES)
    with pytest.raises(ProtocolError, match="3 are needed"):
        consortium.sum_of(SITES, SITES[:2])


def test_shares_that_do_not_fit_together_are_noticed():
    one, other = Consortium(SITES[:4]), Consortium(SITES[:4])
    shares = {site: shares_for_others(one.secrets[site], one.round, site, one.offers) for site in SITES[:4]}
    wrong = {site: shares_for_others(other.secrets[site], other.round, site, other.offers) for site in SITES[:4]}
    held = {
        site: opened(of.secrets[site], site, of.offers, {sender: sent[sender][site] for sender in SITES[:4]})
        for site, of, sent in (("ash", one, shares), ("birch", other, wrong), ("cedar", one, shares))
    }
    total = np.zeros(NUMBERS, dtype=np.uint64)
    seeds = {site: [held[other_].get(site).seed for other_ in held] for site in held}
    with pytest.raises(ProtocolError, match="fit together"):
        unmasked(total, one.round, one.offers, list(held), [], seeds, {})


def test_shares_can_be_read_by_the_site_alone_that_they_are_for():
    consortium = Consortium(SITES[:3])
    shares = shares_for_others(consortium.secrets["ash"], consortium.round, "ash", consortium.offers)
    with pytest.raises(ProtocolError, match="can't be read"):
        opened(consortium.secrets["cedar"], "cedar", consortium.offers, {"ash": shares["birch"]})


def test_a_signature_is_good_for_one_round_one_site_and_its_keys():
    consortium, key = Consortium(SITES[:3]), Ed25519PrivateKey.generate()
    round_ = consortium.round
    offer = offered(consortium.secrets["ash"], round_, "ash", key)
    assert is_genuine(offer, round_)
    other_keys = offered(consortium.secrets["birch"], round_, "birch", key)
    assert not is_genuine(consortium.offers[0], round_)
    assert not is_genuine(offer, round_.model_copy(update={"attempt": 1}))
    assert not is_genuine(offer, round_.model_copy(update={"threshold": 3}))
    assert not is_genuine(offer, round_.model_copy(update={"members": (*round_.members, "elm")}))
    assert not is_genuine(offer.model_copy(update={"site": "birch"}), round_)
    assert not is_genuine(offer.model_copy(update={"mask": other_keys.mask}), round_)
    assert not is_genuine(offer.model_copy(update={"channel": other_keys.channel}), round_)


@pytest.mark.parametrize("bits", [FRACTION_BITS, UPDATE_BITS])
@pytest.mark.parametrize("members", [3, 50, 512])
def test_numbers_are_within_half_of_the_last_bit_and_what_would_overflow_is_refused(members, bits):
    largest = 2**62 // members * 2.0**-bits
    values = torch.tensor([0.0, 2.0**-bits, -1.5, 1 / 3, 1e-9, -largest, largest], dtype=torch.float64)
    found = real_numbers(fixed_point(values, members, bits), bits)
    assert bool(((found - values).abs() <= 2.0 ** -(bits + 1)).all())
    total = real_numbers(sum([fixed_point(values, members, bits)] * members), bits)
    assert bool(((total - members * values).abs() <= members * 2.0 ** -(bits + 1)).all()), "it does not wrap"
    for beyond in (1.001 * largest, -1.001 * largest, float("inf"), -float("inf"), float("nan"), 1e300):
        with pytest.raises(ModelError, match=f"with {members} sites and {bits} bits"):
            fixed_point(torch.tensor([1.0, beyond], dtype=torch.float64), members, bits)


def test_tensors_come_back_from_a_row_of_numbers():
    state = {"b": torch.arange(6.0, dtype=torch.float64).view(2, 3), "a": torch.tensor(7.0, dtype=torch.float64)}
    back = shaped(flat(state), state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("members", "share", "threshold"),
    [(3, 0.5, 2), (4, 0.5, 3), (6, 0.5, 4), (6, 2 / 3, 5), (3, 0.9, 3), (50, 0.1, 26)],
)
def test_more_than_half_must_be_there_whatever_is_asked_for(members, share, threshold):
    assert fewest_answers(members, share) == threshold


def test_secrets_are_not_shown():
    secrets = Secrets.new()
    assert secrets.seed not in f"{secrets} {secrets!r}"
