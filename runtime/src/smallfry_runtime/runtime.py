"""Inference of exports: no PyTorch, and bit-exact preprocessing."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smallfry_runtime.decoders import decoder_of, require_no_settings
from smallfry_runtime.early_exit import Trace, most_accurate, most_thrifty, require_threshold
from smallfry_runtime.errors import DataError, ExportError, UsageError
from smallfry_runtime.frames import PIXELS
from smallfry_runtime.graphs import Computed, Graphs, require_finite
from smallfry_runtime.images import Encoded, decode
from smallfry_runtime.inputs import InnerSize, InputImage, find_images, find_texts
from smallfry_runtime.manifest import manifest_of, read_export, restored_graphs
from smallfry_runtime.names import path_of
from smallfry_runtime.pairs import find_pairs, takes_pairs, with_sizes
from smallfry_runtime.predictions import (
    Answer,
    Outputs,
    answers,
    decoded,
    decoded_numbers,
    decoded_texts,
)
from smallfry_runtime.variants import FULL, Variant, best_within

Floats = NDArray[np.float32]
Readable = Encoded | str | os.PathLike[str]


class Predictions(NamedTuple):
    """Predictions of an export for images, in order."""

    probabilities: Floats  # (images, classes)
    halting: Floats | None  # (images,), probability of being right, by a recursive model itself
    steps: NDArray[np.int64] | None  # (images,), recursion steps taken


class Runtime:
    """Inference session for an export.

    A copy, as for another process, reads the export's folder again.

    Args:
        export: The folder that ``smallfry export`` wrote.
        threads: CPU threads; default as many as there are cores.
        providers: ONNX Runtime's execution providers, in order of preference; for ONNX alone.

    Raises:
        ExportError: Missing, damaged, of another version, or not to be run here.
    """

    def __init__(
        self,
        export: str | Path,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        folder = path_of(str(export))
        self._arguments = (folder.absolute(), threads, tuple(providers))
        self._submodels: dict[str, Runtime] = {}  # those in use
        self.manifest, contents = read_export(folder)
        self.file_bytes = sum(map(len, contents.values()))  # of the graphs, as they are stored
        self.classes = self.manifest.classes
        graphs = restored_graphs(self.manifest, contents, folder)
        self._graphs = Graphs(self.manifest, folder, graphs, threads, providers)
        whole = 255 if self.manifest.values == PIXELS else 1
        scale = [1 / (whole * std) for std in self.manifest.std]
        shift = [-m / s for m, s in zip(self.manifest.mean, self.manifest.std, strict=True)]
        self._scale = np.array(scale, np.float32).reshape(-1, 1, 1)
        self._shift = np.array(shift, np.float32).reshape(-1, 1, 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return Runtime, self._arguments

    def within(self, budget_ms: float) -> "Runtime":
        """Return the runtime of the most accurate sub-model within a budget of time.

        A sub-model is read once, when it is first asked for, so that a budget can change from
        image to image. Latencies are those of the machine that exported.

        Args:
            budget_ms: Milliseconds for one image on one thread.

        Raises:
            ExportError: The sub-model is missing, damaged, or another one.
            UsageError: The export has no sub-models, or none that is as fast.
        """
        chosen = best_within(self.manifest.submodels, budget_ms)
        if chosen.place == FULL:
            return self
        if chosen.place not in self._submodels:
            self._submodels[chosen.place] = self._submodel(chosen)
        return self._submodels[chosen.place]

    def _submodel(self, variant: Variant) -> "Runtime":
        folder, threads, providers = self._arguments
        name = manifest_of(variant)
        found = Runtime((folder / name).parent, threads, providers)
        try:
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise ExportError(f"{folder / name}: can't be read ({error.strerror})") from error
        ours, its = self.manifest, found.manifest
        alike = (
            "classes",
            "thresholds",
            "image_size",
            "resize",
            "channels",
            "values",
            "outputs",
            "mean",
            "std",
            "bit_depth",
        )
        if digest != ours.files[name] or any(getattr(ours, a) != getattr(its, a) for a in alike):
            raise ExportError(
                f"{folder / name}: not the sub-model that was exported; export the run again"
            )
        return found

    def predict(
        self,
        images: Sequence[Readable] | NDArray[np.uint8],
        budget: float | None = None,
        drop: float | None = None,
        threshold: float | None = None,
        batch_size: int = 64,
    ) -> Predictions:
        """Predict class probabilities of images.

        Args:
            images: Files by their paths, their bytes, or images of Pillow; or pixels (images,
                channels, height, width). There may be none.
            budget: Recursion steps that an image may take on average, as on the images that the
                export was calibrated on.
            drop: Share of accuracy that may be lost to early exit, such as 0.003, as on those.
            threshold: Halting probability at which an image leaves the recursion.
            batch_size: Images that are run at a time.

        Raises:
            DataError: An image that can't be read, or pixels of another shape.
            ExportError: The graphs are not those of the manifest, or an answer is not a number.
            UsageError: Early exit from a graph that has none, a budget below one step, or an export
                whose answers are not classes: ``decode`` has those.
        """
        self.require_classes()
        found = self.compute(images, self.exit_threshold(budget, drop, threshold), batch_size)
        return Predictions(self._probabilities(found.logits), found.halting, found.steps)

    def decode(
        self,
        images: Sequence[Readable] | NDArray[np.uint8],
        threshold: float | None = None,
        batch_size: int = 64,
        settings: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Decode the answers to images, by the task: texts, solved puzzles, probabilities.

        Args:
            images: As ``predict``.
            threshold: Halting probability at which an image leaves the recursion.
            batch_size: Images that are run at a time.
            settings: Of the task's decoder, such as ``{"beam": 10}`` of texts.

        Returns:
            A value for each image that JSON can hold.

        Raises:
            UsageError: This version has no decoder for the export's task; otherwise as ``predict``.
        """
        decoder = decoder_of(self.manifest.task)
        found = self.compute(images, self.exit_threshold(threshold=threshold), batch_size)
        return self._values(decoder, found, settings)

    def _values(
        self, decoder: ModuleType, found: Computed, settings: Mapping[str, Any] | None
    ) -> list[Any]:
        try:
            values: list[Any] = decoder.decode(found.logits, self.classes, settings)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ExportError(
                f"the answers are not those of the task '{self.manifest.task}' ({error!r}); export "
                "the run again"
            ) from error
        return values

    def compute(
        self,
        images: Sequence[Readable] | NDArray[np.uint8],
        threshold: float | None = None,
        batch_size: int = 64,
    ) -> Computed:
        """Compute the outputs for images; arguments and errors as ``decode``."""
        pixels = images if isinstance(images, np.ndarray) else self._decoded(images)
        expected = self._no_pixels().shape[1:]
        if pixels.dtype != self.manifest.values or pixels.shape[1:] != expected:
            raise DataError(
                f"expected {self.manifest.values} pixels of shape (images, "
                f"{', '.join(map(str, expected))}), got {pixels.dtype} of shape {pixels.shape}; "
                f"only files and bytes are resized automatically"
            )
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        found = self._graphs.run(self.preprocess(pixels), threshold, batch_size)
        found.require_finite()
        return found

    def answer_each(
        self,
        inputs: Iterable[InputImage],
        settings: Mapping[str, Any] | None = None,
        threshold: float | None = None,
        run: Callable[[NDArray[Any]], Computed] | None = None,
    ) -> Iterator[Any]:
        """Answer inputs in order, by the task; one that can't be read gives an ``error``.

        One whose answer is not a number does, too.

        Args:
            inputs: Images, or files of NumPy; of puzzles, texts.
            settings: Of the task's decoder, such as ``{"beam": 10}`` of texts; of classes
                ``top_k``, the number of classes to name, 3 by default.
            threshold: Halting probability at which an image leaves the recursion.
            run: From pixels (images, channels, height, width) to outputs; default ``outputs``.

        Returns:
            For each an ``Answer`` of classes, or else a ``Decoded``; of a text one for each puzzle.

        Raises:
            UsageError: A setting that is not there, early exit from a graph that has none, or this
                version has no decoder for the export's task.
        """
        threshold = self.exit_threshold(threshold=threshold)
        run = run or partial(self.outputs, threshold)
        manifest = self.manifest
        if manifest.is_classifier:
            wanted = (self.classes, manifest.frame, manifest.channels, _top_k(settings))
            shares = partial(self._shares, run)
            return answers(shares, inputs, *wanted, manifest.bit_depth, self.thresholds)
        decoder = decoder_of(manifest.task)

        def decode(pixels: NDArray[Any], sizes: Sequence[InnerSize] = ()) -> list[Any]:
            found = run(pixels)
            chosen = with_sizes(manifest.task, settings, sizes, manifest.frame)

            def values(logits: Any) -> list[Any]:
                return self._values(decoder, found._replace(logits=logits), chosen)

            return decoded_numbers(values, found.logits, found.halting)

        if self.takes_texts:
            read = partial(decoder.read, classes=self.classes, side=manifest.frame.height)
            return decoded_texts(decode, inputs, read)
        return decoded(decode, inputs, manifest.frame, manifest.channels, manifest.bit_depth)

    def classify(
        self, images: Iterable[InputImage], top_k: int = 3, threshold: float | None = None
    ) -> Iterator[Answer]:
        """Classify images in order; an image that can't be read gives an ``error``.

        Raises:
            UsageError: The export's answers are not classes.
        """
        self.require_classes()
        return self.answer_each(images, {"top_k": top_k}, threshold)

    def find(self, inputs: Sequence[str], stdin: BinaryIO) -> Iterator[InputImage]:
        """Find the inputs of the model that files, folders, globs and ``-`` name.

        Raises:
            UsageError: This version has no decoder for the export's task.
        """
        manifest = self.manifest
        if self.takes_texts:
            return find_texts(inputs, stdin)
        if takes_pairs(manifest.task):
            return find_pairs(inputs, stdin, manifest.frame)
        return find_images(inputs, stdin)

    @property
    def takes_texts(self) -> bool:
        """True if the inputs are texts, as of puzzles.

        Raises:
            UsageError: This version has no decoder for the export's task.
        """
        manifest = self.manifest
        return not manifest.is_classifier and hasattr(decoder_of(manifest.task), "read")

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """Threshold of each class, where an image may have several; None where it has one."""
        return self.manifest.thresholds or None

    def require_classes(self) -> None:
        """Require that the export's answers are classes.

        Raises:
            UsageError: They are others.
        """
        if not self.manifest.is_classifier:
            raise UsageError(
                f"this export is for {self.manifest.task}, and its answers are not classes: "
                "Runtime.decode has them"
            )

    def _probabilities(self, logits: Floats) -> Floats:
        return softmax(logits) if self.thresholds is None else sigmoid(logits)

    def _right(self, logits: Floats, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
        if not self.manifest.is_classifier:
            found: NDArray[np.bool_] = decoder_of(self.manifest.task).right(logits, labels)
            return found
        if self.thresholds is None:
            return np.asarray(logits.argmax(1) == labels)
        chosen = sigmoid(logits) >= np.array(self.thresholds, np.float32)
        return np.asarray((chosen == (labels > 0)).all(axis=1))

    def preprocess(self, pixels: NDArray[np.uint8]) -> Floats:
        """Convert inputs (images, channels, height, width) to those of the graphs."""
        batch = pixels.astype(np.float32)
        batch *= self._scale
        batch += self._shift
        return batch

    def trace(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> Trace:
        """Record predictions after each recursion step, to calibrate early exit with."""
        right, halting = [], []
        for start in range(0, len(pixels), 64):
            batch = slice(start, start + 64)
            states = list(self._graphs.states(self.preprocess(pixels[batch])))
            require_finite(*(output for outputs in states for output in outputs))
            right.append(np.stack([self._right(logits, labels[batch]) for logits, _ in states]))
            halting.append(np.stack([probability for _, probability in states]))
        return Trace(np.concatenate(right, axis=1), np.concatenate(halting, axis=1))

    def exit_threshold(
        self,
        budget: float | None = None,
        drop: float | None = None,
        threshold: float | None = None,
    ) -> float | None:
        """Choose the halting threshold for a budget or an accuracy drop; None without early exit.

        Raises:
            UsageError: More than one of them, none that the export has, or no early exit.
        """
        if sum(given is not None for given in (budget, drop, threshold)) > 1:
            raise UsageError("budget, drop and threshold exclude each other: give one")
        if budget is None and drop is None and threshold is None:
            return None
        if self.manifest.form != "anytime":
            raise UsageError(
                "this export is a single graph without early exit; export a recursive model with "
                "--form anytime"
            )
        if threshold is not None:
            return require_threshold(threshold)
        exits = self.manifest.exits
        if not exits:
            raise UsageError(
                "this export was not calibrated for a budget or a drop; give a threshold, or "
                "export the run where its validation images are available"
            )
        if budget is not None:
            return most_accurate(exits, budget).threshold
        assert drop is not None
        return most_thrifty(exits, drop).threshold

    def _decoded(self, images: Sequence[Readable]) -> NDArray[np.uint8]:
        """Decode encoded or Pillow images to pixels."""
        if isinstance(images, str | bytes | os.PathLike | Image.Image):
            raise DataError("expected a list of images, got a single one: put it in a list")
        if not isinstance(images, Iterable):
            raise DataError(f"expected a list of images or an array, got {type(images).__name__}")
        manifest = self.manifest
        pixels = []
        for number, image in enumerate(images):
            name = f"image {number}"
            if isinstance(image, str | os.PathLike):
                image = Path(image)
                name = str(image)
            elif not isinstance(image, bytes | Image.Image):
                raise DataError(
                    f"{name}: expected a path, bytes or a Pillow image, got "
                    f"{type(image).__name__}; pass pixels as one array for all images"
                )
            frame, channels = manifest.frame, manifest.channels
            pixels.append(decode(image, name, frame, channels, manifest.bit_depth))
        return np.stack(pixels) if pixels else self._no_pixels()

    def outputs(self, threshold: float | None, pixels: NDArray[Any]) -> Computed:
        """Compute the outputs, finite or not, for inputs (images, channels, height, width).

        They are one batch. There are no steps without a threshold.
        """
        found = self._graphs.run(self.preprocess(pixels), threshold, len(pixels))
        return found if threshold is not None else found._replace(steps=None)

    def _shares(self, run: Callable[[NDArray[Any]], Computed], pixels: NDArray[Any]) -> Outputs:
        logits, halting, steps = run(pixels)
        return Outputs(self._probabilities(logits), halting, steps)

    def _no_pixels(self) -> NDArray[np.uint8]:
        return np.empty((0, *self.manifest.input_shape), self.manifest.values)


def _top_k(settings: Mapping[str, Any] | None) -> int:
    others = dict(settings or {})
    top_k = others.pop("top_k", 3)
    require_no_settings(others)
    if type(top_k) is not int or top_k < 1:
        raise UsageError(f"top_k must be a whole number above 0, got {top_k!r}")
    return top_k


def sigmoid(logits: Floats) -> Floats:
    """Compute the probability of each class on its own from logits."""
    shrunk = np.exp(-np.abs(logits))  # without overflow
    result: Floats = np.where(logits >= 0, 1, shrunk) / (1 + shrunk)
    return result


def softmax(logits: Floats) -> Floats:
    """Compute probabilities from logits, along the last axis."""
    with np.errstate(over="ignore", invalid="ignore"):  # of what is as good as infinite, or is
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Floats = shares / shares.sum(axis=-1, keepdims=True)
    return result
