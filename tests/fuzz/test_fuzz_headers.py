"""Broken header fields and key files: a value or the one documented error, within bounded memory."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import KIB, allocating_at_most, broken, examples, raised_or

from service.api.access import bypasses_cache
from service.api.budget_headers import parse_budget, request_id
from service.api.keys import KeyFileError, parse_keys, shown_key
from service.api.middleware import _trace
from service.api.open_inference_wire import json_length
from service.errors import BadRequestError

BUDGETS = {
    b"compute-budget": (b"180M", b"0.18G", b"40%", b"100000"),
    b"latency-budget": (b"25ms", b"0.5s", b"100"),
    b"accuracy-floor": (b"0.90", b"90%"),
    b"slice-width": (b"3", b"narrowest", b"auto"),
    b"priority": (b"u=1, i", b'u=3;q="a", a=(1 2.5 "x");y=?1, b=:AAA=:, *c=@12'),
}
OTHERS = {
    b"x-request-id": (b"abc-1",),
    b"authorization": (b"Bearer abc", b"Basic abc"),
    b"x-api-key": (b"abc",),
    b"cache-control": (b"no-cache, max-age=0",),
    b"traceparent": (b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01",),
    b"tracestate": (b"a=b,c=d",),
}
VALID = [(name, value) for name, values in {**BUDGETS, **OTHERS}.items() for value in values]
FIELDS = st.sampled_from(VALID).flatmap(lambda field: st.tuples(st.just(field[0]), broken(field[1])))
KEYS = b"""
[keys.camera-7]
sha256 = "%s"
role = "user"
quota = "200M"
compute_budget = "60%%"
latency_budget = "100ms"
accuracy_floor = "0.85"
most_urgent = 3

[keys."b"]
sha256 = "%s"
quota = "none"
""" % (b"0" * 64, b"1" * 64)


@examples(60_000, 150)
@given(st.lists(FIELDS, max_size=4))
def test_broken_fields(headers):
    with allocating_at_most(64 * KIB):
        budget, message = raised_or(lambda: parse_budget(headers), BadRequestError)
        assert len(message) < 600
        if budget is not None:
            assert budget.latency_s is None or 0 < budget.latency_s <= 3600
            assert budget.accuracy_floor is None or 0 < budget.accuracy_floor <= 1
            assert budget.compute_share is None or 0 < budget.compute_share <= 1
            assert 0 <= budget.urgency <= 7
        identity = request_id(headers)
        assert identity is None or 1 <= len(identity) <= 128
        secret = shown_key(headers)
        assert secret is None or 1 <= len(secret) <= 512
        trace = _trace({"headers": headers})
        assert len(trace.get("tracestate", "")) <= 512
        bypasses_cache(Asked(headers))


class Asked:
    def __init__(self, headers):
        self.scope = {"headers": headers}


@examples(10_000, 60)
@given(st.lists(broken(b"1234"), max_size=2))
def test_broken_lengths(values):
    try:
        length = json_length(values)
    except BadRequestError:
        return
    assert length is None or 0 <= length < 10**15


@pytest.mark.parametrize("repeats", [10**4, 10**6])
@pytest.mark.parametrize("text", [b"9", b"a=1,", b"a;", b'"', b"u=1;a,", b"(", b"\\"])
def test_values_of_a_megabyte_cost_no_more_than_short_ones(text, repeats):
    value = text * repeats
    for name in BUDGETS:
        with allocating_at_most(64 * KIB), pytest.raises(BadRequestError):
            parse_budget([(name, value)])


@examples(12_000, 60)
@given(broken(KEYS, (KEYS,)))
def test_broken_key_files(data):
    with allocating_at_most(512 * KIB):
        keyring, message = raised_or(lambda: parse_keys(data, None, 10), KeyFileError)
    # A digest that has got into a name or a role may be told: nobody could know that it was one.
    others = re.sub(rb'sha256"?\s*=\s*"[^"]*"', b"", data).decode(errors="replace")
    assert all(digest in others for digest in re.findall(r"0{8,}|1{8,}", message))
    assert keyring is None or all(len(key.digest) == 32 for key in keyring.keys)
