"""Nested sub-models: equal inside and outside the shared weights, trained at once, resumed."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry import compress
from smallfry.compress.nest.sampling import Sampling
from smallfry.compress.nest.sorted import sequences, sort_channels
from smallfry.errors import UsageError
from smallfry.optim import KFAC
from smallfry.training.method import Running, Setting
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.find import find_groups
from smallfry.transforms.groups import ChannelGroup, Slice, mask
from smallfry.transforms.nested import (
    Nested,
    SubModel,
    active,
    extract,
    nest_of,
    parse_group,
    plain_group,
)

TINY = {"embed_dim": 32, "num_heads": 4, "mlp_hidden_dim": 32, "depth": 2, "num_classes": 4}
VITRM = ModelSpec("vitrm_micro_patch4_8", {**TINY, "recursion_steps": 2, "drop_rate": 0.0})
MODELS = {
    "vitrm": (
        *(VITRM, (1, 8, 8)),
        {"heads": (0.5,), "depths": (0.5,), "latent_steps": (1,), "recursion_steps": (1,)},
    ),
    "loopnet": (ModelSpec("loopnet_70k", {"num_classes": 4}), (3, 16, 16), {"depths": (0.5,)}),
    "resnet8": (ModelSpec("resnet8_mlperf_tiny", {"num_classes": 4}), (3, 16, 16), {}),
    "mobilenet": (ModelSpec("mobilenetv3_small_050", {"num_classes": 4}), (3, 32, 32), {}),
    "cct": (ModelSpec("cct_2_3x2_32", {"num_classes": 4}), (3, 32, 32), {"heads": (0.5,)}),
}

SLOW = ("resnet8", "mobilenet", "cct")


def begun(name, **changes):
    if name not in ("vitrm", "cct"):
        pytest.importorskip("torch_pruning")
    spec, shape, settings = MODELS[name]
    torch.manual_seed(0)
    model = build(spec)
    for norm in model.modules():  # of which each channel differs, as in a trained model
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
    images = torch.randn(12, *shape)
    method = compress.SortedNet(**{"widths": (0.5,), **settings, **changes})
    running = Running([method], model, Setting(spec, images[:2], [images[:6], images[6:]], 10))
    return model, running, images


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS]
)
def test_every_sub_model_equals_the_smaller_model_that_is_extracted(name):
    model, running, images = begun(name)
    spec, *_ = MODELS[name]
    found = running.finish()
    again = build(ModelSpec.from_dict(json.loads(json.dumps(found.to_dict()))), model.state_dict())
    sizes = set()
    for submodel in nest_of(model).nested.submodels:
        with active(model, submodel):
            expected = model(images)
        with active(again, submodel):
            assert torch.equal(again(images), expected)
        small, transforms = extract(model, submodel)
        assert torch.equal(small(images), expected), str(submodel)
        own = spec
        for each in transforms:
            own = own.then(each)
        own = ModelSpec.from_dict(json.loads(json.dumps(own.to_dict())))
        rebuilt = build(own, small.state_dict())
        assert torch.equal(rebuilt(images), expected)
        sizes.add((sum(p.numel() for p in small.parameters()), str(transforms)))
    assert len(sizes) == len(nest_of(model).nested.submodels)


@pytest.mark.parametrize("name", ["vitrm", "loopnet"])
def test_weights_and_outputs_of_the_full_model_are_untouched(name):
    model, running, images = begun(name)
    before = copy.deepcopy(model.state_dict())
    tensors = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    output = model(images)
    running.finish()
    for submodel in nest_of(model).nested.submodels:
        with active(model, submodel):
            model(images)
    after = model.state_dict()
    assert torch.equal(model(images), output)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor)
        assert after[key].data_ptr() == tensors[key]  # one storage for all
    more = {key for key in after if key not in before}
    assert all(key.startswith("submodels.statistics_") for key in more)
    assert bool(more) == (name == "loopnet")


def test_a_sub_model_is_the_full_one_with_the_last_heads_and_units_zero():
    model, running, images = begun("vitrm", depths=(), latent_steps=(), recursion_steps=())
    groups = find_groups(model, images[:2])
    running.finish()
    masked = copy.deepcopy(model)
    for group in groups:
        mask(masked, group, torch.arange(group.channels // 2, group.channels))
    with active(model, SubModel(width=0.5, heads=0.5)):
        torch.testing.assert_close(model(images), masked(images), atol=1e-5, rtol=1e-5)
    with active(model, SubModel(heads=0.5)):
        assert not torch.allclose(model(images), masked(images), atol=1e-3)


def test_fewer_layers_and_steps_are_those_of_a_model_built_so():
    model, running, images = begun("vitrm")
    running.finish()
    fewer = {"depth": 1, "latent_steps": 1, "recursion_steps": 1}
    spec = ModelSpec(VITRM.architecture, {**VITRM.arguments, **fewer})
    plain = build(spec)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "blocks.1" not in k})
    with active(model, SubModel(depth=0.5, latent_steps=1, recursion_steps=1)):
        assert torch.equal(model(images), plain(images))


@pytest.mark.parametrize("name", ["vitrm", "loopnet"])
def test_the_gradient_is_the_mean_of_those_of_extracted_sub_models(name):
    model, _, images = begun(name, samples=3, full=1.0)
    seed = {"vitrm": 3, "loopnet": 1}[name]  # that draws smaller ones, too
    labels = torch.arange(12) % 4
    model.train()
    torch.manual_seed(seed)
    drawn = model.sampling.draw(nest_of(model).nested.submodels, 12)
    assert drawn[0] == SubModel()
    assert any(each != SubModel() for each in drawn[1:])
    torch.manual_seed(seed)
    start = copy.deepcopy(model)
    F.cross_entropy(model(images), labels).backward()
    total: dict[str, torch.Tensor] = {}
    for submodel, rows in zip(drawn, torch.arange(12).chunk(3), strict=True):
        part = copy.deepcopy(start).train()
        with active(part, submodel):
            (F.cross_entropy(part(images[rows]), labels[rows]) / 3).backward()
        for key, parameter in part.named_parameters():
            if parameter.grad is not None:
                total[key] = total.get(key, 0) + parameter.grad
    assert total.keys() == {k for k, p in model.named_parameters() if p.grad is not None}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, total[key], atol=1e-6, rtol=1e-4)


def test_gradients_inside_are_those_of_the_extracted_model():
    model, running, images = begun("vitrm")
    running.finish()
    submodel = SubModel(0.5, 0.5, 0.5, 1, 1)
    small, _ = extract(model, submodel)
    small(images).square().sum().backward()
    with active(model, submodel):
        model(images).square().sum().backward()
    plan = nest_of(model).plan(model, submodel)
    for key, parameter in small.named_parameters():
        gradient = dict(model.named_parameters())[key].grad
        for dim, kept in plan.entries.get(key, []):
            positions = torch.arange(kept) if isinstance(kept, int) else kept
            others = [i for i in range(gradient.shape[dim]) if i not in positions.tolist()]
            assert not gradient.index_select(dim, torch.tensor(others)).any()
            gradient = gradient.index_select(dim, positions)
        assert (gradient is None) == (parameter.grad is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


def test_each_sub_model_has_its_own_statistics_of_batch_norms():
    model, running, images = begun("loopnet")
    running.finish()
    submodel = SubModel(width=0.5)
    small, _ = extract(model, submodel)
    taken = copy.deepcopy(small).train()
    norm = taken.stages[0].enter[2]
    norm.momentum = 1.0
    means = []
    for batch in (images[:6], images[6:]):
        taken(batch)
        means.append(norm.running_mean.clone())
    own = small.stages[0].enter[2].running_mean
    torch.testing.assert_close(own, torch.stack(means).mean(0), atol=1e-5, rtol=1e-5)
    full = model.stages[0].enter[2].running_mean
    assert not torch.allclose(own, full[: len(own)], atol=1e-2)


def test_only_the_full_model_moves_its_running_statistics():
    model, _, images = begun("loopnet", full=0.0)
    before = copy.deepcopy(model.state_dict())
    model.train()
    for name in (SubModel(width=0.5), SubModel(depth=0.5)):
        with active(model, name):
            model(images)
    for key, tensor in model.state_dict().items():
        assert "running" not in key or torch.equal(tensor, before[key])
    with active(model, SubModel()):
        model(images)
    assert not torch.equal(
        model.stages[0].enter[2].running_mean, before["stages.0.enter.2.running_mean"]
    )


@pytest.mark.parametrize("name", ["vitrm", "loopnet"])
def test_sorting_changes_the_order_alone(name):
    model, _, images = begun(name, sort=False)
    before = model(images)
    for group in find_groups(model, images[:2]):
        sort_channels(model, group)
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-5)
    if name == "vitrm":
        fc1, fc2 = model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2
        both = torch.cat([*fc1.weight.chunk(2), fc2.weight.T], dim=1).square().sum(1)
        sizes = (both + fc1.bias.view(2, -1).square().sum(0)).sqrt()
        assert (sizes[1:] <= sizes[:-1] + 1e-6).all()


def test_draws_take_the_full_model_as_often_as_asked():
    every = Nested([], {}, widths=(1.0, 0.75, 0.5, 0.25)).submodels
    torch.manual_seed(0)
    drawn = [Sampling(2, 0.5).draw(every, 8) for _ in range(4000)]
    first = sum(each[0] == every[0] for each in drawn) / 4000
    second = [sum(each[1] == one for each in drawn) / 4000 for one in every]
    assert abs(first - 0.625) < 0.03
    assert all(abs(share - 0.25) < 0.03 for share in second)
    assert [len(Sampling(4, 0.5).draw(every, n)) for n in (1, 2, 5, 8, 100)] == [1, 1, 2, 4, 4]


def test_evenly_spaced_entries_are_short_and_others_complete():
    even = Slice("a", 0, torch.arange(12).view(4, 3))
    uneven = Slice("b", 1, torch.tensor([[0], [3], [1], [2]]))
    group = ChannelGroup("g", 4, (even,), (even, uneven), counts={"heads": 1})
    content = plain_group(group, 2)
    assert content["zeroed"] == [{"tensor": "a", "dim": 0, "first": [0, 1, 2], "step": 3}]
    again = parse_group(json.loads(json.dumps(content)))
    assert again.counts == group.counts
    for one, other in zip((even, even, uneven), (*again.zeroed, *again.cut), strict=True):
        assert one.tensor == other.tensor
        assert torch.equal(one.entries, other.entries)


def test_sequences_are_those_whose_layers_are_alike():
    model = build(VITRM)
    assert sequences(model, torch.zeros(2, 1, 8, 8)) == {"blocks": 2}
    loops = build(ModelSpec("loopnet_70k"))
    assert sequences(loops, torch.zeros(2, 3, 32, 32)) == {
        "stages.0.layers": 2,
        "stages.1.layers": 2,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (0.0,)}, "widths are shares"),
        ({"samples": 0}, "samples and divisible"),
        ({"full": 1.5}, "probability"),
        ({"latent_steps": (0,)}, "whole numbers"),
        ({"latent_steps": (9,)}, "the model has 3"),
        ({"include": ("nothing*",)}, "matches no group"),
        ({"divisible": 64, "heads": ()}, "take a smaller divisible"),
        ({"widths": tuple(i / 7000 for i in range(1, 7001)), "sort": False}, "too many"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        begun("vitrm", **settings)


def test_missing_parts_of_a_model_are_named():
    with pytest.raises(UsageError, match=r"latent_steps.*no such steps"):
        begun("loopnet", latent_steps=(1,))
    with pytest.raises(UsageError, match="heads: the model has no such group"):
        begun("loopnet", heads=(0.5,))
    with pytest.raises(UsageError, match="no sub-models"):
        extract(build(VITRM), SubModel())
    model, running, _ = begun("vitrm")
    running.finish()
    with pytest.raises(UsageError, match=r"no sub-model 'width 0\.3'"):
        extract(model, SubModel(width=0.3))
    weights = copy.deepcopy(model.state_dict())
    with active(model, SubModel(width=0.5)):
        other = active(model, SubModel())
        with pytest.raises(UsageError, match="active already"):
            other.__enter__()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[key])


def test_a_later_change_of_layers_is_refused():
    spec, shape, _ = MODELS["vitrm"]
    images = torch.randn(2, *shape)
    methods = [compress.SortedNet(widths=(0.5,)), compress.LowRank(keep=0.5)]
    with pytest.raises(UsageError, match="comes before 'nested'"):
        Running(methods, build(spec), Setting(spec, images, (), 10)).finish()
    with pytest.raises(ValueError, match="not the one that was nested"):
        Running(methods[::-1], build(spec), Setting(spec, images, (), 10)).finish()


def test_natural_gradient_trains_steps_but_no_widths():
    for settings, fits in (({"widths": (), "latent_steps": (1,)}, True), ({}, False)):
        wanted = {"heads": (), "depths": (), "latent_steps": (), "recursion_steps": (), "full": 0.0}
        model, running, images = begun("vitrm", **{**wanted, **settings})
        optimizer = KFAC(model.train(), 0.05, likelihood="categorical", check="off")
        running.attach(optimizer)
        labels = torch.arange(12) % 4
        if fits:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            continue
        vars(model)["sampling"] = Sampling(6, 0.0)
        with pytest.raises(UsageError, match="natural gradient"):
            model(images)
