"""What holds for every test: no network, one thread, and a cache of its own that is gone afterwards."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

CACHE = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    # xdist's workers inherit the variable, so that they share worlds, features and stages
    if "GRAFTLM_CACHE" not in os.environ:
        config.stash[CACHE] = Path(tempfile.mkdtemp(prefix="graftlm-test-cache-"))
        os.environ["GRAFTLM_CACHE"] = str(config.stash[CACHE])


def pytest_unconfigure(config: pytest.Config) -> None:
    if CACHE in config.stash:
        shutil.rmtree(config.stash[CACHE], ignore_errors=True)
        del os.environ["GRAFTLM_CACHE"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if torch := sys.modules.get("torch"):  # never imported for its own sake: some tests look at what is imported
        torch.set_num_threads(1)
