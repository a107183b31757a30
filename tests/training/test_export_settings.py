"""Settings that methods pass on are those of the functions that take them."""

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
from torch import nn

import smallfry
from smallfry.compress.coding.circuits import HCLT
from smallfry.compress.coding.em import EMConfig, EMSettings
from smallfry.layers.biper import BinaryConv2d, BinaryLinear
from smallfry.training.export_settings import ExportSettings


def test_an_exports_settings_are_those_of_the_function():
    parameters = dict(inspect.signature(smallfry.export).parameters)
    for given in ("run", "folder"):
        del parameters[given]
    hints = get_type_hints(smallfry.export)
    assert get_type_hints(ExportSettings) == {name: hints[name] for name in parameters}


def test_the_settings_of_a_fit_are_those_of_expectation_maximisation():
    hints = get_type_hints(EMConfig)
    wanted = {f.name: hints[f.name] for f in fields(EMConfig) if f.name not in ("states", "epochs")}
    assert get_type_hints(EMSettings) == wanted
    samples = torch.arange(8).remainder(2).view(4, 2).numpy()
    with pytest.raises(TypeError, match="patience"):
        HCLT.fit(samples, 2, 1, patience=3)


def test_binary_layers_take_what_dense_ones_take():
    names = set(inspect.signature(nn.Conv2d).parameters) - {"bias"}
    assert names <= set(inspect.signature(BinaryConv2d).parameters)
    assert set(inspect.signature(nn.Linear).parameters) - {"bias"} <= set(
        inspect.signature(BinaryLinear).parameters
    )
    layer = BinaryConv2d(4, 8, 3, 2, 1, groups=2, padding_mode="reflect", dtype=torch.float64)
    dense = nn.Conv2d(4, 8, 3, 2, 1, groups=2, padding_mode="reflect", dtype=torch.float64)
    images = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    assert layer(images).shape == dense(images).shape
    assert layer.alpha.dtype == torch.float64
    with torch.no_grad():
        layer.eval().alpha.fill_(1.0)
        dense.weight.copy_(layer.periodic())
        dense.bias.zero_()
        torch.testing.assert_close(layer(images), dense(images.sign()), rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="bias"):
        BinaryLinear(3, 4, bias=True)
