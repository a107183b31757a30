"""ViTRM-plus: without its switches it is ViTRM, and each switch does what it says and no more."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_vitrm_plus import by_definition
from torch.testing import assert_close

from smallfry.costing import cost
from smallfry.errors import UsageError
from smallfry.models import State, ViTRM, ViTRMPlus
from smallfry.models.early_exit import recurse_until
from smallfry.models.trace import trace_recursion
from smallfry.tasks.classification import ClassTargets
from smallfry.training.build_objective import build_objective
from smallfry.training.config import ObjectiveConfig
from smallfry.training.objective import Batch, DeepSupervision

SMALL = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 12}
OFF = {
    "tokenizer": "patch",
    "depthwise": False,
    "positions": "learned",
    "injection": "concat",
    "pool": "y",
    "state_norm": "none",
    "layer_scale": 0.0,
}
SWITCHES = [
    {"tokenizer": "conv"},
    {"depthwise": True},
    {"positions": "rotary"},
    {"positions": "both"},
    {"injection": "add"},
    {"pool": "z"},
    {"pool": "both"},
    {"state_norm": "layer"},
    {"state_norm": "rms"},
    {"layer_scale": 0.1},
    {"drop_path": 0.3},
    {"random_depth": True},
]
ALL_ON = {
    "tokenizer": "conv",
    "depthwise": True,
    "positions": "both",
    "injection": "add",
    "pool": "z",
    "state_norm": "rms",
    "layer_scale": 0.5,
}
by_name = pytest.mark.parametrize("switch", SWITCHES, ids=lambda s: "-".join(map(str, *s.items())))
TIGHT = {"atol": 1e-9, "rtol": 1e-9}


def in_double(make):
    """Made in float64 from the beginning, so that tables of angles are not rounded."""
    torch.set_default_dtype(torch.float64)
    try:
        return make()
    finally:
        torch.set_default_dtype(torch.float32)


def build(**arguments):
    """A small model in float64 with no weight at a special value."""
    model = in_double(lambda: ViTRMPlus(**SMALL | {"drop_rate": 0.0} | arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(count=3):
    return torch.randn(count, 3, 8, 8, dtype=torch.float64)


# Without switches, ViTRM


@pytest.mark.parametrize("forms", [{}, {"latents": 5}, {"latents": 4, "cross_attention": True}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_without_switches_it_is_vitrm_in_outputs_and_gradients(forms, dtype, tolerance):
    plain = ViTRM(**SMALL, **forms, recursion_steps=2, drop_rate=0.0).to(dtype)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    plus = ViTRMPlus(**SMALL, **forms, recursion_steps=2, drop_rate=0.0).to(dtype)
    plus.load_state_dict(plain.state_dict())
    some = images().to(dtype)
    for model in (plain, plus):
        step = model.recurse(some)[-1]
        (step.logits.square().sum() + step.halt_logits.sum()).backward()
    near = {"atol": tolerance, "rtol": tolerance}
    assert_close(plus(some), plain(some), **near)
    wanted = {n: p.grad for n, p in plain.named_parameters()}
    assert_close({n: p.grad for n, p in plus.named_parameters()}, wanted, **near)


def test_without_switches_the_papers_size_costs_and_starts_as_vitrm():
    torch.manual_seed(3)
    plain = timm.create_model("vitrm_small_patch4_32")
    torch.manual_seed(3)
    plus = timm.create_model("vitrm_plus_small_32", mlp_hidden_dim=512, **OFF)
    assert_close(plus.state_dict(), plain.state_dict(), atol=0, rtol=0)
    sample = torch.zeros(1, 3, 32, 32)
    assert cost(plus, sample) == cost(plain, sample)


# With switches, their definition


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    tokenizer=st.sampled_from(["patch", "conv"]),
    depthwise=st.booleans(),
    positions=st.sampled_from(["learned", "rotary", "both"]),
    injection=st.sampled_from(["concat", "across", "add"]),
    pool=st.sampled_from(["y", "z", "both"]),
    state_norm=st.sampled_from(["none", "layer", "rms"]),
    layer_scale=st.sampled_from([0.0, 0.5]),
    depth=st.integers(1, 2),
    latents=st.sampled_from([16, 9, 4, 1]),
)
def test_any_switches_together_equal_their_definition(injection, latents, **switches):
    latents = 16 if injection == "add" else latents
    if injection == "across":
        injection, switches["cross_attention"] = "concat", True
    model = build(injection=injection, latents=latents, recursion_steps=2, **switches)
    some = images(2)
    found, wanted = model(some), by_definition(model, some)
    assert_close(found, wanted, **TIGHT)
    trained = [p for n, p in model.named_parameters() if not n.startswith("halt_head")]
    ours, theirs = (
        torch.autograd.grad(o.square().sum(), trained, materialize_grads=True)
        for o in (found, wanted)
    )
    assert_close(ours, theirs, **TIGHT)


# Sizes


def parameters(**arguments):
    model = timm.create_model("vitrm_plus_small_32", **OFF | {"mlp_hidden_dim": 480} | arguments)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "expected", "most"),
    [
        ("vitrm_plus_small_32", 3_654_779, 3_700_000),
        ("vitrm_plus_tiny_32", 957_011, 1_000_000),
        ("vitrm_plus_micro_8", 116_467, None),
    ],
)
def test_the_named_models_have_the_documented_parameters(name, expected, most):
    found = sum(p.numel() for p in timm.create_model(name).parameters())
    assert found == expected
    assert most is None or found <= most


def test_the_small_one_is_the_budget_of_the_specification_but_for_the_norms():
    assert (
        sum(
            p.numel()
            for p in timm.create_model("vitrm_plus_small_32", state_norm="none").parameters()
        )
        == 3_654_011
    )


@pytest.mark.parametrize(
    ("switch", "added"),
    [
        ({"tokenizer": "conv"}, 27 * 48 + 9 * 48 * 384 + 384 - (48 * 384 + 384)),
        ({"depthwise": True}, 3 * 9 * 480),
        ({"positions": "rotary"}, -64 * 384),
        ({"positions": "both"}, 0),
        ({"injection": "add"}, 0),
        ({"pool": "z"}, 384),
        ({"pool": "both"}, 384),
        ({"state_norm": "layer"}, 4 * 384),
        ({"state_norm": "rms"}, 2 * 384),
        ({"layer_scale": 0.1}, 3 * 2 * 384),
        ({"drop_path": 0.1}, 0),
        ({"random_depth": True}, 0),
    ],
)
def test_each_switch_adds_its_own_parameters(switch, added):
    assert parameters(**switch) - parameters() == added


@pytest.mark.parametrize(
    ("switch", "mmac"),
    [
        ({}, 1454),
        ({"tokenizer": "conv"}, 1464),
        ({"depthwise": True}, 1459),
        ({"positions": "rotary"}, 1454),
        ({"injection": "add"}, 898),
        ({"pool": "z"}, 1504),
    ],
)
def test_multiply_accumulates_of_the_papers_size(switch, mmac):
    model = timm.create_model("vitrm_plus_small_32", **OFF | {"mlp_hidden_dim": 512} | switch)
    assert round(cost(model, torch.zeros(1, 3, 32, 32)).macs / 1e6) == mmac


# What holds for every switch


@by_name
def test_every_switch_keeps_the_contract_and_changes_outputs_unless_it_is_of_training(switch):
    plain, model = build(recursion_steps=2), build(**switch, recursion_steps=2)
    own = model.state_dict()
    shared = {k: v for k, v in plain.state_dict().items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(shared, strict=False)
    some = images()
    same = torch.equal(model(some), plain(some))
    assert same == bool(switch.keys() & {"drop_path", "random_depth"})
    assert isinstance(model, ViTRM)
    trace = model.recurse(some)
    assert_close(model(some), trace[-1].logits)
    features = model.forward_features(some)
    assert features.shape == (3, 17, 16)
    assert_close(model.forward_head(features), model(some))
    first = model.advance(some)
    assert_close(model.advance(some, first.state).logits, trace[1].logits)
    thinking, x = model.initial_state(3), model.embed(some)
    for _ in range(model.latent_steps):
        thinking = model.think(x, thinking)
    assert_close(model.read_out(model.answer(thinking)).logits, first.logits)
    assert_close(model(some)[1:2], model(some[1:2]))  # not of the batch around it
    model.reset_classifier(4)
    assert model.double()(some).shape == (3, 4)
    assert model.no_weight_decay() == {"pos_embed", "y_init", "z_init"}
    assert model(some[:0]).shape == (0, 4)


@pytest.mark.parametrize("switch", [*SWITCHES, ALL_ON], ids=str)
def test_gradients_reach_every_parameter(switch):
    torch.manual_seed(0)
    model = build(**switch, recursion_steps=2).train()
    last = model.recurse(images())[-1]
    (last.logits.square().sum() + last.halt_logits.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("switch", [*SWITCHES, ALL_ON], ids=str)
def test_every_switch_runs_in_bfloat16(switch):
    model = ViTRMPlus(**SMALL, **switch)
    some = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        step = model.train().advance(some)
        step = model.advance(some, step.state.detach())
    step.logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        near = model(some)
    assert_close(near.float(), model(some), atol=0.05, rtol=0.05)
    assert model.bfloat16()(some.bfloat16()).dtype == torch.bfloat16


CONCAT = {"injection": "concat", "pool": "both", "state_norm": "layer", "drop_path": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize("switches", [ALL_ON, ALL_ON | CONCAT], ids=["add", "concat"])
def test_all_switches_but_random_depth_compile_to_one_graph(switches):
    torch.compiler.reset()
    model = build(**switches, depth=1).train()
    compiled = torch.compile(model.advance, backend="eager", dynamic=True, fullgraph=True)
    for count in (2, 3):
        some, logits = images(count), []
        for advance in (model.advance, compiled):
            torch.manual_seed(0)
            logits.append(advance(some).logits)
        assert_close(*logits)
    torch.compiler.reset()


@pytest.mark.slow
def test_random_depth_compiles_and_draws_as_it_does_eagerly():
    torch.compiler.reset()
    model = build(random_depth=True, depth=1, latent_steps=2).train()
    compiled = torch.compile(model.advance, backend="eager", dynamic=True)
    some, drawn = images(), []
    for seed in range(5):
        logits = []
        for advance in (model.advance, compiled):
            torch.manual_seed(seed)
            logits.append(advance(some).logits)
        assert_close(*logits)
        drawn.append(logits[0])
    assert any(not torch.equal(logits, drawn[0]) for logits in drawn)
    torch.compiler.reset()


def test_gradient_checkpointing_changes_no_gradient():
    model, gradients = build(**ALL_ON).train(), []
    some = images()
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(some).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert_close(*gradients)


# What each switch means


def test_a_patch_moves_with_its_position_only_where_there_is_one():
    model = build(positions="rotary", pool="z")
    some = images()
    moved = some.roll(2, dims=-1)
    assert (model(some) - model(moved)).abs().max() > 1e-6
    model.rotary = None
    model.z_init.data = model.z_init[:, :1].expand(-1, 16, -1).clone()
    assert_close(model(some), model(moved), **TIGHT)  # no position is left


def test_state_norm_bounds_the_state_over_many_steps():
    def growth(**switch):
        torch.manual_seed(0)
        model = ViTRMPlus(**SMALL | {"embed_dim": 32}, **switch).eval()
        trace = model.recurse(images().float(), 16)
        return [
            [s.square().mean().sqrt().item() for s in (step.state.y, step.state.z)]
            for step in trace
        ]

    for injection in ("concat", "add"):
        free = growth(injection=injection)
        assert free[-1][1] > 2 * free[0][1]
        for kind in ("layer", "rms"):
            for y, z in growth(injection=injection, state_norm=kind):
                assert y == pytest.approx(1, abs=0.01)
                assert z == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("pool", ["y", "z", "both"])
def test_pooling_reads_latents_in_any_order(pool):
    model = build(pool=pool)
    state = model.think(model.embed(images()), model.initial_state(3))
    shuffled = State(state.y, state.z[:, torch.randperm(16)])
    assert_close(model.answer(shuffled).y, model.answer(state).y, **TIGHT)


def test_pooling_starts_as_the_mean_of_the_rows_it_names():
    assert not ViTRMPlus(**SMALL, pool="z").pool_weights.weight.any()
    answers = {}
    for pool in ("y", "z", "both"):
        torch.manual_seed(0)
        model = build(pool=pool)
        if pool == "y":
            weights = model.state_dict()
            state = model.think(model.embed(images()), model.initial_state(3))
        model.load_state_dict(weights, strict=False)
        if pool != "y":
            torch.nn.init.zeros_(model.pool_weights.weight)
        answers[pool] = model.answer(state).y
    assert_close(answers["both"], (answers["y"] + 16 * answers["z"]) / 17, **TIGHT)
    torch.nn.init.normal_(model.pool_weights.weight)
    assert (model.answer(state).y - answers["both"]).abs().max() > 1e-3


def test_add_gives_each_latent_its_own_patch():
    model = build(injection="add", depth=1)
    torch.nn.init.zeros_(model.blocks[0].attn.proj.weight)  # no token sees another
    x = model.embed(images(1)).detach().requires_grad_()
    z = model.think(x, model.initial_state(1)).z
    (gradient,) = torch.autograd.grad(z[0, 5].sum(), x)
    assert gradient[0].abs().sum(1).nonzero().flatten().tolist() == [5]


def test_drop_path_keeps_the_latents_of_as_many_images_as_it_says():
    model = build(drop_path=0.3).train()
    state = State(torch.randn(1, 1, 16).double(), torch.randn(1, 16, 16).double())
    state = State(*(t.expand(2000, -1, -1) for t in state))
    x = model.embed(images(1)).expand(2000, -1, -1)
    with torch.no_grad():
        z = model.think(x, state).z
    kept = (z == state.z).flatten(1).all(dim=1)
    assert kept.double().mean().item() == pytest.approx(0.3, abs=0.05)
    assert_close(z[~kept], z[~kept][:1].expand_as(z[~kept]))


def test_random_depth_draws_every_count_from_1_to_2n_minus_1(monkeypatch):
    model = build(random_depth=True, latent_steps=3).train()
    counts, think = [], model._think
    monkeypatch.setattr(model, "_think", lambda *a: counts.append(1) or think(*a))
    drawn = []
    with torch.no_grad():
        for _ in range(200):
            counts.clear()
            model.advance(images(1))
            drawn.append(len(counts))
    assert set(drawn) == {1, 2, 3, 4, 5}
    assert sum(drawn) / len(drawn) == pytest.approx(3, abs=0.4)


@pytest.mark.parametrize("switch", [{"drop_path": 0.5}, {"random_depth": True}])
def test_chance_is_of_training_alone_and_of_torchs_random_state(switch):
    model, some = build(**switch), images(8)
    plain = build()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(some), plain(some))

    def drawn(seed):
        torch.manual_seed(seed)
        return torch.cat([model.train()(some) for _ in range(6)])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "convs"}, r"tokenizer is one of \('patch', 'conv'\), not 'convs'"),
        ({"positions": None}, "positions is one of"),
        ({"injection": "mul"}, "injection is one of"),
        ({"pool": "x"}, "pool is one of"),
        ({"state_norm": "batch"}, "state_norm is one of"),
        ({"layer_scale": -0.1}, "layer_scale must be above 0"),
        ({"drop_path": 1.0}, "drop_path is 0 to below 1"),
        ({"tokenizer": "conv", "patch_size": 8}, "patches of 1, 2 or 4 pixels, not patch_size 8"),
        ({"depthwise": True, "latents": 5}, "square number of latents, or one per patch, not 5"),
        (
            {"positions": "rotary", "latents": 5},
            "square number of latents, or one per patch, not 5",
        ),
        ({"positions": "both", "embed_dim": 12}, "heads of a multiple of 4 features, not 6"),
        ({"injection": "add", "latents": 4}, "16 latents, not 4"),
        ({"injection": "add", "cross_attention": True}, "works without cross_attention"),
    ],
)
def test_settings_that_can_not_be_meant_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        ViTRMPlus(**SMALL | arguments)


# In use


@pytest.mark.slow
@pytest.mark.parametrize("switch", [{}, {"drop_path": 0.2, "random_depth": True}], ids=str)
def test_deep_supervision_trains_it_over_two_steps(switch):
    torch.manual_seed(0)
    model = timm.create_model("vitrm_plus_micro_8", drop_rate=0.0, **switch).train()
    objective = build_objective(ObjectiveConfig(supervision_steps=2, halt_threshold=1.0), model)
    assert isinstance(objective, DeepSupervision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    labels = torch.arange(8) % 4
    batch = Batch(torch.randn(8, 1, 8, 8), ClassTargets(labels, torch.eye(10)[labels]))
    losses = []
    for _ in range(15):
        for step in objective(objective.prepare(model), batch):
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            losses.append(step.loss.item())
    assert len(losses) == 30
    assert losses[-1] < 0.6 * losses[0]


def test_early_exit_and_the_recursion_trace_follow_it():
    model = build(**ALL_ON, recursion_steps=3)
    some = images(6)
    trace = model.recurse(some)
    threshold = float(trace[0].halt_logits.detach().sigmoid().median())
    found = recurse_until(model, some, threshold)
    for i, steps in enumerate(found.steps.tolist()):
        assert_close(found.logits[i], trace[steps - 1].logits[i].detach())
    assert 1 in found.steps
    assert found.steps.max() > 1
    asked = trace_recursion(model, some, 3).probabilities
    assert asked.shape == (1 + 3 * 3, 6, 10)
    assert_close(asked[-1], trace[-1].logits.softmax(dim=1).detach())
