"""Seeds of a step: those of ``torch.manual_seed``, and of no device that draws nothing."""

import pytest
import torch

from smallfry.training.seeding import seed_generators


def test_numbers_of_the_cpu_are_those_of_manual_seed():
    seed_generators(2**63 + 5, torch.device("cpu"))
    found = torch.rand(3), torch.randint(9, (4,))
    torch.manual_seed(2**63 + 5)
    assert torch.equal(found[0], torch.rand(3))
    assert torch.equal(found[1], torch.randint(9, (4,)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_device_is_seeded_if_it_draws(device, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    seed_generators(7, torch.device(device))
    assert seeded == ([7] if device == "cuda" else [])
    assert torch.initial_seed() == 7
