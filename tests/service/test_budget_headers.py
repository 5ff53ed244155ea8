from __future__ import annotations

import re
import string
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.api.budget_headers import PATTERNS, header_parameters, parse_budget, request_id
from service.errors import BadRequestError
from service.request import Budget, Forced

PROPERTY = settings(deadline=None, max_examples=300)
NAMES = ("Compute-Budget", "Latency-Budget", "Accuracy-Floor", "Slice-Width", "Priority")


def parse(name: str, value: str | bytes) -> Budget:
    return parse_budget([(name.lower().encode(), value if isinstance(value, bytes) else value.encode())])


def test_nothing_stated_is_no_budget() -> None:
    assert parse_budget([]) == Budget()
    assert parse_budget([(b"accept", b"*/*"), (b"accept", b"text/html"), (b"compute", b"1")]) == Budget()


def test_the_knobs_mix() -> None:
    headers = [
        (b"slice-width", b"auto"),
        (b"compute-budget", b"180M"),
        (b"priority", b"u=1, i"),
        (b"latency-budget", b"25ms"),
        (b"accuracy-floor", b"90%"),
    ]
    assert parse_budget(headers) == Budget(180_000_000, None, 0.025, Fraction(9, 10), None, 1)


@pytest.mark.parametrize(
    ("value", "madds"),
    [
        ("180000000", 180_000_000),
        ("180M", 180_000_000),
        ("180m", 180_000_000),
        ("0.18G", 180_000_000),
        ("0.18g", 180_000_000),
        ("0.1k", 100),
        ("0.1K", 100),
        ("1.0019k", 1001),
        ("0.000000001G", 1),
        ("2.999999999999", 2),
        ("0.5", 0),
        ("1.1G", 1_100_000_000),
        ("8.29M", 8_290_000),
        ("007", 7),
        (" \t180M\t ", 180_000_000),
        ("9" * 64, int("9" * 64)),
    ],
)
def test_compute_budgets_are_exact_and_floored(value: str, madds: int) -> None:
    assert parse("Compute-Budget", value) == Budget(compute_madds=madds)


@pytest.mark.parametrize(
    ("value", "share"),
    [("40%", "2/5"), ("33.3%", "333/1000"), ("100%", "1"), ("100.0%", "1"), ("0.0001%", "1/1000000")],
)
def test_compute_shares_are_exact(value: str, share: str) -> None:
    assert parse("Compute-Budget", value) == Budget(compute_share=Fraction(share))


@pytest.mark.parametrize(
    ("value", "latency_s"),
    [
        ("25ms", 0.025),
        ("25", 0.025),
        ("0.5s", 0.5),
        ("0.5S", 0.5),
        ("1.5Ms", 0.0015),
        ("0.1", 0.0001),
        ("3600s", 3600.0),
        ("3600.0001s", 3600.0),
        ("9" * 64, 3600.0),
    ],
)
def test_latency_budgets(value: str, latency_s: float) -> None:
    assert parse("Latency-Budget", value) == Budget(latency_s=latency_s)


@pytest.mark.parametrize(
    ("value", "floor"),
    [
        ("0.90", "9/10"),
        ("90%", "9/10"),
        ("1", "1"),
        ("1.000", "1"),
        ("100%", "1"),
        ("91.42%", "4571/5000"),
        ("0.3", "3/10"),
    ],
)
def test_accuracy_floors_are_exact(value: str, floor: str) -> None:
    assert parse("Accuracy-Floor", value) == Budget(accuracy_floor=Fraction(floor))


@pytest.mark.parametrize(
    ("value", "forced"),
    [("0", 0), ("7", 7), ("99999", 99999), ("narrowest", "narrowest"), ("widest", "widest"), ("auto", None)],
)
def test_slice_widths(value: str, forced: Forced | None) -> None:
    assert parse("Slice-Width", value) == Budget(forced=forced)


@pytest.mark.parametrize(
    ("value", "urgency"),
    [
        ("u=0", 0),
        ("u=7", 7),
        ("", 3),
        ("i", 3),
        ("u=5, i", 5),
        ("i=?0,u=2", 2),
        ("u=1 ,\tu=6", 6),  # the last of equal members counts
        ("u=4;note=1", 4),
        ('a="x, u=9 \\" ", u=4', 4),
        ("a=(1 2.5 tok);q=:aGk=:, u=1", 1),
        ("a=@1659578233, u=2", 2),
    ],
)
def test_priorities_are_structured_fields_of_which_only_u_is_read(value: str, urgency: int) -> None:
    assert parse("Priority", value) == Budget(urgency=urgency)


NOT_A_QUANTITY = [
    "", " ", "0", "0.0", "0%", "-1", "+1", "1e3", "1E3", "1 M", "1_000", "1,000", ".5", "5.", "1..2", "0x10", "inf",
    "nan", "1/2", "%", "1%%", "--1", "½", "\u0661", "1\x00", "1\n", "1kk", "9" * 65, "1" + "0" * 10_000_000,
]  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("value", NOT_A_QUANTITY, ids=lambda value: ascii(value)[:20])
def test_malformed_quantities_name_header_value_and_grammar(name: str, value: str) -> None:
    with pytest.raises(BadRequestError, match=rf"^{name} is ['\"].{{0,63}}; allowed: a decimal ") as caught:
        parse(name, value)
    assert len(str(caught.value)) < 320


@pytest.mark.parametrize(
    ("name", "value", "grammar"),
    [
        ("Compute-Budget", "100.0001%", r"\(0%, 100%\] of the widest slice"),
        ("Compute-Budget", "1T", "suffix k, M or G"),
        ("Compute-Budget", "1 %", "percentage"),
        ("Compute-Budget", "10ms", "MAdds"),
        ("Latency-Budget", "10us", "suffix ms or s"),
        ("Latency-Budget", "10%", "milliseconds"),
        ("Accuracy-Floor", "1.0001", r"decimal in \(0, 1\]"),
        ("Accuracy-Floor", "90", r"percentage in \(0%, 100%\]"),
        ("Accuracy-Floor", "101%", r"\(0%, 100%\]"),
        ("Accuracy-Floor", "0.9k", r"\(0, 1\]"),
        ("Slice-Width", "", "index, narrowest, widest or auto"),
        ("Slice-Width", "-1", "index, narrowest, widest or auto"),
        ("Slice-Width", "1.0", "index, narrowest, widest or auto"),
        ("Slice-Width", "Widest", "index, narrowest, widest or auto"),
        ("Slice-Width", "1 2", "index, narrowest, widest or auto"),
        ("Slice-Width", "²", "index, narrowest, widest or auto"),
        ("Slice-Width", "9" * 65, "at most 64 characters"),
        ("Priority", "3", "RFC 9218 dictionary"),
        ("Priority", "u", "u=0"),
        ("Priority", "u=8", "u=7"),
        ("Priority", "u=-1", "u=7"),
        ("Priority", "u=1.0", "u=7"),
        ("Priority", 'u="1"', "u=7"),
        ("Priority", "u=(1)", "u=7"),
        ("Priority", "u=8, u=1", "u=7"),
        ("Priority", "U=1", "RFC 9218"),
        ("Priority", "u = 1", "RFC 9218"),
        ("Priority", "u=1,", "RFC 9218"),
        ("Priority", ",u=1", "RFC 9218"),
        ("Priority", "u=1 i", "RFC 9218"),
        ("Priority", "u=1;", "RFC 9218"),
        ("Priority", 'a="open, u=1', "RFC 9218"),
    ],
)
def test_malformed_values_name_header_and_grammar(name: str, value: str, grammar: str) -> None:
    with pytest.raises(BadRequestError, match=rf"^{name} is .*{grammar}"):
        parse(name, value)


@pytest.mark.parametrize("name", NAMES)
def test_a_repeated_header_is_refused_even_with_equal_values(name: str) -> None:
    field = (name.lower().encode(), b"u=1" if name == "Priority" else b"1")
    with pytest.raises(BadRequestError, match=f"^{name} is given more than once"):
        parse_budget([field, (b"accept", b"*/*"), field])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("raw", [b"\xff", b"1\xc2\xa0", "½".encode(), b"\xc2\xb9"])
def test_bytes_beyond_ascii_are_malformed(name: str, raw: bytes) -> None:
    with pytest.raises(BadRequestError, match=f"^{name} is "):
        parse(name, raw)


# Letters of the grammars themselves, so that values come close to being right.
near_misses = st.text(alphabet='0123456789.%kMGmsuiwdestnarow=,;:?()@" \t-+e\\', max_size=70).map(str.encode)


@given(
    name=st.sampled_from(NAMES),
    raw=st.one_of(st.binary(max_size=80), near_misses, st.text(max_size=70).map(str.encode)),
)
@example(name="Priority", raw=b"a=(" + b"a;b " * 15)
@example(name="Priority", raw=b'a="' + b"\\\\" * 30)
@example(name="Compute-Budget", raw=b"1e999999999G")
@PROPERTY
def test_any_bytes_are_a_budget_or_a_bad_request(name: str, raw: bytes) -> None:
    try:
        budget = parse(name, raw)
    except BadRequestError:
        return
    assert budget.compute_madds is None or budget.compute_madds >= 0
    assert budget.compute_share is None or 0 < budget.compute_share <= 1
    assert budget.latency_s is None or 0 < budget.latency_s <= 3600
    assert budget.accuracy_floor is None or 0 < budget.accuracy_floor <= 1
    assert budget.forced is None or budget.forced in ("narrowest", "widest") or int(budget.forced) >= 0
    assert 0 <= budget.urgency <= 7


decimals = st.decimals(min_value="0.00000001", max_value=10**9, places=8, allow_nan=False)
padding = st.text(alphabet=" \t", max_size=3)


@given(number=decimals, suffix=st.sampled_from(["", "k", "K", "m", "M", "g", "G"]), before=padding, after=padding)
@PROPERTY
def test_every_decimal_number_of_madds_is_floored_exactly(number: object, suffix: str, before: str, after: str) -> None:
    exact = Fraction(f"{number:f}") * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[suffix.lower()]
    madds = parse("Compute-Budget", f"{before}{number:f}{suffix}{after}").compute_madds
    assert madds is not None
    assert madds <= exact < madds + 1


@given(
    number=st.decimals(min_value="0.0000001", max_value=100, places=7), unit=st.sampled_from(["", "ms", "MS", "s", "S"])
)
@PROPERTY
def test_ratios_and_latencies_survive_the_round_trip(number: object, unit: str) -> None:
    text = f"{number:f}"
    assert parse("Compute-Budget", f"{text}%").compute_share == Fraction(text) / 100
    assert parse("Accuracy-Floor", f"{text}%").accuracy_floor == Fraction(text) / 100
    seconds = Fraction(text) if unit.lower() == "s" else Fraction(text) / 1000
    assert parse("Latency-Budget", f"{text}{unit}").latency_s == float(seconds)


@given(st.text(alphabet=string.ascii_letters + string.digits + "._-", min_size=1, max_size=128))
@PROPERTY
def test_well_formed_request_ids_are_kept(text: str) -> None:
    assert request_id([(b"accept", b"*/*"), (b"x-request-id", text.encode())]) == text


@pytest.mark.parametrize("values", [[], [b""], [b"a" * 129], [b"a b"], [b"a\n"], [b"\xe9"], [b"a/b"], [b"a", b"a"]])
def test_absent_malformed_and_repeated_request_ids_are_replaced_by_the_caller(values: list[bytes]) -> None:
    assert request_id([(b"x-request-id", value) for value in values]) is None


LETTERS = {
    "Compute-Budget": "0123456789.kKmMgG%-+e ",
    "Latency-Budget": "0123456789.msMS%-",
    "Accuracy-Floor": "0123456789.%-",
    "Slice-Width": "0123456789-narowestidu",
    "Priority": 'u=01234567,;- \t."?:()ab*',
}


@PROPERTY
@given(st.sampled_from(NAMES), st.data())
def test_the_pattern_that_is_published_matches_what_is_taken(name: str, data: st.DataObject) -> None:
    matching = st.from_regex(re.compile(PATTERNS[name], re.ASCII))
    text = data.draw(matching | st.text(LETTERS[name], max_size=12))[:64].strip(" \t\n")
    try:
        parse(name, text)
    except BadRequestError:
        assert re.search(PATTERNS[name], text) is None
    else:
        assert re.search(PATTERNS[name], text)


def test_every_knob_is_published_with_its_pattern_and_its_bound() -> None:
    published = {about["name"]: about["schema"] for about in header_parameters()}
    assert {name for name, schema in published.items() if "pattern" in schema} == set(NAMES)
    assert all(published[name]["maxLength"] == 64 for name in NAMES)
