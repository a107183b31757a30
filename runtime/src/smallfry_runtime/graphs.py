"""Execution of an export's graphs on preprocessed inputs.

In the anytime form each image leaves the recursion once the model holds its answer for right, and
what is left is packed into full batches for the next step.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.early_exit import NEVER
from smallfry_runtime.engines import STEMS, Session, engine_of
from smallfry_runtime.errors import ExportError
from smallfry_runtime.manifest import Manifest
from smallfry_runtime.predictions import NOT_FINITE

__all__ = ["Computed", "Graphs", "require_finite"]

Floats = NDArray[np.float32]


class Computed(NamedTuple):
    """Outputs of the graphs for images, in order."""

    logits: Any  # (images, …); of several outputs a dictionary of such by their names
    halting: Floats | None  # (images,)
    steps: NDArray[np.int64] | None  # (images,)

    def require_finite(self) -> None:
        """Require that all answers are numbers.

        Raises:
            ExportError: One is infinite or not a number.
        """
        several = isinstance(self.logits, dict)
        require_finite(*(self.logits.values() if several else [self.logits]), self.halting)


class Graphs:
    """Graphs of an export, ready to run.

    Args:
        manifest: Of the export.
        folder: The export's, for messages.
        contents: Contents of the graphs' files by name.
        threads: CPU threads; None for as many as there are cores.
        providers: ONNX Runtime's execution providers, in order of preference; for ONNX alone.

    Raises:
        ExportError: They can't be run here.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        contents: Mapping[str, bytes],
        threads: int | None,
        providers: Sequence[str],
    ) -> None:
        self._manifest = manifest
        self._sessions = _start(manifest, folder, contents, threads or _cores(), providers)

    def run(self, images: Floats, threshold: float | None, batch_size: int) -> Computed:
        """Compute the outputs, finite or not, for preprocessed images.

        Args:
            images: (images, channels, height, width); there may be none.
            threshold: Halting probability at which an image leaves the recursion; None for all
                steps.
            batch_size: Images that are run at a time.

        Raises:
            ExportError: The graphs are not those of the manifest.
        """
        if len(images) == 0:
            recurs = self._manifest.recursion_steps is not None
            logits = np.empty((0, len(self._manifest.classes)), np.float32)
            if len(self._manifest.outputs) > 1:
                return Computed(dict.fromkeys(self._manifest.outputs, logits), None, None)
            steps = np.empty(0, np.int64)
            return Computed(logits, logits[:, 0] if recurs else None, steps if recurs else None)
        if self._manifest.form == "anytime":
            return self._recur(images, NEVER if threshold is None else threshold, batch_size)
        parts = [
            self.call("model", [images[start : start + batch_size]])
            for start in range(0, len(images), batch_size)
        ]
        logits, *halting = (np.concatenate(part) for part in zip(*parts, strict=True))
        if self._manifest.recursion_steps is None:
            names = self._manifest.outputs
            several = dict(zip(names, (logits, *halting), strict=True))
            return Computed(several if len(names) > 1 else logits, None, None)
        steps = np.full(len(images), self._manifest.recursion_steps)
        return Computed(logits[:, -1], halting[0][:, -1], steps)

    def states(self, images: Floats) -> Iterator[tuple[Floats, Floats]]:
        """Yield answers and halting probabilities of a batch after each recursion step."""
        states = self.call("embed", [images])
        for _ in range(self._manifest.recursion_steps or 1):
            states[1:] = self.call("step", states)
            answers, halting = self.call("read_out", states[1:2])
            yield answers, halting

    def _recur(self, images: Floats, threshold: float, batch_size: int) -> Computed:
        """Recurse group by group, which bounds memory; images still running share full batches."""
        group, most = 4 * batch_size, self._manifest.recursion_steps or 1
        logits = np.empty(0, np.float32)  # until the shape of an answer is known
        halting = np.empty(len(images), np.float32)
        steps = np.zeros(len(images), np.int64)
        for start in range(0, len(images), group):
            left = np.arange(start, min(start + group, len(images)))
            states = self._batched("embed", [images[left]], batch_size)
            for number in range(1, most + 1):
                states[1:] = self._batched("step", states, batch_size)
                found, halting[left] = self._batched("read_out", states[1:2], batch_size)
                if len(logits) == 0:
                    logits = np.empty((len(images), *found.shape[1:]), np.float32)
                logits[left] = found
                steps[left] = number
                going = halting[left] < threshold
                left, states = left[going], [state[going] for state in states]
                if len(left) == 0:
                    break
        return Computed(logits, halting, steps)

    def _batched(self, graph: str, inputs: list[Floats], batch_size: int) -> list[Floats]:
        parts = [
            self.call(graph, [each[at : at + batch_size] for each in inputs])
            for at in range(0, len(inputs[0]), batch_size)
        ]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def call(self, graph: str, inputs: list[Floats]) -> list[Floats]:
        """Run one graph on a batch; its outputs have the shapes that the manifest promises.

        Raises:
            ExportError: The graph can't be run, or its outputs have others.
        """
        try:
            outputs: list[Floats] = self._sessions[graph].run(inputs)
        except MemoryError:
            raise
        except Exception as error:  # engines raise their own kinds, without a common parent
            reason = " ".join(str(error).split())[:200]
            raise self._unlike_manifest(graph, reason) from error
        classes, steps = len(self._manifest.classes), self._manifest.recursion_steps
        expected: list[tuple[int, ...]] = []
        if self._manifest.is_classifier:
            whole: list[tuple[int, ...]]
            whole = [(classes,)] if steps is None else [(steps, classes), (steps,)]
            expected = {"model": whole, "read_out": [(classes,), ()]}.get(graph, [])
        count = len(inputs[0])
        found = [np.shape(output) for output in outputs]
        number = len(self._manifest.outputs) if steps is None else 2  # an answer and its halting
        lacks = graph in ("model", "read_out") and len(found) != number
        if steps is not None and graph in ("model", "read_out") and not lacks:
            over = (steps,) if graph == "model" else ()  # what halting and answers have one of each
            lacks = found[1][1:] != over or found[0][1 : 1 + len(over)] != over
        if (
            lacks
            or any(shape[:1] != (count,) for shape in found)
            or (expected and [shape[1:] for shape in found] != expected)
        ):
            raise self._unlike_manifest(graph, f"of {count} images its results are {found}")
        return outputs

    def _unlike_manifest(self, graph: str, reason: str) -> ExportError:
        return ExportError(
            f"the graph '{graph}' contradicts the export's manifest ({reason}); export "
            "the run again"
        )


def require_finite(*outputs: Floats | None) -> None:
    """Require that outputs of graphs are numbers.

    Raises:
        ExportError: One is infinite or not a number.
    """
    if not all(output is None or np.isfinite(output).all() for output in outputs):
        raise ExportError(NOT_FINITE)


def _start(
    manifest: Manifest,
    folder: Path,
    contents: Mapping[str, bytes],
    threads: int,
    providers: Sequence[str],
) -> dict[str, Session]:
    """Start the graphs of an export by name."""
    engine, found = engine_of(manifest.engine), {}
    for stem in STEMS[manifest.form]:
        files = [stem + suffix for suffix in engine.SUFFIXES]
        try:
            found[stem] = engine.start([contents[name] for name in files], threads, providers)
        except ModuleNotFoundError as error:
            raise ExportError(
                f"{folder}: an export for {engine.TITLE}, which is not installed ({error}): pip "
                f"install {engine.PACKAGE}"
            ) from error
        except Exception as error:  # engines raise their own kinds, without a common parent
            reason = " ".join(str(error).split())[:200]
            raise ExportError(
                f"{folder / files[0]}: {engine.TITLE} {_version(engine.PACKAGE)} can't run it "
                f"({reason}); install a newer {engine.PACKAGE}, or export the run again"
            ) from error
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # in another distribution, as of a processor
        return ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
