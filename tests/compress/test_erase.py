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
from smallfry.compress.prune.erase import Connections, branches, erasing
from smallfry.compress.prune.graphs import (
    Segment,
    choose_connected,
    erase_segments,
    find_segments,
    is_connected,
    operands_of,
    trace,
    zero_segments,
)
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


@pytest.mark.parametrize(
    "seeds", [range(25), pytest.param(range(25, 1000), marks=pytest.mark.slow)]
)
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
            y = self.one(x).sigmoid()
            return self.head(self.stem(x) + self.two(y.mean(1, keepdim=True) * y))

    graph = trace(Dangling())
    (segment,) = [s for s in find_segments(graph) if s.name == "two"]
    assert not is_connected(graph, [segment])  # "one" would have no user


def test_segments_whose_zero_is_not_zero_are_none():
    class Sigmoid(Fork):
        def forward(self, x):
            return self.head(self.one(x) + self.two(x).sigmoid() + F.softplus(self.stem(x)))

    assert [s.name for s in find_segments(trace(Sigmoid()))] == ["one"]

    class Shared(Fork):
        def forward(self, x):
            return self.head(self.one(x) + self.one(self.stem(x)))

    assert find_segments(trace(Shared())) == []


ZOO = {
    "resnet8_mlperf_tiny": ({}, (3, 16, 16)),
    "resnet18": ({}, (3, 32, 32)),
    "vit_tiny_patch16_224": ({"img_size": 16, "patch_size": 8, "depth": 2}, (3, 16, 16)),
    "loopnet_70k": ({}, (3, 16, 16)),
    "vitrm_micro_patch4_8": ({"depth": 2}, (1, 8, 8)),
}
ZOO_VITRM = "vitrm_micro_patch4_8"
CANDIDATES = {
    "resnet8_mlperf_tiny": 5,  # three branches, two shortcuts
    "resnet18": 8,  # of the strided branches, something is added in place to another shape
    "vit_tiny_patch16_224": 4,  # attention and MLP of two layers
    "loopnet_70k": 4,
    "vitrm_micro_patch4_8": 4,  # attention and MLP of two layers of the shared block
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "resnet18" else n for n in ZOO]
)
def test_residual_branches_of_models_are_erased_exactly(name):
    options, shape = ZOO[name]
    torch.manual_seed(0)
    spec = ModelSpec(name, {"num_classes": 4, **options})
    model = build(spec)
    images = torch.randn(2, *shape)
    graph = trace(model)
    assert (graph is None) == name.startswith("vitrm")
    segments = branches(model) if graph is None else find_segments(graph)
    found = {s.name: (s, t) for s in segments if (t := erasing(model, s, images)) is not None}
    assert len(found) == CANDIDATES[name]
    kept = [s for s, _ in found.values()]
    if graph is not None:
        chosen = choose_connected(graph, kept, range(len(kept)), len(kept))
        found = {kept[n].name: found[kept[n].name] for n in chosen}
    else:  # one attention stays: without any, no image reaches the prediction
        connections = Connections(model, images)
        assert connections.hold([t for n, (_, t) in found.items() if n != "blocks.1.attn"])
        assert not connections.hold([t for _, t in found.values()])
        assert not connections.hold([found[f"blocks.{n}.attn"][1] for n in (0, 1)])
        del found["blocks.1.attn"]
    assert found
    zeroed = copy.deepcopy(model)
    zero_segments(zeroed, [segment for segment, _ in found.values()])
    before = macs(model, images[:1])
    for _, transform in found.values():
        transform.apply(model)
        spec = spec.then(transform)
    torch.testing.assert_close(model(images), zeroed(images), atol=1e-5, rtol=1e-5)
    assert macs(model, images[:1]) < before
    spec = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert torch.equal(build(spec, model.state_dict())(images), model(images))


def begin(method, name="resnet8_mlperf_tiny", steps=16):
    options, shape = ZOO[name]
    torch.manual_seed(0)
    spec = ModelSpec(name, {"num_classes": 4, **options})
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
    model.eval()
    images = torch.randn(4, *shape)
    expected, before = model(images), macs(model, images[:1])
    spec = running.finish()
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert macs(model, images[:1]) < before
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


def test_a_run_that_ends_early_erases_what_is_zero():
    model, running, inner = begin(METHOD)
    train(model, inner, 0, 5, (3, 16, 16))
    with pytest.warns(SmallfryWarning, match="0 of 2 chosen operators were zero"):
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
