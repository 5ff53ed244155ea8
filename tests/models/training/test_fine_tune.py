from dataclasses import asdict, replace

import pytest
import torch
from support import CLASSES, TINY, TINY_INPUT

from models.checkpoint import load, save
from models.ds_mbnet import DsMbnet
from models.ds_resnet import DsResnet, DsResnetConfig
from models.registry import build
from models.stages import StageConfig
from models.training.fine_tune import initialise, with_classes

RESNET = DsResnetConfig(
    input_size=16, classes=10, stem_width=4, trunk=(StageConfig((8,), 1, 2),), body=(StageConfig((8, 16), 1, 2),),
    gate_features=8, gate_hidden=4, gate_choices=(0, 1),
)  # fmt: skip


@pytest.fixture
def checkpoint(repository):
    return load(repository / "tiny" / "1")


def untouched(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_own_classes_leave_only_the_classifier_fresh(checkpoint):
    net = build("ds_mbnet", with_classes(checkpoint.manifest.config, 3))
    before, given = untouched(net), checkpoint.net.state_dict()
    fresh = initialise(net, checkpoint)
    assert fresh == ("classifier.weight", "classifier.bias")
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name] if name in fresh else given[name])
    assert not torch.equal(before["stem.conv.weight"], given["stem.conv.weight"])
    assert not torch.equal(before["stem.norm.running_mean"], given["stem.norm.running_mean"])
    net.stem.conv.weight.data.zero_()
    assert checkpoint.net.stem.conv.weight.abs().sum() > 0  # copied, not shared


def test_with_as_many_classes_everything_is_copied(checkpoint):
    net = DsMbnet(TINY)
    assert initialise(net, checkpoint) == ()
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(net.eval()(x, 3), checkpoint.net(x, 3))


def test_both_classifiers_of_a_resnet_are_fresh(tmp_path):
    torch.manual_seed(0)
    save(tmp_path / "net" / "1", DsResnet(RESNET), classes=CLASSES, input_spec=TINY_INPUT)
    net = build("ds_resnet", with_classes(asdict(RESNET), 4))
    assert {name.rpartition(".")[0] for name in initialise(net, load(tmp_path / "net" / "1"))} == {
        "classifier",
        "gate.classifier",
    }


def test_wider_slices_give_their_leading_channels_to_as_many_classes(tmp_path):
    torch.manual_seed(0)
    save(tmp_path / "net" / "1", DsResnet(RESNET), classes=CLASSES, input_spec=TINY_INPUT)
    checkpoint = load(tmp_path / "net" / "1")
    narrower = replace(RESNET, body=(StageConfig((6, 12), 1, 2),))
    net, given = DsResnet(narrower), checkpoint.net.state_dict()
    fresh = initialise(net, checkpoint)
    cut = [name for name, parameter in net.named_parameters() if given[name].shape != parameter.shape]
    assert "classifier.weight" in cut
    assert len(cut) > 5
    for name in cut:
        part = tuple(slice(size) for size in net.state_dict()[name].shape)
        assert torch.equal(net.state_dict()[name], given[name][part])
    assert all("running" in name for name in fresh)
    with pytest.raises(ValueError, match=r"net/1 has 44% of the parameters"):
        initialise(DsResnet(replace(narrower, classes=4)), checkpoint)


def test_another_architecture_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"tiny/1 has architecture ds_mbnet; allowed: ds_resnet"):
        initialise(DsResnet(RESNET), checkpoint)


def test_a_network_that_shares_little_is_refused_and_left_alone(checkpoint):
    stages = (*TINY.stages[:2], StageConfig((16, 24, 32, 160), 1, 1))
    far = DsMbnet(replace(TINY, stages=stages))
    before = untouched(far)
    with pytest.raises(ValueError, match=r"tiny/1 has [1-4]?[0-9]% of the parameters .* at least 50%"):
        initialise(far, checkpoint)
    assert all(torch.equal(tensor, before[name]) for name, tensor in far.state_dict().items())


def test_the_share_is_counted_by_parameter_not_by_tensor(checkpoint):
    """A classifier of very many classes is two tensors only, and most of the network."""
    with pytest.raises(ValueError, match="of the parameters"):
        initialise(DsMbnet(replace(TINY, classes=5000)), checkpoint)


def test_a_config_gets_another_number_of_classes_and_is_not_changed_itself():
    config = asdict(TINY)
    assert with_classes(config, 3) == config | {"classes": 3}
    assert config["classes"] == 10
    assert build("ds_mbnet", with_classes(config, 3)).classes == 3
    with pytest.raises(ValueError, match="1 classes"):
        with_classes(config, 1)
    with pytest.raises(ValueError, match=r"\['width'\] has no field classes"):
        with_classes({"width": 1}, 3)
