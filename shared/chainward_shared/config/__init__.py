"""The configuration of a run: its tables, its flat keys, what contradicts itself, and the recipes that follow from it."""

from chainward_shared.config.options import ConfigScalar, Option
from chainward_shared.config.output import OutputConfig
from chainward_shared.config.run import RunConfig, options, table_descriptions
from chainward_shared.config.tables import (
    ChainConfig,
    DataConfig,
    FederationConfig,
    OnFailure,
    PrivacyConfig,
    PrivilegedConfig,
    SiteOrder,
    StrandMerge,
    StudentConfig,
    StudentStart,
)

__all__ = [
    "ChainConfig",
    "ConfigScalar",
    "DataConfig",
    "FederationConfig",
    "OnFailure",
    "Option",
    "OutputConfig",
    "PrivacyConfig",
    "PrivilegedConfig",
    "RunConfig",
    "SiteOrder",
    "StrandMerge",
    "StudentConfig",
    "StudentStart",
    "options",
    "table_descriptions",
]
