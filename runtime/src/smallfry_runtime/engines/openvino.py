"""OpenVINO, for its intermediate representation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TITLE, PACKAGE = "OpenVINO", "openvino"
SUFFIXES = (".xml", ".bin")


class OpenVinoSession:
    """Compiled model of OpenVINO.

    Args:
        compiled: The compiled model.
    """

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()

    def run(self, inputs: Sequence[NDArray[np.float32]]) -> list[Any]:
        """Compute the outputs; as ``Session.run``."""
        found = self._request.infer(dict(enumerate(map(np.ascontiguousarray, inputs))))
        return [np.array(found[number]) for number in range(len(found))]


def start(contents: Sequence[bytes], threads: int, providers: Sequence[str]) -> OpenVinoSession:
    """Start a graph on the CPU, in float32 where it is not quantized."""
    import openvino

    core = openvino.Core()
    model = core.read_model(*contents)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return OpenVinoSession(core.compile_model(model, "CPU", settings))
