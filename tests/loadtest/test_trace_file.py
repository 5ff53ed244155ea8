import dataclasses
import re
import string
import zipfile
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadtest import traces
from loadtest.mix import Mix
from loadtest.trace_file import (
    SENT_BY_THE_CLIENT,
    Origin,
    Trace,
    as_arrivals,
    fill,
    parse_mix,
    read_images_by_name,
    read_origin,
    read_trace,
    write_trace,
)

ORIGIN = Origin("poisson", {"rate_per_s": 5.0}, 2.0, 7, 10, ("Slice-Width=0:1,:3",))
header_names = st.text(string.ascii_letters + string.digits + "-_.", min_size=1, max_size=12).filter(
    lambda name: name.lower() not in SENT_BY_THE_CLIENT | {"at_s", "image"}
)
values = st.from_regex(r"(?:[!-~](?:[ -~]{0,8}[!-~])?)?", fullmatch=True)


@st.composite
def some_traces(draw) -> Trace:
    count = draw(st.integers(0, 12))
    column = {"min_size": count, "max_size": count}
    at_s = sorted(draw(st.lists(st.floats(0, 1e7), **column)))
    images = draw(st.lists(st.integers(0, 10**6), **column))
    names = draw(st.lists(header_names, max_size=3, unique_by=str.lower))
    return Trace(tuple(at_s), tuple(images), {name: tuple(draw(st.lists(values, **column))) for name in names})


@given(some_traces())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_again_exactly(tmp_path, trace):
    write_trace(trace, tmp_path / "trace.csv")
    assert read_trace(tmp_path / "trace.csv") == trace


def test_the_file_is_plain_csv(tmp_path):
    trace = Trace((0.1, 0.25), (3, 0), {"Latency-Budget": ("25ms", ""), "Priority": ("u=1", "u=5, i")})
    write_trace(trace, tmp_path / "trace.csv")
    assert (tmp_path / "trace.csv").read_text() == (
        'at_s,image,Latency-Budget,Priority\n0.1,3,25ms,u=1\n0.25,0,,"u=5, i"\n'
    )
    assert trace.headers_of(0) == {"Latency-Budget": "25ms", "Priority": "u=1"}
    assert trace.headers_of(1) == {"Priority": "u=5, i"}
    assert len(trace) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r":1: columns are ; allowed: at_s,image"),
        ("image,at_s\n", r":1: columns are image,at_s"),
        ("at_s,image,Bad Name\n", r":1: column 'Bad Name'"),
        ("at_s,image,Host\n", r":1: column 'Host'; allowed: .* none of .*host"),
        ("at_s,image,A,a\n", r":1: column 'a'; allowed: .* each once"),
        ("at_s,image\n0,0\n1\n", r":3: 1 cells; allowed: 2"),
        ("at_s,image\n0,0\n\n", r":3: 0 cells"),
        ("at_s,image\n0,0\nnan,0\n", r":3: at_s is 'nan'; allowed: a decimal number of seconds"),
        ("at_s,image\n-1,0\n", r":2: at_s is '-1'"),
        ("at_s,image\n1e999,0\n", r":2: at_s is inf s"),
        ("at_s,image\n2,0\n1.5,0\n", r":3: at_s is 1\.5 s after 2 s; allowed: 0 s or more, ascending"),
        ("at_s,image\n0,1.0\n", r":2: image is '1\.0'; allowed: a whole number from 0"),
        ("at_s,image\n0,²\n", r":2: a byte beyond ASCII"),
        ("at_s,image,H\n0,0, x\n", r":2: a header has the value ' x'; allowed: printable ASCII"),
        ('at_s,image,H\n0,0,"a\nb"\n', r":3: a header has the value 'a\\nb'"),
        ('at_s,image,H\n0,0,"a\n', r": unexpected end of data"),
    ],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path, text, complaint):
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(path)) + r"(:\d+)?" * complaint.startswith(": ") + complaint):
        read_trace(path)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        (((0.0,), (0, 1)), r"columns of \[1, 2\] requests"),
        (((0.0, 2.0, 1.0), (0, 0, 0)), "request 2: at_s is 1 s after 2 s"),
        (((0.0,), (-1,)), "request 0: image is -1"),
        (((0.0,), (0,), {"H": ("\n",)}), r"request 0: a header has the value '\\n'"),
        (((0.0,), (0,), {"image": ("x",)}), "column 'image'"),
    ],
)
def test_a_trace_that_could_not_be_read_again_cannot_be_made(columns, complaint):
    with pytest.raises(ValueError, match=complaint):
        Trace(*columns)


def test_images_come_in_cycles_and_headers_by_their_shares():
    arrivals = traces.constant(100, 0.4)
    trace = fill(arrivals, 10, [parse_mix("Latency-Budget=25ms:3,:1"), parse_mix("Priority=u=1")], seed=3)
    assert (as_arrivals(trace) == arrivals).all()
    for start in range(0, 40, 10):
        assert sorted(trace.image[start : start + 10]) == list(range(10))
    assert trace.image[:10] != trace.image[10:20]
    assert Counter(trace.headers["Latency-Budget"]) == {"25ms": 30, "": 10}
    assert set(trace.headers["Priority"]) == {"u=1"}


def test_the_seed_decides_images_and_headers():
    def filled(seed, images=10):
        return fill(np.arange(60.0), images, [parse_mix("H=a,b,c"), parse_mix("G=a,b,c")], seed)

    assert filled(1) == filled(1)
    assert filled(1).image != filled(2).image
    assert filled(1).headers != filled(2).headers
    assert filled(1).headers == filled(1, images=20).headers
    assert filled(1).headers["H"] != filled(1).headers["G"]


def test_what_cannot_be_filled_is_refused():
    with pytest.raises(ValueError, match="0 images; allowed: 1 or more"):
        fill(np.arange(3.0), 0, [], 0)
    with pytest.raises(ValueError, match="mixes of H, h; allowed: one of each header"):
        fill(np.arange(3.0), 1, [parse_mix("H=a"), parse_mix("h=b")], 0)


def test_a_mix_may_leave_the_header_out():
    assert parse_mix("H=25ms:3,:1") == Mix("H", (("25ms", 3), ("", 1)))
    assert parse_mix("H=:2,a").shares == (("", 2), ("a", 1))
    assert str(parse_mix("H=a:1,:1")) == "H=a:1,:1"
    for text in ("H=", "H=a,,b", "H=:0", "=:1"):
        with pytest.raises(ValueError, match=r"HEADER=VALUE\[:SHARE\]"):
            parse_mix(text)


def test_the_origin_is_believed_as_long_as_the_file_is_the_same(tmp_path):
    path = tmp_path / "trace.csv"
    write_trace(Trace((0.5,), (1,)), path, ORIGIN)
    found = read_origin(path)
    assert found is not None
    assert dataclasses.replace(found, sha256="") == ORIGIN
    path.write_text("at_s,image\n0.5,2\n")
    assert read_origin(path) is None
    write_trace(Trace((0.5,), (1,)), path)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.csv"]
    assert read_origin(path) is None


def test_a_bad_note_is_refused_by_name(tmp_path):
    path = tmp_path / "trace.csv"
    write_trace(Trace((0.5,), (1,)), path)
    path.with_name("trace.csv.json").write_text("{}")
    with pytest.raises(ValueError, match=r"trace\.csv\.json: not what slicewise-load trace wrote"):
        read_origin(path)


def test_images_are_counted_by_name_in_folders_and_zips_alike(image_folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted(image_folder.rglob("*.*"), reverse=True):
            archive.write(file, file.relative_to(image_folder))
    found = read_images_by_name(image_folder, [7, 0, 4, 4])
    assert found == read_images_by_name(tmp_path / "images.zip", [0, 4, 7])
    assert {place: image.label for place, image in found.items()} == {0: "class0", 4: "class1", 7: "class1"}
    assert found[4].image.data == (image_folder / "class1" / "1.jpg").read_bytes()
    assert found[4].image.media_type == "image/jpeg"


def test_an_image_without_a_folder_has_no_label(image_folder):
    assert read_images_by_name(image_folder / "class0", [0])[0].label == ""


def test_images_that_are_not_there_are_refused(image_folder, tmp_path):
    with pytest.raises(ValueError, match=r"asks for image 8; allowed: 0 \.\. 7"):
        read_images_by_name(image_folder, [0, 8])
    with pytest.raises(ValueError, match="no image"):
        read_images_by_name(tmp_path, [0])
    with pytest.raises(ValueError, match="no such"):
        read_images_by_name(tmp_path / "absent", [0])
