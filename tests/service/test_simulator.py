import csv
import json
import threading
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from support import CLASSES, TINY_INPUT, calibrated_gate, tiny_net

from models.checkpoint import load, save
from service.cli import main
from service.engine.measure import Timing
from service.hosting import build_engine
from service.latency import LiveTimes
from service.profiling import Profile, ProfileKey, keep_profile
from service.simulator import SimulateSettings, Simulation

IMAGES = 12
BODIES_S = (1e-3, 2e-3, 3e-3, 6e-3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository, profiles of its models, an evaluation and two traces."""
    folder, net = tmp_path_factory.mktemp("twin"), tiny_net()
    rng = np.random.default_rng(0)
    for name, gate in (("sure", calibrated_gate(net)), ("blank", None)):
        save(folder / "models" / name / "1", net, classes=CLASSES, input_spec=TINY_INPUT, gate=gate)
        manifest = load(folder / "models" / name / "1").manifest
        seconds = {None: 1e-3, **dict(enumerate(BODIES_S))}
        timings = tuple(Timing(width, n, s * n, s * n, 15) for width, s in seconds.items() for n in (1, 2))
        profile = Profile(ProfileKey(manifest.network_id, "engine 1", "cuda", "a processor"), 0.0, timings)
        (folder / f"{name}.profile.json").write_text(json.dumps(asdict(profile)))
        p_right = np.sort(rng.uniform(0.2, 1.0, (IMAGES, 4)), 1).round(5)
        images = [
            {"name": f"c/{n:02}.png", "correct": (p > 0.5).tolist(), "p_right": p.tolist() if gate else None}
            for n, p in enumerate(p_right)
        ]
        (folder / f"{name}.evaluation.json").write_text(json.dumps({"digest": manifest.digest, "images": images}))
    for name, gap_s in (("calm", 0.02), ("busy", 0.0025)):
        rows = [f"{n * gap_s!r},{n % IMAGES},{'10ms' if n % 2 else ''},{'1' if n == 5 else ''}" for n in range(150)]
        (folder / f"{name}.csv").write_text("\n".join(["at_s,image,Latency-Budget,Compute-Budget", *rows, ""]))
    return folder


@pytest.fixture
def flags(root):
    def make(*more, model="sure", evaluated=True):
        given = [
            "--repository", root / "models", "--model", model, "--profile", root / f"{model}.profile.json",
            "--trace", root / "calm.csv", "--trace", root / "busy.csv", *more,
        ]  # fmt: skip
        return [str(flag) for flag in (*given, *(("--evaluation", root / f"{model}.evaluation.json") * evaluated))]

    return make


@pytest.fixture
def run(monkeypatch, capsys):
    def simulate(*arguments):
        monkeypatch.setattr("sys.argv", ["slicewise", "simulate", *arguments])
        with pytest.raises(SystemExit) as status:
            main()
        return status.value.code, capsys.readouterr()

    return simulate


POLICIES = ("--policies", "gate_slack,gate,slackfit,fixed:widest")


def test_every_policy_meets_every_trace(run, flags, tmp_path):
    status, printed = run(
        *flags(*POLICIES, "--against", "fixed:3", "--out", str(tmp_path / "new" / "out"), "--events", "true")
    )
    assert (status, printed.err) == (0, "")
    assert "Difference from fixed:3" in printed.out
    found = json.loads((tmp_path / "new" / "out" / "simulation.json").read_text())
    runs = {(one["trace"], one["policy"]): one for one in found["runs"]}
    names = ["gate_slack", "gate", "slackfit", "fixed:3"]
    assert list(runs) == [(trace, name) for trace in ("calm", "busy") for name in names]
    for one in runs.values():
        assert one["met"] + one["late"] + one["expired"] + one["refused"] == one["images"] == 149
        assert one["infeasible"] == 1
    assert runs["calm", "fixed:3"]["attainment"] == 1.0
    assert runs["busy", "fixed:3"]["attainment"] < runs["busy", "gate_slack"]["attainment"]
    assert runs["calm", "fixed:3"]["p50_ms"] == pytest.approx(7.0)
    assert [one["policy"] for one in found["comparisons"]] == names[:3]
    assert {one["policy"] for one in found["means"]} == set(names)
    assert found["profile"]["processor"] == "a processor"
    page = (tmp_path / "new" / "out" / "simulation.md").read_text()
    assert found["command"] in page
    assert str(tmp_path) not in page + json.dumps(found)


def test_events_say_what_became_of_each_image(run, flags, tmp_path):
    assert run(*flags("--policies", "fixed:0,gate", "--out", str(tmp_path), "--events", "true"))[0] == 0
    runs = json.loads((tmp_path / "simulation.json").read_text())["runs"]
    for one in runs:
        with (tmp_path / f"{one['trace']}.{one['policy'].replace(':', '-')}.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        outcomes = Counter(row["outcome"] for row in rows)
        assert {name: one[name] for name in ("met", "late", "expired", "refused") if one[name]} == outcomes
        assert all((row["width"] == "") == (row["finish_s"] == "") for row in rows)
        assert [float(row["at_s"]) for row in rows] == sorted(float(row["at_s"]) for row in rows)
    assert {row["reason"] for row in rows if row["outcome"] == "met"} <= {"gate", "latency_budget"}


def test_two_runs_differ_in_nothing_but_the_time_they_took(run, flags, tmp_path):
    def figures_of(name):
        assert run(*flags(*POLICIES, "--against", "gate", "--out", str(tmp_path / name)))[0] == 0
        found = json.loads((tmp_path / name / "simulation.json").read_text())
        for one in found["runs"] + found["means"]:
            del one["wall_us"]
        return found

    assert figures_of("a") == figures_of("b")


def test_overhead_and_workers_reach_the_machine(run, flags, tmp_path):
    def p50_ms(*more):
        assert run(*flags("--policies", "fixed:0", "--out", str(tmp_path), *more, evaluated=False))[0] == 0
        return json.loads((tmp_path / "simulation.json").read_text())["means"][0]["p50_ms"]

    assert p50_ms() == pytest.approx(2.0)
    assert p50_ms("--overhead-ms", "0.25", "--workers", "4") == pytest.approx(2.25)


def test_the_loop_the_client_and_the_cores_reach_the_machine_and_the_page(run, flags, tmp_path):
    given = (
        "--front-ms", "0.5", "--back-ms", "0.25", "--handover-ms", "0.125", "--client-ms", "0.75", "--cores", "4",
        "--workers", "4",
    )  # fmt: skip
    assert run(*flags("--policies", "fixed:0", "--out", str(tmp_path), *given, evaluated=False))[0] == 0
    found = json.loads((tmp_path / "simulation.json").read_text())
    calm, _ = found["runs"]
    assert calm["p50_ms"] == pytest.approx(2.0 + 0.5 + 0.25 + 0.125 + 0.75)
    assert {name: found[name] for name in ("front_ms", "back_ms", "handover_ms", "client_ms", "cores")} == {
        "front_ms": 0.5, "back_ms": 0.25, "handover_ms": 0.125, "client_ms": 0.75, "cores": 4,
    }  # fmt: skip
    words = found["command"].replace("\\\n", "").split()
    at = words.index("--front-ms")
    assert words[at : at + 8] == [*given[:8]]
    assert "| front_ms | 0.5 |" in (tmp_path / "simulation.md").read_text()


def test_on_a_cpu_a_batch_is_ready_where_the_loop_takes_time(flags, root, tmp_path):
    profile = json.loads((root / "sure.profile.json").read_text())
    profile["key"]["device"] = "cpu"
    (tmp_path / "cpu.json").write_text(json.dumps(profile))
    on_cpu = ("--profile", str(tmp_path / "cpu.json"))
    ahead = {
        (on, loop): Simulation(settings(*flags(*(on_cpu * on), *(("--back-ms", "1") * loop)))).machine.ahead
        for on in (0, 1)
        for loop in (0, 1)
    }
    assert ahead == {(0, 0): 0, (0, 1): 0, (1, 0): 0, (1, 1): 1}


@pytest.mark.parametrize(("cores", "counts"), [("2", True), ("3", False)])
def test_plans_count_the_loop_where_workers_have_every_core(monkeypatch, flags, cores, counts):
    made = []

    class Noting(LiveTimes):
        def __init__(self, table, overhead=None):
            made.append(overhead)
            super().__init__(table, overhead)

    simulation = Simulation(settings(*flags("--front-ms", "1", "--workers", "2", "--cores", cores)))
    monkeypatch.setattr("service.simulator.LiveTimes", Noting)
    replays = list(simulation.run())
    assert [overhead is not None for overhead in made] == [counts] * len(replays)
    assert len({id(overhead) for overhead in made if overhead}) == counts * len(replays)


def settings(*flags):
    return SimulateSettings(_cli_parse_args=list(flags))


def test_a_profile_of_a_gpu_means_one_worker(flags):
    assert Simulation(settings(*flags())).machine.workers == 1
    assert Simulation(settings(*flags("--workers", "8"))).machine.workers == 8


def test_without_a_file_the_profile_that_serve_would_use_is_taken(root, tmp_path, flags):
    given = flags("--policies", "fixed:0", "--cache-dir", str(tmp_path), "--device", "cpu", "--workers", "1")
    at = given.index("--profile")
    kept = settings(*given[:at], *given[at + 2 :])
    with pytest.raises(
        ValueError, match=r"no profile of sure/1 is kept for this machine; allowed: run slicewise profile"
    ):
        Simulation(kept)
    checkpoint = load(root / "models" / "sure" / "1")
    key = ProfileKey.of(checkpoint.manifest.network_id, build_engine(checkpoint, kept, threading.Event()))
    timings = tuple(Timing(width, 1, 0.5, 0.5, 15) for width in (None, *range(4)))
    keep_profile(tmp_path / "profiles", Profile(key, 0.0, timings))
    found = Simulation(kept)
    assert (found.machine.times.image_seconds(0), found.key) == (1.0, key)


def test_a_dearer_operating_point_widens_what_is_served(flags):
    def mean_width(point):
        (replay, _) = Simulation(settings(*flags("--policies", "gate", "--operating-point", point))).run()
        return np.mean([end.width for end in replay.served])

    assert mean_width("0") == 3, "of choices that cost nothing the likeliest"
    assert mean_width("2") == 0


def test_a_page_names_the_command_with_what_was_asked_for(run, flags, tmp_path):
    run(*flags("--policies", "slackfit,fixed:0", "--workers", "3", "--against", "fixed:0", "--out", str(tmp_path)))
    words = json.loads((tmp_path / "simulation.json").read_text())["command"].replace("\\\n", "").split()
    assert words == [
        "slicewise", "simulate", "--model", "sure", "--repository", "models", "--trace", "calm.csv",
        "--trace", "busy.csv", "--evaluation", "sure.evaluation.json", "--profile", "sure.profile.json",
        "--policies", "slackfit,fixed:0", "--workers", "3", "--against", "fixed:0", "--out", "DIR",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"evaluated": False}, (), "gate_slack asks the gate and there is no evaluation; allowed: slackfit"),
        ({"model": "blank"}, (), "gate_slack asks the gate and the evaluation has no p_right; allowed: slackfit"),
        ({}, ("--policies", "fixed:9"), "policy is 'fixed:9'; allowed: gate_slack"),
        ({}, ("--policies", "fixed:0,fixed:narrowest"), "fixed:0, fixed:0; allowed: each once"),
        ({}, ("--against", "maxacc"), "against maxacc; allowed: each once, with the one that"),
        ({}, ("--against", "best"), "setting against, model sure: policy is 'best'"),
        ({}, ("--operating-point", "9"), "setting operating_point: operating point 9 of sure/1; allowed: 0..2"),
        ({}, ("--model", "blank"), "model is sure, blank; allowed: one model at a time"),
        ({}, ("--trace", "other/calm.csv"), "trace names calm, busy, calm; allowed: files of different names"),
        ({}, ("--events", "true"), "events needs out, a folder"),
        ({}, ("--overhead-ms", "-1"), "overhead_ms: Input should be greater than or equal to 0, given '-1'"),
        ({}, ("--overhead-ms", "inf"), "overhead_ms: Input should be a finite number"),
        ({}, ("--front-ms", "-1"), "front_ms: Input should be greater than or equal to 0, given '-1'"),
        ({}, ("--client-ms", "nan"), "client_ms: Input should be a finite number"),
        ({}, ("--cores", "0"), "cores: Input should be greater than or equal to 1"),
        ({}, ("--out", __file__), "is no folder and cannot be made one"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(run, flags, options, more, message):
    status, printed = run(*flags(*more, **options))
    assert (status, printed.out) == (2, "")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_trace_is_needed(run):
    status, printed = run("--policies", "fixed:0")
    assert status == 2
    assert "trace names no file; allowed: at least one CSV file" in printed.err
