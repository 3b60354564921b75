"""A site's part in a secure sum, against a coordinator that is after the numbers of a single site."""

from __future__ import annotations

import stat

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from chainward_client.secure_sums import Participation, singled_out
from chainward_client.site_config import SecureSums
from chainward_shared.errors import PolicyRefusal, ProtocolError
from chainward_shared.privacy.signing import fingerprint, public_text
from chainward_shared.protocol import Round
from chainward_shared.secure_sums import Secrets, fewest_answers, offered

SITES = ["ash", "birch", "cedar", "dogwood"]
NUMBERS = np.arange(5, dtype=np.uint64)


class Hospitals:
    """Hospitals that know each other's keys, and the messages of a coordinator that may say what it likes."""

    def __init__(self, folder, sites=SITES, **terms):
        self.folder, self.sites, self.terms = folder, list(sites), terms
        self.keys = {site: Ed25519PrivateKey.generate() for site in sites}
        self.round = self.another(1)

    def another(self, attempt, task="0" * 64, members=None, weights=()):
        members = tuple(members or self.sites)
        return Round(
            run_id="r",
            hop="head",
            task=task,
            attempt=attempt,
            members=members,
            threshold=fewest_answers(len(members), 0.5),
            weights=weights,
        )

    def at(self, site, round_=None):
        """Return a hospital's part, as a new process finds it."""
        partners = {other: fingerprint(public_text(key)) for other, key in self.keys.items() if other != site}
        return Participation(
            self.folder / site / f"sum-{(round_ or self.round).task[:4]}.json",
            self.folder / site / "given.json",
            site,
            SecureSums(partners=partners, **self.terms),
            lambda: self.keys[site],
        )

    def up_to_the_masks(self, round_=None, kind="statistics"):
        """Take all hospitals through a round until they have sent their masked numbers."""
        round_ = round_ or self.round
        offers = [self.at(site, round_).offer(round_) for site in round_.members]
        shares = {site: self.at(site, round_).share(round_, offers).shares for site in round_.members}
        received = {site: {sender: shares[sender][site] for sender in shares} for site in round_.members}
        for site in round_.members:
            self.at(site, round_).mask(round_, received[site], lambda: NUMBERS, kind)
        return offers, received


@pytest.fixture
def hospitals(tmp_path):
    return Hospitals(tmp_path)


def test_a_site_answers_the_same_to_a_question_that_is_sent_again(hospitals):
    offers, received = hospitals.up_to_the_masks()
    ash = hospitals.at("ash")
    assert ash.offer(hospitals.round) == offers[0]
    assert ash.share(hospitals.round, offers) == ash.share(hospitals.round, offers)
    once, again = (ash.mask(hospitals.round, received["ash"], lambda: NUMBERS) for _ in range(2))
    assert np.array_equal(once, again)
    assert ash.unmask(hospitals.round, SITES) == hospitals.at("ash").unmask(hospitals.round, SITES)


def test_a_site_never_gives_shares_of_both_masks_of_another(hospitals):
    hospitals.up_to_the_masks()
    given = hospitals.at("ash").unmask(hospitals.round, ["ash", "birch", "cedar"])
    assert set(given.seeds) == {"ash", "birch", "cedar"}
    assert set(given.keys) == {"dogwood"}
    with pytest.raises(PolicyRefusal, match="does so once"):
        hospitals.at("ash").unmask(hospitals.round, SITES)


def test_a_later_attempt_ends_the_ones_before_it(hospitals):
    hospitals.up_to_the_masks()
    later = hospitals.another(2)
    hospitals.at("ash").offer(later)
    with pytest.raises(ProtocolError, match="another round"):
        hospitals.at("ash").unmask(hospitals.round, SITES)
    with pytest.raises(ProtocolError, match="another round"):
        hospitals.at("ash").offer(hospitals.round)


@pytest.mark.parametrize(
    "how", ["unsigned", "foreign key", "other round", "swapped", "stranger", "twice", "own replaced"]
)
def test_a_coordinator_can_put_nobody_in_a_partners_place(hospitals, how):
    offers = [hospitals.at(site).offer(hospitals.round) for site in SITES]
    mine = Secrets.new()
    false = {
        "unsigned": lambda: offered(mine, hospitals.round, "birch"),
        "foreign key": lambda: offered(mine, hospitals.round, "birch", Ed25519PrivateKey.generate()),
        "other round": lambda: offered(mine, hospitals.another(7), "birch", hospitals.keys["birch"]),
        "swapped": lambda: offers[2].model_copy(update={"site": "birch"}),
        "stranger": lambda: offered(mine, hospitals.round, "elm", Ed25519PrivateKey.generate()),
        "twice": lambda: offers[2],
        "own replaced": lambda: offers[1],
    }[how]()
    offers[1] = false
    if how == "own replaced":
        offers[0] = offered(mine, hospitals.round, "ash", hospitals.keys["ash"])
    with pytest.raises((PolicyRefusal, ProtocolError)):
        hospitals.at("ash").share(hospitals.round, offers)


def test_secrets_are_shared_out_once_in_a_round(hospitals):
    offers = [hospitals.at(site).offer(hospitals.round) for site in SITES]
    hospitals.at("ash").share(hospitals.round, offers)
    with pytest.raises(ProtocolError, match="other keys"):
        hospitals.at("ash").share(hospitals.round, offers[:3])


def test_a_site_masks_once_in_a_round_whatever_shares_it_is_given(hospitals):
    _, received = hospitals.up_to_the_masks()
    fewer = {sender: received["ash"][sender] for sender in SITES[:3]}
    with pytest.raises(ProtocolError, match="other shares"):
        hospitals.at("ash").mask(hospitals.round, fewer, lambda: NUMBERS)


def test_a_site_relies_on_the_noise_of_no_more_than_it_says_and_than_must_answer(tmp_path):
    for said, relied in ((1, 1), (2, 2), (4, 3)):
        hospitals = Hospitals(tmp_path / str(said), noise_from=said)
        assert hospitals.round.threshold == 3
        assert hospitals.at("ash").noise_from(hospitals.round) == relied


def test_a_site_that_allows_differences_relies_on_nobodys_noise(tmp_path):
    with pytest.raises(ValidationError, match="has the share of noise of one site alone"):
        Hospitals(tmp_path, noise_from=2, differences=True).at("ash")


@pytest.mark.parametrize(
    ("members", "terms", "words"),
    [
        (["ash", "birch", "elm"], {}, "does not know the key of elm"),
        (["birch", "cedar", "dogwood"], {}, "one of them"),
        (["ash", "ash", "birch"], {}, "different sites"),
        (SITES[:3], {"fewest": 4}, "at least 4"),
        (SITES, {"threshold": 0.8}, "wants it to take 4"),
    ],
)
def test_a_site_takes_no_part_in_a_sum_against_its_terms(tmp_path, members, terms, words):
    hospitals = Hospitals(tmp_path, **terms)
    with pytest.raises((PolicyRefusal, ProtocolError), match=words):
        hospitals.at("ash").offer(hospitals.another(1, members=members))


def test_half_of_the_sites_are_too_few_to_unmask(hospitals):
    half = hospitals.round.model_copy(update={"threshold": 2})
    with pytest.raises(PolicyRefusal, match="wants it to take 3"):
        hospitals.at("ash").offer(half)


@pytest.mark.parametrize("answered", [["ash", "birch"], ["birch", "cedar", "dogwood"], ["ash", "ash", "ash"], []])
def test_a_sum_over_too_few_or_without_the_site_itself_is_not_unmasked(hospitals, answered):
    hospitals.up_to_the_masks()
    with pytest.raises(PolicyRefusal, match="at least 3"):
        hospitals.at("ash").unmask(hospitals.round, answered)


def test_steps_can_not_be_taken_out_of_their_order(hospitals):
    ash = hospitals.at("ash")
    with pytest.raises(ProtocolError, match="named no keys"):
        ash.share(hospitals.round, [])
    offers = [hospitals.at(site).offer(hospitals.round) for site in SITES]
    with pytest.raises(ProtocolError, match="not shared"):
        ash.mask(hospitals.round, {}, lambda: NUMBERS)
    ash.share(hospitals.round, offers)
    with pytest.raises(ProtocolError, match="masked nothing"):
        ash.unmask(hospitals.round, SITES)


def test_after_a_sum_over_all_there_is_none_without_one(hospitals):
    hospitals.up_to_the_masks()
    hospitals.at("ash").unmask(hospitals.round, SITES)
    second = hospitals.another(2, task="1" * 64)
    hospitals.up_to_the_masks(second)
    with pytest.raises(PolicyRefusal, match="site 'dogwood' alone"):
        hospitals.at("ash", second).unmask(second, SITES[:3])
    assert hospitals.at("ash", second).unmask(second, SITES).seeds, "over the same sites it is nothing new"


def test_numbers_whose_noise_is_shared_are_added_up_over_the_same_sites_alone(tmp_path):
    sites = [*SITES, "elm", "fir"]
    hospitals = Hospitals(tmp_path, sites=sites, noise_from=3)
    hospitals.up_to_the_masks()
    hospitals.at("ash").unmask(hospitals.round, sites)
    for attempt in (2, 3):  # neither does an attempt that came to nothing make it forget
        again = hospitals.another(attempt)
        hospitals.up_to_the_masks(again)
        with pytest.raises(PolicyRefusal, match="added up over no others"):
            hospitals.at("ash", again).unmask(again, sites[:4])
    assert hospitals.at("ash", again).unmask(again, sites).seeds, "over the same sites it is nothing new"


def test_a_site_that_allows_differences_unmasks_a_sum_with_one_site_missing(tmp_path):
    hospitals = Hospitals(tmp_path, differences=True)
    hospitals.up_to_the_masks()
    hospitals.at("ash").unmask(hospitals.round, SITES)
    second = hospitals.another(2, task="1" * 64)
    hospitals.up_to_the_masks(second)
    assert set(hospitals.at("ash", second).unmask(second, SITES[:3]).keys) == {"dogwood"}


@pytest.mark.parametrize(
    ("sets", "alone"),
    [
        (["abcd", "abc"], "d"),
        (["abcd", "abcd"], None),
        (["abcdef", "abcd"], None),
        (["abc", "cde", "abde"], "c"),
        (["abc", "abd", "acd", "bcd"], "a"),
        (["a"], "a"),
    ],
)
def test_sums_from_which_a_single_site_follows_are_found(sets, alone):
    assert singled_out([dict.fromkeys(members, 1.0) for members in sets]) == alone


@pytest.mark.parametrize(
    ("first", "second", "alone"),
    [
        ((0.4, 0.3, 0.2, 0.1), (0.4, 0.3, 0.2, 0.1), None),
        ((0.4, 0.3, 0.2, 0.1), (0.2, 0.15, 0.1, 0.05), None),  # twice the same
        ((0.4, 0.3, 0.2, 0.1), (0.4, 0.3, 0.2, 0.2), "dogwood"),
        ((0.4, 0.3, 0.2, 0.1), (0.4, 0.3 + 1e-9, 0.2, 0.1), "birch"),
    ],
)
def test_weights_that_change_single_a_site_out_like_a_site_that_is_missing(tmp_path, first, second, alone):
    """The students of one task, added up twice: what they differ by is known to whoever chose the weights."""
    hospitals = Hospitals(tmp_path)
    rounds = [hospitals.another(n, weights=weights) for n, weights in enumerate((first, second), start=1)]
    hospitals.up_to_the_masks(rounds[0], kind="students")
    hospitals.at("ash", rounds[0]).unmask(rounds[0], SITES)
    hospitals.up_to_the_masks(rounds[1], kind="students")
    ash = hospitals.at("ash", rounds[1])
    if alone is None:
        assert set(ash.unmask(rounds[1], SITES).seeds) == set(SITES)
        return
    with pytest.raises(PolicyRefusal, match=f"site '{alone}' alone"):
        ash.unmask(rounds[1], SITES)


def test_no_site_adds_its_numbers_to_a_sum_of_which_one_has_more_than_half(hospitals):
    heavy = hospitals.another(1, weights=(0.7, 0.1, 0.1, 0.1))
    with pytest.raises(PolicyRefusal, match="site 'ash' has 70% of the weight"):
        hospitals.at("birch", heavy).offer(heavy)


def test_a_sum_is_not_unmasked_in_which_one_site_has_more_than_half_without_those_that_dropped_out(hospitals):
    round_ = hospitals.another(1, weights=(0.45, 0.4, 0.1, 0.05))
    hospitals.up_to_the_masks(round_, kind="students")
    with pytest.raises(PolicyRefusal, match="site 'ash' has 75% of the weight"):
        hospitals.at("cedar", round_).unmask(round_, ["ash", "cedar", "dogwood"])


def test_weights_are_those_of_all_members_or_of_none(hospitals):
    with pytest.raises(ValidationError, match="3 weights of 4 members"):
        hospitals.another(1, weights=(0.4, 0.3, 0.3))


def test_sums_of_another_kind_give_nothing_away(hospitals):
    hospitals.up_to_the_masks()
    hospitals.at("ash").unmask(hospitals.round, SITES)
    second = hospitals.another(2, task="1" * 64)
    hospitals.up_to_the_masks(second, kind="scores")
    assert hospitals.at("ash", second).unmask(second, SITES[:3]).keys.keys() == {"dogwood"}


def test_what_a_site_keeps_is_for_its_owner_alone_and_secrets_are_forgotten_at_the_end(hospitals):
    hospitals.up_to_the_masks()
    ash = hospitals.at("ash")
    assert stat.S_IMODE(ash.file.stat().st_mode) == 0o600
    assert '"secrets":{' in ash.file.read_text()
    ash.unmask(hospitals.round, SITES)
    assert '"secrets":null' in ash.file.read_text()


def test_a_site_with_a_single_partner_has_no_terms():
    with pytest.raises(ValidationError):
        SecureSums(partners={"birch": "SHA256:x"})
