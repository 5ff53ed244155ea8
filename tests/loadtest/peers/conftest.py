import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from support import TINY_INPUT

from models.transform import InputSpec

SPECS = {
    "same": TINY_INPUT,
    "cropped": InputSpec(24, 20, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), shorter_side=28),
}


@pytest.fixture
def manifest(tmp_path):
    """Write a manifest with one of ``SPECS``; returns its path and the specification."""

    def write(name: str = "same") -> tuple[Path, InputSpec]:
        path = tmp_path / "manifest.json"
        path.write_text(json.dumps({"input": SPECS[name].to_json()}))
        return path, SPECS[name]

    return write


@pytest.fixture(scope="session")
def graph(tmp_path_factory) -> Path:
    """A network whose three logits are the means of the channels."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, "h", "w"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "means", [pixels], [logits]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    path = tmp_path_factory.mktemp("graph") / "means.onnx"
    onnx.save(model, path)
    return path
