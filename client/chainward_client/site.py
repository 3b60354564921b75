"""The site that a hospital's site.yaml describes, ready to work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from chainward_client.bases import Bases
from chainward_client.data.decoded_store import DecodedStore
from chainward_client.data.description import load_description
from chainward_client.data.site_data import SiteData
from chainward_client.private_site import PrivateSite, declared_units
from chainward_client.privileged.checks import with_privileged_notes
from chainward_client.request_check import Described
from chainward_client.secure_sums import Participation
from chainward_client.site_config import ScoreLimits, SecureSums, SiteLimits, load_site_config
from chainward_client.site_key import identity, site_key
from chainward_client.store import SiteStore
from chainward_client.training.features import Features
from chainward_shared.errors import DataError, PolicyRefusal
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.protocol import Round


@dataclass(frozen=True)
class OpenSite:
    """A site that is ready to work. Its data are read when they are first asked for.

    Attributes
    ----------
    site : id of the site
    described : what its data file says of the images
    read : reads its data
    state_dir : where it keeps its state
    bases : the pretrained weights that its models start from
    policy : its privacy policy, if it has one
    scores : what of exact scores may leave; None in a simulation: all
    secure_sums : with whom it takes part in secure sums; None in a simulation: with all
    simulated : its ledger is made where there is none
    asks : whether a person approves every run here
    """

    site: str
    described: Described
    read: Callable[[], SiteData]
    state_dir: Path
    bases: Bases
    policy: PrivacyPolicy | None = None
    scores: ScoreLimits | None = None
    secure_sums: SecureSums | None = None
    simulated: bool = False
    features_gb: float = 4.0
    limits: SiteLimits = field(default_factory=SiteLimits)
    asks: bool = False

    @property
    def features(self) -> Features:
        """Where the output of frozen trunks is kept."""
        declared = None if self.policy is None else declared_units(self.policy, self.data)
        return Features(self.state_dir / "features", int(1e9 * self.features_gb), declared=declared)

    @cached_property
    def data(self) -> SiteData:
        """The site's data.

        Raises
        ------
        DataError
            They can't be used.
        StoreError
            The site's secret can't be read or made.
        """
        return self.read()

    def participation(self, round_: Round) -> Participation:
        """Return the site's part in a secure sum.

        Raises
        ------
        PolicyRefusal
            The site takes part in none.
        """
        if self.secure_sums is None and not self.simulated:
            raise PolicyRefusal(
                "this site takes part in no secure sums: its site.yaml has no secure_sums block with the keys of its partners"
            )
        return Participation(
            SiteStore(self.state_dir, round_.run_id).secure_sum(round_.task),
            self.state_dir / "privacy" / "secure-sums.json",
            self.site,
            self.secure_sums,
            None if self.simulated else lambda: identity(self.state_dir),
        )

    def open_privacy(self) -> PrivateSite | None:
        """Return what the site's private work needs, its ledger verified; None without a policy.

        Raises
        ------
        PrivacyError
            Ledger or key are missing or damaged.
        """
        if self.policy is None:
            return None
        return PrivateSite.open(self.policy, self.state_dir, self.site, create=self.simulated)


def open_site(site_yaml: Path) -> OpenSite:
    """Return the hospital whose site.yaml this is.

    Raises
    ------
    DataError
        site.yaml or the data file that it names can't be used, or names no classes where the site has a privacy policy.
    """
    config = load_site_config(site_yaml)
    state_dir = config.state_dir(site_yaml)
    path = (site_yaml.parent / Path(config.data).expanduser()).resolve()
    description = load_description(path)
    if config.privacy is not None and description.classes is None:
        raise DataError(
            f"{description.table_file}: a site with a privacy policy must name its classes; without 'classes' in the data file "
            "the largest label decides how many there are, and so a single patient might"
        )

    def read() -> SiteData:
        return _local_site(path, config.site, site_key(state_dir), state_dir)

    return OpenSite(
        config.site,
        Described.by(description),
        read,
        state_dir,
        Bases.of_site(config, site_yaml),
        config.privacy,
        config.scores,
        config.secure_sums,
        features_gb=config.features_gb,
        limits=config.limits,
        asks=config.runs == "ask",
    )


@lru_cache(maxsize=1)
def _local_site(path: Path, site: str, key: bytes, state: Path) -> SiteData:
    return with_privileged_notes(DecodedStore(state, site, key).open(path))
