"""Group convolutions: the authors' outputs, exact quarter turns, samples, and the fold."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.kits.equivariant.group import GL, SL, rotations, sample_rotations
from smallfry.layers.group_conv import (
    GroupConv2d,
    ImplicitKernel,
    LiftingConv2d,
    ProjectionConv2d,
    Samples,
    as_convolution,
    pixel_grid,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from zoo_golden import filled, images, series

GOLDEN = json.loads((Path(__file__).parent / "golden" / "equivariant.json").read_text())
GROUPS = {"gl2": GL(), "sl2": SL()}


def elements_of(name, kind):
    """Three elements: exp of a symmetric matrix, times a rotation."""
    c = series(name, 12).reshape(3, 4)
    x = torch.zeros(3, 2, 2, dtype=torch.float64)
    x[:, 0, 0], x[:, 0, 1], x[:, 1, 0] = c[:, 0], c[:, 1], c[:, 1]
    x[:, 1, 1] = c[:, 2] if kind == "gl2" else -c[:, 0]
    turn = torch.pi * c[:, 3]
    r = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=-1)
    g = torch.matrix_exp(0.4 * x) @ r.reshape(3, 2, 2)
    return Samples(g, torch.linalg.inv(g))


def fill(layer):
    """Fill the kernel network under the authors' names."""
    found = {}
    for name, value in layer.state_dict().items():
        theirs = name.replace("psi.sines", "inr.kernel_net.net")
        theirs = theirs.replace("psi.last", "inr.final_linear")
        found[name] = filled(theirs, value.shape)
    layer.load_state_dict(found)
    return layer


def built(kind):
    """Build the layers of the reference outputs."""
    group = GROUPS[kind]
    lift = LiftingConv2d(group, 2, 4, 5, width=8, hidden=1).double()
    return fill(lift), fill(GroupConv2d(group, 4, 3, 3, width=8, hidden=1).double())


@pytest.mark.parametrize(("kind", "layer"), [("gl2", "gl2_gconv_corrected"), ("sl2", "sl2_gconv")])
def test_outputs_equal_the_authors(kind, layer):
    lift, conv = built(kind)
    first, second = elements_of("g1", kind), elements_of("g2", kind)
    flat = first.elements.flatten().tolist()
    assert flat == pytest.approx(GOLDEN[f"{kind}_elements"], abs=1e-12)
    with torch.no_grad():
        lifted = lift(images((2, 2, 12, 12)), first)
        found = conv(lifted, first, second)
    for given, wanted in ((lifted, GOLDEN[f"{kind}_lift"]), (found, GOLDEN[layer])):
        assert list(given.shape) == wanted["shape"]
        assert given.flatten()[:10].tolist() == pytest.approx(wanted["head"], abs=1e-9)
        assert given.sum().item() == pytest.approx(wanted["sum"], rel=1e-11)
        assert given.norm().item() == pytest.approx(wanted["l2"], rel=1e-12)


def test_the_authors_divide_by_the_determinant_of_the_other_index():
    conv = built("gl2")[1]
    first, second = elements_of("g1", "gl2"), elements_of("g2", "gl2")
    determinants = torch.linalg.det(first.elements)
    assert determinants.tolist() == pytest.approx(GOLDEN["det_g1"], abs=1e-12)
    with torch.no_grad():
        lifted = built("gl2")[0](images((2, 2, 12, 12)), first)
        weight = conv.kernel(conv.geometry(first, second)) * determinants[:, None, None]
        weight = weight / determinants[:, None, None, None, None]
        theirs = F.conv2d(
            lifted.flatten(1, 2), weight.flatten(2, 3).flatten(0, 1), padding=1
        ).unflatten(1, (3, 3))
    wanted = GOLDEN["gl2_gconv"]
    assert theirs.flatten()[:10].tolist() == pytest.approx(wanted["head"], abs=1e-9)
    assert theirs.sum().item() == pytest.approx(wanted["sum"], rel=1e-11)


@pytest.mark.parametrize("kind", GROUPS)
def test_pixels_have_the_authors_places(kind):
    assert pixel_grid(5).permute(2, 1, 0).flatten().tolist() == pytest.approx(
        GOLDEN[f"{kind}_grid"], abs=1e-15
    )


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("kind", GROUPS)
def test_quarter_turns_of_the_input_turn_the_output_and_shift_its_samples(kind, turns):
    lift, conv = built(kind)
    project = fill(ProjectionConv2d(GROUPS[kind], 3, 2, 3, width=8, hidden=1).double())
    four = rotations(4)
    given = images((2, 2, 12, 12))
    with torch.no_grad():
        parts = []
        for x in (given, given.rot90(turns, (2, 3))):
            lifted = lift(x, four)
            grouped = conv(lifted, four, four)
            parts.append((lifted, grouped, project(grouped, four)))
    for upright, turned in zip(*parts, strict=True):
        wanted = upright.rot90(turns, (-2, -1))
        if upright.ndim == 5:
            # y points down, so a turn of the picture is one against the order of the samples
            wanted = wanted.roll(-turns, 2)
        largest = float(upright.abs().max())
        torch.testing.assert_close(turned, wanted, rtol=0, atol=1e-12 * max(1, largest))
        assert not torch.allclose(upright, wanted, atol=1e-3)


def test_the_error_under_turns_falls_as_one_over_the_root_of_the_samples():
    """Mean over the group of features after two layers, of pictures upright and turned."""
    torch.manual_seed(0)
    group = SL(variance=0.0)
    lift = LiftingConv2d(group, 1, 3, 5, width=8, hidden=1).double()
    conv = GroupConv2d(group, 3, 3, 3, padding=0, width=8, hidden=1).double()
    random = torch.Generator().manual_seed(1)
    picture = torch.randn(1, 1, 7, 7, dtype=torch.float64, generator=random)
    both = torch.cat([picture, picture.rot90(1, (2, 3))])
    counts, errors = (4, 8, 16, 32), []
    with torch.no_grad():
        for count in counts:
            found = []
            for _ in range(60):
                elements = sample_rotations(count, 2, random)
                samples = Samples(elements, elements.mT)
                h = F.gelu(lift(both, samples))
                upright, turned = F.gelu(conv(h, samples, samples) / count).mean(2).flatten(1)
                found.append((upright - turned).square().mean())
            errors.append(torch.stack(found).mean().sqrt().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.12)


@pytest.mark.parametrize("kind", GROUPS)
def test_layers_are_the_convolutions_that_they_fold_into(kind):
    lift, conv = built(kind)
    project = fill(ProjectionConv2d(GROUPS[kind], 3, 2, 3, width=8, hidden=1).double())
    first, second = elements_of("g1", kind), elements_of("g2", kind)
    with torch.no_grad():
        x = images((2, 2, 12, 12))
        lifted = lift(x, first)
        grouped = conv(lifted, first, second)
        folded = as_convolution(lift, outputs=first)
        assert folded.weight.shape == (12, 2, 5, 5)
        torch.testing.assert_close(folded(x), lifted.flatten(1, 2))
        folded = as_convolution(conv, first, second)
        assert folded.weight.shape == (9, 12, 3, 3)
        torch.testing.assert_close(folded(lifted.flatten(1, 2)), grouped.flatten(1, 2))
        folded = as_convolution(project, second)
        torch.testing.assert_close(folded(grouped.flatten(1, 2)), project(grouped, second))
    assert folded.weight.requires_grad
    with pytest.raises(ValueError, match="a lifting is folded with output samples"):
        as_convolution(lift, first)


def test_a_kernel_is_that_of_its_definition():
    """One weight of a group layer, by hand."""
    conv = built("gl2")[1]
    first, second = elements_of("g1", "gl2"), elements_of("g2", "gl2")
    h, g, y, x = 2, 1, 0, 2
    back = torch.linalg.inv(second.elements[h])
    place = back @ torch.tensor([2 / 3, -2 / 3], dtype=torch.float64)  # x, y
    coordinates = torch.cat([place, GL().coordinates(back @ first.elements[g])])
    with torch.no_grad():
        weight = conv.psi(coordinates) * torch.sigmoid(2 * (1 - coordinates.norm()))
        weight /= torch.linalg.det(first.elements[g])
        found = conv.kernel(conv.geometry(first, second))[:, h, :, g, y, x]
    torch.testing.assert_close(found, weight)


def test_kernels_are_never_in_half_precision():
    lift = LiftingConv2d(GL(), 1, 2, width=8)
    geometry = lift.geometry(rotations(3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lift.kernel(geometry), LiftingConv2d.kernel(lift, geometry))
        assert lift.kernel(geometry).dtype == torch.float32
        assert lift(torch.ones(1, 1, 8, 8), rotations(3)).dtype == torch.bfloat16


def test_features_of_other_samples_and_impossible_kernels_are_refused():
    conv, four = GroupConv2d(GL(), 2, 2, 3, width=8), rotations(4)
    with pytest.raises(ValueError, match="4 samples, height, width"):
        conv(torch.zeros(1, 2, 3, 8, 8), four, four)
    with pytest.raises(ValueError, match="4 samples, height, width"):
        ProjectionConv2d(GL(), 2, 2, width=8)(torch.zeros(1, 2, 8, 8), four)
    with pytest.raises(UsageError, match="at least one channel"):
        ImplicitKernel(2, 0, 1, 3)
    assert "padding=1" in repr(conv)
