"""Report on int8 quantization: size, accuracy, agreement and latency against float32.

Two files join the export. ``quantization.json`` has the figures. ``quantization.png``, of static
ranges and a model that applies a block again and again, shows how what each product is given moves
from application to application, and so why each has a scale of its own.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from smallfry.data import ImageData
from smallfry.deploy.latency import take_turns
from smallfry.deploy.quantize import CallRange, measured_ranges
from smallfry.deploy.run_metadata import without_paths
from smallfry.io.console import CleanConsole
from smallfry.io.json import strict
from smallfry.report.quantization import draw_ranges
from smallfry.report.table import NONE, number
from smallfry.training.config import MULTILABEL
from smallfry.training.evaluation import Predictions, as_tensors, score, task_of
from smallfry.training.provenance import provenance
from smallfry_runtime.arrays import random_inputs
from smallfry_runtime.decoders import decoder_of, has_decoder
from smallfry_runtime.manifest import QUANTIZATION, RANGES, Manifest
from smallfry_runtime.runtime import Runtime, sigmoid

REPORT, PICTURE = QUANTIZATION, RANGES
WEIGHT = re.compile(r"(?:^|\.)blocks\.(\d+)\.(\w+\.\w+)(?:\.layer)?\.weight")  # adapted or not
THREADS = 1
SECONDS = 0.5  # of timed answers for each precision


class Span(NamedTuple):
    """Input range of a product of the shared block, in one application of the block."""

    product: str  # such as attn.qkv
    layer: int  # of the block, from 0
    step: int  # recursion step, from 1
    application: int  # of the block, from 1, through all recursion steps
    low: float
    high: float


def write_report(
    folder: Path,
    plain: Path,
    graphs: Mapping[str, bytes],
    images: NDArray[np.float32] | None,
    data: ImageData | None,
) -> dict[str, Any]:
    """Compare an int8 export with the same in float32, and write both files.

    Args:
        folder: The export in eight bits.
        plain: The export in float32.
        graphs: Its graphs.
        images: Normalised images that static ranges were measured on; None for dynamic ones.
        data: Its test split gives the accuracy; None, or no such split, gives none.

    Returns:
        The content of ``quantization.json``.
    """
    runtimes = {"float32": Runtime(plain, THREADS), "eight_bits": Runtime(folder, THREADS)}
    manifest = Manifest.read(folder)
    report: dict[str, Any] = {"form": manifest.form, "precision": manifest.precision}
    report |= {
        name: {"bytes": graph_bytes(at)} for name, at in zip(runtimes, (plain, folder), strict=True)
    }
    test = data.test if data is not None and data.test_count else None
    if data is not None and test is not None:
        several = {"task": MULTILABEL, "thresholds": manifest.thresholds}
        task = task_of(several if manifest.thresholds else {"task": manifest.task})
        pixels = test.images.numpy()
        said = {name: runtime.compute(pixels).logits for name, runtime in runtimes.items()}
        for name, logits in said.items():
            scores = score(Predictions(as_tensors(logits), test.labels, None), task)
            report[name] |= {key: scores[key] for key in ("accuracy", "macro_f1") if key in scores}
        report["agreement"] = _agreement(said["float32"], said["eight_bits"], manifest)
        report["measured_on"] = f"{len(test):,} test images of {Path(data.name).name}"
    image = random_inputs(1, manifest.frame, manifest.channels)
    calls = {name: partial(runtime.compute, image) for name, runtime in runtimes.items()}
    for name, taken in take_turns(calls, SECONDS).items():
        report[name]["latency_ms"] = taken._asdict()
    report["latency"] = {"batch_size": 1, "threads": THREADS, "all_recursion_steps": True}
    if images is not None:
        steps = manifest.recursion_steps or 1
        spans = spans_of(measured_ranges(graphs, images, steps), steps)
        report["ranges"] = [span._asdict() for span in spans]
        report["coarseness"] = coarseness(spans)
        if any(span.application > 1 for span in spans):
            draw_ranges(spans, folder / PICTURE)
    evidence = provenance(torch.device("cpu"))
    report["provenance"] = evidence | {"command": without_paths(str(evidence["command"]))}
    (folder / REPORT).write_text(json.dumps(strict(report), indent=1, allow_nan=False) + "\n")
    return report


def _agreement(one: Any, other: Any, manifest: Manifest) -> float | None:
    """Compute the share of samples with the same answer; None of several outputs.

    Numbers in an answer, such as a confidence, may differ.
    """
    if isinstance(one, dict):
        return None
    if manifest.thresholds:
        cuts = np.array(manifest.thresholds)
        return float(((sigmoid(one) >= cuts) == (sigmoid(other) >= cuts)).all(axis=1).mean())
    if manifest.is_classifier or not has_decoder(manifest.task):
        return float((one.argmax(axis=-1) == other.argmax(axis=-1)).mean())
    decode = partial(decoder_of(manifest.task).decode, classes=manifest.classes)
    pairs = zip(decode(one), decode(other), strict=True)
    return float(np.mean([_discrete(a) == _discrete(b) for a, b in pairs]))


def _discrete(answer: Any) -> Any:
    """Return an answer without its numbers of a continuous scale."""
    if isinstance(answer, Mapping):
        return {k: _discrete(v) for k, v in answer.items() if not isinstance(v, float)}
    if isinstance(answer, list | tuple):
        return [_discrete(value) for value in answer if not isinstance(value, float)]
    return answer


def spans_of(
    measured: Mapping[str, Sequence[Sequence[CallRange]]], recursion_steps: int
) -> list[Span]:
    """List ranges by application of the shared block.

    What a product is given in several parts in one application, as the first layer is, counts as
    one. A model without such a block has none.

    Args:
        measured: Output of ``measured_ranges``.
        recursion_steps: Recursion steps of the model.
    """
    passes = measured.get("step") or measured.get("model", [])
    calls = [(WEIGHT.search(call.weight), call) for one in passes for call in one]
    inside = [(match[2], int(match[1]), call) for match, call in calls if match is not None]
    if not inside:
        return []
    last = inside[-1][:2]  # what an application ends with
    in_a_step = sum(found[:2] == last for found in inside) // recursion_steps
    joined: dict[tuple[str, int, int], tuple[float, float]] = {}
    application = 1
    for product, layer, call in inside:
        key = (product, layer, application)
        low, high = joined.get(key, (call.low, call.high))
        joined[key] = (min(low, call.low), max(high, call.high))
        application += (product, layer) == last
    return [
        Span(product, layer, (at - 1) // max(1, in_a_step) + 1, at, *limits)
        for (product, layer, at), limits in joined.items()
    ]


def coarseness(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Compute the width of one common range relative to one range per application.

    For each product its layer, and the ``median`` and the ``worst`` ratio of the widths of ranges;
    eight bits divide either width into 255 parts, and both include 0.
    """
    groups: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for span in spans:
        limits = (min(span.low, 0.0), max(span.high, 0.0))
        groups.setdefault((span.product, span.layer), []).append(limits)
    found = []
    for (product, layer), limits_of in sorted(groups.items()):
        shared = max(high for _, high in limits_of) - min(low for low, _ in limits_of)
        ratios = [shared / (high - low) if high > low else 1.0 for low, high in limits_of]
        found.append(
            {"product": product, "layer": layer, "median": median(ratios), "worst": max(ratios)}
        )
    return found


def print_report(export: Path) -> None:
    """Print a summary of an export's ``quantization.json``."""
    report = json.loads((export / REPORT).read_text())
    before, after = report["float32"], report["eight_bits"]
    table = Table("", "float32", str(report["precision"]), box=None)

    def percent(of: Mapping[str, Any], name: str) -> str:
        return f"{of[name]:.2%}" if name in of else NONE

    table.add_row("size, MB", *(number(of["bytes"] / 1e6) for of in (before, after)))
    table.add_row("latency, ms", *(number(of["latency_ms"]["p50"]) for of in (before, after)))
    for name in ("accuracy", "macro_f1"):
        table.add_row(name.replace("_", " "), *(percent(of, name) for of in (before, after)))
    table.add_row("answers as in float32", "", percent(report, "agreement"))
    console = CleanConsole(highlight=False)
    console.print(table)
    measured = report.get("measured_on", "no test images were at hand")
    console.print(f"{measured}; one image, {THREADS} thread, median", soft_wrap=True)
    if (export / PICTURE).exists():
        console.print(f"ranges: {export / PICTURE}", soft_wrap=True)


def graph_bytes(export: Path) -> int:
    """Sum the bytes of an export's graphs."""
    return sum((export / name).stat().st_size for name in Manifest.read(export).graphs)
