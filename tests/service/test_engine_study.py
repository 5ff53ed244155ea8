import json

import pytest
from support import random_image

from service.cli import main
from service.engine_study import mixed_widths


@pytest.fixture
def study(repository, tmp_path, monkeypatch, capsys):
    def run(*flags: str):
        where = ("--repository", str(repository), "--model", "tiny", "--cache-dir", str(tmp_path / "cache"))
        brief = ("--rounds", "2", "--block-s", "0.005")
        monkeypatch.setattr("sys.argv", ["slicewise", "engine", *where, *brief, *flags])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    return run


def test_every_arm_takes_its_turn_in_every_round(study):
    status, printed = study()
    assert status == 0
    said = json.loads(printed.out)
    assert set(said["seconds"]) == {
        "plain 0", "plain 3", *(f"{kind} {width}" for kind in ("whole", "split") for width in range(4)), "mixed",
        "mixed, trunk of 1", "wholes",
    }  # fmt: skip
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in said["seconds"].values())
    assert said["seconds"]["wholes"][0] > said["seconds"]["whole 0"][0] * 2
    assert (said["widest"], said["mixed"]) == (3, [0, 1, 2, 3])
    assert said["madds"] == sorted(said["madds"])


def test_images_let_the_gate_take_part(study, tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(random_image(number))
    status, printed = study("--images", str(tmp_path), "--gate-batch", "2")
    assert status == 0
    assert {"gate batch", "widest batch"} < set(json.loads(printed.out)["seconds"])


def test_too_few_images_for_a_batch_are_named(study, tmp_path):
    (tmp_path / "only.png").write_bytes(random_image(0))
    status, printed = study("--images", str(tmp_path))
    assert status == 2
    assert "has 1 images; needed: gate_batch 32" in printed.err


def test_mixed_widths_span_any_ladder():
    assert mixed_widths(14) == (0, 3, 7, 13)
    assert mixed_widths(2) == (0, 0, 1, 1)
    assert mixed_widths(1) == (0, 0, 0, 0)
