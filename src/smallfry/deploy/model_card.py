"""Model card of a shared model, with front matter for the Hub.

It is drawn from the folder's ``config.json`` alone, so that both agree. Names of classes and
data come from strangers' folders: they are shown as text, whatever they hold.
"""

import json
import math
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from smallfry.deploy.hub import NAME
from smallfry.models.sources import is_ours
from smallfry.training.compression import CHOICE, LAST_EPOCH

LONGEST = 80  # characters of a class name
LONGEST_CODE = 2000
MOST_CLASSES = 100  # named in the card; config.json has them all
MARKS = re.compile(r"([!-&(-+./:-@\[-`{-~])")  # ASCII's that can mean something within a line
TURNS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
RESIZED = {
    "crop": "cropped at its centre, then scaled",
    "letterbox": "scaled and put between black borders",
    "squash": "stretched to them",
}
Z = 1.96  # standard deviations to both sides: 95 %


def model_card(config: Mapping[str, Any], name: str, picture: str | None = None) -> str:
    """Format README.md.

    Args:
        config: The content of ``config.json``, as ``save_pretrained`` writes it.
        name: Name for timm and smallfry: ``hf_hub:USER/NAME`` or ``local-dir:FOLDER``.
        picture: File name of the confusion matrix beside the card.
    """
    facts, wanted = config["smallfry"], config["pretrained_cfg"]
    channels, height, width = wanted["input_size"]
    labels = config["label_names"]
    pixels = f"{height}×{width} {'grey' if channels == 1 else 'RGB'} images"
    data = facts.get("data", {})
    on = f" on {as_text(data['name'])}" if "name" in data else ""
    parts = [
        f"---\n{_front_matter(config, name).to_yaml()}\n---",
        f"# {as_code(config['architecture'])}{on}",
        f"{_purpose(config, pixels)}. Trained with smallfry {as_code(facts['version'])}.",
        "## What it is",
        _table(_sizes(config)),
        "## Classes",
        _classes(labels),
        "## Use",
        _usage(config, name),
        "## Data",
        _data(data),
        "## Figures",
        *(_figures(facts) if not _has_several(config) else _figures_of_labels(facts)),
        *([f"![Confusion matrix of the test split]({picture})"] if picture else []),
        *_origin(facts.get("provenance")),
        "## Limits",
        *_limits(config),
    ]
    return "\n\n".join(parts) + "\n"


def _has_several(config: Mapping[str, Any]) -> bool:
    """Return whether an image may have several classes."""
    return "thresholds" in config["smallfry"]


def _purpose(config: Mapping[str, Any], pixels: str) -> str:
    count = len(config["label_names"])
    if _has_several(config):
        return f"Finds which of {count} classes {pixels} have: several, one or none"
    return f"Sorts {pixels} into {count} classes"


def as_text(value: object) -> str:
    """Escape a value as inert markdown text, for anywhere but a line's start."""
    return MARKS.sub(r"\\\1", plain(value))


def as_code(value: object) -> str:
    """Format a value as markdown code, also inside a table."""
    shown = plain(value, LONGEST_CODE).replace("|", r"\|")
    ticks = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    return f"{ticks} {shown} {ticks}" if "`" in shown else f"{ticks}{shown}{ticks}"


def plain(value: object, longest: int = LONGEST) -> str:
    """Format a value as one line, without invisible or unencodable characters."""
    shown = "".join("�" if _unseen(sign) else sign for sign in " ".join(str(value).split()))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Compute the 95 % confidence interval of a proportion (Wilson, 1927)."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2) / (1 + Z**2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _unseen(sign: str) -> bool:
    """Match control characters, lone surrogates and marks that change the writing direction."""
    return unicodedata.category(sign) in ("Cc", "Cs") or unicodedata.bidirectional(sign) in TURNS


def _front_matter(config: Mapping[str, Any], name: str) -> ModelCardData:
    facts = config["smallfry"]
    data, test = facts.get("data", {}), facts.get("measured", {}).get("test")
    results, hub = [], _hub(data)
    if test is not None:
        names = {
            "mean_average_precision": ("mean average precision", "mean_average_precision"),
            "accuracy": ("accuracy", "accuracy"),
            "f1": ("macro F1", "macro_f1"),
            "expected_calibration_error": ("calibration error", "calibration_error"),
        }
        figures = {
            kind: (title, test[name]) for kind, (title, name) in names.items() if name in test
        }
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=hub or plain(data.get("name", "unknown")),
                dataset_name=plain(data.get("name", "unknown")),
                dataset_split="test",
                metric_type=kind,
                metric_name=title,
                metric_value=round(value, 6),
            )
            for kind, (title, value) in figures.items()
            if value is not None
        ]
    ours = is_ours(config["architecture"])
    base = facts.get("base_model")
    return ModelCardData(
        license=config["pretrained_cfg"].get("license"),
        # timm's own snippet on the hub's page does not import smallfry
        library_name="smallfry" if ours else "timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "smallfry"],
        datasets=[hub] if hub else None,
        base_model=base,
        metrics=["accuracy", "f1"] if results else None,
        model_name=plain(name.rpartition("/")[2].rpartition(":")[2]) if results else None,
        eval_results=results or None,
    )


def _table(rows: Mapping[str, str]) -> str:
    lines = (f"| {key} | {value} |" for key, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *lines])


def _sizes(config: Mapping[str, Any]) -> dict[str, str]:
    facts, wanted = config["smallfry"], config["pretrained_cfg"]
    measured, training = facts["measured"], facts.get("training", {})
    channels, height, width = wanted["input_size"]
    kinds = {"best": "of the best epoch", "last": "of the last step"}
    which = kinds.get(facts.get("checkpoint", ""))
    if facts.get("checkpoint") == "best" and measured.get(CHOICE) == LAST_EPOCH:
        which = "of the last epoch"
    averaged = ", a moving average over the steps" if training.get("ema") else ""
    given = {k: v for k, v in config["model_args"].items() if k not in ("num_classes", "in_chans")}
    rows = {
        "architecture": as_code(config["architecture"]),
        "arguments": as_code(json.dumps(given)) if given else "",
        "parameters": f"{measured['parameters']:,} ({measured['weight_bytes'] / 2**20:.2f} MiB)",
        "multiply-accumulates of one image": f"{measured['macs'] / 1e6:,.1f} million",
        "input": f"{height}×{width} pixels, {'grey' if channels == 1 else 'RGB'}",
        "weights": f"{which}{averaged}" if which else "",
        "started from": _parent(facts.get("start")) or _base(facts),
        "distilled from": _parent(facts.get("teacher")),
        "compressed by": as_code(json.dumps(facts["methods"])) if facts.get("methods") else "",
        "license": as_text(wanted.get("license") or "not stated: ask whoever shares it"),
    }
    return {key: value for key, value in rows.items() if value}


def _base(facts: Mapping[str, Any]) -> str:
    """Format the name of the weights on the Hub that the training started from."""
    return as_code(facts["base_model"]) if facts.get("base_model") else ""


def _parent(facts: Mapping[str, Any] | None) -> str:
    """Describe the initial model of a training, or its teacher, if there is one."""
    if not facts:
        return ""
    return f"{as_code(facts.get('name'))}, weights {as_code(str(facts.get('weights_sha256'))[:16])}"


def _classes(labels: Sequence[str]) -> str:
    shown = "In the order of the outputs: " + ", ".join(map(as_text, labels[:MOST_CLASSES]))
    more = len(labels) - MOST_CLASSES
    return f"{shown}, and {more:,} more in `config.json`." if more > 0 else f"{shown}."


def _usage(config: Mapping[str, Any], name: str) -> str:
    mode = "L" if config["pretrained_cfg"]["input_size"][0] == 1 else "RGB"
    ours = is_ours(config["architecture"])
    name = plain(name, LONGEST_CODE)
    code = [
        *(["import smallfry  # registers the architecture"] if ours else []),
        "import timm",
        "import torch",
        "from PIL import Image",
        "from timm.data import create_transform, resolve_model_data_config",
        "",
        f"model = timm.create_model({json.dumps(name, ensure_ascii=False)}, "
        "pretrained=True).eval()",
        "transform = create_transform(**resolve_model_data_config(model))",
        f'image = transform(Image.open("image.png").convert("{mode}"))',
        "with torch.inference_mode():",
        *_answer(config["smallfry"].get("thresholds")),
    ]
    if config.get("smallfry", {}).get("transforms"):  # which timm does not apply
        loaded = f"smallfry.load({json.dumps(name, ensure_ascii=False)})"
        code = ["import smallfry", "", f"model = {loaded}.model  # compressed: timm can't load it"]
    quoted = shlex.quote(name.removeprefix("local-dir:"))
    return (
        "```python\n" + "\n".join(code) + "\n```\n\n"
        f"```\nsmallfry predict {quoted} image.png\n"
        f"smallfry evaluate {quoted} --data FOLDER_WITH_A_FOLDER_PER_CLASS\n```"
    )


def _answer(thresholds: Sequence[float] | None) -> list[str]:
    """Return the example's lines on what the model answers."""
    names = 'model.pretrained_cfg["label_names"]'
    if thresholds is None:
        return [
            "    shares = model(image[None]).softmax(dim=1)[0]",
            f"print({names}[int(shares.argmax())], float(shares.max()))",
        ]
    return [
        "    shares = model(image[None]).sigmoid()[0]",
        f"thresholds = {[round(cut, 6) for cut in thresholds]}",
        f"for name, share, least in zip({names}, shares, thresholds):",
        "    if share >= least:",
        "        print(name, float(share))",
    ]


def _data(data: Mapping[str, Any]) -> str:
    if "name" not in data:
        return "What it was trained on is not recorded."
    name = as_text(data["name"])
    hub = _hub(data)
    where = f"[{name}](https://huggingface.co/datasets/{hub})" if hub else name
    if "train" not in data:
        return f"Trained on {where}."
    counts = f"{data['train']:,} images to train, {data['validation']:,} to validate"
    return f"Trained on {where}: {counts}, {data['test']:,} to test."


def _hub(data: Mapping[str, Any]) -> str | None:
    """Return the data set's name on the Hub."""
    told = str(data.get("hub", ""))
    return told if NAME.fullmatch(told) else None


def _figures(facts: Mapping[str, Any]) -> list[str]:
    measured = facts["measured"]
    if "test" not in measured:
        return [_unmeasured(facts)]
    test = measured["test"]
    rows = {
        "test accuracy": f"{test['accuracy']:.2%}{_spread(facts)}",
        "macro F1": _share(test["macro_f1"]),
        "expected calibration error": _number(test["calibration_error"]),
        "test loss (cross-entropy)": _number(test["loss"]),
        **{
            f"for comparison: {as_text(other['name'])}": _share(other["test_accuracy"])
            for other in measured.get("references", [])
        },
        **_epochs(measured),
    }
    return [_table(rows)]


def _figures_of_labels(facts: Mapping[str, Any]) -> list[str]:
    """Return the figures of a model of several classes per image."""
    measured = facts["measured"]
    if "test" not in measured:
        return [_unmeasured(facts)]
    test = measured["test"]
    rows = {
        "mean average precision": _share(test["mean_average_precision"]),
        "images with exactly their classes": f"{test['accuracy']:.2%}{_spread(facts)}",
        "macro F1": _share(test["macro_f1"]),
        "micro F1": _share(test["micro_f1"]),
        "test loss (binary cross-entropy, sum over the classes)": _number(test["loss"]),
        **_epochs(measured),
    }
    return [_table(rows)]


def _unmeasured(facts: Mapping[str, Any]) -> str:
    why = "the test split was read for the weights of the best epoch, and these are others"
    known = facts.get("checkpoint") == "last" and "epochs" in facts["measured"]
    return f"None on a test split: {why if known else 'the run had not ended'}."


def _spread(facts: Mapping[str, Any]) -> str:
    """Return the confidence interval of the test accuracy."""
    images = facts.get("data", {}).get("test", 0)
    if not images:
        return ""
    low, high = wilson_interval(facts["measured"]["test"]["accuracy"], images)
    return f" (95 % interval {low:.2%} to {high:.2%}, from {images:,} images)"


def _epochs(measured: Mapping[str, Any]) -> dict[str, str]:
    epochs = f"{measured['epochs']:,}"
    training = {"training": f"{measured['training_seconds']:,.0f} s, seed {measured['seed']:d}"}
    if measured.get(CHOICE) == LAST_EPOCH:
        return {"epochs": f"{epochs}, of which the last is taken", **training}
    return {
        "epochs": f"{epochs}, of which the best was {measured['best_epoch']:,}",
        "best epoch chosen on": f"the {as_text(measured['select_on'])} split",
        **training,
    }


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2%}"


def _origin(provenance: Mapping[str, Any] | None) -> list[str]:
    if not provenance:
        return []
    versions = ", ".join(f"{k} {v}" for k, v in provenance.get("versions", {}).items())
    rows = {
        "command": as_code(provenance.get("command") or "not recorded"),
        "commit": as_code(provenance.get("commit") or "not of a checkout"),
        "device": as_code(provenance.get("device", "not recorded")),
        "versions": as_code(versions),
        "date": as_code(provenance.get("date", "not recorded")),
    }
    return ["How the figures were measured:", _table(rows)]


def _limits(config: Mapping[str, Any]) -> list[str]:
    facts, labels = config["smallfry"], config["label_names"]
    measured = facts["measured"]
    _, height, width = config["pretrained_cfg"]["input_size"]
    test = measured.get("test")
    limits = [
        f"It has {len(labels)} classes. Any other picture "
        f"{'may be given some' if _has_several(config) else 'is given one'} of them too, and may "
        "be given it with a high probability.",
        f"Its images have {height}×{width} pixels. A picture of another shape is "
        f"{RESIZED[facts.get('resize', 'crop')]}; what is smaller than a pixel is lost.",
    ]
    if test is None:
        limits.append("How often these weights are right was not measured.")
    else:
        limits.append(
            "The figures are of the test split of the data above. Nothing else was tested: no "
            "pictures of another origin, no noise, no attack, no difference between people."
        )
        better = [
            f"{as_text(other['name'])} ({other['test_accuracy']:.2%})"
            for other in measured.get("references", [])
            if other["test_accuracy"] > test["accuracy"]
        ]
        if better:
            limits.append(f"On the same images these were right more often: {', '.join(better)}.")
    if "seed" in measured:
        limits.append("It is one run with one seed; how far other seeds differ was not measured.")
    if measured.get("select_on") == "test" and measured.get(CHOICE) != LAST_EPOCH:
        limits.append("The best epoch was chosen on the test split itself, which flatters it.")
    if not config["pretrained_cfg"].get("license"):
        limits.append("No license is stated for the weights or for their training data.")
    return ["\n".join(f"- {limit}" for limit in limits)]
