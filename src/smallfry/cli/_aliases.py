"""Short names of options, and suggestions for names that other tools have."""

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from typing import NamedTuple


class Alias(NamedTuple):
    """Short name of an option.

    Attributes:
        option: Its full name.
        default: The value if none is given.
        is_list: A single value becomes a list.
    """

    option: str
    default: str
    is_list: bool = False


ALIASES = {
    "pretrained": Alias("model.start", "true"),
    "init": Alias("model.init", "critical"),
    "freeze": Alias("model.freeze", "backbone", is_list=True),
    "show_batch": Alias("show_batch", "batch.png"),
    "find_lr": Alias("find_lr", "learning_rate.png"),
    "freeze_epochs": Alias("model.freeze_epochs", ""),
}
FOLDER = ("run", "to", "folder")  # that a verb writes
ELSEWHERE = {  # names in timm, Lightning, ultralytics and scikit-learn that are not alike
    "learning_rate": ("optimizer.lr",),
    "learning_rate_init": ("optimizer.lr",),
    "lr0": ("optimizer.lr",),
    "wd": ("optimizer.weight_decay",),
    "opt": ("optimizer.name",),
    "clip_grad": ("optimizer.clip",),
    "gradient_clip_val": ("optimizer.clip",),
    "arch": ("model.name",),
    "drop": ("model.drop_rate",),
    "weights": ("model.start",),
    "initial_checkpoint": ("model.start",),
    "ckpt_path": ("resume",),
    "model": ("candidates",),
    "imgsz": ("data.image_size",),
    "input_size": ("data.image_size",),
    "val_split": ("data.validation",),
    "validation_split": ("data.validation",),
    "test_size": ("data.test",),
    "batch": ("batch_size",),
    "grad_accum_steps": ("accumulate",),
    "accumulate_grad_batches": ("accumulate",),
    "max_epochs": ("epochs",),
    "max_iter": ("epochs",),
    "random_state": ("seed",),
    "accelerator": ("device",),
    "gpu": ("device",),
    "gpus": ("device",),
    "amp": ("precision",),
    "half": ("precision",),
    "int8": ("precision",),
    "format": ("target",),
    "smoothing": ("objective.label_smoothing",),
    "aa": ("augment.randaugment_ops",),
    "hflip": ("augment.flip",),
    "fliplr": ("augment.flip",),
    "reprob": ("augment.erasing",),
    **dict.fromkeys(("out", "output", "out_dir", "output_dir", "outdir", "save_dir"), FOLDER),
    **dict.fromkeys(("project", "experiment", "default_root_dir"), FOLDER),
}
PLACES = {  # such names of values that have a place on the command line instead of a name
    "ckpt_path": ("run",),
    "image": ("inputs",),
    "model": ("run", "models"),
    "source": ("inputs",),
    "weights": ("run",),
}
UNNEEDED = dict.fromkeys(
    ("num_classes", "n_classes", "nc"), "; leave it out: the classes are those of the data"
)


def expand_aliases(arguments: Sequence[str], options: Collection[str]) -> list[str]:
    """Replace short names by those of the options.

    Args:
        arguments: A command line behind the verb.
        options: The options there are; an alias of none of them stays as it is.

    Example:
        >>> expand_aliases(["--freeze", "--pretrained", "w.safetensors"], ["model.freeze"])
        ['--model.freeze', '[backbone]', '--pretrained', 'w.safetensors']
    """
    expanded: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        alias = ALIASES.get(name) if argument.startswith("--") else None
        if alias is None or alias.option not in options:
            expanded.append(argument)
            continue
        if not equals:
            value = left.pop(0) if left and not left[0].startswith("--") else alias.default
        if alias.is_list and not value.startswith("["):
            value = f"[{value}]"
        expanded += [f"--{alias.option}", *([value] if value else [])]
    return expanded


def like_named(name: str, options: Iterable[str]) -> str:
    """Return a hint for an option's name that is close to the last part of others; or nothing.

    Example:
        >>> like_named("img-size", ["data.image_size", "data.name"])
        "; did you mean 'data.image_size'?"
    """
    plain = name.replace("-", "_").rpartition(".")[2]
    full: dict[str, list[str]] = {}
    for option in options:
        full.setdefault(option.rpartition(".")[2], []).append(option)
    found = [each for each in ELSEWHERE.get(plain, ()) if each in {*options}][:1]
    found = found or full.get(plain, [])
    if not found:
        found = [o for part in get_close_matches(plain, full, n=1, cutoff=0.75) for o in full[part]]
    return f"; did you mean {' or '.join(map(repr, sorted(found)))}?" if found else ""
