"""A second oracle: curvlinops' own Gauss-Newton and KFAC, where it is installed."""

import pytest
import torch
from dense_fisher import inverted_fisher
from torch import nn

from smallfry.optim import KFAC, ExactNG

curvlinops = pytest.importorskip("curvlinops")
D = torch.float64


def trained(kind, model, x, y, **settings):
    optimizer = kind(model, lr=0.0, fisher="exact", damping=0.1, **settings)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return optimizer


def operator(kind, model, x, y, **settings):
    loss = nn.CrossEntropyLoss(reduction="mean")
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = kind(model, loss, parameters, [(x, y)], **settings)
    return torch.as_tensor(made @ torch.eye(made.shape[1], dtype=D))


def test_the_exact_fisher_is_their_gauss_newton():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(D)
    x, y = torch.randn(6, 3, dtype=D), torch.randint(3, (6,))
    expected = operator(curvlinops.GGNLinearOperator, model, x, y)
    optimizer = trained(ExactNG, model, x, y, scope="block")
    start = 0
    for block in optimizer.blocks:
        found = inverted_fisher(optimizer, block)
        part = slice(start, start + block.size)
        torch.testing.assert_close(found, expected[part, part], rtol=1e-6, atol=1e-9)
        start += block.size


def test_kfac_is_their_kfac():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(D)
    x, y = torch.randn(6, 3, dtype=D), torch.randint(3, (6,))
    expected = operator(
        curvlinops.KFACLinearOperator,
        model,
        x,
        y,
        fisher_type="type-2",
        kfac_approx="expand",
        separate_weight_and_bias=False,
    )
    optimizer = trained(KFAC, model, x, y, damping_split="tikhonov")
    start = 0
    for block in optimizer.blocks:
        found = inverted_fisher(optimizer, block)
        part = slice(start, start + block.size)
        torch.testing.assert_close(found, expected[part, part], rtol=1e-6, atol=1e-9)
        start += block.size
