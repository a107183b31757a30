"""CheckerPose: parameters, the goldens of its parts, and refused settings."""

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

from smallfry.errors import UsageError
from smallfry.kits.pose.losses import code_loss, mask_loss
from smallfry.kits.pose.mesh import farthest_points, nearest_neighbours, normalised
from smallfry.kits.pose.models import (
    CheckerPose,
    EdgeConvolution,
    LocalFeature,
    PoseCodes,
    RefineStep,
    mean_places,
    waves_of,
)
from smallfry.models.sources import source_of

POINTS = np.array([np.sin(0.7 * i + 0.3 * np.sqrt(i)) for i in range(120)]).reshape(40, 3)


def filled(module):
    """Fill the parameters as the authors' network was for its values."""
    module = module.double().eval()
    with torch.no_grad():
        for k, (name, parameter) in enumerate(module.named_parameters()):
            s = torch.sin(0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + 0.11 * k)
            if parameter.ndim >= 2:
                s = s / (parameter.numel() / parameter.shape[0]) ** 0.5
            else:
                s = 1 + 0.1 * s if name.endswith("weight") else 0.1 * s
            parameter.copy_(s.view_as(parameter))
    return module


def wave(step, *shape, function=torch.cos):
    count = torch.Size(shape).numel()
    return function(step * torch.arange(count, dtype=torch.float64)).view(shape)


def require(found, shape, head, total, mean, within=1e-8):
    assert tuple(found.shape) == shape
    wanted = torch.tensor(head, dtype=torch.float64)
    assert_close(found.detach().flatten()[: len(head)], wanted, atol=within, rtol=0)
    assert found.sum().item() == pytest.approx(total, abs=1e-5)
    assert found.abs().mean().item() == pytest.approx(mean, abs=1e-7)


def test_points_and_neighbours_are_the_golden_ones():
    assert farthest_points(POINTS, 12).tolist() == [29, 13, 12, 30, 11, 31, 21, 22, 17, 39, 6, 37]
    rows = [[0, 17, 14, 20], [1, 24, 21, 27], [2, 28, 25, 31], [3, 32, 29, 35], [4, 33, 36, 30]]
    assert nearest_neighbours(POINTS, 4)[:5].tolist() == rows
    largest = np.linalg.norm(POINTS - POINTS.mean(axis=0), axis=1).max()
    assert largest == pytest.approx(1.460381217, abs=1e-9)
    assert np.allclose(normalised(POINTS) * largest, POINTS - POINTS.mean(axis=0))


def test_an_edge_convolution_is_the_authors():
    points = np.cos(0.05 * np.arange(120)).reshape(3, 40).T
    graph = torch.from_numpy(nearest_neighbours(points, 5))
    found = filled(EdgeConvolution(6, 8))(wave(0.05, 4, 6, 40), graph)
    head = [0.324478, 0.3198718, 0.3140281, 0.3087491, 0.302753, 0.2960546, 0.2886709, 0.2806201]
    require(found, (4, 8, 40), head, 172.629707, 0.1486004, 1e-6)


GRAPH = torch.from_numpy(nearest_neighbours(POINTS, 4))


def test_an_edge_convolution_is_the_golden_one():
    found = filled(EdgeConvolution(6, 8))(wave(0.05, 2, 6, 40), GRAPH)
    head = [0.406360334, 0.464570252, 0.498003004, 0.530733676, 0.532306259, 0.532602899]
    head += [0.531622855, 0.529368577, 0.497377942, 0.493085752, 0.48761565, 0.248049909]
    require(found, (2, 8, 40), head, 127.147408, 0.208895087)


def test_an_edge_convolution_equals_its_definition():
    layer, features = filled(EdgeConvolution(6, 8)), wave(0.3, 2, 6, 40, function=torch.sin)
    pairs = torch.stack([features[:, :, GRAPH[:, j]] for j in range(4)], dim=3)
    own = features[..., None].expand_as(pairs)
    wanted = layer.act(layer.norm(layer.conv(torch.cat([pairs - own, own], dim=1)))).amax(dim=3)
    assert_close(layer(features, GRAPH), wanted, atol=1e-12, rtol=0)


def test_local_features_are_the_golden_ones():
    x = torch.tensor([[0, 3, 1, 2, 3], [2, 2, 0, 3, 1]])
    y = torch.tensor([[1, 0, 3, 2, 3], [3, 1, 2, 0, 0]])
    found = filled(LocalFeature(6, 16))(wave(0.05, 2, 6, 8, 8), x, y)
    head = [-0.084157162, -0.015144879, 0.318249763, 0.066912054, 0.367351093, 0.302408237]
    head += [0.312450967, -0.545432648, -0.068491006, -0.637819568, -0.268015023, -0.354205243]
    require(found, (2, 16, 5), head, 8.664089, 0.333091419)


def test_a_step_of_refinement_is_the_golden_one():
    step = filled(RefineStep(8, 8, 8, (16, 8), 3))
    points = POINTS[farthest_points(POINTS, 12)] / 2
    graph = torch.from_numpy(nearest_neighbours(points, 4))
    i = torch.arange(24).view(2, 12)
    bits, features = step(
        wave(0.05, 2, 8, 8, 8),
        wave(0.3, 2, 8, 12, function=torch.sin),
        (i % 5 != 0).double(),
        torch.stack([7 * i % 4, 5 * i % 4]),
        graph,
    )
    head = [0.226849467, 0.240771754, 0.168954527, 0.144584157, 0.243452012, 0.219927776]
    head += [0.170087326, 0.130179466, 0.109673224, 0.117994097, 0.101940198, 0.144021672]
    require(bits, (2, 2, 12), head, 2.56226, 0.117477669)
    head = [0.288771352, 0.389213466, -0.0119829, -0.012963059, 0.477485608, 0.391233232]
    require(features, (2, 8, 12), head, 17.454222, 0.101651635)


def test_losses_are_the_golden_ones():
    logits = 3 * wave(0.05, 2, 3, 5)
    bits = (torch.arange(30) % 3 == 0).double().view(2, 3, 5)
    inside = (torch.arange(10) % 2 == 0).double().view(2, 5)
    share = inside.sum(dim=1) / inside.sum()  # the golden is of the batch, ours of a picture
    assert (code_loss(logits, bits, inside) * share).sum().item() == pytest.approx(
        1.555905947, abs=1e-9
    )
    everywhere = code_loss(logits, bits, torch.ones_like(inside))
    assert everywhere.mean().item() == pytest.approx(1.493518011, abs=1e-9)
    assert code_loss(logits, bits, inside * 0).tolist() == [0, 0]
    masks = (torch.arange(512) % 5 < 2).double().view(2, 16, 16)
    found = mask_loss(2 * wave(0.05, 2, 8, 8), masks)
    assert found.mean().item() == pytest.approx(0.501718692, abs=1e-9)


@pytest.mark.slow
def test_parameters_are_the_authors():
    model = timm.create_model("checkerpose_resnet34", img_size=256)

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    assert count(model) == 29_342_223
    assert count(model.backbone) == 21_284_672
    assert count(model.backbone, model.first, model.graph, model.codes) == 21_564_423
    with torch.no_grad():
        found = model.eval()(torch.zeros(1, 3, 256, 256))
    assert found.x.shape == (1, 6, 512)
    assert found.masks.shape == (1, 2, 64, 64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("checkerpose_s")


def test_the_compact_network_has_codes_of_five_bits(model):
    assert sum(p.numel() for p in model.parameters()) == 592_457
    found = model(torch.rand(2, 3, 128, 128))
    assert isinstance(found, PoseCodes)
    assert found.in_roi.shape == (2, 1, 128)
    assert found.x.shape == found.y.shape == (2, 5, 128)
    assert found.masks.shape == (2, 2, 32, 32)
    assert torch.equal(found.points[1], model.keypoints)
    assert found.places.shape == (2, 2, 128)
    assert found.places.min() > 0
    assert found.places.max() < 1
    assert source_of("checkerpose_s").licence == "none"


def test_every_weight_learns(model):
    model.zero_grad()
    sum(each.square().sum() for each in model(torch.rand(2, 3, 128, 128))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_mean_place_is_the_middle_of_a_hot_cell():
    heat = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    heat[0, 0, 5, 2] = heat[0, 1, 0, 7] = 100.0  # rows 5 and 0, columns 2 and 7
    wanted = torch.tensor([[[2.5, 7.5], [5.5, 0.5]]], dtype=torch.float64) / 8
    assert_close(mean_places(heat), wanted)
    assert_close(mean_places(torch.zeros_like(heat)), torch.full_like(wanted, 0.5))


def test_signs_of_waves_are_the_bits_of_a_place():
    cells = torch.arange(32)
    places = ((cells + 0.3) / 32)[None, None].expand(1, 2, -1).double()
    waves = waves_of(places, 5)
    assert waves.shape == (1, 20, 32)
    for bit in range(5):  # sines of x and y, then cosines, of each bit
        wanted = (cells >> (4 - bit)) & 1
        for row in (4 * bit, 4 * bit + 1):
            assert torch.equal((waves[0, row] < 0).long(), wanted)


def test_first_bits_are_trained_alone_for_a_number_of_pictures():
    model = timm.create_model("checkerpose_s", coarse=4).train()
    images = torch.rand(2, 3, 128, 128)
    for _ in range(2):
        found = model(images)
        assert not found.x[:, 3:].any()
        assert not found.masks.any()
        assert found.x[:, :3].abs().min() > 0
        assert found.masks.shape == (2, 2, 32, 32)
    assert int(model.trained) == 4
    assert model(images).x[:, 3:].abs().min() > 0  # now all
    assert int(model.trained) == 4
    other = timm.create_model("checkerpose_s", coarse=4)
    other.load_state_dict(model.state_dict())  # as a resumed run does
    assert other.train()(images).x[:, 3:].abs().min() > 0


def test_all_bits_are_computed_in_use_whatever_was_trained():
    model = timm.create_model("checkerpose_s", coarse=4).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 128, 128)).x[:, 3:].abs().min() > 0


def test_keypoints_may_be_ones_own():
    own = (0.05 * POINTS).tolist()
    model = timm.create_model("checkerpose_s", keypoints=own)
    assert_close(model.keypoints.double(), torch.tensor(own, dtype=torch.float64))
    assert model.neighbours.shape == (40, 12)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 128, 128)).x.shape == (1, 5, 40)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_classes": 2}, "serves one object, not 2"),
        ({"img_size": 64}, "reads crops of 128×128 pixels, not 64×64"),
        ({"img_size": (128, 64)}, "not 128×64: set data.image_size 128"),
        ({"keypoints": [[0.0, 0.0, 0.0]] * 4}, "is a list of 12 to 4,096 points"),
        ({"keypoints": [[0.0, 0.0]] * 20}, "points \\[x, y, z\\] in metres"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        CheckerPose(**settings)
