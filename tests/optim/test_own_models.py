"""Models of one's own: what they call, how they call it, and what they return."""

from typing import NamedTuple

import pytest
import torch
from dense_fisher import dense_fisher
from named_layers import Net
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from smallfry.errors import SmallfryWarning, UsageError
from smallfry.optim import EKFAC, KFAC, ExactNG

D = torch.float64


def exact_step(model, reference, x, *given, **named):
    """The step of exact natural gradient, and the dense damped solve for a reference."""
    optimizer = ExactNG(
        model, lr=1.0, damping=1.0, momentum=0.0, kl_clip=None, fisher="exact", check="error"
    )
    model.zero_grad()
    names = [name for block in optimizer.blocks for name in block.parameters]
    parameters = {name: model.get_parameter(name) for name in names}
    fisher = dense_fisher(reference, x, "categorical", names)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    output = model(*(given or (x,)), **named)
    F.cross_entropy(output, torch.arange(len(x)) % output.shape[1]).backward()
    gradient = torch.cat([p.grad.flatten() for p in parameters.values()])
    optimizer.step()
    damping = optimizer.lambdas[optimizer.blocks[0].name]
    expected = -torch.linalg.solve(fisher + damping * torch.eye(len(fisher), dtype=D), gradient)
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in parameters.items()])
    return moved, expected


def close(pair):
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)


def test_a_model_that_calls_itself_has_the_fisher_of_the_whole_pass():
    def plain(net, x):
        return net.b(torch.tanh(net.a(x)))

    def both(net, x):
        return (plain(net, x[..., :4]) + plain(net, x[..., 4:])) / 2

    def again(net, x, hidden=False):
        return net.b(x) if hidden else net(torch.tanh(net.a(x)), hidden=True)

    def crops(net, x):
        if isinstance(x, list):
            return torch.stack([net(one) for one in x]).mean(0)
        return plain(net, x)

    torch.manual_seed(0)
    layers = {"a": nn.Linear(4, 4, dtype=D), "b": nn.Linear(4, 3, dtype=D)}
    x = torch.randn(6, 8, dtype=D)
    model = Net(again, **layers)
    close(exact_step(model, model.like(plain), x[:, :4]))
    model = Net(crops, **layers)
    close(exact_step(model, model.like(both), x, [x[:, :4], x[:, 4:]]))


def test_a_pass_that_was_interrupted_inside_is_forgotten():
    class Interrupt(BaseException):
        pass

    def forward(net, x, stop=False):
        if stop:
            raise Interrupt
        return net.b(torch.tanh(net.a(x)))

    torch.manual_seed(0)
    model, x = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3)), torch.randn(6, 4)
    optimizer = KFAC(model, lr=0.1)
    with pytest.raises(Interrupt):
        model(x, stop=True)
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.arange(6) % 3).backward()
    optimizer.step()
    assert optimizer.counters["statistics"] == 1


HOSTS = {
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True, dtype=D),
        lambda net, x: net.host(x, x, x, need_weights=False)[0],
    ),
    "LSTM": (lambda: nn.LSTM(4, 4, batch_first=True, dtype=D), lambda net, x: net.host(x)[0]),
}


@pytest.mark.parametrize("kind", HOSTS)
def test_attention_and_recurrence_inside_a_checkpoint_have_the_exact_fisher(kind):
    build, call = HOSTS[kind]

    def kept(net, x):
        return net.b(call(net, torch.tanh(net.a(x))).mean(1))

    def checkpointed(net, x):
        h = torch.tanh(net.a(x))
        return net.b(checkpoint(lambda h: call(net, h), h, use_reentrant=False).mean(1))

    torch.manual_seed(0)
    ends = {"a": nn.Linear(4, 4, dtype=D), "b": nn.Linear(4, 3, dtype=D)}
    model = Net(checkpointed, host=build(), **ends)
    close(exact_step(model, model.like(kept), torch.randn(6, 3, 4, dtype=D)))
    assert "forward" not in model.host.__dict__  # it is PyTorch's own again


class Renamed(nn.Linear):
    def forward(self, hidden):
        return F.linear(hidden, self.weight, self.bias)


def test_an_input_may_come_by_any_keyword():
    torch.manual_seed(0)
    layers = {"a": Renamed(4, 4, dtype=D), "b": nn.Linear(4, 3, dtype=D)}
    model = Net(lambda net, x: net.b(input=torch.tanh(net.a(hidden=x))), **layers)
    plain = model.like(lambda net, x: net.b(torch.tanh(net.a(x))))
    close(exact_step(model, plain, torch.randn(6, 4, dtype=D)))


def test_samples_are_found_in_any_container():
    steps = []
    for in_a_dictionary in (False, True):
        torch.manual_seed(0)

        def tokens(net, x):
            x = x["x"] if isinstance(x, dict) else x
            return net.b(torch.tanh(net.a(x))).flatten(0, 1)

        model = Net(tokens, a=nn.Linear(4, 4, dtype=D), b=nn.Linear(4, 3, dtype=D))
        optimizer = EKFAC(model, lr=0.1, loss_scale="mean")  # needs the sample of each row
        x = torch.randn(6, 2, 4, dtype=D)
        F.cross_entropy(model({"x": x} if in_a_dictionary else x), torch.arange(12) % 3).backward()
        optimizer.step()
        steps.append(model.a.weight.detach())
    assert torch.equal(*steps)


class Answer(NamedTuple):
    other: torch.Tensor
    mean: torch.Tensor


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("other", ["loss", "hidden"])
def test_what_is_no_part_of_the_density_may_be_among_the_outputs(kind, other):
    steps = []
    for alone in (True, False):
        torch.manual_seed(0)

        def answer(net, x, y, alone=alone):
            hidden = torch.tanh(net.a(x))
            mean = net.b(hidden)
            if alone:
                return mean
            loss = ((mean - y) ** 2).sum(1).mean() / 2
            return Answer(loss if other == "loss" else hidden.T, mean)

        def density(output):
            mean = output if isinstance(output, torch.Tensor) else output.mean
            return torch.distributions.Independent(torch.distributions.Normal(mean, 1.0), 1)

        model = Net(answer, a=nn.Linear(4, 4, dtype=D), b=nn.Linear(4, 3, dtype=D))
        optimizer = kind(model, lr=0.1, likelihood=density)
        x, y = torch.randn(6, 4, dtype=D), torch.randn(6, 3, dtype=D)
        output = model(x, y)
        mean = output if alone else output.mean
        loss = ((mean - y) ** 2).sum(1).mean() / 2
        (output.other if other == "loss" and not alone else loss).backward()
        optimizer.step()
        assert optimizer.measurable
        steps.append(model.a.weight.detach())
    torch.testing.assert_close(*steps, rtol=1e-12, atol=0)


def test_parts_of_different_rows_are_refused():
    def forward(net, x):
        tokens = torch.tanh(net.a(x))
        return {"words": net.b(tokens).flatten(0, 1), "whole": net.b(tokens.mean(1))}

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    optimizer = KFAC(model, likelihood={"words": "categorical", "whole": "categorical"})
    with pytest.raises(UsageError, match=r"different first dimensions .*'words': 10, 'whole': 5"):
        model(torch.randn(5, 2, 4))
    assert optimizer.counters["steps"] == 0


@pytest.mark.parametrize(
    ("likelihood", "squeezed", "message"),
    [
        ("categorical", lambda z: z[0], r"\(samples, classes, …\), and .* shape \(3,\)"),
        ("bernoulli", lambda z: z[0, 0], r"\(samples, …\), and the model returned the shape \(\)"),
        ("gaussian", lambda z: z[0, 0], "call it on a batch, of one sample too"),
    ],
)
def test_outputs_without_samples_are_refused(likelihood, squeezed, message):
    model = Net(lambda net, x: squeezed(net.a(x)), a=nn.Linear(4, 3))
    optimizer = KFAC(model, lr=0.1, likelihood=likelihood)
    with pytest.raises(UsageError, match=message):
        model(torch.randn(1, 4))
    assert optimizer.counters["steps"] == 0


def test_complex_layers_are_left_to_adamw_and_trained():
    torch.manual_seed(0)
    layers = {"a": nn.Linear(4, 5, dtype=torch.cdouble), "b": nn.Linear(5, 3, dtype=D)}
    model = Net(lambda net, x: net.b(net.a(x.to(torch.cdouble)).abs()), **layers)
    with pytest.warns(SmallfryWarning, match="'a.weight' .* complex parameters"):
        optimizer = KFAC(model, lr=0.1, fallback_lr=0.01, kl_clip=None)
    assert optimizer.uncovered == dict.fromkeys(
        ("a.weight", "a.bias"), "Linear has complex parameters"
    )
    before = model.a.weight.detach().clone()
    F.cross_entropy(model(torch.randn(6, 4, dtype=D)), torch.arange(6) % 3).backward()
    optimizer.step()
    moved = torch.view_as_real(model.a.weight.detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=0.01, atol=0)  # AdamW's


def test_a_layer_of_no_width_is_no_obstacle():
    layers = {"a": nn.Linear(4, 0), "b": nn.Linear(4, 3)}
    model = Net(lambda net, x: net.b(x) + net.a(x).sum(1, keepdim=True), **layers)
    optimizer = KFAC(model, lr=0.1)
    F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 3).backward()
    optimizer.step()
    assert set(optimizer.uncovered) == {"a.weight", "a.bias"}


def test_a_model_without_numbers_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(UsageError, match=r"parameter '0.weight' is on the device 'meta'.*to_empty"):
        KFAC(model)


def test_gradients_that_no_backward_brought_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = KFAC(model)
    loss = F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 3)
    parameters = list(model.parameters())
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = gradient
    with pytest.raises(UsageError, match=r"loss.backward\(\), as gradients of torch.autograd.grad"):
        optimizer.step()
