import pytest
import timm
import torch
from torch import nn

from smallfry import compress, cost
from smallfry.costing import layer_macs, macs


def test_vitrm_small_costs_what_its_rows_cost():
    model = timm.create_model("vitrm_small_patch4_32", num_classes=10)
    spent = cost(model, torch.zeros(1, 3, 32, 32))
    assert spent.parameters == 3_624_971
    assert spent.bytes == 4 * 3_624_971
    dim, x, y, z = 384, 64, 1, 64  # three latent steps on x + y + z rows, one answer on y + z
    projected = (x + y + 4 * z) + 3 * 2 * (x + y + z) + 2 * (y + z)
    kept = 3 * (2 * (x + y + z) + z) + 2 * (y + z) + y  # a last layer gives the wanted rows alone
    linear = projected * 3 * dim**2 + kept * (dim**2 + 3 * dim * 512)
    pairs = 3 * (2 * (x + y + z) + z) * (x + y + z) + (2 * (y + z) + y) * (y + z)
    patches_and_heads = x * 48 * dim + dim * 10
    assert spent.macs == linear + 2 * dim * pairs + patches_and_heads
    assert round(spent.macs / 1e9, 2) == 1.45


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


def test_a_model_without_numbers_costs_the_same():
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())

    with torch.device("meta"):
        empty, image = build(), torch.zeros(1, 3, 8, 8)
    assert cost(empty, image) == cost(build(), torch.zeros(1, 3, 8, 8))


class Twice(nn.Module):
    """A shared layer within two modules, with a product of its own."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(8, 8, bias=False)
        self.first, self.second = nn.Sequential(layer), nn.Sequential(layer, nn.ReLU())

    def forward(self, x):
        return self.second(self.first(x)) @ torch.ones(8, 2)


def test_macs_of_layers_are_those_of_all_calls_without_layers_inside():
    model, images = Twice().train(), torch.zeros(3, 8)
    assert layer_macs(model, images) == {"first.0": 2 * 3 * 64, "": 3 * 8 * 2}
    assert model.training


def test_macs_of_layers_add_up_to_those_of_a_recursive_model():
    model, image = timm.create_model("vitrm_micro_patch4_8"), torch.zeros(1, 1, 8, 8)
    found = layer_macs(model, image)
    assert sum(found.values()) == cost(model, image).macs
    assert found["head"] == model.head.weight.numel()
    assert found["blocks.0.attn"] > 0  # the products of queries, keys and values


class Attention(nn.Module):
    """Self-attention alone."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, rows):
        return self.inner(rows, rows, rows, need_weights=False)[0]


PROJECTIONS, PRODUCTS = 10 * 4 * 16 * 16, 2 * 10 * 10 * 16  # of ten tokens


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (lambda: nn.LSTM(16, 8, batch_first=True), 10 * 4 * 8 * (16 + 8)),
        (lambda: nn.GRU(16, 8, batch_first=True), 10 * 3 * 8 * (16 + 8)),
        (Attention, PROJECTIONS + PRODUCTS),
        (
            lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
            PROJECTIONS + PRODUCTS + 10 * 2 * 16 * 32,
        ),
    ],
)
def test_fused_kernels_count_as_what_they_compute(build, wanted, device):
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    model, rows = build().to(device), torch.zeros(1, 10, 16, device=device)
    assert macs(model, rows) == sum(layer_macs(model, rows).values()) == wanted
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == before


def test_layers_that_hooks_would_change_are_counted_as_they_run():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    rows = torch.randn(500, 64)
    method = compress.TensorTrain(keep=0.5, include=["0"], smallest=1)
    small, _ = compress.apply_to_model(model, [method], example=rows[:2])
    assert sum(layer_macs(small, rows).values()) == macs(small, rows)
