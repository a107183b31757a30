"""ONNX Runtime, for ONNX graphs."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TITLE, PACKAGE = "ONNX Runtime", "onnxruntime"
SUFFIXES = (".onnx",)
NO_OTHER_FILES = "session.model_external_initializers_file_folder_path"


class OnnxSession:
    """Session of ONNX Runtime.

    Args:
        session: The session.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = [entry.name for entry in session.get_inputs()]

    def run(self, inputs: Sequence[NDArray[np.float32]]) -> list[Any]:
        """Compute the outputs; as ``Session.run``."""
        found: list[Any] = self._session.run(None, dict(zip(self._names, inputs, strict=True)))
        return found


def start(contents: Sequence[bytes], threads: int, providers: Sequence[str]) -> OnnxSession:
    """Start a graph."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and told once
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # weights are in the graph; of a graph from bytes ONNX Runtime looks for others in "."
    options.add_session_config_entry(NO_OTHER_FILES, os.devnull)
    return OnnxSession(ort.InferenceSession(contents[0], options, providers=list(providers)))
