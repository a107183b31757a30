"""Methods together and cut short: they compress, warn, or are refused before the first step."""

import copy
import itertools

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from smallfry import compress
from smallfry.compress.quantize.equalize import equalize, pairs
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.transforms import ModelSpec, build

MODEL = "resnet8_mlperf_tiny"
STEPS = 8
REMOVING = {
    "hesso": compress.HESSO(sparsity=0.3, periods=1, begin=0.0, end=0.5),
    "dhspg": compress.DHSPG(sparsity=0.3, begin=0.0),
    "erase_operators": compress.EraseOperators(sparsity=0.3),
}
MASKING = {
    "gradual_magnitude": compress.GradualMagnitude(sparsity=0.5, begin=0.0, end=0.5, every=1),
    "rigl": compress.RigL(sparsity=0.5, every=2, end=0.9),
    "snip": compress.SNIP(sparsity=0.5),
    "n_of_m": compress.NofM(),
    "keep_zeros": compress.KeepZeros(),
}
SORTED = compress.SortedNet(widths=(0.5, 1.0))


def run(methods, model=None, spec=None, images=None):
    """Train for some steps, and return the session, the model and its spec."""
    torch.manual_seed(0)
    spec = ModelSpec(MODEL) if model is None else spec
    model = build(spec) if model is None else model
    images = torch.randn(4, 3, 32, 32) if images is None else images
    labels = torch.arange(len(images)) % 10
    session = compress.Session(model, methods, example=images[:2], steps=STEPS, spec=spec)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    session.attach(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model, session.finish(), images


@pytest.mark.parametrize(
    ("first", "second"), [*itertools.product(("hesso", "erase_operators"), MASKING)]
)
@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")
def test_what_is_masked_may_lose_channels_and_branches(first, second):
    model, spec, images = run([REMOVING[first], MASKING[second]])
    again = build(spec, model.state_dict()).eval()
    torch.testing.assert_close(again(images), model.eval()(images))
    zeros = [float((p == 0).float().mean()) for p in model.parameters() if p.ndim == 4]
    assert second == "keep_zeros" or max(zeros) > 0.3  # zeros of the masks are kept by the cut


@pytest.mark.parametrize(
    "methods",
    [
        [REMOVING["hesso"], REMOVING["dhspg"]],
        [REMOVING["erase_operators"], REMOVING["hesso"]],
        [REMOVING["hesso"], SORTED],
        [REMOVING["erase_operators"], SORTED],
        [REMOVING["erase_operators"], compress.LSQ()],
    ],
    ids=lambda methods: ", ".join(method.name for method in methods),
)
def test_what_can_not_end_together_is_refused_before_training(methods):
    with pytest.raises(UsageError, match=r"removes \w+, which \w+ needs until the end"):
        run(methods)


# Weights with several owners


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.h = (nn.Linear(32, n) for n in (32, 32, 32, 10))
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.h(self.c(self.b(self.a(x).relu()).relu()).relu())


@pytest.mark.parametrize("name", MASKING)
def test_a_tied_weight_is_masked_once(name):
    model, _, _ = run([MASKING[name]], Tied(), images=torch.randn(16, 32))
    assert model.c.weight is model.b.weight
    if name != "keep_zeros":
        assert (model.b.weight == 0).float().mean() >= 0.5


def test_a_layer_that_stays_dense_is_not_masked_through_a_tie():
    model = Tied()
    model.b.weight = model.a.weight  # of the first layer
    run([MASKING["snip"]], model, images=torch.randn(16, 32))
    assert model.a.weight.all()
    assert (model.c.weight == 0).any()
    model.c.weight = model.a.weight
    with pytest.raises(UsageError, match="also those of layers that stay dense"):
        run([MASKING["snip"]], model, images=torch.randn(16, 32))


def test_both_heads_of_a_distilled_transformer_stay_dense():
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=1, num_classes=10
    )
    images = torch.randn(4, 3, 32, 32)
    run([MASKING["snip"]], model, images=images)
    assert model.head.weight.all() and model.head_dist.weight.all()  # noqa: PT018
    assert (model.blocks[0].mlp.fc1.weight == 0).any()


@pytest.mark.parametrize("kind", ["activation", "norm"])
def test_layers_that_one_object_separates_twice_are_no_pair(kind):
    torch.manual_seed(0)
    between = nn.ReLU() if kind == "activation" else nn.BatchNorm1d(16)
    layers = [nn.Linear(8, 16), between, nn.Linear(16, 16), between, nn.Linear(16, 4)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for layer in (model[2], model[4]):
            layer.weight.mul_(3 * torch.rand(len(layer.weight), 1))
        if kind == "norm":
            between.running_mean.normal_()
            between.bias.normal_()
    inputs = torch.randn(64, 8)
    before, same = model(inputs), copy.deepcopy(model)
    found = [tuple(pair[:2]) for pair in pairs(model)]
    assert found == ([("0", "2"), ("2", "4")] if kind == "activation" else [])
    equalize(same)
    torch.testing.assert_close(same(inputs), before)


def test_branches_of_rounded_layers_are_no_internal_error():
    spec = ModelSpec("vitrm_micro_patch4_8")
    model = build(spec)
    images = torch.randn(4, 1, 8, 8)
    session = compress.Session(model, [compress.RoundWeights()], example=images, steps=1, spec=spec)
    rounded = session.finish()
    with pytest.raises(UsageError, match="erase before the numbers are rounded"):
        run([REMOVING["erase_operators"]], model, rounded, images)


# Runs that end early


def ended(method, steps, planned):
    """Train for fewer steps than planned."""
    torch.manual_seed(0)
    model = build(ModelSpec(MODEL))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    session = compress.Session(model, [method], example=images[:2], steps=planned)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    session.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    session.finish()
    return model


def test_a_short_run_is_pruned_at_its_end_whatever_the_interval():
    model = ended(compress.GradualMagnitude(sparsity=0.9, every=20), 16, 16)
    weights = torch.cat([p.flatten() for n, p in model.named_parameters() if p.ndim == 4])
    assert (weights == 0).float().mean() > 0.8


@pytest.mark.parametrize(
    ("method", "steps", "planned", "message"),
    [
        (compress.GradualMagnitude(every=1), 3, 20, "after 3 of 12 prunings of gradual_magnitude"),
        (compress.GradualMagnitude(begin=0.5, every=1), 3, 20, "after 0 of 2 prunings"),
        (compress.HESSO(periods=1, begin=0.0, end=0.8), 4, 10, "in period 1 of 1 of hesso"),
        (compress.DHSPG(), 6, 6, "dhspg removes no channels"),
    ],
)
def test_less_than_was_asked_for_is_a_warning(method, steps, planned, message):
    with pytest.warns(SmallfryWarning, match=message):
        ended(method, steps, planned)


def test_an_end_before_the_beginning_is_refused():
    with pytest.raises(UsageError, match="begin is step 50 of this run, after its end, step 36"):
        ended(compress.GradualMagnitude(begin=50.0, end=0.6), 1, 60)
