"""The compose file and the image's recipe: what they promise without being run."""

import re
from pathlib import Path

import pytest
import yaml

from service.batcher import LAST_BATCH_S
from service.cli import FLUSH_S
from service.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
README = (ROOT / "deploy" / "README.md").read_text()
(OVERRIDE,) = re.findall(r"```yaml\n(# docker-compose.override.yml\n.*?)```", README, re.DOTALL)


def instructions(name):
    """The arguments of each such instruction, continued lines joined."""
    return re.findall(rf"^{name} (.*)$", DOCKERFILE.replace("\\\n", " "), re.MULTILINE)


def image_environment():
    return dict(re.findall(r"(SLICEWISE_\w+)=(\S+)", " ".join(instructions("ENV"))))


def in_container(monkeypatch, *given):
    """The settings as the process in the container reads them."""
    for environment in (image_environment(), *given):
        for name, value in environment.items():
            assert name.removeprefix("SLICEWISE_").lower() in Settings.model_fields
            monkeypatch.setenv(name, value)
    return Settings(_cli_parse_args=[])


def test_the_stack_is_four_services_with_tags():
    assert set(SERVICES) == {"service", "redis", "prometheus", "grafana"}
    for name, service in SERVICES.items():
        assert re.fullmatch(r"[\w./-]+:[\w.-]+", service["image"]), name


def test_ports_are_published_on_this_machine_only():
    published = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert published["redis"] == []
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert published["service"] == [f"127.0.0.1:8000:{image_environment()['SLICEWISE_PORT']}"]


def test_every_volume_that_is_named_is_declared_and_every_file_exists():
    sources = {mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", ())}
    assert {source for source in sources if not source.startswith("./")} == set(COMPOSE["volumes"])
    assert all((ROOT / source).exists() for source in sources if source.startswith("./"))


def test_the_service_asks_the_redis_of_the_stack_and_starts_without_it(monkeypatch):
    settings = in_container(monkeypatch, SERVICES["service"]["environment"])
    assert settings.cache_enabled
    assert settings.redis_url.get_secret_value() == "redis://redis:6379/0"
    # The long form, with a condition, would hold the service back until Redis is healthy.
    assert SERVICES["service"]["depends_on"] == ["redis"]


def test_redis_holds_no_more_than_it_may_and_saves_nothing():
    command = SERVICES["redis"]["command"]
    flags = dict(zip(command[1::2], command[2::2], strict=True))
    assert flags == {
        "--save": "", "--appendonly": "no", "--maxmemory": "256mb", "--maxmemory-policy": "volatile-lru",
    }  # fmt: skip
    operations = (ROOT / "docs" / "operations.md").read_text()
    assert "`maxmemory 256mb`" in operations
    assert "`maxmemory-policy volatile-lru`" in operations
    assert int(SERVICES["redis"]["mem_limit"].removesuffix("m")) > 256


def test_both_deployments_run_the_same_redis():
    (deployment,) = (
        document
        for document in yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "redis.yaml").read_text())
        if document["kind"] == "Deployment"
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == SERVICES["redis"]["image"]
    assert container["args"] == SERVICES["redis"]["command"]


@pytest.mark.parametrize("name", ["service", "redis"])
def test_containers_can_do_no_more_than_they_need(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_cache_outlives_the_container():
    assert SERVICES["service"]["volumes"] == [f"slicewise-cache:{image_environment()['SLICEWISE_CACHE_DIR']}"]


def test_a_container_may_finish_its_drain(monkeypatch):
    settings = in_container(monkeypatch, SERVICES["service"]["environment"])
    grace_s = int(SERVICES["service"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > settings.drain_delay_s + settings.drain_limit_s + LAST_BATCH_S + FLUSH_S


def test_prometheus_scrapes_the_service():
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"service:{image_environment()['SLICEWISE_PORT']}"]}]


def test_own_models_are_mounted_as_the_guide_says(monkeypatch):
    override = yaml.safe_load(OVERRIDE)["services"]["service"]
    settings = in_container(monkeypatch, SERVICES["service"]["environment"], override["environment"])
    (mount,) = override["volumes"]
    assert mount.endswith(f":{settings.repository}:ro")
    assert set(settings.model_fields_set) >= {"model", "repository"}


def test_the_image_needs_nothing_that_is_kept_from_its_context():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert lines[0] == "*"
    copied = {path for copy in instructions("COPY") if "--from" not in copy for path in copy.split()[:-1]}
    assert let_in == copied
    assert all((ROOT / path).exists() for path in copied)


def test_the_image_runs_as_a_number_that_is_not_root():
    assert instructions("USER") == ["10001:10001"]
    assert "--uid 10001 --gid 10001" in DOCKERFILE
    assert "syntax=" not in DOCKERFILE


def test_what_the_image_sets_exists(monkeypatch):
    assert in_container(monkeypatch).host == "0.0.0.0"
