"""One table of methods, one suite: what every natural-gradient optimizer must do."""

import copy
import io
import math

import pytest
import torch
from mixed_net import Net
from torch import nn
from torch.nn import functional as F

from smallfry.errors import SmallfryWarning, UsageError
from smallfry.optim import EKFAC, KFAC, SNGD, ExactNG, TwoLevel

D = torch.float64


def step(model, optimizer, x, y, loss=F.cross_entropy):
    value = loss(model(x), y)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.item()


def train(model, optimizer, problem, steps, start=0, size=16):
    x, y = problem
    losses = []
    for i in range(start, start + steps):
        part = slice(size * (i % 3), size * (i % 3) + size)
        losses.append(step(model, optimizer, x[part], y[part]))
    return losses


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# The promise


@pytest.mark.slow
def test_the_training_loop_does_not_change_and_the_model_learns(method, problem):
    model = Net()
    optimizer = method(model, lr=0.1, statistics_every=4)
    losses = train(model, optimizer, problem, 33)
    assert sum(losses[-3:]) < 0.65 * sum(losses[:3])


def test_every_parameter_is_trained(method, problem):
    model = Net()
    before = weights(model)
    optimizer = method(model, lr=0.05)
    train(model, optimizer, problem, 3)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert {"norm.weight", "norm.bias"} == set(optimizer.uncovered)


def test_the_number_of_refreshes_is_what_the_periods_say(method, problem):
    every = {"statistics_every": 3}
    if method.kind is not ExactNG:
        every["inverse_every"] = 4
    optimizer = method(model := Net(), lr=1e-3, **every)
    for steps in range(1, 10):
        train(model, optimizer, problem, 1, start=steps)
        assert optimizer.counters["statistics"] == math.ceil(steps / 3)
        expected = math.ceil(steps / every.get("inverse_every", 3))
        assert optimizer.counters["inverses"] == expected


def test_between_refreshes_there_are_no_hooks_on_layers_and_no_second_gradient(method, problem):
    if method.fixed.get("step_length") == "quadratic":
        pytest.skip("looks at each batch")
    model = Net()
    optimizer = method(model, lr=0.01, statistics_every=3)
    train(model, optimizer, problem, 1)
    state = optimizer.generator.get_state()
    loss = F.cross_entropy(model(problem[0]), problem[1])
    assert optimizer.observer.pending == []
    assert not any(m._forward_hooks for m in model.modules() if m is not model)
    loss.backward()
    optimizer.step()
    assert torch.equal(optimizer.generator.get_state(), state)


# Scale, direction, length


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_huge_damping_is_sgd_in_direction_and_length(method, momentum):
    if method.fixed.get("step_length") == "quadratic" or "damping_per" in method.fixed:
        pytest.skip("does not have one rate for all")
    model = Net(norm=False).to(D)
    other = copy.deepcopy(model)
    optimizer = method(
        model, lr=1.0, damping=1e12, momentum=momentum, kl_clip=None, statistics_every=10
    )
    x, y = torch.randn(6, 5, dtype=D), torch.randint(3, (6,))
    step(model, optimizer, x, y)
    rate = 1 / optimizer.lambdas["head.weight"]
    sgd = torch.optim.SGD(other.parameters(), lr=rate, momentum=momentum)
    step(other, sgd, x, y)
    for _ in range(3):
        optimizer.param_groups[0]["lr"] = 1e9
        sgd.param_groups[0]["lr"] = rate * 1e9
        before = weights(model)
        step(model, optimizer, x, y)
        step(other, sgd, x, y)
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert not torch.equal(p, before[name])
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-4, atol=1e-9)


def directions(optimizer, model):
    random = torch.Generator().manual_seed(1)
    g = {n: torch.randn(p.shape, generator=random).to(p) for n, p in model.named_parameters()}
    return optimizer._directions(g)


def prepared(method, model, batches, loss=F.cross_entropy, **settings):
    settings = {"fisher": "exact", "lr": 0.0, **settings}
    if "empirical" in method.name:
        settings["fisher"] = "empirical"
    optimizer = method(model, **settings)
    optimizer.zero_grad()
    for x, y, share in batches:
        (loss(model(x), y) * share).backward()
    optimizer.step()
    return directions(optimizer, model)


def test_the_batch_twice_its_parts_and_the_reduction_leave_the_preconditioner_unchanged(method):
    model = Net(norm=False).to(D)
    x, y = torch.randn(6, 5, dtype=D), torch.randint(3, (6,))
    expected = prepared(method, model, [(x, y, 1.0)])

    def summed(z, y):
        return F.cross_entropy(z, y, reduction="sum")

    cases = {
        "twice": prepared(method, model, [(torch.cat([x, x]), torch.cat([y, y]), 1.0)]),
        "shuffled": prepared(method, model, [(x.flip(0), y.flip(0), 1.0)]),
        "in parts": prepared(method, model, [(x[:4], y[:4], 4 / 6), (x[4:], y[4:], 2 / 6)]),
        "sum": prepared(method, model, [(x, y, 1.0)], loss=summed, loss_scale="sum"),
        "scaled": prepared(method, model, [(x, y, 0.25)], loss_scale=0.25),
    }
    for case, found in cases.items():
        for name, tensor in found.items():
            message = f"{case}: {name}"
            size = float(expected[name].abs().max())
            close = torch.allclose(tensor, expected[name], rtol=0, atol=0.1 * method.rtol * size)
            assert close, message


def test_the_step_does_not_depend_on_the_reduction(method):
    x, y = torch.randn(6, 5, dtype=D), torch.randint(3, (6,))
    start = Net(norm=False).to(D)
    ends = []
    for scale, reduction in ((1.0, "mean"), ("sum", "sum")):
        model = copy.deepcopy(start)
        optimizer = method(model, lr=0.1, loss_scale=scale)
        for _ in range(3):
            step(
                model, optimizer, x, y, lambda z, y, r=reduction: F.cross_entropy(z, y, reduction=r)
            )
        ends.append(weights(model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=method.rtol, atol=1e-9)


def test_it_descends_with_stale_statistics_whatever_the_damping(method, problem):
    for damping in (1e-4, 1e-1, 10.0):
        model = Net()
        optimizer = method(model, lr=0.01, damping=damping, statistics_every=5)
        train(model, optimizer, problem, 3)
        F.cross_entropy(model(problem[0]), problem[1]).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if n not in optimizer.uncovered}
        found = optimizer._directions(grads)
        assert sum(float((found[n] * g).sum()) for n, g in grads.items()) > 0


def test_a_constant_batch_is_a_fixed_point_of_the_average(method):
    if method.name in ("kpsvd, rank", "deflation, rank"):
        pytest.skip("the product nearest to a truncated product and the batch is another")
    model = Net(norm=False).to(D)
    x, y = torch.randn(6, 5, dtype=D), torch.randint(3, (6,))
    settings = {} if "empirical" in method.name else {"fisher": "exact"}
    optimizer = method(model, lr=0.0, statistics_every=1, **settings)
    step(model, optimizer, x, y)
    first = directions(optimizer, model)
    factor = optimizer.damping_factor
    for _ in range(3):
        optimizer.damping_factor = factor
        step(model, optimizer, x, y)
    optimizer.damping_factor = factor
    for name, tensor in directions(optimizer, model).items():
        size = float(first[name].abs().max())
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=method.rtol * size)


# No side effects


def test_statistics_leave_gradients_buffers_and_random_numbers_alone(method):
    def make():
        torch.manual_seed(1)
        body = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.3)]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(8, 3))

    x, y = torch.randn(4, 1, 4, 4), torch.randint(3, (4,))
    model, plain = make(), make()
    optimizer = method(model, lr=0.0, fallback_lr=0.0, statistics_every=1)
    results = []
    for net in (plain, model):
        torch.manual_seed(5)
        output = net(x)
        assert all(p.grad is None for p in net.parameters())
        loss = F.cross_entropy(output, y)
        loss.backward()
        if net is model:
            optimizer.step()
        results.append((loss.detach(), torch.rand(3), *(p.grad for p in net.parameters())))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    for (name, one), other in zip(plain.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(one, other), name


def state_tensors(optimizer):
    return {
        f"{block}.{key}": value.clone()
        for block, state in optimizer.curvature.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def test_evaluation_and_passes_without_backward_touch_nothing(method, problem):
    ends = []
    for disturb in (False, True):
        torch.manual_seed(1)
        model = Net()
        optimizer = method(model, lr=0.01, statistics_every=1)
        for i in range(3):
            if disturb:
                model.eval()
                F.cross_entropy(model(torch.randn(7, 5)), torch.zeros(7).long()).backward()
                optimizer.zero_grad()
                model.train()
                with torch.no_grad():
                    model(torch.randn(7, 5))
            train(model, optimizer, problem, 1, start=i)
        ends.append((weights(model), state_tensors(optimizer)))
    for one, other in zip(*ends, strict=True):
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name


def test_a_logged_training_pass_without_backward_does_not_count(method, problem):
    model = Net()
    optimizer = method(model, lr=0.01)
    model(torch.full((9, 5), 1e6))
    train(model, optimizer, problem, 1)
    assert all(float(t.abs().max()) < 1e4 for t in state_tensors(optimizer).values() if t.ndim)
    assert optimizer.counters["statistics"] == 1


def test_a_copied_model_has_no_part_in_the_optimizer(method, problem):
    model = Net()
    optimizer = method(model, lr=0.01)
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    F.cross_entropy(copied(problem[0]), problem[1]).backward()
    assert optimizer.observer.pending == []


# Resuming


@pytest.mark.parametrize("phases", [(4,), pytest.param((0, 1, 2, 3, 5, 6), marks=pytest.mark.slow)])
def test_it_resumes_bit_for_bit_at_every_phase(method, problem, phases):
    every = {"statistics_every": 3}
    if method.kind is not ExactNG:
        every["inverse_every"] = 2

    def make():
        torch.manual_seed(2)
        model = Net()
        return model, method(model, lr=0.05, weight_decay=0.1, **every)

    model, optimizer = make()
    saved, wanted = [], []
    for number in range(max(phases) + 6):
        saved.append(io.BytesIO())
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved[-1])
        wanted.append((weights(model), copy.deepcopy(optimizer.counters)))
        train(model, optimizer, problem, 1, start=number)

    for phase in phases:
        saved[phase].seek(0)
        state = torch.load(saved[phase], weights_only=True)
        again, resumed = make()
        again.load_state_dict(state["model"])
        resumed.load_state_dict(state["optimizer"])
        train(again, resumed, problem, 5, start=phase)
        found, counters = wanted[phase + 5]
        for name, p in again.named_parameters():
            assert torch.equal(p, found[name]), (phase, name)
        assert resumed.counters == counters


def test_a_state_of_another_model_or_method_is_refused(method, problem):
    optimizer = method(model := Net(), lr=0.01)
    train(model, optimizer, problem, 1)
    state = optimizer.state_dict()
    with pytest.raises(UsageError, match="belongs to another model"):
        method(Net(inputs=6), lr=0.01).load_state_dict(state)
    with pytest.raises(UsageError, match="is in only one of them"):
        method(Net(norm=False), lr=0.01).load_state_dict(state)
    other = EKFAC if method.kind is not EKFAC else KFAC
    with pytest.raises(UsageError, match=f"state of {method.kind.__name__}"):
        other(Net(), lr=0.01).load_state_dict(state)
    adam = torch.optim.AdamW(Net().parameters())
    with pytest.raises(UsageError, match="not the state of a natural-gradient optimizer"):
        method(Net(), lr=0.01).load_state_dict(adam.state_dict())


# Batches


def test_single_samples_and_smaller_batches_are_fine(method, problem):
    model = Net()
    optimizer = method(model, lr=0.01, statistics_every=1)
    for size in (1, 1, 16, 5, 1):
        step(model, optimizer, problem[0][:size], problem[1][:size])
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.counters["failed_refreshes"] == 0


def test_sequences_of_different_lengths_are_fine(method):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.layer(x)).mean(1))

    optimizer = method(model := Pooled(), lr=0.01, statistics_every=1)
    for length in (3, 5, 2):
        step(model, optimizer, torch.randn(4, length, 2), torch.randint(3, (4,)))
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(method, problem):
    model = Net()
    optimizer = method(model, lr=0.01, statistics_every=2)
    train(model, optimizer, problem, 2)
    before, state = weights(model), state_tensors(optimizer)
    x, y = problem[0][:8].clone(), problem[1][:8]
    x[0, 0], x[1, 0] = math.nan, math.inf
    with pytest.warns(SmallfryWarning, match="not finite"):
        step(model, optimizer, x, y)
    assert optimizer.counters["skipped_steps"] == 1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    for name, tensor in state_tensors(optimizer).items():
        assert torch.equal(tensor, state[name]), name
    train(model, optimizer, problem, 1)  # the refresh that was skipped comes now
    assert optimizer.counters["statistics"] == 2
    assert all(p.isfinite().all() for p in model.parameters())


# Living with the rest of PyTorch


def test_schedulers_groups_weight_decay_and_closures_work(method, problem):
    model = Net()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": rest, "lr": 0.0}]
    optimizer = method(model, lr=0.1, params=groups, kl_clip=1e-12, fallback_lr=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = weights(model)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(problem[0]), problem[1])
        loss.backward()
        return loss

    rates = []
    for _ in range(2):
        rates.append(optimizer.param_groups[0]["lr"])
        assert float(optimizer.step(closure)) > 0
        scheduler.step()
    assert rates == [0.1, 0.05]
    # the divergence allowed is next to nothing, so what is left of the step is decay
    for name, p in model.named_parameters():
        kept = (1 - 0.1 * 0.5) * (1 - 0.05 * 0.5) if p.ndim > 1 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * kept, rtol=1e-3, atol=1e-4)


def test_autocast_keeps_factors_and_steps_in_float32(method, problem):
    model = Net()
    optimizer = method(model, lr=0.05, statistics_every=2)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(problem[0])
        loss = F.cross_entropy(output.float(), problem[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert {t.dtype for t in state_tensors(optimizer).values()} <= {torch.float32, torch.float64}


def test_a_grad_scaler_changes_nothing_but_skips_what_overflows(method, problem):
    ends = []
    for scaled in (False, True):
        torch.manual_seed(1)
        model = Net()
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        optimizer = method(model, lr=0.05, statistics_every=2, grad_scaler=scaler)
        for i in range(4):
            loss = F.cross_entropy(model(problem[0]), problem[1])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if scaled and i == 1:
                model.head.weight.grad[0, 0] = math.inf
            if not scaled and i == 1:
                continue
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
        ends.append(weights(model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-4, atol=1e-6)


def test_clipped_gradients_are_accepted(method, problem):
    model = Net()
    optimizer = method(model, lr=0.05, statistics_every=10)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(problem[0]), problem[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    assert optimizer.counters["statistics"] == 1


# Telling


def test_the_summary_accounts_for_every_parameter(method):
    model = Net()
    summary = method(model, lr=0.01).summary()
    assert sum(row.parameters for row in summary.rows) == sum(p.numel() for p in model.parameters())
    text = str(summary)
    assert "first" in text
    assert "LayerNorm is not covered" in text


def test_the_summary_states_the_memory_that_is_used(method, problem):
    model = Net(norm=False)
    optimizer = method(model, lr=0.01)
    foreseen = optimizer.summary().memory
    train(model, optimizer, problem, 2)
    held = sum(t.numel() * t.element_size() for t in state_tensors(optimizer).values())
    buffers = [t for s in optimizer.state.values() for t in s.values()]
    held += sum(t.numel() * t.element_size() for t in buffers)
    assert optimizer.summary().memory == held
    if method.kind not in (ExactNG, TwoLevel):  # theirs depends on the batch
        assert foreseen == held


def test_diagnostics_describe_every_block(method, problem):
    model = Net()
    optimizer = method(model, lr=0.01, statistics_every=2)
    optimizer.monitor()
    train(model, optimizer, problem, 3)
    diagnosis = optimizer.diagnostics()
    assert [b.layer for b in diagnosis.blocks] == ["first", "shared", "head"]
    for block in diagnosis.blocks:
        assert 0 < block.cosine <= 1 + 1e-6
        assert block.damping_ratio > 0
        if method.kind is not SNGD:
            assert block.fisher_error >= 0
        assert block.milliseconds > 0
    assert "Fisher error" in str(diagnosis)
