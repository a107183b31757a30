import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from smallfry.models import ViTRM
from smallfry.models.early_exit import recurse_until

MODEL = ViTRM(8, 4, embed_dim=16, num_heads=2, mlp_hidden_dim=8, recursion_steps=4).double().eval()


@settings(max_examples=20, deadline=None)
@given(threshold=st.floats(0, 1.1), seed=st.integers(0, 99))
def test_each_image_leaves_with_the_first_step_that_passes(threshold, seed):
    images = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
    found = recurse_until(MODEL, images, threshold)
    trace = MODEL.recurse(images)
    for i in range(7):
        passing = (n for n, s in enumerate(trace, 1) if s.halt_logits[i].sigmoid() >= threshold)
        last = next(passing, 4)
        assert found.steps[i] == last
        assert_close(found.logits[i], trace[last - 1].logits[i])
        assert_close(found.halt_logits[i], trace[last - 1].halt_logits[i])


def test_finished_images_leave_the_batch(monkeypatch):
    sizes, step = [], MODEL.step
    monkeypatch.setattr(MODEL, "step", lambda x, state: sizes.append(len(x)) or step(x, state))
    images = torch.randn(9, 3, 8, 8).double()
    halting = MODEL.advance(images).halt_logits.sigmoid().sort().values
    middle = float(halting[3:5].mean())
    sizes.clear()
    found = recurse_until(MODEL, images, middle)
    assert sizes[0] == 9
    assert sizes[1] == 4  # the others have more
    assert sum(sizes) == found.steps.sum()
