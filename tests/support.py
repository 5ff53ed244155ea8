"""Small networks, pictures and a real server that several tests share."""

import contextlib
import io
import threading
import time
from dataclasses import replace

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image

from models.checkpoint import GateRecord, OperatingPoint
from models.decision import GateCalibration, GateDecision, shares
from models.ds_mbnet import DsMbnet, DsMbnetConfig, StageConfig
from models.ds_resnet import DsResnet, DsResnetConfig
from models.supernet import Supernet
from models.training.calibrate import calibrate
from models.transform import InputSpec, load_image
from service.app import create_app, load_checkpoints
from service.http1 import server_config

TINY = DsMbnetConfig(
    input_size=16,
    classes=10,
    stem_widths=(4,),
    stem_stride=1,
    stages=(StageConfig((8,), 1, 2), StageConfig((8, 16, 24, 32), 2, 2), StageConfig((16, 24, 32, 48), 1, 1)),
    gated_stage=1,
    gate_choices=(0, 1, 3),
    se_ratio=1.0,
)
TINY_RESNET = DsResnetConfig(
    input_size=16,
    classes=10,
    stem_width=4,
    trunk=(StageConfig((8,), 1, 2),),
    body=(StageConfig((4, 8, 12), 2, 2), StageConfig((8, 12, 16), 1, 1)),
    gate_features=6,
    gate_hidden=5,
    gate_choices=(0, 2),
)
TINY_EXIT = replace(TINY_RESNET, exit_stages=(StageConfig((5,), 1, 2), StageConfig((6,), 1, 1)), gate_choices=(0, 1, 3))
TINY_INPUT = InputSpec(16, 16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), shorter_side=16)
TINY_ACCURACY = (0.5, 0.7, 0.65, 0.9)
CLASSES = tuple(f"class {k}" for k in range(10))


def encode(pixels: np.ndarray, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def random_image(seed: int, size: int = 16, image_format: str = "PNG") -> bytes:
    """A random picture with structure: a few large blocks, so that networks tell such pictures apart."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return encode(np.asarray(Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC)), image_format)


def pictures() -> torch.Tensor:
    """The random pictures [64, 3, 16, 16] that the tiny networks are calibrated on."""
    return torch.from_numpy(np.stack([load_image(random_image(k), TINY_INPUT) for k in range(64)]))


def tiny_net(seed: int = 0) -> DsMbnet:
    """A tiny random network, calibrated on random pictures, whose gate splits them among its choices."""
    torch.manual_seed(seed)
    net = DsMbnet(TINY)
    x = pictures()
    calibrate(net, [(x, torch.zeros(len(x), dtype=torch.int64))])
    with torch.no_grad():
        mean_R = net.trunk(x).gate_input.mean(0)
        weight_GR = torch.randn_like(net.gate.slimming.weight) * 10
        # Without the mean's direction no choice is preferred by all pictures alike.
        net.gate.slimming.weight.copy_(weight_GR - torch.outer(weight_GR @ mean_R, mean_R) / (mean_R @ mean_R))
        net.classifier.weight.mul_(5)
    return net


def tiny_resnet(seed: int = 0, config: DsResnetConfig = TINY_RESNET) -> DsResnet:
    """A tiny random DS-ResNet, calibrated on random pictures, all of whose branches matter."""
    torch.manual_seed(seed)
    net = DsResnet(config)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:  # blocks begin as their shortcut, which would hide faults of the branch beside it
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
        net.classifier.weight.mul_(5)
        net.gate.classifier.weight.mul_(5)
    x = pictures()
    calibrate(net, [(x, torch.zeros(len(x), dtype=torch.int64))])
    return net


@torch.no_grad()
def calibrated_gate(net: Supernet, default_point: int | None = 1) -> GateRecord:
    """A gate with made-up odds and three operating points.

    The first gate logit tells how easy an image is, and each slice is likelier right than the one before.
    Point 0 sends every picture to the widest choice, point 1 some to either end, point 2 all to the narrowest.
    """
    choices, madds = net.gate_choices, tuple(cost.served_madds for cost in net.costs())
    logits_NG = net.gate_logits(net.trunk(pictures()).gate_input).numpy()
    slope, mean = float(2 / logits_NG[:, 0].std()), float(logits_NG[:, 0].mean())
    calibration = GateCalibration(
        weight=((slope, *[0.0] * (len(choices) - 1)),) * len(net.ladder),
        bias=tuple(1.5 * width - slope * mean for width in range(len(net.ladder))),
    )
    p_NL = calibration.probabilities(logits_NG)
    gain = float(np.median(p_NL[:, choices[-1]] - p_NL[:, choices[0]]))
    worth_it_for_half = gain / ((madds[choices[-1]] - madds[choices[0]]) / madds[-1])
    points = []
    for lambda_, accuracy in ((0.0, 0.9), (worth_it_for_half, 0.85), (10.0, 0.6)):
        widths = GateDecision(choices, madds, calibration, lambda_).widths(logits_NG)
        cost = float(np.asarray(madds)[widths].mean())
        points.append(OperatingPoint(lambda_, cost, accuracy, shares(widths, choices)))
    return GateRecord(choices, calibration=calibration, operating_points=tuple(points), default_point=default_point)


class Server:
    """A real uvicorn on a free port, in a thread; ``state`` reaches inside for faults and figures."""

    def __init__(self, settings):
        self.app = create_app(settings, load_checkpoints(settings))
        self.state = self.app.state.service
        self.server = uvicorn.Server(server_config(self.app, settings.model_copy(update={"port": 0}), 3))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        give_up = time.monotonic() + 60
        while not self.server.started:
            assert time.monotonic() < give_up
            time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=30)
        return self

    def wait_ready(self):
        give_up = time.monotonic() + 60
        while self.client.get("/readyz").status_code != 200:
            assert time.monotonic() < give_up
            time.sleep(0.02)
        return self

    def __exit__(self, *exc):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def metric(self, name, **labels):
        return self.state.telemetry.registry.get_sample_value(name, labels) or 0

    def metric_sum(self, name, **labels):
        """Sum of a series over every label that is not given."""
        return sum(
            sample.value
            for family in self.state.telemetry.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@contextlib.contextmanager
def serving(settings):
    """A warm server with these settings."""
    with Server(settings) as server:
        yield server.wait_ready()
