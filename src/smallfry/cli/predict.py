"""Classify images."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from smallfry.cli._messages import FAILED, complain
from smallfry.cli._shared import AsJson, EarlyExit, OneRun
from smallfry.errors import UsageError
from smallfry.io.terminal import say
from smallfry_runtime.inputs import InputImage, find_images
from smallfry_runtime.predictions import Answer


@dataclass(frozen=True, kw_only=True)
class Options(EarlyExit, AsJson, OneRun):
    """Classify images with a trained model or an export.

    Args:
        inputs: Image files, folders, globs, or - for an image or a list of files on standard input.
        exit_threshold: Exit at this halting probability.
        top_k: Number of classes to print per image.
    """

    inputs: tuple[str, ...]
    exit_threshold: float | None = None
    top_k: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, got {self.top_k}")


def run(options: Options) -> int:
    """Print the classes of each image; the exit code is 1 if one could not be read."""
    images = find_images(options.inputs, sys.stdin.buffer)
    code = 0
    for answer in _answers(options, images):
        if answer.error is not None:
            code = complain(answer.error, FAILED)
        elif options.json:
            say(json.dumps(answer.to_dict()))
        else:
            guesses = "  ".join(f"{name} {share:.1%}" for name, share in answer.top)
            say(f"{answer.name}: {guesses}")
    return code


def _answers(options: Options, images: Iterable[InputImage]) -> Iterable[Answer]:
    """Classify with PyTorch or, for an export, with ONNX Runtime alone."""
    from smallfry_runtime.manifest import is_export

    threshold = options.exit_threshold
    if is_export(Path(options.run)):
        from smallfry_runtime.runtime import Runtime

        runtime = Runtime(options.run)
        threshold = runtime.exit_threshold(options.exit_steps, options.exit_drop, threshold)
        return runtime.classify(images, options.top_k, threshold)
    from smallfry.deploy.pretrained import load_trained
    from smallfry.training.inference import classify

    if options.exit_drop is not None or options.exit_steps is not None:
        raise UsageError(
            "exit_drop and exit_steps need an export's calibrated thresholds; evaluate the run "
            "with this option to find the threshold, then predict with --exit_threshold"
        )
    return classify(load_trained(options.run, options.checkpoint), images, options.top_k, threshold)
