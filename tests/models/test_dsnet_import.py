import argparse
import pathlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.checkpoint import CheckpointError, load
from models.ds_mbnet import DsMbnet, imagenet14
from models.dsnet_import import import_dsnet, published_views

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def out_dir(tmp_path) -> Path:
    return tmp_path / "zoo" / "tiny" / "1"


def refused(source: Path, out_dir: Path, golden, **options: object) -> str:
    """The message with which the import refuses, after checking that it wrote nothing."""
    with pytest.raises(CheckpointError) as caught:
        import_dsnet(source, out_dir, golden.config, **options)
    assert not out_dir.parent.exists()
    return str(caught.value)


def test_full_size_names_shapes_and_dtypes_are_the_published_ones(full_size_shapes):
    with torch.device("meta"):
        views = dict(published_views(DsMbnet(imagenet14())))
    assert len(full_size_shapes) == 838
    assert {name: (tuple(v.shape), v.dtype) for name, v in views.items()} == full_size_shapes


def test_full_size_import(full_size_shapes, publish: Callable[..., Path], out_dir):
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {
        name: torch.rand(shape, generator=generator) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        for name, (shape, dtype) in full_size_shapes.items()
    }
    manifest = import_dsnet(publish(state), out_dir, imagenet14())
    assert manifest == load(out_dir).manifest
    assert (manifest.input.height, manifest.input.shorter_side, manifest.input.filter) == (224, 256, "bicubic")
    assert manifest.classes[:2] == ("0", "1")
    assert len(manifest.classes) == 1000
    assert {record.test_accuracy for record in manifest.slices} == {None}

    net = load(out_dir).net
    tensors = net.state_dict()
    assert torch.equal(tensors["classifier.weight"], state["classifier.weight"])
    # The last block: stage 4's only residual block. Row 3 of its norm is the statistics of width 832.
    norm = "blocks.4.residual_blocks.0.bn2.aux_bn"
    assert torch.equal(tensors["blocks.12.pointwise.norm.running_mean"][3, :832], state[f"{norm}.3.running_mean"])
    assert torch.equal(tensors["blocks.12.pointwise.norm.weight"], state[f"{norm}.13.weight"])
    assert torch.equal(
        tensors["blocks.5.spatial.attention.slimming.weight"],
        state["blocks.3.first_block.gate.gate.0.weight"].flatten(1),
    )


def test_every_missing_extra_and_misshapen_key_is_named(golden, publish, out_dir):
    state = dict(golden.state)
    del state["classifier.bias"], state["bn1.aux_bn.0.num_batches_tracked"]
    state["head.weight"] = torch.zeros(1)
    state["conv_stem.weight"] = torch.zeros(8, 3, 5, 5)
    message = refused(publish(state), out_dir, golden)
    assert "missing classifier.bias" in message
    assert "missing bn1.aux_bn.0.num_batches_tracked" in message
    assert "unexpected head.weight" in message
    assert "conv_stem.weight has shape [8, 3, 5, 5], expected [8, 3, 3, 3]" in message


def test_a_long_list_of_faults_is_not_cut(golden, publish, out_dir):
    message = refused(publish({"head.weight": torch.zeros(1)}), out_dir, golden)
    named = set(message.split(": ", 1)[1].split("; "))
    assert named == {"unexpected head.weight", *(f"missing {name}" for name in golden.state)}
    assert len(named) > 100


def test_ema_weights_are_taken_when_asked_for(golden, publish, out_dir):
    ema = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in golden.state.items()}
    source = publish(golden.state, state_dict_ema=ema)
    import_dsnet(source, out_dir.with_name("1"), golden.config)
    manifest = import_dsnet(source, out_dir.with_name("2"), golden.config, use_ema=True)
    assert manifest.recipe == {"imported_from": "published.pth.tar", "weights": "state_dict_ema"}
    raw, averaged = (load(out_dir.with_name(v)).net.state_dict()["classifier.bias"] for v in "12")
    assert torch.equal(averaged, raw + 1)


def test_ema_weights_that_are_not_there(golden, publish, out_dir):
    message = refused(publish(golden.state), out_dir, golden, use_ema=True)
    assert "no 'state_dict_ema' of tensors; it holds: epoch, arch, state_dict" in message


def test_the_legacy_file_format_is_read(golden, publish, out_dir):
    import_dsnet(publish(golden.state, legacy=True), out_dir, golden.config)
    assert torch.equal(load(out_dir).net.state_dict()["classifier.bias"], golden.state["classifier.bias"])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("foreign", [Fraction(1, 3), pathlib.PurePosixPath("x"), print])
def test_a_pickle_of_anything_but_plain_data_is_refused(golden, publish, out_dir, foreign, legacy):
    message = refused(publish(golden.state, legacy=legacy, metric=foreign), out_dir, golden)
    assert "is not a file of tensors and plain data" in message


def test_the_namespace_is_allowed_during_an_import_only(golden, publish, out_dir):
    import_dsnet(publish(golden.state), out_dir, golden.config)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut", b"\x80\x02}q\x00."])
def test_files_that_are_no_checkpoints(golden, tmp_path, out_dir, data):
    (tmp_path / "file.pth.tar").write_bytes(data)
    message = refused(tmp_path / "file.pth.tar", out_dir, golden)
    assert "file.pth.tar" in message


def test_a_state_dict_of_something_else_is_refused(golden, publish, out_dir):
    assert "no 'state_dict' of tensors" in refused(publish({}, state_dict={"a": 1}), out_dir, golden)


def test_labels_must_match_the_classes_in_number(golden, publish, out_dir):
    message = refused(publish(golden.state), out_dir, golden, classes=("cat", "dog"))
    assert "number of classes is 2, the network has 10" in message


def test_a_version_is_never_overwritten(golden, publish, out_dir):
    first = import_dsnet(publish(golden.state), out_dir, golden.config)
    with pytest.raises(CheckpointError, match="already there"):
        import_dsnet(publish(golden.state), out_dir, golden.config, ("x",) * 10)
    assert load(out_dir).manifest == first
