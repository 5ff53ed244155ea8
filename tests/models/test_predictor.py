import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support import CLASSES, TINY_INPUT, calibrated_gate, random_image, tiny_net

from models import predictor
from models.checkpoint import CheckpointError, save
from models.predictor import Predictor, parse_budget
from models.transform import ImageError, load_image

IMAGES = [random_image(seed) for seed in range(40)]


@pytest.fixture(scope="module")
@torch.no_grad()
def tiny(repository) -> Predictor:
    """Its gate sends some of the images to the narrowest and some to the widest slice."""
    tiny = predictor.load(repository / "tiny")
    x = torch.from_numpy(np.stack([load_image(image, tiny.manifest.input) for image in IMAGES]))
    tiny.net.gate.attention.reduce_bias.fill_(1.0)  # all hidden units alive
    gate_input = tiny.net.trunk(x).gate_input
    gate_input_mean = gate_input.mean(0)
    direction = torch.linalg.svd(gate_input - gate_input_mean).Vh[0]
    direction -= gate_input_mean * (direction @ gate_input_mean) / (gate_input_mean @ gate_input_mean)
    tiny.net.slimming_head().weight.copy_(torch.stack([direction, -100 * gate_input_mean, -direction]))
    return tiny


@pytest.fixture(scope="module")
def wide_image(tiny) -> bytes:
    """An image that the gate sends to the widest slice."""
    return next(image for image in IMAGES if tiny.predict(image).gate_width == 3)


def test_the_highest_version_of_a_model_folder_is_taken(repository):
    assert predictor.load(repository / "tiny").manifest.version == 2
    assert predictor.load(str(repository / "tiny" / "1")).manifest.version == 1
    with pytest.raises(CheckpointError, match="no model 'absent'"):
        predictor.load(repository / "absent")


@torch.no_grad()
def test_the_gate_chooses_and_its_slice_answers(tiny):
    chosen = set()
    for image in IMAGES:
        x = torch.from_numpy(load_image(image, tiny.manifest.input)[None])
        wish = tiny.net.gate_choices[int(tiny.net.gate_logits(tiny.net.trunk(x).gate_input).argmax())]
        expected = tiny.net(x, wish).softmax(1)[0]
        result = tiny.predict(image, top_k=10)
        assert (result.width, result.gate_width) == (wish, wish)
        assert result.madds == tiny.net.costs()[wish].served_madds
        labels, probabilities = zip(*result.predictions, strict=True)
        order = expected.argsort(descending=True)
        assert list(labels) == [f"class {k}" for k in order.tolist()]
        np.testing.assert_allclose(probabilities, expected[order].numpy(), rtol=1e-4)
        chosen.add(wish)
    assert len(chosen) >= 2


@pytest.fixture(scope="module")
def pointed(tmp_path_factory):
    """A checkpoint with three operating points: all widest, mixed (the default), all narrowest."""
    folder, net = tmp_path_factory.mktemp("zoo") / "pointed" / "1", tiny_net()
    save(folder, net, classes=CLASSES, input_spec=TINY_INPUT, gate=calibrated_gate(net))
    return folder


@torch.no_grad()
def test_the_operating_point_decides_how_wide_the_gate_wishes(pointed):
    found = {}
    for point in (None, 0, 1, 2):
        at_point = predictor.load(pointed, point)
        x = torch.from_numpy(np.stack([load_image(image, at_point.manifest.input) for image in IMAGES]))
        gate_logits_NG = at_point.net.gate_logits(at_point.net.trunk(x).gate_input).numpy()
        found[point] = [at_point.predict(image).gate_width for image in IMAGES]
        assert found[point] == at_point.manifest.decision(point).widths(gate_logits_NG).tolist()
    assert set(found[0]) == {3}
    assert set(found[2]) == {0}
    assert found[None] == found[1]
    assert {0, 3} <= set(found[1])


def test_an_operating_point_that_the_checkpoint_lacks(pointed, repository):
    with pytest.raises(ValueError, match=r"operating point 3 of pointed/1; allowed: 0\.\.2"):
        predictor.load(pointed, 3)
    with pytest.raises(ValueError, match="operating point 0 of tiny/2; allowed: none"):
        predictor.load(repository / "tiny", operating_point=0)


def test_a_budget_lowers_the_width_to_the_widest_that_fits(tiny, wide_image):
    costs = tiny.net.costs()
    between = costs[2].served_madds + 1
    result = tiny.predict(wide_image, compute_budget=between)
    assert (result.width, result.gate_width, result.madds) == (2, 3, costs[2].served_madds)
    exact = tiny.predict(wide_image, compute_budget=costs[1].served_madds)
    assert exact.width == 1


def test_a_budget_never_raises_the_width(tiny):
    narrow = next(image for image in IMAGES if tiny.predict(image).gate_width == 0)
    assert tiny.predict(narrow, compute_budget="100%").width == 0


def test_a_budget_below_the_narrowest_names_its_cost(tiny):
    narrowest = tiny.net.costs()[0].served_madds
    with pytest.raises(ValueError, match=f"budget of {narrowest - 1} MAdds; slice 0 alone needs {narrowest}"):
        tiny.predict(IMAGES[0], compute_budget=narrowest - 1)


def test_a_forced_width_skips_the_gate_and_its_cost(tiny, wide_image):
    result = tiny.predict(wide_image, width=1)
    assert (result.width, result.gate_width, result.madds) == (1, None, tiny.net.costs()[1].published_madds)
    with pytest.raises(ValueError, match="slice 1 alone needs"):
        tiny.predict(wide_image, width=1, compute_budget=result.madds - 1)


@pytest.mark.parametrize("width", [-1, 4])
def test_a_width_outside_the_ladder(tiny, width):
    with pytest.raises(ValueError, match=rf"width is {width}; allowed: 0\.\.3"):
        tiny.predict(IMAGES[0], width=width)


def test_top_k(tiny):
    assert len(tiny.predict(IMAGES[0]).predictions) == 5
    assert len(tiny.predict(IMAGES[0], top_k=100).predictions) == 10
    with pytest.raises(ValueError, match="top_k is 0"):
        tiny.predict(IMAGES[0], top_k=0)


def test_bytes_a_file_and_a_picture_are_the_same_image(tiny, tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(IMAGES[0])
    expected = tiny.predict(IMAGES[0])
    assert tiny.predict(file) == expected
    assert tiny.predict(str(file)) == expected
    assert tiny.predict(Image.open(io.BytesIO(IMAGES[0]))) == expected


def test_a_given_picture_is_turned_upright_and_left_as_it_was(tiny):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(random_image(3, size=20))).resize((20, 30)).save(buffer, "PNG", exif=exif)
    picture = Image.open(io.BytesIO(buffer.getvalue()))
    assert tiny.predict(picture) == tiny.predict(buffer.getvalue())
    assert picture.size == (20, 30)


def test_damaged_images_and_missing_files(tiny, tmp_path):
    with pytest.raises(ImageError):
        tiny.predict(b"no image")
    with pytest.raises(FileNotFoundError):
        tiny.predict(tmp_path / "absent.jpg")


def test_slices_are_built_once(tiny):
    tiny.predict(IMAGES[0], width=2)
    first = tiny._subnet(2)
    tiny.predict(IMAGES[1], width=2)
    assert tiny._subnet(2) is first


def test_results_are_values(tiny):
    result = tiny.predict(IMAGES[0])
    assert replace(result) == result
    with pytest.raises(AttributeError):
        result.width = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "madds"),
    [
        (180, 180), ("180000000", 180_000_000), ("180M", 180_000_000), ("0.18G", 180_000_000), ("180000k", 180_000_000),
        ("180m", 180_000_000), ("40%", 400), ("100%", 1000), ("0.05%", 0), (" 7 ", 7), ("1.9", 1),
        ("0.29G", 290_000_000),
    ],
)  # fmt: skip
def test_budgets(text, madds):
    assert parse_budget(text, 1001 if text == "40%" else 1000) == madds


@pytest.mark.parametrize("text", [0, -5, "", "0", "0%", "M", "1T", "1e9", "nan", "inf", "-1M", "1,5M", "1 000", "٣M"])
def test_budgets_that_mean_nothing(text):
    with pytest.raises(ValueError, match="allowed: above 0"):
        parse_budget(text, 1000)


def test_a_share_above_the_whole_is_refused():
    with pytest.raises(ValueError, match="at most 100%"):
        parse_budget("100.1%", 1000)
