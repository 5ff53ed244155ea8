"""The faults: what is done to the service or its surroundings, and what has to hold meanwhile and afterwards."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from loadtest.bad_images import BOMB_SIDE, corrupted, first_jpeg, jpeg_bomb, png_bomb, truncated
from loadtest.checks import Check, at_least, at_most, equal
from loadtest.corpus import EncodedImage
from loadtest.fault_record import Allowance, Done, Request
from loadtest.fault_stage import Act, Aftermath, Plan, Scenario, Scene
from loadtest.faulty import ARMED, items_of_raised
from loadtest.hostile import Hostiles
from loadtest.known_answers import Ending
from loadtest.redis_process import RedisProcess
from loadtest.servers import ServerSpec
from loadtest.victim import Victim

QUOTA_MADDS_PER_S = 10**13
"""So much that nobody is refused: the quota is asked for and never spent."""
FAILING_CALLS = ("service.engine.onnx:OnnxEngine.trunk", "service.engine.onnx:OnnxEngine.body")
"""What raises where an engine is to fail: a name to look up in the server's process, which this one never imports."""
FAIL_EVERY = 50
EXIT_LIMIT_S = 29.0
"""From SIGTERM to the end, with the service's default settings."""
DRAIN_DELAY_S = 1.0
"""From SIGTERM to the drain, by default: connections are not closed before."""
BEFORE_KILL_S, AFTER_START_S = 1.0, 0.25
"""Requests in work when the server is killed are cut; clients need a moment to notice that it is back."""
ON_ITS_WAY_S = 0.1
"""A request that was sent just before the SIGTERM may come just after it."""
CACHE_FOLDER_SIZE = "64k"
_BAD_SHARE = 0.1
"""Bad images beside the good ones."""


def _serve(plan: Plan, stack: contextlib.ExitStack, name: str, spec: ServerSpec) -> Victim:
    return stack.enter_context(Victim(spec, plan.work / f"{name}.log"))


def _serve_with(redis: RedisProcess, plan: Plan, stack: contextlib.ExitStack, name: str) -> Victim:
    quota = ("--quota-madds-per-s", str(QUOTA_MADDS_PER_S))
    spec = plan.spec("--redis-url", redis.url, "--cache-enabled", "true", *quota)
    server = _serve(plan, stack, name, spec)
    server.pool_port = redis.port
    return server


def _every_other_computed(requests: Sequence[Request]) -> list[Request]:
    """Half of them may be answered from the cache, half may not."""
    bypass = {"Cache-Control": "no-cache"}
    return [replace(each, headers=bypass) if place % 2 else each for place, each in enumerate(requests)]


def _judge_redis(server: Victim, aftermath: Aftermath) -> tuple[list[Check], dict[str, str]]:
    before, after = aftermath.before, aftermath.after
    assert after is not None, "this server is meant to live: this is a bug"

    def grown(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    hits, misses = (grown("slicewise_cache_requests_total", result=result) for result in ("hit", "miss"))
    errors = grown("slicewise_cache_requests_total", result="error")
    failures = grown("slicewise_store_failures_total")
    late_hits = _cached_after(aftermath)
    checks = [
        at_least("calls to the store that failed, and were counted", failures, 1),
        at_least("answers from the cache after it came back", late_hits, 1),
    ]
    return checks, {
        "cache": f"{hits:,.0f} hits, {misses:,.0f} misses, {errors:,.0f} without the store",
        "connections to Redis after the load": f"{server.pooled()}, not counted as descriptors",
    }


def _cached_after(aftermath: Aftermath) -> int:
    """Answers from the cache to requests that were due after the last deed."""
    since_s = aftermath.done[-1].ended_s
    return sum(
        each.at_s >= since_s and b'"cached":true' in each.body.replace(b" ", b"") for each in aftermath.exchanges
    )


def redis_killed(plan: Plan, stack: contextlib.ExitStack) -> Scene:
    """The store dies and comes back empty."""
    redis = stack.enter_context(RedisProcess())
    server = _serve_with(redis, plan, stack, "redis-killed")
    acts = [
        Act(plan.at(0.3), "Redis killed", redis.kill), Act(plan.at(0.6), "Redis started again, empty", redis.start)
    ]  # fmt: skip
    return Scene(server, _every_other_computed(plan.requests()), acts, judge=partial(_judge_redis, server))


def redis_frozen(plan: Plan, stack: contextlib.ExitStack) -> Scene:
    """The store holds its connections and answers nobody."""
    redis = stack.enter_context(RedisProcess())
    server = _serve_with(redis, plan, stack, "redis-frozen")
    acts = [Act(plan.at(0.3), "Redis frozen (SIGSTOP)", redis.freeze), Act(plan.at(0.6), "thawed", redis.thaw)]
    return Scene(server, _every_other_computed(plan.requests()), acts, judge=partial(_judge_redis, server))


def failing_engine(plan: Plan, stack: contextlib.ExitStack) -> Scene:
    """Every so many calls the engine raises; the batch that was in it fails, and no other."""
    control = plan.work / "failing-engine"
    control.mkdir()
    methods = [word for call in FAILING_CALLS for word in ("--method", call)]
    spec = plan.spec()
    command = (
        sys.executable, "-m", "loadtest.faulty", *methods, "--every", str(FAIL_EVERY), "--control", str(control),
        "--", *spec.command,
    )  # fmt: skip
    server = _serve(plan, stack, "failing-engine", replace(spec, command=command))
    acts = [
        Act(plan.at(0.1), f"every {FAIL_EVERY}th call of the engine raises from here", (control / ARMED).touch),
        Act(plan.at(0.9), "none raises from here", (control / ARMED).unlink),
    ]

    def allowances(done: Sequence[Done]) -> list[Allowance]:
        return [Allowance(frozenset({Ending.SERVER_ERROR}), done[0].began_s - BEFORE_KILL_S, done[1].ended_s)]

    def judge(aftermath: Aftermath) -> tuple[list[Check], dict[str, str]]:
        items, before, after = items_of_raised(control), aftermath.before, aftermath.after
        assert after is not None, "this server is meant to live: this is a bug"
        counted, labels = "slicewise_requests_total", {"code": "500"}
        checks = [
            at_least("batches that were made to fail", len(items), 1),
            equal("500 in the service's own count", after.total(counted, **labels) - before.total(counted, **labels),
                  sum(items)),
        ]  # fmt: skip
        return checks, {"made to fail": f"{len(items)} batches with {sum(items)} images"}

    return Scene(
        server, plan.requests(), acts, allowances, judge, injected=lambda: sum(items_of_raised(control))
    )  # fmt: skip


def hostile_clients(plan: Plan, stack: contextlib.ExitStack) -> Scene:
    """Clients that vanish, that send a byte a second, and that send far too many header fields."""
    server = _serve(plan, stack, "hostile-clients", plan.spec())
    hostiles = Hostiles(server.port, plan.corpus.path, plan.corpus.images[0], plan.at(0.9))

    def judge(aftermath: Aftermath) -> tuple[list[Check], dict[str, str]]:
        sent = hostiles.sent
        checks = [
            at_least("clients that vanished", sent.vanished.total(), 1),
            equal("bodies of a byte a second that were not answered 408", _others(sent.slow_bodies, "408"), 0),
            equal("requests with 10,000 header fields that were not answered 431", _others(sent.floods, "431"), 0),
        ]
        counted = {
            "vanished": sent.vanished, "headers of a byte a second, by answer": sent.slow_headers,
            "bodies of a byte a second, by answer": sent.slow_bodies,
            "10,000 header fields, by answer": sent.floods,
        }  # fmt: skip
        facts = {name: ", ".join(f"{n} {what}" for what, n in sorted(c.items())) for name, c in counted.items()}
        return checks, facts

    return Scene(server, plan.requests(), [Act(0.0, "hostile clients", hostiles.run)], judge=judge)


def _others(found: dict[str, int], wanted: str) -> int:
    """How many are not as wanted; 1 where there is none at all, so that nothing passes for everything."""
    return sum(number for name, number in found.items() if name != wanted) if found else 1


def bad_images(plan: Plan, stack: contextlib.ExitStack) -> Scene:
    """Bombs, truncated and corrupted images among good ones."""
    server, good = _serve(plan, stack, "bad-images", plan.spec()), plan.requests()
    kinds = _bad_kinds(plan.corpus.images)
    at_s = [each.at_s for each in plan.corpus.requests(plan.rate_per_s * _BAD_SHARE, plan.seconds, plan.seed + 2)]
    bad = []
    for place, at in enumerate(at_s):
        kind, statuses, images = kinds[place % len(kinds)]
        bad.append(Request(at, images[place // len(kinds) % len(images)], None, kind, statuses))

    def judge(aftermath: Aftermath) -> tuple[list[Check], dict[str, str]]:
        sent = [aftermath.counts.kinds.get(kind, {}) for kind, _, _ in kinds]
        return [at_least("requests of the rarest kind of bad image", min(sum(each.values()) for each in sent), 1)], {}

    return Scene(server, sorted([*good, *bad], key=lambda each: each.at_s), judge=judge)


def _bad_kinds(images: Sequence[EncodedImage]) -> list[tuple[str, tuple[int, ...], list[EncodedImage]]]:
    """Name, statuses that are right, and images of each. What is corrupted may happen to decode, or to claim a size."""
    side, jpeg = f"{BOMB_SIDE:,} x {BOMB_SIDE:,}", first_jpeg(images)
    kinds = [(f"PNG bomb, {side} pixels", (413,), [png_bomb()])]
    if jpeg is not None:
        kinds.append((f"JPEG that claims {side} pixels", (413,), [jpeg_bomb(jpeg.data)]))
    kinds.append(("truncated image", (400,), [truncated(each, 0.5) for each in images]))
    spoilt = [corrupted(image, 1 + seed % 16, seed) for seed, image in enumerate([*images] * 4)]
    return [*kinds, ("corrupted image", (200, 400, 413), spoilt)]


def sigterm(plan: Plan, stack: contextlib.ExitStack) -> Scene:
    """The server is asked to end in mid-load: it answers what it has, refuses the rest, and ends with status 0."""
    server = _serve(plan, stack, "sigterm", plan.spec())
    statuses: list[int | None] = []

    def end() -> None:
        server.terminate()
        statuses.append(server.wait_status(EXIT_LIMIT_S))

    def allowances(done: Sequence[Done]) -> list[Allowance]:
        since_s = done[0].began_s
        return [
            Allowance(frozenset({Ending.REFUSED}), since_s - ON_ITS_WAY_S, plan.seconds),
            Allowance(frozenset({Ending.CUT}), since_s + DRAIN_DELAY_S, plan.seconds),
        ]

    def judge(aftermath: Aftermath) -> tuple[list[Check], dict[str, str]]:
        (done,) = aftermath.done
        status = statuses[0]
        checks = [
            Check("exit status", "0", "none" if status is None else str(status), status == 0),
            at_most("time from SIGTERM to the end", done.ended_s - done.began_s, EXIT_LIMIT_S, " s"),
        ]
        return checks, {}

    return Scene(server, plan.requests(), [Act(plan.at(0.6), "SIGTERM", end)], allowances, judge, ends=True)


def sigkill(plan: Plan, stack: contextlib.ExitStack) -> Scene:
    """The server dies without a word and is started again on the same port."""
    server = _serve(plan, stack, "sigkill", plan.spec())

    def again() -> None:
        server.kill()
        server.__enter__()

    def allowances(done: Sequence[Done]) -> list[Allowance]:
        cut = frozenset({Ending.CUT, Ending.REFUSED})
        return [Allowance(cut, done[0].began_s - BEFORE_KILL_S, done[0].ended_s + AFTER_START_S)]

    def judge(aftermath: Aftermath) -> tuple[list[Check], dict[str, str]]:
        late = sum(each.at_s >= aftermath.done[0].ended_s + AFTER_START_S for each in aftermath.exchanges)
        return [at_least("requests due after it was ready again", late, 1)], {}

    acts = [Act(plan.at(0.3), "SIGKILL, started again, ready", again)]
    return Scene(server, plan.requests(), acts, allowances, judge)


def full_disk(plan: Plan, stack: contextlib.ExitStack) -> Scene:
    """The cache folder has no space for a graph or a profile."""
    folder, how = _cramped_folder(plan.work, stack)
    server = _serve(plan, stack, "full-disk", plan.spec("--cache-dir", str(folder)))

    def judge(aftermath: Aftermath) -> tuple[list[Check], dict[str, str]]:
        missing = sum(server.log_text().count(event) for event in ("graph_not_kept", "profile_not_kept"))
        return [at_least("graphs and profiles that the log says were not kept", missing, 1)], {"cache folder": how}

    return Scene(server, plan.requests(), judge=judge)


def _cramped_folder(work: Path, stack: contextlib.ExitStack) -> tuple[Path, str]:
    """A folder too small for what belongs there, or, where none may be mounted, one that cannot be made."""
    folder = work / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={CACHE_FOLDER_SIZE}", "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            stack.callback(subprocess.run, ["umount", str(folder)], check=True)
            return folder / "cache", f"on a file system of {CACHE_FOLDER_SIZE}"
    (folder / "file").touch()
    return folder / "file" / "cache", "below what is no folder"


SCENARIOS = (
    Scenario("redis-killed", "Redis dies in mid-load and comes back empty; answer cache and quotas on", redis_killed),
    Scenario("redis-frozen", "Redis stops answering and goes on later; answer cache and quotas on", redis_frozen),
    Scenario("failing-engine", f"the engine raises at every {FAIL_EVERY}th call", failing_engine),
    Scenario("hostile-clients", "clients vanish, send a byte a second, send 10,000 header fields", hostile_clients),
    Scenario("bad-images", "bombs, truncated and corrupted images among good ones", bad_images),
    Scenario("sigterm", "SIGTERM in mid-load", sigterm),
    Scenario("sigkill", "SIGKILL in mid-load, and a new start", sigkill),
    Scenario("full-disk", "no space in the cache folder", full_disk),
)
