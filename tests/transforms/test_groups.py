"""Channel groups: cutting a channel equals setting it to zero."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

from smallfry import cost
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.transforms import ModelSpec, build, traced
from smallfry.transforms.declared import mlp_group
from smallfry.transforms.find import find_groups
from smallfry.transforms.groups import cut, mask

pytest.importorskip("torch_pruning", reason="groups of convolutions are found by Torch-Pruning")

MODELS = {
    "vitrm_micro_patch4_8": ({"num_classes": 10}, (1, 8, 8)),
    "vitrm_plus_micro_8": ({"num_classes": 10}, (1, 8, 8)),
    "cct_2_3x2_32": ({"num_classes": 10}, (3, 32, 32)),
    "resnet18_cifar": ({"num_classes": 10}, (3, 32, 32)),
    "resnet8_mlperf_tiny": ({"num_classes": 10}, (3, 32, 32)),
    "resnet20_he": ({"num_classes": 10}, (3, 32, 32)),
    "mobilenetv3_small_050": ({"num_classes": 10}, (3, 32, 32)),
    "vit_tiny_patch16_224": ({"num_classes": 10, "img_size": 32, "depth": 2}, (3, 32, 32)),
}


def perturbed(model):
    """No weight or statistic at its first value, as zeros and ones hide faults."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = 0.1 * torch.randn_like(tensor)
                tensor.add_(noise.abs() if "running_var" in name else noise)
    return model.eval()


LONG = ("vitrm_plus_micro_8", "resnet18_cifar", "vit_tiny_patch16_224")


@pytest.fixture(
    scope="module",
    params=[pytest.param(m, marks=pytest.mark.slow) if m in LONG else m for m in MODELS],
)
def found(request):
    """A model with its spec, an example in float64, and its groups."""
    arguments, shape = MODELS[request.param]
    spec = ModelSpec(request.param, arguments)
    model = perturbed(build(spec))
    torch.manual_seed(0)
    example = torch.randn(2, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmallfryWarning)
        groups = find_groups(model, example)
    return spec, model, example, groups


def some(group):
    """Channels to keep: about two of three, the first one cut."""
    return torch.tensor([c for c in range(group.channels) if c % 3])


def gone(group):
    return torch.tensor([c for c in range(group.channels) if c % 3 == 0])


@pytest.mark.slow
def test_all_groups_cut_together_equal_all_masked(found):
    spec, model, example, groups = found
    assert groups
    model, example = copy.deepcopy(model).double(), example.double()
    small = copy.deepcopy(model)
    keep = {group.name: some(group) for group in groups}
    for group in groups:
        mask(model, group, gone(group))
    transform = cut(small, groups, keep)
    expected, given = model(example), small(example)
    torch.testing.assert_close(given, expected, atol=1e-10, rtol=1e-10)
    assert cost(small, example).parameters < cost(model, example).parameters
    rebuilt = build(spec.then(transform), small.state_dict()).double()
    assert torch.equal(rebuilt(example), given)


def test_both_equal_in_training_mode_too(found):
    _, model, example, groups = found
    model = copy.deepcopy(model).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in model.modules():
        if type(module).__name__ == "Attention" and hasattr(module, "drop"):
            module.drop = 0.0
    small = copy.deepcopy(model)
    for group in groups:
        mask(model, group, gone(group))
    cut(small, groups, {group.name: some(group) for group in groups})
    torch.manual_seed(0)
    expected = model(example.double())
    torch.manual_seed(0)
    given = small(example.double())
    for one, other in zip(_tensors(given), _tensors(expected), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    sizes = {name: len(b) for name, b in small.named_buffers() if name.endswith("running_mean")}
    assert all(size > 0 for size in sizes.values())


def _tensors(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else [t for t in outputs if t is not None]


def test_most_of_a_convolutional_net_can_be_cut(found):
    spec, model, _, groups = found
    if spec.architecture in ("resnet18_cifar", "mobilenetv3_small_050"):
        names = {each.tensor for group in groups for each in group.cut}
        weights = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        assert all(f"{name}.weight" in names for name in weights)


def test_heads_and_hidden_units_of_a_shared_block_are_found_once_each(found):
    spec, _, _, groups = found
    if spec.architecture == "vitrm_micro_patch4_8":
        sizes = [(group.name, group.channels) for group in groups]
        blocks = [f"blocks.{i}" for i in range(3)]
        heads = [(f"{b}.attn.qkv", 4) for b in blocks]
        units = [(f"{b}.mlp.fc1", 96) for b in blocks]
        assert sorted(sizes) == sorted(heads + units)


def mlp(activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), activation, nn.Linear(8, 3)).double()


def test_units_behind_an_activation_that_is_not_zero_at_zero_are_marked():
    model, example = mlp(nn.Sigmoid()), torch.randn(4, 5).double()
    group = mlp_group("0", "2", model, model[1])
    assert not group.zero_invariant
    small = copy.deepcopy(model)
    cut(small, [group], {group.name: some(group)})
    mask(model, group, gone(group))
    assert (model(example) - small(example)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Hardswish(), nn.ELU()]
)
def test_units_behind_other_activations_are_cut_without_a_difference(activation):
    model, example = mlp(activation), torch.randn(4, 5).double()
    group = mlp_group("0", "2", model, activation)
    small = copy.deepcopy(model)
    cut(small, [group], {group.name: some(group)})
    mask(model, group, gone(group))
    torch.testing.assert_close(small(example), model(example), atol=1e-12, rtol=0)
    assert sum(p.numel() for p in small.parameters()) == 5 * 5 + 5 + 5 * 3 + 3


class Lying(nn.Module):
    """A block that declares a group which is none."""

    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, rows):
        return self.fc2(self.norm(self.fc1(rows)))

    def channel_groups(self):
        return [mlp_group("fc1", "fc2", self, None)]


def test_a_group_that_does_not_hold_is_left_out_with_its_reason():
    with pytest.warns(SmallfryWarning, match="are kept.*fc1"):
        assert find_groups(Lying(), torch.randn(2, 4)) == ()


def test_a_graph_that_never_ends_is_given_up(monkeypatch):
    def endless(*_):
        while True:
            pass

    monkeypatch.setattr(traced, "_groups", endless)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.warns(SmallfryWarning, match="longer than 0.1 s"):
        assert traced.traced_groups(model, torch.zeros(1, 1, 8, 8), seconds=0.1) == []


def test_a_model_whose_layers_are_called_again_is_not_traced(monkeypatch):
    layer = nn.Linear(4, 4)
    monkeypatch.setattr(traced, "_groups", lambda *_: pytest.fail("it was"))
    assert traced.traced_groups(nn.Sequential(layer, layer), torch.zeros(2, 4)) == []


@pytest.mark.parametrize(
    ("model", "shape", "names"),
    [
        (
            nn.Sequential(
                *(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 6, 3, groups=6)),
                *(nn.Conv1d(6, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)),
            ),
            (2, 10),
            ["3", "4"],  # the depthwise one, with what leads to it
        ),
        (
            nn.Sequential(
                *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 9, 2, stride=2)),
                *(nn.BatchNorm2d(9), nn.ReLU(), nn.ConvTranspose2d(9, 2, 2, bias=False)),
            ),
            (2, 5, 5),
            ["0", "2"],
        ),
        (
            nn.Sequential(nn.Conv3d(1, 6, 2), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 2, 2)),
            (1, 4, 4, 4),
            ["0"],
        ),
    ],
)
def test_convolutions_of_every_kind_are_cut(model, shape, names):
    model, example = perturbed(copy.deepcopy(model)), torch.randn(2, *shape)
    before = copy.deepcopy(model)
    groups = find_groups(model, example)
    assert sorted(group.name for group in groups) == names
    small = copy.deepcopy(model)
    resize = cut(small, groups, {group.name: some(group) for group in groups})
    for group in groups:
        mask(model, group, gone(group))
    torch.testing.assert_close(small(example), model(example), atol=1e-5, rtol=1e-5)
    resize.apply(before)  # as a file is read: shapes first
    before.load_state_dict(small.state_dict())
    assert torch.equal(before(example), small(example))
    for name in names:
        assert len(before.get_submodule(name).bias) == before.get_submodule(name).out_channels


class Recurrent(nn.Module):
    """Two linear layers, and a recurrent one between them."""

    def __init__(self, kind, **options):
        super().__init__()
        self.first, self.rnn = nn.Linear(2, 6), kind(6, 3, batch_first=True, **options)
        self.last = nn.Linear(self.rnn(torch.zeros(1, 1, 6))[0].shape[-1], 4)
        self.head = nn.Linear(4, 5)

    def forward(self, rows):
        return self.head(self.last(self.rnn(self.first(rows))[0]))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_are_named_as_they_stay_and_layers_around_them_are_cut(kind, options):
    model, rows = Recurrent(kind, **options).eval(), torch.randn(2, 4, 2)
    with pytest.warns(SmallfryWarning, match=r"recurrent layers keep all .* \(rnn\)") as found:
        groups = find_groups(model, rows)
    assert len(found) == 1
    assert {group.name: group.channels for group in groups} == {"first": 6, "last": 4}
    small = copy.deepcopy(model)
    resize = cut(small, groups, {"first": torch.tensor([1, 4]), "last": torch.tensor([0, 1, 3])})
    for group, gone in zip(groups, ([2], [0, 2, 3, 5]), strict=True):
        mask(model, group, torch.tensor(gone))
    torch.testing.assert_close(small(rows), model(rows))
    assert small.rnn.input_size == 2
    again = Recurrent(kind, **options).eval()
    resize.apply(again)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(rows), small(rows))


def test_heads_and_hidden_units_of_trm_are_cut():
    options = {"embed_dim": 12, "num_heads": 3, "mlp_hidden_dim": 9, "depth": 2}
    options |= {"rounds": 1, "recursion_steps": 2, "latent_steps": 2, "prefix": 2}
    spec = ModelSpec("trm_sudoku4_micro", {"num_classes": 6, **options, "token_mlp": False})
    model, grids = perturbed(build(spec)).double(), torch.arange(32).view(2, 1, 4, 4) % 6
    groups = find_groups(model, grids.double())
    assert [(group.name, group.channels) for group in groups] == [
        (f"blocks.{layer}.{name}", count)
        for layer in range(2)
        for name, count in (("mixer.qkv", 3), ("mlp.fc1", 9))
    ]
    small = copy.deepcopy(model)
    transform = cut(small, groups, {group.name: some(group) for group in groups})
    for group in groups:
        mask(model, group, gone(group))
    torch.testing.assert_close(small(grids.double()), model(grids.double()))
    assert small.blocks[0].mixer.mix.heads == 2
    again = build(spec.then(transform), small.state_dict()).double()
    assert torch.equal(again(grids.double()), small(grids.double()))


def test_wrong_names_and_empty_groups_are_refused():
    model = mlp(nn.ReLU())
    group = mlp_group("0", "2", model, model[1])
    with pytest.raises(UsageError, match="unknown group of channels 'x'"):
        cut(model, [group], {"x": torch.tensor([0])})
    with pytest.raises(UsageError, match="no channel left"):
        cut(model, [group], {"0": torch.tensor([], dtype=torch.int64)})


def test_the_head_and_the_features_of_a_cut_timm_model_still_fit(found):
    spec, model, example, groups = found
    if spec.architecture in ("resnet18_cifar", "vit_tiny_patch16_224", "cct_2_3x2_32"):
        small = copy.deepcopy(model)
        cut(small, groups, {group.name: some(group) for group in groups})
        small.reset_classifier(7)
        assert small(example).shape == (2, 7)


def channels(features):
    """Of maps (batch, channels, height, width) or tokens (batch, tokens, channels)."""
    return features.shape[1 if features.ndim == 4 else -1]


def test_attributes_of_a_cut_model_count_what_there_is(found):
    spec, model, example, groups = found
    small = copy.deepcopy(model)
    resize = cut(small, groups, {group.name: some(group) for group in groups})
    seen = {}
    infos = getattr(small, "feature_info", [])
    for info in infos:
        small.get_submodule(info["module"]).register_forward_hook(
            lambda module, inputs, output, name=info["module"]: seen.update({name: output})
        )
    features = small.forward_features(example)
    assert small.num_features == channels(features)
    assert small.head_hidden_size == small.forward_head(features, pre_logits=True).shape[-1]
    assert [info["num_chs"] for info in infos] == [channels(seen[i["module"]]) for i in infos]
    again = build(spec.then(resize))
    for name in ("num_features", "head_hidden_size", "feature_info"):
        assert getattr(again, name, None) == getattr(small, name, None)
    if spec.architecture != "resnet20_he" and spec.architecture.startswith(("resnet", "mobilenet")):
        before = build(spec)
        assert small.num_features < before.num_features
        assert all(
            one["num_chs"] < other["num_chs"]
            for one, other in zip(infos[1:], before.feature_info[1:], strict=True)
        )


def test_groups_need_no_classifier():
    model = timm.create_model("resnet10t", num_classes=0)
    assert find_groups(model, torch.zeros(2, 3, 32, 32))


class Branch(nn.Module):
    """Residual branch whose last norm starts at zero, around a function that moves zero."""

    def __init__(self, act):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.end = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.act = nn.Conv2d(8, 4, 1), act
        nn.init.zeros_(self.end.weight)

    def forward(self, images):
        images = self.act(self.norm(self.first(images)))
        return self.last(images + self.end(self.inner(images)))


def test_a_branch_that_starts_at_zero_hides_no_fault():
    images = torch.randn(2, 3, 8, 8)
    with pytest.warns(SmallfryWarning, match="are kept.*outputs masked and cut differ"):
        assert find_groups(Branch(nn.Softplus()), images) == ()
    (group,) = find_groups(Branch(nn.ReLU()), images)
    assert group.channels == 8
