"""Which site a node is, and its data: from its own site.yaml, or, in a simulation, from the message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chainward_client.data.site_data import SiteData
from chainward_client.data.sources import local_site, simulated_site
from chainward_client.private_site import PrivateSite
from chainward_shared.errors import DataError, ProtocolError, nearest
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.protocol import SimulatedSite

SITE_CONFIG_KEY = "site-config"
"""Key of the node configuration that names a deployed hospital's site.yaml."""


class SiteConfig(BaseModel):
    """A hospital's own site.yaml.

    Attributes
    ----------
    site : id of the site
    data : path of the data file
    state : folder for what the site keeps between messages
    privacy : the site's rules on privacy; without, it takes part in runs without privacy only

    Both paths may be relative to site.yaml.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: str = Field(min_length=1, max_length=64)
    data: str
    state: str = "~/.chainward/site"
    privacy: PrivacyPolicy | None = None

    def state_dir(self, path: Path) -> Path:
        """Return the state folder of the site whose site.yaml is in `path`."""
        return path.parent / Path(self.state).expanduser()


@dataclass(frozen=True)
class OpenSite:
    """A site that is ready to work: its data, where it keeps its state, and its privacy policy, if it has one."""

    data: SiteData
    state_dir: Path
    policy: PrivacyPolicy | None = None
    simulated: bool = False

    def open_privacy(self) -> PrivateSite | None:
        """Return what the site's private work needs, its ledger verified; None without a policy.

        Raises
        ------
        PrivacyError
            Ledger or key are missing or damaged.
        """
        if self.policy is None:
            return None
        return PrivateSite.open(self.policy, self.state_dir, self.data.site, create=self.simulated)


def load_site_config(path: Path) -> SiteConfig:
    """Read and check a site.yaml.

    Raises
    ------
    DataError
        One line that names the file and the key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected keys and values (site, data, state), found {type(content).__name__}")
    try:
        return SiteConfig.model_validate(content)
    except ValidationError as error:
        problems = error.errors()
        unknown = [problem["loc"] for problem in problems if problem["type"] == "extra_forbidden"]
        if unknown:  # first: a misspelt key is also a missing one
            known = SiteConfig.model_fields if len(unknown[0]) == 1 else PrivacyPolicy.model_fields
            key = str(unknown[0][-1])
            raise DataError(
                f"{path}: there is no key '{_dotted(unknown[0])}'{nearest(key, known)}; keys are {', '.join(known)}"
            ) from error
        problem = problems[0]
        found = (
            f", found {problem['input']!r}" if isinstance(problem["input"], int | float) and problem["loc"][1:] else ""
        )
        message = problem["msg"].lower().removeprefix("value error, ")
        raise DataError(f"{path}: {_dotted(problem['loc'])}: {message}{found}") from error


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)


def own_config(node_config: Mapping[str, Any]) -> SiteConfig | None:
    """Return the site.yaml that this node was started with; None for a simulated node."""
    path = node_config.get(SITE_CONFIG_KEY)
    return load_site_config(Path(str(path))) if path else None


def open_site(node_config: Mapping[str, Any], simulated: SimulatedSite | None) -> OpenSite:
    """Return the site that this node is.

    Raises
    ------
    ProtocolError
        A deployed site was told who to be, or a simulated one wasn't.
    DataError
        The data can't be used.
    """
    config = own_config(node_config)
    if config is not None:
        if simulated is not None:
            raise ProtocolError(
                f"site '{config.site}' knows who it is from its own site.yaml and refuses to play "
                f"simulated site {simulated.index}"
            )
        base = Path(str(node_config[SITE_CONFIG_KEY])).parent
        data = _local_site((base / Path(config.data).expanduser()).resolve(), config.site)
        return OpenSite(data, config.state_dir(Path(str(node_config[SITE_CONFIG_KEY]))), config.privacy)
    if simulated is None:
        raise ProtocolError(
            f"this node has no '{SITE_CONFIG_KEY}' in its node configuration and was not told which simulated site to be"
        )
    data = _simulated_site(
        simulated.source,
        simulated.index,
        simulated.num_sites,
        simulated.label_skew,
        simulated.seed,
        _stamp(simulated.source),
    )
    return OpenSite(data, Path(simulated.state_dir) / data.site, simulated.policy, simulated=True)


def _stamp(source: str) -> float:
    path = Path(source)
    return path.stat().st_mtime if path.is_file() else 0.0


@lru_cache(maxsize=64)
def _simulated_site(source: str, index: int, num_sites: int, label_skew: float, seed: int, stamp: float) -> SiteData:
    return simulated_site(source, index, num_sites=num_sites, label_skew=label_skew, seed=seed)


@lru_cache(maxsize=1)
def _local_site(path: Path, site: str) -> SiteData:
    return local_site(path, site, seed=0)
