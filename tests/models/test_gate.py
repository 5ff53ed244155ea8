import pytest
import torch
from support import TINY, tiny_net

from models.ds_mbnet import DsMbnet
from models.gate import DoubleHeadedGate
from models.layers import SlicedSqueezeExcite


@pytest.fixture
def gate() -> DoubleHeadedGate:
    torch.manual_seed(0)
    return DoubleHeadedGate(8, 6, 3)


def test_the_attention_head_is_a_squeeze_excite(gate):
    assert isinstance(gate.attention, SlicedSqueezeExcite)
    x = torch.randn(2, 4, 5, 5)
    for given, expected in zip(gate(x), gate.attention(x), strict=True):
        assert torch.equal(given, expected)


def test_the_slimming_head_reads_the_same_reduced_vector_without_bias(gate):
    _, reduced = gate(torch.randn(2, 4, 5, 5))
    torch.testing.assert_close(gate.logits(reduced), reduced @ gate.slimming.weight.T)
    assert gate.slimming.bias is None


def test_the_slimming_heads_initialisation():
    torch.manual_seed(0)
    assert DoubleHeadedGate(8, 2000, 4).slimming.weight.std().item() == pytest.approx(0.5**0.5, rel=0.05)


@torch.no_grad()
def test_the_gate_is_deterministic_in_evaluation():
    net, x = tiny_net(), torch.randn(32, 3, 16, 16)
    first = net.gate_logits(net.trunk(x).gate_input)
    for _ in range(5):
        assert torch.equal(net.gate_logits(net.trunk(x).gate_input), first)


@torch.no_grad()
def test_an_image_is_gated_alike_alone_and_among_others():
    net, x = tiny_net(), torch.randn(8, 3, 16, 16)
    together = net.gate_logits(net.trunk(x).gate_input)
    alone = torch.cat([net.gate_logits(net.trunk(x[i : i + 1]).gate_input) for i in range(8)])
    torch.testing.assert_close(alone, together)


def test_only_the_gated_stages_first_block_has_a_slimming_head():
    net = DsMbnet(TINY)
    heads = [name for name, module in net.named_modules() if isinstance(module, DoubleHeadedGate)]
    assert heads == ["blocks.1.spatial.attention"]
    assert net.slimming_head() is net.blocks[1].spatial.attention.slimming
    assert net.slimming_head().out_features == len(TINY.gate_choices)
