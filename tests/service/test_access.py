"""Keys and quotas over HTTP."""

import hashlib
import logging
import time

import pytest
from starlette.requests import Request
from support import random_image

from service.api import key_file
from service.api.access import _network
from service.api.key_file import KeyFile
from service.settings import SettingError

PNG = {"content-type": "image/png"}
SECRETS = {
    "user": "secret-of-the-user",
    "admin": "secret-of-the-admin",
    "poor": "secret-of-the-poor",
    "slow": "s-l-o-w",
}
MORE = {
    "user": "", "admin": 'role = "admin"', "poor": 'quota = "0.01M"',
    "slow": 'compute_budget = "60%"\nmost_urgent = 4',
}  # fmt: skip


def entry(name, secret, more=""):
    return f'[keys.{name}]\nsha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"\n{more}\n'


def text():
    return "".join(entry(name, secret, MORE[name]) for name, secret in SECRETS.items())


@pytest.fixture(scope="module")
def keys_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(text())
    return path


@pytest.fixture(scope="module")
def guarded(start, keys_path):
    with start(keys_file=keys_path, model_control="explicit", quota_burst_s=1) as running:
        yield running


def post(server, secret=None, path="/v1/classify", **headers):
    shown = {} if secret is None else {"authorization": f"Bearer {secret}"}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.client.post(path, content=random_image(0), headers=PNG | shown | named)


def error_of(response, status, error_type):
    assert response.status_code == status, response.text
    body = response.json()
    assert body["error_type"] == error_type
    assert body["request_id"] == response.headers["x-request-id"]
    for secret in SECRETS.values():
        assert secret not in response.text
    return response


def test_no_key_or_a_wrong_one_is_401_and_says_how_to_show_one(guarded):
    for headers in ({}, {"x_api_key": "wrong"}, {"authorization": "Basic x"}):
        response = error_of(post(guarded, **headers), 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    assert post(guarded, SECRETS["user"]).status_code == 200
    assert post(guarded, x_api_key=SECRETS["user"]).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/v2", "/v2/models/tiny", "/v2/models/stats"])
def test_what_tells_of_models_asks_for_a_key(guarded, path):
    error_of(guarded.client.get(path), 401, "unauthorized")
    assert guarded.client.get(path, headers={"x-api-key": SECRETS["user"]}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"]
)
def test_probes_and_the_documentation_ask_for_none(guarded, path):
    assert guarded.client.get(path).status_code == 200


def test_the_repository_is_for_admins(guarded):
    for path in ("/v2/repository/index", "/v2/repository/models/tiny/load", "/v2/repository/models/tiny/unload"):
        error_of(guarded.client.post(path), 401, "unauthorized")
        shown = {"x-api-key": SECRETS["user"]}
        error_of(guarded.client.post(path, headers=shown), 403, "forbidden")
    shown = {"x-api-key": SECRETS["admin"]}
    assert guarded.client.post("/v2/repository/index", headers=shown).status_code == 200
    assert guarded.client.post("/v2/repository/models/tiny/load", headers=shown).status_code == 200


def test_no_secret_is_told(guarded, caplog):
    with caplog.at_level(logging.DEBUG):
        post(guarded, SECRETS["user"])
        post(guarded, "a-wrong-secret")
    told = caplog.text + guarded.client.get("/metrics").text + guarded.client.get("/openapi.json").text
    for secret in (*SECRETS.values(), "a-wrong-secret"):
        assert secret not in told
        assert hashlib.sha256(secret.encode()).hexdigest() not in told


def test_the_document_says_how_keys_are_shown_only_where_they_are_asked_for(guarded, client):
    document = guarded.client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"].keys() == {"bearer", "apiKey"}
    assert document["paths"]["/v1/classify"]["post"]["security"] == [{"bearer": []}, {"apiKey": []}]
    assert "security" not in document["paths"]["/healthz"]["get"]
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


def test_defaults_of_a_key_hold_where_a_request_states_nothing(guarded):
    model = guarded.state.models["tiny"]
    ceiling = 0.6 * model.slices[-1].madds_served
    assert post(guarded, SECRETS["slow"]).json()["slice"]["madds"] <= ceiling
    assert post(guarded, SECRETS["slow"], slice_width="widest").json()["slice"]["width"] == 3
    before = guarded.metric("slicewise_budget_requests_total", kind="compute", result="met")
    assert post(guarded, SECRETS["slow"]).status_code == 200
    assert guarded.metric("slicewise_budget_requests_total", kind="compute", result="met") == before + 1


def test_a_spent_quota_is_429_and_says_when_to_return(guarded):
    before = guarded.metric("slicewise_rejections_total", reason="quota")
    spent = 0
    for _ in range(20):
        response = post(guarded, SECRETS["poor"], slice_width="widest")
        assert response.headers["ratelimit-policy"] == '"madds";q=10000;qu="madds";w=1'
        assert response.headers["ratelimit"].startswith('"madds";r=')
        if response.status_code == 429:
            break
        spent += int(response.headers["compute-madds"])
    error_of(response, 429, "quota")
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["ratelimit"].startswith('"madds";r=0;t=')
    assert spent > 10_000
    assert guarded.metric("slicewise_rejections_total", reason="quota") == before + 1
    batch = guarded.client.post(
        "/v1/classify/batch", files=[("image", random_image(1))], headers={"x-api-key": SECRETS["poor"]}
    )
    error_of(batch, 429, "quota")
    assert "ratelimit" not in post(guarded, SECRETS["user"]).headers


def test_without_keys_a_client_is_an_address_and_pays_what_the_ledger_says(start):
    with start(quota_madds_per_s=1, quota_burst_s=86_400) as server:
        for index in range(4):
            response = server.client.post("/v1/classify", content=random_image(index), headers=PNG)
            if response.status_code == 429:
                break
        ledger = server.metric_sum("slicewise_madds_total")
        (bucket,) = server.state.quotas._buckets.values()
        assert 86_400 - ledger <= bucket.tokens_madds <= 86_400 - ledger + 60
        quotas = server.client.get("/openapi.json").json()["paths"]["/v1/classify"]["post"]["responses"]["429"][
            "headers"
        ]
        assert {"Retry-After", "RateLimit", "RateLimit-Policy"} <= quotas.keys()


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("a-socket", "b-socket", False),
    ],
)
def test_which_addresses_are_one_client(one, other, is_same):
    def client(host):
        return _network(Request({"type": "http", "client": (host, 1)}))

    assert (client(one) == client(other)) == is_same


def test_the_file_is_read_again_when_it_changes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(key_file, "LOOK_S", 0.0)
    path = tmp_path / "keys.toml"
    path.write_text(entry("a", "one"))
    keys = KeyFile(path, None, 10)
    assert keys.keyring.find(b"one")
    path.write_text(entry("a", "two") + "# another length\n")
    assert keys.keyring.find(b"one") is None
    assert keys.keyring.find(b"two")
    path.write_text("broken, and two stays in force")
    for _ in range(3):
        assert keys.keyring.find(b"two")
    assert caplog.text.count("keys_unreadable") == 1
    path.unlink()
    assert keys.keyring.find(b"two")
    time.sleep(0.01)
    path.write_text(entry("a", "three"))
    assert keys.keyring.find(b"three")


@pytest.mark.parametrize("content", [None, "rubbish", "[keys.a]"])
def test_a_file_that_cannot_be_used_at_the_start_is_a_setting_error(tmp_path, content):
    path = tmp_path / "keys.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingError, match="keys_file"):
        KeyFile(path, None, 10)
