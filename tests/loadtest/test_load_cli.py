import pytest

from loadtest import cli
from loadtest.cli import main
from loadtest.machine import describe, usable_cores
from loadtest.results import Results


@pytest.fixture
def planned(monkeypatch, tmp_path_factory):
    """Benchmarks plan nothing but what is put in here, and measure it at once."""
    found: dict[str, object] = {}
    monkeypatch.setattr(cli, "comparisons", lambda plan, names, work: list(found.values()))
    monkeypatch.setattr(cli, "compare", lambda record, *_: record)
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path_factory.mktemp("work")))
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    return found


def test_a_benchmark_leaves_results_report_and_plots(planned, tmp_path, capsys, samples):
    planned["one"] = samples.comparison(1.2, samples.at_least, pairs=1)
    assert main(["bench", "--out", str(tmp_path / "out")]) == 0
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"results.json", "report.md", "throughput.png", "latency_one.png"}
    assert "gate_batch: left out" in capsys.readouterr().err


def test_an_update_keeps_what_was_not_measured_again(planned, tmp_path, samples):
    planned["one"] = samples.comparison(1.2, pairs=1)
    main(["bench", "--out", str(tmp_path)])
    planned.clear()
    planned["two"] = samples.comparison(1.2, pairs=1, name="two")
    assert main(["bench", "--out", str(tmp_path), "--update"]) == 0
    assert [c.name for c in Results.load(tmp_path / "results.json").comparisons] == ["one", "two"]
    assert main(["bench", "--out", str(tmp_path)]) == 0
    assert [c.name for c in Results.load(tmp_path / "results.json").comparisons] == ["two"]


def test_results_of_another_machine_are_not_updated(planned, tmp_path, capsys, samples):
    samples.results(samples.comparison(1.0, pairs=1)).save(tmp_path / "results.json")
    assert main(["bench", "--out", str(tmp_path), "--update"]) == 1
    assert "measured on another machine" in capsys.readouterr().err


def test_a_report_is_written_anew_from_results(tmp_path, capsys, samples):
    samples.results(samples.comparison(1.2, samples.at_least, pairs=1)).save(tmp_path / "results.json")
    assert main(["report", str(tmp_path / "results.json"), "--out", str(tmp_path / "docs")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "docs" / "report.md")
    assert "Some CPU" in (tmp_path / "docs" / "report.md").read_text()


def test_a_bad_file_is_one_line_and_status_1(tmp_path, capsys):
    assert main(["report", str(tmp_path / "absent.json")]) == 1
    assert capsys.readouterr().err.startswith("slicewise-load: error: ")


def test_an_unknown_comparison_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--out", str(tmp_path), "--only", "nothing"])


def test_this_machine_is_described(samples):
    machine = describe()
    assert machine.cpu
    assert machine.cores == usable_cores() >= 1
    assert machine.memory_bytes > 0
    assert "numpy" in machine.packages
    assert machine != samples.machine
