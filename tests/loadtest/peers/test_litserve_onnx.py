import inspect

import numpy as np
import orjson
import pytest
from support import random_image

from models.transform import load_image

pytest.importorskip("cv2")
pytest.importorskip("litserve")

from loadtest.peers.litserve_onnx import OnnxApi
from loadtest.peers.preprocess import Transform


@pytest.fixture
def api(graph, manifest):
    path, _ = manifest()
    api = OnnxApi(graph, Transform.from_manifest(path), max_batch_size=4, batch_timeout_s=0.001)
    api.setup("cpu")
    return api


def test_a_batch_is_answered_image_by_image(api, manifest):
    _, spec = manifest()
    images = [random_image(k) for k in range(3)]
    outputs = api.unbatch(api.predict(api.batch([api.decode_request(image) for image in images])))
    assert len(outputs) == 3
    for image, output in zip(images, outputs, strict=True):
        logits_K = load_image(image, spec).mean((1, 2))
        np.testing.assert_allclose(output, logits_K, atol=1e-5)
        best = orjson.loads(api.encode_response(output).body)["predictions"][0]
        assert best["index"] == logits_K.argmax()


def test_the_raw_body_reaches_it_by_a_type_that_litserve_can_read(api):
    annotation = inspect.signature(api.decode_request).parameters["request"].annotation
    assert not isinstance(annotation, str)
