"""AdamATan2 takes the reference's steps, with the bias correction on either side of atan2."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from smallfry.errors import UsageError
from smallfry.optim import AdamATan2
from smallfry.training.config import OptimizerConfig
from smallfry.training.optimization import build_optimizer

FACTS = json.loads((Path(__file__).parents[1] / "models" / "golden" / "trm.json").read_text())[
    "adam_atan2"
]


def s(name):
    import zlib

    import numpy as np

    h = np.arange(1, 7, dtype=np.uint64) * 0x9E3779B1
    h = (h + zlib.crc32(name.encode()) * 0x85EBCA6B) & 0xFFFFFFFF
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        h = ((h ^ (h >> np.uint64(shift))) * factor) & 0xFFFFFFFF
    return torch.from_numpy(h / 2**31 - 1)


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_its_steps_are_the_references(place):
    weight = nn.Parameter(s("param"))
    optimizer = AdamATan2(
        [weight], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, bias_correction=place
    )
    for number, wanted in enumerate(FACTS[f"bias_correction_{place}"], 1):
        weight.grad = s(f"grad{number}")
        optimizer.step()
        assert_close(weight.detach(), torch.tensor(wanted, dtype=torch.float64), atol=1e-9, rtol=0)


def test_its_step_has_no_scale_and_its_state_resumes():
    def moved(scale, parted=False):
        weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        optimizer = AdamATan2([weight], lr=0.1)
        for number in range(6):
            if parted and number == 3:
                kept = optimizer.state_dict()
                optimizer = AdamATan2([weight], lr=0.1)
                optimizer.load_state_dict(kept)
            optimizer.zero_grad()
            loss = scale * (weight - 0.5).square().sum()
            optimizer.step(lambda loss=loss: loss.backward() or loss)
        return weight.detach()

    scaled = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for weight, scale in zip(scaled, (1.0, 1.27), strict=True):
        weight.grad = torch.ones(1)
        AdamATan2([weight], lr=0.1, bias_correction="inside", scale=scale).step()
    assert scaled[1].item() == pytest.approx(1.27 * scaled[0].item())
    assert scaled[1].item() == pytest.approx(-0.1, rel=0.01)
    assert_close(moved(1e6), moved(1.0))
    assert torch.equal(moved(1.0, parted=True), moved(1.0))
    assert AdamATan2([nn.Parameter(torch.ones(1))]).step(lambda: 3.0) == 3.0  # nothing to move


def test_the_table_of_training_has_it():
    model = nn.Sequential(nn.Linear(2, 3))
    config = OptimizerConfig(
        "adam_atan2", lr=0.01, weight_decay=0.1, options={"bias_correction": "inside"}
    )
    built = build_optimizer(config, model)
    assert isinstance(built, AdamATan2)
    assert sorted(group["weight_decay"] for group in built.param_groups) == [0.0, 0.1]
    assert built.defaults["bias_correction"] == "inside"
    everything = build_optimizer(
        OptimizerConfig("adam_atan2", decay="all", betas=(0.8, 0.9)), model
    )
    assert {group["weight_decay"] for group in everything.param_groups} == {0.05}
    assert everything.defaults["betas"] == (0.8, 0.9)
    fast = build_optimizer(OptimizerConfig("adam_atan2", bias_rate=2.0), model)
    assert sorted(group.get("lr_scale", 1.0) for group in fast.param_groups) == [1.0, 2.0]
    with pytest.raises(UsageError, match="can't be built: bias_correction is outside or inside"):
        build_optimizer(OptimizerConfig("adam_atan2", options={"bias_correction": "no"}), model)


@pytest.mark.parametrize("settings", [{"lr": -1}, {"weight_decay": -1}, {"betas": (1.0, 0.9)}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"negative|betas"):
        AdamATan2([nn.Parameter(torch.zeros(1))], **settings)
