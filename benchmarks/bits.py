"""Accuracy of quantised CIFAR-10 models, without training, beside other quantisers.

    python benchmarks/bits.py --root DIR [--out results/bits.json] [--models loopnet_70k loopnet_2m]
        [--images 2000] [--only int8 int4 mixed adaptive lsq]

Trained models of ``results/models``; 256 training images calibrate, and the first ``--images`` of
the test split measure. Every figure is of one deterministic calibration: nothing is trained, so
there are no seeds; but for the part lsq, which trains for minutes, with one seed. Other quantisers:
ONNX Runtime's static int8 on the exported graph; ONNX Runtime's int4 blocks (MatMulNBits) and
torchao's int4 groups, which take matrices alone, on the matrix of every convolution (outputs ×
inputs · kernel), computed in PyTorch. torchao is left out where it is not installed. The file is
written after every figure, so a run can be stopped.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import smallfry
from smallfry.compress import LSQ, Quantize, Session, apply_to_model
from smallfry.compress.quantize.mixed import choose_bits
from smallfry.compress.quantize.ptq import rounding_error
from smallfry.compress.quantize.sensitivity import (
    hessian_traces,
    sensitivities,
    trace_sensitivity,
)
from smallfry.compress.select import dense_layers
from smallfry.data import load_data
from smallfry.training.calibration import CalibrationBatches
from smallfry.training.evaluation import forward

MODELS = Path(__file__).parents[1] / "results" / "models"
CHOICES, AVERAGES, GROUP = (2, 3, 4, 8), (3.0, 4.0), 32
FINE_CHOICES = (2, 3, 4, 5, 6, 8)
PROBES, HESSIAN_IMAGES = 20, 64
ITERATIONS = 500  # of AdaRound, per layer
TRAINING_IMAGES = 2560  # loaded, of which 256 calibrate; 20,000 for training
STEPS, BATCH, RATE = 300, 128, 1e-4


class Bench:
    """One model with its images, and the record of its figures."""

    def __init__(
        self, name: str, root: Path, images: int, record: dict[str, Any], out: Path, train: int
    ):
        self.trained = smallfry.load(MODELS / name)
        data = load_data("cifar10", root, limit=train)
        self.model, self.name, self.out = self.trained.model, name, out
        self.train = data.train
        self.batches = CalibrationBatches(data.train, self.trained.normalize, self.model)
        taken = data.test.take(torch.arange(images))
        self.pixels, self.labels = taken.images, taken.labels
        self.layers = dense_layers(self.model)
        self.record = record.setdefault(name, {})
        self.all = record
        self.float = self.logits(self.model)
        self.note("float32", self.float, 0.0)

    @torch.inference_mode()
    def logits(self, model: nn.Module) -> Tensor:
        """Compute the logits of the test images."""
        normal = self.trained.normalize
        return torch.cat([forward(model, normal(part))[0] for part in self.pixels.split(250)])

    def note(self, key: str, logits: Tensor, seconds: float, **more: Any) -> None:
        """Record accuracy, agreement and divergence, and write the file."""
        before, after = (each.double().log_softmax(1) for each in (self.float, logits))
        kl = float((before.exp() * (before - after)).sum(1).mean())
        figures = {
            "accuracy": round(100 * float((after.argmax(1) == self.labels).double().mean()), 2),
            "agreement": round(
                100 * float((after.argmax(1) == before.argmax(1)).double().mean()), 2
            ),
            "divergence": float(f"{kl:.3g}"),
            "seconds": round(seconds, 1),
            **more,
        }
        self.record[key] = figures
        print(self.name, key, figures, flush=True)
        self.out.write_text(json.dumps(self.all, indent=1) + "\n")

    def ours(self, key: str, *methods: Quantize, **more: Any) -> None:
        """Quantise by our own method, and record it."""
        begin, reports = time.process_time(), list[dict[str, Any]]()
        given = {"example": self.batches.example(), "batches": self.batches}
        small, _ = apply_to_model(self.model, methods, reports=reports, **given)
        seconds = time.process_time() - begin
        bits = defaultdict(int)
        for report in reports:
            for line in report["layers"]:
                bits[line["bits"]] += line["parameters"]
        average = sum(b * n for b, n in bits.items()) / sum(bits.values())
        self.note(key, self.logits(small), seconds, average_bits=round(average, 3), **more)

    def matrices(
        self, key: str, rounded: Callable[[Tensor], Tensor], but: tuple[str, ...] = ()
    ) -> None:
        """Round every weight as a matrix by another quantiser, and record it."""
        begin, other = time.process_time(), deepcopy(self.model)
        for name in set(self.layers) - set(but):
            weight = other.get_submodule(name).weight
            weight.data.copy_(rounded(weight.detach().flatten(1)).view_as(weight))
        self.note(key, self.logits(other), time.process_time() - begin)


def int8(bench: Bench) -> None:
    """Measure eight bits of weights and inputs."""
    for kind in ("minmax", "percentile", "mse", "kl"):
        bench.ours(f"int8: {kind}", Quantize(8, activations=8, activation_range=kind))
    begin = time.process_time()
    try:
        logits = _onnx_int8(bench)
    except smallfry.errors.SmallfryError as error:
        print("onnxruntime int8:", error)
    else:
        bench.note("int8: onnxruntime", logits, time.process_time() - begin)


def int4(bench: Bench) -> None:
    """Measure four bits of weights in groups of 32, with and without the whitening stem."""
    for but, words in (((), ""), (("stem",), ", stem in float")):
        start = f"int4 g{GROUP}{words}"
        for kind in ("minmax", "mse"):
            bench.ours(f"{start}: {kind}", Quantize(4, None, GROUP, kind, exclude=but))
        adaround = Quantize(
            4, None, GROUP, "mse", rounding="adaround", iterations=ITERATIONS, exclude=but
        )
        bench.ours(f"{start}: adaround", adaround)
        bench.matrices(f"{start}: onnxruntime MatMulNBits", _onnx_int4, but)
        try:
            import torchao  # noqa: F401
        except ImportError:
            print("torchao is not installed: left out")
        else:
            bench.matrices(f"{start}: torchao", _torchao_int4, but)


def mixed(bench: Bench) -> None:
    """Measure uniform and mixed precision at the same average bits, one scale per channel."""
    errors = {
        name: {
            b: rounding_error(bench.model.get_submodule(name).weight.detach(), b) for b in CHOICES
        }
        for name in bench.layers
    }
    for average in AVERAGES:
        bench.ours(f"uniform {average:g} bits", Quantize(int(average)))
    for measure in ("kronecker", "fisher", "hessian"):
        begin = time.process_time()
        if measure == "hessian":
            found = _hessian(bench, errors)
        else:
            found = sensitivities(bench.model, errors, measure, bench.batches)
        seconds = round(time.process_time() - begin, 1)
        for average in AVERAGES:
            chosen = choose_bits(bench.model, errors, average, measured=found)
            methods = _by_bits(chosen.bits)
            more = {"bits": chosen.bits, "predicted": chosen.report["loss"], "measuring": seconds}
            bench.ours(f"mixed {average:g} bits: {measure}", *methods, **more)


def adaptive(bench: Bench) -> None:
    """Measure four bits on average with AdaRound: uniform, and mixed from more choices."""
    rounding = {"rounding": "adaround", "iterations": ITERATIONS}
    bench.ours("uniform 4 bits, adaround", Quantize(4, **rounding))
    errors = {
        name: {
            b: rounding_error(bench.model.get_submodule(name).weight.detach(), b)
            for b in FINE_CHOICES
        }
        for name in bench.layers
    }
    for measure in ("kronecker", "hessian"):
        if measure == "hessian":
            found = _hessian(bench, errors)
        else:
            found = sensitivities(bench.model, errors, measure, bench.batches)
        chosen = choose_bits(bench.model, errors, 4.0, measured=found)
        more = {"bits": chosen.bits, "predicted": chosen.report["loss"]}
        start = f"mixed 4 bits of {len(FINE_CHOICES)} choices: {measure}"
        bench.ours(start, *_by_bits(chosen.bits), **more)
        bench.ours(f"{start}, adaround", *_by_bits(chosen.bits, **rounding), **more)


def lsq(bench: Bench) -> None:
    """Measure four bits of weights and inputs, before and after training with learned steps.

    Stem and classifier have eight bits. 300 steps of AdamW on batches of 128 with mirrored images,
    the learning rate from 1e-4 to 0 along a cosine, batch norms with running statistics. (With 5e-4
    and batch statistics the first try was 1.2 points worse than no training.)
    """
    edges = Quantize(8, activations=8, activation_range="mse", include=("stem", "head"))
    rest = Quantize(4, activations=4, activation_range="mse")
    bench.ours("w4a4, edges 8: ptq", edges, rest)
    begin, model = time.process_time(), deepcopy(bench.model)
    given = {"example": bench.batches.example(), "batches": bench.batches}
    session = Session(model, [LSQ(4, 4)], steps=STEPS, **given)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    session.attach(optimizer)
    generator, model = torch.Generator().manual_seed(0), model.eval()
    for step in range(STEPS):
        chosen = torch.randint(0, len(bench.train), (BATCH,), generator=generator)
        batch = bench.train.take(chosen)
        images = bench.trained.normalize(batch.images)
        mirrored = torch.rand(BATCH, generator=generator) < 0.5
        images[mirrored] = images[mirrored].flip(-1)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), batch.labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(step, round(loss.item(), 4), flush=True)
    session.finish()
    bench.note("w4a4, edges 8: lsq", bench.logits(model.eval()), time.process_time() - begin)


def _by_bits(bits: Mapping[str, int], **settings: Any) -> list[Quantize]:
    layers = defaultdict(list)
    for name, b in bits.items():
        layers[b].append(name)
    return [Quantize(b, include=tuple(names), **settings) for b, names in layers.items()]


def _hessian(bench: Bench, errors: Any) -> dict[str, dict[int, float]]:
    images = next(iter(bench.batches))[:HESSIAN_IMAGES]
    traces = hessian_traces(bench.model, list(errors), [images], probes=PROBES)
    return {
        name: {b: trace_sensitivity(e, traces[name]) for b, e in by_bits.items()}
        for name, by_bits in errors.items()
    }


def _onnx_int8(bench: Bench) -> Tensor:
    """Run the graph that ONNX Runtime's static quantiser makes."""
    import onnxruntime as ort

    from smallfry.deploy.graphs import exported_program, to_onnx, whole_graph
    from smallfry.deploy.quantize import quantize

    graph = whole_graph(bench.model, torch.zeros(2, 3, 32, 32))
    content = to_onnx(graph, exported_program(graph)).SerializeToString()
    images = torch.cat(list(bench.batches)).numpy()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(quantize({"model": content}, "int8", images)["model"], options)
    given = bench.trained.normalize(bench.pixels).numpy()
    parts = [
        session.run(None, {"images": part})[0] for part in np.array_split(given, len(given) // 250)
    ]
    return torch.from_numpy(np.concatenate(parts)).flatten(1)


def _onnx_int4(matrix: Tensor) -> Tensor:
    """Round a matrix by MatMulNBits: what it multiplies the identity to."""
    import onnx
    import onnxruntime as ort
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    outputs, inputs = matrix.shape
    x, y = (
        onnx.helper.make_tensor_value_info(n, 1, [None, size])
        for n, size in (("x", inputs), ("y", outputs))
    )
    weight = onnx.numpy_helper.from_array(matrix.T.contiguous().numpy(), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight]
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=GROUP, is_symmetric=True)
    quantizer.process()
    session = ort.InferenceSession(quantizer.model.model.SerializeToString())
    (found,) = session.run(None, {"x": np.eye(inputs, dtype=np.float32)})
    return torch.from_numpy(found).T


def _torchao_int4(matrix: Tensor) -> Tensor:
    """Round a matrix by torchao's groups; rows are padded to whole groups."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    rows = nn.functional.pad(matrix, (0, -matrix.shape[1] % GROUP))
    layer = nn.Sequential(nn.Linear(rows.shape[1], len(rows), bias=False))
    layer[0].weight.data.copy_(rows)
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)))
    return layer[0].weight.dequantize()[:, : matrix.shape[1]]


def main() -> None:
    """Run the parts that were asked for."""
    parts = {"int8": int8, "int4": int4, "mixed": mixed, "adaptive": adaptive, "lsq": lsq}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/bits.json"))
    parser.add_argument("--models", nargs="+", default=["loopnet_70k", "loopnet_2m"])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--only", nargs="+", choices=parts, default=["int8", "int4", "mixed"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(given.out.read_text()) if given.out.is_file() else {}
    for name in given.models:
        loaded = 20_000 if "lsq" in given.only else TRAINING_IMAGES
        bench = Bench(name, given.root, given.images, record, given.out, loaded)
        for part in given.only:
            parts[part](bench)


if __name__ == "__main__":
    main()
