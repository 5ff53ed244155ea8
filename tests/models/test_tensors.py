import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.tensors import parse_tensors, round_weights, serialise_tensors, tensor_faults


@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=20))
def test_tensors_come_back_as_they_were(values):
    tensors = {"a": torch.tensor(values, dtype=torch.float32), "count": torch.tensor(3)}
    again = parse_tensors(serialise_tensors(tensors), tensors)
    assert tensor_faults(again, tensors) == []
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_half_precision_numbers_take_half_the_bytes_and_nothing_is_rounded_to_become_one():
    exact, odd = torch.rand(1000).half().float(), torch.rand(1000)
    sizes = [len(serialise_tensors({"a": tensor})) for tensor in (exact, odd)]
    assert sizes[0] < 0.55 * sizes[1]
    assert torch.equal(parse_tensors(serialise_tensors({"a": odd}), {"a": odd})["a"], odd)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 1e-30])
def test_what_half_precision_cannot_hold_stays_what_it_is(value):
    tensors = {"a": torch.tensor([value, 1.0])}
    assert torch.equal(parse_tensors(serialise_tensors(tensors), tensors)["a"].isnan(), tensors["a"].isnan())
    assert parse_tensors(serialise_tensors(tensors), tensors)["a"].nan_to_num()[0] == tensors["a"].nan_to_num()[0]


def test_only_matrices_and_kernels_are_rounded():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    with torch.no_grad():
        net[1].weight += 1e-5
        before["1.weight"] += 1e-5
    round_weights(net)
    for name, weight in net.named_parameters():
        assert weight.dtype == torch.float32
        expected = before[name].half().float() if weight.ndim > 1 else before[name]
        assert torch.equal(weight, expected)


def test_a_weight_beyond_half_precision_is_refused():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight[0, 0] = 1e5
    with pytest.raises(OverflowError, match=r"weight reaches 1e\+05; half precision ends at 65,504"):
        round_weights(net)
