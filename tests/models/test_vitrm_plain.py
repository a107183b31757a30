"""The model that computes only what is kept equals the one that computes everything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_vitrm import PlainViTRM
from scipy.stats import ks_2samp
from torch.nn import functional as F
from torch.testing import assert_close

from smallfry.models import ViTRM
from smallfry.models.vitrm import checkpoint_filter_fn

SMALL = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 12}


def both(dtype=torch.float64, recursion_steps=1, **sizes):
    """The plain and the fast model with the same weights, none of them at a special value."""
    plain = PlainViTRM(**sizes)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    fast = ViTRM(**sizes, recursion_steps=recursion_steps)
    fast.load_state_dict(checkpoint_filter_fn(plain.state_dict(), fast))
    return plain.to(dtype), fast.to(dtype)


def assert_equal_outputs_and_gradients(plain, fast, images, steps, **tolerance):
    logits, halt_logits = plain(images, steps)
    last = fast.recurse(images)[-1]
    assert_close(last.logits, logits, **tolerance)
    assert_close(last.halt_logits, halt_logits, **tolerance)
    assert_close(fast(images), logits, **tolerance)
    for some_logits, some_halting in ((logits, halt_logits), last[1:]):
        loss = F.cross_entropy(some_logits, torch.arange(len(images)))
        (loss + some_halting.sigmoid().mean()).backward()
    wanted = checkpoint_filter_fn({n: p.grad for n, p in plain.named_parameters()}, fast)
    assert_close({n: p.grad for n, p in fast.named_parameters()}, wanted, **tolerance)


@settings(max_examples=12, deadline=None)
@given(
    depth=st.integers(1, 3),
    latent_steps=st.integers(1, 3),
    recursion_steps=st.integers(1, 3),
    training=st.booleans(),
)
def test_outputs_and_gradients_equal_the_plain_form(depth, latent_steps, recursion_steps, training):
    sizes = {**SMALL, "depth": depth, "latent_steps": latent_steps, "drop_rate": 0.0}
    plain, fast = both(**sizes, recursion_steps=recursion_steps)
    fast.train(training)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    tight = {"atol": 1e-10, "rtol": 1e-10}
    assert_equal_outputs_and_gradients(plain, fast, images, recursion_steps, **tight)


def test_the_papers_model_equals_the_plain_form_in_float32():
    plain, fast = both(torch.float32, drop_rate=0.0)
    images = torch.randn(2, 3, 32, 32)
    assert_equal_outputs_and_gradients(plain, fast, images, 1, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.5), (0.3, 0.5)])
def test_dropout_has_the_distribution_of_the_plain_form(rates):
    plain, fast = both(torch.float32, **SMALL, drop_rate=rates[0], attn_drop_rate=rates[1])
    images = torch.randn(1, 3, 8, 8).expand(4000, -1, -1, -1)
    with torch.no_grad():
        theirs, ours = plain.train()(images)[0], fast.train()(images)
    for c in range(3):
        assert len(ours[:, c].unique()) > 100  # each image of the batch has its own mask
        assert ks_2samp(theirs[:, c].numpy(), ours[:, c].numpy()).pvalue > 1e-3


def plain_cross_attention(model, images):
    """Logits by the definition: in every layer, x is read and never written."""
    x, (y, z) = model.embed(images), model.initial_state(len(images))

    def block(rows, read):
        for layer in model.blocks:
            query, key = layer.norm1(rows), layer.norm1(torch.cat([read, rows], dim=1))
            attended, _ = F.multi_head_attention_forward(
                *(t.transpose(0, 1) for t in (query, key, key)),
                rows.shape[2],
                layer.attn.heads,
                layer.attn.qkv.weight,
                layer.attn.qkv.bias,
                *(None, None, False, 0.0),
                layer.attn.proj.weight,
                layer.attn.proj.bias,
            )
            rows = rows + attended.transpose(0, 1)
            rows = rows + layer.mlp(layer.norm2(rows))
        return rows

    for _ in range(model.recursion_steps):
        for _ in range(model.latent_steps):
            z = block(torch.cat([y, z], dim=1), x)[:, 1:]
        y = block(torch.cat([y, z], dim=1), x[:, :0])[:, :1]
    return model.head(y[:, 0])


@pytest.mark.parametrize("latents", [None, 1, 3])
def test_cross_attention_reads_the_image_and_never_writes_it(latents):
    model = ViTRM(**SMALL, latents=latents, cross_attention=True, recursion_steps=2, drop_rate=0.0)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    wanted = plain_cross_attention(model, images)
    found = model.eval()(images)
    assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    trained = [p for n, p in model.named_parameters() if not n.startswith("halt_head")]
    ours, theirs = (torch.autograd.grad(o.square().sum(), trained) for o in (found, wanted))
    assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
