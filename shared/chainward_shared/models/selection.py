"""Weight selection: the first weights of a compact student are taken out of a large, trained model.

Source: Xu et al., "Initializing Models with Larger Ones", ICLR 2024, arXiv 2311.18823, section 3. The first
layers are taken (of each stage for a convolutional model), components are matched by name, and uniform channels
are selected along every axis. The channels of an axis are the same wherever that axis occurs; the paper shows
how much of the gain depends on this consistency. Each family of backbones labels the axes of its parameters;
see `families`. `Selection` has the variants: other channels, mixed heads, layers spread over the depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from chainward_shared.errors import ModelError, WeightsError
from chainward_shared.models.architecture import Architecture, build_model, skeleton
from chainward_shared.models.compact import check_selectable
from chainward_shared.models.families import Family
from chainward_shared.models.indices import Axis, Picker, Selection, Variant, select_layers


def select_weights(
    teacher_state: Mapping[str, torch.Tensor],
    teacher: Architecture,
    student: Architecture,
    variant: Variant = "A",
    *,
    selection: Selection | None = None,
) -> dict[str, torch.Tensor]:
    """Return the full state dict of the student, selected out of the teacher's.

    A ViT student for images or patches of another size gets its teacher's positions and patch embedding resampled;
    see `families.vit`. A classifier for another number of classes is the student's own, fresh.

    Parameters
    ----------
    teacher_state : state dict of `teacher`.
    teacher : the large model.
    student : a model of the same family, nowhere larger; see `compact_architecture`.
    variant : "A" or its complement "B"; see `select_indices`.
    selection : which channels, heads and layers are taken. None, the default: those of ``Selection()``.

    Returns
    -------
    Contiguous copies, in the order of the student's own state dict, with the teacher's dtypes and
    devices.

    Raises
    ------
    ModelError
        The family has no rules or differs, the student is larger than the teacher, the number of input
        channels differs, or a patch size that can't be resampled, or a parameter of the student has no counterpart
        or no rule.
    WeightsError
        `teacher_state` is not a state dict of `teacher`.
    """
    family = check_selectable(teacher, student)
    _check_state(teacher_state, teacher)
    selection = selection or Selection()
    large, small = skeleton(teacher), skeleton(student)
    channels = family.channels(large, small, Picker(selection, variant))
    sources = _source_names(large, small, family, selection)
    fresh = {} if student.num_classes == teacher.num_classes else build_model(student, seed=0).state_dict()
    selected = {}
    for name, target in small.state_dict().items():
        source_name = sources[name]
        if source_name not in teacher_state:
            raise ModelError(
                f"student '{student.name}' has the parameter '{name}', its teacher '{teacher.name}' has not"
            )
        source = teacher_state[source_name].detach()
        if fresh and family.classifier.fullmatch(name):
            selected[name] = fresh[name].to(source).clone()
            continue
        if selection.channels == "random-inconsistent":
            channels = family.channels(large, small, Picker(selection, variant, tensor=name))
        weights = source
        for dim, axis in _axes(name, source, family, channels):
            weights = weights.index_select(dim, axis.indices.to(source.device))
        weights = weights.clone(memory_format=torch.contiguous_format)
        weights = family.resampled(name, weights, large, small).contiguous()
        # an MLP of linear layers and one of 1x1 convolutions have the same weights
        if _without_trailing_ones(weights.shape) == _without_trailing_ones(target.shape):
            selected[name] = weights.reshape(target.shape)
        else:
            raise ModelError(
                f"no rule selects '{name}' of shape {tuple(target.shape)} for '{student.name}' "
                f"out of shape {tuple(source.shape)} of '{teacher.name}'"
            )
    return selected


def _check_state(state: Mapping[str, torch.Tensor], architecture: Architecture) -> None:
    expected = skeleton(architecture).state_dict()
    if missing := [name for name in expected if name not in state]:
        raise WeightsError(f"the weights of '{architecture.name}' lack '{missing[0]}' ({len(missing)} missing in all)")
    if unknown := [name for name in state if name not in expected]:
        raise WeightsError(
            f"the weights of '{architecture.name}' have an unexpected '{unknown[0]}' ({len(unknown)} in all)"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise WeightsError(
                f"'{name}' of '{architecture.name}' has shape {tuple(state[name].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )


def _source_names(large: nn.Module, small: nn.Module, family: Family, selection: Selection) -> dict[str, str]:
    """Return for each parameter of the student the name of the teacher's that it is taken out of."""
    depths, student_depths = _depths(large, family), _depths(small, family)
    taken = {
        place: select_layers(depths[place], depth, selection.layers)
        for place, depth in student_depths.items()
        if depth <= depths[place]
    }
    names = {}
    for name in small.state_dict():
        match = family.layer.match(name)
        if match and match[1] in taken:
            names[name] = f"{match[1]}.{taken[match[1]][int(match[2])]}{name[match.end() :]}"
        else:
            names[name] = name
    return names


def _depths(model: nn.Module, family: Family) -> Counter[str]:
    """Return the number of layers at each place (the model or a stage) where `family` counts them."""
    found = {match.groups() for name in model.state_dict() if (match := family.layer.match(name))}
    return Counter(place for place, _ in found)


def _axes(name: str, source: torch.Tensor, family: Family, channels: Mapping[str, Axis]) -> list[tuple[int, Axis]]:
    """Return the axes of a parameter to select along, each with its selection."""
    labels = family.labels(name)
    if labels is None:
        raise ModelError(f"the rules of the family {family.name} don't cover the parameter '{name}'")
    axes = []
    for dim, label in enumerate(labels[: source.ndim]):
        if label is None:
            continue
        axis = channels.get(label)
        if axis is None or axis.size != source.shape[dim]:
            raise ModelError(
                f"the rules of the family {family.name} don't cover axis {dim} of '{name}', shape {tuple(source.shape)}"
            )
        axes.append((dim, axis))
    return axes


def _without_trailing_ones(shape: torch.Size) -> tuple[int, ...]:
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)
