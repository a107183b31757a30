"""LoopNet with exits between the loops of its last stage."""

import numpy as np
import pytest
import timm
import torch

import smallfry
from smallfry.costing import cost
from smallfry.errors import UsageError
from smallfry.models import LoopNet, Recursive
from smallfry.models.contract import map_tensors
from smallfry.models.early_exit import recurse_until
from smallfry.models.loopnet_anytime import AnytimeLoopNet, Change
from smallfry_runtime.runtime import Runtime


def small(**settings):
    torch.manual_seed(0)
    return AnytimeLoopNet(widths=(8, 12), depths=(1, 2), recursion_steps=3, **settings)


def varied(model):
    """Give norms and heads values as after training."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
    torch.nn.init.normal_(model.halt_head.weight)
    return model.eval().double()


def test_parameters_and_arithmetic_of_the_named_size():
    model = timm.create_model("loopnet_anytime_240k").eval()
    assert isinstance(model, Recursive)
    macs = []
    for steps in (1, 2, 3):
        model.recursion_steps = steps
        macs.append(cost(model, torch.zeros(1, 3, 32, 32)).macs)
    assert [round(each / 1e6, 1) for each in macs] == [32.4, 40.5, 48.6]
    assert sum(p.numel() for p in model.parameters()) == 241_369


def test_one_layer_equals_the_plain_loopnet_of_as_many_loops():
    torch.manual_seed(0)
    loops = {"widths": (8, 12), "depths": (1, 1)}
    plain = LoopNet(**loops, loops=(1, 3), residual=True)
    ours = AnytimeLoopNet(**loops, recursion_steps=3)
    ours = varied(ours)
    left = plain.load_state_dict(ours.state_dict(), strict=False)
    assert left.unexpected_keys == ["halt_head.weight", "halt_head.bias"]
    plain = plain.eval().double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours.recurse(images)[-1].logits, plain(images), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours(images), plain(images), rtol=0, atol=1e-12)


def test_training_mode_takes_the_norm_of_each_step():
    model = small().train()
    images = torch.randn(6, 3, 32, 32)
    model.recurse(images)
    for layer in model.stages[-1].layers:
        assert [int(norm.num_batches_tracked) for norm in layer.norms] == [1, 1, 1]
    state = None
    for number in range(3):
        step = model.advance(images, state)
        state = map_tensors(torch.Tensor.detach, step.state)
        assert state.done.tolist() == [number + 1] * 6


def test_images_after_different_steps_share_a_batch_in_evaluation_only():
    model = varied(small())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    first, second, _ = model.recurse(images)
    x = model.embed(images)
    mixed = Change(
        torch.stack([first.state.change[0], second.state.change[1]]), torch.tensor([1, 2])
    )
    found = model.step(x, mixed)
    torch.testing.assert_close(found.logits[0], second.logits[0], rtol=0, atol=1e-12)
    wanted = model.recurse(images)[2].logits[1]
    torch.testing.assert_close(found.logits[1], wanted, rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="every_step"):
        model.train().step(x, mixed)


def test_early_exit_computes_the_steps_of_the_whole():
    model = varied(small())
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    steps = model.recurse(images)
    threshold = float(steps[0].halt_logits.detach().sigmoid().median())
    found = recurse_until(model, images, threshold)
    assert 1 <= int(found.steps.min()) < int(found.steps.max()) <= 3
    wanted = torch.stack([step.logits for step in steps])[found.steps - 1, torch.arange(8)]
    torch.testing.assert_close(found.logits, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recursion_steps": 0}, "at least one step"),
        ({"depths": (1, 0)}, "needs a layer"),
        ({"img_size": 4}, "too small"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        AnytimeLoopNet(**({"widths": (8, 12), "depths": (1, 1)} | settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anytime") / "run"
    smallfry.train(
        data={"name": "digits", "limit": 600},
        model={
            "name": "loopnet_anytime_240k",
            "options": {"widths": [12], "depths": [2]},
        },
        objective={"name": "every_step"},
        optimizer={"name": "adamw", "lr": 3e-3},
        epochs=4,
        references=False,
        run=folder,
    )
    return folder


def test_it_learns_digits_at_every_exit(run):
    trained = smallfry.load(run)
    assert trained.evaluate()["accuracy"] > 0.8
    digits = smallfry.data.load_data("digits").test
    with torch.no_grad():
        steps = trained.model.recurse(trained.normalize(digits.images))
    for step in steps:
        assert (step.logits.argmax(1) == digits.labels).double().mean() > 0.7


@pytest.mark.slow
def test_the_export_leaves_early(run, tmp_path):
    runtime = Runtime(smallfry.export(run, tmp_path / "export"))
    assert runtime.manifest.form == "anytime"
    assert runtime.manifest.exits
    digits = smallfry.data.load_data("digits").test
    trained = smallfry.load(run)
    pixels = digits.images.numpy()
    whole = runtime.predict(pixels)
    with torch.no_grad():
        wanted = trained.model(trained.normalize(digits.images)).softmax(1)
    assert np.abs(whole.probabilities - wanted.numpy()).max() < 1e-4
    early = runtime.predict(pixels, threshold=0.6)
    with torch.no_grad():
        same = recurse_until(trained.model, trained.normalize(digits.images), 0.6)
    assert 1 <= early.steps.mean() < 3
    assert (early.steps == same.steps.numpy()).mean() > 0.99


def test_features_are_timms():
    form = {"widths": (8, 12), "depths": (1, 2), "features_only": True}
    maps = timm.create_model("loopnet_anytime_240k", **form)(torch.rand(1, 3, 32, 32))
    assert [m.shape[1:] for m in maps] == [(8, 15, 15), (12, 7, 7)]
    (first,) = timm.create_model("loopnet_anytime_240k", out_indices=(0,), **form)(
        torch.rand(1, 3, 32, 32)
    )
    assert first.shape[1:] == (8, 15, 15)
    model = varied(small())
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        features, (first, last) = model.forward_intermediates(images)
        assert torch.equal(last, features)
        assert torch.equal(features, model.forward_features(images))
        assert torch.equal(model._last.enter(first), model.embed(images))
        only = model.forward_intermediates(images, [0], stop_early=True, intermediates_only=True)
        assert [each.shape for each in only] == [first.shape]
    with pytest.raises(ValueError, match="output_fmt is NCHW, not 'NLC'"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_recomputed_layers_give_the_same_gradients():
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    found = []
    for recompute in (False, True):
        model = small(img_size=16).double().train()
        model.set_grad_checkpointing(recompute)
        calls = []
        model.stages[-1].layers[0].conv.register_forward_hook(lambda *_, c=calls: c.append(1))
        sum(step.logits.square().sum() for step in model.recurse(images)).backward()
        assert len(calls) == (6 if recompute else 3)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)
