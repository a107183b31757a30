import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smallfry.errors import UsageError
from smallfry.models import ViTRM
from smallfry.tasks import create_task
from smallfry.training.config import EMAConfig, OptimizerConfig, ScheduleConfig
from smallfry.training.optimization import (
    NATURAL,
    WeightAverage,
    build_optimizer,
    learning_rate,
    peak_learning_rate,
    with_fisher,
)

MODEL = ViTRM(8, 4, 1, 3, embed_dim=16, num_heads=2, mlp_hidden_dim=8)


def undecayed(optimizer):
    chosen = {id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    return {name for name, p in MODEL.named_parameters() if id(p) in chosen}


def test_biases_norms_positions_and_initial_states_are_not_decayed():
    names = undecayed(build_optimizer(OptimizerConfig(), MODEL))
    expected = {"pos_embed", "y_init", "z_init"}
    expected |= {n for n, _ in MODEL.named_parameters() if n.endswith("bias") or ".norm" in n}
    assert names == expected


def test_the_papers_choice_decays_everything():
    optimizer = build_optimizer(OptimizerConfig(decay="all"), MODEL)
    assert undecayed(optimizer) == set()
    held = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert held == sum(p.numel() for p in MODEL.parameters())


def test_other_optimizers_of_timm_can_be_named():
    assert type(build_optimizer(OptimizerConfig("lamb"), MODEL)).__name__ == "Lamb"
    with pytest.raises(UsageError, match="sgd has no betas"):
        build_optimizer(OptimizerConfig("sgd", betas=(0.9, 0.99)), MODEL)
    with pytest.raises(UsageError, match="did you mean 'adamw"):
        build_optimizer(OptimizerConfig("adamww"), MODEL)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {"momentum": 0.9}),  # the three that timm drops in silence
        ("sgd", {"eps": 1e-3}),
        ("sgd", {"betas": (0.8, 0.9)}),
        ("adamw", {"layer_decay": 0.5}),  # of timm's factory, not of the optimizer
        ("adamw", {"fallback_list": ["head"]}),
        ("lion", {"eps": 1e-3}),
        ("lamb", {"damping": 0.1}),
        ("adamw", {"params": []}),
    ],
)
def test_an_option_that_an_optimizer_does_not_take_is_refused(name, options):
    with pytest.raises(UsageError) as error:
        build_optimizer(OptimizerConfig(name, options=options), MODEL)
    (option,) = options
    refusal = f"optimizer {name} has no setting '{option}': remove it from optimizer.options ("
    assert str(error.value).startswith(refusal)
    taken = str(error.value).partition(" takes ")[2].rstrip(")").split(", ")
    assert option not in taken
    assert len(taken) > 2


@pytest.mark.parametrize("name", ["kfac", "sngd", "two_level", "adam_atan2"])
@pytest.mark.parametrize("option", ["momentun", "supervision_steps"])
def test_an_unknown_option_of_our_own_optimizers_is_refused(name, option):
    with pytest.raises(UsageError, match=rf"(has no setting|can't be built: .*)\W*'{option}'"):
        build_optimizer(OptimizerConfig(name, options={option: 1}), MODEL)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "kfac", "adam_atan2"])
def test_the_rate_and_the_decay_have_settings_of_their_own(name):
    for option in ("lr", "weight_decay"):
        config = OptimizerConfig(name, options={option: 0.1})
        with pytest.raises(UsageError, match=f"has {option}: give it as optimizer.{option}"):
            build_optimizer(config, MODEL)


def test_every_option_that_is_taken_reaches_the_optimizer():
    given = {
        "sgd": {"momentum": 0.7, "nesterov": True},
        "adamw": {"eps": 1e-3, "betas": (0.8, 0.9), "amsgrad": True},
        "lamb": {"eps": 1e-3, "trust_clip": True},
        "adadelta": {"rho": 0.7, "eps": 1e-2},
        "muon": {"momentum": 0.7, "ns_steps": 3},
        "kfac": {"momentum": 0.7, "damping": 0.3},
        "adam_atan2": {"scale": 1.27},
    }
    for name, options in given.items():
        optimizer = build_optimizer(OptimizerConfig(name, options=options), MODEL)
        settings = getattr(optimizer, "settings", None)
        for option, value in options.items():
            got = optimizer.defaults.get(option, getattr(settings, option, None))
            assert got == value, (name, option)


def test_muon_leaves_the_named_parameters_to_adamw():
    model = timm.create_model("resnet10t", num_classes=3)
    config = OptimizerConfig("muon", options={"fallback_list": ["fc.*"]})
    optimizer = build_optimizer(config, model)
    left = {id(p) for g in optimizer.param_groups if g.get("use_fallback") for p in g["params"]}
    assert {n for n, p in model.named_parameters() if id(p) in left} == {"fc.weight", "fc.bias"}


def test_the_default_rate_falls_with_the_width_of_the_model():
    assert peak_learning_rate(OptimizerConfig(), timm.create_model("vitrm_micro_patch4_8")) == 3e-3
    assert peak_learning_rate(OptimizerConfig(), timm.create_model("vitrm_small_patch4_32")) == 5e-4
    assert peak_learning_rate(OptimizerConfig(lr=0.1), MODEL) == 0.1


def test_warm_up_is_linear_and_the_cosine_ends_at_the_minimum():
    config = ScheduleConfig(warmup_epochs=2, min_lr=1e-6)
    rates = [learning_rate(config, 1.0, step, 10, 12) for step in range(120)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[119] == pytest.approx(1e-6)
    halfway = 20 + 50 - 1
    assert rates[halfway] == pytest.approx(0.5, abs=1e-6)


def test_per_epoch_the_first_runs_at_rate_zero_as_in_the_paper():
    config = ScheduleConfig(warmup_epochs=30, min_lr=1e-6, per="epoch")
    rates = [learning_rate(config, 3e-4, step, 5, 1000) for step in range(5000)]
    assert set(rates[:5]) == {0.0}
    assert rates[5] == rates[9] == pytest.approx(1e-5)
    assert rates[30 * 5] == pytest.approx(3e-4)
    wanted = 1e-6 + (3e-4 - 1e-6) * (1 + math.cos(math.pi * 969 / 970)) / 2
    assert rates[-1] == pytest.approx(wanted)


@given(
    peak=st.floats(1e-6, 1.0),
    warmup=st.floats(0, 20),
    steps=st.integers(1, 20),
    epochs=st.integers(1, 20),
    per=st.sampled_from(["step", "epoch"]),
)
def test_the_rate_is_never_negative_nor_above_its_peak(peak, warmup, steps, epochs, per):
    config = ScheduleConfig(warmup, min_lr=1e-5, per=per)
    for step in range(steps * epochs):
        assert 0 <= learning_rate(config, peak, step, steps, epochs) <= peak * (1 + 1e-12)


def test_the_average_warms_up_and_can_be_fixed():
    assert WeightAverage(MODEL, EMAConfig(0.999, warmup=False)).get_decay(0) == 0.999
    warm = WeightAverage(MODEL, EMAConfig(0.999, warmup=True))
    assert [warm.get_decay(t) for t in (0, 1, 90, 10**6)] == [0.1, 2 / 11, 0.91, 0.999]


def test_the_average_is_of_weights_and_buffers():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, EMAConfig(0.9, warmup=False))
    with torch.no_grad():
        model.weight.fill_(11.0)
        model.running_mean.fill_(10.0)
    average.update(model, 0)
    assert average.module.weight.tolist() == pytest.approx([2.0, 2.0])
    assert average.module.running_mean.tolist() == pytest.approx([1.0, 1.0])


def scales(model, **settings):
    """The factor of the learning rate of each parameter."""
    optimizer = build_optimizer(OptimizerConfig(lr=0.1, **settings), model)
    named = {id(p): name for name, p in model.named_parameters()}
    return {
        named[id(p)]: group.get("lr_scale", 1.0) * group.get("fallback_scale", 1.0)
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("name", ["adamw", "sgd", "kfac", "adam_atan2"])
def test_the_classifier_can_have_a_rate_of_its_own(name):
    model = timm.create_model("resnet10t", num_classes=3)
    found = scales(model, name=name, head_rate=5.0)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert {n for n, scale in found.items() if scale == 5.0} == {"fc.weight", "fc.bias"}
    if name != "kfac":  # which gives the AdamW of its other parameters a hundredth of the rate
        assert {*found.values()} == {1.0, 5.0}


@pytest.mark.parametrize("name", ["adamw", "kfac", "adam_atan2"])
def test_rates_fall_from_each_group_of_layers_to_the_one_before(name):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=3)
    found = scales(model, name=name, layer_decay=0.5)
    assert found["patch_embed.proj.weight"] == 0.5**4
    for block in range(3):
        assert found[f"blocks.{block}.attn.qkv.weight"] == 0.5 ** (3 - block)
        assert found[f"blocks.{block}.mlp.fc1.bias"] == 0.5 ** (3 - block)
    assert found["head.weight"] == found["head.bias"] == 1.0
    others = 0.01 if name == "kfac" else 1.0  # factor of the AdamW of other parameters
    assert found["norm.weight"] == pytest.approx(0.5 * others)
    assert found["cls_token"] == pytest.approx(0.5**4 * others)


def test_rates_multiply():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=2)
    found = scales(model, layer_decay=0.5, head_rate=3.0, bias_rate=2.0)
    assert found["head.bias"] == 6.0
    assert found["head.weight"] == 3.0
    assert found["blocks.0.mlp.fc1.bias"] == 2.0 * 0.25


def test_layer_decay_leaves_weight_decay_as_it_is():
    model = timm.create_model("vitrm_micro_patch4_8", num_classes=3)

    def decayed(**settings):
        optimizer = build_optimizer(OptimizerConfig(lr=0.1, **settings), model)
        named = {id(p): name for name, p in model.named_parameters()}
        groups = optimizer.param_groups
        return {named[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}

    for decay in ("weights", "all"):
        assert decayed(decay=decay, layer_decay=0.9) == decayed(decay=decay)


def test_a_model_without_a_classifier_has_no_rate_for_it():
    with pytest.raises(UsageError, match="names no classifier"):
        build_optimizer(OptimizerConfig(lr=0.1, head_rate=2.0), nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["head_rate", "layer_decay", "bias_rate"])
def test_rates_are_positive(name):
    with pytest.raises(UsageError, match=f"{name} must be positive"):
        OptimizerConfig(**{name: 0.0})


def test_natural_gradient_takes_the_fisher_matrix_of_its_task():
    plain, texts = create_task("classification"), create_task("ocr")
    kfac, adamw = OptimizerConfig(name="kfac"), OptimizerConfig(name="adamw")
    assert with_fisher(kfac, texts).options == {"fisher": "empirical"}
    assert with_fisher(kfac, plain) == kfac
    assert with_fisher(adamw, texts) == adamw
    given = OptimizerConfig(name="kfac", options={"fisher": "mc"})
    assert with_fisher(given, texts) == given
    for name in NATURAL:
        config = with_fisher(OptimizerConfig(name=name, lr=0.1), texts)
        optimizer = build_optimizer(config, nn.Sequential(nn.Linear(3, 2)))
        assert optimizer.settings.fisher == "empirical"
