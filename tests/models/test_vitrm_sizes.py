"""ViTRM for images of any height and width, and timm's interface for other sizes."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.testing import assert_close

from smallfry.errors import UsageError
from smallfry.models.grid import ConvSwiGLU
from smallfry.models.vitrm import ViTRM, checkpoint_filter_fn
from smallfry.models.vitrm_plus import ViTRMPlus
from smallfry.transforms import ModelSpec, build

SMALL = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "num_classes": 3}
ALL = {
    **{"depthwise": True, "positions": "rotary", "injection": "add", "pool": "z"},
    **{"tokenizer": "conv"},
}


def small(**changes):
    torch.manual_seed(0)
    return ViTRM(**{"img_size": (8, 12), "patch_size": 4, "in_chans": 1, **SMALL, **changes}).eval()


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (4, 20), [8, 12]])
@pytest.mark.parametrize("kind", [ViTRM, ViTRMPlus])
def test_images_of_any_height_and_width_that_the_patches_divide(kind, size):
    model = kind(img_size=size, patch_size=4, in_chans=3, **SMALL).eval()
    rows, columns = size[0] // 4, size[1] // 4
    assert model.grid_size == (rows, columns)
    assert model.input_shape == (3, *size)
    assert model.pos_embed.shape[1] == model.z_init.shape[1] == rows * columns
    assert model(torch.rand(2, 3, *size)).shape == (2, 3)
    with pytest.raises(ValueError, match="expected images of shape"):
        model(torch.rand(2, 3, 16, 16))


def test_a_square_given_twice_is_a_square():
    one, two = small(img_size=8), small(img_size=(8, 8))
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(one(images), two(images))


@pytest.mark.parametrize("settings", [{}, ALL, {"depthwise": True}, {"positions": "both"}], ids=str)
def test_tokens_lie_as_the_image_does(settings):
    """Transposing images and weights of a model transposes what it sees, and changes no answer."""
    torch.manual_seed(0)
    form = {"patch_size": 4, "in_chans": 1, **SMALL, **settings}
    wide = ViTRMPlus(img_size=(8, 16), **form).eval()
    high = ViTRMPlus(img_size=(16, 8), **form).eval()
    weights = {}
    for name, weight in wide.state_dict().items():
        if weight.ndim == 4:
            weight = weight.transpose(2, 3)
        elif name in ("pos_embed", "z_init"):
            weight = weight.view(1, 2, 4, -1).transpose(1, 2).flatten(1, 2)
        weights[name] = weight
    high.load_state_dict(weights)
    images = torch.rand(2, 1, 8, 16)
    if settings.get("positions") in ("rotary", "both"):  # rows and columns turn different features
        assert high(images.transpose(2, 3)).shape == (2, 3)
        turn = wide.rotary.get_buffer("turn_8").view(2, 2, 4, -1)
        quarter = turn.shape[-1] // 2
        assert (turn[:, :, :1, :quarter] == turn[..., :quarter]).all()  # by row
        assert (turn[:, :1, :, quarter:] == turn[..., quarter:]).all()  # by column
        assert not torch.equal(turn[:, 0], turn[:, 1])
    else:
        assert_close(high(images.transpose(2, 3)), wide(images))


def test_another_size_resamples_positions_as_timm_does():
    torch.manual_seed(0)
    ours = small(img_size=(8, 12))
    kept = {"embed_dim": 16, "num_heads": 2, "depth": 1, "class_token": False, "global_pool": "avg"}
    theirs = VisionTransformer(img_size=(8, 12), patch_size=4, in_chans=1, **kept)
    with torch.no_grad():
        theirs.pos_embed.copy_(ours.pos_embed)
    latents = ours.z_init.detach().clone()
    for model in (ours, theirs):
        model.set_input_size(img_size=(16, 20))
    assert_close(ours.pos_embed, theirs.pos_embed)
    assert ours.z_init.shape == (1, 20, 16)
    assert not torch.equal(ours.z_init[:, :6], latents)
    assert ours(torch.rand(1, 1, 16, 20)).shape == (1, 3)
    assert ours.pos_embed.requires_grad


def test_the_same_size_changes_nothing():
    model, images = small(), torch.rand(1, 1, 8, 12)
    before = model(images)
    model.set_input_size((8, 12))
    model.set_input_size()
    assert torch.equal(model(images), before)


def test_latents_of_a_given_number_stay():
    model = small(latents=4)
    model.set_input_size(16)
    assert model.z_init.shape[1] == 4
    assert model(torch.rand(1, 1, 16, 16)).shape == (1, 3)


@pytest.mark.parametrize("settings", [{}, ALL, {"depthwise": True}], ids=["plain", "all", "convs"])
def test_a_resized_model_is_the_model_built_with_that_size(settings):
    torch.manual_seed(0)
    name = "vitrm_plus_micro_8"
    form = {"patch_size": 4, "num_classes": 3, "depth": 1, **settings}
    model = timm.create_model(name, img_size=8, **form).eval()
    model.set_input_size((8, 12))
    built = build(ModelSpec(name, {**form, "img_size": [8, 12]}), model.state_dict())
    images = torch.rand(2, 1, 8, 12)
    assert torch.equal(model(images), built(images))
    convolutions = [m for m in model.modules() if isinstance(m, ConvSwiGLU)]
    assert all(m.grids == {6: (2, 3)} for m in convolutions)


def test_wrong_sizes_and_patches_are_refused():
    model = small()
    with pytest.raises(ValueError, match="patch_size 4 does not divide img_size 8×10"):
        model.set_input_size((8, 10))
    with pytest.raises(ValueError, match="patch_size stays 4"):
        model.set_input_size(16, patch_size=8)
    with pytest.raises(UsageError, match="img_size must be at least 1"):
        model.set_input_size((8, 0))
    assert model.input_shape == (1, 8, 12)


def test_a_dynamic_model_takes_any_size_with_resampled_positions():
    dynamic, fixed = small(dynamic_img_size=True), small(latents=6)
    fixed.load_state_dict(dynamic.state_dict())
    images = torch.rand(2, 1, 8, 12)
    assert torch.equal(dynamic(images), fixed(images))
    fixed.set_input_size((16, 8))
    larger = torch.rand(2, 1, 16, 8)
    assert_close(dynamic(larger), fixed(larger))
    with pytest.raises(ValueError, match="does not divide img_size 10"):
        dynamic(torch.rand(1, 1, 10, 10))
    with pytest.raises(ValueError, match="expected images of shape"):
        dynamic(torch.rand(1, 3, 16, 8))


@pytest.mark.parametrize(
    "switch", [{"injection": "add"}, {"depthwise": True}, {"positions": "both"}]
)
def test_parts_on_a_grid_are_not_dynamic(switch):
    with pytest.raises(UsageError, match="take set_input_size"):
        ViTRMPlus(dynamic_img_size=True, **SMALL, **switch)


def test_intermediates_are_the_memory_after_each_latent_step():
    model = small(recursion_steps=2, latent_steps=2)
    images = torch.rand(2, 1, 8, 12)
    features, found = model.forward_intermediates(images, output_fmt="NLC")
    x, state, expected = model.embed(images), model.initial_state(2), []
    for _ in range(2):
        for _ in range(2):
            state = model.think(x, state)
            expected.append(state.z)
        state = model.answer(state)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    assert_close(features, model.forward_features(images))
    maps = model.forward_intermediates(images, [1, 3], intermediates_only=True, stop_early=True)
    assert [m.shape for m in maps] == [(2, 16, 2, 3)] * 2
    assert_close(maps[1].flatten(2).transpose(1, 2), found[3])
    first = model.forward_intermediates(images, [0], intermediates_only=True, stop_early=True)
    assert_close(first[0].flatten(2).transpose(1, 2), found[0])


def test_latents_on_no_grid_are_rows_only():
    model, images = small(latents=5), torch.rand(1, 1, 8, 12)
    assert model.forward_intermediates(images, output_fmt="NLC")[1][0].shape == (1, 5, 16)
    with pytest.raises(ValueError, match="5 latents lie on no grid"):
        model.forward_intermediates(images)
    with pytest.raises(ValueError, match="NCHW or NLC, not 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_features_only_is_timms():
    form = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1}
    images = torch.rand(2, 1, 8, 12)
    model = timm.create_model("vitrm_micro_patch4_8", img_size=(8, 12), features_only=True, **form)
    assert [f.shape for f in model(images)] == [(2, 16, 2, 3)] * 3
    assert model.feature_info.channels() == [16] * 3
    assert model.feature_info.reduction() == [4] * 3
    last = timm.create_model(
        "vitrm_micro_patch4_8", img_size=(8, 12), features_only=True, out_indices=[2], **form
    )
    assert [f.shape for f in last(images)] == [(2, 16, 2, 3)]


def test_torchscript_is_refused_with_what_to_take_instead():
    with pytest.raises(UsageError, match=r"take torch.jit.trace, torch.export or smallfry export"):
        torch.jit.script(small())
    model, images = small(), torch.rand(2, 1, 8, 12)
    assert_close(torch.jit.trace(model, images)(images), model(images))


def test_a_model_is_a_leaf_of_torch_fx():
    from timm.models import create_feature_extractor

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = small(), nn.Linear(3, 2)

        def forward(self, images):
            return self.last(self.body(2 * images))

    model, images = Scaled().eval(), torch.rand(2, 1, 8, 12)
    traced = create_feature_extractor(model, {"body": "logits"})
    assert_close(traced(images)["logits"], model.body(2 * images))


def test_weights_of_a_square_are_resampled_and_others_are_kept():
    square, wide = small(img_size=8), small(img_size=(8, 16))
    found = checkpoint_filter_fn(square.state_dict(), wide)
    assert found["pos_embed"].shape == found["z_init"].shape == (1, 8, 16)
    wide.load_state_dict(found)
    same = checkpoint_filter_fn(square.state_dict(), small(img_size=8))
    assert all(torch.equal(same[name], weight) for name, weight in square.state_dict().items())
