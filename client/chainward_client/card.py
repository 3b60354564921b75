"""What a site says of its data when it joins."""

from __future__ import annotations

import logging

from chainward_client.data.site_data import SiteData
from chainward_client.private_site import declared_units
from chainward_client.privileged.encoder import encoder_digest
from chainward_shared.errors import DataError
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.protocol import SiteCard, SitePrivacy

logger = logging.getLogger("chainward.client")


def site_card(
    data: SiteData,
    policy: PrivacyPolicy | None,
    privacy: SitePrivacy | None,
    *,
    secure_sums: bool = False,
    asks: bool = False,
) -> SiteCard:
    """Return the card of a site: with a policy whose metrics are not "exact" it holds nothing that was counted but the
    units of the training data, declared or rounded.

    Parameters
    ----------
    privacy : what the site says of its policy; None where it has none
    secure_sums : whether the site gives sums in secure sums alone
    asks : whether a person approves every run there
    """
    image = data.splits["train"].images
    told = policy is None or policy.metrics == "exact"
    return SiteCard(
        site=data.site,
        task=data.task,
        classes=list(data.classes),
        image_size=int(image.shape[-1]),
        channels=int(image.shape[1]),
        train=len(data.splits["train"]) if policy is None or told else declared_units(policy, data),
        val=len(data.splits["val"]) if told else None,
        test=len(data.splits["test"]) if told else None,
        class_counts={split: data.class_counts(split) for split in data.splits} if told else {},
        synthetic=data.synthetic,
        preparation=data.preparation,
        notes=list(data.notes) if told else [],
        privacy=privacy,
        secure_sums=secure_sums,
        approval=asks,
        encoder=_encoder(data),
    )


def _encoder(data: SiteData) -> str | None:
    """Return the digest of the site's language encoder; None where it has none that can be used: who trains with it says why."""
    if data.privileged.encoder is None:
        return None
    try:
        return encoder_digest(data.privileged.encoder)
    except DataError as error:
        logger.warning("%s", error)
        return None
