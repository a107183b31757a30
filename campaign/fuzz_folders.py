"""Folders of strangers: valid hashes over contents made to harm or confuse.

Where ``damage`` leaves the hashes as they were, here they are made anew, as whoever means harm
would do; so what is read has to be judged by itself.
"""

import hashlib
import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from campaign.artifacts import TARGETS, Artifacts, Target, copy, key, prepare
from campaign.damage import harm
from campaign.fuzz_config import wild
from campaign.trials import RIGHT, TOLD, Part, Verdict, generator
from smallfry.errors import SmallfryError
from smallfry.training.checkpoint import load_checkpoint
from smallfry_runtime.files import with_digest

HOSTILE_NAMES = (
    *("hf_hub:a/b", "hf-hub:a/b", "local-dir:/etc", "../x", "os.system", "resnet18.a1_in1k"),
    *("vit_giant_patch14_224", "eva_giant_patch14_560", "", "\0", "auto", "Resnet18"),
)
OF_THE_FACTORY = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
SIZES = ("embed_dim", "depth", "num_heads", "mlp_hidden_dim", "latents", "latent_steps", "img_size")


def trial(artifacts: Artifacts, number: int) -> Verdict:
    """Change one file, with valid hashes."""
    random = generator("folders", number)
    target = random.choice(TARGETS)
    way = random.choice(WAYS[Path(target.file).suffix])
    with tempfile.TemporaryDirectory(dir=artifacts.scratch) as place:
        folder = copy(artifacts, target, Path(place))
        proof = Path(place) / "proof"
        what = way(folder / target.file, random, proof, artifacts)
        _make_hashes_fit(folder, target)
        reads = [target.read, load_state] if target.file.endswith(".pt") else [target.read]
        told, failure = RIGHT, None
        for read in reads:
            try:
                read(folder)
            except SmallfryError as error:
                told = TOLD
                if len(str(error).splitlines()) > 3:
                    failure = f"a message of many lines: {error!r}"[:300]
        if proof.exists():
            failure = "code of the file was run"
        return Verdict(f"{key(target)}: {what}", told, failure)


def load_state(folder: Path) -> Any:
    """Load the optimizer's state alone."""
    return load_checkpoint(folder / "last").trainer


def _make_hashes_fit(folder: Path, target: Target) -> None:
    manifest = (folder / target.file).parent / "manifest.json"
    if target.place == "shared":
        manifest = folder / "config.json"
    try:
        content = json.loads(manifest.read_text())
        told = content["smallfry"] if target.place == "shared" else content
        for file in manifest.parent.iterdir():
            digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
            if target.place == "shared" and file.name == "model.safetensors":
                told["weights"]["sha256"] = digest
            elif target.place != "shared" and file.name in told["files"]:
                told["files"][file.name] = digest
        content = content if target.place == "shared" else with_digest(content)
        text = json.dumps(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # the manifest itself is what was changed
    manifest.unlink()  # it is a link to the whole one
    manifest.write_text(text)


# Ways to change a file: each gives what it did in words


def changed_values(file: Path, random: Random, proof: Path, artifacts: Artifacts) -> str:
    """Replace values of JSON at random positions by values of any type."""
    content = json.loads(file.read_text())
    for _ in range(random.choice((1, 1, 2, 5))):
        place, last = _place(content, random)
        way = random.randrange(5)
        if way == 0 and isinstance(place, dict):
            del place[last]
        elif way == 1 and isinstance(place, dict):
            place[random.choice(("a", "../x", "pretrained", "file", ""))] = wild(random)
        else:
            place[last] = wild(random)
        if not content:
            break
    file.write_text(json.dumps(content, default=str))
    return "values changed"


def changed_model(file: Path, random: Random, proof: Path, artifacts: Artifacts) -> str:
    """Change JSON to describe another model than that of the weights."""
    content = json.loads(file.read_text())
    shared = "architecture" in content
    arguments = content.setdefault("model_args", {}) if shared else content["model"]
    if not shared:
        arguments = arguments.setdefault("arguments", {})
    way = random.randrange(3)
    if way == 0:
        name = random.choice(HOSTILE_NAMES)
        if shared:
            content["architecture"] = name
        else:
            content["model"]["name"] = name
    elif way == 1:
        pickled = proof.parent / "weights.pth"
        pickled.write_bytes(_pickle(proof))
        value: Any = random.choice(
            (str(pickled), {"file": str(pickled)}, {"url": "http://x/y.pth"})
        )
        arguments[random.choice(OF_THE_FACTORY)] = value
        arguments["pretrained"] = random.choice((True, False))
    else:
        sizes = (0, -1, 10**3, 10**5, 10**6, 10**9, 10**18, 2.5, "8", None)
        arguments[random.choice(SIZES)] = random.choice(sizes)
    file.write_text(json.dumps(content))
    return "another model"


def pickled(file: Path, random: Random, proof: Path, artifacts: Artifacts) -> str:
    """Insert a pickle that runs a command."""
    data = _pickle(proof)
    if file.suffix == ".pt" and random.random() < 0.7:
        buffer = io.BytesIO()
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(buffer, "w") as new:
            for name in old.namelist():
                inside = name.endswith("data.pkl")
                new.writestr(name, data if inside else old.read(name))
        data = buffer.getvalue()
    file.write_bytes(data)
    return "a pickle that runs a command"


def other_objects(file: Path, random: Random, proof: Path, artifacts: Artifacts) -> str:
    """Save a valid PyTorch state of other objects than the loop's."""
    choices: tuple[Any, ...] = (
        *(None, 3, [], {}, {"weights": 3}, torch.zeros(3), {"progress": {"step": "x"}}),
        {"weights": {}, "optimizer": {}, "precision": {}, "progress": {"nonsense": 1}},
        {"weights": {"a": torch.zeros(1).expand(10**9)}, "optimizer": [], "precision": None},
    )
    torch.save(random.choice(choices), file)
    return "another state"


def packed(file: Path, random: Random, proof: Path, artifacts: Artifacts) -> str:
    """Build a zip that unpacks to 200 MiB, or with names that lead out of it."""
    with zipfile.ZipFile(file) as old:
        names = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in names.items():
            new.writestr(name, bytes(200 * 2**20) if name.endswith("/0") else data)
        new.writestr("../../../../proof", "out")
    return "a packed zip"


def harmed(file: Path, random: Random, proof: Path, artifacts: Artifacts) -> str:
    """Damage bytes at random."""
    ways = ("bits flipped", "bytes overwritten", "bytes inserted", "bytes lost", "truncated")
    harm(file, random.choice(ways), random, artifacts)
    return "bytes changed"


def headed(file: Path, random: Random, proof: Path, artifacts: Artifacts) -> str:
    """Build safetensors with an absurd header: types, shapes and positions."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = random.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    way = random.randrange(5)
    if way == 0:
        entry["shape"] = random.choice(([2**40, 2**40], [-1], [0], [1] * 200, "x", [2**62, 4]))
    elif way == 1:
        entry["data_offsets"] = random.choice(([0, 2**60], [5, 1], [-1, 3], [0], "x", [0, 1]))
    elif way == 2:
        entry["dtype"] = random.choice(("F64", "BOOL", "F8_E4M3", "X", "C64", 3))
    elif way == 3:
        header[random.choice(("../x", "", "\0", "a" * 10**5))] = entry
    else:
        del header[name]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return "another header"


def changed_text(file: Path, random: Random, proof: Path, artifacts: Artifacts) -> str:
    """Shuffle the text of a configuration or a table."""
    lines = file.read_text().splitlines()
    at = random.randrange(len(lines))
    said = ("!!python/object/apply:os.system ['touch x']", "a: *b", "1,2,3,4", "\0", "x" * 200_000)
    lines[at] = random.choice((*said, "", lines[at] * 2, lines[at].replace(":", ": {")))
    file.write_text("\n".join(lines))
    return "text changed"


def _place(content: Any, random: Random) -> tuple[Any, Any]:
    """Choose a position in a tree: its container and key."""
    found: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in list(items):
            found.append((value, name))
            if isinstance(inner, dict | list):
                walk(inner)

    walk(content)
    return random.choice(found) if found else (content, "a")


class _Runs:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def _pickle(proof: Path) -> bytes:
    return pickle.dumps({"weights": _Runs(proof)}, protocol=2)


Way = Callable[[Path, Random, Path, Artifacts], str]
WAYS: dict[str, tuple[Way, ...]] = {
    ".json": (changed_values, changed_values, changed_model, harmed),
    ".pt": (pickled, other_objects, packed, harmed, harmed, harmed),
    ".safetensors": (pickled, headed, headed, harmed),
    ".onnx": (pickled, harmed),
    ".yaml": (changed_text, harmed),
    ".csv": (changed_text, harmed),
}

PART = Part(
    "folders",
    "a registered model and nothing else, or an error; no code is run, no other file is read",
    prepare,
    trial,
    count=10_000,
    short=60,
    seconds=600,
)
