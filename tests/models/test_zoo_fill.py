import torch
from zoo_golden import GOLDEN, filled, images, series


def test_numbers_are_those_of_the_rule() -> None:
    for key, wanted in GOLDEN["fill"].items():
        if key.startswith("s("):
            name = key.split('"')[1]
            found = series(name, 6)
            torch.testing.assert_close(found, torch.tensor(wanted).double(), rtol=0, atol=1e-7)


def test_values_by_kind_of_tensor() -> None:
    s = series("a.weight", 6)
    torch.testing.assert_close(filled("a.weight", (2, 3)), s.view(2, 3))  # √(3 / 3)
    torch.testing.assert_close(filled("a.weight", (6,)), 1 + 0.2 * s)
    torch.testing.assert_close(filled("a.bias", (6,)), 0.2 * series("a.bias", 6))
    torch.testing.assert_close(filled("running_var", (4,)), 1 + 0.5 * series("running_var", 4))
    torch.testing.assert_close(filled("running_mean", (4,)), 0.2 * series("running_mean", 4))
    torch.testing.assert_close(images((1, 6)).flatten(), 3**0.5 * series("input", 6))
