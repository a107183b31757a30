import timm
import torch
from torch import nn

from smallfry import cost


def test_vitrm_small_costs_what_the_paper_implies():
    model = timm.create_model("vitrm_small_patch4_32", num_classes=10)
    spent = cost(model, torch.zeros(1, 3, 32, 32))
    assert spent.parameters == 3_624_971
    assert spent.bytes == 4 * 3_624_971
    tokens = 3 * 129 + 65  # rows through the block: three latent steps, one answer
    linear = 3 * tokens * (4 * 384**2 + 3 * 384 * 512)
    attention = 3 * 2 * 384 * (3 * 129**2 + 65**2)
    patches_and_heads = 64 * 48 * 384 + 384 * 10
    assert spent.macs == linear + attention + patches_and_heads
    assert round(spent.macs / 1e9, 2) == 1.73


def test_a_weight_used_twice_counts_once_but_its_arithmetic_twice():
    layer = nn.Linear(8, 8, bias=False)
    spent = cost(nn.Sequential(layer, layer), torch.zeros(5, 8))
    assert spent.parameters == 64
    assert spent.macs == 2 * 5 * 64


def test_activations_are_the_bytes_kept_for_the_backward_pass():
    # Linear keeps its input, ReLU its output; the second Linear keeps the same tensor again
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert cost(model, torch.zeros(10, 8)).activation_bytes == 10 * (8 + 16) * 4


def test_a_single_image_through_batch_normalisation_is_measured():
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4))
    assert cost(model, torch.zeros(1, 3, 8, 8)).activation_bytes > 3 * 64 * 4


def test_measuring_leaves_no_trace_on_model_or_random_state():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    cost(model, torch.randn(2, 3, 8, 8).mul_(0))
    torch.manual_seed(3)
    cost(model, torch.ones(2, 3, 8, 8))
    assert torch.equal(torch.rand(2), expected)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
