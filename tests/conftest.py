import warnings

import pytest
import torch

import smallfry  # noqa: F401  registers the models
from smallfry.errors import SmallfryWarning


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """Decoded images go to a folder of the test session, never to the user's cache."""
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def quiet_warnings():
    """Let smallfry warn; the other tests take a warning for a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmallfryWarning)
        yield
