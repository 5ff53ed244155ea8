"""DS-ResNet with more channels and the same answers."""

from dataclasses import replace

import pytest
import torch
from support import CLASSES, TINY_EXIT, TINY_INPUT, TINY_RESNET, calibrated_gate, pictures, tiny_net, tiny_resnet

from models import cli, widening
from models.checkpoint import Checkpoint, CheckpointError, Measured, load, save
from models.ds_resnet import DsResnet
from models.widening import widen, widened

X = pictures()[:7]


@pytest.fixture(scope="module", params=[TINY_RESNET, TINY_EXIT], ids=["squeeze", "exit"])
def net(request) -> DsResnet:
    return tiny_resnet(config=request.param)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    net, folder = tiny_resnet(config=TINY_EXIT), tmp_path_factory.mktemp("zoo") / "shop" / "3"
    gate = replace(
        calibrated_gate(net),
        hold_out_shares=(0.5, 0.25, 0.25),
        accuracy=(Measured(0.7, "hold-out", 8), Measured(0.8, "test", 4)),
        mean_madds=(Measured(1.0, "hold-out", 8), Measured(2.0, "test", 4)),
    )
    save(
        folder, net, classes=CLASSES, input_spec=TINY_INPUT, gate=gate,
        accuracy=[[Measured(0.1 * k, "test", 4)] for k in range(4)],
        dataset={"name": "toys"}, recipe={"name": "quick", "seed": 0},
    )  # fmt: skip
    return load(folder)


@pytest.mark.parametrize("factor", [2, 3])
@torch.no_grad()
def test_every_slice_and_the_gate_answer_alike(net, factor):
    wide = widened(net, factor)
    for width in range(len(net.ladder)):
        torch.testing.assert_close(wide(X, width), net(X, width), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(wide.subnet(width)(X), net(X, width), rtol=1e-4, atol=1e-4)
    given, own = (each.gate_logits(each.trunk(X).gate_input) for each in (wide, net))
    torch.testing.assert_close(given, own, rtol=1e-4, atol=1e-4)


def test_channels_and_costs_grow(net):
    wide = widened(net, 3)
    assert wide.config.stem_width == 3 * net.config.stem_width
    assert [stage.widths for stage in wide.config.body] == [
        tuple(3 * width for width in stage.widths) for stage in net.config.body
    ]
    for more, cost in zip(wide.costs(), net.costs(), strict=True):
        assert 6 * cost.served_madds < more.served_madds < 9 * cost.served_madds  # the first layer reads three colours


def test_what_was_measured_is_kept_and_costs_are_counted_anew(checkpoint, tmp_path):
    written = widen(tmp_path / "wide" / "1", checkpoint, 2)
    manifest, source = load(tmp_path / "wide" / "1").manifest, checkpoint.manifest
    assert manifest == written
    assert [record.accuracy for record in manifest.slices] == [record.accuracy for record in source.slices]
    assert manifest.gate.calibration == source.gate.calibration
    assert manifest.gate.accuracy == source.gate.accuracy
    madds = [record.madds_served for record in manifest.slices]
    by_hand = 0.5 * madds[0] + 0.25 * madds[1] + 0.25 * madds[3]
    assert manifest.gate.mean_madds == (Measured(by_hand, "hold-out", 8),), "test shares are not in the manifest"
    for point, before in zip(manifest.gate.operating_points, source.gate.operating_points, strict=True):
        assert point == replace(before, madds=point.madds)
        assert point.madds == pytest.approx(sum(s * madds[c] for s, c in zip(point.shares, (0, 1, 3), strict=True)))
    assert manifest.recipe == {
        "name": "quick", "seed": 0, "widened_by": 2, "from": "shop/3", "from_digest": source.digest
    }  # fmt: skip


def test_a_gate_of_which_nothing_was_measured_stays_so(checkpoint, tmp_path):
    net = checkpoint.net
    save(tmp_path / "bare" / "1", net, classes=CLASSES, input_spec=TINY_INPUT)
    manifest = widen(tmp_path / "wide" / "1", load(tmp_path / "bare" / "1"), 2)
    assert manifest.gate.mean_madds == manifest.gate.operating_points == ()
    assert manifest.recipe is not None


def test_nothing_is_written_where_answers_differ(checkpoint, tmp_path, monkeypatch):
    def damaged(net: DsResnet, factor: int) -> DsResnet:
        wide = widened(net, factor)
        torch.nn.init.zeros_(wide.classifier.weight)
        return wide

    monkeypatch.setattr(widening, "widened", damaged)
    with pytest.raises(FloatingPointError, match="logits of slice 1 differ by"):
        widen(tmp_path / "wide" / "1", checkpoint, 2)
    assert not (tmp_path / "wide").exists()


@pytest.mark.parametrize("factor", [1, 0, -2])
def test_a_factor_that_widens_nothing(checkpoint, factor, tmp_path):
    with pytest.raises(ValueError, match=f"factor is {factor}; it must be at least 2"):
        widen(tmp_path / "wide" / "1", checkpoint, factor)


def test_another_architecture_and_a_folder_that_is_there(checkpoint, tmp_path):
    save(tmp_path / "small" / "1", tiny_net(), classes=CLASSES, input_spec=TINY_INPUT)
    with pytest.raises(ValueError, match="small/1 is a ds_mbnet; what can be widened: ds_resnet"):
        widen(tmp_path / "wide" / "1", load(tmp_path / "small" / "1"), 2)
    widen(tmp_path / "wide" / "1", checkpoint, 2)
    with pytest.raises(CheckpointError, match="already there"):
        widen(tmp_path / "wide" / "1", checkpoint, 2)


def test_by_command(tmp_path, capsys):
    net = tiny_resnet()
    save(tmp_path / "shop" / "1", net, classes=CLASSES, input_spec=TINY_INPUT)
    assert cli.main(["widen", str(tmp_path / "shop"), str(tmp_path / "wide" / "1"), "--factor", "2"]) == 0
    assert f"{widened(net, 2).costs()[2].served_madds:,} MAdds, the same answers" in capsys.readouterr().out
    assert cli.main(["widen", str(tmp_path / "shop"), str(tmp_path / "wide" / "2"), "--factor", "1"]) == 1
    assert "it must be at least 2" in capsys.readouterr().err
