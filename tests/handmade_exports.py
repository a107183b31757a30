"""Exports of graphs made by hand, in a moment."""

import hashlib
import json
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from smallfry_runtime.files import with_digest
from smallfry_runtime.manifest import MANIFEST, Manifest


def graph(*steps, inputs=("x",), outputs=("y",), **weights) -> bytes:
    """A graph of (operator, inputs, output, attributes)."""
    nodes = [helper.make_node(op, ins, [out], **more) for op, ins, out, more in steps]
    free = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "made",
        [free(name, TensorProto.FLOAT, None) for name in inputs],
        [free(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def linear(size: int, outputs: dict[str, tuple[int, ...]], scale: float = 1.0) -> bytes:
    """A graph of outputs by their names and shapes, each a random linear map of inputs."""
    random, steps, weights = np.random.default_rng(0), [("Flatten", ["input"], "flat", {})], {}
    for name, shape in outputs.items():
        weights[f"w_{name}"] = random.normal(0, scale, (size, prod(shape))).astype(np.float32)
        weights[f"s_{name}"] = np.array([-1, *shape])
        steps.append(("MatMul", ["flat", f"w_{name}"], f"m_{name}", {}))
        steps.append(("Reshape", [f"m_{name}", f"s_{name}"], name, {}))
    return graph(*steps, inputs=("input",), outputs=tuple(outputs), **weights)


def write(folder: Path, manifest: Manifest, *, content=None, **graphs: bytes) -> Path:
    """Write an export of graphs, under right digests."""
    files = {name.replace("_onnx", ".onnx"): graph for name, graph in graphs.items()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    written = json.loads(replace(manifest, files=hashes).to_json())
    del written["digest"]
    (folder / MANIFEST).write_text(json.dumps(with_digest({**written, **(content or {})})))
    return folder
