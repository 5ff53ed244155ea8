"""Each sliced layer against plain torch on the leading channels, and against its materialised form."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import SlicedBatchNorm2d, SlicedConv2d, SlicedLinear, SlicedSqueezeExcite

WIDTHS = (2, 4, 8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(channels: int, size: int = 9) -> Tensor:
    return torch.randn(3, channels, size, size)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(2, 4), (8, 2), (4, 8)])
def test_convolution_uses_the_leading_channels(in_channels, out_channels, stride):
    layer = SlicedConv2d(8, 8, 3, stride)
    x = images(in_channels)
    y = layer(x, out_channels)
    assert torch.equal(y, F.conv2d(x, layer.weight[:out_channels, :in_channels], stride=stride, padding=1))
    torch.testing.assert_close(layer.materialise(in_channels, out_channels)(x), y)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", WIDTHS)
def test_depthwise_convolution_keeps_channels_apart(channels, stride):
    layer = SlicedConv2d(8, 8, 3, stride, depthwise=True)
    x = images(channels)
    each = [F.conv2d(x[:, [c]], layer.weight[[c]], stride=stride, padding=1) for c in range(channels)]
    torch.testing.assert_close(layer(x, channels), torch.cat(each, dim=1))
    torch.testing.assert_close(layer.materialise(channels, channels)(x), layer(x, channels))


def test_depthwise_convolution_cannot_change_its_channels():
    with pytest.raises(ValueError, match="a depthwise layer keeps its channels, got 4 -> 8"):
        SlicedConv2d(4, 8, 3, depthwise=True)


def test_convolution_initialisation_follows_the_fan_out():
    layer = SlicedConv2d(64, 128, 3)
    assert layer.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.05)
    depthwise = SlicedConv2d(512, 512, 3, depthwise=True)
    assert depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)


def trained_norm() -> SlicedBatchNorm2d:
    norm = SlicedBatchNorm2d(WIDTHS)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return norm.eval()


@pytest.mark.parametrize("row", range(3))
def test_batch_norm_takes_the_statistics_of_the_width_and_the_shared_affine(row):
    norm, channels = trained_norm(), WIDTHS[row]
    x = images(channels)
    mean, var = norm.running_mean[row, :channels], norm.running_var[row, :channels]
    expected = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    expected = expected * norm.weight[:channels, None, None] + norm.bias[:channels, None, None]
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.materialise(channels)(x), expected)


def test_training_moves_the_statistics_of_that_width_only():
    norm = trained_norm().train()
    before = norm.running_mean.clone(), norm.running_var.clone()
    x = images(4)
    norm(x)
    mean, var = x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(norm.running_mean[1, :4], 0.9 * before[0][1, :4] + 0.1 * mean)
    torch.testing.assert_close(norm.running_var[1, :4], 0.9 * before[1][1, :4] + 0.1 * var)
    for now, was in zip((norm.running_mean, norm.running_var), before, strict=True):
        assert torch.equal(now[[0, 2]], was[[0, 2]])
        assert torch.equal(now[1, 4:], was[1, 4:])


def test_a_width_without_statistics_is_refused():
    with pytest.raises(ValueError, match="not in tuple"):
        trained_norm()(images(3))


def test_reset_statistics():
    norm = trained_norm()
    norm.reset_running_stats()
    assert norm.running_mean.unique().tolist() == [0.0]
    assert norm.running_var.unique().tolist() == [1.0]


@pytest.mark.parametrize("channels", WIDTHS)
def test_linear_uses_the_leading_features(channels):
    layer = SlicedLinear(8, 5)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, channels)
    expected = x @ layer.weight[:, :channels].T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.materialise(channels)(x), expected)


@pytest.mark.parametrize("channels", WIDTHS)
def test_squeeze_excite_scales_channels_by_what_it_saw(channels):
    layer = SlicedSqueezeExcite(8, 3)
    torch.nn.init.normal_(layer.reduce_bias)
    torch.nn.init.normal_(layer.expand_bias)
    x = images(channels)
    scaled, reduced = layer(x)
    expected = (x.mean((2, 3)) @ layer.reduce_weight[:, :channels].T + layer.reduce_bias).relu()
    scale = (expected @ layer.expand_weight[:channels].T + layer.expand_bias[:channels]).sigmoid()
    torch.testing.assert_close(reduced, expected)
    torch.testing.assert_close(scaled, x * scale[:, :, None, None])
    static = layer.materialise(channels)
    torch.testing.assert_close(static(x), scaled)
    torch.testing.assert_close(static.reduced(x).flatten(1), reduced)


@torch.no_grad()
def test_materialised_layers_own_their_weights():
    x = images(4)
    convolution, norm, attention = SlicedConv2d(8, 8, 1), trained_norm(), SlicedSqueezeExcite(8, 3)
    linear = SlicedLinear(8, 5)
    static = convolution.materialise(4, 4), norm.materialise(4), attention.materialise(4)
    classifier = linear.materialise(4)
    before = [layer(x) for layer in static], classifier(x[:, :, 0, 0])
    for layer in (convolution, norm, linear, attention):
        for tensor in layer.state_dict().values():
            tensor.add_(1.0)
    for layer, expected in zip(static, before[0], strict=True):
        assert torch.equal(layer(x), expected)
    assert torch.equal(classifier(x[:, :, 0, 0]), before[1])


def test_gradients_reach_the_slice_and_nothing_beyond():
    layer = SlicedConv2d(8, 8, 1)
    layer(images(4), 2).sum().backward()
    reached = layer.weight.grad.abs().sum((2, 3)) > 0
    assert reached[:2, :4].all()
    assert reached.sum() == 8
