"""Example images from a run's data, if it is available."""

from io import BytesIO
from typing import NamedTuple

from PIL import Image

from smallfry.errors import SmallfryError
from smallfry.report.recursion import interesting
from smallfry.training.evaluation import predict
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import TrainedModel

WANTED = 8
EMBEDDED = ("digits",)  # needs neither the net nor a folder that may be gone or huge


class Example(NamedTuple):
    """Example image, or puzzle."""

    name: str
    png: bytes
    text: bytes = b""  # of a puzzle, whose picture alone is the PNG


def find_examples(trained: TrainedModel, run: str) -> list[Example]:
    """Find the test images with the least confident predictions; none without the data.

    Args:
        trained: The model.
        run: Its run folder, with the configuration of its test images.
    """
    if trained.manifest.get("data", {}).get("name") not in EMBEDDED:
        return []
    try:
        _, split, _ = load_like(trained, run)
    except SmallfryError:  # such as a checkpoint without its run folder
        return []
    logits, labels = predict(trained.model, split, trained.normalize)[:2]
    examples = []
    for i in interesting(logits, labels, WANTED).tolist():
        pixels = split.pixels[split.rows[i]].numpy()
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        file = BytesIO()
        image.save(file, "png")
        examples.append(Example(f"a {trained.classes[int(labels[i])]}, no. {i}", file.getvalue()))
    return examples
