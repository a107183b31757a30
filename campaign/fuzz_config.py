"""Fuzzed configurations: each is accepted, or refused in one sentence.

Most are read as far as a configuration is judged by itself; one in a hundred goes on to the data
and the model, and a part of its own trains with some.
"""

import math
import shutil
import string
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from random import Random
from typing import Any, get_type_hints

import yaml

from campaign.command import command
from campaign.runs import CONFIG, without_pictures
from campaign.trials import RIGHT, TOLD, Part, Verdict, generator
from smallfry.data.named import HUB
from smallfry.training import model_source
from smallfry.training import train as training
from smallfry.training.config import TrainConfig
from smallfry.training.train import with_full_paths
from smallfry.training.training_data import load_training_data

BUILT = 100  # one of so many trials
NUMBERS = (0, 1, -1, 2, 3, 7, 64, 10**6, -(10**6), 2**31, 2**63, 2**64, 10**30, 10**400)
NUMBERS += (0.5, -0.5, 1e-9, 1e300, -1e300, math.nan, math.inf, -math.inf, 0.1, 1.5)
TEXTS = (
    *("", " ", "null", "true", "~", "0x10", "1e5", "1:30", "2001-99-99", "no", "-", "--", "=", "{"),
    *("a\nb", "a\0b", "\x1b[31mred", "\u202eabc", "é" * 50, "\ud83d\ude00", "x" * 5000, "%s%n"),
    *("../../etc/passwd", "/dev/zero", "/dev/stdin", "~", "$HOME", "`id`", "$(id)", "[red]", "a;b"),
    *("hf_hub:a/b", "local-dir:/etc", "os.system", "subprocess.Popen", "!!python/name:os.system"),
    *("{class_path: os.system}", "[[[[", "&a *a", "*a", "<<", "!!binary aaa", "!!set {a, b}"),
)
GOOD = {
    "data.name": ("digits", "curves", "faces", "nowhere", *HUB),
    "model.name": ("auto", "vitrm_micro_patch4_8", "resnet10t", "vit_tiny_patch16_224", "cct_7"),
    "objective.name": ("auto", "deep_supervision", "cross_entropy"),
    "optimizer.name": ("adamw", "sgd", "kfac", "ekfac", "kpsvd", "lamb", "sngd", "two_level"),
    "optimizer.decay": ("weights", "all"),
    "schedule.per": ("step", "epoch"),
    "select_on": ("validation", "test"),
    "device": ("auto", "cpu", "cuda", "mps", "tpu"),
    "precision": ("32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "8-true"),
    "progress": ("auto", "rich", "plain", "quiet"),
}
OPTIONS = (
    "embed_dim",
    "depth",
    "num_heads",
    "damping",
    "img_size",
    "pretrained",
    "statistics_every",
)
OPTIONS += ("checkpoint_path", "pretrained_cfg", "class_path", "lr", "momentum", "drop_path", "x")


def _fields(kind: type, before: str = "") -> dict[str, str]:
    """List the dotted names of all settings with their types as text."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            found |= _fields(hint, f"{before}{name}.")  # type: ignore[arg-type]
        else:
            found[f"{before}{name}"] = str(hint)
    return found


FIELDS = _fields(TrainConfig)
GROUPS = [entry.name for entry in fields(TrainConfig) if entry.default is MISSING]


def prepare(folder: Path) -> Path:
    """Skip preparation: settings are validated without training."""
    return folder


def trial(folder: Path, number: int) -> Verdict:
    """Validate one configuration in a file or on the command line."""
    random = generator("config", number)
    training.train = _build if number % BUILT == 0 else _accept  # type: ignore[assignment]
    kind, words = random.choices(KINDS, WEIGHTS)[0](folder, random)
    said = command("train", *words)
    told = RIGHT if said.code == 0 else TOLD
    failure = said.failure
    if failure is None and said.code not in (0, 1, 2):
        failure = f"exit code {said.code}"
    if failure is None and len(said.err) > 1_200:
        failure = f"the message has {len(said.err)} characters"
    if kind in MUST_BE_REFUSED and said.code == 0:
        failure = "it was taken"
    if failure is not None:
        failure = f"{failure} of {_shown(folder, words)}"
    return Verdict(kind if number % BUILT else f"{kind}, and built", told, failure)


def _shown(folder: Path, words: list[str]) -> str:
    if words[:1] == ["--config"] and Path(words[1]) == folder / "config.yaml":
        return repr((folder / "config.yaml").read_bytes()[:200])
    return repr(words)[:200]


def _accept(config: TrainConfig, *_: object, **__: object) -> dict[str, Any]:
    return dict(SUMMARY)


def _build(config: TrainConfig, *_: object, **__: object) -> dict[str, Any]:
    if config.data.name in HUB or config.data.name == "faces":
        return dict(SUMMARY)  # which would be asked for over the net
    model_source.create_model(config.model, load_training_data(with_full_paths(config)))
    return dict(SUMMARY)


SUMMARY: dict[str, Any] = {
    "run": "run",
    "model": {"name": "x"},
    "data": {"train": 1, "test": 1},
    "measured": {
        **{"test": {"accuracy": 0.0, "macro_f1": 0.0}, "parameters": 1, "macs": 1, "epochs": 1},
        **{"references": [], "best_epoch": 1, "select_on": "test", "training_seconds": 0.0},
    },
}


# Values


def value(name: str, random: Random) -> Any:
    """Draw a value for a setting: valid, of its type, or of any type."""
    kind = FIELDS[name]
    chance = random.random()
    if chance < 0.5 and name in GOOD:
        return random.choice(GOOD[name])
    if chance < 0.7:
        if "dict" in kind:
            return {random.choice(OPTIONS): wild(random, 1) for _ in range(random.randrange(3))}
        if "bool" in kind:
            return random.choice((True, False, None))
        if "list" in kind or "tuple" in kind:
            return [random.choice(NUMBERS) for _ in range(random.randrange(4))]
        if "int" in kind or "float" in kind:
            return random.choice((1, 2, 3, 8, 0.5, 0.1, 32))
    return wild(random)


def wild(random: Random, depth: int = 0) -> Any:
    """Draw any YAML value, or text that is not YAML."""
    chance = random.random()
    if chance < 0.35:
        return random.choice(NUMBERS)
    if chance < 0.7:
        return random.choice(TEXTS)
    if chance < 0.75:
        return "".join(chr(random.randrange(0xD7FF)) for _ in range(random.randrange(20)))
    if chance < 0.8 or depth > 3:
        return random.choice((None, True, False))
    if chance < 0.9:
        return [wild(random, depth + 1) for _ in range(random.randrange(4))]
    names = (*OPTIONS, *TEXTS[:12], "init_args", "dict_kwargs")
    return {random.choice(names): wild(random, depth + 1) for _ in range(random.randrange(4))}


# Kinds of configurations: each gives its name and the command's words


def in_a_file(folder: Path, random: Random) -> tuple[str, list[str]]:
    """Write settings to a YAML file."""
    tree: dict[str, Any] = {}
    for name in random.choices(list(FIELDS), k=random.randrange(1, 6)):
        place = tree
        *groups, last = name.split(".")
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value(name, random)
    if random.random() < 0.1:
        tree[random.choice((*GROUPS, "epochz", "optimizerr", "resume", "config", "debug"))] = wild(
            random
        )
    text = yaml.safe_dump(tree, allow_unicode=random.random() < 0.5)
    return "settings in a file", _file(folder, text)


def on_the_command_line(folder: Path, random: Random) -> tuple[str, list[str]]:
    """Format settings as options."""
    words = []
    for name in random.choices(list(FIELDS), k=random.randrange(1, 4)):
        given = value(name, random)
        text = given if isinstance(given, str) else yaml.safe_dump(given, default_flow_style=True)
        text = text.removesuffix("\n...\n").strip().replace("\0", "")
        words += [f"--{name}={text}"] if random.random() < 0.7 else [f"--{name}", text]
    if random.random() < 0.1:
        words.append("--" + "".join(random.choices(string.ascii_letters + "._-=", k=6)))
    return "settings as options", words


def mutated(folder: Path, random: Random) -> tuple[str, list[str]]:
    """Mutate the text of a whole configuration."""
    text = list(WHOLE)
    for _ in range(random.choice((1, 2, 10))):
        at = random.randrange(len(text))
        way = random.randrange(4)
        if way == 0:
            text[at] = random.choice(string.printable + "\0\x1b\ufeff\u2028é")
        elif way == 1:
            del text[at : at + random.choice((1, 5, 100))]
        elif way == 2:
            text[at:at] = random.choice(
                ("&a ", "*a", "!!", "? ", ": ", "- ", "{", "[", "\t", "---\n")
            )
        else:
            text[at:at] = text[at : at + 30]
        text = text or ["a"]
    return "changed text", _file(folder, "".join(text))


def hostile(folder: Path, random: Random) -> tuple[str, list[str]]:
    """Build a configuration that would run code, or expands too far."""
    tag = random.choice(
        (
            "!!python/object/apply:os.system ['touch hostile']",
            "!!python/object/new:os.system ['touch hostile']",
            "!!python/name:os.system",
            "!!python/module:os",
            "!!python/tuple [1, 2]",
            "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch hostile']",
            "{class_path: subprocess.Popen, init_args: {args: [touch, hostile]}}",
            "{x: {class_path: smallfry.cli.train}}",
        )
    )
    where = random.choice(("model", "model.options", "optimizer.options", "data", "run", "seed"))
    if random.random() < 0.3:
        return "code in an option", [f"--{where}={tag}"] if "." in where else [f"--{where}.x={tag}"]
    group, _, inner = where.partition(".")
    return "code in a file", _file(
        folder, f"{group}: {{{inner}: {tag}}}" if inner else f"{group}: {tag}"
    )


def bomb(folder: Path, random: Random) -> tuple[str, list[str]]:
    """Build text that expands far beyond any configuration."""
    levels, wide = random.choice(((9, 9), (30, 2), (6, 60)))
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * wide)}]" for i in range(1, levels)]
    text = random.choice(
        (
            "\n".join([*lines, f"model: {{options: {{x: *a{levels - 1}}}}}"]),
            "model: " + "[" * 100_000,
            "model: " + "{a: " * 3_000 + "}" * 3_000,
            "a: &a [*a]\nmodel: *a",
            "seed: " + "9" * 100_000,
            "run: " + "x" * 2_000_000,
            "\n".join(f"k{i}: {i}" for i in range(150_000)),
        )
    )
    return "text that unfolds", _file(folder, text)


def no_text(folder: Path, random: Random) -> tuple[str, list[str]]:
    """Write a file of noise or without text."""
    file = folder / "config.yaml"
    file.write_bytes(random.randbytes(random.choice((0, 1, 50, 3_000))))
    return "noise", ["--config", random.choice([str(file)] * 8 + [str(folder), "/nowhere", ""])]


def _file(folder: Path, text: str) -> list[str]:
    file = folder / "config.yaml"
    file.write_text(text, errors="replace", newline="")
    return ["--config", str(file)]


MARKS = ("&a ", "*a", "!!", "? ", ": ", "- ", "{", "[", "\t", "---\n")
Kind = Callable[[Path, Random], tuple[str, list[str]]]
WHOLE = yaml.safe_dump(TrainConfig().to_dict(), sort_keys=False)
KINDS: tuple[Kind, ...] = (in_a_file, on_the_command_line, mutated, hostile, bomb, no_text)
WEIGHTS = (40, 35, 15, 7, 1, 2)
MUST_BE_REFUSED = ("code in an option", "code in a file", "text that unfolds")

PART = Part(
    "configurations",
    "accepted, or refused in one sentence; no class is imported and no code run",
    prepare,
    trial,
    count=100_000,
    short=60,
    seconds=600,
)


# Some of them in earnest


def prepare_training(folder: Path) -> tuple[Path, Callable[..., Any]]:
    """Prepare tiny runs, which start where validation ends."""
    without_pictures()
    return folder, training.train


def train_with(prepared: tuple[Path, Callable[..., Any]], number: int) -> Verdict:
    """Run a tiny training with a few changed settings."""
    folder, training.train = prepared  # type: ignore[assignment]
    random = generator("trained", number)
    run = folder / f"run-{number}"
    shutil.rmtree(run, ignore_errors=True)
    tree = CONFIG.to_dict() | {"run": str(run), "epochs": 1, "checkpoint_seconds": 60.0}
    names = [name for name in FIELDS if name not in LEFT_ALONE]
    for name in random.choices(names, k=random.choice((1, 1, 2))):
        place = tree
        *groups, last = name.split(".")
        for group in groups:
            place = place[group]
        place[last] = value(name, random)
    words = _file(folder, yaml.safe_dump(tree))
    if tree["data"]["name"] in (*HUB, "faces"):
        return Verdict("settings in a file", "skipped: needs the network")
    said = command("train", *words)
    shutil.rmtree(run, ignore_errors=True)
    return Verdict("settings in a file", RIGHT if said.code == 0 else TOLD, said.failure)


LEFT_ALONE = ("run", "epochs", "device", "compile", "data.root", "references", "patience")

TRAINED = Part(
    "trained",
    "a complete run, or a refusal in one sentence",
    prepare_training,
    train_with,
    count=300,
    short=2,
    seconds=600,
)
