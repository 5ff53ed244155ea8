import copy
from dataclasses import asdict, replace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support import CLASSES, TINY_INPUT, TINY_RESNET, calibrated_gate, pictures, tiny_resnet
from torch import nn

from models.basic_blocks import StaticBlock
from models.checkpoint import load, save
from models.ds_resnet import DsResnet, cifar
from models.export import export_subnet, fold_batch_norm, to_onnx
from models.registry import build
from models.stages import StageConfig

WIDTHS = range(3)
X = pictures()[:7]


@pytest.fixture(scope="module")
def net() -> DsResnet:
    return tiny_resnet()


def assert_close(actual: np.ndarray, expected: torch.Tensor) -> None:
    assert actual.shape == tuple(expected.shape)
    assert np.abs(actual - expected.numpy()).max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_a_static_subnet_answers_as_the_supernet_at_its_width(net, width):
    subnet, trunk = net.subnet(width), net.trunk(X)
    torch.testing.assert_close(subnet(X), net(X, width))
    for given, expected in zip(subnet.trunk(X), trunk, strict=True):
        torch.testing.assert_close(given, expected)
    torch.testing.assert_close(subnet.slimming(trunk.gate_input), net.gate_logits(trunk.gate_input))


@torch.no_grad()
def test_widths_differ_in_their_answers(net):
    narrow, middle, wide = (net(X, width) for width in WIDTHS)
    assert not torch.allclose(narrow, middle, atol=0.1)
    assert not torch.allclose(middle, wide, atol=0.1)


@torch.no_grad()
def test_a_static_subnet_owns_its_weights(net):
    mine = copy.deepcopy(net)
    subnet = mine.subnet(1)
    before = [subnet(X), subnet.slimming(subnet.trunk(X).gate_input)]
    for parameter in mine.parameters():
        parameter.zero_()
    after = [subnet(X), subnet.slimming(subnet.trunk(X).gate_input)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def leading(narrow: torch.Tensor, wide: torch.Tensor) -> bool:
    return torch.equal(narrow, wide[tuple(slice(n) for n in narrow.shape)])


def test_narrow_weights_are_prefixes_of_wide_ones(net):
    for narrower in WIDTHS[:-1]:
        narrow, wide = net.subnet(narrower), net.subnet(narrower + 1)
        for (name, mine), (other, theirs) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True):
            assert name == other
            assert leading(mine, theirs), name


@torch.no_grad()
def test_channels_beyond_the_width_are_never_read(net):
    damaged, arriving = copy.deepcopy(net), TINY_RESNET.trunk[-1].widths[0]
    for stage, config in zip(damaged.body_stages, TINY_RESNET.body, strict=True):
        narrow = config.widths[0]
        inside = [layer.conv for block in stage.blocks for layer in (block.first, block.second)]
        for conv, in_channels in [(stage.transition.conv, arriving), *((conv, narrow) for conv in inside)]:
            conv.weight[narrow:] = torch.nan
            conv.weight[:, in_channels:] = torch.nan
        arriving = narrow
    damaged.classifier.weight[:, arriving:] = torch.nan
    assert torch.equal(damaged(X, 0), net(X, 0))
    assert damaged(X, 1).isnan().all()


@torch.no_grad()
def test_the_trunk_has_one_width_and_only_the_body_has_statistics_per_width(net):
    rows = {name: module.running_mean.shape[0] for name, module in net.named_modules() if hasattr(module, "widths")}
    assert {count for name, count in rows.items() if not name.startswith("body_stages")} == {1}
    assert {count for name, count in rows.items() if name.startswith("body_stages")} == {3}
    narrow, *wider = (net.subnet(width) for width in WIDTHS)
    for subnet in wider:
        for part in ("trunk", "slimming"):
            mine, theirs = getattr(narrow, part).state_dict(), getattr(subnet, part).state_dict()
            assert list(mine) == list(theirs)
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@torch.no_grad()
def test_a_block_adds_the_leading_channels_that_came_in(net):
    block, x = copy.deepcopy(net.body_stages[0].blocks[0]), torch.randn(2, 8, 4, 4)
    for affine in (block.second.norm.weight, block.second.norm.bias):
        nn.init.zeros_(affine)
    assert torch.equal(block(x), x.relu())


def test_a_block_begins_as_its_shortcut():
    block = DsResnet(TINY_RESNET).eval().body_stages[0].blocks[0]
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x), x.relu())


@torch.no_grad()
def test_a_transition_pools_after_its_convolution():
    stage, x = DsResnet(TINY_RESNET).eval().body_stages[0], torch.randn(2, 8, 8, 8)
    y = nn.functional.conv2d(x, stage.transition.conv.weight[:4], padding=1) / (1 + 1e-5) ** 0.5
    expected = y.relu().reshape(2, 4, 4, 2, 4, 2).amax((3, 5))
    torch.testing.assert_close(stage(x, 4), expected)


def test_weights_begin_at_the_size_of_torchs_own():
    weight = DsResnet(cifar()).body_stages[1].blocks[0].first.conv.weight
    assert weight.std().item() == pytest.approx((1 / (3 * 256 * 9)) ** 0.5, rel=0.02)


@torch.no_grad()
def test_one_squeezed_vector_feeds_the_attention_and_the_gates_classifier(net):
    features, gate_input = net.trunk(X)
    assert features.shape == (7, 8, 8, 8)
    trunk = net.subnet(0).trunk
    raw = trunk.layers(X)
    squeezed = trunk.squeeze(raw)
    assert squeezed.shape == (7, 6)
    torch.testing.assert_close(features, raw * net.gate.attention(squeezed).sigmoid()[:, :, None, None])
    torch.testing.assert_close(gate_input, net.gate.classifier(squeezed))


@torch.no_grad()
def test_the_slimming_head_reads_how_sure_the_gates_classifier_is_and_not_of_what(net):
    gate_input = net.trunk(X).gate_input
    class_logits, gate_logits = net.gate_class_logits(gate_input), net.gate_logits(gate_input)
    assert (class_logits.shape, gate_logits.shape) == ((7, 10), (7, 2))
    assert net.slimming_head()(gate_input).equal(gate_logits)
    shuffled = gate_input[:, torch.randperm(10, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(net.gate_logits(shuffled), gate_logits)
    torch.testing.assert_close(net.gate_logits(gate_input + 100), gate_logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(net.gate_logits(3 * gate_input), gate_logits, atol=0.01)


@torch.no_grad()
def test_confidence_is_the_greatest_log_probabilities_and_the_entropy(net):
    head = copy.deepcopy(net.slimming_head())
    seen = []
    head.hidden.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    head(torch.tensor([0.5, 0.2, 0.1, 0.2]).log()[None])
    entropy = 0.5 * np.log(2) + 0.4 * np.log(5) + 0.1 * np.log(10)
    np.testing.assert_allclose(seen[0], [[np.log(0.5), np.log(0.2), np.log(0.2), entropy]], rtol=1e-5)


def test_the_gates_classifier_teaches_the_squeeze_and_leaves_the_slimming_head_alone(net):
    fresh = copy.deepcopy(net).train()
    fresh.gate_class_logits(fresh.trunk(X).gate_input).square().sum().backward()
    assert fresh.gate.squeeze1.conv.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in fresh.slimming_head().parameters())


def test_madds_and_parameters_by_hand(net):
    """Input 16x16; the trunk's pool halves it to 8x8, the first body stage to 4x4; the gate goes to 4x4 and 2x2."""
    stem = 3 * 4 * 9 * 256
    stage = 4 * 8 * 9 * 256 + 2 * 8 * 8 * 9 * 64  # the transition before its pool, the block after it
    gate = 8 * 6 * 9 * 16 + 6 * 6 * 9 * 4 + 6 * 2 * 2 + 6 * 8 + 6 * 10  # 3x3 twice, pool, attention, classifier
    slimming = (3 + 1) * 5 + 5 * 2  # three log probabilities and the entropy -> 5 -> 2 choices
    assert (stem, stage, gate, slimming) == (27648, 147456, 8340, 30)

    def body(a, b):
        first = 8 * a * 9 * 64 + 2 * (2 * a * a * 9 * 16)  # two blocks
        second = a * b * 9 * 16 + 2 * b * b * 9 * 16  # a pool of 1
        return first + second + b * 4 * 4 + b * 10  # pool, classifier

    costs = net.costs()
    expected_bodies = (body(4, 8), body(8, 12), body(12, 16))
    assert expected_bodies == (50896, 129336, 240032)
    for cost, expected in zip(costs, expected_bodies, strict=True):
        assert (cost.trunk_madds, cost.slimming_madds, cost.body_madds) == (stem + stage + gate, 30, expected)
        assert cost.served_madds == stem + stage + gate + 30 + expected
    # Weights, then two affine numbers per channel of each batch norm.
    trunk = (3 * 4 * 9 + 8) + (4 * 8 * 9 + 16) + 2 * (8 * 8 * 9 + 16) + (8 * 6 * 9 + 12) + (6 * 6 * 9 + 12)
    trunk += (6 * 8 + 8) + (6 * 10 + 10)
    narrowest = (8 * 4 * 9 + 8) + 4 * (4 * 4 * 9 + 8) + (4 * 8 * 9 + 16) + 2 * (8 * 8 * 9 + 16) + (8 * 10 + 10)
    assert costs[0].parameters == trunk + narrowest


@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_folding_and_export_agree_with_torch(net, width):
    subnet = net.subnet(width)
    assert any(isinstance(module, StaticBlock) for module in subnet.body)
    folded = fold_batch_norm(subnet)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert_close(folded(X).numpy(), net(X, width))
    session = ort.InferenceSession(export_subnet(net, width), providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        assert_close(session.run(None, {"pixels": X[:batch].numpy()})[0], net(X[:batch], width))


@torch.no_grad()
def test_the_exported_trunk_gives_the_gates_input(net):
    trunk = fold_batch_norm(net.subnet(0).trunk)
    session = ort.InferenceSession(
        to_onnx(trunk, (X,), ["images"], ["features", "gate_input"]), providers=["CPUExecutionProvider"]
    )
    for given, expected in zip(session.run(None, {"images": X[:3].numpy()}), net.trunk(X[:3]), strict=True):
        assert_close(given, expected)


def test_a_checkpoint_survives_the_round_trip(net, tmp_path):
    gate = calibrated_gate(net)
    save(tmp_path / "resnet" / "1", net, classes=CLASSES, input_spec=TINY_INPUT, gate=gate)
    loaded = load(tmp_path / "resnet" / "1")
    assert (loaded.manifest.architecture, loaded.manifest.gate) == ("ds_resnet", gate)
    assert loaded.net.config == TINY_RESNET
    for width in WIDTHS:
        assert torch.equal(loaded.net(X, width), net(X, width))


def test_the_form_for_cifar():
    with torch.device("meta"):
        net = build("ds_resnet", asdict(cifar()))
    assert (len(net.ladder), net.gate_choices) == (6, (0, 1, 2, 3, 4, 5))
    costs = [cost.published_madds for cost in net.costs()]
    assert costs == sorted(set(costs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trunk": ()}, "trunk and body need at least one stage each"),
        ({"body": ()}, "trunk and body need at least one stage each"),
        ({"trunk": (StageConfig((8, 16), 1, 2),)}, r"a stage of trunk or exit has one width, given \(8, 16\)"),
        ({"gate_choices": (0, 3)}, r"gate_choices \(0, 3\) must ascend within 0\.\.2"),
        ({"gate_choices": (1, 0)}, r"gate_choices \(1, 0\) must ascend within 0\.\.2"),
        ({"gate_choices": ()}, r"gate_choices \(\) must ascend within 0\.\.2"),
        ({"gate_hidden": 0}, r"gate_hidden and stage widths \(4, 6, 0, .* must be at least 1"),
        ({"trunk": (StageConfig((0,), 1, 2),)}, "stage widths .* must be at least 1"),
        ({"classes": 1}, "classes is 1; it must be at least 2"),
        ({"input_size": 15}, "input_size is 15; it must be a multiple of"),
        (
            {"body": (StageConfig((4, 8, 8), 1, 2),)},
            r"stage widths \[4, 8, 8\] must be positive and strictly ascending",
        ),
        (
            {"body": (StageConfig((4, 8, 12), 1, 2), StageConfig((8, 12), 1, 1))},
            r"routed stages must list equally many widths, got lengths \[2, 3\]",
        ),
    ],
    ids=str,
)
def test_shapes_that_are_none(change, message):
    with pytest.raises(ValueError, match=message):
        DsResnet(replace(TINY_RESNET, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("gate_hidden"), "not a ds_resnet config: gate_hidden: Field required"),
        (lambda c: c.update(depth=3), "depth: Unexpected keyword argument"),
        (lambda c: c.update(input_size="big"), "input_size: Input should be a valid integer"),
        (lambda c: c["body"][0].update(stride=0), "stride 0 must be at least 1"),
    ],
)
def test_configurations_that_cannot_be_read(change, message):
    config = asdict(TINY_RESNET)
    change(config)
    with pytest.raises(ValueError, match=message):
        build("ds_resnet", config)
