"""Compacter in sessions and runs: frozen weights, files, merging, calls and delegation."""

import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import smallfry
from smallfry import compress, cost
from smallfry.compress.adapt.files import FILE, attach_adapters, trained_names
from smallfry.errors import RunError, UsageError
from smallfry.layers.phm import Adapted
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.adapters import Adapters, merge_adapters

SIZES = {"num_classes": 4, "embed_dim": 16, "num_heads": 2, "drop_rate": 0.0}
SPEC = ModelSpec("vitrm_micro_patch4_8", SIZES)
PROJ = "blocks.0.attn.proj"


def data():
    torch.manual_seed(1)
    labels = torch.arange(48) % 4
    images = torch.rand(48, 1, 8, 8) * 0.5
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.5
    return images, labels


def begin(settings, spec=SPEC, images=None):
    torch.manual_seed(0)
    model = build(spec).train()
    images = data()[0] if images is None else images
    session = compress.Session(model, [settings], images[:2], 40, spec=spec)
    return model, session


def steps(model, session, count):
    images, labels = data()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    session.attach(optimizer)
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("per_call", [False, True])
def test_adapters_norms_and_heads_are_trained_and_nothing_else(per_call):
    model, session = begin(compress.Compacter(per_call=per_call))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = steps(model, session, 1)
    assert steps(model, session, 6) < first
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    unused = {"halt_head.weight", "halt_head.bias"}  # no loss of halting here
    assert moved == trained_names(model) - unused
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained_names(model)
    assert "adapter_rules.rules" in moved
    assert "head.weight" in moved


@pytest.mark.parametrize("per_call", [False, True])
@pytest.mark.parametrize("steps_of_recursion", [1, 2])
def test_a_finished_model_is_rebuilt_from_its_spec_to_the_bit(per_call, steps_of_recursion):
    spec = ModelSpec(SPEC.architecture, {**SIZES, "recursion_steps": steps_of_recursion})
    model, session = begin(compress.Compacter(per_call=per_call), spec)
    steps(model, session, 3)
    found, images = session.finish(), data()[0]
    rebuilt = build(ModelSpec.from_dict(found.to_dict()), model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(images), rebuilt(images))
        last = model.recurse(images)[-1].logits
        assert torch.equal(last, rebuilt(images))


def test_each_call_of_a_recursion_step_has_an_adapter_in_training_and_inference():
    spec = ModelSpec(SPEC.architecture, {**SIZES, "recursion_steps": 2})
    model, session = begin(compress.Compacter(per_call=True), spec)
    steps(model, session, 2)
    layer = model.get_submodule(PROJ)
    assert layer.calls == model.latent_steps + 1
    images, state, logits = data()[0], None, []
    with torch.no_grad():
        for _ in range(2):  # as deep supervision does
            step = model.eval().advance(images, state)
            state = step.state
            logits.append(step.logits)
        whole = [step.logits for step in model.recurse(images)]
    torch.testing.assert_close(logits, whole)


@pytest.mark.slow
def test_adapters_of_calls_are_traced_call_by_call():
    model, session = begin(compress.Compacter(per_call=True))
    steps(model, session, 2)
    session.finish()
    images = data()[0][:3]
    program = torch.export.export(model.eval(), (images,)).module()
    torch.testing.assert_close(program(images), model(images))


def test_parameters_follow_the_formula_and_a_shared_block_is_adapted_once():
    model, _ = begin(compress.Compacter(n=4, reduction=4))
    layers = [m for m in model.modules() if isinstance(m, Adapted)]
    assert len(layers) == 2 * len(model.blocks)
    each = 2 * (16 + 4) + (16 + 4)
    base = sum(p.numel() for p in build(SPEC).parameters())
    assert cost(model, torch.zeros(1, 1, 8, 8)).parameters == base + 64 + len(layers) * each


def test_a_convolutional_network_has_adapters_after_all_but_its_first_convolution():
    model = timm.create_model("loopnet_70k", num_classes=3)
    stem = model.stem.weight.requires_grad
    session = compress.Session(model, [compress.Compacter()], torch.rand(2, 3, 32, 32), 1)
    adapted = [name for name, m in model.named_modules() if isinstance(m, Adapted)]
    assert len(adapted) == 6
    assert "stem" not in adapted
    assert model.stem.weight.requires_grad is stem is False
    assert "stages.0.enter.2.running_mean" in trained_names(model)
    session.finish()


@pytest.mark.parametrize("name", ["cct_2_3x2_32", "vit_tiny_patch16_224"])
def test_attention_and_mlps_of_other_transformers_are_found(name):
    model = timm.create_model(name, num_classes=3)
    compress.Session(model, [compress.Compacter()], torch.rand(0), 1)
    adapted = [n for n, m in model.named_modules() if isinstance(m, Adapted)]
    assert len(adapted) == 2 * len(model.blocks)


def test_patterns_choose_the_layers():
    model, _ = begin(compress.Compacter(exclude=("*.proj",)))  # Compacter++
    assert all(n.endswith("fc2") for n, m in model.named_modules() if isinstance(m, Adapted))
    model, _ = begin(compress.Compacter(include=("*.fc1",)))
    assert isinstance(model.blocks[0].mlp.fc1, Adapted)


def test_linear_adapters_merge_to_the_original_architecture():
    model, session = begin(compress.Compacter(activation="none"))
    steps(model, session, 5)
    session.finish()
    merged, images = merge_adapters(model.eval()), data()[0]
    torch.testing.assert_close(merged(images), model(images), atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == build(SPEC).state_dict().keys()
    assert isinstance(model.get_submodule(PROJ), Adapted)  # the model is left as it is
    kept, _ = begin(compress.Compacter())
    assert merge_adapters(kept) is kept


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base model, and one fine-tuned from it on half of the classes."""
    folder = tmp_path_factory.mktemp("adapters")
    common = {"epochs": 1, "references": False, "progress": "quiet", "threads": 1}
    options = {"embed_dim": 16, "num_heads": 2, "latent_steps": 1, "recursion_steps": 2}
    model = {"name": "vitrm_micro_patch4_8", "options": options}
    smallfry.train(data={"limit": 64}, model=model, run=folder / "base", **common)
    for name, method in {"tuned": {}, "linear": {"activation": "none"}}.items():
        smallfry.train(
            data={"limit": 48},
            model={"start": str(folder / "base")},
            methods=[{"compacter": method}],
            run=folder / name,
            **common,
        )
    return folder


def test_a_run_writes_its_adapters_alone_and_they_give_the_model_back(runs):
    base, tuned = smallfry.load(runs / "base"), smallfry.load(runs / "tuned")
    size = (runs / "tuned" / FILE).stat().st_size
    assert size < 0.7 * (runs / "tuned" / "best" / "model.safetensors").stat().st_size
    attached = attach_adapters(base, runs / "tuned" / FILE)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(attached.model(images), tuned.model(images))
    assert not torch.equal(base.model(images), tuned.model(images))
    assert attached.classes == tuned.classes
    assert attached.spec == tuned.spec
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached.export(runs / "graphs")  # with the images of its own training
        smallfry.load(attached.save(runs / "again")).evaluate()
    alone = Path(shutil.copy(runs / "tuned" / FILE, runs))
    assert attach_adapters(base, alone).origin is None


def test_adapters_fit_no_other_base_and_no_other_file(runs):
    base = smallfry.load(runs / "base")
    with torch.no_grad():
        base.model.patch_embed.weight.add_(1e-3)
    with pytest.raises(RunError, match="another model"):
        attach_adapters(base, runs / "tuned" / FILE)
    with pytest.raises(RunError, match="no file of adapters"):
        attach_adapters(base, runs / "tuned" / "best" / "model.safetensors")
    with pytest.raises(RunError, match="no file of adapters"):
        attach_adapters(base, runs / "missing")


def test_quantised_adapters_are_not_saved_alone():
    settings, later = compress.Compacter(), ModelSpec("resnet18").to_dict()
    assert settings.files(nn.Linear(1, 1), {"model": later}) == {}


@pytest.mark.slow
def test_an_export_has_linear_adapters_merged(runs):
    onnx = pytest.importorskip("onnx")
    folder = smallfry.export(runs / "linear", runs / "export", form="whole")
    names = {each.name for each in onnx.load(folder / "model.onnx").graph.initializer}
    assert any("fc2" in name for name in names)
    assert not any("adapter" in name for name in names)


def test_adapters_come_before_bits_and_once():
    model, session = begin(compress.Compacter())
    spec = session.finish()
    with pytest.raises(UsageError, match="adapters already"):
        compress.Session(model, [compress.Compacter()], data()[0][:2], 1)
    small, both = compress.apply_to_model(model, [compress.Quantize(weights=8)], spec=spec)
    assert [each.kind for each in both.transforms] == ["adapters", "bits"]
    images = data()[0]
    torch.testing.assert_close(small(images), model.eval()(images), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "compacter.n must be 1 to 64"),
        ({"reduction": 1.5}, "compacter.reduction must be"),
        ({"activation": "relu"}, "activation must be one of gelu, none"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        compress.Compacter(**settings)


def test_layers_that_fit_nothing_are_refused():
    with pytest.raises(UsageError, match="no multiple of n = 5"):
        begin(compress.Compacter(n=5))
    with pytest.raises(UsageError, match="left to adapt"):
        compress.Session(
            nn.Sequential(nn.Linear(4, 4)), [compress.Compacter()], torch.rand(1, 4), 1
        )
    with pytest.raises(UsageError, match="needs example inputs"):
        begin(compress.Compacter(per_call=True), images=torch.empty(0))
    model, settings = build(SPEC), compress.Compacter(per_call=True, include=("unused",))
    model.unused = nn.Linear(4, 4)
    with pytest.raises(UsageError, match="unused' has 0 calls"):
        compress.Session(model, [settings], data()[0][:2], 1)


@pytest.mark.parametrize(
    "given",
    [
        {"layers": {}},
        {"layers": {"a": {"inner": 4}}},
        {"layers": {"a": {"inner": 0, "calls": 1}}},
        {"layers": {"a": {"inner": 4, "calls": 1}}, "n": 65},
        {"layers": {"a": {"inner": 4, "calls": 1}}, "activation": "tanh"},
        {"layers": {"a": {"inner": 4, "calls": 1}}, "first": 3},
    ],
)
def test_wrong_descriptions_in_files_are_refused(given):
    with pytest.raises(ValueError, match=r"layers|inner|n is|activation|first"):
        Adapters(**given)


def test_models_of_hugging_face_are_left_to_the_library_adapters(monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=20,
    )  # fmt: skip
    model = transformers.BertModel(config)
    monkeypatch.setitem(sys.modules, "adapters", None)
    with pytest.raises(UsageError, match="pip install adapters"):
        compress.Session(model, [compress.Compacter()], torch.zeros(1, 3).long(), 1)
    calls = []
    library = ModuleType("adapters")
    library.CompacterConfig = lambda **sizes: SimpleNamespace(**sizes)

    def init(model):
        model.add_adapter = lambda name, config: calls.append((name, vars(config)))
        model.train_adapter = calls.append

    library.init = init
    monkeypatch.setitem(sys.modules, "adapters", library)
    session = compress.Session(model, [compress.Compacter(n=2)], torch.zeros(1, 3).long(), 1)
    assert calls == [
        ("compacter", {"phm_dim": 2, "reduction_factor": 16}),
        "compacter",
    ]
    assert session.finish().transforms == ()
    with pytest.raises(UsageError, match="take n and reduction alone"):
        compress.Session(model, [compress.Compacter(per_call=True)], torch.zeros(1, 3).long(), 1)


def test_norms_of_timm_are_trained_too():
    form = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", norm_layer="rmsnorm", **form)
    compress.Session(model, [compress.Compacter()], torch.randn(2, 3, 32, 32), steps=1)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert {"blocks.0.norm1.weight", "blocks.1.norm2.weight", "norm.weight"} <= trained
