import gc
import os
import signal
import warnings
from functools import cache

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of processes that tests start

import pytest
import torch
from grey_pictures import draw_nothing
from hypothesis import HealthCheck, settings

import smallfry  # noqa: F401  registers the models
from smallfry.errors import SmallfryWarning
from smallfry.training import conclusion

gc.disable()  # collection leaves little garbage, and looking for it takes seconds
DRAW_RUN = conclusion.draw_run
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests, such as nohup
settings.register_profile(  # a busy machine is no failure
    "unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unhurried")
# on all devices it takes a thousand times as long
SEED = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # or some libraries announce leaks


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory):
    """Decoded images go to a folder of the test session, never to the user's cache."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALLFRY_CACHE", str(shared / "cache"))
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    SEED(0)


@pytest.fixture(autouse=True, scope="session")
def _no_pictures():
    """Runs of this process have no pictures, but where a test asks for them."""
    conclusion.draw_run = draw_nothing
    yield
    conclusion.draw_run = DRAW_RUN


@pytest.fixture(autouse=True, scope="session")
def _unsynced():
    """No power fails here, and processes that die lose nothing: syncing only takes time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _operators_read_once():
    """PyTorch's exporter reads the sources of 500 operators once, not a second in each export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        once = staticmethod(cache(ONNXRegistry.from_torchlib))
        patch.setattr(ONNXRegistry, "from_torchlib", once)
        yield


@pytest.fixture(autouse=True, scope="session")
def _brief_timings():
    """No test looks at the latencies beside eight bits, which take a second of each export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smallfry.deploy.quantization_report.SECONDS", 0.01)
        yield


@pytest.fixture
def pictures_drawn(monkeypatch):
    """Let runs draw their pictures."""
    monkeypatch.setattr(conclusion, "draw_run", DRAW_RUN)


@pytest.fixture
def quiet_warnings():
    """Let smallfry warn; the other tests take a warning for a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmallfryWarning)
        yield
