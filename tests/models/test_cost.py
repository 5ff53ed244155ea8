"""Costs of the published ImageNet form, as its own counter and parameter count give them."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from models.cost import SliceCost, count_madds, count_parameters
from models.ds_mbnet import DsMbnet, imagenet14
from models.registry import build

PUBLISHED = [
    132_890_144, 152_917_184, 175_151_968, 199_594_496, 226_244_768, 255_102_784, 286_168_544, 319_442_048,
    354_923_296, 392_612_288, 432_509_024, 474_613_504, 518_925_728, 565_445_696,
]  # fmt: skip
IN_THE_PAPERS_TABLE = [133, 153, 175, 200, 226, 255, 286, 319, 355, 393, 433, 475, 519, 565]


@pytest.fixture(scope="module")
def net() -> DsMbnet:
    with torch.device("meta"):
        return DsMbnet(imagenet14())


@pytest.fixture(scope="module")
def costs(net) -> tuple[SliceCost, ...]:
    return net.costs()


def test_madds_of_the_14_slices(costs):
    assert [cost.published_madds for cost in costs] == PUBLISHED
    assert [round(cost.published_madds / 1e6) for cost in costs] == IN_THE_PAPERS_TABLE


def test_madds_of_the_teacher():
    """Every stage at its widest, the stem too; the squeeze-excites are sized by the widest anyway."""
    config = imagenet14()
    widest = tuple(replace(stage, widths=stage.widths[-1:]) for stage in config.stages)
    alone = replace(config, stem_widths=config.stem_widths[-1:], stages=widest, gate_choices=(0,))
    with torch.device("meta"):
        net = DsMbnet(alone)
    assert net.ladder[0].extents == DsMbnet(config).teacher.extents
    assert [cost.published_madds for cost in net.costs()] == [819_883_136]


def test_the_trunk_costs_the_same_at_every_width(costs):
    assert {cost.trunk_madds for cost in costs} == {40_589_760}


def test_the_gate_adds_its_slimming_head_to_the_served_cost(costs):
    assert {cost.slimming_madds for cost in costs} == {264}
    assert [cost.served_madds for cost in costs] == [madds + 264 for madds in PUBLISHED]


def test_active_parameters(costs):
    counted = {k: costs[k].parameters for k in (0, 1, 2, 3, 7, 13)}
    assert counted == {0: 2_660_364, 1: 2_935_180, 2: 3_224_332, 3: 3_527_820, 7: 4_885_132, 13: 7_351_180}


def test_all_parameters(net):
    assert count_parameters(net) == 7_676_204


def test_costs_do_not_depend_on_where_the_network_lives(net):
    assert build("ds_mbnet", asdict(imagenet14())).costs() == net.costs()


def test_counted_layers_by_hand():
    module = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 5),
    )  # fmt: skip
    convolution, pool, linear = 4 * 6 * 9 // 2 * 16, 6 * 16, 6 * 5
    assert count_madds(module, torch.empty(3, 4, 8, 8)) == convolution + pool + linear
    assert count_parameters(module) == 6 * 2 * 9 + 6 + 12 + 35
