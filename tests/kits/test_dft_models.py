"""The equivariant network: e3nn's products, symmetries, and what it refuses."""

import numpy as np
import pytest
import timm

pytest.importorskip("pyscf", reason="PySCF, of the extra dft, is not installed")
pytest.importorskip("e3nn", reason="e3nn, of the extra dft, is not installed")

import torch
from e3nn import o3

from smallfry.errors import UsageError
from smallfry.kits.dft.layout import SHELLS, WIDTH
from smallfry.kits.dft.models import (
    DensityNet,
    EquivariantLinear,
    NeighbourProduct,
    Neighbours,
)

IRREPS = o3.Irreps("6x0e+4x1o+3x2e+1x3o+1x4e")
AXES = torch.tensor([1, 2, 0])  # of e3nn: y, z, x


def molecules(count=2, atoms=6, seed=0):
    """Draw molecules with a padding atom, of all four elements."""
    random = torch.Generator().manual_seed(seed)
    found = torch.zeros(count, 1, atoms, 4)
    kinds = torch.tensor([8, 1, 6, 7, 1, 0])[:atoms]
    found[:, 0, :, 0] = kinds
    found[:, 0, :, 1:] = 3 * torch.rand(count, atoms, 3, generator=random) * (kinds > 0)[:, None]
    return found


def turned():
    """Return a rotation matrix."""
    return torch.matrix_exp(
        torch.tensor([[0, 1.1, -0.4], [-1.1, 0, 0.7], [0.4, -0.7, 0.0]]).double()
    )


@pytest.fixture
def doubles():
    """Make float64 the default, in which e3nn then builds its constants too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(**settings):
    """Build a network whose outputs are not small."""
    torch.manual_seed(0)
    model = DensityNet(**settings)
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("given", [(5, 0, 0, 0, 0), (4, 3, 2, 1, 1)])
def test_products_equal_those_of_e3nn(doubles, given):
    torch.manual_seed(0)
    wanted, count = (3, 2, 1, 2, 1), 7
    ours = NeighbourProduct(given, wanted, 4).double()
    spell = ["0e", "1o", "2e", "3o", "4e"]
    one = o3.Irreps([(n, ir) for n, ir in zip(given, spell, strict=True) if n])
    two = o3.Irreps.spherical_harmonics(4)
    out = o3.Irreps([(n, ir) for n, ir in zip(wanted, spell, strict=True)])
    peer = o3.FullyConnectedTensorProduct(one, two, out, shared_weights=False).double()
    distances, cutoffs = torch.rand(count, 8).double(), torch.rand(count, 1).double()
    vectors = torch.randn(count, 3).double()
    harmonics = o3.spherical_harmonics(two, vectors, True, normalization="component")
    features = [torch.randn(count, n, 2 * k + 1).double() for k, n in enumerate(given)]
    # each atom gets from one other
    sources, targets = torch.arange(count), torch.arange(count).roll(1)
    pairs = Neighbours(sources, targets, harmonics, distances, cutoffs)
    found = torch.cat([part.flatten(1) for part in ours(features, pairs)], dim=1)
    # our weights, (rows, columns) of each i with rows by k, j and channel wanted, in e3nn's order
    by_path, weights = {}, ours.weights(distances) * cutoffs
    for i, part in enumerate(weights.split([n * m for n, m in ours.shapes], dim=1)):
        rows = part.view(count, *ours.shapes[i]).split(
            [many * wanted[k] for k, many in ours.couplings[i]], dim=1
        )
        for (k, many), block in zip(ours.couplings[i], rows, strict=True):
            js = [j for j in range(5) if abs(i - j) <= k <= i + j and (i + j + k) % 2 == 0]
            assert len(js) == many
            for j, each in zip(js, block.split(wanted[k], dim=1), strict=True):
                by_path[i, j, k] = each.transpose(1, 2)  # (pairs, given, wanted)
    momenta = [n.ir.l for n in one]
    flat = [by_path[momenta[p.i_in1], p.i_in2, p.i_out].flatten(1) for p in peer.instructions]
    assert len(flat) == len(by_path)
    inputs = torch.cat([part.flatten(1) for part in features if part.shape[1]], dim=1)
    expected = peer(inputs[sources], harmonics, torch.cat(flat, dim=1)) / 3
    torch.testing.assert_close(found[targets], expected, rtol=0, atol=1e-12)


def test_linear_maps_mix_channels_alone():
    layer = EquivariantLinear((3, 2, 0, 0, 0), (2, 4, 1, 0, 0)).double()
    given = [torch.randn(5, 3, 1).double(), torch.randn(5, 2, 3).double()]
    given += [torch.zeros(5, 0, 2 * k + 1).double() for k in (2, 3, 4)]
    found = layer(given)
    assert [part.shape[1:] for part in found] == [(2, 1), (4, 3), (1, 5), (0, 7), (0, 9)]
    wanted = torch.einsum("oc,ncm->nom", layer.parts["1"].weight, given[1])
    torch.testing.assert_close(found[1], wanted)
    assert (found[2] == 0).all()  # nothing to make it of


@pytest.mark.parametrize("reflect", [False, True])
def test_coefficients_turn_with_the_molecule_to_many_digits(doubles, reflect):
    check_equivariance(torch.float64, 1e-11, reflect)


@pytest.mark.parametrize("reflect", [False, True])
def test_coefficients_turn_with_the_molecule(reflect):
    check_equivariance(torch.float32, 1e-5, reflect)


def check_equivariance(kind, bar, reflect):
    """Turn and move molecules, and compare with the turned coefficients."""
    model, given = network().to(kind), molecules().to(kind)
    turn = turned()
    turn = -turn if reflect else turn
    moved = given.clone()
    moved[..., 1:] = given[..., 1:] @ turn.T.to(kind) + 0.7
    moved[..., 1:] *= (given[..., :1] > 0).to(kind)
    swap = torch.eye(3).double()[AXES]
    wigner = IRREPS.D_from_matrix(swap @ turn @ swap.T).to(kind)
    with torch.no_grad():
        before, after = model(given)[..., 1:], model(moved)[..., 1:]
    scale = before.abs().max()
    assert (before @ wigner.T - after).abs().max() < bar * scale
    assert (before - after).abs().max() > 0.05 * scale


def test_atoms_may_be_in_any_order_and_among_padding():
    model, given = network().double(), molecules().double()
    order = torch.tensor([3, 5, 0, 4, 1, 2])
    with torch.no_grad():
        found, moved = model(given), model(given[:, :, order])
        alone = model(given[:1, :, :5])
        none = model(torch.zeros(2, 1, 3, 4, dtype=torch.float64))
    torch.testing.assert_close(moved, found[:, order], rtol=0, atol=1e-11)
    torch.testing.assert_close(alone, found[:1, :5], rtol=0, atol=1e-11)
    assert (found[:, 5] == 0).all()
    assert torch.equal(found[..., 0], given[:, 0, :, 0])
    assert (none == 0).all()
    assert (found[:, 1, 4:7] == 0).all()  # hydrogen has three s functions
    assert (found[:, 1, 1:4] != 0).all()


def test_distant_atoms_are_seen_up_to_the_cutoff_and_smoothly():
    model = network().double()

    def at(distance):
        pair = torch.tensor([[[[8.0, 0, 0, 0], [1.0, 0, 0, distance]]]]).double()
        with torch.no_grad():
            return model(pair)[0, 0, 1:]

    assert torch.equal(at(6.001), at(50.0))
    assert (at(5.99) - at(6.001)).abs().max() < 1e-3 * at(6.001).abs().max()
    assert (at(3.0) - at(6.001)).abs().max() > 1e-2 * at(6.001).abs().max()


def test_sizes():
    counts = [
        sum(p.numel() for p in timm.create_model(f"density_net_{size}").parameters())
        for size in ("tiny", "small")
    ]
    assert counts[0] == 46_301
    assert counts[1] > 2 * counts[0]


def test_means_and_scales_are_those_of_the_labels():
    model, random = DensityNet(elements=(1, 8)), np.random.default_rng(0)
    labels = torch.zeros(10, 4, 4 + WIDTH)
    labels[:, 0, 0], labels[:, 1:3, 0] = 8, 1
    labels[..., 4:] = torch.from_numpy(random.normal(2, 3, (10, 4, WIDTH)))
    model.fit_outputs(labels)
    oxygen = labels[:, 0, 4:]
    assert model.mean[1, :6].numpy() == pytest.approx(oxygen[:, :6].mean(0).numpy(), rel=1e-5)
    assert (model.mean[:, 6:] == 0).all()  # a mean vector would not turn
    root = oxygen[:, 6:9].square().mean().sqrt().item()
    assert model.scale[1, 6:9].tolist() == pytest.approx([root] * 3, rel=1e-5)
    spread = oxygen[:, 0].std(correction=0).item()
    assert model.scale[1, 0].item() == pytest.approx(spread, rel=1e-4)
    assert sum(SHELLS) == 15


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_classes": 10}, "50 numbers per atom"),
        ({"in_chans": 3}, "one channel"),
        ({"layers": 0}, "at least one layer"),
        ({"cutoff": 0.0}, "cutoff above 0"),
        ({"channels": (4, 2)}, "channels of 5 angular momenta"),
    ],
)
def test_other_settings_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        DensityNet(**settings)


def test_elements_that_it_has_not_learnt_are_named():
    model = DensityNet(elements=(1, 8))
    with pytest.raises(UsageError, match="has not learnt C, N, only H, O"):
        model(molecules())
    labels = torch.zeros(2, 3, 4 + WIDTH)
    labels[:, :, 0] = 1
    with pytest.raises(UsageError, match="no training molecule has O"):
        model.fit_outputs(labels)
