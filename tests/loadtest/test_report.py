import dataclasses
import re

from loadtest.plots import draw
from loadtest.report import markdown
from loadtest.results import Run


def bar_rows(text: str) -> list[list[str]]:
    """The cells of the table of bars."""
    section = text.partition("## Bars")[2].partition("\n##")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_bars_are_reported_as_met_missed_or_unproven(samples):
    text = markdown(
        samples.results(
            samples.comparison(1.3, samples.at_least, name="fast"),
            samples.comparison(1.3, samples.at_most, name="slow"),
            samples.comparison(1.3, samples.at_least, pairs=2, name="few"),
        )
    )
    assert bar_rows(text) == [
        ["`fast`", "throughput, ratio", "at least 1.15", "1.300", "1.300 to 1.300", "met"],
        ["`slow`", "p99 latency, ratio", "at most 1.10", "1.300", "1.300 to 1.300", "**missed**"],
        ["`few`", "throughput, ratio", "at least 1.15", "1.300", "1.300 to 1.300", "unproven (2 pairs of 20)"],
    ]


def test_the_machine_and_what_was_not_measured_are_named(samples):
    text = markdown(samples.results(samples.comparison(1.0, name="width_mix")))
    assert "Some CPU, 2 usable cores, 8.0 GiB, Linux 6, Python 3.11.7. numpy 2.4." in text
    assert "Not measured: `fixed_widest_fastapi`," in text
    assert "`width_mix`" not in text.partition("Not measured:")[2].partition("\n")[0]


def test_arms_show_rates_costs_slices_and_failures(samples):
    text = markdown(
        samples.results(samples.comparison(1.5, served={"13": 3, "0": 1}, failed={"503": 1}, resident_bytes=2**20))
    )
    assert "| ours | 8 | 150.0 (150.0 to 150.0) | 15.01 | 29.70 | 10.00 | 0.00 | 1 | 30,000 | 20 |" in text
    assert "Answers by slice: 0: 25.0%, 13: 75.0%. Failed: 503 20." in text


def test_other_load_on_the_machine_is_told(samples):
    assert "Other processes took 0.50 cores (at most 0.50)" in markdown(
        samples.results(samples.comparison(1.0, other_cpu_s=5.0))
    )


def test_the_cost_of_a_request_is_what_an_image_costs_alone_beyond_a_batch(samples):
    batch = samples.comparison(1.0, name="gate_batch", cpu_s=1.0)
    single = samples.comparison(1.0, name="gate_single", cpu_s=3.0)
    assert "| ours | 3.00 | 1.00 | 2.00 |" in markdown(samples.results(batch, single))


def test_every_picture_that_is_shown_is_drawn(tmp_path, samples):
    commands = (Run(10, 1.0, 0.1, 1.0, None),)
    silent = samples.comparison(1.0, pairs=1, name="silent")
    silent = dataclasses.replace(
        silent, a=dataclasses.replace(silent.a, runs=commands), b=dataclasses.replace(silent.b, runs=commands)
    )
    found = samples.results(samples.comparison(1.2, samples.at_least, pairs=2), silent)
    drawn = {path.name for path in draw(found, tmp_path)}
    assert drawn == set(re.findall(r"!\[.*?\]\((.*?)\)", markdown(found))) == {"throughput.png", "latency_one.png"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def test_nothing_measured_is_still_a_report(tmp_path, samples):
    assert "Not measured" in markdown(samples.results())
    assert draw(samples.results(), tmp_path) == []
