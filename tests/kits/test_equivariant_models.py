"""GResNet: sizes, quarter turns, samples that are drawn or fixed, and its export."""

from copy import deepcopy

import numpy as np
import pytest
import timm
import torch

import smallfry  # noqa: F401  # registers the models
from smallfry.costing import cost
from smallfry.deploy.graphs import exported_program, to_onnx, whole_graph
from smallfry.errors import ExportError, UsageError
from smallfry.io.plugins import load_kit
from smallfry.kits.equivariant.models import GResNet, PlainResNet
from smallfry.kits.equivariant.task import turned_alike
from smallfry.models.sources import source_of
from smallfry.optim import KFAC

load_kit("equivariant")
SMALL = {"width": 4, "psi_width": 8, "psi_hidden": 1}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gl2_resnet", 339_282),
        ("sl2_resnet", 339_102),
        ("gl2_resnet_turns", 22_630),
        ("plain_gresnet", 45_564),
    ],
)
def test_parameters(name, count):
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert source_of(name) is not None
    assert model.get_classifier().out_features == 10
    model.reset_classifier(3)
    side = 16
    assert model.eval()(torch.zeros(1, 1, side, side)).shape == (1, 3)


@pytest.mark.parametrize("group", ["gl2", "sl2"])
def test_quarter_turns_leave_the_logits(group):
    torch.manual_seed(0)
    model = GResNet(group=group, samples=4, sampling="turns", **SMALL).double().eval()
    images = torch.rand(3, 1, 16, 16, dtype=torch.float64)
    for turns in (1, 2, 3):
        same, change = turned_alike(model, images, turns, batch=2)
        assert same.all()
        assert change.max() < 1e-12
    # which other samples do not
    assert turned_alike(deepcopy(model).freeze_samples(), images)[1].max() > 1e-3
    assert turned_alike(PlainResNet(width=4).double().eval(), images)[1].max() > 1e-3


@pytest.mark.parametrize("size", [(15, 15), (17, 17), (14, 19)])
def test_quarter_turns_leave_the_logits_of_images_with_odd_sides(size):
    torch.manual_seed(0)
    model = GResNet(samples=4, sampling="turns", **SMALL).double().eval()
    images = torch.rand(2, 1, *size, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(images)
        for turns in (1, 2, 3):
            assert (model(images.rot90(turns, (2, 3))) - wanted).abs().max() < 1e-12
        assert (model(images.flip(3)) - wanted).abs().max() > 1e-3  # which is no turn


def test_every_place_of_an_odd_side_is_pooled():
    torch.manual_seed(0)
    model = PlainResNet(width=2, kernel_size=3).eval()
    images = torch.zeros(1, 1, 9, 9)  # of 7 places a side after the lifting
    with torch.no_grad():
        before = model(images)
        for row, column in ((0, 0), (8, 8), (0, 8), (8, 0)):
            changed = images.clone()
            changed[..., row, column] = 9.0
            assert (model(changed) - before).abs().max() > 1e-6


def test_fresh_samples_differ_and_frozen_ones_do_not():
    torch.manual_seed(0)
    model = GResNet(samples=3, **SMALL).eval()
    images = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        saved = {k: v.clone() for k, v in model.state_dict().items()}
        first, second = model(images), model(images)
        assert (first - second).abs().max() > 1e-4
        model.load_state_dict(saved)  # resumed to the bit
        assert torch.equal(model(images), first)
        frozen = deepcopy(model).freeze_samples(seed=5)
        wanted = frozen(images)
        assert torch.equal(frozen(images), wanted)
        built = GResNet(samples=3, sampling="frozen", seed=5, **SMALL).eval()
        other = GResNet(samples=3, sampling="frozen", seed=6, **SMALL).eval()
        assert torch.equal(built.elements, frozen.elements)
        assert not torch.equal(other.elements, frozen.elements)
        other.load_state_dict(frozen.state_dict())  # which has the samples
        assert torch.equal(other(images), wanted)


def test_frozen_samples_train_and_so_do_checkpointed_blocks():
    torch.manual_seed(0)
    model = GResNet(samples=2, sampling="frozen", drop_rate=0.0, **SMALL)
    images = torch.rand(2, 1, 16, 16)
    gradients = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().max() > 0 for g in gradients[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("sampling", ["turns", pytest.param("frozen", marks=pytest.mark.slow)])
def test_an_export_has_folded_kernels_and_equals_the_network(sampling):
    import onnxruntime

    torch.manual_seed(0)
    model = GResNet(samples=4, sampling=sampling, **SMALL).eval()
    images = torch.rand(2, 1, 16, 16)
    graph = whole_graph(model, images)
    proto = to_onnx(graph, exported_program(graph))
    assert "Sin" not in {node.op_type for node in proto.graph.node}
    shapes = {tuple(each.dims) for each in proto.graph.initializer}
    assert {(16, 1, 5, 5), (16, 16, 5, 5)} <= shapes
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        assert np.abs(found - model(images).numpy()).max() < 1e-5


def test_networks_that_draw_samples_are_not_exported():
    model = GResNet(samples=2, **SMALL).eval()
    with pytest.raises(ExportError, match=r"draws samples .*freeze_samples"):
        exported_program(whole_graph(model, torch.zeros(2, 1, 16, 16)))


def test_arithmetic_is_that_of_the_folded_convolutions():
    model = GResNet(samples=4, sampling="turns", **SMALL).eval()
    macs = cost(model, torch.zeros(1, 1, 16, 16)).macs
    planes = 16 * 25 * 144 + 2 * 16 * 16 * 25 * 144 + 16 * 16 * 25 * 4
    assert planes < macs < 1.4 * planes  # with the kernel networks and the head


def test_natural_gradient_lists_what_it_does_not_cover():
    torch.manual_seed(0)
    model = GResNet(samples=2, sampling="frozen", **SMALL)
    optimizer = KFAC(model, lr=0.1, exclude=["*psi*"])
    assert all(name.startswith(("lift", "conv", "last", "neck.1")) for name in optimizer.uncovered)
    images, labels = torch.rand(8, 1, 16, 16), torch.arange(8)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"group": "so3"}, "group is gl2 or sl2, not 'so3'"),
        ({"sampling": "all"}, "sampling is fresh, frozen, turns"),
        ({"samples": 0}, "at least 1"),
        ({"seed": -1}, "0 or more"),
        ({"variance": -1.0}, "variance of 0 to 10"),
    ],
)
def test_impossible_networks_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        GResNet(**settings)
