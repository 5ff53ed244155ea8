"""What the service answers over HTTP is what the same checkpoint answers offline, image by image."""

import io
import os
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from support import serving

import models
from models.checkpoint import load, read_manifest, resolve
from models.training.data import load_folder
from models.training.evaluate import Evaluation, evaluate
from service.settings import Settings

ZOO = Path(models.__file__).parent / "zoo"
NAME = "ds_resnet_cifar10"
WIDTHS = len(read_manifest(resolve(ZOO, NAME)).slices)
PARTS = 64
CLEAR_MARGIN = 1e-3
CLEAR_UTILITY = 1e-5
TOLERATED = 0.001


@pytest.fixture(scope="module")
def archive(data_dir) -> Path:
    return data_dir / "cifar10-val.zip"


@pytest.fixture(scope="module")
def offline(archive) -> tuple[list[bytes], Evaluation]:
    """The encoded images in order, and what the checkpoint says of each."""
    checkpoint = load(resolve(ZOO, NAME))
    images = load_folder(archive, checkpoint.manifest.input, checkpoint.manifest.classes)
    with zipfile.ZipFile(archive) as file:
        encoded = [file.read(name) for name in images.names]
    return encoded, evaluate(checkpoint.net, images, checkpoint.manifest.input, checkpoint.manifest.decision())


@pytest.fixture(scope="module")
def client():
    # The gate's wish alone: a slow machine narrows a batch of so many, and is right to.
    settings = Settings(_cli_parse_args=[], model=[NAME], batch_limit_images=PARTS, profile_limit_s=2, policy="gate")
    with serving(settings) as server:
        yield server.client


def margin(logits: np.ndarray) -> float:
    best = np.sort(logits)
    return float(best[-1] - best[-2])


def answers(client: httpx.Client, encoded: list[bytes], headers: dict[str, str]) -> list[tuple[int, int]]:
    """(served width, best class) of every image, through /v1/classify/batch."""
    found = []
    for start in range(0, len(encoded), PARTS):
        parts = [("image", ("i.jpg", io.BytesIO(image), "image/jpeg")) for image in encoded[start : start + PARTS]]
        response = client.post("/v1/classify/batch", files=parts, headers=headers, params={"top_k": 1})
        assert response.status_code == 200, response.text
        found += [(r["slice"]["width"], r["predictions"][0]["index"]) for r in response.json()["results"]]
    return found


def differing(found: list[tuple[int, int]], evaluation: Evaluation, forced: int | None) -> tuple[list[int], list[int]]:
    """(images that differ although offline margins are clear, images that differ at an unclear margin)."""
    wrong, unclear = [], []
    utility_NG = evaluation.decision.utility(evaluation.gate_logits_NG)
    for i, (width, answer) in enumerate(found):
        expected_width = int(evaluation.gate_widths_N[i]) if forced is None else forced
        logits = evaluation.logits_NLK[i, expected_width]
        if (width, answer) == (expected_width, int(logits.argmax())):
            continue
        gate_is_clear = forced is not None or margin(utility_NG[i]) > CLEAR_UTILITY
        (wrong if gate_is_clear and margin(logits) > CLEAR_MARGIN else unclear).append(i)
    return wrong, unclear


@pytest.mark.data
@pytest.mark.timeout(600)
@pytest.mark.parametrize("forced", [None, *range(WIDTHS)], ids=["gate", *(f"width {w}" for w in range(WIDTHS))])
def test_every_test_image_is_answered_over_http_as_offline(client, offline, forced):
    encoded, evaluation = offline
    headers = {} if forced is None else {"slice-width": str(forced)}
    wrong, unclear = differing(answers(client, encoded, headers), evaluation, forced)
    print(f"{len(encoded)} images, differing at unclear margins: {unclear}")
    assert wrong == []
    assert len(unclear) <= TOLERATED * len(encoded)


@pytest.mark.data
def test_the_manifest_tells_the_test_accuracies_that_evaluation_finds(offline):
    _, evaluation = offline
    manifest = load(resolve(ZOO, NAME)).manifest
    for record in manifest.slices:
        assert record.test_accuracy == pytest.approx(evaluation.width_accuracy(record.width), abs=2 / 5000)


@pytest.mark.parametrize(
    ("name", "least_top1", "least_ratio"),
    [("ds_resnet_cifar10", 0.895, 4), ("ds_mbnet_cifar10", 0.80, 5), ("ds_resnet_tiny_cifar10", 0.75, 1.5)],
)
def test_a_zoo_checkpoint_has_a_gate_that_chooses_and_a_widest_slice_worth_serving(name, least_top1, least_ratio):
    manifest = load(resolve(ZOO, name)).manifest
    assert manifest.slices[-1].test_accuracy >= least_top1
    assert manifest.slices[-1].test_accuracy - manifest.slices[0].test_accuracy <= 0.04
    assert sum(share >= 0.05 for share in manifest.gate.hold_out_shares) >= 2
    assert sum(f.stat().st_size for f in (ZOO / name).rglob("*") if f.is_file()) <= 10_000_000
    assert manifest.slices[-1].madds_published >= least_ratio * manifest.slices[0].madds_published
    assert os.path.basename(str(resolve(ZOO, name))) == str(manifest.version)


def test_the_default_model_knows_how_likely_each_slice_is_right_and_has_a_curve():
    gate = load(resolve(ZOO, NAME)).manifest.gate
    assert max(error.value for errors in gate.calibration_error for error in errors) <= 0.05
    assert len(gate.operating_points) >= 5
    assert gate.operating_points[-1].madds < 0.5 * gate.operating_points[0].madds
