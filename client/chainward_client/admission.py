"""Whether a site takes a piece of work, and what that is paid from."""

from __future__ import annotations

from collections.abc import Callable

from chainward_client.policy import check_run
from chainward_client.private_site import PrivateSite, PrivateWork
from chainward_shared.errors import PolicyRefusal
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.protocol import LinkTask, StatisticsTask, StudentTask


def admitted(
    policy: PrivacyPolicy | None,
    open_privacy: Callable[[], PrivateSite | None],
    task: LinkTask | StudentTask | StatisticsTask,
) -> PrivateWork | None:
    """Return what a training or a statistics round spends through; None where it goes without privacy.

    Parameters
    ----------
    policy : the site's own; None where it has none
    open_privacy : opens what the site's private work needs

    Raises
    ------
    PolicyRefusal
        The policy doesn't allow such a run here, or sums would leave a site that has one without noise.
    LedgerError
        The ledger is damaged, or an older one than the coordinator has seen.
    """
    if isinstance(task, StatisticsTask):
        asked, privileged = task.privacy, False
        if policy is not None and asked is None:
            raise PolicyRefusal(
                "this site has a privacy policy, and the sums of a statistics round without privacy would leave it without "
                "noise; set privacy.mode = 'dp-sgd' or 'by-policy', or chain.head = 'trained'"
            )
    else:
        asked, privileged = task.recipe.privacy, task.recipe.privileged is not None
    if asked is not None and asked.sites == "by-policy" and policy is None:
        return None
    unit = None if asked is None else asked.unit
    check_run(policy, private=asked is not None, unit=unit, privileged=privileged)
    privacy = open_privacy() if asked is not None else None
    if privacy is None:
        return None
    if task.seen_head is not None:
        privacy.ledger.require(task.seen_head)
    return privacy.work(task.run_id, task.hop)
