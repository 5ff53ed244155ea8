import json
from dataclasses import replace

import pytest

from loadtest.account import (
    Account,
    Column,
    Observation,
    Reading,
    Section,
    ThreadReading,
    loop_costs,
    loop_signs,
    markdown,
    stage_costs,
    unexplained,
)
from loadtest.results import Run

LOOP, DECODER, ENGINE = 10, 11, 12
RUN = Run(images=100, seconds=2.0, cpu_s=1.0, p50_ms=8.0, p99_ms=9.0, generator_cpu_s=0.05, other_cpu_s=0.5)
SPENT = Reading(
    {
        LOOP: ThreadReading(0.3, 0.1, 500),
        DECODER: ThreadReading(0.2, 0.0, 200),
        ENGINE: ThreadReading(0.4, 0.1, 300),
        13: ThreadReading(0.001, 0.0, 1),
    },
    system_s=0.1, page_faults=700, stolen_s=0.02,
)  # fmt: skip
SEEN = Observation(RUN, SPENT, LOOP, http_ms=1.0, decoders=frozenset({DECODER}))
COUNTERS = {
    "images": 200.0, "engine_wall_s": 1.6, "cpu_s decode": 0.2, "cpu_s resize": 0.04, "cpu_s normalise": 0.06,
    "cpu_s engine": 0.8, "cpu_s answer": 0.02,
}  # fmt: skip


def test_what_a_process_spent_is_the_difference_of_two_readings():
    earlier = Reading({1: ThreadReading(1.0, 0.5, 10), 2: ThreadReading(1.0, 0.0, 1)}, 0.5, 100, 1.0, {"images": 5.0})
    later = Reading({1: ThreadReading(1.5, 0.75, 14), 3: ThreadReading(0.25, 0.0, 2)}, 0.75, 130, 1.5, {"images": 9.0})
    spent = later.since(earlier)
    assert spent.threads == {1: ThreadReading(0.5, 0.25, 4), 3: ThreadReading(0.25, 0.0, 2)}
    assert (spent.system_s, spent.page_faults, spent.stolen_s, spent.counters) == (0.25, 30, 0.5, {"images": 4.0})


def test_threads_tell_the_stages_of_a_server_with_a_pool_for_each():
    costs = SEEN.costs_by_thread()
    assert costs == pytest.approx({"decode": 2.0, "engine": 4.01, "http": 1.0, "framework": 2.0, "total": 10.0})
    assert unexplained(costs) == pytest.approx(10.0 - 9.01)


def test_one_pool_that_does_both_is_not_split():
    costs = replace(SEEN, decoders=frozenset({DECODER, ENGINE})).costs_by_thread()
    assert costs == pytest.approx({"engine": 6.01, "http": 1.0, "framework": 2.0, "total": 10.0})


def test_a_server_that_clocks_its_stages_is_believed_and_the_rest_of_its_threads_shown():
    costs = replace(SEEN, spent=replace(SPENT, counters=COUNTERS)).costs_by_clock()
    stages = {"decode": 1.0, "resize": 0.2, "normalise": 0.3, "engine": 4.0, "answer": 0.1}
    assert costs == pytest.approx({**stages, "workers": 6.01 - 5.6, "http": 1.0, "framework": 2.0, "total": 10.0})


def test_a_server_that_counted_nothing_has_no_stages():
    assert stage_costs({"images": 0.0, "cpu_s decode": 0.0}) == {}
    assert stage_costs({}) == {}


def test_signs_are_per_image():
    counters = COUNTERS | {"batches": 50.0, "batched_images": 75.0}
    signs = replace(SEEN, spent=replace(SPENT, counters=counters)).signs(idle_ms_per_s=1.5)
    assert signs == pytest.approx({
        "images_per_s": 50.0, "p50_ms": 8.0, "engine_wall_ms": 8.0, "images_per_batch": 1.5, "system_ms": 1.0,
        "page_faults": 7.0, "turns": 10.01, "waiting_ms": 2.0, "stolen_ms": 0.2, "busy_threads": 3.0,
        "idle_ms_per_s": 1.5, "generator_ms": 0.5, "other_cores": 0.25, "failed": 0.0,
    })  # fmt: skip


def test_what_was_not_measured_is_no_sign():
    bare = replace(SEEN, run=replace(RUN, p50_ms=None, other_cpu_s=None, failed={"503": 2}))
    signs = bare.signs(0.0)
    assert not {"p50_ms", "other_cores", "engine_wall_ms", "images_per_batch"} & set(signs)
    assert signs["failed"] == 2


def test_both_kinds_of_loops_are_read():
    facts = {"images": 10, "seconds": 2.0, "cpu_s": 0.1, "system_s": 0.01, "page_faults": 30}
    ours = facts | {"decode_cpu_s": 0.02, "trunk_cpu_s": 0.03, "gate_cpu_s": 0.0, "body_cpu_s": 0.04}
    expected = {"decode": 2.0, "trunk": 3.0, "gate": 0.0, "body": 4.0, "engine": 7.0, "total": 10.0}
    assert loop_costs(ours) == pytest.approx(expected)
    assert unexplained(loop_costs(ours)) == pytest.approx(1.0)
    theirs = facts | {"stages_cpu_s": {"decode": 0.02, "engine": 0.07}, "stages_wall_s": {"engine": 0.2}}
    assert loop_costs(theirs) == pytest.approx({"decode": 2.0, "engine": 7.0, "total": 10.0})
    assert loop_signs(ours) == pytest.approx({"images_per_s": 5.0, "system_ms": 1.0, "page_faults": 3.0})
    assert loop_signs(theirs)["engine_wall_ms"] == pytest.approx(20.0)


@pytest.fixture
def account(samples) -> Account:
    """Three rounds of a server, and of a loop."""
    served = tuple({"engine": 1.0 + k, "framework": 0.5, "total": 200.0 + k} for k in (0, 2, 1))
    alone = ({"decode": 12.5, "trunk": 0.5, "engine": 0.5, "total": 14.0},)
    columns = (
        Column("ours", served, ({"images_per_s": 50.0},) * 3, {"decode": "engine"}),
        Column("alone", alone, ({},)),
    )
    return Account(samples.machine, "2026-01-02", {"clients": "8", "model": "m"}, (Section(13, columns),))


def row(text: str, title: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_the_table_has_medians_ranges_and_what_is_missing(account):
    text = markdown(account)
    assert "Some CPU, 2 usable cores" in text
    assert "clients 8, model m." in text
    assert "## Width 13" in text
    assert row(text, "engine") == ["2.000 (1.000 to 3.000)", "0.500 (0.500 to 0.500)"]
    assert row(text, "decode") == ["in *engine*", "12.50 (12.50 to 12.50)"]
    assert row(text, "of it, trunk") == ["", "0.500 (0.500 to 0.500)"]
    assert row(text, "**process, total**")[0] == "201.0 (200.0 to 202.0)"
    assert row(text, "not accounted for") == ["198.5 (198.5 to 198.5)", "1.000 (1.000 to 1.000)"]
    assert row(text, "images/s") == ["50.00 (50.00 to 50.00)", ""]


def test_parts_of_the_engine_follow_it(account):
    titles = [line.split("|")[1].strip() for line in markdown(account).splitlines() if line.startswith("| ")]
    at = titles.index("engine")
    assert titles[at : at + 4] == ["engine", "of it, trunk", "of it, gate", "of it, body"]


def test_the_record_holds_rounds_and_medians(account):
    record = json.loads(json.dumps(account.to_json()))
    ours, alone = record["sections"][0]["columns"]
    assert [costs["engine"] for costs in ours["costs"]] == [1.0, 3.0, 2.0]
    assert ours["medians"]["engine"] == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert ours["medians"]["unexplained"]["median"] == 198.5
    assert "decode" not in ours["medians"]
    assert alone["medians"]["total"]["median"] == 14.0
    assert record["setup"] == {"clients": "8", "model": "m"}
