"""Each architecture of the zoo through the whole tool: train, resume, export, benchmark, KFAC."""

import os
import signal

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.deploy import Runtime, benchmark
from smallfry.deploy.benchmark import BenchmarkConfig, measure
from smallfry.deploy.export import export_precisions
from smallfry.deploy.memory import Memory
from smallfry.deploy.pretrained import gather
from smallfry.errors import Stopped
from smallfry.optim import KFAC
from smallfry.training.config import DataConfig, EMAConfig, ModelConfig, TrainConfig
from smallfry.training.evaluation_data import load_like
from smallfry.training.progress import QuietReporter
from smallfry.training.run import load_run
from smallfry.training.train import resume, train

TOKENS = {"embed_dim": 16, "depth": 1, "num_heads": 2}
ZOO: dict[str, dict] = {  # in small sizes
    "cct_2_3x2_32": TOKENS,
    "cvt_2_4_32": TOKENS,
    "vit_lite_2_4_32": TOKENS,
    "dhvt_tiny_cifar_patch4": TOKENS,
    "simplenet_cifar_310k": {"width": 0.125},
    "mobilenetv1_ulsam": {},
    "mobilenetv2_ulsam": {},
    "skipblocknet_m": {"width": 0.25, "stem_stride": 1},
    "gated_mlp": {"embed_dim": 16, "depth": 1},
}


class StopAt(QuietReporter):
    """Stops training after some steps, as a signal does."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step(self, loss: float, images_per_second: float) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def config(name: str, run) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(limit=48, image_size=32),
        model=ModelConfig(name, options=ZOO[name]),
        ema=EMAConfig(0.0),
        epochs=2,
        batch_size=16,
        threads=1,
        references=False,
        run=run,
        progress="quiet",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_train_resume_export_and_benchmark(name: str, tmp_path, monkeypatch, recwarn) -> None:
    train(config(name, tmp_path / "whole"))
    with pytest.raises(Stopped):
        train(config(name, tmp_path / "parted"), StopAt(4))
    resume(tmp_path / "parted")
    whole, parted = (load_run(tmp_path / part, "last") for part in ("whole", "parted"))
    for key, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parted.model.state_dict()[key]), key

    data, split, _ = load_like(whole, tmp_path / "whole", split="train")
    images = split.images[:20]
    with torch.inference_mode():
        wanted = whole.model(whole.normalize(images)).softmax(1).numpy()
    trained, facts, _ = gather(tmp_path / "whole", "last")
    places = {precision: tmp_path / precision for precision in ("float32", "int8")}
    export_precisions(trained, facts, places, data)  # of one tracing, most of the time here
    for precision, place in places.items():
        found = Runtime(place).predict(images.numpy()).probabilities
        off = np.abs(found - wanted)
        assert off.max() < 1e-4 if precision == "float32" else off.mean() < 0.1

    monkeypatch.setattr(benchmark, "measure_memory", lambda *_: Memory(1, {1: 2}))
    settings = BenchmarkConfig(forms=("eager",), seconds=0.02, batch_sizes=(1,))
    rows = measure([str(tmp_path / "whole"), str(places["float32"])], settings).figures
    assert {row.form for row in rows} == {"PyTorch eager", "ONNX float32"}


@pytest.mark.filterwarnings("ignore:only .* of the trained weights")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if "mobile" in n else []) for n in ZOO],
)
def test_kfac_covers_every_linear_layer_and_convolution(name: str) -> None:
    torch.manual_seed(0)
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    size = {"img_size": 32} if fixed else {}
    model = timm.create_model(name, num_classes=3, in_chans=1, **ZOO[name], **size)
    nn.init.normal_(model.get_classifier().weight, std=0.01)  # no probability of exactly one
    optimizer = KFAC(model, 0.01, likelihood="categorical")
    images, labels = torch.rand(6, 1, 32, 32), torch.arange(6) % 3
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    rows = optimizer.summary().rows
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    left = {row.layer for row in rows if row.reason}
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert not left & {f"{layer}.weight", f"{layer}.bias"}
