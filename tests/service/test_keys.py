import contextlib
import hashlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.keys import MOST_KEYS, KeyFileError, parse_keys, shown_key
from service.quota import Limit
from service.request import Budget

DEFAULT = Limit(5, 10)


def digest(secret):
    return hashlib.sha256(secret.encode()).hexdigest()


def table(name="a", secret="secret", **fields):
    shown = {"sha256": digest(secret)} | fields
    lines = [
        f"{field} = {value!r}" if not isinstance(value, str) else f'{field} = "{value}"'
        for field, value in shown.items()
    ]
    return "\n".join([f"[keys.{name}]", *lines, ""])


def parse(*tables):
    return parse_keys("\n".join(tables).encode(), DEFAULT, 10)


def test_a_key_with_everything():
    key = parse(
        table(
            role="admin", quota="200M", compute_budget="60%", latency_budget="100ms", accuracy_floor=0.85, most_urgent=2
        )
    ).find(b"secret")
    assert (key.name, key.role, key.limit, key.most_urgent) == ("a", "admin", Limit(200_000_000, 10), 2)
    assert key.defaults == Budget(None, Fraction(3, 5), 0.1, Fraction(17, 20))


def test_a_key_with_nothing_takes_the_quota_of_the_settings():
    key = parse(table()).find(b"secret")
    assert (key.role, key.limit, key.most_urgent, key.defaults) == ("user", DEFAULT, 0, Budget())
    assert parse(table(quota="none")).find(b"secret").limit is None


@given(st.dictionaries(st.text("abc-._", min_size=1, max_size=8), st.text(min_size=1), max_size=8), st.text())
def test_each_secret_finds_its_key_and_no_other(secrets, other):
    unique = {secret: name for name, secret in secrets.items()}
    keyring = parse(*(table(f'"{name}"', secret) for secret, name in unique.items()))
    for secret, name in unique.items():
        assert keyring.find(secret.encode()).name == name
    if other not in unique:
        assert keyring.find(other.encode()) is None


@pytest.mark.parametrize(
    "text",
    [
        "not toml", "other = 1", "keys = 3", "[keys.a]", "[keys]\na = 1", table(role="root"), table(sha="x"),
        table(quota="0"), table(quota="10%"), table(quota="lots"), table(quota="999999999999G"), table(quota=True),
        table(most_urgent=8), table(most_urgent=True), table(compute_budget="200%"), table(latency_budget=[1]),
        table(accuracy_floor=2), table("'a b'"), table() + table("b"), table().replace(digest("secret"), "ABC"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_without_telling_digests(text):
    with pytest.raises(KeyFileError) as caught:
        parse(text)
    assert "allowed" in str(caught.value) or "TOML" in str(caught.value)
    assert digest("secret") not in str(caught.value)


@given(st.binary(max_size=300))
def test_any_bytes_are_keys_or_a_key_file_error(data):
    with contextlib.suppress(KeyFileError):
        parse_keys(data, DEFAULT, 10)


def test_the_number_of_keys_is_bounded():
    with pytest.raises(KeyFileError, match="1001 keys"):
        parse(*(table(f"k{index}", str(index)) for index in range(MOST_KEYS + 1)))


@pytest.mark.parametrize(
    ("headers", "secret"),
    [
        ([], None),
        ([(b"authorization", b"Bearer abc")], b"abc"),
        ([(b"authorization", b"  bEARER   abc ")], b"abc"),
        ([(b"authorization", b"Basic abc")], None),
        ([(b"authorization", b"Bearer")], None),
        ([(b"x-api-key", b" abc ")], b"abc"),
        ([(b"x-api-key", b"")], None),
        ([(b"x-api-key", b"abc"), (b"authorization", b"Bearer abc")], b"abc"),
        ([(b"x-api-key", b"abc"), (b"authorization", b"Bearer abd")], None),
        ([(b"x-api-key", b"a" * 600)], None),
    ],
)
def test_the_key_that_is_shown(headers, secret):
    assert shown_key(headers) == secret


def test_defaults_fill_in_what_is_not_stated_and_urgency_has_a_ceiling():
    key = parse(table(compute_budget="60%", latency_budget="100ms", accuracy_floor="0.5", most_urgent=2)).find(
        b"secret"
    )
    assert key.grant(Budget(urgency=0)) == Budget(None, Fraction(3, 5), 0.1, Fraction(1, 2), None, 2)
    assert key.grant(Budget(urgency=5)).urgency == 5
    stated = Budget(10, None, 1.0, Fraction(9, 10))
    assert key.grant(stated) == stated
    assert key.grant(Budget(forced=1)) == Budget(forced=1, latency_s=0.1)
