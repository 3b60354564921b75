"""Weights that arrive with a message: of a model that starts from pretrained ones the part that was trained."""

from __future__ import annotations

from flwr.app import ArrayRecord

from chainward_shared.errors import ProtocolError, WeightsError
from chainward_shared.models import Architecture
from chainward_shared.models.heads import check_head
from chainward_shared.models.start import travelling_template, whole
from chainward_shared.private_sums import Frame, frame_template
from chainward_shared.protocol import StatisticsTask
from chainward_shared.weights import StateDict, digest, from_arrays


def incoming_state(
    arrays: ArrayRecord | None,
    name: str,
    architecture: Architecture,
    expected: str | None,
    base: StateDict | None = None,
) -> StateDict:
    """Return the whole model of which the weights called `name` in a message are, or are a part.

    Parameters
    ----------
    architecture : names, shapes and dtypes that they must have
    expected : digest of the whole model that the message states
    base : the weights that the architecture starts from; None where it starts from none

    Raises
    ------
    ProtocolError
        They are not there.
    WeightsError
        They are not those of the architecture, or have another digest.
    """
    if arrays is None:
        raise ProtocolError(f"the message lacks the arrays '{name}'")
    state = whole(from_arrays(arrays, travelling_template(architecture)), architecture, base)
    if digest(state) != expected:
        raise WeightsError(f"the arrays '{name}' don't have the digest that the message states; sent again?")
    return state


def incoming_frame(arrays: ArrayRecord | None, task: StatisticsTask) -> Frame:
    """Return the frame in which a private statistics round looks at embeddings, as it came with the task.

    Raises
    ------
    ProtocolError
        It isn't there, or the task has no private sums.
    WeightsError
        It has other shapes than the task says, numbers that are none, or another digest.
    """
    if arrays is None or task.form is None:
        raise ProtocolError("the message lacks the arrays 'frame'")
    state = from_arrays(arrays, frame_template(task.form.dimension, check_head(task.architecture)))
    if digest(state) != task.frame_digest:
        raise WeightsError("the arrays 'frame' don't have the digest that the message states; sent again?")
    return Frame.from_state(state)
