"""Test-wide set-up. The package is imported before torch, so that MLX finds OpenBLAS as a user's process would."""

import sys
import uuid

import pytest

import mlx_cm  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """On models this small, torch's threads spin for ten times the time that the work takes."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What a test downloads or converts lands in a folder of its own, never in the user's cache."""
    monkeypatch.setenv("MLX_CM_CACHE", str(tmp_path_factory.getbasetemp() / "cache" / uuid.uuid4().hex))
