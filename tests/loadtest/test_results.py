import math

import pytest

from loadtest.results import ArmRecord, Results, Run


def test_what_is_saved_is_loaded(tmp_path, samples):
    saved = samples.results(
        samples.comparison(1.2, samples.at_least, pairs=2),
        samples.comparison(1.0, samples.at_most, pairs=2, name="two", served={"3": 5}),
    )
    saved.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == saved
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_another_file_is_refused_by_name(tmp_path):
    (tmp_path / "other.json").write_text('{"machine": 1}')
    with pytest.raises(ValueError, match=r"other\.json: not a result of slicewise-load bench"):
        Results.load(tmp_path / "other.json")


def test_a_comparison_measured_again_takes_its_old_place(samples):
    first, second, again = samples.comparison(1.0), samples.comparison(1.0, name="two"), samples.comparison(2.0)
    assert samples.results(first, second).with_comparison(again).comparisons == (again, second)
    assert samples.results(first).with_comparison(second).comparisons == (first, second)


def test_latencies_of_all_runs_count_together(samples):
    arm = ArmRecord(
        "x", "x", "x", 1, (samples.run(latencies_ms=(1.0, 2.0)), samples.run(latencies_ms=(3.0, 4.0, 100.0)))
    )
    assert arm.requests == 5
    assert arm.latency_ms(50) == 3.0


def test_runs_without_latencies_say_their_own_medians():
    runs = tuple(Run(10, 1.0, 0.1, p50_ms, None) for p50_ms in (1.0, 2.0, 9.0))
    arm = ArmRecord("x", "x", "x", 1, runs)
    assert (arm.requests, arm.latency_ms(50), arm.latency_ms(99)) == (0, 2.0, None)


def test_a_run_without_an_image_has_no_cost_per_image():
    assert math.isnan(Run(0, 1.0, 0.1, None, None).cpu_s_per_image)
