"""Two passes over graphs, before and after ONNX Runtime's own, so that squeeze-excites stay in its blocked layout.

On processors with wide vectors ONNX Runtime computes convolutions on blocks of channels ("NCHWc": [N, C/b,
H, W, b]) and reorders tensors around every operator that does not know the layout. The multiplication of
a squeeze-excite, [N, C, H, W] by [N, C, 1, 1], is one of these. In the blocked layout it is a
multiplication by a vector that repeats every b numbers, so reshaped operands do it in place of two
reorderings. The vector is tiled, because short inner loops cost more than they compute. Tensors of one number per
channel are the same in both layouts and need no reordering at all.

The layout is ONNX Runtime's own affair. Whoever applies ``keep_blocked`` must compare the outputs and
otherwise do without (``graphs.SessionFactory``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
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
            blocked, scale = f"blocked_{len(renamed)}", node.input[1]
            before = producer.get(scale)
            if before is not None and before.op_type == "ReorderOutput" and len(consumers[scale]) == 1:
                dropped.add(scale)
                scale = before.input[0]
            nodes += rewrite.multiply(source.input[0], scale, (channels, height, width), blocked)
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


def pad_hidden(exported: onnx.ModelProto, block: int) -> onnx.ModelProto:
    """``exported`` with the hidden channels of every squeeze-excite filled up to whole blocks, by zeros.

    They add nothing to any output, and the convolutions around them can stay in the blocked layout.
    """
    padded = onnx.ModelProto()
    padded.CopyFrom(exported)
    graph = padded.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}
    consumers = Counter(name for node in graph.node for name in node.input)
    consumers.update(output.name for output in graph.output)
    for expand in graph.node:
        relu = producer.get(expand.input[0]) if expand.op_type == "Conv" else None
        reduce = producer.get(relu.input[0]) if relu is not None and relu.op_type == "Relu" else None
        if relu is None or reduce is None or reduce.op_type != "Conv" or len(reduce.input) < 3:
            continue
        names = (*reduce.input[1:3], expand.input[1])
        if any(name not in weights or consumers[name] > 1 for name in names):
            continue
        tensors = [weights[name] for name in names]
        if consumers[relu.output[0]] > 1 or consumers[reduce.output[0]] > 1 or list(tensors[2].dims[2:]) != [1, 1]:
            continue
        for tensor, axis in zip(tensors, (0, 0, 1), strict=True):
            values = numpy_helper.to_array(tensor)
            extra = [(0, 0)] * values.ndim
            extra[axis] = (0, -values.shape[axis] % block)
            tensor.CopyFrom(numpy_helper.from_array(np.pad(values, extra), tensor.name))
    return padded
