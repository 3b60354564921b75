"""Whether a site takes a piece of work, and what that is paid from."""

from __future__ import annotations

from collections.abc import Callable

from chainward_client.policy import check_run
from chainward_client.private_site import PrivateSite, PrivateWork
from chainward_shared.errors import PolicyRefusal
from chainward_shared.privacy.entries import Head
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.recipes import TrainingRecipe


def admit_statistics(policy: PrivacyPolicy | None) -> None:
    """Refuse sums over embeddings at a site with a privacy policy: they leave without noise, and nothing accounts for them.

    Raises
    ------
    PolicyRefusal
        The site has a policy.
    """
    if policy is not None:
        raise PolicyRefusal(
            "this site has a privacy policy, and the sums of a statistics round would leave it without noise; set "
            "chain.head = 'trained'"
        )


def admitted(
    policy: PrivacyPolicy | None,
    open_privacy: Callable[[], PrivateSite | None],
    *,
    run: str,
    hop: str,
    recipe: TrainingRecipe,
    seen: Head | None,
) -> PrivateWork | None:
    """Return what a training spends through; None where it goes without privacy.

    Parameters
    ----------
    policy : the site's own; None where it has none
    open_privacy : opens what the site's private work needs
    seen : how far the coordinator has seen the site's ledger go

    Raises
    ------
    PolicyRefusal
        The policy doesn't allow such a run here.
    LedgerError
        The ledger is damaged, or an older one than the coordinator has seen.
    """
    asked = recipe.privacy
    if asked is not None and asked.sites == "by-policy" and policy is None:
        return None
    unit = None if asked is None else asked.unit
    check_run(policy, private=asked is not None, unit=unit, privileged=recipe.privileged is not None)
    privacy = open_privacy() if asked is not None else None
    if privacy is None:
        return None
    if seen is not None:
        privacy.ledger.require(seen)
    return privacy.work(run, hop)
