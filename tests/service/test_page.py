"""The page at /: what is sent, and what a browser makes of it."""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from support import random_image

from service.api.page import POLICY, STATIC

ROOT = Path(__file__).parents[2]
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, never fetched
ZOO_TINY = "ds_resnet_tiny_cifar10"
FILES = sorted(path.name for path in STATIC.iterdir())
SCRIPTS = "\n".join(path.read_text() for path in sorted(STATIC.glob("*.js")))
HTML = (STATIC / "index.html").read_text()
CHROMIUM_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


def test_the_page_is_sent_with_its_policy(client):
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"] == POLICY
    assert page.headers["cache-control"] == "no-cache"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in POLICY
    assert POLICY.startswith("default-src 'none';")


@pytest.mark.parametrize("name", [name for name in FILES if name != "index.html"])
def test_its_files_are_sent_and_kept_by_browsers(client, name):
    kinds = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    sent = client.get(f"/assets/{name}")
    assert sent.content == (STATIC / name).read_bytes()
    assert sent.headers["content-type"].partition(";")[0] == kinds[name.rpartition(".")[2]]
    assert sent.headers["content-security-policy"] == POLICY
    etag = sent.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = client.get(f"/assets/{name}", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert client.get(f"/assets/{name}", headers={"if-none-match": '"other"'}).status_code == 200


def test_nothing_else_is_sent_and_nothing_is_shadowed(client):
    for path in ("/assets/index.html", "/assets/nope.js", "/assets/..%2f..%2fcli.py", "/assets/", "/static/app.js"):
        assert client.get(path).status_code == 404, path
    assert client.post("/").status_code == 405
    assert "swagger" in client.get("/docs").text
    assert client.get("/metrics").headers["content-type"].startswith("text/plain")
    assert not {"/", "/assets/{name}"} & set(client.get("/openapi.json").json()["paths"])


@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
def test_the_page_works_under_a_prefix(start):
    with start(root_path="/slices") as server:
        assert server.client.get("/slices/").content == STATIC.joinpath("index.html").read_bytes()
        assert server.client.get("/slices/assets/app.js").status_code == 200


def test_no_file_names_another_host():
    for name in FILES:
        text = (STATIC / name).read_text().replace(NAMESPACE, "")
        assert not re.search(r"(?:https?|wss?):|[\"'(]//|@import|\burl\(", text), name


def test_the_page_keeps_its_own_policy():
    assert not re.search(r"\son\w+\s*=|\sstyle\s*=|<style|<script(?![^>]*\ssrc=)", HTML)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\b|new Function", SCRIPTS)


def test_what_the_scripts_and_the_page_refer_to_exists():
    ids = re.findall(r'\bid="([^"]+)"', HTML)
    assert len(ids) == len(set(ids))
    sliders = re.findall(r'new Slider\("([\w-]+)"', SCRIPTS)
    used = {*re.findall(r'byId\("([\w-]+)"\)', SCRIPTS), *sliders, *(f"{name}-value" for name in sliders)}
    used |= {"empty", "problem", "answer", "width"}  # named in lists
    assert len(sliders) == 3
    assert used <= set(ids)
    assert set(re.findall(r'\b(?:for|aria-labelledby|aria-describedby)="([^"]+)"', HTML)) <= set(ids)
    assets = set(re.findall(r'(?:href|src)="assets/([^"]+)"', HTML))
    assert assets == set(FILES) - {"index.html"}
    assert set(re.findall(r'from "\./([^"]+)"', SCRIPTS)) <= assets


def test_every_control_has_a_label():
    labels = set(re.findall(r'<label[^>]*\bfor="([^"]+)"', HTML))
    assert set(re.findall(r'<(?:input|select)[^>]*\bid="([^"]+)"', HTML)) == labels


def test_the_files_are_part_of_the_wheel():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["service"]
    assert set(FILES) <= {path.name for pattern in data for path in (ROOT / "service").glob(pattern)}


@pytest.fixture(scope="module")
def zoo_url(tmp_path_factory):
    """The console script, as a process, on the smallest model of the zoo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLICEWISE_")} | {"SLICEWISE_PROFILE_LIMIT_S": "0.3"}
    command = [sys.executable, "-m", "service", "serve", "--model", ZOO_TINY, "--port", str(port), "--policy", "gate"]
    with (tmp_path_factory.mktemp("page") / "log").open("w+") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            give_up = time.monotonic() + 60
            while not _is_ready(url):
                assert process.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.1)
            yield url
        finally:
            process.kill()
            process.wait()


def _is_ready(url):
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


class Page:
    """The page in a browser, as a visitor uses it."""

    def __init__(self, driver, url, said=None):
        self.driver, self.url = driver, url
        self.size(1280, 900)
        driver.get_log("performance")
        driver.get_log("browser")
        driver.get(f"{url}/")
        self.until(lambda: (said or "slices") in driver.find_element(By.TAG_NAME, "body").text)

    def size(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def at(self, identity):
        return self.driver.find_element(By.ID, identity)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, identity):
        return self.at(identity).text.replace("\u00a0", " ")

    def until(self, condition):
        WebDriverWait(self.driver, 20, 0.05).until(lambda _: condition())

    def upload(self, path):
        self.at("file").send_keys(str(path))

    def slide(self, identity, value):
        """Move a slider to this value; its stops are at 1, 2, 3 and so on."""
        self.set(identity, value - 1)

    def set(self, identity, value):
        script = (
            "const node = document.getElementById(arguments[0]); node.value = arguments[1];"
            "node.dispatchEvent(new Event('input', {bubbles: true}));"
        )
        self.driver.execute_script(script, identity, str(value))

    def drop(self, data):
        script = (
            "const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));"
            "const dataTransfer = new DataTransfer();"
            "dataTransfer.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));"
            "document.dispatchEvent(new DragEvent('drop', {dataTransfer, bubbles: true, cancelable: true}));"
        )
        self.driver.execute_script(script, base64.b64encode(data).decode())

    def requests(self):
        """The requests since the last call, as (URL, headers)."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]
        assert all(request["url"].startswith((self.url, "blob:", "data:")) for request in sent), sent
        return [(request["url"], request["headers"]) for request in sent]

    def last_budget(self):
        """Headers of the last classification, of those sent since the last call to ``requests``."""
        return [headers for url, headers in self.requests() if "/v1/classify" in url][-1]

    def console_errors(self, *expected_statuses):
        """What the console complains of, but for answers with these statuses."""
        expected = tuple(f"with a status of {status} " for status in expected_statuses)
        log = self.driver.get_log("browser")
        entries = [entry["message"] for entry in log if entry["level"] not in ("DEBUG", "INFO")]
        return [entry for entry in entries if not any(text in entry for text in expected)]

    def overflow(self):
        script = "const root = document.documentElement; return root.scrollWidth - root.clientWidth;"
        return self.driver.execute_script(script)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, zoo_url):
    return Page(driver, zoo_url)


@pytest.fixture(scope="module")
def picture(zoo_url, tmp_path_factory):
    """A picture that the gate sends to a slice above the narrowest."""
    for seed in range(50):
        data = random_image(seed, 96)
        answer = httpx.post(f"{zoo_url}/v1/classify", content=data, headers={"content-type": "image/png"}).json()
        if answer["slice"]["width"] > 0:
            path = tmp_path_factory.mktemp("pictures") / "picture.png"
            path.write_bytes(data)
            return path
    raise AssertionError("the gate sends every picture to the narrowest slice")


def test_an_image_is_answered_and_a_budget_narrows_it(page, picture, tmp_path):
    page.upload(picture)
    page.until(lambda: page.at("answer").is_displayed())
    assert len(page.all("#classes li")) == 5
    assert re.fullmatch(r"[a-z]+", page.all("#classes .label")[0].text)
    assert int(page.text("slice-width")) > 0
    assert (page.text("reason-code"), page.text("reason")[:8]) == ("gate", "The gate")
    assert re.fullmatch(r"[23],\d{3},\d{3} MAdds", page.text("madds"))
    assert [row.text for row in page.all("#stages tbody th")] == ["Decode", "Queue", "Trunk", "Body", "Total"]
    assert page.all("#classes .label")[0].text in page.at("announce").get_attribute("textContent")
    assert "compute-budget" not in {name.lower() for name in page.last_budget()}

    page.slide("compute", 63)
    page.until(lambda: page.text("slice-width") == "0")
    assert page.last_budget()["Compute-Budget"] == "63%"
    assert page.text("reason-code") == "compute_budget"
    assert "the gate wished" in page.text("reason")
    assert len(page.all("#curve .limit")) == 1
    assert "ran through slice 0" in page.at("curve").get_attribute("aria-label")
    assert page.all("#mix-rows tr:first-child td")[0].text.replace("\u00a0", " ") == "1 · 50 %"
    page.until(lambda: re.match(r"[1-9]\d* · ", page.all("#mix-rows tr:first-child td")[2].text))
    for name, size in (("wide", (1280, 900)), ("phone", (390, 844)), ("small", (360, 740))):
        page.size(*size)
        assert page.driver.save_screenshot(str(tmp_path / f"{name}.png"))
        assert page.overflow() <= 0, name
    assert page.console_errors() == []


def test_budgets_that_no_slice_satisfies_are_explained_and_repaired(page, picture):
    page.upload(picture)
    page.at("compute").send_keys(Keys.HOME)  # by keyboard, to the least
    page.until(lambda: page.at("problem").is_displayed())
    assert page.text("compute-value") == page.at("compute").get_attribute("aria-valuetext").replace("\u00a0", " ")
    assert page.text("problem-title") == "No slice fits these budgets."
    assert page.text("problem-allowed") == "a compute budget of at least 63 % (1,970,920 MAdds)"
    assert page.last_budget()["Compute-Budget"] == "1%"
    page.at("apply").click()
    page.until(lambda: page.at("answer").is_displayed())
    assert (page.text("compute-value"), page.text("slice-width")) == ("63 %", "0")
    page.at("floor").send_keys(Keys.END)
    page.until(lambda: page.at("problem").is_displayed())
    page.at("apply").click()
    page.until(lambda: page.at("answer").is_displayed())
    assert page.console_errors(422) == []


def test_a_slice_is_forced_and_a_latency_budget_is_sent(page, picture):
    page.drop(picture.read_bytes())
    page.until(lambda: page.at("answer").is_displayed())
    assert page.text("drop-text") == "dropped.png"
    page.set("width", 1)
    page.until(lambda: page.text("slice-width") == "1")
    assert (page.text("reason-code"), page.last_budget()["Slice-Width"]) == ("forced", "1")
    page.at("reset").click()
    page.until(lambda: page.text("reason-code") == "gate")
    page.set("latency", 18)
    assert page.text("latency-value") == "1000 ms"
    page.until(lambda: any(headers.get("Latency-Budget") == "1000ms" for _, headers in page.requests()))
    assert page.console_errors() == []


def test_a_file_that_is_no_image_is_refused_in_plain_words(page, tmp_path):
    (tmp_path / "note.txt").write_text("no image")
    (tmp_path / "broken.png").write_bytes(random_image(0)[:60])
    page.upload(tmp_path / "note.txt")
    page.until(lambda: page.at("problem").is_displayed())
    assert page.text("problem-title") == "This is not an image that the service reads."
    assert "JPEG, PNG, WebP, BMP and GIF" in page.text("problem-advice")
    assert not page.at("preview").is_displayed()
    page.upload(tmp_path / "broken.png")
    page.until(lambda: page.text("problem-title") == "This file cannot be decoded.")
    assert "Status 400" in page.text("problem-detail")
    assert not page.at("apply").is_displayed()
    assert not page.at("retry").is_displayed()
    assert page.console_errors(415, 400) == []


def test_of_several_models_one_is_chosen(driver, start, picture):
    with start(model=["tiny", "blank"]) as server:
        page = Page(driver, server.url)
        assert [option.text for option in page.all("#model option")] == ["tiny", "blank"]
        page.upload(picture)
        page.until(lambda: page.at("answer").is_displayed())
        page.at("model").send_keys("blank")
        page.until(lambda: page.text("model-line").startswith("blank"))
        page.until(lambda: page.text("accuracy") == "not measured")
        assert not page.at("floor").is_enabled()
        assert "not measured" in page.text("curve-note")
        server.state.draining = True
        page.at("reset").click()
        page.until(lambda: page.text("problem-title") == "The service is stopping.")
        assert "again in 1 s" in page.text("problem-advice")
        server.state.draining = False
        page.at("retry").click()
        page.until(lambda: page.at("answer").is_displayed())
        assert page.console_errors(503) == []
        driver.get("about:blank")  # the page would ask a server that is gone


def test_where_keys_are_asked_for_the_page_takes_one(driver, start, picture, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[keys.page]\nsha256 = "{hashlib.sha256(b"open-sesame").hexdigest()}"\nquota = "0.01M"\n')
    with start(keys_file=keys, quota_burst_s=1) as server:
        page = Page(driver, server.url, "This service asks for an API key.")
        page.at("key").send_keys("wrong", Keys.ENTER)
        page.until(lambda: server.metric("slicewise_rejections_total", reason="unauthorized") == 2)
        assert not page.at("answer").is_displayed()
        page.at("key").clear()
        page.at("key").send_keys("open-sesame", Keys.ENTER)
        page.until(lambda: page.text("model-line").startswith("tiny"))
        page.upload(picture)
        page.until(lambda: page.at("answer").is_displayed())
        page.at("reset").click()
        page.until(lambda: page.text("problem-title") == "The compute quota of this client is spent.")
        assert page.at("retry").is_displayed()
        assert page.console_errors(401, 429) == []
        driver.get("about:blank")
