"""ExecuTorch, for its programs; its Python runtime brings PyTorch, its C++ runtime does not.

A program is for one image at a time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.engines import one_by_one

TITLE, PACKAGE = "ExecuTorch", "executorch"
SUFFIXES = (".pte",)


class ExecuTorchSession:
    """Loaded program of ExecuTorch.

    Args:
        program: The program, which has to outlive its method.
    """

    def __init__(self, program: Any) -> None:
        self._program = program
        self._method = program.load_method("forward")

    def run(self, inputs: Sequence[NDArray[np.float32]]) -> list[Any]:
        """Compute the outputs; as ``Session.run``."""
        return one_by_one(self._one, inputs)

    def _one(self, inputs: list[NDArray[np.float32]]) -> list[Any]:
        import torch

        given = [torch.from_numpy(np.require(each, requirements=["C", "W"])) for each in inputs]
        return [output.numpy().copy() for output in self._method.execute(given)]


def start(contents: Sequence[bytes], threads: int, providers: Sequence[str]) -> ExecuTorchSession:
    """Start a program; the number of threads holds for all programs of the process."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    return ExecuTorchSession(Runtime.get().load_program(contents[0]))
