import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from smallfry.models import ViTRM
from smallfry.models.vitrm import checkpoint_filter_fn

SMALL = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 8, "latent_steps": 2}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("classes", "expected"), [(10, 3_624_971), (100, 3_659_621)])
def test_the_papers_model_has_the_papers_number_of_parameters(classes, expected):
    model = timm.create_model("vitrm_small_patch4_32", num_classes=classes)
    assert parameters(model) == expected


def test_the_smaller_names_are_smaller():
    assert parameters(timm.create_model("vitrm_tiny_patch4_32", num_classes=10)) == 927_755
    assert parameters(timm.create_model("vitrm_micro_patch4_8", num_classes=10)) == 109_131


@pytest.mark.parametrize("name", timm.list_models("vitrm_*"))
def test_every_named_model_takes_its_own_default_input(name):
    model = timm.create_model(name, num_classes=7).eval()
    shape = model.pretrained_cfg["input_size"]
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


@settings(max_examples=15, deadline=None)
@given(
    patch=st.sampled_from([1, 2, 3]),
    grid=st.integers(1, 4),
    channels=st.integers(1, 5),
    latents=st.one_of(st.none(), st.integers(1, 6)),
    recursion=st.integers(1, 3),
)
def test_any_square_image_patch_channels_and_latents(patch, grid, channels, latents, recursion):
    model = ViTRM(
        patch * grid, patch, channels, 3, latents=latents, recursion_steps=recursion, **SMALL
    ).eval()
    images = torch.randn(2, channels, patch * grid, patch * grid)
    trace = model.recurse(images)
    assert len(trace) == recursion
    assert trace[0].state.z.shape == (2, latents or grid**2, 16)
    assert trace[-1].logits.shape == (2, 3)
    assert trace[-1].halt_logits.shape == (2,)
    assert_close(model(images), trace[-1].logits)


def test_forward_is_features_then_head():
    model = ViTRM(8, 4, **SMALL).eval()
    images = torch.randn(3, 3, 8, 8)
    features = model.forward_features(images)
    assert features.shape == (3, 1 + 4, 16)
    assert_close(model.forward_head(features), model(images))
    assert_close(model.forward_head(features, pre_logits=True), features[:, 0])


def test_an_image_does_not_depend_on_the_batch_around_it():
    model = ViTRM(8, 4, recursion_steps=2, **SMALL).eval().double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_close(model(images)[2:3], model(images[2:3]))


def test_advance_from_a_state_goes_on_where_recurse_would():
    model = ViTRM(8, 4, **SMALL).eval()
    images = torch.randn(2, 3, 8, 8)
    first = model.advance(images)
    assert_close(model.advance(images, first.state).logits, model.recurse(images, 2)[1].logits)


def test_gradient_checkpointing_changes_neither_outputs_nor_gradients():
    images = torch.randn(2, 3, 8, 8)
    gradients = []
    for enable in (False, True):
        torch.manual_seed(1)
        model = ViTRM(8, 4, drop_rate=0.2, **SMALL).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)  # the same dropout
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert_close(gradients[0], gradients[1])


def test_drop_rate_reaches_both_branches_and_the_attention_weights():
    model = timm.create_model("vitrm_micro_patch4_8", drop_rate=0.3)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    assert {layer.attn.drop for layer in model.blocks} == {0.3}
    assert {layer.drop.p for layer in model.blocks} == {0.3}
    images = torch.randn(2, 1, 8, 8)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_reset_classifier_replaces_the_head_alone():
    model = ViTRM(8, 4, **SMALL).double()
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head.")}
    model.reset_classifier(5)
    assert model.get_classifier().weight.shape == (5, 16)
    assert model(torch.randn(1, 3, 8, 8, dtype=torch.float64)).shape == (1, 5)
    assert_close({k: v for k, v in model.state_dict().items() if k in before}, before)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 8, 8, dtype=torch.float64)).shape == (1, 16)


def test_initialisation_is_the_papers():
    model = timm.create_model("vitrm_small_patch4_32")
    patches, dim = 64, 384
    xavier = (2 / (dim * (1 + patches))) ** 0.5
    assert model.pos_embed.std().item() == pytest.approx(xavier, rel=0.05)
    assert model.z_init.std().item() == pytest.approx(xavier, rel=0.05)
    assert model.head.bias.abs().max() == model.halt_head.bias.abs().max() == 0
    for layer in model.blocks:
        assert layer.attn.qkv.bias.abs().max() == layer.attn.proj.bias.abs().max() == 0
        bound = (6 / (4 * dim)) ** 0.5
        assert layer.attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)


def test_our_own_state_dict_passes_the_filter_unchanged():
    weights = ViTRM(8, 4, **SMALL).state_dict()
    assert set(checkpoint_filter_fn(weights, None)) == set(weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 30}, "patch_size 4 does not divide img_size 30"),
        ({"img_size": (32, 18)}, "patch_size 4 does not divide img_size 32×18"),
        ({"num_heads": 7}, "num_heads 7 does not divide embed_dim 384"),
        ({"latent_steps": 0}, "latent_steps must be at least 1"),
        ({"latents": 0}, "latents must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ViTRM(**arguments)


def test_images_of_another_shape_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(batch, 3, 8, 8\), got \(1, 3, 16, 16\)"):
        ViTRM(8, 4, **SMALL)(torch.zeros(1, 3, 16, 16))


def test_a_batch_of_no_images_gives_no_answers():
    model = ViTRM(8, 4, 1, 3, embed_dim=16, num_heads=2, mlp_hidden_dim=8)
    assert model(torch.zeros(0, 1, 8, 8)).shape == (0, 3)
