"""Batches of one image under batch norm: refused with what to change, before training begins."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smallfry.cli import main
from smallfry.errors import UsageError
from smallfry.tasks.task import Batch, micro_batch_sizes
from smallfry.training.batch_norm import require_enough_images
from smallfry.training.config import DataConfig, ModelConfig, TrainConfig
from smallfry.training.train import train

SAMPLE = torch.zeros(1, 1, 8, 8)


def net(last: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last
    )


@given(st.integers(1, 200), st.integers(1, 50))
def test_micro_batches_have_all_images_and_none_is_empty(images, parts):
    sizes = micro_batch_sizes(images, parts)
    assert sum(sizes) == images
    assert min(sizes) >= 1
    assert len(sizes) <= parts
    batch = Batch(torch.arange(images), {"any": [torch.arange(images)]})
    split = batch.split(parts)
    assert [len(part.inputs) for part in split] == sizes
    assert torch.equal(torch.cat([part.targets["any"][0] for part in split]), batch.inputs)
    assert [len(p) for p in torch.arange(images).split(-(-images // parts))] == sizes  # as ever


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "processes"),
    [(1, 1, 1), (5, 4, 1), (4, 4, 1), (3, 1, 2), (9, 2, 3), (10, 3, 3)],
)
def test_a_part_of_one_image_is_refused_where_training_would_fail(
    batch_size, accumulate, processes
):
    model = net(nn.BatchNorm1d(4))
    said = rf"batch_size {batch_size}.* the batch norm '4' needs at least two"
    with pytest.raises(UsageError, match=said) as caught:
        require_enough_images(model, SAMPLE, batch_size, accumulate, processes)
    assert ("accumulate 1" in str(caught.value)) is False
    assert (f"in {processes} processes" in str(caught.value)) == (processes > 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(SAMPLE)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 1), (4, 2), (6, 3), (5, 2), (5, 3)])
def test_parts_of_two_or_more_train(batch_size, accumulate):
    model = net(nn.BatchNorm1d(4))
    if 1 in micro_batch_sizes(batch_size, accumulate):
        with pytest.raises(UsageError):
            require_enough_images(model, SAMPLE, batch_size, accumulate)
    else:
        require_enough_images(model, SAMPLE, batch_size, accumulate)
        for size in micro_batch_sizes(batch_size, accumulate):
            model.train()(SAMPLE.expand(size, -1, -1, -1))


def test_one_image_is_enough_where_no_norm_is_left_with_one_value():
    for model in (net(nn.Identity()), net(nn.LayerNorm(4))):
        require_enough_images(model, SAMPLE, 1, 1)
        model.train()(SAMPLE)
    require_enough_images(net(nn.BatchNorm1d(4)), SAMPLE, 4, 1, 4, is_synchronized=True)


def test_looking_changes_no_model():
    model = net(nn.BatchNorm1d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError):
        require_enough_images(model, SAMPLE, 1, 1)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 5, "accumulate": 4}])
def test_a_run_is_refused_before_its_folder_is_made(options, tmp_path, capsys):
    config = TrainConfig(
        data=DataConfig(limit=20),
        model=ModelConfig("resnet10t"),
        epochs=1,
        references=False,
        run=tmp_path / "run",
        progress="quiet",
        **options,
    )
    with pytest.raises(UsageError, match="leaves a single image for a step"):
        train(config)
    assert not (tmp_path / "run").exists()
    command = ["train", "--data.limit", "20", "--model", "resnet10t", "--epochs", "1"]
    command += ["--run", str(tmp_path / "run"), "--references", "false", "--progress", "quiet"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    assert main(command) == 2
    assert "inside smallfry" not in capsys.readouterr().err


def test_a_recursive_model_trains_on_single_images(tmp_path):
    tiny = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}
    summary = train(
        TrainConfig(
            data=DataConfig(limit=12),
            model=ModelConfig(options=tiny),
            batch_size=3,
            accumulate=2,
            epochs=1,
            references=False,
            run=tmp_path / "run",
            progress="quiet",
        )
    )
    assert summary["measured"]["epochs"] == 1
