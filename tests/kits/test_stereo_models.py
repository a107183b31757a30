"""RTS2Net: parameters, the goldens of matching, its exits, and refused settings."""

import pytest
import timm
import torch
from torch.testing import assert_close

from smallfry.errors import UsageError
from smallfry.kits.stereo.models import FACTORS, RTS2Net, StereoOutput
from smallfry.kits.stereo.volume import difference_volume, enlarge, soft_argmin, warp
from smallfry.models.sources import source_of

EXACT = {"atol": 1e-9, "rtol": 0}


def wave(function, step, *shape):
    count = torch.Size(shape).numel()
    return function(step * torch.arange(count, dtype=torch.float64)).view(shape)


LEFT, RIGHT = wave(torch.sin, 0.13, 1, 2, 4, 8), wave(torch.cos, 0.17, 1, 2, 4, 8)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "parameters", "encoder"),
    [
        ("rts2net_c1", 68_029, 4_750),
        ("rts2net_c4", 190_207, 74_188),
        ("rts2net_c8", 556_475, 295_544),
        ("rts2net_c16", 1_986_259, 1_179_760),
        ("rts2net_c32", 7_634_819, 4_714_208),
    ],
)
def test_parameters_are_those_of_the_table(name, parameters, encoder):
    model = timm.create_model(name, num_classes=6)

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    assert count(model) == parameters
    assert count(model.stem, model.blocks) == encoder
    assert count(*(stage.refine for stage in model.stages)) == 47_814
    assert source_of(name).paper.startswith("Dovesi et al. 2020")


def test_differences_are_the_golden_ones():
    volume = difference_volume(LEFT, RIGHT, 3)
    assert volume.shape == (1, 2, 3, 4, 8)
    one = (0.0, -0.870365857, -0.728504215, -0.56256625, -0.37586437, -0.172386313, 0.043296273)
    two = (0.0, 0.129634143, -0.742919448, -0.605396352, -0.445874528, -0.267558102, -0.0742933)
    assert_close(volume[0, 0, 1, 0], doubles(*one, 0.266137788), **EXACT)
    assert_close(volume[0, 0, 2, 0], doubles(*two, 0.129520594), **EXACT)
    assert volume.sum().item() == pytest.approx(44.588073768, abs=1e-9)
    assert volume.abs().sum().item() == pytest.approx(210.4555473, abs=1e-7)


def test_shifted_and_warped_volumes_are_equal():
    candidates = torch.arange(3, dtype=torch.float64)[None, :, None, None].expand(1, 3, 4, 8)
    warped = difference_volume(LEFT, RIGHT, candidates)
    assert_close(warped, difference_volume(LEFT, RIGHT, 3), **EXACT)


def test_the_mean_candidate_is_the_golden_one():
    cost = difference_volume(LEFT, RIGHT, 3).abs().sum(dim=1)
    found = soft_argmin(cost, torch.arange(3, dtype=torch.float64))
    row = (1.370379816, 1.530985966, 1.051621003, 1.016919293, 0.981671566, 0.947015242)
    assert_close(found[0, 0], doubles(*row, 1.033618289, 1.076270666), **EXACT)
    assert found.sum().item() == pytest.approx(35.342007816, abs=1e-9)


def test_warped_features_are_the_golden_ones():
    disparity = (0.6 * (torch.arange(32, dtype=torch.float64) % 5)).view(1, 1, 4, 8)
    found = warp(RIGHT, disparity)[:, :, 0]
    row = (1.0, 0.994233907, 0.988467814, 0.977018747, 0.959886706, 0.659983146, 0.605336268)
    assert_close(found[0, 0, 0], doubles(*row, 0.55068939), **EXACT)
    assert found.sum().item() == pytest.approx(-3.530594515, abs=1e-9)


@pytest.mark.parametrize("true", [0, 2, 3])
def test_a_matcher_without_parameters_finds_a_whole_disparity(true):
    right = torch.randn(1, 4, 6, 20, generator=torch.Generator().manual_seed(true)).double()
    left = torch.roll(right, true, dims=3)
    cost = difference_volume(left, right, 5).abs().sum(dim=1) / 1e-3  # of a temperature near 0
    found = soft_argmin(cost, torch.arange(5, dtype=torch.float64))
    assert_close(found[..., true:], torch.full_like(found[..., true:], true), **EXACT)


def test_enlarging_keeps_a_ramp():
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 4, 8)
    large = enlarge(ramp, 2)
    inner = (torch.arange(16.0) / 2 - 0.25).clamp(0, 7)
    assert_close(large[0, 0, 3], inner)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("rts2net_c1", num_classes=3, max_disparity=48).eval()


VIEWS = torch.rand(2, 6, 64, 128, generator=torch.Generator().manual_seed(1))


def test_outputs_are_maps_of_three_sizes(model):
    with torch.no_grad():
        found = model(VIEWS)
    assert isinstance(found, StereoOutput)
    for i, factor in enumerate(FACTORS):
        disparity, refined, semantics = found[3 * i : 3 * i + 3]
        size = (64 // factor, 128 // factor)
        assert disparity.shape == refined.shape == (2, *size)
        assert semantics.shape == (2, 3, *size)
    assert found.disparity16.min() >= 0
    assert found.disparity16.max() <= 2  # of candidates 0, 1 and 2


@pytest.mark.parametrize("exits", [1, 2])
def test_a_shorter_network_has_the_same_first_outputs(model, exits):
    short = timm.create_model("rts2net_c1", num_classes=3, max_disparity=48, exits=exits).eval()
    kept = {name: v for name, v in model.state_dict().items() if name in short.state_dict()}
    short.load_state_dict(kept)
    with torch.no_grad():
        whole, found = model(VIEWS), short(VIEWS)
    assert len(found) == 3 * exits
    for name, value in found._asdict().items():
        assert torch.equal(value, getattr(whole, name))


def test_the_blind_control_has_the_same_parameters_and_sees_no_classes():
    settings = {"num_classes": 3, "max_disparity": 48}
    blind = timm.create_model("rts2net_c1", synergy="blind", **settings).eval()
    plain = timm.create_model("rts2net_c1", **settings).eval()
    plain.load_state_dict(blind.state_dict())
    with torch.no_grad():
        before = blind(VIEWS), plain(VIEWS)
        for other in (blind, plain):
            for stage in other.stages:
                stage.head.weight += 1 - 2 * torch.rand(
                    stage.head.weight.shape, generator=torch.Generator().manual_seed(2)
                )
        after = blind(VIEWS), plain(VIEWS)
    for i, factor in enumerate(FACTORS):
        assert torch.equal(before[0][3 * i + 1], after[0][3 * i + 1])
        assert not torch.equal(before[1][3 * i + 1], after[1][3 * i + 1]), factor
        assert not torch.equal(before[0][3 * i + 2], after[0][3 * i + 2])


def test_every_weight_learns():
    torch.manual_seed(0)
    model = timm.create_model("rts2net_c1", num_classes=3, max_disparity=48)
    sum(each.square().sum() for each in model(VIEWS)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"in_chans": 3}, "reads two colour views, 6 channels, not 3"),
        ({"img_size": (64, 100)}, "multiples of 32 pixels per side, not 64×100"),
        ({"img_size": 16}, "not 16×16: set data.image_size"),
        ({"max_disparity": 50}, "max_disparity is 32, 48, … 1024, got 50"),
        ({"exits": 4}, "exits is 1, 2 or 3"),
        ({"synergy": "deaf"}, "synergy is semantic or blind"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        RTS2Net(**settings)
