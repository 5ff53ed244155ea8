"""A pass over graphs that ONNX Runtime has optimised: broadcast multiplications stay in the blocked layout.

On processors with wide vectors ONNX Runtime computes convolutions on blocks of channels ("NCHWc": [N, C/b,
H, W, b]) and reorders tensors around every operator that does not know the layout. The multiplication of
a squeeze-excite, [N, C, H, W] by [N, C, 1, 1], is one of these. In the blocked layout it is a
multiplication by a vector that repeats every b numbers, so reshaped operands do it in place of two
reorderings. The vector is tiled, because short inner loops cost more than they compute.

The layout is ONNX Runtime's own affair. Whoever applies this pass must compare the outputs and
otherwise do without (``graphs.SessionFactory``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

TILES = 16
"""Most repetitions of the block: 256 numbers in the inner loop with blocks of 16."""


@dataclass(slots=True)
class _Rewrite:
    """New nodes in place of old ones, and the constants that they need."""

    block: int
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def constant(self, values: Sequence[int]) -> str:
        name = f"blocked_{'_'.join(map(str, values))}"
        self.constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def multiply(self, x: str, scale: str, shape: tuple[int, int, int], out: str) -> list[onnx.NodeProto]:
        """x in blocks, scale [N, C, 1, 1] -> ``out`` in blocks, for x of shape (channels, height, width)."""
        channels, height, width = shape
        blocks, area = channels // self.block, height * width
        tiles = max(count for count in range(1, min(area, TILES) + 1) if area % count == 0)

        def node(operator: str, inputs: list[str], output: str) -> onnx.NodeProto:
            return helper.make_node(operator, inputs, [output])

        return [
            node("Reshape", [x, self.constant([0, blocks, area // tiles, tiles * self.block])], f"{out}_x"),
            node("Reshape", [scale, self.constant([0, blocks, 1, self.block])], f"{out}_scale"),
            node("Tile", [f"{out}_scale", self.constant([1, 1, 1, tiles])], f"{out}_tiled"),
            node("Mul", [f"{out}_x", f"{out}_tiled"], f"{out}_product"),
            node("Reshape", [f"{out}_product", self.constant([0, channels, height, width])], out),
        ]


def keep_blocked(exported: onnx.ModelProto, optimised: onnx.ModelProto, block: int) -> onnx.ModelProto | None:
    """``optimised`` with every such multiplication in blocks of ``block`` channels; None where there is none.

    exported  the graph that was optimised: it still tells the shapes.
    """
    inferred = shape_inference.infer_shapes(exported).graph.value_info
    shapes = {value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in inferred}
    graph = onnx.GraphProto()
    graph.CopyFrom(optimised.graph)
    producer = {output: node for node in graph.node for output in node.output}
    consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    kept_outputs = {output.name for output in graph.output}
    rewrite, renamed, dropped = _Rewrite(block), dict[str, str](), set[str]()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        product = node.output[0]
        source = producer.get(node.input[0]) if node.op_type == "Mul" else None
        behind = consumers[product]
        if (
            source is not None
            and source.op_type == "ReorderOutput"
            and product not in kept_outputs
            and len(shapes.get(product, ())) == 4
            and shapes[product][1] % block == 0
            and all(after.op_type == "ReorderInput" for after in behind)
        ):
            _, channels, height, width = shapes[product]
            blocked = f"blocked_{len(renamed)}"
            nodes += rewrite.multiply(source.input[0], node.input[1], (channels, height, width), blocked)
            renamed |= {after.output[0]: blocked for after in behind}
            dropped |= {after.output[0] for after in behind}
            if len(consumers[node.input[0]]) == 1 and node.input[0] not in kept_outputs:
                dropped.add(node.input[0])
        else:
            nodes.append(node)
    if not renamed:
        return None
    nodes = [node for node in nodes if node.output[0] not in dropped]
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    result = onnx.ModelProto()
    result.CopyFrom(optimised)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(rewrite.constants.values())
    return result
