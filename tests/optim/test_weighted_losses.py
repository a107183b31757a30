"""Losses that leave rows out or weigh them: F̂ against the dense Gauss-Newton matrix of the loss."""

import copy

import pytest
import torch
from dense_fisher import inverted_fisher
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from smallfry.curvature import Bernoulli, Categorical, Gaussian
from smallfry.errors import UsageError
from smallfry.optim import EKFAC, KFAC, KPSVD, SNGD, ExactNG, KFACCorrected, TwoLevel

D = torch.float64
B, T, C = 5, 4, 3
random = torch.Generator().manual_seed(0)
X = torch.randn(B, T, 2, generator=random, dtype=D)
Y = torch.randint(C, (B, T), generator=random)
Y[0, 1:], Y[3, 2:], Y[4, :] = -100, -100, -100  # padding, and a sample that is nothing else
W = torch.tensor([0.2, 1.0, 3.0], dtype=D)


class Tokens(nn.Module):
    """Tokens that see each other; logits as a loss may want them."""

    def __init__(self, form="tokens"):
        super().__init__()
        self.form = form
        self.first, self.mix, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, C)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        z = self.head(torch.tanh(h + self.mix(h.mean(1, keepdim=True))))
        if self.form == "flat":
            return z.flatten(0, 1)
        if self.form == "picture":
            return z.transpose(1, 2).unflatten(2, (2, 2))
        return {"tokens": z, "channels": z.transpose(1, 2), "first": z[:, 0]}[self.form]


def gauss_newton(model, loss, name):
    """Jᵀ H J of the loss itself, in one parameter."""
    model = copy.deepcopy(model)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def output(one):
        return functional_call(model, parameters | {name: one}, (X,))

    z = output(parameters[name])
    jacobian = jacrev(output)(parameters[name]).reshape(z.numel(), -1)
    h = hessian(loss)(z.detach()).reshape(z.numel(), z.numel())
    return jacobian.T @ h @ jacobian


def ce(**settings):
    return lambda z: F.cross_entropy(z, Y.flatten() if z.ndim == 2 else Y, **settings)


def channels(loss):
    return lambda z: loss(z.transpose(1, 2))


SAMPLES = torch.tensor([0.5, 2.0, 1.0, 0.1, 4.0], dtype=D)
SMOOTH = {"label_smoothing": 0.1, "ignore_index": -100}
YES = (torch.arange(B * T * C).reshape(B, T, C) % 2).to(D)
KEPT = torch.arange(B * T * C).reshape(B, T, C) % 5 > 1
# name: form of the output, loss, settings; a likelihood of None is what a name stands for
CASES = {
    "ignore_index": ("tokens", channels(ce()), {"loss_scale": "mean"}),
    "ignore_index, a sum": ("tokens", channels(ce(reduction="sum")), {"loss_scale": "sum"}),
    "channels first": ("channels", ce(), {"loss_scale": "mean"}),
    "pictures": (
        "picture",
        lambda z: F.cross_entropy(z, Y.unflatten(1, (2, 2))),
        {"loss_scale": "mean"},
    ),
    "batch × tokens": ("flat", ce(), {}),
    "class weights": ("flat", ce(weight=W), {}),
    "class weights, a sum": ("flat", ce(weight=W, reduction="sum"), {"loss_scale": "sum"}),
    "class weights, channels first": ("channels", ce(weight=W), {"loss_scale": "mean"}),
    "smoothed": ("flat", ce(**SMOOTH), {}),
    "smoothed, channels first": ("channels", ce(**SMOOTH), {"loss_scale": "mean"}),
    "smoothed, a sum": ("flat", ce(reduction="sum", **SMOOTH), {"loss_scale": "sum"}),
    "mean over padding too": (
        "tokens",
        lambda z: F.cross_entropy(z.flatten(0, 1), Y.flatten(), reduction="none").mean(),
        {},
    ),
    "sample weights": (
        "first",
        lambda z: (SAMPLES * F.cross_entropy(z, Y[:, 0] % C, reduction="none")).mean(),
        {},
    ),
    "the last token alone": ("tokens", lambda z: F.cross_entropy(z[:, -1], Y[:, 0] % C), {}),
    "a mask of outputs": (
        "tokens",
        lambda z: F.binary_cross_entropy_with_logits(z[KEPT], YES[KEPT]),
        {"likelihood": "bernoulli", "loss_scale": "mean"},
    ),
    "weights of outputs": (
        "tokens",
        lambda z: F.binary_cross_entropy_with_logits(z, YES, KEPT + 0.5 * W),
        {"likelihood": Bernoulli(hard=True), "loss_scale": "mean"},
    ),
    "pos_weight": (
        "tokens",
        lambda z: F.binary_cross_entropy_with_logits(z, YES, pos_weight=W, reduction="sum"),
        {"likelihood": Bernoulli(hard=True)},
    ),
    "a mask of numbers": (
        "tokens",
        lambda z: F.mse_loss(z[KEPT], YES[KEPT]),
        {"likelihood": Gaussian(masked=True), "loss_scale": "mean"},
    ),
}


def prepared(kind, form, loss, parts=1, **settings):
    torch.manual_seed(1)
    model = Tokens(form).to(D)
    optimizer = kind(model, lr=0.0, fisher="exact", fallback_lr=0.0, **settings)
    optimizer.zero_grad()
    loss(model(X)).backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("case", CASES)
def test_the_fisher_of_a_weighted_loss_is_its_gauss_newton_matrix(case):
    form, loss, settings = CASES[case]
    model, optimizer = prepared(ExactNG, form, loss, scope="block", damping=1.0, **settings)
    factor = optimizer._factor if isinstance(optimizer.loss_scale, str) else 1.0
    for block in optimizer.blocks:
        name = next(iter(block.parameters))
        count = block.parameters[name].numel()
        expected = gauss_newton(model, loss, name)
        found = inverted_fisher(optimizer, block)[:count, :count] * factor
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("kind", [ExactNG, EKFAC, KPSVD, KFACCorrected, TwoLevel])
def test_stated_weights_are_those_that_are_read(kind):
    """Of a mean over all rows, where a soft target would hide that."""
    weights = torch.where(Y >= 0, W[Y.clamp_min(0)], 0.0) / (B * T)

    def loss(z):
        return (
            weights * F.cross_entropy(z.transpose(1, 2), Y.clamp_min(0), reduction="none")
        ).sum()

    ends = []
    for stated in (False, True):
        torch.manual_seed(1)
        model = Tokens().to(D)
        optimizer = kind(model, lr=0.1, fisher="exact")
        value = loss(model(X))
        if stated:
            optimizer.weigh(weights)
        value.backward()
        optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


def test_stated_weights_are_the_fishers_with_soft_targets_and_numbers():
    soft = torch.rand(B * T, C, dtype=D).softmax(1)
    weights = torch.rand(B * T, dtype=D)
    for loss, likelihood in (
        (lambda z: (weights * F.cross_entropy(z, soft, reduction="none")).sum(), Categorical()),
        (lambda z: 0.5 * (weights[:, None] * (z - soft) ** 2).sum(), Gaussian()),
    ):
        torch.manual_seed(1)
        model = Tokens("flat").to(D)
        optimizer = ExactNG(model, lr=0.0, scope="block", likelihood=likelihood, fisher="exact")
        value = loss(model(X))
        optimizer.weigh(weights)
        value.backward()
        optimizer.step()
        found = inverted_fisher(optimizer, optimizer.blocks[2])[: 3 * C, : 3 * C]
        torch.testing.assert_close(
            found, gauss_newton(model, loss, "head.weight"), rtol=1e-6, atol=1e-9
        )


def directions(optimizer, model):
    g = {
        n: torch.ones_like(p) * (1 + torch.arange(p.numel()).view_as(p))
        for n, p in model.named_parameters()
    }
    return optimizer._directions(g)


WAYS = [(KFAC, "expand"), (KFAC, "reduce"), (ExactNG, None), (SNGD, None)]
WAYS += [(kind, way) for kind in (EKFAC, KPSVD) for way in ("expand", "reduce", "exact")]


@pytest.mark.parametrize(("kind", "sharing"), WAYS)
def test_a_sample_of_weight_two_is_one_that_comes_twice(kind, sharing):
    settings = {} if sharing is None else {"sharing": sharing}
    y, twice = Y[:, 0] % C, torch.tensor([0, 1, 1, 2, 3, 3, 3])
    counts = torch.bincount(twice, minlength=B).to(D)

    def end(x, y, weights):
        torch.manual_seed(1)
        model = Tokens("first").to(D)
        optimizer = kind(model, lr=0.0, fisher="exact", damping=0.1, **settings)
        loss = (weights * F.cross_entropy(model(x), y, reduction="none")).sum() / weights.sum()
        loss.backward()
        optimizer.step()
        return directions(optimizer, model)

    expected = end(X[twice], y[twice], torch.ones(7, dtype=D))
    found = end(X, y, counts)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", [KFAC, EKFAC, KPSVD, ExactNG, SNGD])
def test_rows_left_out_are_as_if_they_were_not_there(kind):
    keep = Y.flatten() >= 0

    def end(x, y):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, C)).to(D)
        optimizer = kind(model, lr=0.0, fisher="exact")
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return directions(optimizer, model)

    x, y = X.flatten(0, 1), Y.flatten()
    expected, found = end(x[keep], y[keep]), end(x, y)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9)


PARTS = [slice(0, 2), slice(2, 5)]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize(("kind", "sharing"), WAYS)
def test_weights_that_differ_between_micro_batches_alone_are_seen(kind, sharing, scale):
    """Gradient accumulation: each part of the batch has one weight, and another than the next."""
    settings = {} if sharing is None else {"sharing": sharing}
    y, weights = Y[:, 0] % C, torch.tensor([2.0, 2.0, 0.5, 0.5, 0.5], dtype=D)
    weights = weights / weights.sum()

    def end(parts, scale):
        torch.manual_seed(1)
        model = Tokens("first").to(D)
        optimizer = kind(model, lr=0.0, fisher="exact", damping=0.1, **settings)
        scaler = torch.amp.GradScaler("cpu", enabled=scale > 1, init_scale=scale)
        for part in parts:
            nll = F.cross_entropy(model(X[part]), y[part], reduction="none")
            scaler.scale((weights[part] * nll).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        return directions(optimizer, model)

    expected, found = end([slice(0, 5)], scale), end(PARTS, scale)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9)


def test_the_mean_of_uneven_parts_is_the_fisher_of_that_loss():
    """F.cross_entropy of 2 and of 3 samples, each a mean: the first two count for more."""
    y = Y[:, 0] % C
    model, optimizer = Tokens("first").to(D), None
    optimizer = ExactNG(model, lr=0.0, fisher="exact", scope="block", damping=1.0)
    for part in PARTS:
        (F.cross_entropy(model(X[part]), y[part]) / 2).backward()
    optimizer.step()

    def loss(z):
        return sum(F.cross_entropy(z[part], y[part]) / 2 for part in PARTS)

    for block in optimizer.blocks:
        name = next(iter(block.parameters))
        count = block.parameters[name].numel()
        expected = gauss_newton(model, loss, name)
        found = inverted_fisher(optimizer, block)[:count, :count]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.max()))


REAL = (Y >= 0).sum().item() / B
ALL = T * 1.0
TARGETS = {
    "a sum": ("tokens", channels(ce(reduction="sum")), {"loss_scale": "sum"}, REAL),
    "a sum over samples": ("tokens", lambda z: channels(ce(reduction="sum"))(z) / B, {}, REAL),
    "a mask": (
        "tokens",
        lambda z: (channels(ce(reduction="none"))(z) * (Y >= 0)).sum() / B,
        {},
        REAL,
    ),
    "a mean": ("tokens", channels(ce()), {"loss_scale": "mean"}, ALL),
    "outputs": (
        "tokens",
        lambda z: F.binary_cross_entropy_with_logits(z[KEPT], YES[KEPT], reduction="sum") / B,
        {"likelihood": "bernoulli"},
        KEPT.sum().item() / B,
    ),
    "numbers": (
        "tokens",
        lambda z: F.mse_loss(z[KEPT], z.detach()[KEPT] + 1, reduction="sum") / 2 / B,
        {"likelihood": Gaussian(masked=True)},
        KEPT.sum().item() / B,
    ),
    "numbers twice as far": (
        "tokens",
        lambda z: F.mse_loss(z[KEPT], z.detach()[KEPT] + 2, reduction="sum") / 2 / B,
        {"likelihood": Gaussian(masked=True)},
        KEPT.sum().item() / B * 4,
    ),
}


@pytest.mark.parametrize("case", TARGETS)
def test_padding_is_no_target_whatever_the_loss_divides_by(case):
    form, loss, settings, expected = TARGETS[case]
    _, optimizer = prepared(KFAC, form, loss, **settings)
    optimizer.param_groups[0]["lr"] = 1.0
    model = optimizer.model()
    optimizer.zero_grad()
    loss(model(X)).backward()
    optimizer.step()
    assert optimizer.counters["measurements"] == 1
    assert optimizer.targets == pytest.approx(expected)


def test_a_batch_of_padding_leaves_the_bound_as_it_was():
    model = Tokens().to(D)
    optimizer = KFAC(model, lr=0.1, loss_scale="sum")
    for y in (Y, torch.full_like(Y, -100)):
        optimizer.zero_grad()
        F.cross_entropy(model(X).transpose(1, 2), y, reduction="sum").backward()
        optimizer.step()
    assert optimizer.targets == pytest.approx(REAL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("log_in", ["half", "float32"])
@pytest.mark.parametrize("classes", [2, 10, 500])
def test_weights_are_read_through_the_rounding_of_half_precision(dtype, log_in, classes):
    """Gradients of ρ p with p down to nothing: many are smaller than the smallest normal number."""
    random = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(256, classes, generator=random)).to(dtype).requires_grad_()
    y = torch.randint(classes, (256,), generator=random)
    used = z if log_in == "half" else z.float()
    F.cross_entropy(used, y).backward()
    found = Categorical().row_weights((z.detach(),), 0, z.grad)
    assert found.values is None or set(found.values.unique().tolist()) <= {0.0, 1.0}
    assert found.unit == pytest.approx(1 / 256, rel=0.02)
    weights = torch.rand(256, generator=random) + 0.5
    z.grad = None
    (weights * F.cross_entropy(z.float(), y, reduction="none")).mean().backward()
    found = Categorical(hard=True).row_weights((z.detach(),), 0, z.grad)
    p = z.detach().float().softmax(1)
    clear = (1 - p[torch.arange(256), y] > 0.2) & (classes < 500)
    rho = found.values[:, 0] * found.unit * 256
    torch.testing.assert_close(rho[clear], weights[clear], rtol=0.05, atol=0)


def test_smoothed_targets_of_half_precision_are_not_taken_for_certain():
    random = torch.Generator().manual_seed(0)
    z = torch.randn(64, 10, generator=random).half().requires_grad_()
    y = torch.randint(10, (64,), generator=random)
    F.cross_entropy(z.float(), y, label_smoothing=0.2).backward()
    assert Categorical().row_weights((z.detach(),), 0, z.grad).unit is None


def test_a_scaled_loss_of_float16_is_unscaled_where_it_does_not_underflow():
    """ρ p of 2e-8 is nothing in float16; 65536 times as much is some."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = KFAC(model, lr=0.1, grad_scaler=scaler)
    x, y = torch.randn(64, 4), torch.randint(5, (64,))
    with torch.autocast("cpu", torch.float16):
        z = model(x)
    nll = F.cross_entropy(z.float(), y, reduction="none")
    weights = torch.where(torch.arange(64) < 32, 1e-7, 2e-7)
    scaler.scale((weights * nll).sum()).backward()
    (seen,) = optimizer.observer.pending
    found = seen.weights[0]
    assert found.unit == pytest.approx(1.5e-7, rel=0.02)
    assert (found.values[:32, 0] * found.unit / 1e-7 - 1).abs().max() < 0.05
    assert seen.output_gradients[0].dtype == torch.float32
    assert seen.output_gradients[0].abs().max() < 2e-7


def test_padding_in_parts_is_padding_in_one():
    ends = []
    for parts in ([slice(0, 5)], [slice(0, 2), slice(2, 5)]):
        torch.manual_seed(1)
        model = Tokens().to(D)
        optimizer = KFAC(model, lr=0.0, fisher="exact", loss_scale="mean")
        for part in parts:
            z, y = model(X[part]), Y[part]
            (F.cross_entropy(z.transpose(1, 2), y, reduction="sum") / (Y >= 0).sum()).backward()
        optimizer.step()
        ends.append(directions(optimizer, model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-8, atol=1e-12)


def test_a_scaled_loss_is_read_like_one_that_is_not():
    """A GradScaler that the optimizer was not given hides ρ, not what counts."""
    ends = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(1)
        model = Tokens().to(D)
        optimizer = KFAC(model, lr=0.1, loss_scale="mean")
        scaler = torch.amp.GradScaler("cpu", enabled=scale > 1, init_scale=scale)
        loss = F.cross_entropy(model(X).transpose(1, 2), Y, weight=W)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        ends.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_two_classes_of_unequal_weight_are_not_answered_by_one_batchs_number():
    x, y = X[:, 0], torch.tensor([0, 1, 1, 0, 1])

    def train(likelihood):
        torch.manual_seed(1)
        model = nn.Linear(2, 2).to(D)
        optimizer = ExactNG(model, lr=0.0, scope="block", likelihood=likelihood, fisher="exact")
        F.cross_entropy(model(x), y, weight=torch.tensor([1.0, 9.0], dtype=D)).backward()
        optimizer.step()

    with pytest.raises(UsageError, match=r"unequal weights.*Categorical\(hard=True\).*weigh\("):
        train("categorical")
    train(Categorical(hard=True))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"weights of shape \(3,\) .* expected \(5, 4\), or \(5,\)"),
        (-torch.ones(B), "non-negative"),
        (torch.zeros(B), "not all zero"),
        (torch.full((B,), torch.nan), "finite"),
    ],
)
def test_weights_that_make_no_sense_are_named(weights, message):
    model = Tokens().to(D)
    optimizer = KFAC(model)
    loss = model(X).square().sum()
    optimizer.weigh(weights)
    with pytest.raises(UsageError, match=message):
        loss.backward()


def test_parts_of_an_output_have_rows_of_their_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(2, 4), nn.Linear(4, C), nn.Linear(4, 1)

        def forward(self, x):
            h = torch.tanh(self.body(x))
            return {"class": self.a(h), "stop": self.b(h)}

    y, stop = Y.flatten(), (torch.arange(B * T) % 2).to(D)[:, None]
    x = X.flatten(0, 1)

    def loss(z):
        chosen = F.cross_entropy(z["class"], y, weight=W)
        return chosen + F.binary_cross_entropy_with_logits(z["stop"][:8], stop[:8])

    torch.manual_seed(1)
    model = Two().to(D)
    likelihood = {"class": "categorical", "stop": Bernoulli(hard=True)}
    optimizer = ExactNG(model, lr=0.0, scope="block", likelihood=likelihood, fisher="exact")
    loss(model(x)).backward()
    optimizer.step()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def output(one):
        z = functional_call(copy.deepcopy(model), parameters | {"body.weight": one}, (x,))
        return torch.cat([z["class"], z["stop"]], 1)

    z = output(parameters["body.weight"])
    jacobian = jacrev(output)(parameters["body.weight"]).reshape(z.numel(), -1)
    h = hessian(lambda z: loss({"class": z[:, :C], "stop": z[:, C:]}))(z.detach())
    expected = jacobian.T @ h.reshape(z.numel(), z.numel()) @ jacobian
    found = inverted_fisher(optimizer, optimizer.blocks[0])[:8, :8]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("step_length", ["lr", "quadratic"])
def test_measured_steps_leave_the_rows_out_too(step_length):
    """The best step and the reduction ratio, with padding and without what is padded."""
    keep, ends = Y.flatten() >= 0, []
    x, y = X.flatten(0, 1), Y.flatten()
    for chosen in (keep, slice(None)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, C)).to(D)
        optimizer = KFAC(
            model, lr=1.0, fisher="exact", step_length=step_length, adaptive_damping=True
        )
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        ends.append((optimizer.reduction_ratio, [p.detach() for p in model.parameters()]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
