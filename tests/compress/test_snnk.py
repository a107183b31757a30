"""Random features in place of heads and MLPs: what is found, fitted, rebuilt and refused."""

import pytest
import timm
import torch
from torch import nn

from smallfry import compress, cost
from smallfry.errors import UsageError
from smallfry.layers.random_features import SNNKLinear
from smallfry.optim import KFAC
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.random_features import RandomFeatures

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SPEC = ModelSpec("vit_tiny_patch16_224", {**VIT, "num_classes": 3})


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def mlp(*extra):
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), *extra, nn.Linear(20, 3)).double()


def replaced(model, images, features=64, batches=None, **settings):
    return compress.apply_to_model(
        model,
        [compress.SNNK(features, **settings)],
        example=images[:2],
        batches=[images] if batches is None else batches,
    )


def test_a_pair_becomes_the_regression_of_its_outputs():
    model, images = mlp(), torch.randn(300, 6).double()
    small, _ = replaced(model, images, 40, batches=[images[:100], images[100:]])
    layer = small[2]
    assert isinstance(layer, SNNKLinear)
    phi = torch.cat([layer.features(images), torch.ones(300, 1).double()], dim=1)
    targets = model(images)
    expected = phi @ torch.linalg.lstsq(phi, targets).solution
    torch.testing.assert_close(small(images), expected, atol=1e-4, rtol=0)
    error = (small(images) - targets).square().mean() / targets.var()
    assert float(error) < 0.02
    assert cost(small, images).parameters == (40 + 1) * 3


def test_more_features_fit_better():
    model, images, fresh = mlp(), torch.randn(600, 6).double(), torch.randn(200, 6).double()
    errors = [
        float((replaced(model, images, m)[0](fresh) - model(fresh)).detach().square().mean())
        for m in (8, 32, 128)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_without_images_the_features_follow_from_the_weights():
    model, images = mlp(), torch.randn(4, 6).double()
    small, _ = replaced(model, images, 500, batches=[])
    start = SNNKLinear.from_dense(model[0], features=500, seed=0)
    torch.testing.assert_close(small(images), model[2](start(images)))


def test_dropout_between_the_layers_stays_and_trains():
    small, spec = replaced(mlp(nn.Dropout(0.5)), torch.randn(50, 6).double())
    assert isinstance(small[2], nn.Dropout)
    assert isinstance(small[3], SNNKLinear)
    assert spec.transforms[0].pairs == {
        "3": {"first": "0", "activation": "1", "features": 64, "seed": 0}
    }


class Branching(nn.Module):
    """Pairs that other layers need, too."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def forward(self, rows):
        hidden = self.act(self.first(rows))
        return self.second(hidden) + self.other(hidden)


class Skipping(nn.Module):
    """Pair whose hidden units something that is no module takes, too, or takes otherwise."""

    def __init__(self, use):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        self.use = use

    def forward(self, rows):
        return self.use(self.second, self.act(self.first(rows)))


@pytest.mark.parametrize(
    "model",
    [
        Branching(),
        Skipping(lambda second, hidden: second(hidden) + hidden),
        Skipping(lambda second, hidden: second(hidden.view(4, -1).T)),
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)),
        nn.Linear(4, 4),
    ],
    ids=["two takers", "a sum", "turned", "a norm between", "one layer"],
)
def test_other_layers_are_no_pairs(model):
    with pytest.raises(UsageError, match="no pair of linear layers"):
        replaced(model, torch.randn(4, 4))


def test_pairs_with_a_shared_weight_are_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    with pytest.raises(UsageError, match="no pair"):
        replaced(model, torch.randn(4, 4))
    names = {"first": "0", "activation": "1", "features": 4, "seed": 0}
    with pytest.raises(ValueError, match="shares its weight"):
        RandomFeatures({"2": names}).apply(model)


def test_the_mlps_of_a_transformer_are_replaced_rebuilt_and_trained():
    model, images = build(SPEC), torch.randn(40, 3, 32, 32)
    small, spec = compress.apply_to_model(
        model, [compress.SNNK(24)], spec=SPEC, example=images[:2], batches=[images]
    )
    assert set(spec.transforms[0].pairs) == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
    rebuilt = build(ModelSpec.from_dict(spec.to_dict()), small.state_dict())
    assert torch.equal(rebuilt(images), small(images))
    optimizer = KFAC(small.train(), lr=0.01, likelihood="categorical")
    covered = {layer for block in optimizer.blocks for layer in block.layers}
    assert "blocks.0.mlp.fc2.psi" in covered
    labels = torch.arange(40) % 3
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(small(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_patterns_choose_pairs_and_seeds_differ():
    model, images = timm.create_model("vit_tiny_patch16_224", **VIT), torch.randn(3, 3, 32, 32)
    _, spec = replaced(model, images, 8, include=("blocks.0.*",))
    assert list(spec.transforms[0].pairs) == ["blocks.0.mlp.fc2"]
    _, spec = replaced(model, images, 8)
    assert [pair["seed"] for pair in spec.transforms[0].pairs.values()] == [0, 1]


def test_replaced_layers_are_exported():
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    images = torch.randn(50, 6)
    small, _ = replaced(mlp().float(), images)
    program = torch.onnx.export(small, (images,), dynamo=True, verbose=False)
    onnx.checker.check_model(program.model_proto)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), small(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"features": 0}, "features must be"), ({"ridge": 0}, "ridge must be above 0")],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        compress.SNNK(**settings)


def test_an_example_is_needed():
    with pytest.raises(UsageError, match="example inputs"):
        compress.apply_to_model(mlp(), [compress.SNNK()])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({}, "names of the layers"),
        ({"2": {"first": "0"}}, "expected first, activation"),
        ({"9": {"first": "0", "activation": "1", "features": 4, "seed": 0}}, "no pair"),
        ({"2": {"first": "0", "activation": "1", "features": 0, "seed": 0}}, "features is"),
    ],
)
def test_wrong_descriptions_in_files_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        RandomFeatures(pairs).apply(mlp())
