"""Training with learned step sizes, in one's own loop and in runs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry import compress
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.layers.fake_quant import FakeQuantized
from smallfry.layers.quantized import CallReset
from smallfry.optim import KFAC
from smallfry.transforms import ModelSpec, build

SIZES = {"num_classes": 4, "embed_dim": 16, "num_heads": 2, "drop_rate": 0.0}
SPEC = ModelSpec("vitrm_micro_patch4_8", SIZES)
QKV = "blocks.0.attn.qkv"


def data():
    torch.manual_seed(1)
    labels = torch.arange(48) % 4
    images = torch.rand(48, 1, 8, 8) * 0.5
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.5
    return images, labels


def begin(settings, spec=SPEC, make=lambda m: torch.optim.AdamW(m.parameters(), 1e-2)):
    torch.manual_seed(0)
    model, (images, _) = build(spec), data()
    session = compress.Session(model, [settings], images[:2], 40, spec=spec, batches=[images])
    optimizer = make(model.train())
    session.attach(optimizer)
    return model, session, optimizer


def steps(model, optimizer, count):
    images, labels = data()
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.slow
def test_a_finished_model_computes_what_was_trained():
    model, session, optimizer = begin(compress.LSQ(weights=4, activations=8))
    assert steps(model, optimizer, 50) < 0.3
    images, labels = data()
    with torch.no_grad():
        trained = model.eval()(images)
        by_steps = model.recurse(images)[-1].logits
    spec = session.finish()
    assert not any(isinstance(m, FakeQuantized) for m in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(images), trained, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.recurse(images)[-1].logits, by_steps, rtol=1e-4, atol=1e-5)
        assert torch.equal(build(spec, model.state_dict())(images), model(images))
    assert float((model(images).argmax(1) == labels).float().mean()) > 0.9
    layers = {name: each["bits"] for name, each in spec.transforms[0].layers.items()}
    edges = {"patch_embed", "head"}
    assert {layers[name] for name in edges} == {8}
    assert {bits for name, bits in layers.items() if name not in edges} == {4}
    assert spec.transforms[0].layers[QKV] == {"bits": 4, "input_bits": 8, "calls": 6}
    resets = [h for h in model._forward_pre_hooks.values() if isinstance(h, CallReset)]
    assert len(resets) == 1  # the training's own is gone


def test_steps_are_learned_per_call():
    model, _, optimizer = begin(compress.LSQ(weights=2, activations=3))
    layer = model.get_submodule(QKV)
    before = copy.deepcopy(layer.state_dict())
    steps(model, optimizer, 5)
    moved = layer.input_log_steps.detach() != before["input_log_steps"]
    assert bool(moved.all())
    assert not torch.equal(layer.weight_log_step, before["weight_log_step"])
    assert torch.equal(layer.input_zeros, before["input_zeros"])


@pytest.mark.slow
def test_training_beats_rounding_afterwards():
    model, session, optimizer = begin(compress.LSQ(weights=2, activations=None))
    images, labels = data()
    steps(model, optimizer, 40)
    spec = session.finish()
    assert "input_bits" not in spec.transforms[0].layers[QKV]
    plain = build(SPEC)
    other = torch.optim.AdamW(plain.train().parameters(), 1e-2)
    torch.manual_seed(0)
    steps(plain, other, 40)
    rounded, _ = compress.apply_to_model(
        plain.eval(), [compress.Quantize(weights=2, exclude=("patch_embed", "head"))]
    )
    with torch.no_grad():
        losses = [float(F.cross_entropy(m.eval()(images), labels)) for m in (model, rounded)]
    assert losses[0] < losses[1]


def test_a_stopped_session_goes_on_to_the_bit():
    settings = compress.LSQ(weights=4, activations=4)
    model, _, optimizer = begin(settings)
    steps(model, optimizer, 6)
    half, session, other = begin(settings)
    steps(half, other, 3)
    saved = [each.state_dict() for each in (half, session, other)]
    again, resumed, optimizer = begin(settings)
    for parameter in again.parameters():  # what was measured at the start must not matter
        parameter.data.add_(0.1)
    for part, state in zip((again, resumed, optimizer), saved, strict=True):
        part.load_state_dict(state)
    steps(again, optimizer, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.slow
def test_natural_gradient_trains_quantised_layers():
    make = lambda model: KFAC(model, lr=0.02, likelihood="categorical")  # noqa: E731
    model, session, optimizer = begin(compress.LSQ(weights=4, activations=8), make=make)
    covered = {layer for block in optimizer.blocks for layer in block.layers}
    dense = {n for n, m in model.named_modules() if isinstance(m, FakeQuantized)}
    assert covered >= dense
    first = steps(model, optimizer, 1)
    assert steps(model, optimizer, 8) < first
    session.finish()


def test_several_recursion_steps_have_one_step_size_per_layer():
    deep = ModelSpec(SPEC.architecture, {**SPEC.arguments, "recursion_steps": 2})
    model, _, _ = begin(compress.LSQ(), deep)
    assert all(m.calls == 1 for m in model.modules() if isinstance(m, FakeQuantized))


class Tied(nn.Module):
    """Two layers with one weight, of which one has two names and is called twice."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight, self.again = self.one.weight, self.one

    def forward(self, rows):
        return self.other(self.again(self.one(rows)).relu())


def test_tied_layers_share_the_step_of_the_weight_and_not_those_of_inputs():
    torch.manual_seed(0)
    model, rows = Tied(), torch.randn(40, 4)
    session = compress.Session(model, [compress.LSQ(4, 8)], rows, 1, batches=[rows])
    assert model.again is model.one
    assert model.other.weight is model.one.weight
    assert model.other.weight_log_step is model.one.weight_log_step
    assert (len(model.one.input_steps), len(model.other.input_steps)) == (2, 1)
    with torch.no_grad():
        before = model.eval()(rows)
        spec = session.finish()
        torch.testing.assert_close(model(rows), before)
        again = Tied()
        spec.transforms[0].apply(again)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(rows), model(rows))


def test_layers_that_can_not_be_quantised_are_named():
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Flatten(), nn.Linear(6, 2))
    with pytest.warns(SmallfryWarning, match=r"1 layers with 4 weights .*0 \(Conv1d\)"):
        compress.Session(model, [compress.LSQ()], torch.randn(4, 2, 3), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": 1}, "must be 2 to 8 bits"),
        ({"weights": 2.0}, "must be a whole number"),
        ({"activations": 9}, "must be 2 to 8 bits"),
        ({"edges": None}, "can't be null"),
    ],
)
def test_bits_that_can_not_be_meant_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        compress.LSQ(**settings)


def test_an_example_is_needed():
    with pytest.raises(UsageError, match="example"):
        compress.Session(nn.Linear(2, 2), [compress.LSQ()], torch.empty(0), 1)
