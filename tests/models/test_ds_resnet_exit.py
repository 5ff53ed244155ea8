"""DS-ResNet with an early exit: slice 0 is the trunk."""

import copy
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support import CLASSES, TINY_EXIT, TINY_INPUT, TINY_RESNET, calibrated_gate, pictures, tiny_resnet

from models.checkpoint import load, save
from models.ds_resnet import DsResnet, cifar_exit
from models.export import export_subnet
from models.registry import build
from models.stages import StageConfig
from models.training.recipes import SupernetRecipe
from models.training.supernet_stage import SupernetTrainer

WIDTHS = range(4)
X = pictures()[:7]


@pytest.fixture(scope="module")
def net() -> DsResnet:
    return tiny_resnet(config=TINY_EXIT)


def assert_close(actual: np.ndarray, expected: torch.Tensor) -> None:
    assert actual.shape == tuple(expected.shape)
    assert np.abs(actual - expected.numpy()).max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_the_first_slice_answers_what_the_gate_reads_and_the_others_do_not(net):
    seen = net.trunk(X)
    gate_input = seen.gate_input
    assert net(X, 0).equal(gate_input)
    assert net.gate_class_logits(gate_input) is None, "the exit's classifier learns as a slice does"
    answers = [net.answer(seen, width) for width in WIDTHS]
    for one, other in pairwise(answers):
        assert not torch.allclose(one, other, atol=0.1)


@torch.no_grad()
def test_one_squeezed_vector_feeds_the_attention_and_the_exit(net):
    trunk = net.subnet(0).trunk
    raw = trunk.layers(X)
    squeezed = trunk.squeeze(raw)
    features, gate_input = net.trunk(X)
    assert (raw.shape, squeezed.shape) == ((7, 8, 8, 8), (7, 6))
    torch.testing.assert_close(features, raw * net.gate.attention(squeezed).sigmoid()[:, :, None, None])
    torch.testing.assert_close(gate_input, net.gate.classifier(squeezed))


def test_the_ladder_begins_with_the_exit(net):
    assert [sub.extents for sub in net.ladder] == [(0, 0), (4, 8), (8, 12), (12, 16)]
    assert [sub.index for sub in net.ladder] == [0, 1, 2, 3]


@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_a_static_subnet_answers_as_the_supernet_folded_and_exported_too(net, width):
    subnet, trunk, expected = net.subnet(width), net.trunk(X), net(X, width)
    torch.testing.assert_close(subnet(X), expected)
    for given, own in zip(subnet.trunk(X), trunk, strict=True):
        torch.testing.assert_close(given, own)
    session = ort.InferenceSession(export_subnet(net, width), providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        assert_close(session.run(None, {"pixels": X[:batch].numpy()})[0], expected[:batch])


def test_madds_by_hand(net):
    """Features are 8x8; the exit's pools leave 4x4; its last stage does not pool."""
    stem, stage = 3 * 4 * 9 * 256, 4 * 8 * 9 * 256 + 2 * 8 * 8 * 9 * 64
    exit_ = 8 * 5 * 9 * 64 + 2 * 5 * 5 * 9 * 16 + 5 * 6 * 9 * 16 + 2 * 6 * 6 * 9 * 16
    heads = 6 * 4 * 4 + 6 * 8 + 6 * 10  # the pool, attention, classifier
    costs = net.costs()
    assert {cost.trunk_madds for cost in costs} == {stem + stage + exit_ + heads}
    assert costs[0].body_madds == 0
    assert costs[1].body_madds == 50896  # as the narrowest of the same body without an exit


def test_the_exit_learns_as_a_slice_and_the_teacher_reaches_it(net):
    torch.manual_seed(0)
    fresh = DsResnet(TINY_EXIT).train()
    recipe = SupernetRecipe(cycles=(1,), batch_size=7, lr=0.1)
    trainer = SupernetTrainer(fresh, recipe, 0, {})
    before = fresh.gate.exit[0].transition.conv.weight.detach().clone()
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.1
    trainer.step(X, torch.arange(7), [1, 2, 0])
    assert not torch.equal(fresh.gate.exit[0].transition.conv.weight, before)


def test_a_checkpoint_survives_the_round_trip(net, tmp_path):
    save(tmp_path / "resnet" / "1", net, classes=CLASSES, input_spec=TINY_INPUT, gate=calibrated_gate(net))
    loaded = load(tmp_path / "resnet" / "1")
    assert loaded.net.config == TINY_EXIT
    assert loaded.manifest.has_exit
    for width in WIDTHS:
        assert torch.equal(loaded.net(X, width), net(X, width))


def test_a_network_without_an_exit_needs_no_word_of_it():
    config = asdict(TINY_RESNET)
    del config["exit_stages"]
    assert build("ds_resnet", config).config_dict() == asdict(TINY_RESNET)


def test_the_form_for_cifar():
    with torch.device("meta"):
        net = build("ds_resnet", asdict(cifar_exit()))
    assert (len(net.ladder), net.gate_choices) == (6, (0, 1, 2, 3, 4, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit_stages": (StageConfig((5, 6), 1, 2),)}, r"a stage of trunk or exit has one width, given \(5, 6\)"),
        ({"gate_features": 7}, "gate_features is 7; with an exit it is its last width, 6"),
        ({"gate_choices": (0, 4)}, r"gate_choices \(0, 4\) must ascend within 0\.\.3"),
        (
            {"exit_stages": (StageConfig((6,), 1, 3),)},
            "the trunk's features are 8x8; the exit needs a multiple of 3",
        ),
    ],
    ids=str,
)
def test_exits_that_are_none(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY_EXIT, **change)


def test_a_round_trains_what_it_names_and_nothing_else(net):
    fresh = copy.deepcopy(net).train()
    recipe = SupernetRecipe(cycles=(1,), batch_size=7, lr=0.1, learns="gate.")
    trainer = SupernetTrainer(fresh, recipe, 0, {})
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.1
    before = {name: parameter.detach().clone() for name, parameter in fresh.named_parameters()}
    trainer.step(X, torch.arange(7), [1, 2, 0])
    moved = {name for name, parameter in fresh.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split(".")[1] for name in moved} == {"exit", "attention", "classifier"}
    assert all(name.startswith("gate.") for name in moved)
    SupernetTrainer(fresh, replace(recipe, learns=""), 0, {})
    assert all(parameter.requires_grad for parameter in fresh.parameters())
