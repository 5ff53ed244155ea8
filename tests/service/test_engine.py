import threading
import time

import numpy as np
import pytest
import torch
from support import TINY_INPUT, random_image, tiny_net

from models.transform import load_image
from service.engine.measure import BATCH_SIZES, measure
from service.engine.onnx import OnnxEngine


@pytest.fixture(scope="module")
def net():
    return tiny_net(3)


@pytest.fixture(scope="module")
def engine(net):
    return OnnxEngine(net, workers=2)


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_engine_computes_what_the_supernet_computes_at_every_width_and_batch_size(net, engine, count):
    images = [load_image(random_image(seed), TINY_INPUT) for seed in range(count)]
    x = torch.from_numpy(np.stack(images))
    features, gate_inputs = engine.trunk(images)
    assert len(features) == count
    with torch.no_grad():
        assert close(engine.gate(gate_inputs), net.gate_logits(net.trunk(x).gate_input).numpy())
        for width in range(len(net.ladder)):
            assert close(engine.body(width, features), net(x, width).numpy())


def test_features_of_different_batches_may_share_one(net, engine):
    images = [load_image(random_image(seed), TINY_INPUT) for seed in range(4)]
    features = [engine.trunk(images[:1]).features[0], *engine.trunk(images[1:]).features]
    mixed = engine.body(2, [features[i] for i in (3, 0, 2)])
    with torch.no_grad():
        expected = net(torch.from_numpy(np.stack([images[i] for i in (3, 0, 2)])), 2).numpy()
    assert close(mixed, expected)


class SlowEngine:
    """Needs 20 ms for everything and counts its calls."""

    calls = 0

    def _work(self, count, columns):
        SlowEngine.calls += 1
        time.sleep(0.02)
        return np.zeros((count, columns), np.float32)

    def trunk(self, images):
        from service.engine.base import TrunkResult

        return TrunkResult(list(images), self._work(len(images), 2))

    def gate(self, inputs):
        return np.zeros((len(inputs), 2), np.float32)

    def body(self, width, features):
        return self._work(len(features), 3)


def test_measuring_fills_the_table_and_stops_when_its_time_is_up():
    table = measure(SlowEngine(), 3, (3, 4, 4), limit_s=0.1, cancelled=threading.Event())
    assert set(table.seconds_by_batch) == {(w, b) for w in (None, 0, 1, 2) for b in BATCH_SIZES}
    assert all(seconds >= 0.02 for seconds in table.seconds_by_batch.values())
    # One warm-up and one timed run each, where the time is up at once; and the first trunk.
    assert SlowEngine.calls == 2 * len(table.seconds_by_batch) + 1


def test_measuring_stops_when_it_is_cancelled():
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(InterruptedError):
        measure(SlowEngine(), 3, (3, 4, 4), limit_s=10, cancelled=cancelled)
