import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support import CLASSES, TINY_ACCURACY, TINY_INPUT, tiny_net

from models.checkpoint import Measured, save
from service.logs import configure

# What the service keeps for this machine goes to a folder of its own, also when it runs as a process.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="slicewise-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# The networks are tiny: one thread is faster than several that wait for each other.
torch.set_num_threads(1)
configure("console", "warning")
settings.register_profile("slicewise", deadline=None)
settings.register_profile("fuzz", deadline=None)  # many inputs for tests/fuzz, see tests/mutations.py
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "slicewise"))


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """A model repository: `tiny` with accuracies (versions 1 and 2) and `blank` without."""
    root = tmp_path_factory.mktemp("repository")
    for name, version, seed in (("tiny", 1, 1), ("tiny", 2, 0), ("blank", 1, 2)):
        measured = [(Measured(a, "test", 1000),) for a in TINY_ACCURACY] if name == "tiny" else None
        save(root / name / str(version), tiny_net(seed), classes=CLASSES, input_spec=TINY_INPUT, accuracy=measured)
    return root


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of image archives; tests that need it skip where there is none."""
    folder = os.environ.get("SLICEWISE_DATA_DIR")
    if not folder:
        pytest.skip("needs SLICEWISE_DATA_DIR")
    return Path(folder)
