"""What the optimizer watches of a model counts once it ends in ``.grad``, and is let go again."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.curvature import Categorical
from smallfry.errors import UsageError
from smallfry.optim import KFAC


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def batch(seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(8, 5, generator=random), torch.randint(3, (8,), generator=random)


def train(model, optimizer, steps=3, zero=None):
    for seed in range(steps):
        x, y = batch(seed)
        loss = F.cross_entropy(model(x), y)
        (zero or optimizer.zero_grad)()
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@contextlib.contextmanager
def no_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_step_lets_go_of_the_batch_without_the_garbage_collector():
    model = net()
    optimizer = KFAC(model, statistics_every=1)
    with no_collector():
        x, y = batch()
        output = model(x)
        loss = F.cross_entropy(output, y)
        held = weakref.ref(x)
        loss.backward()
        optimizer.step()
        del x, output, loss
        assert held() is None


def test_a_pass_without_backward_is_let_go_with_its_output():
    model = net()
    optimizer = KFAC(model, statistics_every=1)
    with no_collector():
        held = []
        for seed in range(3):
            x, _ = batch(seed)
            held.append(weakref.ref(x))
            model(x)
            del x
        assert [ref() for ref in held] == [None] * 3
    assert optimizer.observer.pending == []


def test_passes_of_another_optimizer_do_not_pile_up():
    model = net()
    optimizer = KFAC(model, statistics_every=1)
    other = torch.optim.SGD(model.parameters(), 0.1)
    train(model, other, 5)
    assert len(optimizer.observer.pending) <= 1


def test_passes_that_never_reach_the_parameters_do_not_pile_up():
    model = net()
    optimizer = KFAC(model, statistics_every=1)
    for seed in range(5):
        x, y = batch(seed)
        x.requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(x), y), x)
        assert len(optimizer.observer._touched) <= 1
        train(model, torch.optim.SGD(model.parameters(), 0.1), 1)
        assert len(optimizer.observer._accumulated) <= 1


def test_outputs_are_watched_on_steps_that_measure_or_refresh_alone(monkeypatch):
    model = net()
    optimizer = KFAC(model, statistics_every=5, burn_in=0)
    looked, read = [], Categorical.row_weights
    monkeypatch.setattr(
        Categorical,
        "row_weights",
        lambda *arguments: looked.append(optimizer.counters["steps"]) or read(*arguments),
    )
    train(model, optimizer, 12)
    assert looked == [0, 1, 5, 6, 10, 11]  # and each refresh is measured on the batch behind it
    assert optimizer.counters["measurements"] >= 3


@pytest.mark.parametrize("loss_scale", ["sum", "mean"])
def test_the_scale_of_the_loss_is_that_of_each_batch_watched_or_not(loss_scale):
    model = net()
    optimizer = KFAC(model, statistics_every=5, burn_in=0, loss_scale=loss_scale, kl_clip=None)
    for step, size in enumerate((8, 8, 4, 2)):
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x[:size]), y[:size], reduction=loss_scale).backward()
        (seen,) = optimizer.observer.pending
        assert (seen.weights == {}) == (step > 0)  # nothing but the size is looked at
        optimizer.step()
        assert optimizer._factor == (size if loss_scale == "sum" else 1.0)


def test_an_optimizer_that_is_gone_or_closed_watches_no_more():
    model = net()
    with no_collector():
        gone = weakref.ref(KFAC(model, statistics_every=1))
        assert gone() is None
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    optimizer = KFAC(model, statistics_every=1)
    optimizer.close()
    assert not model._forward_hooks or all("Linear" not in str(h) for h in model._forward_hooks)
    with pytest.raises(UsageError, match="no training forward pass was seen"):
        train(model, optimizer, 1)


def test_gradients_that_do_not_reach_the_parameters_do_not_count():
    ends = []
    for attacked in (False, True):
        model = net()
        optimizer = KFAC(model, lr=0.1, loss_scale="sum", statistics_every=1)
        for seed in range(3):
            x, y = batch(seed)
            optimizer.zero_grad()
            if attacked:
                near = x.clone().requires_grad_()
                attack = F.cross_entropy(1e3 * model(near), y, reduction="sum")
                torch.autograd.grad(attack, near)
            F.cross_entropy(model(x), y, reduction="sum").backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
        assert optimizer.counters["statistics"] == 3
        trace = sum(optimizer.curvature[b.name]["a"].sum() for b in optimizer.blocks)
        ends[-1].append(trace)
    # sampled targets differ: the attack's own draws came from the same generator
    torch.testing.assert_close(ends[0][-1], ends[1][-1], rtol=0.05, atol=0)


def test_clearing_gradients_through_the_model_is_fine():
    def stepped(zero):
        model = net()
        optimizer = KFAC(model, lr=0.1, statistics_every=1)
        x, y = batch(9)
        (100 * F.cross_entropy(model(x), y)).backward()  # thrown away: a sanity check, say
        (zero or model.zero_grad)()
        return train(model, optimizer, zero=model.zero_grad)

    for p in stepped(None):
        assert p.isfinite().all()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["method", "function"])
def test_compiling_before_or_after_takes_the_same_steps(when, how):
    torch._dynamo.reset()  # code compiled for another module would be taken again, without hooks
    expected = train(plain := net(), KFAC(plain, lr=0.1, burn_in=0, statistics_every=2), 4)
    model = net()

    def compiled():
        if how == "method":
            model.compile(backend="eager")
            return model
        return torch.compile(model, backend="eager")

    called = compiled() if when == "before" else model
    optimizer = KFAC(called, lr=0.1, burn_in=0, statistics_every=2)
    called = compiled() if when == "after" else called
    for one, other in zip(expected, train(called, optimizer, 4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert optimizer.counters["statistics"] == 2


def test_the_compilers_stance_is_given_back():
    model = torch.compile(net(), backend="eager")
    optimizer = KFAC(model, statistics_every=1)
    with torch.compiler.set_stance("eager_on_recompile"):
        train(model, optimizer, 1)
        assert torch._dynamo.eval_frame._stance.stance == "eager_on_recompile"


def test_two_optimizers_of_one_model_leave_the_compiler_as_it_was():
    model = net()
    first, second = KFAC(model, statistics_every=1), KFAC(model, statistics_every=1)
    train(model, first, 1)
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert second.observer.pending


@pytest.mark.parametrize("lost", [True, False])
def test_a_pass_that_is_interrupted_leaves_the_compiler_as_it_was(lost):
    def interrupt(*_):
        raise KeyboardInterrupt

    model = net()
    optimizer = KFAC(model, statistics_every=1)
    handle = model[1].register_forward_hook(interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        model(batch()[0])
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    handle.remove()
    if lost:
        del optimizer
        gc.collect()
    else:
        optimizer.zero_grad()
        train(model, optimizer, 1)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_two_optimizers_of_one_model_draw_apart():
    ends = []
    for others in (0, 2):
        model = net()
        optimizer = KFAC(model, lr=0.1, statistics_every=1, fisher="exact")
        watching = [KFAC(model, lr=0.1, statistics_every=1) for _ in range(others)]
        ends.append(train(model, optimizer))
        assert all(one.observer.pending for one in watching)
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


def test_an_optimizer_is_not_copied_with_its_model():
    model = net()
    with pytest.raises(UsageError, match="can't be copied"):
        copy.deepcopy((model, KFAC(model)))
