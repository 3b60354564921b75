"""Whether a site takes a piece of work, and what that is paid from."""

from __future__ import annotations

from collections.abc import Callable

from chainward_client.policy import check_run
from chainward_client.private_site import PrivateSite, PrivateWork
from chainward_shared.errors import PolicyRefusal
from chainward_shared.privacy.entries import Head
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.protocol import StatisticsTask
from chainward_shared.recipes import PrivacyRecipe


def admitted_statistics(
    policy: PrivacyPolicy | None, open_privacy: Callable[[], PrivateSite | None], task: StatisticsTask
) -> PrivateWork | None:
    """Return what a statistics round spends through; None where its sums leave without noise.

    Raises
    ------
    PolicyRefusal
        The site has a policy and the round is not private, or `admitted` says no.
    LedgerError
        As `admitted`.
    """
    if policy is not None and task.privacy is None:
        raise PolicyRefusal(
            "this site has a privacy policy, and the sums of a statistics round without privacy would leave it without noise; "
            "set privacy.mode = 'dp-sgd' or 'by-policy', or chain.head = 'trained'"
        )
    return admitted(policy, open_privacy, run=task.run_id, hop=task.hop, asked=task.privacy, seen=task.seen_head)


def admitted(
    policy: PrivacyPolicy | None,
    open_privacy: Callable[[], PrivateSite | None],
    *,
    run: str,
    hop: str,
    asked: PrivacyRecipe | None,
    seen: Head | None,
    privileged: bool = False,
) -> PrivateWork | None:
    """Return what a piece of work spends through; None where it goes without privacy.

    Parameters
    ----------
    policy : the site's own; None where it has none
    open_privacy : opens what the site's private work needs
    asked : what the run asks for; None: no privacy
    privileged : whether privileged teachers are to be trained
    seen : how far the coordinator has seen the site's ledger go

    Raises
    ------
    PolicyRefusal
        The policy doesn't allow such a run here.
    LedgerError
        The ledger is damaged, or an older one than the coordinator has seen.
    """
    if asked is not None and asked.sites == "by-policy" and policy is None:
        return None
    unit = None if asked is None else asked.unit
    check_run(policy, private=asked is not None, unit=unit, privileged=privileged)
    privacy = open_privacy() if asked is not None else None
    if privacy is None:
        return None
    if seen is not None:
        privacy.ledger.require(seen)
    return privacy.work(run, hop)
