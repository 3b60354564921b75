"""The configuration of a run: its tables, its flat keys, what contradicts itself, and the recipes that follow from it."""

from chainward_shared.config.options import ConfigScalar as ConfigScalar
from chainward_shared.config.options import Option as Option
from chainward_shared.config.output import OutputConfig as OutputConfig
from chainward_shared.config.run import RunConfig as RunConfig
from chainward_shared.config.run import options as options
from chainward_shared.config.run import table_descriptions as table_descriptions
from chainward_shared.config.tables import ChainConfig as ChainConfig
from chainward_shared.config.tables import DataConfig as DataConfig
from chainward_shared.config.tables import FederationConfig as FederationConfig
from chainward_shared.config.tables import StudentConfig as StudentConfig
