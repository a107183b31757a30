"""Training run: from a configuration to a folder with model, metrics and plots."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import timm
import torch
from torch import nn

from smallfry.costing import cost
from smallfry.data import ImageData
from smallfry.data.named import full_name
from smallfry.data.own import is_own, place_of
from smallfry.errors import (
    RunError,
    UsageError,
    nearest,
)
from smallfry.io.signals import keeping
from smallfry.io.terminal import command
from smallfry.tasks import create_task
from smallfry.training.adversarial import adversarial
from smallfry.training.augment import Normalize
from smallfry.training.augment_grids import build_augment
from smallfry.training.balance import class_weights
from smallfry.training.batch_norm import require_enough_images
from smallfry.training.batches import CHARACTERS
from smallfry.training.build_objective import build_objective
from smallfry.training.checkpoint import Checkpoint, has_checkpoint, load_checkpoint
from smallfry.training.conclusion import STOPPED_BY, conclude
from smallfry.training.config import (
    DataConfig,
    TrainConfig,
    TrainSettings,
    read_config,
)
from smallfry.training.continuation import dotted, require_changeable, with_changes
from smallfry.training.default_settings import (
    describe_batch,
    describe_defaults,
    with_defaults,
    with_normed_rate,
)
from smallfry.training.distillation import distilled, require_same_teacher
from smallfry.training.evaluation_data import require_place, require_same_data
from smallfry.training.fine_tuning import like_start, load_start
from smallfry.training.first_manifest import describe_model
from smallfry.training.fitted import fit_once, fits_itself
from smallfry.training.initial_weights import find_weights, like_weights
from smallfry.training.launch_env import launch
from smallfry.training.loggers import build_observers
from smallfry.training.loop import Trainer
from smallfry.training.method import find_methods
from smallfry.training.model_source import ModelSource, initialize, is_pretrained, model_name
from smallfry.training.own_code import OwnCode, take_objects
from smallfry.training.own_task import with_own
from smallfry.training.processes import Processes, leaving, start
from smallfry.training.progress import Reporter, build_reporter
from smallfry.training.provenance import provenance
from smallfry.training.recipes import with_recipe
from smallfry.training.run import RunFolder, new_run_folder
from smallfry.training.selection import require_choice
from smallfry.training.self_tuning import FILE as TUNING
from smallfry.training.self_tuning import self_tuned
from smallfry.training.trained_run import TrainedRun
from smallfry.training.training_data import load_training_data, warn_of_data
from smallfry_runtime.names import path_of

log = logging.getLogger(__name__)

STUDIED = 4096  # training images that a model is initialised from
SMALL_MODEL = 10_000_000  # multiply-accumulates an image


def train(
    config: TrainConfig, reporter: Reporter | None = None, code: OwnCode | None = None
) -> dict[str, Any]:
    """Train a model from the beginning.

    Args:
        config: Its configuration.
        reporter: Receiver of progress; default that of the configuration.
        code: Code that the configuration may name.

    Returns:
        The summary that is also in ``summary.json`` of the run folder.

    Raises:
        UsageError: An unknown name or an impossible setting.
        DataError: The data can't be used.
        RunError: The run folder is taken or can't be written.
        TrainingError: The loss or an answer is not a number any more, or another process has ended.
        Stopped: A signal came; the state is saved, ``resume`` goes on.
    """
    asked = config.schedule.warmup_epochs
    config = replace(config, methods=list(find_methods(config.methods)))
    config = with_full_paths(config)
    if fits_itself(config):
        return fit_once(config, reporter)
    processes = start(config.device, config.precision, config.strategy)
    with leaving(processes):
        return _train(config, asked, reporter, processes, code or OwnCode())


def run(
    config: TrainConfig | None = None, /, code: Any = None, **settings: Unpack[TrainSettings]
) -> TrainedRun:
    """Train with a configuration, or with its settings.

    Args:
        config: Configuration; if None, ``settings`` are its arguments.
        code: Files or modules with code of the user that the configuration names, or an OwnCode.
        settings: Those that are not given are the recipe's of a task that has one, else defaults.
            Groups can be mappings, such as ``data={"name": "digits"}``. Data can
            be images and labels, or a Dataset: ``smallfry.data.own.write_data``. Callbacks, metrics
            and ``objective["loss"]`` can be functions and objects.

    Returns:
        The summary, as ``train``, whose errors it raises, with the model.

    Example:
        >>> import smallfry
        >>> smallfry.train(epochs=1, model={"name": "vitrm_micro_patch4_8"})  # doctest: +SKIP
    """
    if config is not None and settings:
        raise UsageError("train takes a TrainConfig, or settings by their names, not both")
    known = TrainSettings.__annotations__
    for name in settings:
        if name not in known:
            groups = [each for each in dotted(TrainConfig().to_dict()) if each.endswith(f".{name}")]
            inside = [f"{each.partition('.')[0]}={{'{name}': …}}" for each in groups]
            hint = f"; did you mean {' or '.join(inside)}?" if inside else nearest(name, known)
            raise UsageError(f"train has no setting '{name}'{hint}")
    data: Any = settings.get("data", {})
    if is_own(data) or not isinstance(data, DataConfig | Mapping):
        settings["data"] = place_of(data)
    plain, own = take_objects(with_recipe(settings), code)
    return TrainedRun(train(config or TrainConfig(**plain), code=own))


def _train(
    config: TrainConfig,
    asked_warmup: float | None,
    reporter: Reporter | None,
    processes: Processes,
    code: OwnCode,
) -> dict[str, Any]:
    trainer, notes = build_new(config, reporter, processes, code)
    config, data, folder = trainer.config, trainer.data, trainer.folder
    model = trainer.manifest["model"]["name"]
    with processes.held(folder.locked()), keeping(folder.kept):
        processes.once(lambda: folder.begin(config.to_dict()))
        parameters = sum(p.numel() for p in trainer.raw_model.parameters())
        trainer.reporter.say(
            f"training {model} ({parameters:,} parameters) on {data.name} into {folder.path}"
        )
        for note in notes:
            trainer.reporter.say(note)
        warmup = config.schedule.warmup_epochs
        if asked_warmup not in (None, warmup) and processes.is_first:
            log.info(
                "warm-up shortened from %g to %g epochs, as the run has %d",
                *(asked_warmup, warmup, config.epochs),
            )
        evidence = provenance(trainer.fabric.device)  # of the code that runs, as it starts
        trainer.fit()
        return processes.once(lambda: conclude(trainer, evidence))


def build_new(
    config: TrainConfig, reporter: Reporter | None, processes: Processes, code: OwnCode
) -> tuple[Trainer, list[str]]:
    """Build the trainer of a new run, and notes on its settings; no file is written yet."""
    if config.run is not None:  # before the data is read
        processes.once(RunFolder(config.run).require_free)
    weights = processes.together(lambda: find_weights(config.model))
    config = config if weights is None else like_weights(config, weights)
    begun = processes.together(lambda: load_start(config.model))
    config = config if begun is None else like_start(config, begun)
    source = ModelSource(begun, weights)
    data = processes.together(lambda: load_training_data(config))
    processes.once(lambda: warn_of_data(data, config))
    given, sizes = config, (len(data.train), data.image_size, processes.count)
    config = with_defaults(config, *sizes)
    task = create_task(config.task, config.objective.label_smoothing)
    name = model_name(config.model, data, task) if begun is None else begun.spec.architecture
    with _folder(config, name, processes) as path:
        trainer = _build(config, data, RunFolder(path), reporter, processes, source, code)
    notes = (
        source.note(config.model, task.outputs(len(data.classes))),
        describe_defaults(given, trainer.config, len(data.train)),
        describe_batch(given, len(data.train)),
    )
    return trainer, [note for note in notes if note]


@contextmanager
def _folder(config: TrainConfig, model: str, processes: Processes) -> Iterator[Path]:
    """Create the folder of a new run; it is removed if the run can't begin."""
    path = config.run or processes.once(lambda: new_run_folder(config.data.name, model))
    try:
        yield path
    except BaseException:
        if config.run is None and processes.is_first:
            with suppress(OSError):
                path.rmdir()
        raise


def resume(
    run: str | Path,
    reporter: Reporter | None = None,
    changes: Mapping[str, Any] | None = None,
    code: OwnCode | None = None,
) -> dict[str, Any]:
    """Resume a stopped run exactly.

    A run that has ended gives its summary, unless ``changes`` has more epochs or another patience.

    Args:
        run: The run folder.
        reporter: Receiver of progress; default that of the run's configuration.
        changes: New values of settings by dotted name, such as {"epochs": 100}; those of
            ``continuation.CHANGEABLE``. They are written into ``config.yaml``.
        code: Code that the configuration may name; none is imported because it does.

    Raises:
        UsageError: A setting that can't change any more; otherwise as ``train``.
    """
    changes = changes or {}
    require_changeable(changes)
    folder = RunFolder(path_of(str(run)))
    folder.require()
    recorded = read_config(folder.config)
    find_methods(recorded.methods)
    config = with_full_paths(with_changes(recorded, changes))
    processes = start(config.device, config.precision, config.strategy)
    with leaving(processes):
        return _resume(config, recorded, folder, reporter, processes, code or OwnCode())


def _resume(
    config: TrainConfig,
    recorded: TrainConfig,
    folder: RunFolder,
    reporter: Reporter | None,
    processes: Processes,
    code: OwnCode,
) -> dict[str, Any]:
    processes.last = folder.last
    if config.data.name != recorded.data.name and config.augment.flip is None:
        flip = recorded.data.name not in CHARACTERS  # as so far, whatever the place is called
        config = replace(config, augment=replace(config.augment, flip=flip))
    with processes.held(folder.locked()), keeping(folder.kept):
        summary = processes.once(folder.read_summary)
        if summary is not None and not _is_longer(config, recorded, summary):
            return summary
        again = command("smallfry", "train", "--resume", folder.path)
        moved = f"if it was moved: {again} --data FOLDER"
        processes.together(lambda: require_place(config.data, moved))
        if processes.once(lambda: has_checkpoint(folder.last)):
            checkpoint = processes.together(lambda: load_checkpoint(folder.last))
            data = processes.together(lambda: load_training_data(config))
            source = ModelSource(manifest=checkpoint.manifest)
            trainer = _build(config, data, folder, reporter, processes, source, code)
            require_same_data(checkpoint.manifest, trainer.data, folder)
            require_same_teacher(checkpoint.manifest, trainer.manifest, str(folder.path))
            _restore(trainer, checkpoint)
        else:
            begun = processes.together(lambda: load_start(config.model))
            weights = processes.together(lambda: find_weights(config.model))
            data = processes.together(lambda: load_training_data(config))
            source = ModelSource(begun, weights)
            trainer = _build(config, data, folder, reporter, processes, source, code)
        if trainer.config != recorded:
            processes.once(lambda: folder.reopen(trainer.config.to_dict()))
        trainer.reporter.say(f"resuming {folder.path} after step {trainer.progress.step}")
        evidence = provenance(trainer.fabric.device)  # of the code that runs, as it starts
        trainer.fit()
        return processes.once(lambda: conclude(trainer, evidence))


def _is_longer(config: TrainConfig, recorded: TrainConfig, summary: Mapping[str, Any]) -> bool:
    """Return whether a finished run has epochs left under its current configuration.

    Raises:
        UsageError: It has done more epochs than that.
    """
    done = summary["measured"]["epochs"]
    if config.epochs < done:
        raise UsageError(
            f"the run has done {done} epochs: expected as many at least, not {config.epochs}"
        )
    ended = recorded.patience is not None and config.patience == recorded.patience
    ended = ended or STOPPED_BY in summary["measured"]
    return config.epochs > done and not (ended and config.epochs == recorded.epochs)


def _restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    try:
        trainer.restore(checkpoint)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(
            f"{trainer.folder.last}: its state does not fit the run's config.yaml ({reason}); "
            "restore the original file, or start a new run"
        ) from error


def with_full_paths(config: TrainConfig) -> TrainConfig:
    """Make paths absolute, so that the run can be resumed and evaluated from any folder.

    An empty name stays one, though pathlib takes it for the current folder.
    """
    wanted = config.data
    root = None if wanted.root is None else path_of(str(wanted.root)).resolve()
    run = None if config.run is None else config.run.expanduser()
    start = config.model.start
    if start and isinstance(start, str) and path_of(start).exists():
        start = str(path_of(start).resolve())
    model, data = (
        replace(config.model, start=start),
        replace(wanted, name=full_name(wanted.name), root=root),
    )
    teacher = config.distillation.teacher
    if teacher and path_of(teacher).is_dir():
        teacher = str(path_of(teacher).resolve())
    distillation = replace(config.distillation, teacher=teacher)
    return replace(config, data=data, model=model, run=run, distillation=distillation)


def _build(
    config: TrainConfig,
    data: ImageData,
    folder: RunFolder,
    reporter: Reporter | None,
    processes: Processes,
    source: ModelSource,
    code: OwnCode,
) -> Trainer:
    """Build everything that a configuration can get wrong, before writing any file."""
    torch.manual_seed(config.seed)
    plain = create_task(config.task, config.objective.label_smoothing)
    task = with_own(plain, config, code)
    callbacks = build_observers(config, code)
    require_choice(task, config.select_by)
    weights = class_weights(config.balance, data, task, config.optimizer.name)
    model, spec = processes.together(lambda: source.make(config.model, data, task))
    if config.augment.sizes and timm.get_pretrained_cfg(spec.architecture).fixed_input_size:
        raise UsageError(f"{spec.architecture} takes images of one size: leave out augment.sizes")
    mean, std = config.data.mean or data.mean, config.data.std or data.std
    require_enough_images(
        model,
        torch.zeros(1, *data.input_shape),
        min(config.images_per_step, len(data.train)),
        config.accumulate,
        processes.count,
        config.sync_batch_norm,
    )
    if source.is_new and not is_pretrained(config.model):
        some = data.train.take(torch.arange(min(STUDIED, len(data.train))))
        initialize(
            model, config.model, lambda: Normalize(mean, std)(some.images), data.train.labels
        )
    torch.set_num_threads(config.threads or _useful_threads(model, data))
    manifest = describe_model(config, spec, data, (mean, std), source.facts(config.model))
    augment = build_augment(config, data, task)
    resumed = has_checkpoint(folder.last)
    config = config if resumed else with_normed_rate(config, model)
    objective = build_objective(config.objective, model, task, config.accumulate, resumed, weights)
    objective, teacher = processes.together(
        lambda: distilled(config.distillation, objective, data, augment.normalize, config.precision)
    )
    objective = adversarial(config.adversarial, objective, augment.normalize)
    objective = self_tuned(config, objective, data, augment.normalize, folder.path / TUNING)
    manifest |= teacher
    reporter = reporter or build_reporter(config.progress)
    where = folder, manifest, reporter, processes, callbacks
    trainer = Trainer(model, data, objective, augment, config, *where)
    if not resumed:
        processes.once(trainer.plan.rehearse)
    return trainer


def _useful_threads(model: nn.Module, data: ImageData) -> int:
    """Limit the threads of a small model; more gain little and stall on shared cores."""
    sample = torch.zeros(1, *data.input_shape)
    shared = max(1, torch.get_num_threads() // launch().here)
    return 1 if cost(model, sample).macs < SMALL_MODEL else shared
