"""KPSVD, Deflation, Lanczos, KFAC-corrected, two levels and SNGD against dense matrices."""

import copy

import pytest
import torch
from best_scale import best_scale
from dense_fisher import dense_fisher, inverted_fisher
from torch import nn
from torch.nn import functional as F

from smallfry.curvature.fisher_layers import Metric, insert_fisher_layers
from smallfry.errors import UsageError
from smallfry.optim import (
    EKFAC,
    KFAC,
    KPSVD,
    SNGD,
    Deflation,
    DiagonalInBasis,
    ExactNG,
    KFACCorrected,
    KroneckerProduct,
    Lanczos,
    TwoLevel,
)

D = torch.float64
CLASSES = {"likelihood": "categorical", "fisher": "exact", "kl_clip": None, "momentum": 0.0}


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        z = x
        for _ in range(3):
            z = torch.tanh(self.inner(z) + x)
        return self.head(z)


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)
    ),
    "shared": Recursive,
}


@pytest.fixture(params=NETWORKS)
def model(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]().to(D)


def data(samples=25):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, dtype=D, generator=random)
    return x, torch.randint(2, (samples,), generator=random)


def stepped(kind, model, steps=1, lr=0.0, **settings):
    """An optimizer after some steps on one batch, with the batch's gradients."""
    model = copy.deepcopy(model)
    fixed = {**CLASSES, "damping": 0.1, "statistics_every": 1, "burn_in": 0}
    optimizer = kind(model, lr=lr, **{**fixed, **settings})
    optimizer.monitor()
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.model = model
    return optimizer


def rearranged(fisher, block):
    """Z with Z(R ⊗ S) = vec(R) vec(S)ᵀ, of a dense block in the order of its matrix."""
    _, outputs, inputs = block.shape
    order = [
        flat
        for unit in torch.eye(block.size, dtype=D)
        for flat in [block.from_matrix(unit.reshape(block.shape))]
    ]
    turn = torch.stack([torch.cat([t.reshape(-1) for t in one.values()]) for one in order])
    whole = (turn @ fisher @ turn.T).reshape(outputs, inputs, outputs, inputs)
    return whole.permute(1, 3, 0, 2).reshape(inputs**2, outputs**2)


def test_kpsvd_is_the_nearest_kronecker_product(model):
    optimizer = stepped(KPSVD, model)
    for block in optimizer.blocks:
        fisher = dense_fisher(model, data()[0], "categorical", block.parameters)
        z = rearranged(fisher, block)
        sigma = torch.linalg.svdvals(z)
        r, s = optimizer.approximation.factors(optimizer.curvature[block.name])
        found = torch.outer(r.flatten(), s.flatten())
        assert float((z - found).norm()) == pytest.approx(float(sigma[1:].norm()), rel=1e-9)
        assert float(torch.linalg.eigvalsh(r).min()) > -1e-12 * float(r.norm())
        assert float(torch.linalg.eigvalsh(s).min()) > -1e-12 * float(s.norm())


@pytest.mark.parametrize("steps", [0, 15])
def test_errors_are_true_and_ordered_as_the_methods_are(model, steps):
    model = stepped(KFAC, model, steps=steps, lr=0.1).model
    found = {}
    for name, kind, settings in (
        ("kfac", KFAC, {}),
        ("kpsvd", KPSVD, {}),
        ("corrected", KFACCorrected, {}),
        ("deflation", Deflation, {}),
        ("lanczos", Lanczos, {}),
        ("three", KPSVD, {"rank": 3, "inverse": "pcg"}),
    ):
        optimizer = stepped(kind, model, **settings)
        found[name] = [b.fisher_error for b in optimizer.diagnostics().blocks]
        for block, error in zip(optimizer.blocks, found[name], strict=True):
            if name in ("kfac", "kpsvd"):
                a, g = optimizer.approximation.factors(optimizer.curvature[block.name])
                fisher = dense_fisher(model, data()[0], "categorical", block.parameters)
                z, mine = rearranged(fisher, block), torch.outer(a.flatten(), g.flatten())
                true = (z - mine).norm() / z.norm()
                assert error == pytest.approx(float(true), abs=1e-6)
            if name == "kfac":
                c = best_scale(optimizer.preconditioner.latest[block.name][0], a, g)
                best = float((z - c * mine).norm() / z.norm())
                found.setdefault("scaled", []).append(best)
    slack = 1e-7  # errors are roots of differences
    for i in range(len(found["kfac"])):
        e = {name: errors[i] for name, errors in found.items()}
        assert e["deflation"] <= min(e["kpsvd"], e["corrected"]) + slack
        assert e["corrected"] <= e["kfac"] + slack
        assert e["kpsvd"] <= e["scaled"] + slack
        assert e["scaled"] <= e["kfac"] + slack
        assert e["three"] <= e["deflation"] + slack
        assert e["lanczos"] == pytest.approx(e["deflation"], abs=slack)


@pytest.mark.parametrize(
    "kind", [KFAC, EKFAC, KPSVD, Deflation, Lanczos, KFACCorrected, SNGD, ExactNG, TwoLevel]
)
def test_turning_the_coordinates_of_the_inputs_turns_the_step(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)).to(D)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=D)).Q
    turned = copy.deepcopy(model)
    with torch.no_grad():
        turned[0].weight.copy_(model[0].weight @ turn.T)
    x, y = data()
    found = []
    for net, inputs in ((model, x), (turned, x @ turn.T)):
        optimizer = kind(net, lr=0.0, **{**CLASSES, "damping": 0.1, "statistics_every": 1})
        F.cross_entropy(net(inputs), y).backward()
        optimizer.step()
        found.append(optimizer._directions({n: p.grad for n, p in net.named_parameters()}))
    plain, other = found
    torch.testing.assert_close(other["0.weight"], plain["0.weight"] @ turn.T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(other["2.weight"], plain["2.weight"], rtol=1e-6, atol=1e-8)


def test_the_basis_of_the_nearest_product_makes_the_diagonal_nearer_on_the_whole():
    torch.manual_seed(0)
    totals = []
    for basis in ("kfac", "kpsvd"):
        errors = 0.0
        for make in NETWORKS.values():
            torch.manual_seed(0)
            optimizer = stepped(EKFAC, make().to(D), basis=basis)
            errors += sum(b.fisher_error for b in optimizer.diagnostics().blocks)
        totals.append(errors)
    assert totals[1] < totals[0]


def test_a_clamped_sum_is_inverted_where_no_clamp_is_needed(model):
    optimizer = stepped(Deflation, model, damping=100.0)
    for block in optimizer.blocks:
        state = optimizer.curvature[block.name]
        terms = optimizer.approximation.terms(state)
        smallest = optimizer.approximation.diagnose(block, state, [])["smallest"]
        assert smallest > 0.05
        damping = optimizer.lambdas[block.name]
        dense = 0
        for k in range(2):
            r, s = terms.inputs[k, 0], terms.outputs[k, 0]
            if k == 0:
                pi = (r.trace() / len(r) / (s.trace() / len(s))).sqrt()
                r = r + pi * damping**0.5 * torch.eye(len(r), dtype=D)
                s = s + damping**0.5 / pi * torch.eye(len(s), dtype=D)
            dense = dense + torch.kron(s, r)
        x = torch.randn(block.shape, dtype=D)
        found = optimizer.approximation.apply(block, state, x, damping)
        torch.testing.assert_close((dense @ found.flatten()), x.flatten())


def test_conjugate_gradients_solve_with_the_true_damping(model):
    optimizer = stepped(KPSVD, model, rank=2, inverse="pcg", damping=10.0)
    for block in optimizer.blocks:
        state, damping = optimizer.curvature[block.name], optimizer.lambdas[block.name]
        terms = optimizer.approximation.terms(state)
        dense = sum(torch.kron(terms.outputs[k, 0], terms.inputs[k, 0]) for k in range(2))
        dense = dense + damping * torch.eye(block.size, dtype=D)
        x = torch.randn(block.shape, dtype=D)
        found = optimizer.approximation.apply(block, state, x, damping)
        error = (dense @ found.flatten() - x.flatten()).norm() / x.norm()
        assert float(error) < 2e-3


# Two levels


def exact_direction(model, optimizer):
    """(F + λ I)⁻¹ g of the whole network."""
    names = [n for n, _ in model.named_parameters()]
    fisher = dense_fisher(model, data()[0], "categorical", names)
    g = torch.cat([p.grad.flatten() for p in optimizer.model.parameters()])
    damping = optimizer.lambdas[optimizer.blocks[0].name]
    return torch.linalg.solve(fisher + damping * torch.eye(len(g), dtype=D), g), fisher, damping


def directions(optimizer):
    grads = {n: p.grad for n, p in optimizer.model.named_parameters()}
    found = optimizer._directions(grads)
    return torch.cat([found[n].flatten() for n in grads])


def energy(z, exact, fisher, damping):
    e = z - exact
    return 0.5 * float(e @ (fisher @ e + damping * e))


@pytest.mark.parametrize(
    "fine",
    [
        "kfac",
        "ekfac",
        "kpsvd",
        "deflation",
        "kfac_corrected",
        pytest.param(DiagonalInBasis(factor_rank=1), id="ekfac-rank"),
    ],
)
@pytest.mark.parametrize(
    "coarse",
    ["nicolaides", "spectral", "residual", "z1", "gradient", ("z1", "residual", "previous")],
)
def test_the_coarse_level_lowers_the_energy_by_what_it_reports(fine, coarse):
    torch.manual_seed(0)
    model = Recursive().to(D)
    optimizer = stepped(TwoLevel, model, steps=2, fine=fine, coarse=coarse)
    exact, fisher, damping = exact_direction(model, optimizer)
    z = directions(optimizer)
    plain = optimizer.approximation.apply
    fine_only = {
        b.name: plain(
            b,
            optimizer.curvature[b.name],
            b.to_matrix({n: p.grad for n, p in b.parameters.items()}),
            optimizer.lambdas[b.name],
        )
        for b in optimizer.blocks
    }
    parts = {}
    for b in optimizer.blocks:
        parts |= b.from_matrix(fine_only[b.name])
    z1 = torch.cat([parts[n].flatten() for n, _ in model.named_parameters()])
    lowered = energy(z, exact, fisher, damping) - energy(z1, exact, fisher, damping)
    assert lowered <= 1e-9
    assert optimizer.diagnostics().energy <= 0
    if coarse != ("z1", "residual", "previous"):  # whose previous step is another by now
        assert lowered == pytest.approx(optimizer.energy, rel=1e-6, abs=1e-9)


def test_a_complete_coarse_space_is_exact_natural_gradient():
    def everything(level, solve):
        basis = []
        for key, part in level.gradient.items():
            for unit in torch.eye(part.numel(), dtype=D):
                basis.append({key: unit.reshape(part.shape)})
        return basis

    torch.manual_seed(0)
    model = Recursive().to(D)
    optimizer = stepped(TwoLevel, model, coarse=everything)
    exact, _, _ = exact_direction(model, optimizer)
    torch.testing.assert_close(directions(optimizer), exact, rtol=1e-6, atol=1e-8)


def test_one_direction_is_the_best_length_of_the_fine_step():
    torch.manual_seed(0)
    model = Recursive().to(D)
    optimizer = stepped(TwoLevel, model, coarse=lambda level, solve: [dict(level.solution)])
    plain = stepped(KFAC, model)
    exact, fisher, damping = exact_direction(model, optimizer)
    z1 = directions(plain)
    curved = fisher + damping * torch.eye(len(z1), dtype=D)
    best = float(z1 @ curved @ exact) / float(z1 @ curved @ z1)
    torch.testing.assert_close(directions(optimizer), best * z1, rtol=1e-7, atol=1e-9)


def test_krylov_and_more_spaces_never_raise_the_energy(model):
    lowered = [
        stepped(TwoLevel, model, coarse=coarse, krylov=krylov).energy
        for coarse, krylov in (
            ("nicolaides", False),
            ("nicolaides", True),
            (("nicolaides", "residual"), True),
        )
    ]
    assert lowered[0] >= lowered[1] - 1e-12 >= lowered[2] - 2e-12


def test_the_additive_form_may_raise_the_energy_and_still_descends(model):
    optimizer = stepped(TwoLevel, model, coarse="tko")
    assert optimizer.level.form == "additive"
    g = torch.cat([p.grad.flatten() for p in optimizer.model.parameters()])
    assert float(directions(optimizer) @ g) > 0


@pytest.mark.parametrize("coarse", ["nicolaides", "residual", "tko", ("z1", "residual")])
def test_the_clip_bounds_the_divergence_of_a_coarse_step_too(model, coarse):
    x, y = data()
    net = copy.deepcopy(model)
    settings = {**CLASSES, "kl_clip": 1e-3, "momentum": 0.9, "damping": 0.1, "burn_in": 0}
    optimizer = TwoLevel(net, lr=0.5, coarse=coarse, statistics_every=1, **settings)
    for _ in range(6):
        before = [p.detach().clone() for p in net.parameters()]
        fisher = dense_fisher(net, x, "categorical", [n for n, _ in net.named_parameters()])
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        moves = [p.detach() - old for p, old in zip(net.parameters(), before, strict=True)]
        step = torch.cat([m.flatten() for m in moves])
        assert float(step @ fisher @ step) <= 1e-3 * (1 + 1e-6)


def test_the_coarse_level_acts_on_the_batch_that_its_statistics_are_of():
    torch.manual_seed(0)
    net, plain = (NETWORKS["linear"]().to(D) for _ in range(2))
    plain.load_state_dict(net.state_dict())
    settings = {**CLASSES, "lr": 0.1, "burn_in": 0, "statistics_every": 2}
    two, one = TwoLevel(net, **settings), KFAC(plain, **settings)
    x, y = data()
    for step in range(2):
        for model, optimizer in ((net, two), (plain, one)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert (two.energy is None) == bool(step)
        assert (two.diagnostics().energy is None) == bool(step)


@pytest.mark.parametrize("kind", [TwoLevel, ExactNG, KPSVD])
@pytest.mark.filterwarnings("ignore:only .* of the trained weights")
def test_a_step_without_gradients_of_covered_layers_is_fine(kind):
    net = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))
    optimizer = kind(net, lr=0.1, burn_in=0, statistics_every=10)
    x, y = data()
    F.cross_entropy(net(x.float()), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = net[0].weight.detach().clone()
    net[0].weight.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(net[0].weight, before)


def test_a_state_of_another_fine_level_is_refused():
    def stated(**settings):
        return stepped(TwoLevel, NETWORKS["linear"]().to(D), **settings)

    state = stated(fine="deflation").state_dict()
    with pytest.raises(UsageError, match="the state was made with"):
        stated(fine="kfac_corrected").load_state_dict(state)
    # samples are of one step: they are no part of a state, and another coarse level can take it
    assert not [key for block in state["curvature"].values() for key in block if "coarse" in key]
    stated(fine="deflation", coarse="spectral").load_state_dict(state)


@pytest.mark.parametrize("sharing", ["reduce", "expand"])
def test_micro_batches_of_different_lengths_count_by_their_samples(sharing):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.layer(x)).mean(1))

    torch.manual_seed(0)
    net = Pooled().to(D)
    short, long = torch.randn(5, 2, 3, dtype=D), torch.randn(5, 6, 3, dtype=D)

    def trace(parts):
        optimizer = KPSVD(copy.deepcopy(net), lr=0.0, sharing=sharing, max_rows=None, **CLASSES)
        model = optimizer.observer.root
        for x in parts:
            (F.cross_entropy(model(x), torch.zeros(5).long()) / len(parts)).backward()
        optimizer.step()
        block = optimizer.blocks[0]
        return optimizer.approximation.trace(block, optimizer.curvature[block.name])

    apart = 0.5 * (trace([short]) + trace([long]))
    assert trace([short, long]) == pytest.approx(apart, rel=0.2)


# SNGD


def test_input_sngd_is_gradient_descent_between_local_fisher_layers():
    torch.manual_seed(0)
    plain = NETWORKS["linear"]().to(D)
    x, y = data()
    settings = {**CLASSES, "damping": 0.1, "burn_in": 0, "lr": 0.3}
    optimizer = SNGD(plain, **settings)
    rebuilt = copy.deepcopy(plain)
    F.cross_entropy(plain(x), y).backward()
    optimizer.step()

    metrics, states = {}, optimizer.curvature
    for block in optimizer.blocks:
        c = states[block.name]["metric"]
        inputs = block.shape[2]
        damped = torch.linalg.inv(_unpacked(states[block.name]["inverse"]))
        assert torch.allclose(damped, _unpacked(c) + optimizer.lambdas[block.name] * eye(inputs))
        metrics[next(iter(block.layers))] = Metric(damped)
    insert_fisher_layers(rebuilt, metrics)
    descent = torch.optim.SGD(rebuilt.parameters(), lr=0.3)
    F.cross_entropy(rebuilt(x), y).backward()
    descent.step()
    torch.testing.assert_close(rebuilt(x), plain(x), rtol=1e-10, atol=1e-12)


def eye(size):
    return torch.eye(size, dtype=D)


def _unpacked(packed):
    from smallfry.curvature.kronecker import unpack

    return unpack(packed)


def test_input_sngd_is_kfac_with_no_output_factor():
    torch.manual_seed(0)
    model = NETWORKS["linear"]().to(D)
    optimizer = stepped(SNGD, model)
    x = data()[0]
    block = optimizer.blocks[0]
    a = torch.cat([x, torch.ones(len(x), 1, dtype=D)], 1)
    expected = torch.kron(torch.eye(4, dtype=D), a.T @ a / len(a))
    fisher = inverted_fisher(optimizer, block)
    order = torch.cat(
        [t.flatten() for t in block.from_matrix(torch.arange(16.0).reshape(1, 4, 4)).values()]
    ).long()
    torch.testing.assert_close(fisher, expected[order][:, order], rtol=1e-7, atol=1e-9)


def test_rfim_gives_every_hidden_neuron_its_own_metric():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model = model.to(D)
    optimizer = stepped(SNGD, model, variant="rfim")
    x = data()[0]
    hidden = model[1](model[0](x))
    a = torch.cat([hidden, torch.ones(len(x), 1, dtype=D)], 1)
    weight = model[2](hidden).sigmoid() ** 2
    metric = _unpacked(optimizer.curvature["2.weight"]["metric"])
    expected = torch.einsum("bo,bi,bj->oij", weight, a, a) / len(x)
    torch.testing.assert_close(metric, expected.detach())
    block, damping = optimizer.blocks[1], optimizer.lambdas["2.weight"]
    m = torch.randn(1, 5, 5, dtype=D)
    found = optimizer.approximation.apply(block, optimizer.curvature["2.weight"], m, damping)
    for o in range(5):
        torch.testing.assert_close((expected[o] + damping * eye(5)).detach() @ found[0, o], m[0, o])


def test_sngd_draws_no_targets_and_takes_no_backward_of_its_own():
    model = nn.Linear(3, 2)
    optimizer = SNGD(model)
    drawn = []
    optimizer.likelihood.sample_gradients = lambda *given: drawn.append(given)
    F.cross_entropy(model(torch.randn(4, 3)), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    assert drawn == []


# Wrong input


def test_settings_that_make_no_sense_are_refused():
    model = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600), nn.Linear(600, 600))
    for build, message in (
        (lambda: KPSVD(model, rank=0), "rank is at least 1"),
        (lambda: KPSVD(model, rank=3), "inverse='pcg' only"),
        (lambda: KPSVD(model, rank=2, inverse="lu"), "inverse is"),
        (lambda: KPSVD(model, inverse="pcg"), "for rank=2"),
        (lambda: KPSVD(model, rank=2, damping_split="tikhonov"), "is for one product"),
        (lambda: KPSVD(model, sharing="twice"), "sharing is exact or expand or reduce"),
        (lambda: EKFAC(model, basis="pca"), "basis is"),
        (lambda: TwoLevel(model, fine="kfca"), "did you mean 'kfac'"),
        (lambda: TwoLevel(model, coarse="residuals"), "did you mean 'residual'"),
        (lambda: TwoLevel(model, coarse=()), "at least one space"),
        (lambda: TwoLevel(model, form="multiplicative"), "form is"),
        (lambda: TwoLevel(model, coarse_samples=0), "coarse_samples"),
        (lambda: TwoLevel(model, fine=SNGD(nn.Linear(2, 2)).approximation), "takes none"),
        (lambda: SNGD(model, variant="output"), "variant is"),
        (lambda: SNGD(model, variant="rfim"), "0.9 GB"),
        (lambda: KFAC(model, factor_rank=0), "factor_rank"),
        (lambda: EKFAC(model, factor_rank=0), "factor_rank"),
    ):
        with pytest.raises(UsageError, match=message):
            build()
    assert isinstance(
        TwoLevel(model, fine=KroneckerProduct("tikhonov")).approximation, KroneckerProduct
    )


def test_exact_natural_gradient_and_two_levels_agree_on_one_linear_layer():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(D)
    two = stepped(TwoLevel, model, coarse=("z1", "residual", "gradient"), krylov=True)
    exact = stepped(ExactNG, model, damping=0.1)
    a, b = directions(two), directions(exact)
    assert float((a - b).norm()) < 0.05 * float(b.norm())
