"""PyTorch's RNN, LSTM and GRU, decomposed into layer calls at every step.

Their fused functions hide what is added up inside the gates. While curvature is taken, the forward
is spelled out: for each layer and direction the inputs of all steps are multiplied with one weight
at once, and the states with the other one step after the other. So each weight is a linear layer
that a sample uses once a step, and both biases are columns of their own. Packed sequences run
padded: behind the end of a sequence its state stays, and no gradient comes back from there.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from smallfry._torch import flat_weight_names
from smallfry.curvature.spelled import Host, Part

State = tuple[Tensor, ...]  # (batch, features) each: h, and of an LSTM c
KINDS = (nn.RNN, nn.LSTM, nn.GRU)


def is_recurrent(module: nn.Module) -> bool:
    """Return whether a module is PyTorch's own RNN, LSTM or GRU, with its own parameters."""
    kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
    return (
        kind is not None
        and type(module).forward is kind.forward
        and "forward" not in module.__dict__
        and all(name in module._parameters for name in flat_weight_names(cast(nn.RNNBase, module)))
    )


def host_of_recurrent(module: nn.RNNBase) -> Host:
    """Wrap a recurrent module as a host of two or three layers per layer and direction."""
    parts = {}
    for end in _ends(module):
        for name in ("ih", "hh", "hr"):
            weight = module._parameters.get(f"weight_{name}{end}")
            if weight is not None:
                parts[name + end] = Part(weight, module._parameters.get(f"bias_{name}{end}"))
    return Host(module, parts, partial(_run, module, parts))


def _ends(module: nn.RNNBase) -> list[str]:
    """Return the suffix of the parameter names of each layer and direction."""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"_l{layer}{way}" for layer in range(module.num_layers) for way in directions]


def _run(
    module: nn.RNNBase,
    parts: dict[str, Part],
    input: Tensor | PackedSequence,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Any:
    """Compute the forward of a recurrent module from its layers."""
    packed = isinstance(input, PackedSequence)
    there: Tensor | None = None  # (steps, batch, 1): whether a sequence has not ended
    if isinstance(input, PackedSequence):
        x, lengths = pad_packed_sequence(input)
        steps = torch.arange(len(x), device=x.device)
        there = (steps[:, None] < lengths.to(x.device))[..., None]
    else:
        x = input
    single = x.ndim == 2
    if single:
        x = x[:, None]
    elif module.batch_first and not packed:
        x = x.transpose(0, 1)
    given: State | None = None if hx is None else (hx,) if isinstance(hx, Tensor) else hx
    if given is not None and single:
        given = tuple(s[:, None] for s in given)
    outputs, states = _layers(module, parts, x, given, there)
    last: Any = states if module.mode == "LSTM" else states[0]
    if isinstance(input, PackedSequence):
        return _packed_as(outputs, lengths, input), last
    if single:
        last = tuple(s[:, 0] for s in states)
        return outputs[:, 0], last if module.mode == "LSTM" else last[0]
    return outputs.transpose(0, 1) if module.batch_first else outputs, last


def _layers(
    module: nn.RNNBase,
    parts: dict[str, Part],
    x: Tensor,
    given: State | None,
    there: Tensor | None,
) -> tuple[Tensor, State]:
    """Run all layers on inputs (steps, batch, features); return outputs and last states."""
    directions = 2 if module.bidirectional else 1
    ends, last = _ends(module), list[State]()
    for layer in range(module.num_layers):
        found = []
        for way in range(directions):
            number = layer * directions + way
            begin = _begin(module, x) if given is None else tuple(s[number] for s in given)
            outputs, state = _direction(module, parts, ends[number], x, begin, there, way == 1)
            found.append(outputs)
            last.append(state)
        x = found[0] if directions == 1 else torch.cat(found, 2)
        if module.dropout and module.training and layer < module.num_layers - 1:
            x = F.dropout(x, module.dropout)
    return x, tuple(torch.stack(each) for each in zip(*last, strict=True))


def _begin(module: nn.RNNBase, x: Tensor) -> State:
    """Return the initial state of zeros."""
    h = x.new_zeros(x.shape[1], module.proj_size or module.hidden_size)
    return (h, x.new_zeros(x.shape[1], module.hidden_size)) if module.mode == "LSTM" else (h,)


def _direction(
    module: nn.RNNBase,
    parts: dict[str, Part],
    end: str,
    x: Tensor,
    state: State,
    there: Tensor | None,
    backward: bool,
) -> tuple[Tensor, State]:
    """Run one layer in one direction."""
    cell = CELLS[module.mode]
    project: Callable[[Tensor], Tensor] = parts.get(f"hr{end}", lambda h: h)
    seen = parts[f"ih{end}"](x.transpose(0, 1)).transpose(0, 1)  # samples are in front in a layer
    outputs: list[Tensor] = [x] * len(x)
    steps: Iterable[int] = reversed(range(len(x))) if backward else range(len(x))
    for step in steps:
        h, *rest = cell(seen[step], parts[f"hh{end}"](state[0]), state)
        new = (project(h), *rest)
        outputs[step] = new[0]
        if there is not None:
            new = tuple(torch.where(there[step], n, s) for n, s in zip(new, state, strict=True))
        state = new
    return torch.stack(outputs), state


def _lstm(a: Tensor, b: Tensor, state: State) -> State:
    i, f, g, o = (a + b).chunk(4, 1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(a: Tensor, b: Tensor, state: State) -> State:
    (r, z, n), (hr, hz, hn) = a.chunk(3, 1), b.chunk(3, 1)
    new = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return (new + torch.sigmoid(z + hz) * (state[0] - new),)


def _tanh(a: Tensor, b: Tensor, state: State) -> State:
    return (torch.tanh(a + b),)


def _relu(a: Tensor, b: Tensor, state: State) -> State:
    return (torch.relu(a + b),)


CELLS = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}


def _packed_as(outputs: Tensor, lengths: Tensor, like: PackedSequence) -> PackedSequence:
    """Pack padded outputs in the order of the inputs."""
    order = like.sorted_indices
    if order is not None:
        outputs, lengths = outputs[:, order], lengths[order.to(lengths.device)]
    data = pack_padded_sequence(outputs, lengths).data
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
