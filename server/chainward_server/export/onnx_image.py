"""The way from an image of any shape to the model's square as ONNX operators, to stand before the model in one graph.

Pillow's bicubic filter is two matrix products, each rounded to 8 bits: the graph computes the same weights in float64, also of a
box and with bars. It begins with the columns; where Pillow begins with the rows, as it may from version 13 on, pictures differ by
a grey level or two at single pixels, and pure noise by more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chainward_shared.preparation import Fit

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_LINEAR = {"mode": "linear", "antialias": 1}


class _Graph:
    """Nodes and constants of a graph, as they are added."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[Any] = []

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Return the name of a constant."""
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        from onnx import helper

        name = f"prepared_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"prepare_{len(self.nodes)}", **attributes))
        return name

    def cast(self, name: str, to: int) -> str:
        """Convert to another type."""
        return self.add("Cast", name, to=to)

    def number(self, value: float) -> str:
        """Return the name of a constant of float64."""
        return self.constant(value, np.float64)

    def eight_bits(self, name: str) -> str:
        """Round float64 and cut it to what 8 bits hold; halves go up, as in Pillow."""
        rounded = self.add("Floor", self.add("Add", name, self.number(0.5)))
        return self.add("Clip", rounded, self.number(0), self.number(255))


def with_preparation(model: ModelProto, *, channels: int, size: int, network_size: int, fit: Fit) -> ModelProto:
    """Return a model that takes ``image``, uint8 (1, channels, height, width) of any shape, instead of ``pixels``."""
    from onnx import TensorProto, compose, helper

    graph = _Graph()
    height, width = (
        graph.cast(graph.add("Squeeze", graph.add("Shape", "image", start=axis, end=axis + 1)), TensorProto.DOUBLE)
        for axis in (2, 3)
    )
    image = graph.cast("image", TensorProto.DOUBLE)
    columns = graph.add("Transpose", _weights(graph, width, height, size, fit), perm=[1, 0])
    image = graph.eight_bits(graph.add("MatMul", image, columns))
    image = graph.eight_bits(graph.add("MatMul", _weights(graph, height, width, size, fit), image))
    if network_size != size:
        sizes = graph.constant([1, channels, network_size, network_size])
        single = graph.cast(image, TensorProto.FLOAT)
        image = graph.add("Resize", single, "", "", sizes, coordinate_transformation_mode="half_pixel", **_LINEAR)
        image = graph.add("Round", image)
    output = graph.cast(image, TensorProto.UINT8)
    used = {name for node in graph.nodes for name in node.input}
    prepared = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "prepare",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, channels, "height", "width"])],
            [helper.make_tensor_value_info(output, TensorProto.UINT8, [1, channels, network_size, network_size])],
            [one for one in graph.constants if one.name in used],
        ),
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
    )
    merged = compose.merge_models(prepared, model, io_map=[(output, "pixels")])
    merged.graph.name = "chainward"
    merged.producer_name, merged.producer_version = model.producer_name, model.producer_version
    return merged


def _weights(graph: _Graph, side: str, other: str, size: int, fit: Fit) -> str:
    """Return the weights of one side's pixels in those of the square, float64 (size, side), as `placement` lays them.

    Parameters
    ----------
    side, other : the lengths of this side and of the other, float64 scalars
    """
    add, number = graph.add, graph.number
    begin, length, first, count = number(0), side, number(0), number(size)
    if fit == "crop":
        length = add("Min", side, other)
        begin = add("Div", add("Sub", side, length), number(2))
    elif fit == "pad":
        scale = add("Div", number(size), add("Max", side, other))
        count = add("Max", add("Round", add("Mul", side, scale)), number(1))
        first = add("Floor", add("Div", add("Sub", number(size), count), number(2)))
    step = add("Div", length, count)
    targets = graph.constant(np.arange(size)[:, None], np.float64)
    place = add("Sub", targets, first)
    centres = add("Add", begin, add("Mul", add("Add", place, number(0.5)), step))
    pixels = add("Add", add("Range", number(0), side, number(1)), number(0.5))
    distance = add("Abs", add("Div", add("Sub", pixels, centres), add("Max", step, number(1))))
    weights = _cubic(graph, distance)
    weights = add("Div", weights, add("ReduceSum", weights, graph.constant([1]), keepdims=1))
    inside = add("And", add("GreaterOrEqual", place, number(0)), add("Less", place, count))
    return add("Where", inside, weights, number(0))


def _cubic(graph: _Graph, x: str) -> str:
    """Return the cubic kernel with a = -0.5 of distances (Keys 1981), in Horner's form."""
    add, number = graph.add, graph.number
    square = add("Mul", x, x)
    near = add("Add", add("Mul", add("Sub", add("Mul", x, number(1.5)), number(2.5)), square), number(1))
    far = add("Add", add("Mul", add("Sub", x, number(5)), x), number(8))
    far = add("Add", add("Mul", add("Mul", far, x), number(-0.5)), number(2))
    beyond = add("Where", add("Less", x, number(2)), far, number(0))
    return add("Where", add("Less", x, number(1)), near, beyond)
