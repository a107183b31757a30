"""Trained model with the metadata for its use, read from a run folder."""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from torch import Tensor, nn

from smallfry.errors import DataError, RunError, UsageError
from smallfry.tasks import create_task
from smallfry.training.augment import Normalize
from smallfry.training.checkpoint import load_checkpoint, save_checkpoint, write_file
from smallfry.training.compression import UNFINISHED
from smallfry.training.config import CLASSIFICATION, MULTILABEL
from smallfry.training.export_settings import ExportSettings
from smallfry.training.run_folder import FAILURE as FAILURE
from smallfry.training.run_folder import RUN_CONFIG as RUN_CONFIG
from smallfry.training.run_folder import RunFolder as RunFolder
from smallfry.training.run_folder import new_run_folder as new_run_folder
from smallfry.transforms.build import build
from smallfry.transforms.spec import ModelSpec
from smallfry_runtime.frames import PIXELS, VALUES, Frame, ImageSize, Resize, frame_of
from smallfry_runtime.images import FULL_DEPTH, is_bit_depth
from smallfry_runtime.manifest import MOST_CHANNELS
from smallfry_runtime.names import path_of
from smallfry_runtime.predictions import Answer

USE = "smallfry.training.use"  # which imports this module


class TrainedModel(NamedTuple):
    """Trained model with the metadata for its use."""

    model: nn.Module  # in evaluation mode, on the CPU
    classes: tuple[str, ...]  # names, in the order of the logits
    image_size: ImageSize  # side of square images in pixels, or height and width
    channels: int  # 1 for grey images, 3 for RGB; any number of inputs that are no pictures
    normalize: Normalize  # images to what the model takes
    manifest: dict[str, Any]  # of the checkpoint
    bit_depth: int | None = None  # of training images of more than 8 bits per channel, if any
    origin: Path | None = None  # the run folder that it was loaded from, or compressed of
    packing: Callable[[bytes], bytes] | None = None  # of the file that ``save`` writes, if any
    resize: Resize = "crop"  # how pictures of another shape become such images

    @property
    def frame(self) -> Frame:
        """Size of the images, how pictures of another shape become such, and their type."""
        frame = frame_of(self.image_size, self.resize)
        return frame._replace(values=self.manifest["input"].get("values", PIXELS))

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (channels, height, width)."""
        return self.frame.shape(self.channels)

    @property
    def is_classifier(self) -> bool:
        """True if the answers are classes, one or several an image."""
        return self.manifest.get("task", CLASSIFICATION) in (CLASSIFICATION, MULTILABEL)

    @property
    def spec(self) -> ModelSpec:
        """Spec of the model, without the source of its initial weights."""
        return ModelSpec.from_dict(self.manifest["model"]).portable()

    def compressed(
        self, model: nn.Module, spec: ModelSpec, methods: Sequence[Mapping[str, Any]]
    ) -> "TrainedModel":
        """Return the same classes and images with a compressed model.

        Figures of the test split stay behind: they are of other weights.
        """
        kept = {k: v for k, v in self.manifest.items() if k not in ("files", "measured", "digest")}
        done = [*self.manifest.get("methods", []), *map(dict, methods)]
        manifest = {**kept, "model": spec.to_dict(), "methods": done}
        return self._replace(model=model, manifest=manifest, packing=None)

    def predict(self, images: Any, top_k: int = 3) -> list[Answer]:
        """Classify images.

        Args:
            images: A file, folder or glob, an open file or its bytes, an image of Pillow, pixels
                of one (height, width, channels or channels first) or of several images, uint8; or a
                list of these. Three grey images have the shape of one in colour: a model of grey
                images takes them for three.
            top_k: Number of classes in each answer.

        Raises:
            UsageError: The model is no classifier.
            DataError: An image can't be read.
        """
        found: list[Answer] = import_module(USE).predict_images(self, images, top_k)
        return found

    def decode(self, images: Any, settings: Mapping[str, Any] | None = None) -> list[Any]:
        """Decode the model's answers to images, by its task: texts, or the probability of a class.

        Args:
            images: As ``predict``.
            settings: Of the task's decoder, such as ``{"beam": 10}`` of texts.

        Returns:
            A value for each image that JSON can hold.

        Raises:
            DataError: An image can't be read.
        """
        found: list[Any] = import_module(USE).decode_answers(self, images, settings)
        return found

    def evaluate(self, data: Any = None, split: str = "test") -> dict[str, Any]:
        """Score the model on a split of its data, or of other data.

        Args:
            data: A name, folder or objects, as for ``smallfry.train``; default the run's own. Other
                data is scored on its test split, or else its validation split, or else on all
                images. Labels that are numbers, without names of their own, are places in the
                model's classes, or their names if all of those are whole numbers.
            split: train, validation or test.

        Raises:
            UsageError: No data is known, or it is of another kind.
            DataError: It can't be used, or has none of the model's classes.
        """
        found: dict[str, Any] = import_module(USE).evaluate_on(self, data, split)
        return found

    def export(self, folder: str | Path, **settings: Unpack[ExportSettings]) -> Path:
        """Export the model to ONNX; see ``smallfry.export``."""
        exported: Path = import_module("smallfry").export(self, folder, **settings)
        return exported

    @property
    def has_run(self) -> bool:
        """True if the model came from a run folder, not from a shared one or an export."""
        return self.origin is not None and RunFolder(self.origin).config.is_file()

    def require_savable(self, run: str | Path) -> str:
        """Require that ``save`` can write here, and return its ``config.yaml``; raises as it."""
        RunFolder(Path(run).expanduser()).require_free()
        if self.origin is None or not self.has_run:
            raise UsageError(
                "this model has no run folder: write it as a shared folder with "
                "deploy.pretrained.save_pretrained"
            )
        return RunFolder(self.origin).config.read_text()

    def save(self, run: str | Path) -> Path:
        """Write a run folder, usable by every command.

        Args:
            run: A new or empty folder.

        Raises:
            RunError: The folder is taken or can't be written.
            UsageError: The model came from no run, so that its data is not known.
        """
        config = self.require_savable(run)
        folder = RunFolder(Path(run).expanduser())
        with folder.locked():
            write_file(folder.config, config)
            head = {k: v for k, v in self.manifest.items() if k not in ("format", "smallfry")}
            save_checkpoint(folder.best, head, self.model.state_dict(), packing=self.packing)
        return folder.path


def load_run(run: str | Path, checkpoint: str = "best") -> TrainedModel:
    """Load the model of a run, in evaluation mode on the CPU.

    Args:
        run: A run folder, or a checkpoint folder in it.
        checkpoint: ``best`` or ``last``; ignored if ``run`` is a checkpoint itself.

    Raises:
        RunError: Missing, incomplete, damaged, or written by another version.
    """
    path = path_of(str(run))
    if (path / "manifest.json").is_file():
        folder = path
    else:
        RunFolder(path).require()
        folder = path / checkpoint
    manifest, weights, _ = load_checkpoint(folder)
    try:
        sample, classes = manifest["input"], manifest["classes"]
        frame = _checked_input(sample, classes)
        if not isinstance(manifest.get("methods", []), list):
            raise TypeError("methods must be a list")
        # the weights are here already, wherever the training took them from
        spec = ModelSpec.from_dict(manifest["model"], str(folder)).portable()
        task = create_task(manifest.get("task", "classification"))  # whose kit may have the model
        model = _built(spec, weights, str(folder), manifest.get(UNFINISHED))
        outputs = task.outputs(len(classes))
        if getattr(model, "num_classes", outputs) != outputs:
            raise ValueError(f"there are {len(classes)} names of classes")
        normalize = Normalize(sample["mean"], sample["std"])
    except KeyError as error:
        raise RunError(f"{folder}: its manifest lacks {error}") from error
    except (TypeError, ValueError, AttributeError, UsageError) as error:
        raise RunError(
            f"{folder}: its manifest is damaged ({(str(error) or repr(error)).splitlines()[0]})"
        ) from error
    return TrainedModel(
        *(model, tuple(classes), frame.size, sample["channels"], normalize, manifest),
        sample.get("bit_depth"),
        (path if (path / RUN_CONFIG).is_file() else path.parent).absolute(),
        resize=frame.resize,
    )


def _built(
    spec: ModelSpec, weights: Mapping[str, Tensor], where: str, unfinished: Any
) -> nn.Module:
    """Build a model, whose active methods may have other layers than its spec."""
    try:
        return build(spec, weights, where=where)
    except RunError as error:
        if not unfinished:
            raise
        raise RunError(
            f"{where}: the model can't be loaded before the run's methods have finished: go on "
            "with --resume"
        ) from error


def _checked_input(sample: Mapping[str, Any], classes: Any) -> Frame:
    """Validate a manifest's description of images and classes; return the size of the images."""
    frame, channels = frame_of(sample["size"], sample.get("resize")), sample["channels"]
    if type(channels) is not int or not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(f"images of {channels} channels are not supported")
    if sample.get("values", PIXELS) not in VALUES:
        raise ValueError(f"values are one of {', '.join(VALUES)}")
    for name in ("mean", "std"):
        values = sample[name]
        if len(values) != channels or not all(map(math.isfinite, values)):
            raise ValueError(f"{name} needs {channels} numbers")
    if min(sample["std"]) <= 0:
        raise ValueError("std must be positive")
    if not is_bit_depth(sample.get("bit_depth")):
        raise ValueError(f"bit_depth is 1 to {FULL_DEPTH}, or null")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise TypeError("classes must be a list of names")
    return frame


def require_classes(trained: TrainedModel, classes: Sequence[str], origin: str) -> None:
    """Require a data set with a model's classes, in the same order."""
    if tuple(classes) == trained.classes:
        return
    ours, theirs = ", ".join(trained.classes[:4]), ", ".join(classes[:4])
    raise DataError(
        f"the model has {len(trained.classes)} classes ({ours}, …), {origin} has "
        f"{len(classes)} ({theirs}, …); give data with its own classes"
    )


def require_classifier(trained: TrainedModel) -> None:
    """Require a classifier, where nothing else is supported yet.

    Raises:
        UsageError: It was trained for another task.
    """
    task = trained.manifest.get("task", "classification")
    if task == MULTILABEL:
        raise UsageError(
            "the model was trained for multilabel: its features can't be analysed yet, as the "
            "questions are about one class per image; all other commands take it"
        )
    require_class_answers(trained)


def require_class_answers(trained: TrainedModel) -> None:
    """Require a model whose answers are classes, one or several an image.

    Raises:
        UsageError: It was trained for another task.
    """
    task = trained.manifest.get("task", CLASSIFICATION)
    if not trained.is_classifier:
        raise UsageError(
            f"the model was trained for {task}, and its answers are not classes: "
            "TrainedModel.decode has them, and smallfry predict prints them"
        )


def thresholds_of(trained: TrainedModel) -> tuple[float, ...] | None:
    """Return the threshold of each class of a model of several classes per image; None of others.

    0.5 where they were not calibrated.
    """
    if trained.manifest.get("task", "classification") != MULTILABEL:
        return None
    return tuple(trained.manifest.get("thresholds", ())) or (0.5,) * len(trained.classes)
