import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import TINY, TINY_INPUT, tiny_net
from torch import nn

from models.ds_mbnet import DsMbnet
from models.layers import SlicedBatchNorm2d
from models.training.calibrate import calibrate
from models.training.data import Batches, LabelledImages
from models.training.evaluate import evaluate
from models.training.gate_stage import GateData, fit_gate, fresh_head, train_head
from models.training.losses import (
    distillation,
    madds_penalty,
    sandwich_gate_sparsification,
    straight_through_gumbel,
)
from models.training.recipes import GateRecipe, Recipe, SupernetRecipe
from models.training.supernet_stage import SupernetTrainer, learning_rate

RECIPE = SupernetRecipe(cycles=(12,), batch_size=32, lr=0.05, warmup_epochs=0.5, ema_decay=0.9, crop_padding=1)


def toy_images(count=320, classes=4, noise=40, seed=0):
    """One colour per class under noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % classes
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [190, 190, 60]])[labels]
    pixels = colours[:, None, None, :] + rng.normal(0, noise, (count, 16, 16, 3))
    return LabelledImages(
        pixels.clip(0, 255).astype(np.uint8), labels, tuple("abcd"[:classes]), tuple(map(str, range(count)))
    )


def toy_net(seed=0, **changes):
    torch.manual_seed(seed)
    return DsMbnet(replace(TINY, classes=4, **changes))


def batches_of(images, recipe=RECIPE):
    return Batches(images, TINY_INPUT, recipe.batch_size, 0, recipe.crop_padding)


@pytest.mark.parametrize("stem_widths", [(4,), (4, 8)], ids=["shared trunk", "teacher with a wide trunk"])
def test_every_width_learns_a_toy_problem_in_seconds(tmp_path, stem_widths):
    images = toy_images()
    net = toy_net(stem_widths=stem_widths)
    rows = []
    SupernetTrainer(net, RECIPE, 0, {}).fit(batches_of(images), tmp_path / "state.pt", rows.append)
    calibrate(net, batches_of(images).epoch(99))
    evaluation = evaluate(net, toy_images(seed=1), TINY_INPUT)
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]
    for width in range(len(net.ladder)):
        assert evaluation.width_accuracy(width) >= 0.95


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    images, recipe = toy_images(96), replace(RECIPE, cycles=(2, 1))

    def run(net, state, stop_after=None):
        trainer = SupernetTrainer(net, recipe, 5, {"seed": "5"})

        def stop(row):
            if row["epoch"] == stop_after:
                raise KeyboardInterrupt

        trainer.fit(batches_of(images, recipe), state, stop)
        return trainer

    whole = run(toy_net(), tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        run(toy_net(), tmp_path / "part.pt", stop_after=1)
    resumed = run(toy_net(seed=9), tmp_path / "part.pt")
    for a, b in zip(whole.net.state_dict().values(), resumed.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.teacher.state_dict().values(), resumed.teacher.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_every_slice_learns_from_the_origin_as_much_as_the_recipe_says(tmp_path):
    """Whose answers are all class 3: with nothing else to learn from, so are those of every slice."""
    images, origin, recipe = toy_images(96), toy_net(seed=4), replace(RECIPE, cycles=(4,), label_smoothing=0.0)
    with torch.no_grad():
        origin.classifier.bias[3] += 100
    kept = copy.deepcopy(origin.state_dict())
    shares = []
    for weight in (0.0, 1.0):
        net = toy_net()
        trainer = SupernetTrainer(net, replace(recipe, origin_weight=weight), 0, {}, origin.eval())
        trainer.fit(batches_of(images, recipe), tmp_path / f"{weight}.pt", dict)
        calibrate(net, batches_of(images).epoch(99))
        shares.append((evaluate(net, images, TINY_INPUT).logits_NLK.argmax(2) == 3).mean(0))
    without, alone = shares
    assert (without < 0.5).all()
    assert (alone == 1).all()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in origin.state_dict().items())


@pytest.mark.parametrize(
    ("origin", "message"),
    [(None, "the run begins with no checkpoint; needed: --init-from"), (3, "the checkpoint has 3 classes; needed: 4")],
)
def test_an_origin_that_cannot_teach_is_refused(origin, message):
    recipe = replace(RECIPE, origin_weight=0.5)
    teacher = None if origin is None else DsMbnet(replace(TINY, classes=origin))
    with pytest.raises(ValueError, match=rf"^origin_weight is 0\.5 and {message}$"):
        SupernetTrainer(toy_net(), recipe, 0, {}, teacher)


def test_the_state_of_another_run_is_refused_by_what_differs(tmp_path):
    recipe, state = replace(RECIPE, cycles=(1,)), tmp_path / "state.pt"
    batches = batches_of(toy_images(32), recipe)
    SupernetTrainer(toy_net(), recipe, 0, {"seed": "0", "images": "a", "name": "n"}).fit(batches, state, dict)
    other = SupernetTrainer(toy_net(seed=1), recipe, 3, {"seed": "3", "images": "b", "name": "n"})
    untouched = copy.deepcopy(other.net.state_dict())
    with pytest.raises(
        ValueError, match=r"state\.pt is of another run: images is b, stored is a; seed is 3, stored is 0$"
    ):
        other.fit(batches, state, dict)
    assert other.epochs_done == 0
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in other.net.state_dict().items())


def test_a_state_that_does_not_say_its_run_is_refused(tmp_path):
    recipe, state = replace(RECIPE, cycles=(1,)), tmp_path / "state.pt"
    trainer = SupernetTrainer(toy_net(), recipe, 0, {})
    torch.save({key: value for key, value in trainer.state().items() if key != "identity"}, state)
    with pytest.raises(ValueError, match="does not say of which run it is"):
        trainer.fit(batches_of(toy_images(32), recipe), state, dict)


def test_sharing_the_trunk_gives_the_gradient_of_separate_passes():
    torch.manual_seed(0)
    x, labels = torch.randn(16, 3, 16, 16, dtype=torch.float64), torch.arange(16) % 4
    net = toy_net().double()  # so that equal sums in another order stay equal
    trainer = SupernetTrainer(net, replace(RECIPE, momentum=0.9), 0, {})
    plain = copy.deepcopy(net)
    with torch.no_grad():
        target = trainer.teacher.eval().largest(x).softmax(1)
    grads = {}
    trainer.optimizer.step = lambda: grads.update(
        {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    )
    net.train()
    trainer.step(x, labels, [2, 1, 0])
    plain.train()
    loss = F.cross_entropy(plain(x, 3), labels, label_smoothing=RECIPE.label_smoothing)
    loss = loss + sum(distillation(plain(x, width), target) for width in (2, 1, 0))
    loss.backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(grads[name], gradient, atol=1e-9), name


def test_the_learning_rate_warms_up_falls_to_zero_and_restarts():
    recipe = replace(RECIPE, cycles=(4, 3), lr=0.4, warmup_epochs=1.0)
    rates = [learning_rate(recipe, step, 10) for step in range(70)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == pytest.approx(0.4)
    assert rates[39] < 0.01
    assert rates[40] == pytest.approx(0.4)
    assert rates[69] < 0.01
    assert all(a >= b for a, b in pairwise(rates[9:40]))


@pytest.mark.parametrize("targets", ["ensemble_bootstrapping", "in_place_distillation", "labels"])
def test_narrow_widths_learn_from_every_kind_of_target(tmp_path, targets):
    images = toy_images()
    net = toy_net()
    recipe = replace(RECIPE, targets=targets)
    SupernetTrainer(net, recipe, 0, {}).fit(batches_of(images), tmp_path / "state.pt", lambda row: None)
    calibrate(net, batches_of(images).epoch(99))
    evaluation = evaluate(net, toy_images(seed=1), TINY_INPUT)
    assert min(evaluation.width_accuracy(width) for width in range(len(net.ladder))) > 0.9


def first_gradient(targets, ema_scale=1.0, bf16=False):
    """Gradient of the classifier after one step's backward passes, the EMA's classifier scaled."""
    net = toy_net()
    recipe = replace(RECIPE, targets=targets, bf16=bf16)
    trainer = SupernetTrainer(net, recipe, 0, {})
    with torch.no_grad():
        trainer.teacher.classifier.weight.mul_(ema_scale)
    seen = []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(net.classifier.weight.grad.clone()))
    x, labels = next(iter(batches_of(toy_images()).epoch(0)))
    net.train()
    trainer.step(x, labels, [1, 2, 0])
    return seen[0]


def test_only_bootstrapping_listens_to_the_ema():
    for targets in ("bootstrapping", "ensemble_bootstrapping"):
        assert not torch.allclose(first_gradient(targets), first_gradient(targets, 5.0))
    for targets in ("in_place_distillation", "labels"):
        assert torch.equal(first_gradient(targets), first_gradient(targets, 5.0))


def test_the_kinds_of_target_differ():
    kinds = ("bootstrapping", "ensemble_bootstrapping", "in_place_distillation", "labels")
    gradients = [first_gradient(targets, 5.0) for targets in kinds]
    for a, first in enumerate(gradients):
        assert not any(torch.allclose(first, other) for other in gradients[a + 1 :])


def test_bf16_gives_nearly_the_same_gradient():
    full, half = first_gradient("bootstrapping"), first_gradient("bootstrapping", bf16=True)
    assert not torch.equal(full, half)
    assert F.cosine_similarity(full.flatten(), half.flatten(), dim=0) > 0.99


def test_calibration_measures_the_statistics_of_every_width():
    net = tiny_net()
    norms = [m for m in net.modules() if isinstance(m, SlicedBatchNorm2d)]
    for norm in norms:
        norm.running_mean.fill_(7.0)
    batches = [(torch.randn(64, 3, 16, 16), torch.zeros(64)) for _ in range(3)]
    calibrate(net, batches)
    assert not net.training
    assert all(norm.momentum == 0.1 for norm in norms)
    with torch.no_grad():
        stem_out = torch.cat([net.stem.conv(x, 4) for x, _ in batches])
    assert torch.allclose(net.stem.norm.running_mean[0], stem_out.mean((0, 2, 3)), atol=1e-5)
    last = net.blocks[-1].pointwise.norm
    assert (last.running_mean[:, :16] != 7.0).all()
    assert len({tuple(row.tolist()) for row in last.running_mean[:, :16]}) == 4


def test_straight_through_gumbel_is_one_hot_forward_and_soft_backward():
    logits = torch.zeros(500, 3, requires_grad=True)
    choice, soft = straight_through_gumbel(logits, torch.Generator().manual_seed(0))
    assert torch.allclose(choice.sum(1), torch.ones(500), atol=1e-6)
    assert set(choice.detach().round().unique().tolist()) == {0.0, 1.0}
    assert choice.detach().mean(0).min() > 0.25
    choice[:, 0].sum().backward()
    assert torch.allclose(logits.grad.sum(1), torch.zeros(500), atol=1e-5)
    assert logits.grad.abs().sum() > 0
    assert torch.equal(soft.argmax(1), choice.argmax(1))


def test_sandwich_gate_sparsification_sends_easy_to_the_first_and_hard_to_the_last():
    easy = torch.tensor([True, False])
    right = torch.tensor([[9.0, 0, 0], [0, 0, 9.0]])
    assert sandwich_gate_sparsification(right, easy, 0.0) < 0.01
    assert sandwich_gate_sparsification(right.flip(1), easy, 0.0) > 5
    wrong_on_hard = torch.tensor([[9.0, 0, 0], [9.0, 0, 0]])
    assert sandwich_gate_sparsification(wrong_on_hard, easy, 0.0, 4.0) > 3 * sandwich_gate_sparsification(
        wrong_on_hard, easy, 0.0, 1.0
    )


def test_the_madds_penalty_is_the_square_of_the_mean_share():
    choice = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert madds_penalty(choice, torch.tensor([0.2, 1.0])).item() == pytest.approx(0.36)


def test_the_madds_penalty_may_aim_at_a_target():
    choice = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert madds_penalty(choice, torch.tensor([0.2, 1.0]), 0.6).item() == pytest.approx(0.0)


def gate_data(count=2000, hard_share=0.4):
    """The last choice is always right, the first on easy images; the input says which are easy, with noise."""
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(count, generator=generator) < hard_share
    inputs = torch.stack([1 - hard.float(), hard.float()], 1) + 0.1 * torch.rand(count, 2, generator=generator)
    right, wrong = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 4.0])
    narrow = torch.where(hard[:, None], wrong, right)
    return GateData(inputs, torch.stack([narrow, right.expand(count, 2)], 1), torch.zeros(count).long()), hard


@pytest.mark.parametrize("sgs_weight", [1.0, 0.0], ids=["with SGS", "task and cost alone"])
def test_a_released_gate_learns_which_images_need_more(sgs_weight):
    data, hard = gate_data()
    recipe = GateRecipe("released", epochs=10, batch_size=100, sgs_weight=sgs_weight)
    head = train_head(nn.Linear(2, 2, bias=False), data, torch.tensor([0.2, 1.0]), recipe, seed=0)
    assert (head(data.inputs_NR).argmax(1).bool() == hard).float().mean() > 0.98


def test_a_correctness_gate_learns_how_likely_each_choice_is_right():
    data, hard = gate_data()
    head = train_head(nn.Linear(2, 2), data, torch.tensor([0.2, 1.0]), GateRecipe(epochs=40, batch_size=100), seed=0)
    p = head(data.inputs_NR).sigmoid()
    assert p[hard, 0].mean() < 0.1
    assert p[~hard, 0].mean() > 0.9
    assert p[:, 1].mean() > 0.95


def test_a_fresh_head_forgets_and_is_decided_by_the_seed():
    old = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    new, again, other = (fresh_head(old, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), again.parameters(), strict=True))
    for layer in (0, 2):
        assert not torch.equal(new[layer].weight, old[layer].weight)
        assert not torch.equal(new[layer].weight, other[layer].weight)


def test_a_gate_that_has_nothing_to_choose_is_kept_and_said(capsys):
    """Images that all widths get right give no reason to widen."""
    images = toy_images(80, noise=1)
    net = toy_net().eval()
    with torch.no_grad():
        net.classifier.weight.zero_()
        net.classifier.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    only_a = images.take(np.flatnonzero(images.labels == 0))
    gates = (GateRecipe(epochs=5, batch_size=10),)
    recipe = Recipe("toy", "colours", "ds_mbnet", dict, TINY_INPUT, RECIPE, gates, gate_views=1)
    fit = fit_gate(net, Batches(only_a, TINY_INPUT, 10, 0, 1), only_a, TINY_INPUT, recipe)
    assert "nearly all images to one width" in capsys.readouterr().out
    assert fit.evaluation.gate_shares == (1.0, 0.0, 0.0)
    assert fit.evaluation.gate_accuracy == 1.0
