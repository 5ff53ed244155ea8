"""The Kubernetes manifests: their schema, that they fit each other, and that they fit the service and its image."""

import re
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from service.api import ops
from service.batcher import LAST_BATCH_S
from service.cli import FLUSH_S
from service.settings import Settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
DOCUMENTS = [
    document
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for document in yaml.safe_load_all(path.read_text())
]
SETTINGS = dict(
    line.split("=", 1) for line in (FOLDER / "settings.env").read_text().splitlines() if not line.startswith("#")
)
OLDEST, NEWEST = "1.29", "1.37"
# Python, PyTorch, ONNX Runtime and the default model, warm, without bodies and images: docs/operations.md.
RESIDENT_MIB = 600


def found(kind, name):
    (document,) = (d for d in DOCUMENTS if (d["kind"], d["metadata"]["name"]) == (kind, name))
    return document


def pod(name):
    return found("Deployment", name)["spec"]["template"]


def container(name):
    (only,) = pod(name)["spec"]["containers"]
    return only


def mib(quantity):
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()
    return int(number) * {"Mi": 1, "Gi": 1024}[unit]


@pytest.fixture
def settings(monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    return Settings(_cli_parse_args=[])


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d['kind']} {d['metadata']['name']}")
def test_manifests_keep_the_schema(document, version):
    assert kubernetes_validate.validate(document, version, strict=True) == version


def test_a_field_that_does_not_exist_is_found():
    wrong = found("Deployment", "slicewise") | {"replica": 2}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(wrong, NEWEST, strict=True)


def test_the_kustomization_has_every_file():
    (generated,) = KUSTOMIZATION["configMapGenerator"]
    named = {*KUSTOMIZATION["resources"], *generated["envs"], "kustomization.yaml"}
    assert named == {path.name for path in FOLDER.iterdir()}
    assert container("slicewise")["envFrom"] == [{"configMapRef": {"name": generated["name"]}}]


def test_the_image_is_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert KUSTOMIZATION["images"] == [{"name": container("slicewise")["image"], "newTag": project["version"]}]


def test_settings_exist_and_are_sound(settings):
    assert {name.removeprefix("SLICEWISE_").lower() for name in SETTINGS} <= set(Settings.model_fields)
    assert {name.lower() for name in SETTINGS} <= {f"slicewise_{name}" for name in settings.model_fields_set}


def test_workers_and_decoders_are_the_cpu_limit(settings):
    resources = container("slicewise")["resources"]
    assert int(resources["limits"]["cpu"]) == settings.workers == settings.decode_threads
    assert resources["requests"] == resources["limits"]


def test_the_memory_limit_holds_what_the_settings_allow(settings):
    pixels = settings.decode_threads * settings.image_limit_pixels * 16
    most = RESIDENT_MIB + (settings.bodies_limit_bytes + pixels) / 2**20
    if "redis_url" not in settings.model_fields_set:
        most += settings.cache_limit_bytes / 2**20
    assert mib(container("slicewise")["resources"]["limits"]["memory"]) >= most


def test_a_pod_may_finish_its_drain(settings):
    grace_s = pod("slicewise")["spec"]["terminationGracePeriodSeconds"]
    assert grace_s > settings.drain_delay_s + settings.drain_limit_s + LAST_BATCH_S + FLUSH_S


def test_the_port_is_closed_only_when_the_endpoints_have_forgotten_the_pod(settings):
    readiness = container("slicewise")["readinessProbe"]
    assert settings.drain_delay_s > readiness["periodSeconds"] * readiness["failureThreshold"]


def test_probes_ask_routes_that_exist():
    routes = {route.path for route in ops.router.routes}
    probes = {name: probe for name, probe in container("slicewise").items() if name.endswith("Probe")}
    assert set(probes) == {"startupProbe", "readinessProbe", "livenessProbe"}
    for probe in probes.values():
        assert probe["httpGet"]["path"] in routes
        assert probe["httpGet"]["port"] == "http"
    assert probes["livenessProbe"]["httpGet"]["path"] == "/healthz"  # a pod that drains or loads is alive
    assert probes["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_a_start_that_measures_fits_the_startup_probe(settings):
    startup = container("slicewise")["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3 * settings.profile_limit_s


def test_the_pod_is_what_the_image_expects():
    (uid, gid) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[0]
    port = re.search(r"SLICEWISE_PORT=(\d+)", DOCKERFILE)[1]
    cache = re.search(r"SLICEWISE_CACHE_DIR=(\S+)", DOCKERFILE)[1]
    security = pod("slicewise")["spec"]["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"]) == (int(uid), int(gid))
    assert container("slicewise")["ports"] == [{"name": "http", "containerPort": int(port)}]
    assert {mount["mountPath"] for mount in container("slicewise")["volumeMounts"]} == {cache, "/tmp"}


def test_variables_of_services_do_not_reach_the_settings():
    # SLICEWISE_PORT=tcp://... of the Service would end every start with status 2.
    assert pod("slicewise")["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize("name", ["slicewise", "slicewise-redis"])
def test_pods_can_do_no_more_than_they_need(name):
    spec, own = pod(name)["spec"], container(name)["securityContext"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert "memory" in container(name)["resources"]["limits"]
    assert all("sizeLimit" in volume["emptyDir"] for volume in spec.get("volumes", ()))


def test_selectors_select_their_pods_and_no_others():
    labels = {name: pod(name)["metadata"]["labels"] for name in ("slicewise", "slicewise-redis")}
    assert labels["slicewise"] != labels["slicewise-redis"]
    for name, own in labels.items():
        assert found("Deployment", name)["spec"]["selector"]["matchLabels"] == own
        assert found("Service", name)["spec"]["selector"] == own
    assert found("PodDisruptionBudget", "slicewise")["spec"]["selector"]["matchLabels"] == labels["slicewise"]
    (spread,) = pod("slicewise")["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels["slicewise"]
    policy = found("NetworkPolicy", "slicewise-redis")["spec"]
    assert policy["podSelector"]["matchLabels"] == labels["slicewise-redis"]
    assert policy["ingress"][0]["from"] == [{"podSelector": {"matchLabels": labels["slicewise"]}}]


def test_ports_lead_to_ports_that_exist():
    for name in ("slicewise", "slicewise-redis"):
        offered = {port["name"] for port in container(name)["ports"]}
        assert {port["targetPort"] for port in found("Service", name)["spec"]["ports"]} <= offered
    (allowed,) = found("NetworkPolicy", "slicewise-redis")["spec"]["ingress"][0]["ports"]
    assert allowed["port"] in {port["name"] for port in container("slicewise-redis")["ports"]}


def test_the_service_asks_the_redis_that_is_there(settings):
    service = found("Service", "slicewise-redis")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert settings.redis_url.get_secret_value() == f"redis://{address}/0"


def test_the_autoscaler_alone_counts_replicas():
    autoscaler = found("HorizontalPodAutoscaler", "slicewise")["spec"]
    assert autoscaler["scaleTargetRef"]["name"] == "slicewise"
    assert "replicas" not in found("Deployment", "slicewise")["spec"]
    assert autoscaler["minReplicas"] > found("PodDisruptionBudget", "slicewise")["spec"]["maxUnavailable"]
