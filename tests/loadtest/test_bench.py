from dataclasses import dataclass

from loadtest.arms import HttpArm, Window
from loadtest.bench import Comparison, compare
from loadtest.results import ArmRecord, Run
from loadtest.servers import Fleet


@dataclass
class ScriptedArm:
    """Notes when it was measured, and under which seed."""

    name: str
    run: Run
    notes: list[tuple[str, int]]

    def record(self):
        return ArmRecord(self.name, "", "", 1)

    def measure(self, fleet, window):
        self.notes.append((self.name, window.seed))
        return self.run


def test_arms_take_turns_at_going_first_and_share_the_seed_of_their_pair(tmp_path, samples):
    notes: list[tuple[str, int]] = []
    arms = [ScriptedArm(name, samples.run(rate), notes) for name, rate in (("a", 100.0), ("b", 50.0))]
    comparison = Comparison("x", "X", *arms, (samples.at_least,))
    heard: list[str] = []
    with Fleet(tmp_path) as fleet:
        found = compare(comparison, fleet, 3, Window(2.0, 10.0, seed=5), heard.append)
    assert notes == [("a", 5), ("b", 5), ("b", 6), ("a", 6), ("a", 7), ("b", 7)]
    assert heard[0] == "x 1/3: a 100.0 images/s, b 50.0 images/s"
    assert (found.pairs, found.seconds, found.warm_up_s, found.bars) == (3, 10.0, 2.0, (samples.at_least,))


def test_two_servers_side_by_side(fake_spec, image_folder, tmp_path):
    def arm(name, *flags, mix=""):
        return HttpArm(name, fake_spec(name, *flags), "/classify", image_folder, clients=2, mix=mix)

    comparison = Comparison("x", "X", arm("quick", mix="Slice-Width=0:3,2:1"), arm("slow", "--delay-s", "0.05"))
    with Fleet(tmp_path) as fleet:
        found = compare(comparison, fleet, 2, Window(0.1, 0.2), lambda _: None)
    for record in (found.a, found.b):
        assert len(record.runs) == 2
        for one in record.runs:
            assert one.images == len(one.latencies_ms) > 0
            assert one.failed == {}
            assert min(one.seconds, one.generator_cpu_s, one.resident_bytes) > 0
            assert min(one.cpu_s, one.other_cpu_s) >= 0
            assert one.p50_ms <= one.p99_ms
    assert set(found.a.runs[0].served) == {"0", "2"}
    assert set(found.b.runs[0].served) == {"none"}
