"""CCT, CVT and ViT-Lite against the authors' implementation."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from zoo_golden import (
    DIGITS,
    MODELS,
    Named,
    assert_gradients,
    assert_summary,
    images,
    load,
    loss_gradients,
    measured,
    own_tensors,
    tensors,
)

from smallfry.models.cct import CCT, checkpoint_filter_fn, resize_positions

NAMES = [name for name in MODELS if name.startswith(("cct_", "cvt_", "vit_"))]
LARGE = "cct_14_7x2_224"


def ours(name: str) -> str:
    name = name.replace("vit_", "vit_lite_", 1) if name.startswith("vit_") else name
    return name.removesuffix("_nopos")


def settings(name: str) -> dict:
    return {"positions": "none"} if name.endswith("_nopos") else {}


def classes(name: str) -> int:
    shape = MODELS[name].get("output", {"shape": [1, 1000]})["shape"]
    return int(shape[1])


def theirs(name: str) -> str:
    """The authors' name of one of our tensors."""
    for new, old in {
        "tokenizer": "tokenizer.conv_layers",
        "pos_embed": "classifier.positional_emb",
        "class_token": "classifier.class_emb",
        "attention_pool": "classifier.attention_pool",
        "head": "classifier.fc",
        "norm": "classifier.norm",
        "blocks": "classifier.blocks",
    }.items():
        if name.startswith(new):
            name = name.replace(new, old, 1)
    if "blocks" in name:
        name = name.replace(".norm1", ".pre_norm").replace(".norm2", ".norm1")
        name = name.replace(".attn", ".self_attn").replace(".fc", ".linear")
    return name


def named(model: torch.nn.Module) -> list[Named]:
    return [(theirs(name), shape) for name, shape in own_tensors(model)]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_accumulates_are_exact(name: str) -> None:
    entry = MODELS[name]
    shape = entry.get("input_shape", [1, 3, 384, 384])[1:]
    found = measured(ours(name), shape, num_classes=classes(name), **settings(name))
    frozen = entry["n_params"] - entry.get("n_trainable", entry["n_params"])
    assert found.parameters == entry["n_params"] - frozen  # sine positions are a buffer here
    assert found.macs == entry["macs_one_image"]


@pytest.mark.parametrize("name", [n for n in NAMES if "tensors" in MODELS[n]])
def test_tensors_are_the_authors(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(ours(name), num_classes=classes(name))
    assert sorted(named(model)) == sorted(tensors(MODELS[name]))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if "_14_" in n or "224" in n else [])
        for n in NAMES
        if "output" in MODELS[n]
    ],
)
def test_outputs(name: str) -> None:
    entry = MODELS[name]
    model = timm.create_model(ours(name), num_classes=classes(name), **settings(name))
    load(model, named(model), checkpoint_filter_fn)
    with torch.no_grad():
        found = model(images(entry["input_shape"]))
    single = name.endswith("_sine")  # the authors' positions are computed in float32
    assert_summary(found, entry["output"], 1e-6 if single else DIGITS)


def test_gradients() -> None:
    entry = MODELS["cct_2_3x2_32"]
    model = load(timm.create_model("cct_2_3x2_32"), tensors(entry), checkpoint_filter_fn)
    loss = loss_gradients(model, images(entry["input_shape"]), entry)
    assert loss == pytest.approx(entry["loss"]["cross_entropy"], rel=1e-9)
    renamed = {theirs(name): name for name, _ in own_tensors(model)}
    assert_gradients(model, entry["loss"]["grad_l2"], renamed.__getitem__)


@pytest.mark.parametrize("name", ["cct_7_3x1_32", "cvt_7_4_32"])
def test_sine_positions(name: str) -> None:
    wanted = MODELS[f"{name}_sine"]["positions"]
    model = timm.create_model(f"{name}_sine")
    table = model.pos_embed[0]
    torch.testing.assert_close(
        table[:3, :6], torch.tensor(wanted["rows_0_1_2_first6"]), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        table[5, -4:], torch.tensor(wanted["row_5_last4"]), rtol=0, atol=1e-6
    )
    assert "pos_embed" not in dict(model.named_parameters())
    assert "pos_embed" not in model.state_dict()


@pytest.mark.parametrize(
    ("name", "hundred"), [("cct_2_3x2_32", 283_723), ("vit_lite_2_4_32", 214_666)]
)
def test_classes_add_a_row_each(name: str, hundred: int) -> None:
    assert measured(name, (3, 32, 32), num_classes=100).parameters == hundred + 90 * 129


def test_positions_differ() -> None:
    torch.manual_seed(0)
    learned, sine, none = (
        CCT(img_size=16, embed_dim=16, depth=1, num_heads=2, positions=p).eval()
        for p in ("learned", "sine", "none")
    )
    for model in (sine, none):
        model.load_state_dict(learned.state_dict() | model.state_dict(), strict=False)
        own = {k: v for k, v in learned.state_dict().items() if k != "pos_embed"}
        model.load_state_dict(own)
    some = torch.rand(2, 3, 16, 16)
    found = [model(some) for model in (learned, sine, none)]
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])
    assert not torch.allclose(found[0], found[2])


def test_frozen_positions_of_a_checkpoint_are_ignored() -> None:
    state = {
        "classifier.positional_emb": torch.rand(1, 64, 8),
        "classifier.fc.weight": torch.ones(1),
    }
    for positions in ("sine", "none"):
        model = CCT(img_size=32, embed_dim=8, num_heads=2, depth=1, positions=positions)
        assert checkpoint_filter_fn(state, model).keys() == {"head.weight"}


@pytest.mark.parametrize("name", ["cct_2_3x2_32", "cvt_2_4_32", "vit_lite_2_4_32"])
def test_released_weights_load_at_another_image_size(name: str, tmp_path) -> None:
    old = timm.create_model(name).eval()
    for p in old.parameters():
        torch.nn.init.normal_(p, std=0.1)
    theirs_names = {theirs(k): v.contiguous() for k, v in old.state_dict().items()}
    save_file(theirs_names, tmp_path / "theirs.safetensors")
    overlay = {"file": str(tmp_path / "theirs.safetensors")}
    same = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    some = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(same(some), old(some))
    larger = timm.create_model(name, True, img_size=40, pretrained_cfg_overlay=overlay).eval()
    apart = int("lite" in name)
    grid = old.pos_embed[:, apart:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, (10, 10), mode="bilinear", align_corners=False)
    torch.testing.assert_close(larger.pos_embed[:, apart:], wanted.flatten(2).transpose(1, 2))
    assert torch.equal(larger.pos_embed[:, :apart], old.pos_embed[:, :apart])
    assert larger(torch.rand(2, 3, 40, 40)).shape == (2, 10)


def test_positions_keep_a_linear_slope() -> None:
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    old = torch.stack([rows, columns], dim=-1).view(1, 64, 2)
    found = resize_positions(old, (16, 8)).view(16, 8, 2)
    torch.testing.assert_close(found[2:-2, 4, 0].diff(), torch.full((11,), 0.5))
    torch.testing.assert_close(found[5, :, 1], torch.arange(8.0))


def test_patches_take_any_number_of_channels_and_sides() -> None:
    model = timm.create_model("vit_lite_2_4_32", in_chans=1, img_size=(24, 16), num_classes=3)
    assert model(torch.rand(2, 1, 24, 16)).shape == (2, 3)
    assert model.forward_features(torch.rand(2, 1, 24, 16)).shape == (2, 1 + 6 * 4, 128)
    assert model.no_weight_decay() == {"pos_embed", "class_token"}


def test_layer_groups_cover_every_parameter() -> None:
    model = timm.create_model("vit_lite_2_4_32")
    ids = timm.optim.param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    assert sum(len(group["params"]) for group in ids) == len(list(model.parameters()))


def test_a_small_one_learns() -> None:
    torch.manual_seed(0)
    model = timm.create_model("cvt_2_4_32", img_size=16, num_classes=2)
    inputs = torch.rand(32, 3, 16, 16)
    inputs[:16, :, :8] += 1
    labels = torch.arange(32) // 16
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
