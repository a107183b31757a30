"""Manifest of an export: its graphs, their inputs and outputs, and their origin.

It is read without PyTorch, and every value is validated before use.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from smallfry_runtime.early_exit import Point
from smallfry_runtime.engines import STEMS, engines, graph_files
from smallfry_runtime.errors import ExportError, UsageError
from smallfry_runtime.files import has_valid_digest, open_regular, read_json, settled, with_digest
from smallfry_runtime.frames import (
    PIXELS,
    RESIZES,
    VALUES,
    Frame,
    ImageSize,
    Resize,
    frame_of,
)
from smallfry_runtime.images import is_bit_depth
from smallfry_runtime.stages import interrupted, obstacle
from smallfry_runtime.storage import PLAIN, SHARED, base_of, restored, stored_names
from smallfry_runtime.storage import SUFFIXES as STORAGES
from smallfry_runtime.values import is_number
from smallfry_runtime.variants import FOLDER, FULL, Variant, read_variants
from smallfry_runtime.version import __version__

PLAIN_FORMAT = 3  # of cropped squares; 2 had no bit depth, and 1 no digest of the manifest
CLASS_FORMAT = 4  # 3 had no rectangles, no ways of resizing, and one class per image
TASK_FORMAT = 5  # 4 had classes alone for answers
ENGINE_FORMAT = 6  # 5 had ONNX alone, and graphs stored as they are
FORMAT = 7  # 6 had pictures alone for inputs, and one output
READ = (1, 2, PLAIN_FORMAT, CLASS_FORMAT, TASK_FORMAT, ENGINE_FORMAT, FORMAT)
ONNX = "onnx"
CLASSES = "classification"  # the task of exports that answer with classes, one or several
MANIFEST = "manifest.json"
PROGRAM = "model.pt2"
QUANTIZATION, RANGES = "quantization.json", "quantization.png"
ALL_GRAPHS = {
    name
    for form in STEMS
    for engine in engines()
    for storage in STORAGES
    for name in stored_names(graph_files(form, engine), storage)
}
FILES = {MANIFEST, PROGRAM, QUANTIZATION, RANGES, FOLDER, *ALL_GRAPHS}
PRECISIONS = ("float32", "int8", "int8_dynamic", "own_bits")
MOST_STEPS = 10_000
MOST_CHANNELS = 10_000
LOGITS = "logits"  # the output of a model that has one
MOST_GRAPH = 2**31  # bytes of a graph, which is the most that ONNX's own format can hold


@dataclass(frozen=True)
class Manifest:
    """Description of an export, as stored in its ``manifest.json``.

    Args:
        form: ``whole``, one graph; or ``anytime``, the graphs embed, step and read_out.
        precision: ``float32``, ``int8``, ``int8_dynamic`` or ``own_bits``, of a quantised model.
        model: Its name, parameters and multiply-accumulates.
        classes: Names of the classes, in the order of the logits.
        image_size: Side of square images in pixels, or height and width.
        channels: 1 (grey) or 3 (RGB) of pictures, any number of other inputs.
        mean: Per channel, of pixels on the scale 0 to 1.
        std: Standard deviation per channel.
        bit_depth: Bit depth of training images of more than 8 bits per channel; None without such.
        recursion_steps: Recursion steps of a recursive model, else None.
        exits: Early-exit points, from the fewest steps on.
        calibrated_on: Data that the exits were measured on.
        training: Measured figures of the run, with data and provenance.
        license: License of the weights, as an SPDX name; None if not stated.
        source: SHA-256 of the weights that were exported.
        files: SHA-256 of every other file, of sub-models that of the manifests.
        submodels: Sub-models to choose from, the full model among them; empty without any.
        thresholds: Probability of each class from which an image has it, where it may have several
            classes; empty where it has one.
        resize: How pictures of another shape become such images; see ``Frame``.
        task: Name of the decoder of the outputs; ``classification`` for classes, one or several.
        engine: Device format of the graphs, which is that of the engine that runs them.
        storage: ``plain``, ``packed``, or ``shared``: as parts of the full model's graphs.
        values: Type of the inputs: ``uint8`` pixels, or ``float32``.
        outputs: Names of the outputs of a graph of the form ``whole`` that does not recur.
    """

    form: str
    precision: str
    model: dict[str, Any]
    classes: tuple[str, ...]
    image_size: ImageSize
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bit_depth: int | None = None
    recursion_steps: int | None = None
    exits: tuple[Point, ...] = ()
    calibrated_on: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    submodels: tuple[Variant, ...] = ()
    resize: Resize = "crop"
    thresholds: tuple[float, ...] = ()
    task: str = CLASSES
    engine: str = ONNX
    storage: str = PLAIN
    values: str = PIXELS
    outputs: tuple[str, ...] = (LOGITS,)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the files of the graphs."""
        return stored_names(graph_files(self.form, self.engine), self.storage)

    @property
    def is_classifier(self) -> bool:
        """True if the answers are classes, one or several an image."""
        return self.task == CLASSES

    @property
    def frame(self) -> Frame:
        """Size of the images, and how pictures of another shape become such."""
        return frame_of(self.image_size, self.resize)._replace(values=self.values)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (channels, height, width)."""
        return self.frame.shape(self.channels)

    def to_json(self) -> str:
        """Serialise to the text of ``manifest.json``."""
        content = asdict(self) | {
            "exits": [point._asdict() for point in self.exits],
            "submodels": [each._asdict() for each in self.submodels],
        }
        version = FORMAT
        if self.outputs == (LOGITS,) and not self.frame.is_array(self.channels):
            del content["values"], content["outputs"]
            version = ENGINE_FORMAT
            if (self.engine, self.storage) == (ONNX, PLAIN):
                del content["engine"], content["storage"]
                version = TASK_FORMAT
                if self.is_classifier:
                    del content["task"]
                    plain = self.frame.is_plain and not self.thresholds
                    version = PLAIN_FORMAT if plain else CLASS_FORMAT
        head = {"format": version, "smallfry": __version__}
        return json.dumps(with_digest({**head, **content}), indent=2) + "\n"

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Read the manifest of an export.

        Raises:
            ExportError: Missing, damaged, or of another format than this version reads.
        """
        file = folder / MANIFEST
        if not os.path.isdir(folder):
            raise ExportError(f"{folder}: no such export folder{_hint(folder)}")
        try:
            content = read_json(file)
        except FileNotFoundError:
            raise ExportError(
                f"{folder}: not an export, {MANIFEST} is missing{_hint(folder)}"
            ) from None
        except (OSError, ValueError) as error:
            raise ExportError(f"{file}: damaged ({error}); export the run again") from error
        return _checked(content, file)


def is_export(folder: Path) -> bool:
    """Return whether a folder claims to be an export, valid or not."""
    try:
        content = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "form" in content


def manifest_of(variant: Variant) -> str:
    """Return the path of a sub-model's manifest in its export."""
    return f"{FOLDER}/{variant.place}/{MANIFEST}"


def require_free(folder: Path) -> None:
    """Require that an export may be written here: nothing exists, or only an export.

    Raises:
        ExportError: There is something else.
    """
    reason = obstacle(folder, "export", FILES, is_export)
    if reason is None:
        nested = sorted((folder / FOLDER).glob("*"))
        others = [each for each in nested if obstacle(each, "export", FILES, is_export)]
        reason = f"holds {FOLDER}/{others[0].name} too, which is no export" if others else None
    if reason is not None:
        raise ExportError(f"{folder}: {reason}; use another folder")


def read_export(folder: Path) -> tuple[Manifest, dict[str, bytes]]:
    """Read the manifest of an export, and its graphs by file name.

    Another export may take its place meanwhile.

    Raises:
        ExportError: See ``Manifest.read``; or a graph is missing, or not the one that the manifest
            was written for.
    """
    return settled(lambda: _read_export(folder), folder / MANIFEST)


def _read_export(folder: Path) -> tuple[Manifest, dict[str, bytes]]:
    manifest = Manifest.read(folder)
    with ExitStack() as stack:
        names = manifest.graphs
        try:  # all are opened before one is read: later, another export may be in their place
            streams = [
                stack.enter_context(open_regular(folder / name, MOST_GRAPH)) for name in names
            ]
            contents = [stream.read() for stream in streams]
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or "out of memory"
            file = getattr(error, "filename", None) or folder
            raise ExportError(f"{file}: can't be read ({reason}); export the run again") from error
    for name, content in zip(names, contents, strict=True):
        if hashlib.sha256(content).hexdigest() != manifest.files.get(name):
            raise ExportError(
                f"{folder / name}: truncated or damaged, its hash is not the manifest's; "
                "export the run again"
            )
    return manifest, dict(zip(names, contents, strict=True))


def restored_graphs(
    manifest: Manifest, contents: Mapping[str, bytes], folder: Path
) -> dict[str, bytes]:
    """Restore the graphs of an export that ``read_export`` has read, by their own names.

    Raises:
        ExportError: They are damaged, or parts of graphs that are not there.
    """

    def bases() -> dict[str, bytes]:
        base = base_of(folder)
        found, files = read_export(base)
        if found.storage == SHARED:
            raise ExportError(f"{base}: shares weights of another export itself")
        return restored_graphs(found, files, base)

    return restored(contents, manifest.storage, folder, bases)


def _hint(folder: Path) -> str:
    if not interrupted(folder):
        return "; smallfry export RUN --to DIR writes one"
    return "; a process that replaced it was killed: export the run into it again"


def _checked(content: Any, file: Path) -> Manifest:
    if not isinstance(content, dict) or "format" not in content or "form" not in content:
        raise ExportError(f"{file}: not the manifest of a smallfry export")
    if content["format"] not in READ:
        raise ExportError(
            f"{file.parent}: exported by smallfry {content.get('smallfry', '?')} in format "
            f"{content['format']}; this is smallfry {__version__}, which reads format {FORMAT}: "
            "export the run again with this version, or install that one"
        )
    if not has_valid_digest(content):
        raise ExportError(
            f"{file}: damaged, its digest is not that of its content; export the run again"
        )
    try:
        content = {
            "bit_depth": None,
            "submodels": [],
            "resize": "crop",
            "thresholds": [],
            "task": CLASSES,
            "engine": ONNX,
            "storage": PLAIN,
            "values": PIXELS,
            "outputs": [LOGITS],
            **content,
        }
        values = {entry.name: content[entry.name] for entry in fields(Manifest)}
        several = ("classes", "mean", "std", "thresholds", "outputs")
        if texts := [name for name in several if not isinstance(values[name], list)]:
            raise TypeError(f"{texts[0]} is no list")
        values |= {name: tuple(values[name]) for name in several}
        values["image_size"] = frame_of(values["image_size"]).size
        values["exits"] = tuple(Point(**point) for point in values["exits"])
        values["submodels"] = read_variants(values["submodels"])
        manifest = Manifest(**values)
        problem = _problem(manifest)
    except UsageError as error:
        problem = str(error)
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ExportError(f"{file}: damaged ({problem}); export the run again")
    return manifest


def _problem(manifest: Manifest) -> str | None:
    """Describe the first fault in a manifest's values; None if there is none."""
    statistics = (*manifest.mean, *manifest.std)
    exits = [number for point in manifest.exits for number in point]
    texts = (*manifest.classes, *manifest.files, *manifest.files.values())
    steps = manifest.recursion_steps
    wrong = {
        f"form {manifest.form!r}": manifest.form not in STEMS,
        f"engine {manifest.engine!r}": manifest.engine not in engines(),
        f"storage {manifest.storage!r}": manifest.storage not in STORAGES,
        f"precision {manifest.precision!r}": manifest.precision not in PRECISIONS,
        "classes": not manifest.classes or not all(isinstance(text, str) for text in texts),
        f"task {manifest.task!r}": not isinstance(manifest.task, str),
        f"resize {manifest.resize!r}": manifest.resize not in RESIZES,
        f"values {manifest.values!r}": manifest.values not in VALUES,
        "outputs": not manifest.outputs
        or (len(manifest.outputs) > 1 and (manifest.is_classifier or steps is not None))
        or len({*manifest.outputs}) < len(manifest.outputs)
        or not all(isinstance(name, str) and name.isidentifier() for name in manifest.outputs),
        "channels": not _is_count(manifest.channels, MOST_CHANNELS),
        "mean and std": len(manifest.mean) != manifest.channels
        or len(manifest.std) != manifest.channels
        or not all(map(is_number, statistics))
        or min(manifest.std, default=0) <= 0,
        "thresholds": len(manifest.thresholds) not in (0, len(manifest.classes))
        or not all(map(is_number, manifest.thresholds)),
        "bit_depth": not is_bit_depth(manifest.bit_depth),
        "recursion_steps": steps is not None and not _is_count(steps, MOST_STEPS),
        "exits": not all(map(is_number, exits)) or (bool(exits) and manifest.form != "anytime"),
        "model": not _is_mapping(manifest.model) or not isinstance(manifest.model["name"], str),
        "training": not _is_mapping(manifest.training),
        "source": not _is_mapping(manifest.source),
    }
    known = not any(wrong[each] for each in [*wrong][:4])
    lacking = [name for name in manifest.graphs if name not in manifest.files] if known else []
    lacking += [
        name
        for each in manifest.submodels
        if each.place != FULL and (name := manifest_of(each)) not in manifest.files
    ]
    wrong[f"no hash of {', '.join(lacking)}"] = bool(lacking)
    if manifest.form == "anytime":
        wrong["an anytime form without recursion"] = steps is None
    return next((name for name, is_wrong in wrong.items() if is_wrong), None)


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)
