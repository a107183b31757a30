"""Where the approximations must be exact, against dense Fishers in float64."""

import copy

import pytest
import torch
from dense_fisher import dense_fisher, inverted_fisher
from torch import nn
from torch.nn import functional as F

from smallfry.curvature.kronecker import unpack
from smallfry.optim import EKFAC, KFAC, ExactNG

D = torch.float64
GAUSS = {"likelihood": "gaussian", "fisher": "exact"}


def half_square(z, y):
    return 0.5 * ((z - y) ** 2).flatten(1).sum(1).mean()


def after_one_step(kind, model, x, y, loss=half_square, **settings):
    optimizer = kind(model, lr=0.0, **{"damping": 0.1, **GAUSS, **settings})
    loss(model(x), y).backward()
    optimizer.step()
    return optimizer


def assert_blocks_exact(optimizer, model, x, likelihood):
    for block in optimizer.blocks:
        expected = dense_fisher(model, x, likelihood, block.parameters)
        found = inverted_fisher(optimizer, block)
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * scale, msg=block.name)


TIKHONOV = [(KFAC, {"damping_split": "tikhonov"}), (EKFAC, {}), (ExactNG, {"scope": "block"})]


@pytest.mark.parametrize(("kind", "settings"), TIKHONOV)
def test_deep_linear_networks_are_exact(kind, settings):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 3)).to(D)
    x, y = torch.randn(7, 3, dtype=D), torch.randn(7, 3, dtype=D)
    assert_blocks_exact(after_one_step(kind, model, x, y, **settings), model, x, "gaussian")


@pytest.mark.parametrize(("kind", "settings"), TIKHONOV)
@pytest.mark.parametrize("act", [nn.Tanh, nn.Sigmoid, nn.ReLU])
def test_a_single_sample_with_one_output_is_exact(kind, settings, act):
    model = nn.Sequential(nn.Linear(3, 4), act(), nn.Linear(4, 1)).to(D)
    x, y = torch.randn(1, 3, dtype=D), torch.ones(1, 1, dtype=D)
    optimizer = after_one_step(
        kind, model, x, y, F.binary_cross_entropy_with_logits, likelihood="bernoulli", **settings
    )
    assert_blocks_exact(optimizer, model, x, "bernoulli")


def test_a_single_sample_is_exact_for_every_likelihood():
    for likelihood, loss in {
        "categorical": lambda z, y: F.cross_entropy(z, y.argmax(1)),
        "gaussian": half_square,
    }.items():
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(D)
        x, y = torch.randn(1, 3, dtype=D), torch.randn(1, 3, dtype=D)
        settings = {"damping_split": "tikhonov", "likelihood": likelihood}
        assert_blocks_exact(
            after_one_step(KFAC, model, x, y, loss, **settings), model, x, likelihood
        )


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def test_reduce_is_exact_behind_averaged_uses_and_expand_is_not():
    x, y = torch.randn(6, 5, 3, dtype=D), torch.randn(6, 2, dtype=D)
    model = Pooled().to(D)
    settings = {"damping_split": "tikhonov"}
    optimizer = after_one_step(KFAC, model, x, y, sharing="reduce", **settings)
    assert_blocks_exact(optimizer, model, x, "gaussian")
    optimizer = after_one_step(KFAC, model, x, y, sharing="expand", **settings)
    with pytest.raises(AssertionError):
        assert_blocks_exact(optimizer, model, x, "gaussian")


def test_expand_is_exact_for_a_loss_per_token_and_reduce_is_not():
    x, y = torch.randn(6, 5, 3, dtype=D), torch.randn(6, 5, 2, dtype=D)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(D)
    settings = {"damping_split": "tikhonov"}
    optimizer = after_one_step(KFAC, model, x, y, sharing="expand", **settings)
    assert_blocks_exact(optimizer, model, x, "gaussian")
    optimizer = after_one_step(KFAC, model, x, y, sharing="reduce", **settings)
    with pytest.raises(AssertionError):
        assert_blocks_exact(optimizer, model, x, "gaussian")


def test_one_layer_on_both_halves_of_the_input_is_exact():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return torch.cat([self.layer(x[:, :2]), self.layer(x[:, 2:])], 1)

    for samples in (1, 5):
        model = Split().to(D)
        x, y = torch.randn(samples, 4, dtype=D), torch.randn(samples, 6, dtype=D)
        optimizer = after_one_step(KFAC, model, x, y, damping_split="tikhonov")
        assert_blocks_exact(optimizer, model, x, "gaussian")


class Recursive(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.inner, self.head, self.steps = nn.Linear(3, 3, bias=False), nn.Linear(3, 2), steps

    def forward(self, x):
        z = x
        for _ in range(self.steps):
            z = torch.tanh(self.inner(z) + x)
        return self.head(z)


def test_exact_natural_gradient_is_the_dense_damped_solve_for_a_recursive_model():
    model = Recursive(4).to(D)
    x, y = torch.randn(6, 3, dtype=D), torch.randint(2, (6,))
    settings = {"likelihood": "categorical", "kl_clip": None, "momentum": 0.0}
    whole = dense_fisher(model, x, "categorical")
    for scope in ("full", "block"):
        net = copy.deepcopy(model)
        optimizer = after_one_step(ExactNG, net, x, y, F.cross_entropy, scope=scope, **settings)
        assert optimizer.lambdas["inner.weight"] == pytest.approx(
            0.1 * float(whole.diagonal().mean())
        )
        g = torch.cat([p.grad.flatten() for p in net.parameters()])
        fisher = whole.clone()
        if scope == "block":
            fisher[:9, 9:] = fisher[9:, :9] = 0
        damped = fisher + optimizer.lambdas["inner.weight"] * torch.eye(len(g), dtype=D)
        expected = torch.linalg.solve(damped, g)
        found = optimizer._directions({n: p.grad for n, p in net.named_parameters()})
        found = torch.cat([found[n].flatten() for n, _ in net.named_parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_ekfac_has_the_exact_diagonal_of_a_recursive_layer_and_beats_kfac():
    model = Recursive(4).to(D)
    x, y = torch.randn(20, 3, dtype=D), torch.randint(2, (20,))
    settings = {"likelihood": "categorical"}
    ekfac = after_one_step(EKFAC, model, x, y, F.cross_entropy, **settings)
    kfac = after_one_step(KFAC, model, x, y, F.cross_entropy, damping_split="tikhonov", **settings)
    block = ekfac.blocks[0]
    fisher = dense_fisher(model, x, "categorical", block.parameters)
    state = ekfac.curvature[block.name]
    q = torch.kron(state["qg"][0], state["qa"][0])
    torch.testing.assert_close((q.T @ fisher @ q).diagonal(), state["s"].flatten())
    errors = [
        float(torch.linalg.norm(fisher - inverted_fisher(optimizer, block)))
        for optimizer in (ekfac, kfac)
    ]
    assert errors[0] < errors[1]


def test_the_same_use_many_times_squares_in_the_exact_fisher_and_adds_in_expand():
    class Repeated(nn.Module):
        def __init__(self, times):
            super().__init__()
            self.layer, self.times = nn.Linear(3, 2, bias=False), times

        def forward(self, x):
            return sum(self.layer(x) for _ in range(self.times))

    x, y = torch.randn(5, 3, dtype=D), torch.randn(5, 2, dtype=D)
    traces = {}
    for times in (1, 3):
        for kind, settings in ((KFAC, {}), (ExactNG, {}), (EKFAC, {})):
            optimizer = after_one_step(kind, Repeated(times).to(D), x, y, **settings)
            block = optimizer.blocks[0]
            traces[kind, times] = optimizer.approximation.trace(
                block, optimizer.curvature[block.name]
            )
    assert traces[KFAC, 3] == pytest.approx(3 * traces[KFAC, 1])
    assert traces[ExactNG, 3] == pytest.approx(9 * traces[ExactNG, 1])
    assert traces[EKFAC, 3] == pytest.approx(9 * traces[EKFAC, 1])


@pytest.mark.parametrize("kind", [KFAC, ExactNG])
def test_undamped_steps_do_not_depend_on_the_coordinates_of_the_input(kind):
    torch.manual_seed(2)
    x, y = torch.randn(60, 2, dtype=D), torch.randn(60, 2, dtype=D)
    m, shift = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=D), torch.ones(2, dtype=D)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).to(D)
    with torch.no_grad():  # far from any singular Fisher
        model[0].weight.copy_(torch.tensor([[1.0, 0.3], [-0.4, 1.2]]))
    moved = copy.deepcopy(model)
    with torch.no_grad():  # the same function of x' = m x + shift
        moved[0].weight.copy_(model[0].weight @ torch.linalg.inv(m))
        moved[0].bias.copy_(model[0].bias - moved[0].weight @ shift)
    other, start = x @ m.T + shift, model(x).detach()
    torch.testing.assert_close(moved(other).detach(), start)
    settings = {"lr": 0.5, "kl_clip": None, **GAUSS}
    if kind is KFAC:
        settings |= {"damping": 1e-11, "damping_split": "tikhonov"}
    else:  # Woodbury cancels as the damping goes to zero
        settings["damping"] = 1e-8
    for net, inputs in ((model, x), (moved, other)):
        optimizer = kind(net, **settings)
        half_square(net(inputs), y).backward()
        optimizer.step()
    after = model(x).detach()
    assert (after - start).abs().max() > 0.1
    torch.testing.assert_close(moved(other).detach(), after, rtol=1e-3, atol=1e-4)


def test_linear_regression_is_solved_in_one_undamped_step():
    x, w = torch.randn(30, 4, dtype=D), torch.randn(2, 4, dtype=D)
    y = x @ w.T
    for kind, split in ((KFAC, {"damping_split": "tikhonov"}), (EKFAC, {}), (ExactNG, {})):
        model = nn.Linear(4, 2, bias=False).to(D)
        optimizer = kind(model, lr=1.0, damping=1e-8, kl_clip=None, momentum=0.0, **GAUSS, **split)
        half_square(model(x), y).backward()
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), w, rtol=1e-5, atol=1e-5)


def test_the_quadratic_step_solves_linear_regression_whatever_the_damping():
    x, w = torch.randn(30, 1, dtype=D), torch.randn(1, 1, dtype=D)
    model = nn.Linear(1, 1, bias=False).to(D)
    optimizer = KFAC(model, lr=1.0, damping=1e-6, step_length="quadratic", kl_clip=None, **GAUSS)
    half_square(model(x), x @ w.T).backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), w, rtol=1e-5, atol=1e-6)


def test_the_reduction_ratio_is_one_where_the_loss_is_quadratic_and_damping_falls():
    x, y = torch.randn(30, 3, dtype=D), torch.randn(30, 2, dtype=D)
    model = nn.Linear(3, 2).to(D)
    settings = {**GAUSS, "lr": 0.01, "damping": 1e-9, "statistics_every": 5}
    optimizer = KFAC(model, adaptive_damping=True, kl_clip=None, **settings)
    half_square(model(x), y).backward()
    optimizer.step()
    assert optimizer.reduction_ratio == pytest.approx(1.0, rel=1e-6)
    assert optimizer.damping_factor == pytest.approx(0.95**5)


def test_damping_rises_when_the_step_does_harm():
    x, y = torch.randn(8, 3, dtype=D), torch.randint(2, (8,))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(D)
    optimizer = KFAC(model, lr=1e3, damping=1e-6, adaptive_damping=True, kl_clip=None)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.reduction_ratio < 0.25
    assert optimizer.damping_factor > 1


def test_the_foretold_and_the_real_change_are_those_of_the_loss():
    from smallfry.optim import quadratic

    x, y = torch.randn(8, 3, dtype=D), torch.randint(2, (8,))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(D)
    optimizer = KFAC(model, lr=0.1, adaptive_damping=True)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    seen = optimizer.observer.take()
    parameters = dict(model.named_parameters())
    step = {n: -0.2 * p.grad for n, p in parameters.items()}
    with torch.no_grad():
        damping = dict.fromkeys(parameters, 0.3)
        ratio = quadratic.reduction_ratio(optimizer.weighed(seen), step, damping)
    flat = torch.cat([s.flatten() for s in step.values()])
    slope = torch.cat([p.grad.flatten() for p in model.parameters()]) @ flat
    fisher = dense_fisher(model, x, "categorical")
    foretold = slope + 0.5 * flat @ fisher @ flat + 0.15 * flat @ flat
    with torch.no_grad():
        for name, p in parameters.items():
            p += step[name]
        real = F.cross_entropy(model(x), y) - loss
    assert ratio == pytest.approx(float(real / foretold), rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_clip_bounds_the_divergence_of_the_real_step(momentum):
    x, y = torch.randn(8, 3, dtype=D), torch.randint(2, (8,))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(D)
    for kappa in (1e-4, 1e-1):
        optimizer = ExactNG(
            model, lr=3.0, damping=1e-3, kl_clip=kappa, momentum=momentum, fisher="exact"
        )
        for _ in range(4):
            before = torch.cat([p.detach().flatten() for p in model.parameters()])
            fisher = dense_fisher(model, x, "categorical")
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            after = torch.cat([p.detach().flatten() for p in model.parameters()])
            moved = after - before
            assert float(moved @ fisher @ moved) <= kappa * (1 + 1e-6)
        assert optimizer.clip < 1


def test_sampled_factors_converge_to_the_exact_ones():
    x, y = torch.randn(4, 3, dtype=D), torch.randint(3, (4,))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(D)
    settings = {"likelihood": "categorical", "loss": F.cross_entropy}
    exact = after_one_step(KFAC, model, x, y, **settings)
    errors = []
    for draws in (4, 400):
        sampled = after_one_step(KFAC, model, x, y, fisher="mc", draws=draws, **settings)
        g, expected = (unpack(o.curvature["0.weight"]["g"]) for o in (sampled, exact))
        errors.append(float(torch.linalg.norm(g - expected) / torch.linalg.norm(expected)))
    assert errors[1] < 0.1
    assert errors[1] < errors[0]


def test_the_average_has_no_trace_of_an_identity_and_counts_refreshes():
    model = nn.Linear(2, 2, bias=False).to(D)
    optimizer = KFAC(model, lr=0.0, burn_in=0, statistics_every=2, ema_decay=0.6, **GAUSS)
    batches = [torch.randn(5, 2, dtype=D) for _ in range(8)]
    for x in batches:
        optimizer.zero_grad()
        half_square(model(x), torch.zeros(5, 2, dtype=D)).backward()
        optimizer.step()
    expected = 0
    for k, x in enumerate(batches[::2], start=1):
        keep = min(1 - 1 / k, 0.6)
        expected = keep * expected + (1 - keep) * x.T @ x / 5
    torch.testing.assert_close(unpack(optimizer.curvature["weight"]["a"])[0], expected)


@pytest.mark.slow
def test_more_rows_than_the_limit_are_drawn_without_bias():
    model = nn.Linear(2, 2, bias=False).to(D)
    x, y = torch.randn(4, 50, 2, dtype=D), torch.zeros(4, 50, 2, dtype=D)
    whole = after_one_step(KFAC, model, x, y, max_rows=None)
    found = [
        unpack(after_one_step(KFAC, model, x, y, max_rows=20, seed=s).curvature["weight"][key])
        for key in ("a", "g")
        for s in range(200)
    ]
    for key, drawn in zip("ag", (found[:200], found[200:]), strict=True):
        expected = unpack(whole.curvature["weight"][key])
        torch.testing.assert_close(torch.stack(drawn).mean(0), expected, rtol=0.1, atol=0.05)
    assert len({float(a[0, 0, 0]) for a in found[:200]}) > 100


def test_a_layer_that_a_batch_did_not_use_is_coupled_by_zero_gradients():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x, other=False):
            return self.head(torch.tanh(self.one(x) + (self.two(x) if other else 0)))

    model = Branches().to(D)
    optimizer = ExactNG(model, lr=0.0, damping=0.1, **GAUSS)
    for size, other in ((8, True), (5, False)):
        x, y = torch.randn(size, 3, dtype=D), torch.randn(size, 2, dtype=D)
        optimizer.zero_grad()
        half_square(model(x, other), y).backward()
        optimizer.step()
    names = [n for n, _ in model.named_parameters() if not n.startswith("two")]
    fisher = dense_fisher(model, x, "gaussian", names)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    damping = optimizer.lambdas[optimizer.blocks[0].name]
    flat = torch.cat([grads[n].flatten() for n in names])
    expected = torch.linalg.solve(fisher + damping * torch.eye(len(flat), dtype=D), flat)
    found = optimizer._directions(grads)
    torch.testing.assert_close(torch.cat([found[n].flatten() for n in names]), expected)


def test_a_rank_keeps_what_matters_of_large_factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).to(D)
    basis = torch.randn(6, 40, dtype=D)
    x, y = torch.randn(200, 6, dtype=D) @ basis, torch.randint(3, (200,))
    settings = {"loss": F.cross_entropy, "likelihood": "categorical", "fisher": "exact"}
    errors = []
    expected = None
    for rank in (None, 12, 3):
        model.zero_grad()
        optimizer = after_one_step(KFAC, model, x, y, factor_rank=rank, **settings)
        found = optimizer._directions({n: p.grad for n, p in model.named_parameters()})
        flat = torch.cat([t.flatten() for t in found.values()])
        expected = flat if expected is None else expected
        errors.append(float((flat - expected).norm() / expected.norm()))
        if rank is not None:
            assert "vectors_a" in optimizer.curvature["0.weight"]
            assert "g" in optimizer.curvature["2.weight"]  # three outputs are kept whole
    assert errors[1] < 0.25 < errors[2]


def test_a_rank_that_misses_nothing_changes_no_step_of_ekfac():
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 3)).to(D)  # 3 directions go back
    basis = torch.randn(5, 40, dtype=D)
    batches = [torch.randn(20, 5, dtype=D) @ basis for _ in range(4)]
    found = {}
    for rank in (None, 8):
        model = copy.deepcopy(start)
        settings = {"damping": 0.1, "statistics_every": 1, "inverse_every": 1, **GAUSS}
        optimizer = EKFAC(model, lr=0.0, factor_rank=rank, **settings)
        for x in batches:
            optimizer.zero_grad()
            half_square(model(x), torch.ones(20, 3, dtype=D)).backward()
            optimizer.step()
        found[rank] = optimizer._directions({n: p.grad for n, p in model.named_parameters()})
    assert optimizer.curvature["0.weight"]["s"].shape == (1, 9, 9)
    assert optimizer.curvature["1.weight"]["s"].shape == (1, 3, 9)
    for name, expected in found[None].items():
        torch.testing.assert_close(found[8][name], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("basis", ["kfac", "kpsvd"])
def test_ekfac_of_a_rank_has_the_fishers_trace_and_tells_its_own_error(basis):
    model = Recursive(4).to(D)
    x, y = torch.randn(20, 3, dtype=D), torch.randint(2, (20,))
    optimizer = EKFAC(
        model, lr=0.0, damping=0.1, factor_rank=1, basis=basis, **{**GAUSS, "fisher": "exact"}
    )
    optimizer.monitor()
    half_square(model(x), F.one_hot(y).to(D)).backward()
    optimizer.step()
    for block, told in zip(optimizer.blocks, optimizer.diagnostics().blocks, strict=True):
        state = optimizer.curvature[block.name]
        fisher = dense_fisher(model, x, "gaussian", block.parameters)
        mine = inverted_fisher(optimizer, block)
        assert optimizer.approximation.trace(block, state) == pytest.approx(float(fisher.trace()))
        assert float(mine.trace()) == pytest.approx(float(fisher.trace()))
        error = float((fisher - mine).norm() / fisher.norm())
        assert told.fisher_error == pytest.approx(error, rel=1e-6)


def test_few_vectors_follow_the_statistics_between_inverses_and_the_trace_is_kept():
    torch.manual_seed(0)
    model = nn.Linear(12, 7).to(D)
    settings = {"statistics_every": 1, "inverse_every": 100, "burn_in": 0, "ema_decay": 0.9}
    optimizer = EKFAC(model, lr=0.0, factor_rank=2, **settings, **GAUSS)
    traces, expected = [], 0.0
    block = optimizer.blocks[0]
    for step in range(5):
        x = torch.randn(9, 12, dtype=D)
        keep = min(1 - 1 / (step + 1), 0.9)
        expected = keep * expected + (1 - keep) * float(
            dense_fisher(model, x, "gaussian", block.parameters).trace()
        )
        before = optimizer.curvature[block.name].get("vectors_a")
        optimizer.zero_grad()
        half_square(model(x), torch.zeros(9, 7, dtype=D)).backward()
        optimizer.step()
        state = optimizer.curvature[block.name]
        assert before is None or not torch.equal(before, state["vectors_a"])
        traces.append(optimizer.approximation.trace(block, state))
        assert traces[-1] == pytest.approx(expected)
    assert optimizer.counters["inverses"] == 1
