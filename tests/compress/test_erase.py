"""Erased operators: random super-networks stay connected and equal, models of the zoo as well."""

import copy
import json
import random

import pytest
import torch
from numbered_steps import train
from torch import fx, nn
from torch.nn import functional as F

from smallfry import compress
from smallfry.compress.prune.candidates import Candidates, Connections, draw
from smallfry.compress.prune.graphs import (
    Segment,
    choose_connected,
    erase_segments,
    find_segments,
    is_connected,
    zero_segments,
)
from smallfry.compress.prune.regions import operands_of, trace
from smallfry.compress.prune.steps import choose_steps, numbers_of_steps
from smallfry.costing import macs
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.training.method import Running, Setting
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.erased import Erase

WIDTH, SIDE = 4, 6


class Operation(nn.Module):
    """Convolution, norm and activation."""

    def __init__(self, before, random_state):
        super().__init__()
        self.conv = nn.Conv2d(before, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH) if random_state.random() < 0.5 else nn.Identity()
        self.act = random_state.choice([nn.ReLU, nn.GELU, nn.Sigmoid, nn.Identity])()
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        if isinstance(self.norm, nn.BatchNorm2d):
            self.norm.running_mean.normal_()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class SuperNet(nn.Module):
    """Random directed acyclic graph of 3 to 12 operations, joined by additions and concats."""

    def __init__(self, seed):
        super().__init__()
        chance = random.Random(seed)
        torch.manual_seed(seed)
        self.plan = []
        self.operations = nn.ModuleList()
        channels = [3]
        for _ in range(chance.randint(3, 12)):
            if channels[-1] == 3 or chance.random() < 0.4:
                source = chance.randrange(len(channels))
                self.plan.append(("operation", (source,)))
                self.operations.append(Operation(channels[source], chance))
                channels.append(WIDTH)
                continue
            same = [n for n, width in enumerate(channels) if width == channels[-1]]
            if len(same) > 1 and chance.random() < 0.6:
                sources = (*chance.sample(same[:-1], 1), same[-1])
                self.plan.append(("add", sources))
                channels.append(channels[-1])
            else:
                sources = (chance.randrange(len(channels) - 1), len(channels) - 1)
                self.plan.append(("cat", sources))
                channels.append(sum(channels[n] for n in sources))
        # what nothing has used so far goes into the last layer
        used = {n for _, sources in self.plan for n in sources}
        self.ends = [n for n in range(len(channels)) if n not in used]
        self.last = nn.Conv2d(sum(channels[n] for n in self.ends), 5, 1)

    def forward(self, x):
        values, operations = [x], iter(self.operations)
        for kind, sources in self.plan:
            inputs = [values[n] for n in sources]
            if kind == "operation":
                values.append(next(operations)(*inputs))
            elif kind == "add":
                values.append(inputs[0] + inputs[1])
            else:
                values.append(torch.cat(inputs, 1))
        return self.last(torch.cat([values[n] for n in self.ends], 1)).mean((2, 3))


def paths_hold(graph):
    """Check by itself that the output depends on the input, and each parameter on a path."""
    nodes = list(graph.graph.nodes)
    ahead = {nodes[0].name}
    for node in nodes:
        if any(n.name in ahead for n in node.all_input_nodes):
            ahead.add(node.name)
    behind = {nodes[-1].name}
    for node in reversed(nodes):
        if any(n.name in behind for n in node.users):
            behind.add(node.name)
    assert nodes[-1].name in ahead
    for node in nodes:
        if node.op == "call_module" and list(graph.get_submodule(node.target).parameters()):
            assert node.name in ahead & behind


def assert_erased_equals_zeroed(seed):
    model = SuperNet(seed).eval()
    graph = trace(model)
    segments = find_segments(graph)
    order = list(range(len(segments)))
    random.Random(seed).shuffle(order)
    accepted = [segments[n] for n in choose_connected(graph, segments, order, len(order))]
    images = torch.randn(2, 3, SIDE, SIDE)
    zeroed = copy.deepcopy(graph)
    zero_segments(zeroed, accepted)
    small = erase_segments(graph, accepted, images)
    expected, given = zeroed(images), small(images)
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    paths_hold(small)
    names = dict(small.named_modules())
    assert not any(module in names for s in accepted for module in s.modules)
    for node in small.graph.nodes:
        assert len(operands_of(node)) != 1
    return len(accepted), len(segments), any(not s.is_added for s in accepted)


@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 500), marks=pytest.mark.slow)])
def test_random_networks_stay_connected_and_equal(seeds):
    found = [assert_erased_equals_zeroed(seed) for seed in seeds]
    assert sum(erased for erased, *_ in found) > len(seeds) // 2
    assert any(erased < every for erased, every, _ in found)  # something had to stay
    assert any(has_cat for *_, has_cat in found)


class Fork(nn.Module):
    """Two branches and a sum, of which one must stay."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.one(x) + F.relu(self.two(x)))


def test_the_last_branch_of_a_join_stays():
    graph = trace(Fork())
    segments = find_segments(graph)
    assert [s.modules for s in segments] == [("one",), ("two",)]
    assert choose_connected(graph, segments, [1, 0], 2) == [1]
    assert choose_connected(graph, segments, [0, 1], 2) == [0]
    assert is_connected(graph, [])
    assert not is_connected(graph, segments)
    assert not is_connected(graph, [Segment(("stem",), ("stem",), "", True)])


def test_what_would_dangle_stays():
    class Deep(Fork):
        def forward(self, x):
            x = self.stem(x)
            y = self.one(x)
            return self.head(x + self.two(y) + y)

    graph = trace(Deep())
    segments = find_segments(graph)
    assert [s.name for s in segments] == ["two"]  # the fork's own branch has two users

    class Dangling(Fork):
        def forward(self, x):
            y = self.stem(x) + self.one(x)
            return self.head(x + self.two(y))

    graph = trace(Dangling())
    (segment,) = [s for s in find_segments(graph) if s.name == "two"]
    assert not is_connected(graph, [segment])  # "stem" and "one" would have no user


def test_what_only_a_branch_uses_goes_with_it():
    class Gated(Fork):
        def forward(self, x):
            y = self.one(x).sigmoid()
            return self.head(self.stem(x) + self.two(y.mean(1, keepdim=True) * y))

    model = Gated().eval()
    graph = trace(model)
    (segment,) = [s for s in find_segments(graph) if s.name == "one"]
    assert segment.modules == ("one", "two")
    small = erase_segments(graph, [segment], torch.ones(2, 4))
    assert {name for name, _ in small.named_children()} == {"stem", "head"}
    zero_segments(model, [segment])
    torch.testing.assert_close(small(torch.ones(2, 4)), model(torch.ones(2, 4)))


def test_segments_whose_zero_is_not_zero_are_none():
    class Sigmoid(Fork):
        def forward(self, x):
            return self.head(self.one(x) + self.two(x).sigmoid() + F.softplus(self.stem(x)))

    assert [s.name for s in find_segments(trace(Sigmoid()))] == ["one"]

    class Shared(Fork):
        def forward(self, x):
            return self.head(self.one(x) + self.one(self.stem(x)))

    assert find_segments(trace(Shared())) == []


TINY_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
SCALED = {"init_values": 1e-5, "drop_path_rate": 0.1}
ZOO = {
    "resnet8_mlperf_tiny": ({}, (3, 16, 16)),
    "resnet18": ({}, (3, 32, 32)),
    "resnet10t": ({}, (3, 32, 32)),
    "resnet10t with squeezed channels": (
        {"block_args": {"attn_layer": "se"}, "drop_path_rate": 0.1},
        (3, 32, 32),
    ),
    "mobilenetv2_035": ({"drop_path_rate": 0.1}, (3, 32, 32)),
    "vit_tiny_patch16_224": (TINY_VIT, (3, 16, 16)),
    "vit_tiny_patch16_224 with layer scale": ({**TINY_VIT, **SCALED}, (3, 16, 16)),
    "convnext_atto": (
        {"depths": (1, 1, 1, 2), "dims": (8, 8, 16, 16), "drop_path_rate": 0.1},
        (3, 32, 32),
    ),
    "cct_2_3x2_32": ({}, (3, 32, 32)),
    "dhvt_tiny_cifar_patch4": (
        {"img_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2},
        (3, 16, 16),
    ),
    "loopnet_70k": ({}, (3, 16, 16)),
    "loopnet_70k with loops": ({"widths": (6, 8), "loops": (3, 1)}, (3, 16, 16)),
    "vitrm_micro_patch4_8": ({"depth": 2}, (1, 8, 8)),
    "vitrm_plus_micro_8": ({"depth": 2}, (1, 8, 8)),
}
ZOO_VITRM = "vitrm_micro_patch4_8"
CANDIDATES = {
    "resnet8_mlperf_tiny": 5,  # three branches, two shortcuts
    "resnet18": 11,  # eight branches, three shortcuts
    "resnet10t": 7,  # four branches, three shortcuts
    "resnet10t with squeezed channels": 7,
    "mobilenetv2_035": 10,  # the blocks of stride 1 whose width stays
    "vit_tiny_patch16_224": 4,  # attention and MLP of two layers
    "vit_tiny_patch16_224 with layer scale": 4,
    "convnext_atto": 5,
    "cct_2_3x2_32": 4,
    "dhvt_tiny_cifar_patch4": 4,
    "loopnet_70k": 4,
    "loopnet_70k with loops": 8,  # three loops of two layers, one of two more
    "vitrm_micro_patch4_8": 4,  # attention and MLP of two layers of the shared block
    "vitrm_plus_micro_8": 4,
}
SLOW_MODELS = {"resnet18", "mobilenetv2_035"}


def build_drawn(name):
    """Build a model of random weights in float64, with its spec and inputs."""
    options, shape = ZOO[name]
    torch.manual_seed(0)
    spec = ModelSpec(name.partition(" ")[0], {"num_classes": 4, **options})
    return draw(build(spec)).double(), spec, torch.randn(2, *shape, dtype=torch.float64)


def accept(candidates, wanted):
    """Accept as many branches as leave the model connected."""
    accepted = []
    for name in wanted:
        accepted += [name] if candidates.hold([*accepted, name]) else []
    return accepted


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW_MODELS else n for n in ZOO]
)
def test_branches_of_models_are_erased_as_if_they_were_at_zero(name):
    model, spec, images = build_drawn(name)
    candidates = Candidates(model.train(), images)
    assert len(candidates.segments) == CANDIDATES[name]
    model.eval()
    accepted = accept(candidates, candidates.segments)
    assert accepted
    zeroed = copy.deepcopy(model)
    zero_segments(zeroed, [candidates.segments[each] for each in accepted])
    before, used = macs(model, images[:1]), Connections(model, images).used
    transform = candidates.without(accepted)
    transform.apply(model)
    torch.testing.assert_close(model(images), zeroed(images), atol=1e-10, rtol=1e-10)
    assert macs(model, images[:1]) < before
    assert not torch.equal(*model(images))  # of two images
    left = {each for each, _ in model.named_parameters()}
    if not transform.taken_out:  # which gives others new names
        assert Connections(model, images).used == used & left
    assert model.train()(images).isfinite().all()
    model.eval()
    spec = ModelSpec.from_dict(json.loads(json.dumps(spec.then(transform).to_dict())))
    again = build(spec).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), model(images))


def test_one_attention_of_a_shared_block_stays():
    model, _, images = build_drawn(ZOO_VITRM)
    candidates = Candidates(model, images)
    assert "blocks.1.attn" not in accept(candidates, candidates.segments)
    assert not candidates.hold(["blocks.0.attn", "blocks.1.attn"])
    assert candidates.hold(["blocks.1.attn", "blocks.0.mlp", "blocks.1.mlp"])


def test_a_loop_leaves_with_its_norm_and_its_convolution_when_none_is_left():
    model, _, images = build_drawn("loopnet_70k with loops")
    candidates = Candidates(model, images)
    first, second = (f"stages.0.layers.{n}" for n in (0, 1))
    erased = candidates.without([f"{first}.norms.{n}" for n in (0, 2)])
    assert erased == Erase(taken_out=[f"{first}.norms.{n}" for n in (0, 2)])
    one = copy.deepcopy(model)
    kept = one.get_submodule(f"{first}.norms.1")
    before = macs(one, images[:1])
    erased.apply(one)
    assert [*one.get_submodule(first).norms] == [kept]
    all_loops = [f"{second}.norms.{n}" for n in range(3)]
    erased = candidates.without(all_loops)
    assert erased == Erase(skipped=[f"{second}.conv"], taken_out=all_loops)
    erased.apply(one)
    # two of three loops, and three: five of the six calls of equal cost
    call = 6 * 6 * 9 * 7 * 7
    assert before - macs(one, images[:1]) == 5 * call


def test_what_shares_a_module_in_training_is_zero_of_its_shape():
    model, _, images = build_drawn("cct_2_3x2_32")
    erased = Candidates(model, images).without(["blocks.1.norm1"])
    assert erased.whole == erased.zeros == ["blocks.1.attn"]  # of both branches is drop_path


def begin(method, name="resnet8_mlperf_tiny", steps=16, **more):
    options, shape = ZOO[name]
    torch.manual_seed(0)
    spec = ModelSpec(name.partition(" ")[0], {"num_classes": 4, **options, **more})
    model = build(spec).train()
    inner = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    running = Running([method], model, Setting(spec, torch.randn(2, *shape), (), steps))
    running.attach(inner)
    return model, running, inner


METHOD = compress.EraseOperators(0.5, begin=2, end=10)


@pytest.mark.parametrize(
    "name",
    ["resnet8_mlperf_tiny", pytest.param("vitrm_micro_patch4_8", marks=pytest.mark.slow)],
)
def test_a_trained_model_equals_the_erased_one(name):
    shape = ZOO[name][1]
    model, running, inner = begin(METHOD, name)
    train(model, inner, 0, 16, shape)
    (method,) = running._started
    assert sum(map(len, method.gone)) == int(0.5 * len(method.groups))
    assert name != ZOO_VITRM or model.latent_steps == 2  # of three, without half of two
    model.eval()
    images = torch.randn(4, *shape)
    expected, before = model(images), macs(model, images[:1])
    spec = running.finish()
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert macs(model, images[:1]) < before
    names = [g.name for g, gone in zip(method.groups, method.gone, strict=True) if gone]
    assert running.reports[0]["lists"]["branches erased"] == names
    assert torch.equal(build(spec, model.state_dict())(images), model(images))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stop", [pytest.param(1, marks=SLOW), 6, pytest.param(12, marks=SLOW)])
def test_a_stopped_run_continues_to_the_bit(stop):
    whole, running, inner = begin(METHOD)
    train(whole, inner, 0, stop, (3, 16, 16))
    saved = copy.deepcopy([part.state_dict() for part in (running, inner, whole)])
    train(whole, inner, stop, 16, (3, 16, 16))
    again, resumed, other = begin(METHOD)
    for part, state in zip((resumed, other, again), saved, strict=True):
        part.load_state_dict(state)
    train(again, other, stop, 16, (3, 16, 16))
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert running.finish() == resumed.finish()


def test_a_share_below_one_branch_is_no_silent_nothing():
    method = compress.EraseOperators(0.3, begin=2, end=6)
    model, _, inner = begin(method, ZOO_VITRM, 8, latent_steps=3, depth=1)
    with pytest.warns(SmallfryWarning, match=r"erases nothing: 0.3 of .* the steps \(2\) is less"):
        train(model, inner, 0, 3, (1, 8, 8))


def test_a_run_that_ends_early_erases_what_is_zero():
    model, running, inner = begin(METHOD)
    train(model, inner, 0, 5, (3, 16, 16))
    with pytest.warns(SmallfryWarning, match="0 of 2 chosen branches and steps were at zero"):
        assert running.finish().transforms == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compress.EraseOperators(1.0), r"must be in \[0, 1\)"),
        (lambda: compress.EraseOperators(end=0), "end above 0"),
        (lambda: begin(compress.EraseOperators(begin=5, end=5)), "steps between begin and end"),
        (lambda: begin(compress.EraseOperators(end=99)), "99 of 16"),
        (lambda: begin(compress.EraseOperators(include=("no*",))), "matches no branch"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_an_erased_module_that_is_missing_is_refused():
    model = build(ModelSpec("loopnet_70k"))
    with pytest.raises(ValueError, match=r"no module 'stages\.9"):
        Erase(["stages.9.conv"]).apply(model)
    with pytest.raises(ValueError, match="no module 'nothing'"):
        Erase([], ["nothing"]).apply(model)
    with pytest.raises(ValueError, match="lists of the names"):
        Erase("head")
    with pytest.raises(ValueError, match=r"no parameter 'head\.gamma'"):
        Erase(parameters=["head.gamma"]).apply(model)
    with pytest.raises(ValueError, match=r"no list with a module 'stages\.0'"):
        Erase(taken_out=["stages.0"]).apply(model)
    with pytest.raises(ValueError, match="no latent_steps of 2"):
        Erase(steps={"latent_steps": 2}).apply(model)
    assert isinstance(fx.symbolic_trace(model), fx.GraphModule)


@pytest.mark.slow  # an ONNX graph
def test_the_last_attention_of_a_block_stays():
    model, running, inner = begin(compress.EraseOperators(0.99, begin=2, end=6), ZOO_VITRM, 8)
    train(model, inner, 0, 8, ZOO[ZOO_VITRM][1])
    spec = running.finish()
    (erased,) = spec.transforms
    assert len(erased.zeros) == 3
    assert sum(name.endswith("attn") for name in erased.zeros) == 1
    model.eval()
    with torch.no_grad():
        one, other = model(torch.randn(2, *ZOO[ZOO_VITRM][1]))
    assert not torch.equal(one, other)
    exported = torch.onnx.export(model, (torch.randn(2, 1, 8, 8),), dynamo=True, verbose=False)
    images = torch.randn(2, 1, 8, 8)
    (given,) = exported(images)
    torch.testing.assert_close(given, model(images), atol=1e-5, rtol=1e-5)


def test_a_parameter_of_one_number_takes_part_in_the_connections():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.unused = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
            self.linear = torch.nn.Linear(3, 2)

        def forward(self, inputs):
            return self.scale * self.linear(inputs)

    connections = Connections(Scaled(), torch.ones(1, 3))
    assert connections.used == {"scale", "linear.weight", "linear.bias"}


# Steps of a recursion


def without_a_step(model, images, left_out):
    """Compute logits with one latent step at zero, which leaves the state as it is."""
    x, state = model.embed(images), model.initial_state(len(images))
    for step in range(model.latent_steps):
        state = state if step == left_out else model.think(x, state)
    return model.read_out(model.answer(state)).logits


@pytest.mark.parametrize("left_out", [0, 2])
def test_a_model_with_fewer_steps_is_that_with_a_step_at_zero(left_out):
    model, spec, images = build_drawn(ZOO_VITRM)
    expected = without_a_step(model, images, left_out)
    erased = Erase(steps={"latent_steps": 2})
    again = build(ModelSpec.from_dict(spec.then(erased).to_dict())).double().eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images), expected, atol=1e-10, rtol=1e-10)


def test_the_steps_that_change_the_outputs_least_go_first():
    spec = ModelSpec(ZOO_VITRM, {"latent_steps": 2, "recursion_steps": 3})
    torch.manual_seed(0)
    model, images = build(spec).eval(), torch.randn(2, 1, 8, 8)
    names = numbers_of_steps(model, images)
    assert names == ["latent_steps", "recursion_steps"]

    def change(**steps):
        other = copy.deepcopy(model)
        Erase(steps=steps).apply(other)
        return float((other(images) - model(images)).norm() / model(images).norm())

    chosen = choose_steps(model, names, 2, images)
    one = {"latent_steps": change(latent_steps=1), "recursion_steps": change(recursion_steps=2)}
    first = min(one, key=one.get)
    assert (chosen[0].name, chosen[0].kept) == (first, {"latent_steps": 1}.get(first, 2))
    assert chosen[0].change == pytest.approx(one[first], rel=1e-4)
    steps = {each.name: each.kept for each in chosen}
    assert chosen[1].change == pytest.approx(change(**steps), rel=1e-4)
    assert (model.latent_steps, model.recursion_steps) == (2, 3)


def test_steps_with_norms_of_their_own_leave_with_them():
    torch.manual_seed(0)
    spec = ModelSpec("loopnet_anytime_240k", {"widths": (4, 6), "depths": (1, 2)})
    model, images = draw(build(spec)), torch.randn(2, 3, 32, 32)
    assert numbers_of_steps(model, images) == ["recursion_steps"]
    assert numbers_of_steps(build(ModelSpec("gated_mlp")), torch.randn(2, 1, 8, 8)) == []
    second = model.recurse(images)[1].logits
    erased = Candidates(model, images).without([], {"recursion_steps": 2})
    norms = [f"stages.1.layers.{layer}.norms.2" for layer in (0, 1)]
    assert erased == Erase(taken_out=norms, steps={"recursion_steps": 2})
    erased.apply(model)
    torch.testing.assert_close(model(images), second)
    assert [len(layer.norms) for layer in model.stages[1].layers] == [2, 2]
    again = build(spec.then(erased), model.state_dict()).eval()
    assert torch.equal(again(images), model(images))


def test_steps_of_an_anytime_loopnet_are_left_out_by_the_method():
    spec = ModelSpec("loopnet_anytime_240k", {"widths": (4, 6), "depths": (1, 1)})
    model, images = build(spec), torch.randn(4, 3, 32, 32)
    erase = compress.EraseOperators(sparsity=0.5, begin=0, end=2)
    session = compress.Session(model, [erase], images, steps=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    session.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    (erased,) = session.finish().transforms
    assert erased.steps == {"recursion_steps": 2}
    assert model(images).shape == (4, 10)


def test_attention_of_trm_is_a_candidate_and_one_stays():
    torch.manual_seed(0)
    options = {"embed_dim": 12, "num_heads": 2, "mlp_hidden_dim": 8, "depth": 2, "prefix": 2}
    options |= {"rounds": 1, "recursion_steps": 1, "latent_steps": 2, "token_mlp": False}
    model = draw(build(ModelSpec("trm_sudoku4_micro", {"num_classes": 6, **options}))).double()
    grids = (torch.arange(32).view(2, 1, 4, 4) % 6).double()
    candidates = Candidates(model, grids)
    names = [f"blocks.{layer}.{part}" for layer in range(2) for part in ("mixer.proj", "mlp")]
    assert sorted(candidates.segments) == names
    assert not candidates.hold(["blocks.0.mixer.proj", "blocks.1.mixer.proj"])
    zeroed = copy.deepcopy(model)
    zero_segments(zeroed, [candidates.segments["blocks.0.mixer.proj"]])
    candidates.without(["blocks.0.mixer.proj"]).apply(model)
    torch.testing.assert_close(model(grids), zeroed(grids))
    assert "blocks.0.mixer.qkv.weight" not in dict(model.named_parameters())


def steps_alone(sparsity=0.7):
    return compress.EraseOperators(sparsity, begin=2, end=6, include=("*_steps",))


def test_latent_steps_are_left_out_while_training_and_recursion_steps_at_the_end():
    more = {"depth": 1, "latent_steps": 3, "recursion_steps": 3}
    model, running, inner = begin(steps_alone(0.99), ZOO_VITRM, 8, **more)
    train(model, inner, 0, 2, (1, 8, 8))
    assert (model.latent_steps, model.recursion_steps) == (3, 3)
    train(model, inner, 2, 6, (1, 8, 8))
    (method,) = running._started
    assert [each.name for each in method.left_out].count("latent_steps") == 3 - model.latent_steps
    spec = running.finish()
    (erased,) = spec.transforms
    assert sum(erased.steps.values()) == 3  # of six, without three of the four beyond the first
    assert model.recursion_steps == erased.steps.get("recursion_steps", 3)
    (report,) = running.reports
    assert report["lists"]["branches erased"] == []
    kept = report["lists"]["steps kept"]
    assert sorted(kept) == [f"{name}: {erased.steps[name]} of 3" for name in sorted(erased.steps)]
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(build(spec, model.state_dict()).eval()(images), model.eval()(images))


def test_a_stopped_run_has_the_steps_that_it_left_out():
    whole, running, inner = begin(steps_alone(), ZOO_VITRM, 8, latent_steps=4, depth=1)
    train(whole, inner, 0, 4, (1, 8, 8))
    assert whole.latent_steps == 3  # the first of two, in the middle
    saved = copy.deepcopy([part.state_dict() for part in (running, inner, whole)])
    _, early, _ = begin(steps_alone(), ZOO_VITRM, 8, latent_steps=4, depth=1)
    early.load_state_dict(saved[0])
    with pytest.warns(SmallfryWarning, match="1 of 2 chosen branches and steps were at zero"):
        assert early.finish().transforms == (Erase(steps={"latent_steps": 3}),)
    train(whole, inner, 4, 8, (1, 8, 8))
    again, resumed, other = begin(steps_alone(), ZOO_VITRM, 8, latent_steps=4, depth=1)
    for part, state in zip((resumed, other, again), saved, strict=True):
        part.load_state_dict(state)
    assert again.latent_steps == 3
    train(again, other, 4, 8, (1, 8, 8))
    assert again.latent_steps == whole.latent_steps == 2
    assert running.finish() == resumed.finish()
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
