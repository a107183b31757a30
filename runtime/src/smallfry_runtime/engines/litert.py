"""LiteRT, for its flat buffers.

A graph is for one image at a time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.engines import one_by_one

TITLE, PACKAGE = "LiteRT", "ai-edge-litert"
SUFFIXES = (".tflite",)


class LiteRtSession:
    """Interpreter of LiteRT.

    Args:
        interpreter: The interpreter.
    """

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter  # has to outlive its runner
        self._runner = interpreter.get_signature_runner()
        (names,) = interpreter.get_signature_list().values()
        self._inputs, self._outputs = (sorted(names[n], key=_number) for n in ("inputs", "outputs"))

    def run(self, inputs: Sequence[NDArray[np.float32]]) -> list[Any]:
        """Compute the outputs; as ``Session.run``."""
        return one_by_one(self._one, inputs)

    def _one(self, inputs: list[NDArray[np.float32]]) -> list[Any]:
        found = self._runner(**dict(zip(self._inputs, inputs, strict=True)))
        return [found[name] for name in self._outputs]


def start(contents: Sequence[bytes], threads: int, providers: Sequence[str]) -> LiteRtSession:
    """Start a graph."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=contents[0], num_threads=threads)
    interpreter.allocate_tensors()
    return LiteRtSession(interpreter)


def _number(name: str) -> int:
    """Return the position in a name such as ``args_1`` or ``output_0``."""
    return int(name.rpartition("_")[2])
