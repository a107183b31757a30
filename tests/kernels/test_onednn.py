"""Products with oneDNN: where they are taken, and that they are the same products."""

import pytest
import torch
from torch import nn

from smallfry.errors import UsageError
from smallfry.kernels import onednn
from smallfry.kernels.onednn import multiplies, multiply, prefers_onednn


@pytest.mark.parametrize(
    ("setting", "processor", "preferred"),
    [
        (None, "vendor_id : GenuineIntel", False),
        (None, "vendor_id : AuthenticAMD", True),
        (None, "", True),
        ("", "GenuineIntel", False),
        ("0", "AuthenticAMD", False),
        ("1", "GenuineIntel", True),
    ],
)
def test_the_processor_decides_unless_it_is_stated(setting, processor, preferred):
    assert prefers_onednn(setting, processor) is preferred


@pytest.mark.parametrize("setting", ["2", "yes", " 1", "true"])
def test_other_settings_are_refused(setting):
    with pytest.raises(UsageError, match="SMALLFRY_ONEDNN must be 0 or 1, not"):
        prefers_onednn(setting, "")


@pytest.fixture
def preferred(monkeypatch):
    if not onednn._HAS_ONEDNN:
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(onednn, "_PREFERRED", True)


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7), (2, 1, 3, 7), (1, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_float64(shape, bias):
    torch.manual_seed(0)
    rows, weight = torch.randn(shape), torch.randn(5, 7)
    shift = torch.randn(5) if bias else None
    assert multiplies(rows, weight, shift)
    found = multiply(rows, weight, shift)
    expected = nn.functional.linear(
        rows.double(), weight.double(), None if shift is None else shift.double()
    )
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


class Wrapped(torch.Tensor):
    """A subclass, which may have a product of its own."""


@pytest.mark.usefixtures("preferred")
def test_all_else_is_left_to_pytorch():
    rows, weight = torch.ones(4, 7), torch.ones(5, 7)
    assert multiplies(rows, nn.Parameter(weight), nn.Parameter(torch.ones(5)))
    assert not multiplies(rows.double(), weight.double())
    assert not multiplies(rows.half(), weight.half())
    assert not multiplies(rows, weight.double())
    assert not multiplies(rows[0], weight)  # a vector
    assert not multiplies(rows[:0], weight)
    assert not multiplies(rows.as_subclass(Wrapped), weight)
    assert not multiplies(rows, weight.as_subclass(Wrapped))
    assert not multiplies(rows, weight, torch.ones(5).as_subclass(Wrapped))
    assert not multiplies(rows.to("meta"), weight)


@pytest.mark.usefixtures("preferred")
def test_transforms_autocast_and_a_switched_off_onednn_are_left_to_pytorch():
    rows, weight = torch.ones(4, 7), torch.ones(5, 7)
    seen = []

    def watched(row):
        seen.append(multiplies(row[None], weight))
        return row.sum()

    torch.func.vmap(watched)(rows)
    assert seen == [False]
    with torch.autocast("cpu", torch.bfloat16):
        assert not multiplies(rows, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not multiplies(rows, weight)
    assert multiplies(rows, weight)


def test_where_it_is_not_preferred_it_is_never_taken(monkeypatch):
    monkeypatch.setattr(onednn, "_PREFERRED", False)
    assert not multiplies(torch.ones(4, 7), torch.ones(5, 7))
