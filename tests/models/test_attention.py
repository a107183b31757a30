"""Attention rollout against the weights that the plain model's own attention gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_vitrm import PlainViTRM
from torch.testing import assert_close

from smallfry.models import ViTRM, ViTRMPlus
from smallfry.models.attention import (
    Attended,
    attention_on_image,
    rollout,
    watch_attention,
    why_no_rollout,
)
from smallfry.models.trace import answers
from smallfry.models.vitrm import checkpoint_filter_fn

SIZES = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 12}
PATCHES = 16


def watched(model, images, steps):
    """Every answer with the layers of its think step, if there is one, and of its answer step."""
    layers = len(model.blocks)
    with torch.no_grad(), watch_attention(model) as seen:
        for step in answers(model, images, steps):
            yield step, seen[:-layers], seen[-layers:]
            seen.clear()


def plain_rollout(layers, rows):
    """The rollout of all rows, (rows, rows), and what the block makes of them."""
    mixed = torch.eye(rows.shape[1], dtype=rows.dtype)
    for layer in layers:
        normed = layer.norm1(rows)
        weights = layer.attn(normed, normed, normed, need_weights=True)[1][0]
        mixed = (weights + torch.eye(len(weights), dtype=rows.dtype)) / 2 @ mixed
        rows = layer(rows)
    return mixed, rows


@pytest.mark.parametrize("cross_attention", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_watching_changes_nothing_and_every_row_of_attention_sums_to_one(cross_attention, depth):
    model = ViTRM(**SIZES, depth=depth, latents=5, cross_attention=cross_attention).double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    seen = list(watched(model, images, 2))
    with torch.no_grad():
        wanted = model.recurse(images, 2)
    for number, step in enumerate(wanted, start=1):
        assert_close(seen[3 * number][0].logits, step.logits, rtol=0, atol=1e-9)
        assert_close(seen[3 * number][0].halt_logits, step.halt_logits, rtol=0, atol=1e-9)
    calls = [call for _, *blocks in seen for block in blocks for call in block]
    assert len(calls) == depth * (1 + 2 * 6)
    for call in calls:
        assert (call.weights >= 0).all()
        assert_close(call.weights.sum(-1), torch.ones_like(call.weights[..., 0]))
    assert not any(layer.attn._forward_hooks for layer in model.blocks)


@settings(max_examples=8, deadline=None)
@given(depth=st.integers(1, 3), latent_steps=st.integers(1, 3), seed=st.integers(0, 99))
def test_rollout_is_that_of_the_plain_model(depth, latent_steps, seed):
    torch.manual_seed(seed)
    plain = PlainViTRM(**SIZES, depth=depth, latent_steps=latent_steps).double().eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = ViTRM(**SIZES, depth=depth, latent_steps=latent_steps).double().eval()
    model.load_state_dict(checkpoint_filter_fn(plain.state_dict(), model))
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)

    thoughts = []
    for _, thought, answer in watched(model, images, 1):  # noqa: B007  the last answer is kept
        thoughts += [thought] if thought else []
    found = attention_on_image(thoughts, answer, PATCHES)

    with torch.no_grad():
        x, y, z = plain.patch_embed(images), plain.y_init, plain.z_init
        held = torch.zeros(1 + PATCHES, PATCHES, dtype=torch.float64)
        for _ in range(latent_steps):
            mixed, rows = plain_rollout(plain.block, torch.cat([x, y, z], dim=1))
            on_image = torch.eye(PATCHES, dtype=torch.float64)
            held = torch.cat([held[:1], (mixed @ torch.cat([on_image, held]))[PATCHES + 1 :]])
            z = rows[:, PATCHES + 1 :]
        wanted = plain_rollout(plain.block, torch.cat([y, z], dim=1))[0][:1] @ held
    assert_close(found, wanted, rtol=0, atol=1e-9)
    assert 0 < found.sum() < 1


@pytest.mark.parametrize("cross_attention", [False, True])
def test_a_memory_that_sees_only_one_patch_gives_a_map_of_that_patch(cross_attention):
    model = ViTRM(
        **SIZES, depth=1, latent_steps=1, cross_attention=cross_attention, drop_rate=0.0
    ).double()
    seen_patch = 6
    with torch.no_grad():  # keys tell patch 6 from all others, and every query asks for it
        for parameter in model.parameters():
            parameter.zero_()
        model.blocks[0].norm1.weight.fill_(1)
        model.pos_embed[0, :, 1] = 1
        model.pos_embed[0, seen_patch] = 0
        model.pos_embed[0, seen_patch, 0] = 1
        qkv = model.blocks[0].attn.qkv
        for head in range(2):
            qkv.bias[8 * head] = 10  # a query
            qkv.weight[16 + 8 * head, 0] = 10  # a key
    [_, (_, thought, answer)] = watched(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64), 1)
    found = attention_on_image([thought], answer, PATCHES)[0]
    # z keeps half of itself and reads half off the patch; y keeps half of itself, and reads the
    # other half evenly off itself and the 16 latents
    assert_close(found[seen_patch].item(), 0.5 * 16 / 17 * 0.5, rtol=1e-6, atol=0)
    assert found.sum() - found[seen_patch] < 1e-6


def test_even_attention_over_two_layers_is_what_arithmetic_says():
    even = Attended(torch.full((1, 3, 3), 1 / 3), slice(None), 0)
    last = Attended(torch.full((1, 1, 3), 1 / 3), slice(2, 3), 0)
    # after a layer a row is 2/3 itself and 1/6 each other; the last row of the next averages those
    assert_close(rollout([even, last]), torch.tensor([[[0.25, 0.25, 0.5]]]))


def test_before_the_first_think_step_nothing_of_the_image_is_in_the_answer():
    model = ViTRM(**SIZES).eval()
    _, thought, answer = next(watched(model, torch.randn(1, 3, 8, 8), 1))
    assert thought == []
    assert attention_on_image([], answer, PATCHES).tolist() == [[0.0] * PATCHES]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, ""),
        ({"positions": "rotary"}, ""),
        ({"injection": "add"}, "adds the image"),
        ({"depthwise": True}, "convolutions"),
        ({"pool": "z"}, "average"),
    ],
)
def test_models_whose_tokens_do_not_meet_in_attention_alone_are_told_apart(options, reason):
    said = why_no_rollout(ViTRMPlus(**SIZES, **options))
    assert reason in said
    assert bool(said) == bool(reason)


@pytest.mark.parametrize("further", [0, 4])
def test_the_weights_are_those_that_the_output_is_made_of(further):
    model = ViTRM(**SIZES | {"num_heads": 1}).double().eval()
    layer = model.blocks[1].attn
    qkv, context = torch.randn(2, 9, 48).double(), torch.randn(2, further, 48).double()
    with watch_attention(model) as seen:
        found = layer(qkv, slice(2, 5), context if further else None)
    values = torch.cat([context, qkv], dim=1)[..., 32:]
    assert_close(found, layer.proj(seen[0].weights @ values), rtol=0, atol=1e-9)
    assert seen[0].context == further
