"""Costs of models on the device "meta", as ``smallfry models`` measures them."""

import pytest
import timm
import torch

from smallfry import cost
from smallfry.cli.models import measure

# one model of each file, the last by name: among those of TRM not the slowest; kits are not listed
OF_EACH_FILE = {
    module: name
    for name in timm.list_models()
    if (module := timm.models.model_entrypoint(name).__module__).startswith("smallfry.models.")
}


@pytest.mark.parametrize("name", [*OF_EACH_FILE.values()])
def test_a_model_of_each_file_is_measured_without_values(name):
    with torch.device("meta"):
        image = torch.zeros(1, *timm.get_pretrained_cfg(name).input_size)
        spent = measure(timm.create_model(name), image)
    assert spent.parameters == sum(p.numel() for p in timm.create_model(name).parameters())
    assert spent.bytes >= 4 * spent.parameters
    assert spent.macs > 0
    assert spent.activation_bytes > image.numel()


def test_early_exits_cost_as_much_without_values_as_with_them():
    model, image = timm.create_model("loopnet_anytime_240k"), torch.zeros(1, 3, 32, 32)
    with torch.device("meta"):
        bare = timm.create_model("loopnet_anytime_240k")
    assert cost(bare, image.to("meta")) == cost(model, image)
