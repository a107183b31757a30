"""Disguise of convolutional networks: equal outputs, and one sequence of operators for all.

A defence against the leakage of an architecture (``leakage.py``), after DeepPeep's secure
MobileNet.
Every convolution of at most 3×3, with its batch norm, activation and the addition of a shortcut,
becomes one unit: a dense 3×3 convolution between states of all channels that are still needed,
which keeps others by identity kernels, and a clamp between bounds of each channel. Units and
channels are padded to a common schedule, so that networks of one schedule have equal traces.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from smallfry._torch import BatchNorm
from smallfry.compress.prune.regions import ADDS, trace
from smallfry.errors import UsageError

__all__ = ["Disguised", "Schedule", "disguise", "plan_schedule"]

ACTIVATIONS = {"relu": torch.inf, "relu_": torch.inf, "relu6": 6.0}  # their upper bounds
GRID = 8  # channels of a state are a multiple


class Schedule(NamedTuple):
    """Units and channels of each stage, from one change of resolution to the next."""

    units: tuple[int, ...]
    channels: tuple[int, ...]


class _Unit(NamedTuple):
    """Convolution with what belongs to it."""

    weight: Tensor  # dense, 3×3, folded
    bias: Tensor
    low: float
    high: float
    stride: int
    reads: str  # value that it convolves
    adds: str | None  # value added to the result
    writes: str


class _Layout(NamedTuple):
    """Unit with the channels of the state before and after it, by value."""

    unit: _Unit
    before: Mapping[str, tuple[int, int]]
    after: Mapping[str, tuple[int, int]]


class _Padded(nn.Module):
    """Unit of a disguised network."""

    def __init__(
        self, weight: Tensor, bias: Tensor, low: Tensor, high: Tensor, stride: int
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, stride, padding=1)
        self.conv.to(weight.dtype)
        self.conv.weight.data, self.conv.bias.data = weight, bias  # type: ignore[union-attr]
        self.register_buffer("low", low[:, None, None])
        self.register_buffer("high", high[:, None, None])

    def forward(self, state: Tensor) -> Tensor:
        return torch.clamp(self.conv(state), cast(Tensor, self.low), cast(Tensor, self.high))


class Disguised(nn.Module):
    """Network of padded units, with the outputs of the original network.

    Args:
        units: In order.
        head: Linear classifier of the last state's channel means.
        channels: Of the first state; images have the first of them.
    """

    def __init__(self, units: Sequence[nn.Module], head: nn.Linear, channels: int) -> None:
        super().__init__()
        self.units, self.head, self.channels = nn.Sequential(*units), head, channels

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, classes) of images (batch, channels, side, side)."""
        state = F.pad(images, (0, 0, 0, 0, 0, self.channels - images.shape[1]))
        logits: Tensor = self.head(self.units(state).mean((2, 3)))
        return logits


def plan_schedule(models: Sequence[nn.Module]) -> Schedule:
    """Find the smallest schedule that all networks fit into.

    Args:
        models: With as many changes of resolution.

    Raises:
        UsageError: Of another number of stages, or a network that can't be disguised.
    """
    every = [_units(model) for model in models]
    stages = [_stages(_layouts(units, last)) for units, _, last in every]
    if len({len(each) for each in stages}) != 1:
        found = ", ".join(str(len(each)) for each in stages)
        raise UsageError(f"networks of one schedule need as many stages each, not {found}")
    units = (max(map(len, each)) for each in zip(*stages, strict=True))
    widths = (max(each) for each in zip(*map(_widths, stages), strict=True))
    return Schedule(tuple(units), tuple(-(-width // GRID) * GRID for width in widths))


def disguise(model: nn.Module, schedule: Schedule) -> Disguised:
    """Rewrite a network of convolutions with equal outputs in evaluation mode.

    Args:
        model: Convolutions of at most 3×3 with same padding, batch norms, ReLU or ReLU6, additions,
            and a linear classifier of channel means.
        schedule: Of ``plan_schedule``.

    Raises:
        UsageError: Another operator, or a network larger than the schedule.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("mobilenetv1_100", num_classes=4).eval()
        >>> Disguised is type(disguise(model, plan_schedule([model])))
        True
    """
    units, head, last = _units(model)
    stages = _stages(_layouts(units, last))
    if len(stages) != len(schedule.units):
        raise UsageError(
            f"the network has {len(stages)} stages, the schedule {len(schedule.units)}"
        )
    built: list[nn.Module] = []
    before = schedule.channels[0]
    for stage, needed, count, width in zip(stages, _widths(stages), *schedule, strict=True):
        if len(stage) > count or needed > width:
            raise UsageError("the network is larger than its schedule; plan one with it")
        for layout in stage:
            built.append(_pad(layout, before, width))
            before = width
        built += [_identity(width, head.weight.dtype) for _ in range(count - len(stage))]
    start, end = stages[-1][-1].after[last]
    wide = nn.Linear(before, head.out_features).to(head.weight.dtype)
    wide.weight.data = F.pad(head.weight.detach(), (start, before - end))
    wide.bias.data = torch.zeros_like(wide.bias) if head.bias is None else head.bias.detach()
    return Disguised(built, wide, schedule.channels[0]).eval()


def _units(model: nn.Module) -> tuple[list[_Unit], nn.Linear, str]:
    """Read a network as units, its classifier, and the value that this takes the means of."""
    graph = trace(model.eval())
    if graph is None:
        raise UsageError(f"{type(model).__name__} can't be traced")
    modules = dict(graph.named_modules())
    units: list[_Unit] = []
    names: dict[str, str] = {}  # of nodes that pass a value on
    head: nn.Linear | None = None
    pooled: str | None = None
    answer = ""  # of the head
    for node in graph.graph.nodes:
        inputs = [names.get(each.name, each.name) for each in node.all_input_nodes]
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if node.op == "output" and head is not None and inputs != [answer]:
            raise UsageError(f"the logits and nothing else can be disguised, not {inputs}")
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if isinstance(module, nn.Conv2d) and pooled is None:
            units.append(_dense(module, inputs[0], node.name))
        elif isinstance(module, BatchNorm) and _is_last(units, inputs) and pooled is None:
            _require_alone(node, names, inputs[0])
            units[-1] = _folded(units[-1], module)
            names[node.name] = inputs[0]
            act = getattr(module, "act", None)  # timm's norms have an activation
            if isinstance(act, nn.Module) and not isinstance(act, nn.Identity):
                units[-1] = _clamped(units[-1], inputs[0], _bound(act))
        elif _is_sum(node) and len(inputs) == 2 and units and pooled is None:
            _require_alone(node, names, units[-1].writes)
            units[-1] = _added(units[-1], inputs)
            names[node.name] = units[-1].writes
        elif (_name_of(node) in ACTIVATIONS or isinstance(module, nn.ReLU | nn.ReLU6)) and (
            units and pooled is None
        ):
            bound = _bound(module) if module is not None else ACTIVATIONS[_name_of(node)]
            _require_alone(node, names, inputs[0])
            units[-1] = _clamped(units[-1], inputs[0], bound)
            names[node.name] = inputs[0]
        elif isinstance(module, nn.Linear) and inputs == [pooled]:
            head, answer = module, node.name
        elif _is_pooling(node, module):
            pooled, names[node.name] = pooled or inputs[0], inputs[0]
        elif isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d | nn.Flatten) or (
            _name_of(node) in ("flatten", "dropout")
        ):
            names[node.name] = inputs[0]
        else:
            raise UsageError(
                f"{node.target} can't be disguised here: it takes convolutions up to 3×3, norms "
                "and activations behind them, sums, and one linear classifier of means"
            )
    if head is None or pooled is None or not units:
        raise UsageError("a network of convolutions with a linear classifier of means is needed")
    return units, head, pooled


def _dense(module: nn.Conv2d, reads: str, writes: str) -> _Unit:
    """Write a convolution as a dense 3×3 one."""
    size, stride = module.kernel_size[0], module.stride[0]
    same = tuple(size_ // 2 for size_ in module.kernel_size)
    if size not in (1, 3) or module.kernel_size[1] != size or module.padding not in (same, "same"):
        raise UsageError(f"a convolution of {module.kernel_size}, padding {module.padding}: only "
                         "1×1 and 3×3 with same padding can be disguised")  # fmt: skip
    if module.padding_mode != "zeros" or type(module).forward is not nn.Conv2d.forward:
        raise UsageError(f"{module}: only plain convolutions with zeros around can be disguised")
    if stride not in (1, 2) or module.stride[1] != stride or module.dilation != (1, 1):
        raise UsageError("only convolutions of stride 1 or 2 without dilation can be disguised")
    weight = module.weight.detach()
    if size == 1:
        weight = F.pad(weight, (1, 1, 1, 1))
    outputs, inputs = module.out_channels // module.groups, module.in_channels // module.groups
    dense = weight.new_zeros(module.out_channels, module.in_channels, 3, 3)
    for group in range(module.groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        dense[rows, group * inputs : (group + 1) * inputs] = weight[rows]
    bias = weight.new_zeros(module.out_channels) if module.bias is None else module.bias.detach()
    return _Unit(dense, bias, -torch.inf, torch.inf, stride, reads, None, writes)


def _folded(unit: _Unit, norm: Any) -> _Unit:
    if unit.low == 0 or unit.adds is not None or norm.running_var is None:
        raise UsageError("only a norm right behind a convolution, with means of training, can be "
                         "disguised")  # fmt: skip
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach()
    shift = 0.0 if norm.bias is None else norm.bias.detach()
    bias = (unit.bias - norm.running_mean) * scale + shift
    return unit._replace(weight=unit.weight * scale[:, None, None, None], bias=bias)


def _added(unit: _Unit, inputs: Sequence[str]) -> _Unit:
    others = [name for name in inputs if name != unit.writes]
    if len(others) != 1 or unit.adds is not None or unit.low == 0:
        raise UsageError("only the sum of a convolution and an earlier value can be disguised")
    return unit._replace(adds=others[0])


def _is_sum(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in ADDS and not node.kwargs


def _is_last(units: Sequence[_Unit], inputs: Sequence[str]) -> bool:
    return bool(units) and units[-1].writes == inputs[0]


def _require_alone(node: fx.Node, names: Mapping[str, str], value: str) -> None:
    """Require a value that is changed to be read by nothing else.

    Raises:
        UsageError: It is also read as it was before.
    """
    holders = [each for each in node.graph.nodes if names.get(each.name, each.name) == value]
    if any(len(each.users) > 1 for each in holders):
        raise UsageError(
            f"{value} is read before and behind {node.name}: this can't be disguised, only what "
            "is read at the end of its norm, activation and sum"
        )


def _name_of(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _bound(act: nn.Module) -> float:
    """Return the upper bound of a ReLU or ReLU6."""
    if not isinstance(act, nn.ReLU | nn.ReLU6):
        raise UsageError(f"{type(act).__name__} can't be disguised; take ReLU or ReLU6")
    return 6.0 if isinstance(act, nn.ReLU6) else torch.inf


def _clamped(unit: _Unit, value: str, high: float) -> _Unit:
    if unit.writes != value or unit.low == 0:
        raise UsageError("only an activation behind a convolution can be disguised")
    return unit._replace(low=0.0, high=high)


def _is_pooling(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a node takes means over all places."""
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    if _name_of(node) not in ("mean", "adaptive_avg_pool2d"):
        return False
    named = "dim" if _name_of(node) == "mean" else "output_size"
    given = node.kwargs.get(named, node.args[1] if len(node.args) > 1 else None)
    if named == "output_size":
        return given in (1, (1, 1), [1, 1])
    return isinstance(given, list | tuple) and {int(each) % 4 for each in given} == {2, 3}


def _layouts(units: Sequence[_Unit], last: str) -> list[_Layout]:
    """Place the values that are still needed in the channels of states."""
    image = units[0].reads
    widths = {unit.writes: len(unit.weight) for unit in units} | {image: units[0].weight.shape[1]}
    uses: dict[str, int] = {}
    for number, unit in enumerate(units):
        for name in filter(None, (unit.reads, unit.adds)):
            uses[name] = number
    uses[last] = len(units)
    found, before = [], {image: (0, widths[image])}
    for number, unit in enumerate(units):
        kept = [name for name in before if uses[name] > number]
        if unit.stride > 1 and (kept or unit.adds is not None):
            raise UsageError(
                "a value that is kept across a change of resolution can't be disguised"
            )
        after, place = {}, 0
        for name in (unit.writes, *kept):
            after[name] = (place, place + widths[name])
            place += widths[name]
        found.append(_Layout(unit, before, after))
        before = after
    return found


def _stages(layouts: Sequence[_Layout]) -> list[list[_Layout]]:
    """Part units before each change of resolution."""
    stages: list[list[_Layout]] = [[]]
    for layout in layouts:
        if layout.unit.stride > 1 and stages[-1]:
            stages.append([])
        stages[-1].append(layout)
    return stages


def _widths(stages: Sequence[Sequence[_Layout]]) -> list[int]:
    """Return the channels that each stage needs, the first for the images too."""
    layouts = [[layout.after for layout in stage] for stage in stages]
    layouts[0].append(stages[0][0].before)
    return [max(end for each in stage for _, end in each.values()) for stage in layouts]


def _pad(layout: _Layout, before: int, width: int) -> _Padded:
    """Build the unit between padded states."""
    unit = layout.unit
    weight = unit.weight.new_zeros(width, before, 3, 3)
    bias, low = unit.bias.new_zeros(width), unit.bias.new_full((width,), -torch.inf)
    high = -low
    start, end = layout.after[unit.writes]
    begin, stop = layout.before[unit.reads]
    weight[start:end, begin:stop] = unit.weight
    bias[start:end], low[start:end], high[start:end] = unit.bias, unit.low, unit.high
    keeps = [(name, place) for name, place in layout.after.items() if name != unit.writes]
    keeps += [(unit.adds, (start, end))] if unit.adds is not None else []
    for name, (first, after) in keeps:
        rows = torch.arange(first, after)
        weight[rows, rows - first + layout.before[name][0], 1, 1] += 1
    return _Padded(weight, bias, low, high, unit.stride)


def _identity(width: int, dtype: torch.dtype) -> _Padded:
    """Build a unit that changes nothing."""
    weight = torch.zeros(width, width, 3, 3, dtype=dtype)
    weight[range(width), range(width), 1, 1] = 1
    high = torch.full((width,), torch.inf, dtype=dtype)
    return _Padded(weight, torch.zeros(width, dtype=dtype), -high, high, 1)
