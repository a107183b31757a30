"""What the pictures of the concepts claim, and that their scripts draw them."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch.func import hessian

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


def script(name: str):
    spec = spec_from_file_location(f"picture_{name}", PICTURES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn():
    return script("natural_gradient")


def test_the_fisher_is_the_second_derivative_of_the_divergence(drawn):
    data, start = drawn.two_weights(), torch.tensor(drawn.START, dtype=torch.float64)
    curvature = hessian(lambda weights: drawn.divergence(start, weights, data))(start)
    torch.testing.assert_close(curvature, drawn.fisher_at(start, data))


def test_natural_descent_does_not_depend_on_units_and_gradient_descent_does(drawn):
    data = drawn.two_weights()
    natural = [drawn.path("natural", data, unit, 10, 0.1) for unit in (1.0, drawn.UNIT)]
    torch.testing.assert_close(*natural, rtol=0, atol=1e-4)
    gradient = [drawn.path("gradient", data, unit, 10, 0.1) for unit in (1.0, drawn.UNIT)]
    assert (gradient[0] - gradient[1]).abs().max() > 0.1


def test_one_natural_step_is_the_inverse_fisher_times_the_gradient(drawn):
    data, start = drawn.two_weights(), torch.tensor(drawn.START, dtype=torch.float64)
    leaf = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(drawn.loss_at(leaf, data), leaf)
    wanted = start - 0.1 * torch.linalg.solve(drawn.fisher_at(start, data), gradient)
    torch.testing.assert_close(
        drawn.path("natural", data, 1.0, 1, 0.1)[1], wanted, rtol=1e-4, atol=0
    )


def test_the_nearest_product_is_nearer_than_kfacs_and_no_product_is_exact(drawn):
    block = drawn.hidden_layer()
    kfac, nearest = (drawn.relative_error(block, b) for b in (block.kfac, block.nearest))
    rearranged = block.fisher.reshape(4, 3, 4, 3).transpose(1, 2).reshape(16, 9)
    values = torch.linalg.svdvals(rearranged)
    optimum = values[1:].norm() / values.norm()  # Van Loan and Pitsianis 1993
    assert nearest == pytest.approx(float(optimum), rel=1e-6)
    assert kfac > nearest > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["natural_gradient", "recursion"])
def test_scripts_draw_the_pictures_of_their_name(name, tmp_path, monkeypatch):
    module = script(name)
    monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path)])
    module.main()
    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn == {file.name for file in PICTURES.glob(f"{name}_*.png")}
