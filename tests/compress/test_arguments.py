"""Arguments of compression in Python: what is refused by name, and what may stand for what."""

import pytest
import torch
from torch import nn

import smallfry
from smallfry import compress
from smallfry.errors import UsageError

INPUTS = torch.randn(4, 8)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (compress.LowRank(), "must be a list of settings"),
        ("low_rank", "must be a list of settings"),
        ([compress.LowRank], "a method is given by its settings"),
        (["low_rank"], "a method is given by its settings, such as .* not 'low_rank'"),
    ],
)
def test_methods_are_a_list_of_settings(model, methods, message):
    with pytest.raises(UsageError, match=message):
        compress.apply_to_model(model, methods)
    with pytest.raises(UsageError, match=message):
        compress.Session(model, methods, INPUTS, steps=1)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (INPUTS, "give a list of tensors, not Tensor"),
        ((each for each in [INPUTS]), "give a list of tensors, not generator"),
        ([(INPUTS, torch.arange(4))], r"must be a tensor of inputs, not tuple; without labels"),
    ],
)
def test_batches_are_tensors_that_can_be_read_again(model, batches, message):
    with pytest.raises(UsageError, match=message):
        compress.apply_to_model(model, [compress.Quantize(activations=8)], batches=batches)


def test_an_example_is_a_tensor(model):
    with pytest.raises(UsageError, match="example= must be a tensor of inputs, not ndarray"):
        compress.apply_to_model(model, [compress.Magnitude()], example=INPUTS.numpy())


def test_channels_are_cut_before_layers_are_quantized(model):
    methods = [compress.Quantize(), compress.Magnitude()]
    with pytest.raises(UsageError, match="as quantize does, put this one before it"):
        compress.apply_to_model(model, methods, example=INPUTS, batches=[INPUTS])


def test_a_session_finishes_once_after_whole_steps(model):
    with pytest.raises(UsageError, match=r"steps must be a whole number, not 1.5"):
        compress.Session(model, [compress.LowRank()], INPUTS, steps=1.5)
    session = compress.Session(model, [compress.LowRank()], INPUTS, steps=1)
    session.finish()
    with pytest.raises(UsageError, match="the model is compressed already"):
        session.finish()


def test_a_model_of_ones_own_is_no_trained_one(model, tmp_path):
    with pytest.raises(UsageError, match=r"not Sequential; .* take compress.apply_to_model"):
        compress.apply(model, [compress.LowRank()])
    with pytest.raises(UsageError, match=r"not Sequential; torch.onnx.export takes models"):
        smallfry.export(model, tmp_path / "export")
    with pytest.raises(UsageError, match="not int"):
        smallfry.load(3)
    assert not list(tmp_path.iterdir())
