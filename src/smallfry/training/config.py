"""Configuration of a training run: typed, frozen data, available as options and YAML."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from jsonargparse import ArgumentParser

from smallfry.errors import RunError
from smallfry.io.safe_yaml import MOST_CONFIG, YAML_MODE, load_yaml
from smallfry.settings import check, check_values
from smallfry.training.adversarial_config import AdversarialConfig
from smallfry.training.augment_config import AugmentConfig as AugmentConfig
from smallfry.training.balance_config import BalanceConfig as BalanceConfig
from smallfry.training.distillation_config import DistillationConfig
from smallfry.training.hyper_parameters import find_hypers
from smallfry.training.objective_config import ObjectiveConfig as ObjectiveConfig
from smallfry.training.objective_config import taken_settings
from smallfry.training.own_code import require_path
from smallfry.training.schedule_config import EMAConfig as EMAConfig
from smallfry.training.schedule_config import ScheduleConfig as ScheduleConfig
from smallfry_runtime.files import read_bytes
from smallfry_runtime.frames import frame_of
from smallfry_runtime.names import URI, path_of, storable

CLASSIFICATION = "classification"
MULTILABEL = "multilabel"  # the task whose images have several classes
BATCH = 64  # images of a step, in runs that see enough of them
MOST_SEED = 2**63  # above which PyTorch takes none
MOST_WORKERS = 1024  # processes, or threads; more end a process without a word


@dataclass(frozen=True)
class DataConfig:
    """Data set; see ``smallfry.data.load_data``.

    Args:
        name: A data set (digits, cifar10, cifar100, mnist, fashion_mnist; puzzles: sudoku4,
            sudoku6, sudoku9, maze9 to maze30) or a folder with parquet shards, WebDataset tar
            files or one folder per class.
        root: Folder of a named data set; without one, the local cache and then the hub are asked.
        image_size: Side of the images in pixels, or height and width; default the native size up
            to 64, else 32.
        resize: How pictures of another shape become such images: crop at their centre, letterbox
            with black borders, or squash; default crop, or that of model.start.
        channels: 1 (grey) or 3 (RGB); default 1 if all images are grey.
        validation: Share of the training images held out if the source has no validation split.
        test: Share of the training images held out if the source has no test split.
        split_seed: Seed of both held-out shares, apart from the run's seed.
        limit: Use only so many training images, stratified by class.
        label: Name of the label column, where a table has several.
        labels: CSV or JSON-lines file of a folder's labels, relative to the folder, with a row for
            each image.
        image_column: Its column of image files; default one with a usual name, such as image.
            Without data.labels, the column of images in parquet shards; default the only one.
        split_column: Its column of splits; default split, where it has one.
        skip_unreadable: Leave unreadable images out with a warning instead of stopping.
        mean: Mean per channel that the images are normalised with; default that of training.
        std: Standard deviation per channel; default that of training.
        stream: Read training images from parquet or tar shards when they are needed, instead of
            decoding all of them into the cache folder; default if that could take over 16 GiB.
        window: Streamed images are shuffled among so many; a process holds as many of them.
        remove_duplicates: Leave out training images that have several labels or are in another
            split too.
        bit_depth: Bits of the values in images of more than 8 bits per channel, such as 12; default
            what the values of all images need, with a warning where that is a guess.
        several_labels: Images may have several classes, from the file of labels or from class
            folders that share images; the default of the task multilabel.
        label_columns: Columns of 0 and 1 in the file of labels, one for each class.
        label_separator: Between classes in the label column; default the one of | ; , in use.
        options: Settings of a generated data set, such as {puzzles: 1000, seed: 0, split: class},
            or of a kit's.
    """

    name: str = "digits"
    root: Path | None = None
    image_size: int | list[int] | None = None
    resize: Literal["crop", "letterbox", "squash"] | None = None
    channels: int | None = None
    validation: float = 0.1
    test: float = 0.2
    split_seed: int = 0
    limit: int | None = None
    label: str | None = None
    labels: Path | None = None
    image_column: str | None = None
    split_column: str | None = None
    skip_unreadable: bool = False
    mean: list[float] | None = None
    std: list[float] | None = None
    stream: bool | None = None
    window: int = 16_384
    remove_duplicates: bool = False
    bit_depth: int | None = None
    several_labels: bool = False
    label_columns: list[str] = field(default_factory=list)
    label_separator: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_values(self, "data.")
        if self.image_size is not None:  # two equal sides are one
            frame = frame_of(self.image_size, option="data.image_size")
            object.__setattr__(self, "image_size", frame.plain)
        lone = self.split_column is not None and self.labels is None
        check(not lone, "data.split_column is of the file data.labels, which is not given")
        check((self.mean is None) == (self.std is None), "data.mean and data.std go together")
        check(all(s > 0 for s in self.std or ()), "data.std must be positive")
        check(0 <= self.split_seed < MOST_SEED, "data.split_seed is 0 to below 2**63")
        numbers = (*(self.mean or ()), *(self.std or ()))
        check(all(map(math.isfinite, numbers)), "data.mean and data.std must be finite numbers")


@dataclass(frozen=True)
class ModelConfig:
    """Model, by its name in timm's registry.

    Args:
        name: A registered model; auto takes the ViTRM that fits the size of the images.
        start: A trained model to start from: a run folder, a checkpoint in one, a shared folder or
            hf_hub:USER/NAME. Its architecture, transforms and weights are taken, and images are
            prepared as it takes them; another number of classes has a new classifier. Or weights
            of the named model: a file NAME.safetensors, or true for timm's.
        init: Initial weights of a new model: its own, or critical ones, by which signals and
            gradients neither grow nor shrink with depth.
        freeze: Parts that are not trained: backbone is all but the classifier; otherwise shell
            patterns of parameters' names, such as [stem.*, stages.0.*].
        freeze_epochs: Epochs until they are trained too; null never trains them.
        latent_steps: Rewritings of the latent memory in one recursion step (n; ViTRM).
        recursion_steps: Recursion steps at inference (T; ViTRM).
        latents: Latent tokens; default one per patch (ViTRM).
        drop_rate: Dropout; default the model's own.
        options: Any other argument of the model, such as {embed_dim: 96}.
        checkpoint_gradients: Recompute blocks in the backward pass to save memory.
    """

    name: str = "auto"
    start: str | bool | None = None
    init: Literal["default", "critical"] = "default"
    freeze: list[str] = field(default_factory=list)
    freeze_epochs: float | None = None
    latent_steps: int | None = None
    recursion_steps: int | None = None
    latents: int | None = None
    drop_rate: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint_gradients: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.start, bool):
            object.__setattr__(self, "start", "true" if self.start else None)
        if isinstance(self.freeze, str):
            object.__setattr__(self, "freeze", [self.freeze])
        check_values(self, "model.")
        check(
            self.init == "default" or self.start is None,
            "model.init critical and model.start both give initial weights; leave one out",
        )
        check((self.freeze_epochs or 0) >= 0, "model.freeze_epochs can't be negative")
        check(
            self.freeze_epochs is None or bool(self.freeze),
            "model.freeze_epochs needs model.freeze, such as model.freeze backbone",
        )

    def arguments(self) -> dict[str, Any]:
        """Return the model's keyword arguments, besides classes and image size."""
        named = {
            "latent_steps": self.latent_steps,
            "recursion_steps": self.recursion_steps,
            "latents": self.latents,
            "drop_rate": self.drop_rate,
        }
        return {key: value for key, value in named.items() if value is not None} | self.options


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and its settings.

    Args:
        name: kfac, ekfac, kpsvd, deflation, lanczos, kfac_corrected, two_level, sngd or exact_ng;
            adam_atan2; or an optimizer of timm's registry, such as adamw, sgd, lamb or muon.
        lr: Peak learning rate; default 0.192 divided by the model's width, which is 3e-3 at 64
            and 5e-4 at 384; 2e-3 for Adam and AdamW on a model with batch norms; 0.1 for natural
            gradient; and 0.02 for SGD.
        weight_decay: Decoupled weight decay.
        decay: weights leaves biases, norms, positions and initial states undecayed; all is the
            paper's choice.
        bias_rate: Factor of the learning rate of biases and of the shifts of norms.
        head_rate: Factor of the learning rate of the classifier.
        layer_decay: Factor of the learning rate from each of timm's groups of layers to the one
            before it, towards the input; 1 gives all the same rate.
        betas: Averaging factors, for optimizers of Adam's family.
        clip: Largest gradient norm; null does not clip.
        options: Any other argument of the optimizer, such as {damping: 0.1, statistics_every: 5}.
    """

    name: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.05
    decay: Literal["weights", "all"] = "weights"
    bias_rate: float = 1.0
    head_rate: float = 1.0
    layer_decay: float = 1.0
    betas: tuple[float, float] | None = None
    clip: float | None = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_values(self, "optimizer.")
        check(self.lr is None or self.lr > 0, f"optimizer.lr must be positive, got {self.lr}")
        check(self.weight_decay >= 0, "optimizer.weight_decay can't be negative")
        for name in ("bias_rate", "head_rate", "layer_decay"):
            value = getattr(self, name)
            check(value > 0, f"optimizer.{name} must be positive, got {value}")
        check(self.clip is None or self.clip > 0, "optimizer.clip must be positive, or null")


class TrainSettings(TypedDict, total=False):
    """Keywords of ``smallfry.train``, as ``TrainConfig``; a group may be a mapping, or a name."""

    data: Any  # DataConfig, its settings, a name, or objects; see data.own.write_data
    model: "ModelConfig | Mapping[str, Any] | str"
    augment: "AugmentConfig | Mapping[str, Any]"
    balance: "BalanceConfig | Mapping[str, Any]"
    task: str
    objective: "ObjectiveConfig | Mapping[str, Any] | str"
    distillation: "DistillationConfig | Mapping[str, Any]"
    adversarial: "AdversarialConfig | Mapping[str, Any]"
    optimizer: "OptimizerConfig | Mapping[str, Any] | str"
    schedule: "ScheduleConfig | Mapping[str, Any]"
    ema: "EMAConfig | Mapping[str, Any]"
    methods: "Sequence[Any]"
    self_tune: "Sequence[Any]"
    callbacks: "Sequence[Any]"
    metrics: "Sequence[Any]"
    loggers: "Sequence[str]"
    epochs: int
    batch_size: int | None
    accumulate: int
    patience: int | None
    select_on: Literal["validation", "test"]
    select_by: str | None
    seed: int
    device: str
    precision: str
    strategy: Literal["auto", "ddp", "fsdp"]
    sync_batch_norm: bool
    compile: bool
    channels_last: bool
    test_flips: bool
    resident: bool | None
    workers: int | None
    threads: int | None
    checkpoint_seconds: float
    references: bool
    run: str | Path | None
    progress: Literal["auto", "rich", "plain", "quiet"]
    reported: "Mapping[str, Any]"


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run.

    Groups of settings may be given as mappings, and those with a name by it: ``data="digits"``.

    Example:
        >>> from smallfry import compress
        >>> config = TrainConfig(methods=[compress.RoundWeights(bits=6)], model={"start": "runs/a"})
        >>> config.methods
        [{'round_weights': {'bits': 6, 'include': ('*',), 'exclude': ()}}]

    Args:
        data: The data set.
        model: The model.
        augment: Augmentation of the training images.
        balance: Treatment of classes with different numbers of images.
        task: Meaning of the model's outputs, by the name of a registered task.
        objective: The loss.
        distillation: A teacher's part in the loss.
        adversarial: Attack on the training images.
        optimizer: The optimizer.
        schedule: Schedule of the learning rate.
        ema: Averaging of the weights.
        methods: Compression of the model while it trains and at its end, in the order of stages:
            each a name or NAME: {SETTING: VALUE}, such as [{round_weights: {bits: 8}}].
        self_tune: Hyper-parameters that follow the validation loss while the model trains, each a
            name or NAME: START: dropout, augment (turns, shifts and zooms), noise, weight_decay,
            label_smoothing.
        callbacks: Your own callbacks, each MODULE:NAME of code given with --code.
        metrics: Your own metrics, likewise.
        loggers: Experiment trackers besides metrics.csv and TensorBoard, through Lightning's
            loggers: mlflow and wandb, whose own environment variables set where they write.
        epochs: Passes over the training images.
        batch_size: Images per step; default 64, and 32 or 16 where a model with random weights
            would take fewer than 1,000 steps in the whole run.
        accumulate: Micro-batches of a batch; memory falls, the step stays the same.
        patience: Stop after so many epochs without a better selection; null never does.
        select_on: The split that chooses the best epoch. test is the paper's protocol, and
            flatters; the summary names the one that was used.
        select_by: The score that chooses it: accuracy, balanced_accuracy, macro_f1, loss or
            calibration_error; default the task's own rank, accuracy and then loss.
        seed: Seed of the initialisation, the order and the augmentation.
        device: auto, cpu, cuda or mps, or one of several GPUs, such as cuda:1.
        precision: Lightning Fabric's precision, such as 32-true, bf16-mixed or 16-mixed.
        strategy: Of several processes, which torchrun or SLURM starts: ddp has the whole model in
            each, fsdp a share of it; auto is ddp.
        sync_batch_norm: Take batch norms' statistics over all processes, on GPUs; each its own
            part of the batch otherwise.
        compile: Compile the training step with torch.compile; on a CPU that needs a C++ compiler.
        channels_last: Keep images and convolutions with the channels last in memory, which is
            faster for convolutional networks on most devices.
        test_flips: Test the model a second time, on the mean of the logits of each image and its
            mirror image; the summary names those scores test_flips.
        resident: Keep the training images on the device; default if they take at most a quarter
            of its free memory. On a CPU there is nothing to move.
        workers: Processes that prepare batches; default as many as help. Fewer are started where
            shared memory is short.
        threads: CPU threads of PyTorch; default its own choice, but one for models below
            10 MMAC an image, which hardly gain from more.
        checkpoint_seconds: Save at the first step after so many seconds.
        references: Fit a support vector machine and logistic regression on the same images as
            reference points, where these are few and small.
        run: The run folder; default a new one under runs/.
        progress: rich, plain or quiet; auto takes quiet under CI, rich in a terminal, else plain.
        reported: Published figures for this recipe with their source, such as {accuracy: 95.43,
            source: arXiv 1608.06037}. They are kept apart from what is measured, and used nowhere.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    task: str = CLASSIFICATION
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    methods: list[Any] = field(default_factory=list)
    self_tune: list[Any] = field(default_factory=list)
    callbacks: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    loggers: list[Literal["mlflow", "wandb"]] = field(default_factory=list)
    epochs: int = 50
    batch_size: int | None = None
    accumulate: int = 1
    patience: int | None = None
    select_on: Literal["validation", "test"] = "validation"
    select_by: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "32-true"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    sync_batch_norm: bool = False
    compile: bool = False
    channels_last: bool = False
    test_flips: bool = False
    resident: bool | None = None
    workers: int | None = None
    threads: int | None = None
    checkpoint_seconds: float = 60.0
    references: bool = True
    run: Path | None = None
    progress: Literal["auto", "rich", "plain", "quiet"] = "auto"
    reported: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_values(self, "")
        if self.task == MULTILABEL and not self.data.several_labels:
            object.__setattr__(self, "data", replace(self.data, several_labels=True))
        check(
            self.task == MULTILABEL or not self.data.several_labels,
            f"data.several_labels is of the task multilabel, not {self.task}: take task multilabel",
        )
        object.__setattr__(self, "methods", [_as_entry(each) for each in self.methods])
        find_hypers(self.self_tune)
        for name in ("callbacks", "metrics"):
            for path in getattr(self, name):
                require_path(path, name)
        for name in ("epochs", "images_per_step", "accumulate"):
            label = "batch_size" if name == "images_per_step" else name
            value = getattr(self, name)
            check(value >= 1, f"{label} must be at least 1, got {value}")
        check(self.accumulate <= self.images_per_step, "accumulate can't exceed batch_size")
        check(self.patience is None or self.patience >= 1, "patience must be at least 1, or null")
        check(0 <= (self.workers or 0) <= MOST_WORKERS, f"workers is 0 to {MOST_WORKERS}")
        threads = 1 if self.threads is None else self.threads
        check(1 <= threads <= MOST_WORKERS, f"threads is 1 to {MOST_WORKERS}")
        check(0 <= self.seed < MOST_SEED, "seed is 0 to below 2**63")

    @property
    def images_per_step(self) -> int:
        """Return ``batch_size``, or 64 if it is not given."""
        return BATCH if self.batch_size is None else self.batch_size

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for YAML and JSON."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(inner) for key, inner in value.items()}
            if isinstance(value, list | tuple):
                return [plain(inner) for inner in value]
            return storable(str(value)) if isinstance(value, Path | str) else value

        values = asdict(self) | {"objective": self.objective.to_dict()}
        return {key: plain(value) for key, value in values.items()}


def read_config(file: Path) -> TrainConfig:
    """Read a configuration from an untrusted YAML file, without reading other files.

    Raises:
        RunError: Not a configuration of this version.
    """
    try:
        content = load_yaml(read_bytes(file, MOST_CONFIG).decode())
    except Exception as error:  # of the file, its encoding or YAML
        raise _not_of_this_version(file, error) from error
    return config_of(content, file)


def config_of(content: Any, where: str | Path) -> TrainConfig:
    """Build a configuration from untrusted plain values, groups as mappings.

    Args:
        content: Settings by name.
        where: Their origin, for errors.

    Raises:
        RunError: Not a configuration of this version.

    Example:
        >>> config_of({"optimizer": {"lr": 0.1}, "epochs": 3}, "an example").optimizer.lr
        0.1
    """
    parser = ArgumentParser(exit_on_error=False, parser_mode=YAML_MODE)
    parser.add_class_arguments(TrainConfig)
    try:
        groups = [e.name for e in fields(TrainConfig) if is_dataclass(e.default_factory)]
        if not isinstance(content, dict):
            raise ValueError("expected settings by their names")
        for group in {*groups} & {*content}:
            if not isinstance(content[group], dict):  # or jsonargparse takes it for a file's name
                raise ValueError(f"{group}: expected settings by their names")
        if "objective" in content:
            content = content | {"objective": taken_settings(content["objective"])}
        return TrainConfig(**vars(parser.instantiate(parser.parse_object(_with_paths(content)))))
    except Exception as error:  # jsonargparse raises almost anything, given a stranger's file
        raise _not_of_this_version(where, error) from error


def _not_of_this_version(where: str | Path, error: Exception) -> RunError:
    reason = " ".join(str(error).split())
    return RunError(f"{where}: not a configuration of this version ({reason})")


def _with_paths(content: Any) -> Any:
    """Restore paths that ``storable`` encoded."""
    if isinstance(content, dict):
        return {key: _with_paths(value) for key, value in content.items()}
    if isinstance(content, str) and content.startswith(URI):
        return str(path_of(content))
    return content


def _as_entry(method: Any) -> Any:
    """Convert a method or its settings to a configuration entry."""
    if not is_dataclass(method):
        return method
    from smallfry.training.method import to_dict  # which imports PyTorch

    return to_dict(method)  # type: ignore[arg-type]
