import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import CLASSES, TINY_ACCURACY, TINY_INPUT, calibrated_gate, random_image, tiny_net

from loadtest.trace_file import Trace, write_trace
from models.checkpoint import Measured, load, save
from models.training.data import LabelledImages
from models.training.measure_commands import as_json, measure
from models.transform import load_pixels
from service.engine.measure import Timing
from service.profiling import Profile, ProfileKey
from service.request import SliceFacts, Window
from service.settings import SettingError
from service.simulate import Arrival
from service.simulation_inputs import read_evaluation, read_profile, read_trace

SLICES = [SliceFacts(width, 100 * (width + 1), 110 * (width + 1), 0.5 + width / 10) for width in range(4)]


@pytest.fixture
def file(tmp_path):
    def write(text, name="trace.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_headers_become_deadlines_urgency_and_windows(file):
    rows = [
        "at_s,image,latency-budget,Priority,Compute-Budget,Accuracy-Floor,Slice-Width,User-Agent",
        "0,3,,,,,,",
        "0.5,0,36ms,u=1,,,,x",
        "1e1,1,0.25s,,50%,,,",
        "10,2,,,220,60%,,",
        "11.0,2,,u=7,,,widest,",
    ]
    found = read_trace(file("\n".join(rows)), SLICES, images=4)
    assert found.name == "trace"
    assert found.infeasible == 0
    assert found.arrivals == [
        Arrival(0.0, 3, Window(0, 3)),
        Arrival(0.5, 0, Window(0, 3), 0.036, 1),
        Arrival(10.0, 1, Window(0, 1), 0.25),
        Arrival(10.0, 2, Window(1, 1)),
        Arrival(11.0, 2, Window(0, 3, 3), math.inf, 7),
    ]


def test_what_no_slice_is_allowed_for_is_counted_apart(file):
    found = read_trace(file("at_s,image,Compute-Budget\n0,0,10\n1,1,\n2,1,109\n"), SLICES)
    assert (len(found.arrivals), found.infeasible) == (1, 2)
    with pytest.raises(SettingError, match=r"trace.csv: 1 images, none that a slice is allowed for; allowed: at least"):
        read_trace(file("at_s,image,Compute-Budget\n0,0,10\n"), SLICES)


HEAD = "at_s,image,Latency-Budget,Slice-Width\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r":1: columns are ''; allowed: at_s,image"),
        ("image,at_s\n", r":1: columns are 'image,at_s'"),
        ("at_s,image,Priority,priority\n", r":1: columns are .*each once"),
        ("at_s,image,\n", r":1: columns are"),
        (HEAD + "0,0,5ms\n", r":2: 3 cells; allowed: 4"),
        (HEAD + "1,0,,\n\n", r":3: 0 cells"),
        (HEAD + "1,0,,\n0.9,0,,\n", r":3: at_s is '0.9'; allowed: seconds, ascending, here from 1"),
        *((HEAD + f"{at},0,,\n", r":2: at_s is") for at in ("-1", "nan", "inf", "", "1_0", "x", "0x1")),
        *((HEAD + f"0,{image},,\n", r":2: image is .* 0 to 9") for image in ("10", "-1", "", "1.0", "+1", "9" * 5000)),
        (HEAD + "0,0,soon,\n", r":2: Latency-Budget is 'soon'; allowed: a decimal above 0"),
        (HEAD + "0,0,,\n0,0,,9\n", r":3: slice 9 is unknown; allowed: an index 0\.\.3"),
        (HEAD + '0,0,"5ms,\n', r":2: unexpected end of data"),
        (HEAD.encode() + b"0,0,\xc3\xa4,\n", r":2: byte 0xc3; allowed: ASCII"),
    ],
)
def test_what_the_service_would_not_take_is_named_by_file_and_line(file, text, message):
    with pytest.raises(SettingError, match=r"trace\.csv" + message) as error:
        read_trace(file(text), SLICES, images=10)
    assert "\n" not in str(error.value)


def test_a_trace_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingError, match=r"setting trace: .*no\.csv cannot be read: No such file"):
        read_trace(tmp_path / "no.csv", SLICES)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e6), st.integers(0, 10**6), st.sampled_from(["", "1ms", "2.5s"]), st.integers(0, 7).map(str)
        ),
        min_size=1,
        max_size=30,
    )
)
def test_what_the_load_generator_writes_is_read_as_it_was_meant(tmp_path_factory, draws):
    draws = sorted(draws)
    at_s, images, latency, urgency = zip(*draws, strict=True)
    path = tmp_path_factory.mktemp("traces") / "drawn.csv"
    write_trace(Trace(at_s, images, {"Latency-Budget": latency, "Priority": tuple(f"u={u}" for u in urgency)}), path)
    seconds = {"": math.inf, "1ms": 0.001, "2.5s": 2.5}
    expected = [Arrival(at, image, Window(0, 3), seconds[text], int(u)) for at, image, text, u in draws]
    assert read_trace(path, SLICES).arrivals == expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    net, root = tiny_net(), tmp_path_factory.mktemp("repository")
    accuracy = [(Measured(a, "test", 1000),) for a in TINY_ACCURACY]
    gate = calibrated_gate(net)
    save(root / "sure" / "1", net, classes=CLASSES, input_spec=TINY_INPUT, accuracy=accuracy, gate=gate)
    return load(root / "sure" / "1")


@pytest.fixture(scope="module")
def measurement(checkpoint):
    """Of eight images whose names are not in their order."""
    pixels = np.stack([load_pixels(random_image(seed), TINY_INPUT, 10_000) for seed in range(8)])
    names = tuple(f"class {7 - seed}/x.png" for seed in range(8))
    return measure(checkpoint, LabelledImages(pixels, np.arange(8) % 3, CLASSES, names), "all")


def test_an_evaluation_is_read_in_the_order_of_names(file, checkpoint, measurement):
    known = read_evaluation(file(json.dumps(as_json(measurement))), checkpoint.manifest)
    assert [facts.madds_served for facts in known.slices] == measurement.madds.tolist()
    assert (known.correct_IL == measurement.correct_NW[::-1]).all()
    assert known.p_right_IL == pytest.approx(measurement.p_right_NL[::-1], abs=1e-5)


def test_an_evaluation_without_a_calibration_says_nothing_of_p_right(file, checkpoint, measurement):
    data = as_json(measurement)
    data["images"] = [image | {"p_right": None} for image in data["images"]]
    assert read_evaluation(file(json.dumps(data)), checkpoint.manifest).p_right_IL is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(digest="sha256:0"), r"is of sha256:0; allowed: sha256:\w+, which sure/1 is"),
        (lambda data: data.pop("images"), r"images: Field required; allowed: what .* --width all"),
        (lambda data: data["images"][2]["correct"].__setitem__(1, None), r"images\.2\.correct\.1: .*--width all"),
        (lambda data: data["images"][0]["correct"].pop(), r"holds \[3, 4\] slices of its images; allowed: 4"),
        (lambda data: data["images"].clear(), r"holds \[\] slices"),
    ],
)
def test_an_evaluation_that_does_not_fit_is_named(file, checkpoint, measurement, change, message):
    data = json.loads(json.dumps(as_json(measurement)))
    change(data)
    with pytest.raises(SettingError, match=message):
        read_evaluation(file(json.dumps(data), "evaluation.json"), checkpoint.manifest)


TIMINGS = tuple(Timing(width, 1, 1e-3 * (1 + (width or 0)), 9.0, 15) for width in (None, 0, 1, 2, 3))


def profile_of(network):
    return Profile(ProfileKey(network, "engine 1", "cpu", "a processor"), 0.0, TIMINGS)


def test_a_kept_profile_and_the_result_of_profile_say_the_same(file, checkpoint):
    kept = profile_of(checkpoint.manifest.network_id)
    result = [{"model": "other"}, {"model": "sure", "timings": [asdict(timing) for timing in TIMINGS]}]
    key, table = read_profile(file(json.dumps(asdict(kept))), checkpoint.manifest)
    assert (key, table) == (kept.key, kept.table())
    assert read_profile(file(json.dumps(result)), checkpoint.manifest) == (None, kept.table())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (asdict(profile_of("another")), "is of another network"),
        (
            [{"model": "sure", "timings": [asdict(timing) for timing in TIMINGS[:4]]}],
            r"slices 0, 1, 2; allowed: sure/1",
        ),
        ([{"model": "other", "timings": []}], "a latency table needs the trunk"),
        ([{"model": "sure", "timings": [{"width": 0}]}], r"0\.batch: Field required; allowed: a profile of slicewise"),
        ({"key": 1}, "key: .*; allowed: a profile of slicewise profile"),
        ("text", "allowed: a profile of slicewise profile"),
    ],
)
def test_a_profile_that_does_not_fit_is_named(file, checkpoint, data, message):
    with pytest.raises(SettingError, match=message):
        read_profile(file(json.dumps(data), "profile.json"), checkpoint.manifest)
    with pytest.raises(SettingError, match=r"Expecting value.*; allowed: a profile of sure"):
        read_profile(file("no JSON"), checkpoint.manifest)
