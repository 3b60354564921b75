"""The models of the chain: timm backbones, and the compact students selected out of a large one.

`architecture` names and builds a backbone, `resolve` finds it by name, `compact` makes it smaller, `selection` takes a
student's weights out of a teacher's, and `families` holds one file for each kind of backbone whose weights can be selected.
"""

from chainward_shared.models.architecture import (
    Architecture,
    Start,
    build_model,
    count_parameters,
    family_of,
    skeleton,
)
from chainward_shared.models.compact import compact_architecture
from chainward_shared.models.families import supported_families
from chainward_shared.models.indices import Selection
from chainward_shared.models.resolve import resolve_architecture
from chainward_shared.models.selection import select_weights

__all__ = [
    "Architecture",
    "Selection",
    "Start",
    "build_model",
    "compact_architecture",
    "count_parameters",
    "family_of",
    "resolve_architecture",
    "select_weights",
    "skeleton",
    "supported_families",
]
