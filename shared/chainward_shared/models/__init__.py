"""The models of the chain: timm backbones, and the compact students selected out of a large one.

`architecture` names and builds a backbone, `of_run` finds it by name, `compact` makes it smaller, `selection` takes a
student's weights out of a teacher's, and `families` holds one file for each kind of backbone whose weights can be selected.
"""

from chainward_shared.models.architecture import Architecture as Architecture
from chainward_shared.models.architecture import Start as Start
from chainward_shared.models.architecture import build_model as build_model
from chainward_shared.models.architecture import count_parameters as count_parameters
from chainward_shared.models.architecture import skeleton as skeleton
from chainward_shared.models.compact import compact_architecture as compact_architecture
from chainward_shared.models.indices import Selection as Selection
from chainward_shared.models.of_run import resolve_architecture as resolve_architecture
from chainward_shared.models.selection import select_weights as select_weights
