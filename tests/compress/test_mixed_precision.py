"""Mixed precision: sensitivities against dense curvature, and the knapsack against all choices."""

import itertools

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from smallfry import compress
from smallfry.compress.quantize import knapsack, sensitivity
from smallfry.compress.quantize.knapsack import Option, least_loss, trade_off
from smallfry.compress.quantize.mixed import choose_bits, macs
from smallfry.compress.quantize.sensitivity import (
    curvature,
    hessian_traces,
    kronecker_sensitivity,
    sensitivities,
    trace_sensitivity,
)
from smallfry.curvature.likelihoods import Gaussian
from smallfry.errors import UsageError
from smallfry.report.bits import draw_trade_off


def dense_hessian(model, name, loss):
    """Hessian of a loss of the model's outputs with respect to one weight."""
    weight = model.get_submodule(name).weight

    def of(flat):
        return loss(
            functional_call(model, {f"{name}.weight": flat.view_as(weight)}, (model.inputs,))
        )

    return hessian(of)(weight.detach().flatten())


class Shared(nn.Module):
    """A layer that is called twice, between two others."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, rows):
        rows = self.first(rows).tanh()
        for _ in range(2):
            rows = self.middle(rows).tanh()
        return self.last(rows)


def test_kronecker_is_half_the_quadratic_form_of_one_layer_and_sample():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).double()
    model.inputs, target = torch.randn(1, 5).double(), torch.randn(1, 4).double()
    error = torch.randn(4, 5).double()
    dense = dense_hessian(model, "0", lambda out: 0.5 * (out - target).square().sum())
    found = sensitivities(model, {"0": {4: error}}, "kronecker", [model.inputs], Gaussian())
    wanted = 0.5 * error.flatten() @ dense @ error.flatten()
    assert found["0"][4] == pytest.approx(wanted.item(), rel=1e-8)


def test_the_fisher_trace_sums_a_shared_layers_calls_before_squaring():
    torch.manual_seed(0)
    model, rows = Shared().double(), torch.randn(7, 5).double()
    found = curvature(model, [rows[:4], rows[4:]])
    for name in ("first", "middle", "last"):
        total, weight = 0.0, model.get_submodule(name).weight
        for row in rows:
            logs = model(row[None]).log_softmax(1)[0]
            for c in range(3):
                (g,) = torch.autograd.grad(logs[c], weight, retain_graph=True)
                total += float(logs[c].exp() * g.square().sum()) / len(rows)
        assert found[name].trace == pytest.approx(total, rel=1e-8)
        assert found[name].uses == (2 if name == "middle" else 1)
    last, g = found["last"], torch.zeros(3, 3).double()
    hidden = model.middle(model.middle(model.first(rows).tanh()).tanh()).tanh()
    torch.testing.assert_close(last.inputs[0], hidden.T @ hidden / 7)
    for p in model(rows).softmax(1):
        g += (p.diag() - p.outer(p)) / 7
    torch.testing.assert_close(last.outputs[0], g)
    assert found["last"].trace == pytest.approx(
        float(sum((p.diag() - p.outer(p)).trace() * h.square().sum()
                  for p, h in zip(model(rows).softmax(1), hidden, strict=True)) / 7)
    )  # fmt: skip
    assert curvature(model, [rows], traces=False)["last"].trace is None


def test_targets_are_sampled_where_outputs_are_many():
    torch.manual_seed(0)
    model, rows = nn.Sequential(nn.Linear(4, 20)).double(), torch.randn(4000, 4).double()
    found = [curvature(model, [rows], seed=seed)["0"] for seed in (0, 0, 1)]
    assert found[0].trace == found[1].trace != found[2].trace
    p = model(rows).softmax(1)
    wanted = float(((1 - p.square().sum(1)) * rows.square().sum(1)).mean())
    assert found[0].trace == pytest.approx(wanted, rel=0.05)


def test_hutchinson_meets_the_trace_of_the_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 6)).double()  # 192 weights
    model.inputs = torch.randn(30, 10).double()
    labels = model(model.inputs).argmax(1)
    found = hessian_traces(model, ["0", "2"], [model.inputs[:20], model.inputs[20:]], probes=400)
    for name, trace in found.items():
        dense = dense_hessian(model, name, lambda out: F.cross_entropy(out, labels))
        assert trace == pytest.approx(float(dense.trace()), rel=0.05)
    given = [torch.zeros(30, dtype=torch.long)]
    other = hessian_traces(model, ["2"], [model.inputs], given, probes=2)
    assert other["2"] == pytest.approx(found["2"], rel=0.5)  # no labels in a last layer's Hessian


def test_hutchinson_ends_once_it_is_precise():
    class OneWeight(nn.Sequential):
        def forward(self, rows):
            return torch.cat([super().forward(rows), torch.zeros_like(rows)], 1)

    calls, model = [], OneWeight(nn.Linear(1, 1, bias=False))
    model[0].weight.data.fill_(1.0)
    with pytest.MonkeyPatch.context() as patch:
        product = sensitivity._hessian_product
        patch.setattr(sensitivity, "_hessian_product", lambda *a: calls.append(1) or product(*a))
        found = hessian_traces(model, ["0"], [torch.ones(1, 1)], probes=50)
    p = torch.tensor(1.0).sigmoid()
    assert found["0"] == pytest.approx(float(p * (1 - p)), rel=1e-6)
    assert len(calls) == 10  # of one number every probe gives the trace; two may agree by accident


def test_attention_has_a_hessian_and_the_model_stays():
    torch.manual_seed(0)
    model = timm.create_model("vitrm_micro_patch4_8", embed_dim=16, num_heads=2).eval()
    before = {n: w.clone() for n, w in model.state_dict().items()}
    found = hessian_traces(model, ["blocks.0.attn.qkv"], [torch.rand(4, 1, 8, 8)], probes=2)
    assert np.isfinite(found["blocks.0.attn.qkv"])
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_measures_agree_where_curvature_is_even():
    eye = torch.eye(3).double()[None]
    error = torch.randn(1, 3, 3)
    one = kronecker_sensitivity(error, eye, 2 * eye)
    assert one == pytest.approx(trace_sensitivity(error, trace=2.0 * 9))


# Knapsack


@pytest.fixture
def options():
    rng = np.random.default_rng(0)
    return {
        f"layer{i}": [
            Option(bits, int(n) * bits, float(4.0**-bits * s))
            for bits in (2, 3, 4, 8)
        ]
        for i, (n, s) in enumerate(zip(rng.integers(50, 900, 6), rng.random(6) * 9, strict=True))
    }  # fmt: skip


def all_choices(options):
    return [
        (sum(o.cost for o in chosen), sum(o.loss for o in chosen))
        for chosen in itertools.product(*options.values())
    ]


def test_the_choice_is_that_of_brute_force_at_every_budget(options):
    every = all_choices(options)
    cheapest, dearest = min(c for c, _ in every), max(c for c, _ in every)
    for budget in np.linspace(cheapest, dearest, 60).astype(int):
        found = least_loss(options, int(budget))
        wanted = min(loss for cost, loss in every if cost <= budget)
        assert found.loss == pytest.approx(wanted, rel=1e-12)
        assert found.cost <= budget
        chosen = [next(o for o in options[n] if o.choice == b) for n, b in found.choices.items()]
        assert list(found.choices) == list(options)
        assert sum(o.cost for o in chosen) == found.cost
        assert sum(o.loss for o in chosen) == pytest.approx(found.loss)


def test_the_trade_off_is_the_pareto_front_of_all_choices(options):
    best, front = float("inf"), []
    for cost, loss in sorted(all_choices(options)):
        if loss < best * (1 - 1e-12):
            best = loss
            front.append((cost, pytest.approx(loss)))
    assert trade_off(options) == front


def test_a_long_front_is_thinned_and_budgets_are_still_met(options, monkeypatch):
    exact = {b: least_loss(options, b).loss for b in (9_000, 12_000)}
    cheapest = min(cost for cost, _ in all_choices(options))
    monkeypatch.setattr(knapsack, "MOST_POINTS", 60)
    assert len(trade_off(options)) <= 4 * 62
    for budget, loss in exact.items():
        found = least_loss(options, budget)
        assert found.cost <= budget
        assert loss <= found.loss <= 1.3 * loss
    assert least_loss(options, cheapest).cost == cheapest


def test_a_budget_below_the_cheapest_choice_is_refused(options):
    with pytest.raises(UsageError, match=r"budget of 10 can't be met.*allow cheaper choices"):
        least_loss(options, 10)


# In a model


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model, rows = Shared(), torch.randn(256, 5)
    labels = (rows[:, 0] > 0).long() + (rows[:, 1] > 0.5).long()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(rows), labels).backward()
        optimizer.step()
    return model.eval(), rows


def bits_of(model, rows, **settings):
    reports = []
    method = compress.Quantize(weight_range="minmax", **settings)
    compress.apply_to_model(model, [method], example=rows[:2], batches=[rows], reports=reports)
    return {each["name"]: each["bits"] for each in reports[0]["layers"]}, reports[0]["mixed"]


@pytest.mark.parametrize("measure", ["kronecker", "fisher", "hessian"])
def test_budgets_are_kept_in_every_unit(trained, measure):
    model, rows = trained
    sizes = {"first": 30, "middle": 36, "last": 18}
    bits, mixed = bits_of(model, rows, budget=5.0, sensitivity=measure)
    assert sum(sizes[n] * b for n, b in bits.items()) <= 5 * 84
    assert len({*bits.values()}) > 1
    assert mixed["cost"] == sum(sizes[n] * b for n, b in bits.items())
    assert mixed["average_bits"] == pytest.approx(mixed["cost"] / 84)
    assert mixed["loss"] <= mixed["uniform"]["4"]["loss"]
    assert mixed["front"][0][0] == 2 * 84
    assert mixed["front"][-1][0] <= 8 * 84
    bits, _ = bits_of(model, rows, budget=40.0, budget_of="bytes", sensitivity=measure)
    assert sum(sizes[n] * b for n, b in bits.items()) <= 320
    uses = {"first": 30, "middle": 72, "last": 18}  # the middle layer is called twice
    assert macs(model, sizes, [rows]) == uses
    bits, mixed = bits_of(model, rows, budget=4.0, budget_of="macs", sensitivity=measure)
    assert sum(uses[n] * b for n, b in bits.items()) == mixed["cost"] <= 4 * 120


def test_a_budget_that_can_not_be_met_is_refused(trained):
    model, rows = trained
    with pytest.raises(UsageError, match=r"1.5 bits per weight: .*can't be met"):
        bits_of(model, rows, budget=1.5)
    with pytest.raises(UsageError, match=r"10 bytes of codes: .*can't be met"):
        bits_of(model, rows, budget=10.0, budget_of="bytes")


def test_a_layer_whose_curvature_is_unknown_is_named(trained):
    model, rows = trained
    model.idle = torch.nn.Linear(5, 3)
    with pytest.raises(UsageError, match="curvature of 'idle' is not known: exclude it"):
        bits_of(model, rows, budget=4.0)


def test_predicted_losses_are_near_the_divergence_of_the_outputs(trained):
    model, rows = trained
    _, mixed = bits_of(model, rows, budget=6.0, choices=(5, 6, 7, 8))
    small, _ = compress.apply_to_model(
        model, [compress.Quantize(budget=6.0, choices=(5, 6, 7, 8), weight_range="minmax")],
        example=rows[:2], batches=[rows],
    )  # fmt: skip
    with torch.no_grad():
        logs = model(rows).log_softmax(1)
        divergence = float((logs.exp() * (logs - small(rows).log_softmax(1))).sum(1).mean())
    assert divergence / 4 < mixed["loss"] < 4 * divergence


def test_known_sensitivities_are_not_measured_again(trained):
    model, _ = trained
    errors = {"first": {2: torch.ones(6, 5), 4: torch.ones(6, 5)}, "last": {2: torch.ones(3, 6)}}
    known = {"first": {2: 1.0, 4: 0.5}, "last": {2: 0.1}}
    found = choose_bits(model, errors, 3.5, measured=known)
    assert found.bits == {"first": 4, "last": 2}
    assert found.profile["layers"] == {"first": {"2": 1.0, "4": 0.5}, "last": {"2": 0.1}}
    assert found.profile["chosen"] == {"first": "4", "last": "2"}
    assert found.profile["costs"] == "sensitivity (kronecker)"
    assert list(found.report["uniform"]) == ["2"]


def test_the_trade_off_is_drawn(trained, tmp_path):
    model, rows = trained
    draw_trade_off(bits_of(model, rows, budget=4.0)[1], tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")
def test_a_budget_of_arithmetic_counts_every_layer_of_a_weight():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)), nn.Linear(8, 3)).eval()
    model[2].weight = model[0].weight
    images, reports = torch.randn(64, 8), []
    budget = compress.Quantize(budget=5, budget_of="macs", choices=(2, 4, 8))
    compress.apply_to_model(model, [budget], example=images[:2], batches=[images], reports=reports)
    bits = {line["name"]: line["bits"] for line in reports[0]["layers"]}
    costs = {"0": 64, "1": 64, "2": 64, "3": 24}
    assert bits["0"] == bits["2"]
    spent = sum(costs[name] * bits[name] for name in costs)
    assert reports[0]["mixed"]["cost"] == spent <= 5 * sum(costs.values())
    assert reports[0]["mixed"]["average_bits"] == pytest.approx(spent / sum(costs.values()))
