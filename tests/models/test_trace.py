"""The trace of a recursive model agrees with its recursion."""

import pytest
import torch
from torch.testing import assert_close

from smallfry.models import ViTRM
from smallfry.models.trace import steps_to_follow, trace_recursion


@pytest.fixture
def model():
    return ViTRM(
        8, 4, 3, 5, embed_dim=16, num_heads=2, mlp_hidden_dim=8, latent_steps=2, recursion_steps=2
    ).eval()


def test_a_trace_agrees_with_recursion_at_the_end_of_every_step(model):
    images = torch.randn(3, 3, 8, 8)
    trace = trace_recursion(model, images, steps=3)
    assert trace.probabilities.shape == (1 + 3 * 2, 3, 5)
    with torch.no_grad():
        steps = model.recurse(images, 3)
    for number, step in enumerate(steps, start=1):
        assert_close(trace.probabilities[2 * number], step.logits.softmax(1))
        assert_close(trace.halting[2 * number], step.halt_logits.sigmoid())


def test_a_model_trained_with_one_recursion_step_is_followed_through_a_second(model):
    assert steps_to_follow(model) == 2
    model.recursion_steps = 1
    assert steps_to_follow(model) == 2
    model.recursion_steps = 5
    assert steps_to_follow(model) == 5
