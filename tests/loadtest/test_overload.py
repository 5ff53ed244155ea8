import pytest

from loadtest import overload
from loadtest.arms import Window
from loadtest.cli import main
from loadtest.overload_record import Overload, overload_lines
from loadtest.server_state import Sample
from loadtest.victim import sampled


def record(memory_bytes, statuses=None):
    samples = tuple(Sample(float(at_s), memory_bytes(at_s), 9) for at_s in range(100))
    return Overload("m", 90.0, 900.0, 100.0, 90.0, 256, statuses or {200: 9000, 503: 81000}, 7, samples)


def test_memory_that_is_steady_after_its_first_minute_holds():
    found = record(lambda at_s: 2**20 * min(500, 400 + 10 * at_s))
    assert found.growth == 0
    assert found.held
    text = "\n".join(overload_lines(found))
    assert "| median | 495 | 500 | 500 | 500 | 500 | 500 |" in text
    assert "| 9,000 | 81,000 | 7 |" in text
    assert text.endswith(": met.")


@pytest.mark.parametrize(
    "found",
    [
        record(lambda at_s: 2**20 * (400 + at_s)),
        record(lambda _: 2**20, {200: 1, 500: 1}),
        record(lambda _: 2**20, {0: 1}),
        record(lambda _: 2**20, {200: 4000, 503: 86000}),
        record(lambda _: 2**20, {200: 9000}),
    ],
)
def test_growth_or_another_answer_is_a_miss(found):
    assert not found.held
    assert overload_lines(found)[-1].endswith("**missed**.")


def test_a_load_is_played_and_reported(monkeypatch, tmp_path, fake_spec, image_folder):
    monkeypatch.setattr(overload, "PART_S", 0.5)
    monkeypatch.setattr(overload, "LOAD_RATIO", 0.05)
    monkeypatch.setattr(overload, "PATH", "/classify")
    monkeypatch.setattr(overload, "slicewise_server", lambda *_: fake_spec("server"))
    monkeypatch.setattr(overload, "Window", lambda *_: Window(0.1, 0.3))
    # Of so short a load a fifth is shorter than a second.
    monkeypatch.setattr(overload, "sampled", lambda server: sampled(server, every_s=0.1))
    monkeypatch.setattr(Overload, "held", property(lambda _: False))  # the exit status does not hang on a fake's memory
    with pytest.raises(SystemExit, match="2"):
        main(["overload", "--images", str(image_folder), "--minutes", "0.05", "--out", str(tmp_path)])
    text = (tmp_path / "overload.md").read_text()
    assert "| 200 | sent over 1 ms late |" in text
    assert "fifth 5" in text


def test_less_than_a_part_is_refused(capsys):
    assert main(["overload", "--images", "x.zip", "--minutes", "0.01", "--out", "y"]) == 1
    assert "--minutes 0.01; allowed: at least 0.5" in capsys.readouterr().err
