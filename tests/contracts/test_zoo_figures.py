"""The figures that README prints of the shipped model are those of its manifest."""

import re
from pathlib import Path

from models.checkpoint import read_manifest, resolve
from service.settings import ZOO

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_readme_table_is_the_manifest():
    manifest = read_manifest(resolve(ZOO, "ds_resnet_cifar10"))
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+%) \|$", README, re.MULTILINE)
    expected = [
        (str(r.width), f"{r.madds_published:,}", f"{r.parameters:,}", f"{r.test_accuracy:.2%}") for r in manifest.slices
    ]
    assert rows == expected


def test_the_readme_tells_the_gate_as_the_manifest_does():
    manifest = read_manifest(resolve(ZOO, "ds_resnet_cifar10"))
    accuracy = next(m.value for m in manifest.gate.accuracy if m.split == "test")
    madds = next(m.value for m in manifest.gate.mean_madds if m.split == "test")
    assert f"{accuracy:.2%} at {madds / 1e6:.1f} million MAdds" in " ".join(README.split())
