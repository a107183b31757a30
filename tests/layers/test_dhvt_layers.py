"""Each part of DHVT alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.layers.daff import DAFF
from smallfry.layers.head_interaction import HeadInteractionAttention
from smallfry.layers.sope import SOPE


@pytest.mark.parametrize(("patch", "convolutions"), [(2, 1), (4, 2), (16, 4)])
def test_each_convolution_of_sope_halves_the_side(patch: int, convolutions: int) -> None:
    embed = SOPE(3, 16, patch)
    assert sum(isinstance(m, nn.Conv2d) for m in embed.modules()) == convolutions
    assert embed(torch.rand(2, 3, 32, 48)).shape == (2, 16, 32 // patch, 48 // patch)
    assert isinstance(embed.proj[-1], nn.GELU) == (patch == 2)


def test_affines_of_sope_act_before_and_after() -> None:
    embed, some = SOPE(3, 16, 4).eval(), torch.rand(1, 3, 8, 8)
    before = embed(some)
    with torch.no_grad():
        embed.post_affine.alpha.fill_(2.0)
        embed.post_affine.beta.fill_(1.0)
        torch.testing.assert_close(embed(some), 2 * before + 1)
        embed.pre_affine.alpha.fill_(0.0)
    torch.testing.assert_close(embed(some), embed(torch.zeros_like(some)))


def test_other_patches_are_refused() -> None:
    with pytest.raises(UsageError, match="2, 4 or 16, not 8"):
        SOPE(3, 16, 8)
    with pytest.raises(UsageError, match="12 features don't divide by 8"):
        SOPE(3, 12, 16)
    with pytest.raises(UsageError, match="5 heads don't divide 12"):
        HeadInteractionAttention(12, 5)


def test_head_tokens_without_projection_are_constants() -> None:
    torch.manual_seed(0)
    layer = HeadInteractionAttention(12, 3).double().eval()
    with torch.no_grad():
        layer.ht_proj.weight.zero_()
        layer.ht_norm.bias.normal_()
        layer.pos_embed.zero_()
    tokens = torch.randn(2, 5, 12, dtype=torch.float64)
    constant = F.gelu(layer.ht_norm(layer.ht_proj.bias.view(1, 3, 4))).view(1, 1, 12)
    torch.testing.assert_close(layer.head_tokens(tokens), constant.expand(2, 3, 12))
    rows = torch.cat([tokens, constant.expand(2, 3, 12)], 1)
    q, k, v = layer.qkv(rows).view(2, 8, 3, 3, 4).permute(2, 0, 3, 1, 4)
    mixed = ((q @ k.transpose(2, 3) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    wanted = layer.proj(mixed)
    found = layer(tokens)
    torch.testing.assert_close(found[:, 1:], wanted[:, 1:5])
    torch.testing.assert_close(found[:, 0], wanted[:, 0] + wanted[:, 5:].mean(1))


def test_head_tokens_read_their_own_slice() -> None:
    layer, tokens = HeadInteractionAttention(12, 3), torch.randn(1, 5, 12)
    changed = tokens.clone()
    changed[0, 2, 4:8] += 1  # the second head's
    moved = (layer.head_tokens(tokens) - layer.head_tokens(changed)).abs().amax(2)[0]
    assert moved[1] > 1e-6
    torch.testing.assert_close(moved[[0, 2]], torch.zeros(2), atol=1e-7, rtol=0)


def test_patches_are_independent_of_the_class_token_in_daff() -> None:
    layer, tokens = DAFF(8, 16).eval(), torch.randn(2, 10, 8)
    other = tokens.clone()
    other[:, 0] *= 3
    found, changed = layer(tokens), layer(other)
    assert torch.equal(found[:, 1:], changed[:, 1:])
    torch.testing.assert_close(changed[:, 0], 3 * found[:, 0])


def test_daff_refuses_what_is_no_square() -> None:
    with pytest.raises(ValueError, match="a grid of patches of 1:1, got 6 tokens"):
        DAFF(8, 16)(torch.rand(1, 6, 8))
