import argparse
import csv
import io
import sys
from pathlib import Path

import pytest

from loadtest.open_loop import Playback
from loadtest.outcomes import Exchange
from loadtest.run_commands import (
    KINDS,
    OBJECTIVE_MISSED,
    configure_compare,
    configure_run,
    configure_trace,
    run_compare,
    run_run,
    run_trace,
)
from loadtest.run_report import RunRecord
from loadtest.servers import HOST, Server, ServerSpec, free_port
from loadtest.trace_file import Trace, read_origin, read_trace, write_trace

pytestmark = pytest.mark.timeout(60)
FLAGS = {
    "poisson": ["--rate=50"],
    "constant": ["--rate=50"],
    "bursty": ["--rate=50", "--base-rate=20", "--cv2=4"],
    "accelerating": ["--from-rate=20", "--to-rate=80", "--tau=30"],
    "step": ["--rate=20", "--step-rate=200", "--step-from-s=1", "--step-to-s=2"],
}


def called(configure, run, *argv: object) -> None:
    parser = argparse.ArgumentParser()
    configure(parser)
    run(parser.parse_args([str(argument) for argument in argv]))


def draw(kind: str, path, *more: str) -> Trace:
    called(configure_trace, run_trace, kind, *FLAGS[kind], "--duration-s=4", "--images=8", f"--out={path}", *more)
    return read_trace(path)


@pytest.fixture
def trace_path(tmp_path):
    """Eight requests within 0.2 s, one for each image; the last two have a budget of their own."""
    path = tmp_path / "trace.csv"
    budgets = ("",) * 6 + ("60s", "0.001ms")
    write_trace(Trace(tuple(k / 40 for k in range(8)), tuple(range(8)), {"latency-budget": budgets}), path)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A fake server for all tests of this file; it answers 200 and predicts nothing."""
    command = (sys.executable, str(Path(__file__).with_name("fake_server.py")), "--port", "{port}")
    with Server(ServerSpec("fake", command, "/health"), tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_trace_is_drawn_and_says_where_it_comes_from(kind, tmp_path, capsys):
    trace = draw(
        kind, tmp_path / "new" / "trace.csv", "--seed=3", "--mix=Latency-Budget=25ms:3,:1", "--mix=Priority=u=1"
    )
    origin = read_origin(tmp_path / "new" / "trace.csv")
    assert 80 < len(trace) < 700
    assert trace.headers.keys() == {"Latency-Budget", "Priority"}
    assert (origin.kind, origin.seed, origin.images, origin.duration_s) == (kind, 3, 8, 4.0)
    assert origin.mixes == ("Latency-Budget=25ms:3,:1", "Priority=u=1:1")
    assert {f"{value:g}" for value in origin.parameters.values()} >= {flag.partition("=")[2] for flag in FLAGS[kind]}
    assert f"{len(trace):,} requests, mean" in capsys.readouterr().out


def test_the_seed_decides_the_trace(tmp_path):
    first, again, other = (draw("poisson", tmp_path / f"{k}.csv", f"--seed={seed}") for k, seed in enumerate((1, 1, 2)))
    assert first == again != other


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seed is -1; allowed: 0 or more"):
        draw("poisson", tmp_path / "t.csv", "--seed=-1")
    with pytest.raises(ValueError, match=r"allowed: HEADER=VALUE"):
        draw("poisson", tmp_path / "t.csv", "--mix=nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_results_report_plots_and_requests(server, image_folder, trace_path, tmp_path, capsys):
    out = tmp_path / "out"
    called(
        configure_run, run_run, f"--url={server.url}/classify", f"--trace={trace_path}", f"--images={image_folder}",
        "--slo-ms=30000", "--warm-up-s=0.04", "--window=0.1:0.2", "--objective=attainment>=0.8", "--requests",
        "--label=fake", f"--out={out}", "--objective=attainment@0.1:0.2<=1",
    )  # fmt: skip
    assert {f.name for f in out.iterdir()} >= {"results.json", "report.md", "requests.csv", "arrivals.png"}
    record = RunRecord.load(out / "results.json")
    found = record.figures
    assert (record.label, record.slo_ms, record.trace.requests, record.trace.duration_s) == ("fake", 30000, 8, 1.0)
    assert (found.requests, found.met, found.late) == (6, 5, 1)  # due from 0.05 s; the last had no time at all
    assert found.attainment == 5 / 6
    assert found.top1 == 0  # the server predicts nothing, and class0, class1 were right
    assert [(w.start_s, w.end_s, w.requests) for w in record.windows] == [(0.1, 0.2, 4)]
    assert [(f.objective, f.met) for f in record.findings] == [
        ("attainment>=0.8", True), ("attainment@0.1:0.2<=1", True)
    ]  # fmt: skip
    rows = list(csv.DictReader(io.StringIO((out / "requests.csv").read_text())))
    assert [row["image"] for row in rows] == ["2", "3", "4", "5", "6", "7"]
    assert [row["label"] for row in rows] == ["class0"] * 2 + ["class1"] * 4
    assert record.generator.cpu_ms_per_request > 0
    text = (out / "results.json").read_text() + (out / "report.md").read_text()
    assert str(tmp_path) not in text
    assert str(image_folder.parent) not in text
    assert "--trace=trace.csv" in record.command
    assert "met: attainment>=0.8, measured 0.833333" in capsys.readouterr().out


def test_a_missed_objective_is_status_2_after_everything_was_written(image_folder, trace_path, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        called(
            configure_run, run_run, f"--url=http://user:secret@{HOST}:{free_port()}/", f"--trace={trace_path}",
            f"--images={image_folder}", "--slo-ms=30", f"--out={tmp_path}", "--objective=attainment>=0.5",
            "--objective=requests>=1",
        )  # fmt: skip
    assert ended.value.code == OBJECTIVE_MISSED == 2
    record = RunRecord.load(tmp_path / "results.json")
    assert record.figures.errors == {"ConnectionRefusedError": 8}
    assert "secret" not in (tmp_path / "results.json").read_text() + (tmp_path / "report.md").read_text()
    out = capsys.readouterr().out
    assert "missed: attainment>=0.5, measured 0\n" in out
    assert "met: requests>=1, measured 8\n" in out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--url=localhost:8000/x"], "allowed: one that begins with http:// or https://"),
        (["--objective=nonsense"], "objective is 'nonsense'"),
        (["--window=2:1"], "window is '2:1'"),
        (["--window=0.5:1.5"], r"window is 0\.5:1\.5 s; allowed: within the counted 0:1 s"),
        (["--objective=met@0:2>=1"], "window is 0:2 s"),
        (["--warm-up-s=0.2", "--window=0.1:1"], r"within the counted 0\.2:1 s"),
        (["--warm-up-s=1"], "warm-up is 1 s; allowed: 0 s or more, below the trace's 1 s"),
        (["--slo-ms=0"], "SLO is 0 ms; allowed: above 0 ms"),
        (["--outstanding-limit=0"], "limit of 0 outstanding requests"),
        (["--request-limit-s=0"], "limit of 0 s for a request"),
        (["--peak-window-s=0"], "window is 0 s"),
        (["--images=absent"], "no such folder"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_sent(
    flags, complaint, image_folder, trace_path, tmp_path, monkeypatch
):
    monkeypatch.setattr("loadtest.run_commands.play", lambda *_: pytest.fail("was played"))
    good = ["--url=http://h/", f"--trace={trace_path}", f"--images={image_folder}", "--slo-ms=30"]
    with pytest.raises(ValueError, match=complaint):
        called(configure_run, run_run, *good, f"--out={tmp_path / 'out'}", *flags)


def test_requests_without_any_limit_and_malformed_ones_are_refused_by_line(image_folder, trace_path, tmp_path):
    good = ["--url=http://h/", f"--images={image_folder}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=r"trace\.csv:2: a request without Latency-Budget; --slo-ms says"):
        called(configure_run, run_run, *good, f"--trace={trace_path}")
    trace_path.write_text("at_s,image,Latency-Budget\n0,0,25ms\n0.1,0,soon\n")
    with pytest.raises(ValueError, match=r"trace\.csv:3: Latency-Budget is 'soon'"):
        called(configure_run, run_run, *good, f"--trace={trace_path}")
    trace_path.write_text("at_s,image\n")
    with pytest.raises(ValueError, match=r"trace\.csv: no request"):
        called(configure_run, run_run, *good, f"--trace={trace_path}")


def test_a_trace_that_was_drawn_here_keeps_its_duration_and_its_kind(image_folder, tmp_path, monkeypatch):
    """Nothing is sent: what the wire gave is made up."""

    def played(url, posts, limits):
        sent = [Exchange(post.at_s, 0.0, 0.01, 200, "", {"Slice-Width": "1"}, b"{}") for post in posts]
        return Playback(sent, 0.5, 3, "uvloop")

    monkeypatch.setattr("loadtest.run_commands.play", played)
    trace = draw("poisson", tmp_path / "trace.csv", "--mix=Latency-Budget=36ms")
    called(
        configure_run, run_run, "--url=http://h/", f"--trace={tmp_path / 'trace.csv'}", f"--images={image_folder}",
        f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    record = RunRecord.load(tmp_path / "out" / "results.json")
    assert (record.trace.kind, record.trace.parameters, record.trace.duration_s) == ("poisson", {"rate_per_s": 50.0}, 4)
    assert record.trace.mean_rate_per_s == len(trace) / 4
    assert record.generator.cpu_ms_per_request == pytest.approx(500 / len(trace))
    assert record.figures.p50_ms == 10.0
    assert len(record.seconds) == 4
    assert record.slo_ms is None


def test_runs_are_compared(server, image_folder, trace_path, tmp_path, capsys):
    for label in ("a", "b"):
        called(
            configure_run, run_run, f"--url={server.url}/classify", f"--trace={trace_path}",
            f"--images={image_folder}", "--slo-ms=30000", f"--label={label}", f"--out={tmp_path / label}",
        )  # fmt: skip
    results = [tmp_path / label / "results.json" for label in ("a", "b")]
    called(configure_compare, run_compare, *results, f"--out={tmp_path / 'both'}")
    names = {file.name for file in (tmp_path / "both").iterdir()}
    assert names == {"comparison.md", "attainment.png", "accuracy.png"}
    assert "| b | file trace.csv |" in (tmp_path / "both" / "comparison.md").read_text()


def test_without_matplotlib_there_is_a_report_without_plots(image_folder, trace_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "loadtest.run_plots", raising=False)
    monkeypatch.delattr("loadtest.run_plots", raising=False)
    called(
        configure_run, run_run, f"--url=http://{HOST}:{free_port()}/", f"--trace={trace_path}",
        f"--images={image_folder}", "--slo-ms=30", f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"results.json", "report.md"}
    assert "no plots: matplotlib" in capsys.readouterr().err
