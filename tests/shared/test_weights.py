"""Weights on the wire and at rest: what goes through unchanged, what is refused, and what a full disk leaves behind."""

from __future__ import annotations

import errno
import io
import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from chainward_shared.errors import WeightsError
from chainward_shared.files import write_atomically
from chainward_shared.weights import (
    as_sent,
    byte_count,
    check_state,
    digest,
    from_arrays,
    from_full_arrays,
    load_file,
    rounded,
    save_file,
    to_arrays,
)


def a_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "stem.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "stem.bias": torch.tensor([0.0, -0.0, 1e-45, 3.4e38]),
        "head.weight": torch.randn(5, 4, generator=generator).T,  # not contiguous
        "norm.num_batches_tracked": torch.tensor(2**62 + 1),
        "scale": torch.tensor(0.1),
        "mask": torch.tensor([[True, False], [False, True]]),
        "half": torch.randn(3, generator=generator).half(),
        "double": torch.tensor([1 / 3], dtype=torch.float64),
        "nothing": torch.empty(0, 4),
    }


def identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(
        (a.dtype, a.shape) == (b.dtype, b.shape)
        and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def to_full_arrays(state: dict[str, torch.Tensor]) -> ArrayRecord:
    """One array per tensor, as counts of predictions travel."""
    return ArrayRecord({name: Array(tensor.contiguous().numpy()) for name, tensor in state.items()})


def with_array(name: str, array: Array) -> ArrayRecord:
    arrays = to_full_arrays(a_state())
    arrays[name] = array
    return arrays


def refusal_of(arrays: ArrayRecord) -> str:
    with pytest.raises(WeightsError) as caught:
        from_full_arrays(arrays, a_state())
    message = str(caught.value)
    assert "\n" not in message, "a refusal is one line"
    return message


# --- on the wire ---


BOTH = pytest.mark.parametrize(
    ("sent", "received"),
    [(to_arrays, from_arrays), (to_full_arrays, from_full_arrays)],
    ids=["packed", "one per tensor"],
)


@BOTH
def test_weights_go_over_the_wire_bit_for_bit(sent, received):
    state = a_state()
    assert identical(received(sent(state), state), state)


@BOTH
def test_the_order_that_arrives_is_the_templates(sent, received):
    state = a_state()
    reversed_arrays = sent(dict(reversed(state.items())))
    assert list(received(reversed_arrays, state)) == list(state)


@BOTH
def test_what_arrived_shares_memory_neither_with_the_message_nor_among_itself(sent, received):
    state = a_state()
    arrays = sent(state)
    arrived = received(arrays, state)
    arrived["stem.weight"].zero_()
    assert identical(arrived | {"stem.weight": state["stem.weight"]}, state)
    assert identical(received(arrays, state), state)
    assert len({tensor.untyped_storage().data_ptr() for tensor in arrived.values() if tensor.numel()}) == len(state) - 1


@BOTH
def test_a_template_needs_no_values(sent, received):
    state = a_state()
    template = {name: tensor.to("meta") for name, tensor in state.items()}
    assert identical(received(sent(state), template), state)


def test_a_model_travels_as_one_array_per_dtype_in_the_order_of_the_names():
    state = {
        "b": torch.tensor([[1.0, 2.0]]),
        "c": torch.tensor(5),
        "a": torch.tensor([0.5]),
        "d": torch.tensor([1 / 3]),
    }
    arrays = {name: array.numpy() for name, array in to_arrays(state).items()}
    assert {name: (values.dtype, values.tolist()) for name, values in arrays.items()} == {
        "halved": (np.uint8, [1, 1, 0, 0]),
        "float16": (np.float16, [0.5, 1.0, 2.0]),
        "float32": (np.float32, [np.float32(1 / 3)]),
        "int64": (np.int64, [5]),
    }
    assert {name: values.dtype for name, values in as_sent(to_arrays(state), state).items()} == {
        "a": np.float16,
        "b": np.float16,
        "c": np.int64,
        "d": np.float32,
    }


def packed_refusal(**changed: Array | None) -> str:
    arrays = to_arrays(a_state())
    for name, array in changed.items():
        if array is None:
            del arrays[name]
        else:
            arrays[name] = array
    with pytest.raises(WeightsError) as caught:
        from_arrays(arrays, a_state())
    message = str(caught.value)
    assert "\n" not in message, "a refusal is one line"
    return message


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Array]:
    return {name: Array(change(to_arrays(a_state())[name].numpy()))}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"halved": None}, "array 'halved' is missing; expected one array per dtype and 'halved'"),
        ({"float64": None}, "1 of 6 arrays are missing, first 'float64'"),
        ({"float46": Array(np.zeros(1))}, "1 unexpected array(s), first 'float46' (did you mean 'float64'?)"),
        (changed("halved", lambda values: values[:-1]), "array 'halved': uint8 (8,); expected uint8 (9,), all such"),
        (
            changed("halved", lambda values: values.astype(np.float32)),
            "array 'halved': float32 (9,); expected uint8 (9,)",
        ),
        (changed("halved", lambda values: values * 2), "array 'halved': 2; expected 0 or 1 for each of the 9 tensors"),
        (changed("halved", lambda values: values * 0 + 1), "array 'halved': 'double' as float16; expected float64"),
        (changed("float32", lambda values: values[1:]), "; expected float32 ("),
        (changed("float32", lambda values: np.append(values, np.float32(1))), "; expected float32 ("),
        (changed("float32", lambda values: values.reshape(1, -1)), "; expected float32 ("),
        (changed("float32", lambda values: values.astype(np.float64)), "array 'float32': float64 ("),
        (changed("float32", lambda values: values * np.nan), " values are NaN or infinite"),
        (changed("float16", lambda values: values * np.float16(np.inf)), "values are NaN or infinite"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_packed_arrays_that_are_not_the_models_are_refused_and_named(change, words):
    assert words in packed_refusal(**change)


@pytest.mark.parametrize("name", ["halved", "float16", "float32", "bool"])
@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_packed_bytes_are_refused(name, kept):
    whole = to_arrays(a_state())[name]
    cut = Array(dtype=whole.dtype, shape=tuple(whole.shape), stype=whole.stype, data=whole.data[:kept])
    assert packed_refusal(**{name: cut}).startswith(f"array '{name}': its bytes can't be read")


def test_a_model_of_another_architecture_is_refused():
    with pytest.raises(WeightsError, match=r"array 'halved': uint8 \(9,\); expected uint8 \(8,\)"):
        from_arrays(to_arrays(a_state()), {name: tensor for name, tensor in a_state().items() if name != "scale"})


def test_a_missing_array_is_refused_and_named():
    arrays = to_full_arrays(a_state())
    del arrays["scale"]
    assert refusal_of(arrays) == "1 of 9 arrays are missing, first 'scale'"


def test_an_extra_array_is_refused_with_the_nearest_name():
    message = refusal_of(with_array("stem.wieght", Array(np.zeros(1))))
    assert message.startswith("1 unexpected array(s), first 'stem.wieght' (did you mean 'stem.weight'?)")


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.zeros(3, np.float32), "shape (3,); expected (4,)"),
        (np.zeros((4, 1), np.float32), "shape (4, 1); expected (4,)"),
        (np.array(0, np.float32), "shape (); expected (4,)"),
        (np.zeros(4, np.float64), "float64; expected float32"),
        (np.zeros(4, np.int32), "int32; expected float32"),
        (np.array([0, np.nan, np.inf, -np.inf], np.float32), "3 of 4 values are NaN or infinite"),
    ],
)
def test_another_shape_dtype_or_value_is_refused_and_named(values, found):
    assert refusal_of(with_array("stem.bias", Array(values))) == f"array 'stem.bias': {found}"


def test_the_number_of_further_bad_arrays_is_told():
    state = a_state() | {"stem.bias": torch.full((4,), torch.nan), "scale": torch.zeros(2)}
    with pytest.raises(WeightsError, match=r"array 'stem\.bias': 4 of 4 .*\(and 1 more arrays\)"):
        check_state(state, a_state())


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_bytes_are_refused(kept):
    whole = to_full_arrays(a_state())["stem.weight"]
    cut = Array(dtype=whole.dtype, shape=tuple(whole.shape), stype=whole.stype, data=whole.data[:kept])
    assert refusal_of(with_array("stem.weight", cut)).startswith("array 'stem.weight': its bytes can't be read")


def test_a_foreign_serialisation_is_refused():
    whole = to_full_arrays(a_state())["scale"]
    foreign = Array(dtype=whole.dtype, shape=tuple(whole.shape), stype="torch.tensor", data=whole.data)
    assert refusal_of(with_array("scale", foreign)).startswith("array 'scale': serialised as 'torch.tensor'")


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (2, 2)), ("float64", (4,))])
def test_an_array_announced_as_another_is_refused(dtype, shape):
    data = Array(np.zeros(4, np.float32)).data
    lying = Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=data)
    assert refusal_of(with_array("stem.bias", lying)).startswith(
        f"array 'stem.bias': announced as {dtype} {shape}, holds float32 (4,)"
    )


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickled object was loaded",))


def test_a_pickled_object_is_refused_without_being_loaded():
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Bomb()], dtype=object), allow_pickle=True)
    pickled = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=buffer.getvalue())
    assert refusal_of(with_array("scale", pickled)).startswith("array 'scale': its bytes can't be read")


@pytest.mark.parametrize("values", [np.array(["a"]), np.array([1], "datetime64[s]")])
def test_values_that_no_model_has_are_refused(values):
    array = Array(values)
    assert "array 'scale'" in refusal_of(with_array("scale", array))


# --- half the bytes


def slowly_rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What `rounded` says of itself, one Python float at a time."""
    values = tensor.reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1).tolist()
    halves = [[float(np.float64(value).astype(np.float16)) for value in row] for row in values]
    largest = max(abs(value) for row in values for value in row)
    for row, half_row in zip(values, halves, strict=True):
        for value, half in zip(row, half_row, strict=True):
            if name.endswith("running_var"):
                matters = abs(value)
            elif tensor.ndim > 1:
                matters = max(max(map(abs, row)), largest / 256)
            elif name.endswith(("bias", "running_mean")):
                matters = largest
            else:
                matters = max(abs(value), largest / 256)
            if not math.isfinite(half) or abs(half - value) > matters / 2048:
                return tensor
    return torch.tensor(halves).reshape(tensor.shape)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-5, 1e-4, 0.02, 1.0, 300.0, 1e5])
@pytest.mark.parametrize("shape", [(), (7,), (6, 5), (1, 9, 4), (4, 3, 3, 3)])
@pytest.mark.parametrize("name", ["weight", "head.bias", "norm.running_mean", "norm.running_var"])
def test_rounding_is_what_a_slow_reading_of_its_rule_gives(name, shape, scale):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator) * scale
        if shape and seed % 2:  # channels of all sizes
            values *= 10.0 ** (-7 * torch.rand(shape[0], generator=generator)).reshape(-1, *[1] * (len(shape) - 1))
        assert torch.equal(rounded({name: values})[name], slowly_rounded(name, values))


@pytest.mark.parametrize(
    ("name", "values", "travels"),
    [
        ("head.weight", torch.tensor([[0.3, -1e-7], [0.02, 0.0]]), "float16"),
        ("head.weight", torch.tensor([[0.3, 0.2], [3e-6, -1e-6]]), "float16"),  # a channel that is switched off
        ("head.weight", torch.tensor([[1e-3, 2e-3], [3e-6, -1e-6]]), "float32"),  # one that is small beside small ones
        ("head.weight", torch.tensor([[0.3, 0.2], [torch.inf, 0.0]]), "float32"),
        ("head.weight", torch.tensor([[0.3, 7e4]]), "float32"),
        ("head.bias", torch.tensor([0.3, -1e-6, 0.0]), "float16"),
        ("head.bias", torch.tensor([1e-3, -1e-6]), "float16"),
        ("head.bias", torch.tensor([3e-5, -1e-6]), "float32"),
        ("block.gamma", torch.tensor([1e-3, -1e-6]), "float32"),
        ("block.gamma", torch.full((8,), 1e-6), "float32"),  # a layer scale as timm starts it
        ("block.gamma", torch.tensor([0.01, -0.002, 0.3]), "float16"),
        ("norm.running_var", torch.tensor([1.0, 1e-6]), "float32"),  # a channel that is almost switched off
        ("norm.running_var", torch.tensor([1.0, 0.002, 0.0]), "float16"),
        ("norm.running_mean", torch.tensor([1.0, 1e-6]), "float16"),
        ("weight", torch.tensor([[65504.0, 65519.9]]), "float16"),
        ("weight", torch.tensor([[65520.0]]), "float32"),
        ("weight", torch.tensor([[1.0, torch.nan]]), "float32"),
        ("weight", torch.zeros(3, 4), "float16"),
        ("weight", torch.empty(0, 4), "float16"),
        ("norm.num_batches_tracked", torch.tensor(7), "int64"),
        ("mask", torch.tensor([True]), "bool"),
        ("double", torch.tensor([0.5], dtype=torch.float64), "float64"),
    ],
)
def test_a_tensor_travels_in_half_precision_only_where_that_is_safe(name, values, travels):
    kept = rounded({name: values})[name]
    assert kept.dtype == values.dtype, "rounding doesn't change the dtype"
    assert set(to_arrays({name: kept})) == {"halved", travels}
    if travels == "float32":
        assert torch.equal(kept.nan_to_num(), values.nan_to_num())


def test_rounding_twice_is_rounding_once_and_survives_the_wire_bit_for_bit():
    state = a_state() | {"small": torch.full((3,), 1e-6), "large": torch.full((2, 2), 1e6)}
    once = rounded(state)
    assert not identical(once, state)
    assert identical(rounded(once), once)
    assert identical(from_arrays(to_arrays(once), state), once)
    assert digest(from_arrays(to_arrays(once), state)) == digest(once)


def test_rounding_leaves_the_original_alone_and_full_rounds_nothing():
    state = a_state()
    rounded(state)["stem.weight"].zero_()
    assert identical(state, a_state())
    assert identical(rounded(state, "full"), state)


def test_a_rounded_model_takes_half_the_bytes():
    state = {"weight": torch.randn(200, 100, generator=torch.Generator().manual_seed(0))}
    header = 128
    halved = header + 1
    assert byte_count(to_arrays(rounded(state))) == halved + 2 * 20_000 + header
    assert byte_count(to_arrays(rounded(state, "full"))) == halved + 80_000 + header
    assert byte_count(to_full_arrays(rounded(state))) == 80_000 + header


@pytest.fixture
def unread(monkeypatch) -> None:
    """Fail if an array's bytes are parsed."""
    monkeypatch.setattr(Array, "numpy", lambda array: pytest.fail("it was parsed"))


@pytest.mark.usefixtures("unread")
def test_an_array_of_more_bytes_than_its_shape_can_take_is_refused_before_it_is_read():
    arrays = with_array("stem.bias", Array("float32", (4,), "numpy.ndarray", bytes(4 * 4 + 1025)))
    assert refusal_of(arrays) == "array 'stem.bias': 1041 bytes; expected at most 1040, for float32 (4,)"


@pytest.mark.usefixtures("unread")
def test_packed_arrays_of_too_many_bytes_or_too_many_of_them_are_refused_before_they_are_read():
    halved = Array("uint8", (9,), "numpy.ndarray", bytes(9 + 1025))
    assert packed_refusal(halved=halved) == "array 'halved': 1034 bytes; expected at most 1033, for uint8 (9,)"
    many = {f"array-{i}": Array("float32", (1,), "numpy.ndarray", b"") for i in range(1000)}
    assert packed_refusal(**many) == "1006 arrays arrived; expected at most 7, for the tensors of the model"


@pytest.mark.usefixtures("unread")
def test_many_more_arrays_than_the_model_has_are_refused_at_once():
    arrays = ArrayRecord({f"array-{i}": Array("float32", (1,), "numpy.ndarray", b"") for i in range(1000)})
    assert refusal_of(arrays) == "1000 arrays arrived; expected the 9 of the model"


def test_an_archive_of_arrays_is_refused():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(1, np.float32))
    archive = Array("float32", (4,), "numpy.ndarray", buffer.getvalue())
    assert refusal_of(with_array("stem.bias", archive)) == (
        "array 'stem.bias': its bytes are an archive of arrays; expected one array"
    )


@pytest.mark.parametrize("long", ["x" * 10_000, "a\nb", "\x1b[2J"])
def test_names_and_dtypes_of_a_sender_are_shown_in_one_short_line(long):
    messages = [
        refusal_of(with_array(long, Array(np.zeros(1)))),
        refusal_of(with_array("stem.bias", Array(long, (4,), "numpy.ndarray", Array(np.zeros(4, np.float32)).data))),
        refusal_of(with_array("stem.bias", Array("float32", (4,), long, b""))),
    ]
    assert all(len(message) < 400 and message.isprintable() for message in messages)


def test_the_bytes_on_the_wire_are_counted():
    arrays = to_full_arrays({"a": torch.zeros(100), "b": torch.zeros(7, dtype=torch.int64)})
    assert byte_count(arrays) == len(arrays["a"].data) + len(arrays["b"].data) >= 456


# --- digest ---


def test_a_digest_does_not_depend_on_the_order():
    state = a_state()
    assert digest(dict(reversed(state.items()))) == digest(state)


def test_a_digest_does_not_depend_on_the_layout_in_memory():
    state = a_state()
    assert digest({name: tensor.contiguous() for name, tensor in state.items()}) == digest(state)


def one_bit_flipped() -> torch.Tensor:
    bits = torch.ones(6).view(torch.int32)
    bits[5] ^= 1
    return bits.view(torch.float32)


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.ones(6)},
        {"a": torch.ones(2, 3)},
        {"a": torch.ones(6, 1)},
        {"a": torch.ones(6).view(torch.int32)},
        {"a": one_bit_flipped()},
        {"a": torch.ones(6), "b": torch.empty(0)},
        {},
    ],
    ids=["name", "shape", "one more dimension", "dtype", "one bit", "one more array", "nothing"],
)
def test_a_digest_changes_with(other):
    assert digest(other) != digest({"a": torch.ones(6)})


def test_negative_zero_has_another_digest():
    assert digest({"a": torch.tensor([0.0])}) != digest({"a": torch.tensor([-0.0])})


# --- at rest ---


def test_a_file_keeps_weights_and_metadata_bit_for_bit(tmp_path):
    path = tmp_path / "model.safetensors"
    sha256 = save_file(a_state(), path, {"who": "oak"})
    state, metadata = load_file(path, sha256)
    assert identical(dict(sorted(state.items())), dict(sorted(a_state().items())))
    assert metadata == {"who": "oak"}


def disk_full(*_args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(params=["while writing", "while flushing", "while replacing"])
def full_disk(request, monkeypatch):
    """Return a context in which the disk is full, at one of the moments at which it can turn out to be."""

    @contextmanager
    def context():
        with monkeypatch.context() as patch:
            if request.param == "while flushing":
                patch.setattr(os, "fsync", disk_full)
            elif request.param == "while replacing":
                patch.setattr(os, "replace", disk_full)
            else:
                patch.setattr(os, "write", disk_full)  # the file is there, but no byte fits
            yield

    return context


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, full_disk):
    path = tmp_path / "model.safetensors"
    sha256 = save_file(a_state(), path, {"round": "1"})
    with full_disk(), pytest.raises(OSError, match="No space left"):
        save_file({"a": torch.zeros(9)}, path, {"round": "2"})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert load_file(path, sha256)[1] == {"round": "1"}


def test_a_full_disk_leaves_no_first_file(tmp_path, full_disk):
    with full_disk(), pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "new.json", b"{}")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "new.json", b"{}")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "state.json"
    write_atomically(path, b"a longer first version")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def file_refusal(path: Path, sha256: str | None = None) -> str:
    with pytest.raises(WeightsError) as caught:
        load_file(path, sha256)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message, "a refusal is one line"
    return message


def test_a_missing_file_is_refused(tmp_path):
    assert "can't be read (No such file" in file_refusal(tmp_path / "none.safetensors")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    assert "can't be read (Is a directory" in file_refusal(tmp_path)


@pytest.mark.parametrize("position", [0, 8, 200, -1])
def test_a_flipped_byte_is_noticed_by_the_recorded_digest(tmp_path, position):
    path = tmp_path / "model.safetensors"
    sha256 = save_file(a_state(), path, {})
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1
    path.write_bytes(contents)
    assert "SHA-256" in file_refusal(path, sha256)


@pytest.mark.parametrize("kept", [0, 4, 50, -1])
def test_a_truncated_file_is_refused_even_without_a_recorded_digest(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_file(a_state(), path, {})
    path.write_bytes(path.read_bytes()[:kept])
    assert "not a readable safetensors file" in file_refusal(path)


def test_a_pickle_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save(a_state(), path)
    assert "not a readable safetensors file" in file_refusal(path)
