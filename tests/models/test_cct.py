import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import smallfry  # noqa: F401  # registers the models
from smallfry.errors import UsageError
from smallfry.models.cct import CCT, checkpoint_filter_fn

SIZES = {
    "cct_2_3x2_32": 283_723,
    "cct_4_3x2_32": 482_123,
    "cct_6_3x1_32": 3_233_803,
    "cct_7_3x1_32": 3_760_139,
    "cct_7_3x2_32": 3_853_259,
}


@pytest.mark.parametrize(("name", "parameters"), SIZES.items())
def test_models_have_the_papers_numbers_of_parameters(name: str, parameters: int) -> None:
    model = timm.create_model(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def small(**settings: object) -> CCT:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
    return CCT(**(sizes | settings)).double().eval()  # type: ignore[arg-type]


def by_hand(model: CCT, images: Tensor) -> Tensor:
    """The same network, written from the paper with plain tensor operations."""
    w = {name: p.detach() for name, p in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = images
    for i in range(len(model.tokenizer)):
        x = F.max_pool2d(F.conv2d(x, w[f"tokenizer.{i}.0.weight"], padding=1).relu(), 3, 2, 1)
    s = x.flatten(2).transpose(1, 2) + w["pos_embed"]
    for i, block in enumerate(model.blocks):
        heads, dim = block.attn.num_heads, s.shape[2]
        q, k, v = (norm(s, f"blocks.{i}.norm1") @ w[f"blocks.{i}.attn.qkv.weight"].T).chunk(3, 2)
        parts = []
        for h in range(heads):
            own = slice(h * dim // heads, (h + 1) * dim // heads)
            scores = q[:, :, own] @ k[:, :, own].transpose(1, 2) * (dim // heads) ** -0.5
            parts.append(scores.softmax(-1) @ v[:, :, own])
        attended = torch.cat(parts, 2) @ w[f"blocks.{i}.attn.proj.weight"].T
        s = norm(s + attended + w[f"blocks.{i}.attn.proj.bias"], f"blocks.{i}.norm2")
        hidden = F.gelu(s @ w[f"blocks.{i}.fc1.weight"].T + w[f"blocks.{i}.fc1.bias"])
        s = s + hidden @ w[f"blocks.{i}.fc2.weight"].T + w[f"blocks.{i}.fc2.bias"]
    s = norm(s, "norm")
    weights = (s @ w["attention_pool.weight"].T + w["attention_pool.bias"]).softmax(1)
    return (weights * s).sum(1) @ w["head.weight"].T + w["head.bias"]


@pytest.mark.parametrize("convolutions", [1, 2])
def test_model_is_the_papers_network(convolutions: int) -> None:
    model = small(convolutions=convolutions)
    for p in model.parameters():  # fresh biases are zero and hide mistakes
        torch.nn.init.normal_(p, std=0.3)
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(images), by_hand(model, images), rtol=1e-9, atol=1e-9)


def test_weights_of_the_authors_code_load() -> None:
    model = small()
    theirs = {}
    for name, value in model.state_dict().items():
        if name.startswith("tokenizer"):
            theirs[name.replace("tokenizer", "tokenizer.conv_layers")] = value
            continue
        for ours, old in {
            "pos_embed": "positional_emb",
            "head": "fc",
            ".norm2": ".norm1",
            ".norm1": ".pre_norm",
            ".attn.": ".self_attn.",
            ".fc1": ".linear1",
            ".fc2": ".linear2",
        }.items():
            if ours in name:
                name = name.replace(ours, old)
                break
        theirs[f"classifier.{name}"] = value
    found = checkpoint_filter_fn(theirs, model)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_stochastic_depth_grows_with_depth_and_is_off_in_evaluation() -> None:
    model = timm.create_model("cct_7_3x1_32", num_classes=10)
    rates = [block.drop_path.drop_prob for block in model.blocks]
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.1)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), model(images))
    assert not torch.equal(model.train()(images), model(images))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for enable in (False, True):
        model = small(attn_drop_rate=0.0, drop_path_rate=0.0).train()
        model.set_grad_checkpointing(enable)
        model(torch.ones(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
        found.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_timms_contract_holds() -> None:
    model = small()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    features = model.forward_features(images)
    assert features.shape == (2, 16, 12)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, 12)
    model.reset_classifier(0)
    assert model.double()(images).shape == (2, 12)
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"img_size": 2, "convolutions": 2},
        {"convolutions": 0},
        {"num_heads": 5},
        {"positions": "x"},
        {"patch_size": 9},
    ],
)
def test_wrong_sizes_are_named(wrong: dict) -> None:
    with pytest.raises(UsageError):
        small(**wrong)


def test_a_fresh_classifier_is_where_and_what_the_model_is() -> None:
    model = small()  # in float64
    model.reset_classifier(4)
    assert model(torch.rand(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 4)
    with torch.device("meta"):
        elsewhere = timm.create_model("cct_2_3x2_32")
    elsewhere.reset_classifier(4)
    assert elsewhere.head.weight.device.type == "meta"


def test_images_may_be_given_by_height_and_width() -> None:
    model = timm.create_model("cct_2_3x2_32", img_size=(32, 30)).eval()
    assert model.forward_features(torch.rand(1, 3, 32, 30)).shape == (1, 8 * 8, 128)
