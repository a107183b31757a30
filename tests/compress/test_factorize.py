"""Factorisation: the metric of the curvature, shares by divergence, sharing, bits and a start."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry import compress, cost
from smallfry.compress.factorize.low_rank import nearest_of_rank
from smallfry.compress.factorize.method import allocate, candidates, sensitivity_profile
from smallfry.compress.quantize.sensitivity import curvature, kronecker_sensitivity
from smallfry.deploy.export import export
from smallfry.errors import UsageError
from smallfry.layers.cp import CP
from smallfry.layers.low_rank import LowRank
from smallfry.layers.quantized import QuantizedWeight
from smallfry.layers.tensor_train import TensorTrain
from smallfry.training.augment import Normalize
from smallfry.training.method import from_dict, to_dict
from smallfry.training.run import TrainedModel
from smallfry.transforms import ModelSpec, build
from smallfry_runtime import Runtime

VITRM = ModelSpec("vitrm_micro_patch4_8", {"num_classes": 4, "drop_rate": 0.0})
MODELS = {
    "vitrm_micro_patch4_8": (1, 8),
    "cct_2_3x2_32": (3, 32),
    "resnet8_mlperf_tiny": (3, 32),
    "mobilenetv3_small_050": (3, 32),
}
METHODS = {
    "low_rank": compress.LowRank(keep=0.4),
    "tensor_train": compress.TensorTrain(keep=0.4),
    "three cores": compress.TensorTrain(keep=0.4, cores=3),
    "cp": compress.CP(smallest=16),
}


def trained_like(name):
    """An untrained model, in the place of a trained one."""
    channels, size = MODELS[name]
    spec = ModelSpec(name, {"num_classes": 4})
    sample = {"size": size, "channels": channels, "mean": [0.5] * channels, "std": [0.2] * channels}
    manifest = {
        "model": spec.to_dict(),
        "classes": [*"abcd"],
        "input": sample,
        "data": {"name": "none", "fingerprint": "none"},
    }
    normalize = Normalize(sample["mean"], sample["std"])
    return TrainedModel(build(spec), tuple("abcd"), size, channels, normalize, manifest)


def moment(size, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank or 3 * size, size, generator=generator, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def weighted(error, inputs, outputs):
    return float(torch.einsum("oi,op,pj,ji->", error, outputs, error, inputs))


# The metric of the curvature


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    return weight, moment(9, 1), moment(7, 2)


@pytest.mark.parametrize("rank", range(1, 8))
def test_the_error_is_the_sum_of_the_whitened_singular_values_left_out(problem, rank):
    weight, inputs, outputs = problem
    found = nearest_of_rank(weight, inputs, outputs, rank, damping=0)
    assert torch.linalg.matrix_rank(found) == rank
    whitened = torch.linalg.cholesky(outputs).T @ weight @ torch.linalg.cholesky(inputs)
    left_out = torch.linalg.svdvals(whitened)[rank:].square().sum()
    error = weighted(found - weight, inputs, outputs)
    assert error == pytest.approx(float(left_out), abs=1e-9)


def test_no_descent_finds_a_better_matrix_of_the_rank(problem):
    weight, inputs, outputs = problem
    best = weighted(nearest_of_rank(weight, inputs, outputs, 3, 0) - weight, inputs, outputs)
    plain = nearest_of_rank(weight, torch.eye(9), torch.eye(7), 3, 0)
    u, s, v = torch.linalg.svd(plain)
    left = (u[:, :3] * s[:3]).contiguous().requires_grad_()
    right = v[:3].clone().requires_grad_()
    optimizer = torch.optim.LBFGS([left, right], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        error = left @ right - weight
        value = torch.einsum("oi,op,pj,ji->", error, outputs, error, inputs)
        value.backward()
        right.grad = right.grad.contiguous()
        return value

    assert loss().item() > 1.05 * best  # the plain decomposition is not the minimum
    optimizer.step(loss)
    assert loss().item() == pytest.approx(best, rel=1e-4)


def test_equal_curvature_gives_the_plain_decomposition(problem):
    weight = problem[0]
    found = nearest_of_rank(weight, 3 * torch.eye(9), 0.1 * torch.eye(7), 2)
    layer = nn.Linear(9, 7).double()
    layer.weight.data = weight
    plain = LowRank.from_dense(layer, rank=2).dense().weight
    torch.testing.assert_close(found, plain.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("zero", [False, True])
def test_singular_curvature_gives_a_finite_matrix(problem, zero):
    weight, inputs = problem[0], moment(9, 1, rank=2)
    outputs = torch.zeros(7, 7) if zero else moment(7, 2, rank=1)
    found = nearest_of_rank(weight.float(), inputs.float(), outputs.float(), 3)
    assert found.isfinite().all()
    plain = nearest_of_rank(weight, torch.eye(9), torch.eye(7), 3)
    others = outputs.double()
    if not zero:
        assert weighted(found - weight, inputs, others) < weighted(plain - weight, inputs, others)


def test_of_one_layer_with_squared_loss_it_is_the_change_of_the_loss():
    torch.manual_seed(0)
    rows, layer = torch.randn(50, 9) @ torch.randn(9, 9), nn.Linear(9, 7)
    inputs, outputs = rows.T @ rows / 50, torch.eye(7)
    targets = layer(rows)
    losses = {}
    for name, metric in (("weights", torch.eye(9)), ("curvature", inputs)):
        found = nearest_of_rank(layer.weight.detach(), metric, outputs, 3, damping=1e-9)
        found = found.float()
        losses[name] = (F.linear(rows, found, layer.bias) - targets).square().sum().item() / 50
        error = (found - layer.weight).detach()[None]
        wanted = 2 * kronecker_sensitivity(error, inputs[None], outputs[None])
        assert losses[name] == pytest.approx(wanted, rel=1e-4)
    assert losses["curvature"] < 0.9 * losses["weights"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build(VITRM)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(32, 1, 8, 8)


MLP = {"keep": 0.4, "include": ("*.mlp.*", "*.attn.*")}


def test_every_layer_changes_the_loss_less_than_the_plain_decomposition(model, images):
    known = curvature(model, [images], traces=False)
    totals = {}
    for metric in ("weights", "curvature"):
        settings = compress.LowRank(**MLP, metric=metric)
        small, _ = compress.apply_to_model(model, [settings], batches=[images])
        totals[metric] = {
            name: kronecker_sensitivity(
                (layer.dense().weight - model.get_submodule(name).weight).detach()[None],
                known[name].inputs,
                known[name].outputs,
            )
            for name, layer in small.named_modules()
            if isinstance(layer, LowRank)
        }
    assert len(totals["weights"]) == 12
    for name, plain in totals["weights"].items():
        assert totals["curvature"][name] < plain


# Shares by divergence


def test_a_profile_is_the_divergence_of_each_layer_alone(model, images):
    settings = compress.TensorTrain(**MLP)
    layers = candidates(model, settings, lambda layer: settings.choose(layer, 0.5))
    name = "blocks.0.mlp.fc2"
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = sensitivity_profile(model, settings, layers, [images[:9], images[9:]], None, (0.2, 0.7))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert found.keys() == layers.keys()
    for share, divergence in found[name].items():
        alone = compress.TensorTrain(keep=share, include=(name,))
        small, _ = compress.apply_to_model(model, [alone])
        one, other = (m(images).double().log_softmax(1) for m in (model, small))
        wanted = (one.exp() * (one - other)).sum(1).mean().item()
        assert divergence == pytest.approx(wanted, rel=1e-3)
    assert all(each[0.2] > each[0.7] for each in found.values())


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_shares_meet_the_budget_and_beat_equal_ones(keep):
    layers = {"a": nn.Linear(32, 32), "b": nn.Linear(64, 32), "c": nn.Linear(32, 96)}
    settings = compress.LowRank(keep=keep, smallest=1)
    shares = [tenths / 10 for tenths in range(1, 10)]
    falling = {"a": 1.0, "b": 0.1, "c": 0.4}
    profile = {n: {s: falling[n] * (1 - s) ** 2 for s in shares} for n in layers}
    found = allocate(settings, layers, profile)
    assert list(found) == ["a", "b", "c"]
    assert set(found.values()) <= {*shares, 1.0}
    sizes = {n: each.weight.numel() for n, each in layers.items()}
    chosen = {n: settings.choose(layers[n], s) for n, s in found.items() if s < 1}
    small = {n: LowRank.like(layers[n], **each).reduce.weight for n, each in chosen.items()}
    kept = {n: len(w) * sum(layers[n].weight.shape) for n, w in small.items()}
    assert sum((sizes | kept).values()) <= keep * sum(sizes.values())
    total = sum(profile[n].get(s, 0.0) for n, s in found.items())
    assert total < sum(profile[n][keep] for n in layers)
    assert found["a"] > found["b"]


def test_a_budget_below_all_shares_names_the_setting():
    settings = compress.LowRank(keep=0.01, smallest=1)
    layers = {"a": nn.Linear(32, 32)}
    with pytest.raises(UsageError, match=r"low_rank.keep=0.01: the budget of 10 can't be met"):
        allocate(settings, layers, {"a": {0.1: 1.0, 0.5: 0.5}})


@pytest.mark.parametrize("kind", [compress.LowRank, compress.TensorTrain])
def test_shares_of_a_model_are_reported_and_keep_the_budget(model, images, kind):
    reports = []
    settings = kind(**MLP, allocation="divergence")
    small, spec = compress.apply_to_model(
        model, [settings], spec=VITRM, batches=[images], reports=reports
    )
    (report,) = reports
    lines, profile = report["layers"], report["profile"]["layers"]
    assert len(profile) == 12
    assert all(each["1"] == 0 for each in profile.values())  # dense
    chosen = report["profile"]["chosen"]
    assert all(chosen[name] in each for name, each in profile.items())
    assert {line["name"] for line in lines} == {name for name in chosen if chosen[name] != "1"}
    total = sum(model.get_submodule(name).weight.numel() for name in profile)
    saved = sum(x["parameters"]["before"] - x["parameters"]["after"] for x in lines)
    assert 0.3 * total < total - saved <= 0.4 * total
    assert all(0 < line["weight_error"] < 1 for line in lines)
    assert len({line["parameters"]["after"] / line["parameters"]["before"] for line in lines}) > 1
    assert torch.equal(build(spec, small.state_dict())(images), small(images))


# All factorisations


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_factorised_model_is_rebuilt_to_the_bit(name, method):
    channels, size = MODELS[name]
    spec, settings = ModelSpec(name, {"num_classes": 4}), METHODS[method]
    model, example = build(spec), torch.randn(2, channels, size, size)
    small, found = compress.apply_to_model(model, [settings], spec=spec)
    (transform,) = found.transforms
    assert transform.layer == settings.name
    assert all(isinstance(small.get_submodule(n), settings.layer) for n in transform.settings)
    again = build(ModelSpec.from_dict(found.to_dict()), small.state_dict())
    assert torch.equal(again(example), small(example))
    assert cost(small, example).parameters < cost(model, example).parameters
    assert from_dict(to_dict(settings)) == settings


def test_layers_at_one_share_have_no_profile(model):
    reports = []
    compress.apply_to_model(model, [compress.LowRank(**MLP)], reports=reports)
    assert "profile" not in reports[0]
    assert len(reports[0]["layers"]) == 12


def test_a_block_of_a_recursion_is_factorised_once(model):
    small, spec = compress.apply_to_model(model, [compress.TensorTrain(**MLP)], spec=VITRM)
    trains = [m for m in small.modules() if isinstance(m, TensorTrain)]
    dense = {n: model.get_submodule(n).weight.numel() for n in spec.transforms[0].settings}
    kept = sum(core.weight.numel() for train in trains for core in train.cores)
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    assert len(trains) == len(dense) == 12
    assert before - after == sum(dense.values()) - kept
    assert 0.3 * sum(dense.values()) < kept <= 0.4 * sum(dense.values())


def test_bits_follow_on_the_cores(model, images):
    methods = [
        compress.TensorTrain(**MLP),
        compress.Quantize(weights=8, activations=8, exclude=("patch_embed", "*head")),
    ]
    small, spec = compress.apply_to_model(model, methods, spec=VITRM, batches=[images])
    assert [each.kind for each in spec.transforms] == ["replace", "bits"]
    train = small.get_submodule("blocks.0.mlp.fc2")
    assert all(isinstance(core, QuantizedWeight) for core in train.cores)
    assert train.cores[1].calls == 4  # ranges of each call of the recursion
    alone, _ = compress.apply_to_model(model, methods[:1], batches=[images])
    error = (small(images) - alone(images)).norm() / alone(images).norm()
    assert 0 < error < 0.05
    assert torch.equal(build(spec, small.state_dict())(images), small(images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")
@pytest.mark.parametrize("method", ["low_rank", "tensor_train", "cp"])
def test_an_export_stores_the_factors(method, tmp_path):
    trained = trained_like("cct_2_3x2_32")
    small = compress.apply(trained, [METHODS[method]])
    sizes = []
    for number, each in enumerate((trained, small)):
        folder = tmp_path / str(number)
        export(each, folder, form="whole")
        sizes.append((folder / "model.onnx").stat().st_size)
    parameters = [sum(p.numel() for p in each.model.parameters()) for each in (trained, small)]
    assert sizes[0] - sizes[1] == pytest.approx(4 * (parameters[0] - parameters[1]), rel=0.1)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = small.model(small.normalize(pixels))
    found = torch.from_numpy(Runtime(tmp_path / "1").predict(pixels.numpy()).probabilities)
    torch.testing.assert_close(found, logits.softmax(1), atol=1e-4, rtol=0)


# From the start of training


def steps(model, session, optimizer, count):
    torch.manual_seed(5)
    inputs, labels = torch.randn(8, 3, 32, 32), torch.randint(4, (8,))
    for _ in range(count):
        optimizer.zero_grad()
        (F.cross_entropy(model(inputs), labels) + session.penalty()).backward()
        optimizer.step()


def begin(seed=0):
    torch.manual_seed(0)
    spec = ModelSpec("cct_2_3x2_32", {"num_classes": 4, "drop_path_rate": 0.0})
    model = build(spec)
    settings = compress.APrioriCP()
    example = torch.zeros(2, 3, 32, 32)
    session = compress.Session(model, [settings], example, 4, spec=spec, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session.attach(optimizer)
    return model, session, optimizer


def test_a_network_is_trained_in_its_factors():
    model, session, optimizer = begin()
    kernels = [module for module in model.modules() if isinstance(module, CP)]
    assert [len(each.reduce.weight) for each in kernels] == [4, 74]
    first = kernels[1].down.weight.detach().clone()
    steps(model, session, optimizer, 2)
    assert not torch.equal(kernels[1].down.weight, first)
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    before = model(images)
    spec = session.finish()
    assert torch.equal(model(images), before)
    assert torch.equal(build(spec, model.state_dict())(images), before)


def test_its_start_is_that_of_the_seed_and_it_resumes_to_the_bit():
    whole, halfway, again, other = begin(), begin(), begin(), begin(seed=1)
    first = [model.state_dict()["tokenizer.0.0.reduce.weight"].clone() for model, *_ in
             (whole, again, other)]  # fmt: skip
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    steps(*whole, 4)
    steps(*halfway, 2)
    for part, saved in zip(again, halfway, strict=True):
        part.load_state_dict(saved.state_dict())
    # steps() has the same inputs at every call
    steps(*again, 2)
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, again[0].state_dict()[name])


# What can't be meant


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"low_rank": {"keep": 0}}, "low_rank.keep must be between 0 and 1"),
        ({"tensor_train": {"keep": 1}}, "tensor_train.keep must be between 0 and 1"),
        ({"a_priori_cp": {"keep": 1.5}}, "a_priori_cp.keep must be between 0 and 1"),
        ({"tensor_train": {"cores": 1}}, "tensor_train.cores must be 2 to 10"),
        ({"cp": {"allocation": "equal"}}, "cp.allocation must be one of uniform, divergence"),
        ({"low_rank": {"metric": "fisher"}}, "low_rank.metric must be one of weights, curvature"),
        ({"cp": {"metric": "weights"}}, "cp has no setting 'metric'"),
    ],
)
def test_settings_that_can_not_be_meant_are_refused(content, message):
    with pytest.raises(UsageError, match=message):
        from_dict(content)


@pytest.mark.parametrize(
    "settings",
    [compress.LowRank(metric="curvature"), compress.TensorTrain(allocation="divergence")],
)
def test_without_images_there_is_no_measure(model, settings):
    with pytest.raises(UsageError, match="measures on images: give data"):
        compress.apply_to_model(model, [settings])


class Idle(nn.Module):
    """A network with a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(64, 8), nn.Linear(64, 64)

    def forward(self, inputs):
        return self.used(inputs.flatten(1))


def test_a_layer_that_no_image_reaches_has_no_curvature(images):
    settings = compress.LowRank(metric="curvature")
    with pytest.raises(UsageError, match="curvature of 'idle' is not known: exclude it"):
        compress.apply_to_model(Idle(), [settings], batches=[images])


def test_a_network_without_kernels_has_no_a_priori_factors():
    linear = nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, groups=64))
    with pytest.raises(UsageError, match="finds no convolution to replace"):
        compress.Session(linear, [compress.APrioriCP()], torch.zeros(1, 64, 8, 8), 1)


def test_layers_of_other_shapes_stay_dense(images):
    layers = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(), nn.Linear(256, 8)
    )
    small, spec = compress.apply_to_model(layers, [compress.TensorTrain(smallest=1)])
    assert [*spec.transforms[0].settings] == ["3"]
    assert cost(small, images).parameters < cost(layers, images).parameters


@pytest.mark.parametrize(
    "method",
    [
        compress.LowRank(),
        compress.CP(smallest=16),
        compress.Quantize(weights=8),
        compress.Compacter(n=2, include=("*.projection",)),
    ],
    ids=lambda method: method.name,
)
def test_a_vit_of_transformers_reads_the_weight_of_its_replaced_patch_projection(method):
    transformers = pytest.importorskip("transformers")
    sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=32, image_size=8, patch_size=4, num_labels=3, **sizes
    )
    model = transformers.ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 8, 8)
    projection = "vit.embeddings.patch_embeddings.projection"
    before = model.get_submodule(projection)
    session = compress.Session(
        nn.Sequential(Vision(model)), [method], images, steps=1, batches=[images]
    )
    session.finish()
    assert type(model.get_submodule(projection)) is not type(before)
    assert model(images.double()).logits.isfinite().all()  # cast to the type that it reads


class Vision(nn.Module):
    """Class scores of a model of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images).logits
