"""A hospital's own site.yaml. Read without PyTorch, for which commands that only read it need not wait."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from chainward_shared.bounds import FEWEST_SITES, Epochs, ImageSize, Laps, Threads
from chainward_shared.errors import DataError, nearest
from chainward_shared.outside import Record, SiteId
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.words import first_problem

WeightsPolicy = Literal["any", "only-reviewed"]


class SiteLimits(Record):
    """The `limits` block of site.yaml: the most of each that one request may ask for, and the fewest images that sums go over.

    Attributes
    ----------
    epochs : of one training, those of privileged teachers included
    rounds : of students in a run
    laps : passes of the chain over its sites
    batch_size : images, or patients of a private training, in one step
    image_size : side of the images that a model sees, pixels
    parameters : of each model, trained or frozen
    threads : of the processor. A run that asks for more is refused, not given fewer: the number decides the last bits of
        the model
    trainings : that a private run plans here in all; each costs time to account for
    statistics_images : the fewest labelled training images over which embeddings are summed up; from sums over few, more can be
        told of each
    statistics_class : the fewest images of each class that the site has among them (multi-label: with and without each
        finding); the sums over a class of one image are that image's embedding. 1: any number
    """

    epochs: Epochs = 1_000
    rounds: Annotated[int, Field(ge=1, le=20_000)] = 1_000
    laps: Laps = 100
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 4_096
    image_size: ImageSize = 1_024
    parameters: Annotated[int, Field(ge=1, le=10**11)] = 400_000_000
    threads: Threads = 64
    trainings: Annotated[int, Field(ge=1, le=100_000)] = 10_000
    statistics_images: Annotated[int, Field(ge=1, le=10**9)] = 10
    statistics_class: Annotated[int, Field(ge=1, le=10**9)] = 1


class ScoreLimits(Record):
    """The block `scores` of a site.yaml: what of exact scores may leave.

    Attributes
    ----------
    min_cases : a split with fewer cases, but any, has its scores withheld
    per_run, per_day : models that are scored in one run, and on one day (UTC) over all runs; the others are withheld
    """

    min_cases: int = Field(10, ge=1, le=1_000_000)
    per_run: int = Field(500, ge=0, le=1_000_000)
    per_day: int = Field(1000, ge=0, le=1_000_000)


class SecureSums(Record):
    """The `secure_sums` block of site.yaml: with whom the site adds up numbers that nobody sees.

    Attributes
    ----------
    partners : the other sites, each with the fingerprint of its key, ``SHA256:...``, as `chainward-site keys` prints it there
    required : whether sums that are not secure are refused, default false
    fewest : sites that a sum goes over at least, default 3
    differences : whether sums may be unmasked from whose differences the numbers of a single site follow if the models are
        much alike, default false: once there was a sum over all, there is none with one site missing
    threshold : share of the members more than which it takes to unmask a sum, default 0.5. A coordinator and k members that are
        in league with it learn no number of a single site as long as k is at most (2 threshold - 1) times the members
    noise_from : of private sums, the sites, this one among them, whose noise taken together is as much as the privacy needs:
        each adds ``1 / sqrt(noise_from)`` of it. Default 1: this site adds all of it, and relies on nobody. With more, the
        guarantee holds where so many of the sites in the sum added their share and keep it to themselves
    """

    partners: dict[SiteId, str] = Field(min_length=FEWEST_SITES - 1, max_length=10_000)
    required: bool = False
    fewest: int = Field(FEWEST_SITES, ge=FEWEST_SITES, le=10_000)
    differences: bool = False
    threshold: float = Field(0.5, ge=0.5, lt=1, allow_inf_nan=False)
    noise_from: int = Field(1, ge=1, le=10_000)

    @model_validator(mode="after")
    def _no_difference_has_one_share_of_noise(self) -> SecureSums:
        if self.noise_from > 1 and self.differences:
            raise ValueError(
                "noise_from above 1 and differences: true don't go together: a difference of two sums has the share of noise of "
                "one site alone; set one of them back"
            )
        return self


class SiteConfig(Record):
    """A hospital's own site.yaml.

    Attributes
    ----------
    site : id of the site
    data : path of the data file
    state : folder for what the site keeps between messages
    privacy : the site's rules on privacy; without, it takes part in runs without privacy only
    limits : what a run may ask of the site's machines, default as `SiteLimits` says
    scores : what of exact scores may leave, default as `ScoreLimits` says
    secure_sums : with whom the site adds up numbers that nobody sees, default nobody
    runs : ask: nothing is trained, scored or summed up before a person has approved the run's plan
    features_gb : gigabytes that the kept output of frozen trunks may take; 0: nothing is kept
    weights : only-reviewed: models start from pretrained weights only where the site's own weights store has them

    Both paths may be relative to site.yaml.
    """

    site: SiteId
    data: str
    state: str = "~/.chainward/site"
    privacy: PrivacyPolicy | None = None
    limits: SiteLimits = SiteLimits()
    scores: ScoreLimits = ScoreLimits()
    secure_sums: SecureSums | None = None
    weights: WeightsPolicy = "any"
    runs: Literal["any", "ask"] = "any"
    features_gb: float = Field(4.0, ge=0, le=1e6, allow_inf_nan=False)

    def state_dir(self, path: Path) -> Path:
        """Return the state folder of the site whose site.yaml is in `path`."""
        return path.parent / Path(self.state).expanduser()

    def weights_dir(self, path: Path) -> Path:
        """Return the site's weights store; `path`: of its site.yaml."""
        return self.state_dir(path) / "weights"


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
        unknown = [problem["loc"] for problem in error.errors() if problem["type"] == "extra_forbidden"]
        if unknown:  # first: a misspelt key is also a missing one
            known = _BLOCKS[str(unknown[0][0]) if unknown[0][1:] else ""].model_fields
            key = ".".join(map(str, unknown[0]))
            raise DataError(
                f"{path}: there is no key '{key}'{nearest(str(unknown[0][-1]), known)}; keys are {', '.join(known)}"
            ) from error
        raise DataError(f"{path}: {first_problem(error)}") from error


_BLOCKS: dict[str, type[BaseModel]] = {
    "": SiteConfig,
    "privacy": PrivacyPolicy,
    "limits": SiteLimits,
    "scores": ScoreLimits,
    "secure_sums": SecureSums,
}
