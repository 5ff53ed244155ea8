"""Small networks and pictures that several tests share."""

import io

import numpy as np
import torch
from PIL import Image

from models.ds_mbnet import DsMbnet, DsMbnetConfig, StageConfig
from models.training.calibrate import calibrate
from models.transform import InputSpec, load_image

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


def tiny_net(seed: int = 0) -> DsMbnet:
    """A tiny random network, calibrated on random pictures, whose gate splits them among its choices."""
    torch.manual_seed(seed)
    net = DsMbnet(TINY)
    pictures = np.stack([load_image(random_image(k), TINY_INPUT) for k in range(64)])
    x = torch.from_numpy(pictures)
    calibrate(net, [(x, torch.zeros(len(x), dtype=torch.int64))])
    with torch.no_grad():
        mean_R = net.trunk(x).gate_input.mean(0)
        weight_GR = torch.randn_like(net.gate.slimming.weight) * 10
        # Without the mean's direction no choice is preferred by all pictures alike.
        net.gate.slimming.weight.copy_(weight_GR - torch.outer(weight_GR @ mean_R, mean_R) / (mean_R @ mean_R))
        net.classifier.weight.mul_(5)
    return net
