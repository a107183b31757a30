"""Assignment of parameters to curvature blocks, with the reason for each exclusion."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from smallfry.curvature.attention import can_spell_out, host_of_attention
from smallfry.curvature.layers import (
    COVERED,
    groups_of,
    matrix_to_weight,
    outputs_of,
    weight_to_matrix,
)
from smallfry.curvature.products import computes, is_transposed, same_product
from smallfry.curvature.recurrent import host_of_recurrent, is_recurrent
from smallfry.curvature.spelled import Host, Part
from smallfry.errors import UsageError, nearest

TIED = {nn.Linear, nn.Embedding}


@dataclass(frozen=True, eq=False)
class Block:
    """Linear map [W b] with all its modules.

    Args:
        name: Name of its weight, or of its bias where the weight is frozen.
        layers: The modules that apply it, by name.
        weight: The weight, shared by all layers.
        biases: The trained biases, each one column.
        parameters: Its trained parameters by name: the weight, unless frozen, then the biases.
        shape: (groups, outputs, inputs) of the matrix.
        hosts: Modules that call some of these layers only while their forward is spelled out.
    """

    name: str
    layers: dict[str, nn.Module]
    weight: nn.Parameter
    biases: tuple[nn.Parameter, ...]
    parameters: dict[str, nn.Parameter]
    shape: tuple[int, int, int]
    hosts: tuple[Host, ...] = ()

    @property
    def has_weight(self) -> bool:
        """True if the weight is trained, and so has columns."""
        return any(p is self.weight for p in self.parameters.values())

    @property
    def one_hot(self) -> bool:
        """True for an embedding whose weight is not shared with another layer."""
        return isinstance(self.module, nn.Embedding)

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        groups, outputs, inputs = self.shape
        return groups * outputs * inputs

    @property
    def module(self) -> nn.Module:
        """First layer of the block."""
        return next(iter(self.layers.values()))

    def bias_column(self, module: nn.Module) -> int | None:
        """Return the index of the bias column that a layer uses."""
        bias = module._parameters.get("bias")
        return next((i for i, own in enumerate(self.biases) if own is bias), None)

    def to_matrix(self, tensors: dict[str, Tensor]) -> Tensor:
        """Reshape tensors like the parameters, by name, to one matrix (groups, outputs, inputs)."""
        groups, outputs, _ = self.shape
        columns = []
        for name, parameter in self.parameters.items():
            if parameter is self.weight:
                columns.append(weight_to_matrix(self.module, tensors[name]))
            else:
                columns.append(tensors[name].reshape(groups, outputs, 1))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=2)

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """Invert ``to_matrix``."""
        tensors, start = {}, 0
        for name, parameter in self.parameters.items():
            if parameter is self.weight:
                start = self.shape[2] - len(self.biases)
                tensors[name] = matrix_to_weight(self.module, matrix[..., :start])
            else:
                tensors[name] = matrix[..., start].reshape(parameter.shape)
                start += 1
        return tensors


class Coverage(NamedTuple):
    """Trained parameters of a model: those in blocks, and the others with the reason."""

    blocks: tuple[Block, ...]
    uncovered: dict[str, str]


def cover(
    model: nn.Module,
    trained: Collection[nn.Parameter] | None = None,
    exclude: Iterable[str] = (),
    tied: bool = True,
) -> Coverage:
    """Divide the trained parameters of a model into blocks and uncovered ones.

    Covered are Linear, Conv1d, Conv2d and ConvTranspose2d whose ``forward`` is PyTorch's own,
    subclasses that compute the same or promise to with an attribute ``acts_as``, transformers'
    Conv1D, Embedding, both projections of PyTorch's MultiheadAttention, and all weights of its RNN,
    LSTM and GRU. Embeddings of fewer rows than features, as of segments, are not: covered, they
    made a small BERT train far worse (docs/natural_gradient.md, "Limits").

    Args:
        model: The model.
        trained: The parameters to train; default those that require a gradient.
        exclude: Modules not to cover, by name or pattern (``"head"``, ``"blocks.*"``).
        tied: Cover a weight that an embedding has in common with a linear layer; its rows are known
            for one draw only.

    Raises:
        UsageError: ``exclude`` names no module.

    Example:
        >>> import torch
        >>> from smallfry.curvature import cover
        >>> coverage = cover(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)))
        >>> [block.shape for block in coverage.blocks], sorted(coverage.uncovered)
        ([(1, 3, 5)], ['1.bias', '1.weight'])
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    chosen = {p for p in names if p.requires_grad}
    if trained is not None:
        chosen &= set(trained)
    users, hosts, reasons = _use(model, _excluded(model, exclude))
    blocks, taken = list[Block](), set[nn.Parameter]()
    for weight, found in users.items():
        layers = _in_order(found, weight in chosen)
        if not tied and len({isinstance(m, nn.Embedding) for m in layers.values()}) > 1:
            reasons.setdefault(weight, "an embedding's and a linear layer's at once: see fisher=")
        block = _block(weight, layers, names, chosen - taken, reasons)
        if block is not None:
            inside = dict.fromkeys(hosts[m] for m in layers.values() if m in hosts)
            blocks.append(replace(block, hosts=tuple(inside)))
            taken.update(block.parameters.values())
    uncovered = {
        name: reasons.get(p, "its layer's weight is used elsewhere, or it belongs to two layers")
        for p, name in names.items()
        if p in chosen and p not in taken
    }
    return Coverage(tuple(blocks), uncovered)


class _Use(NamedTuple):
    """Use of a model's parameters."""

    users: dict[nn.Parameter, dict[str, nn.Module]]  # layers of each weight, by path
    hosts: dict[nn.Module, Host]  # of layers that only a host's forward calls
    reasons: dict[nn.Parameter, str]  # for which a parameter can't be covered


def _use(model: nn.Module, excluded: set[str]) -> _Use:
    """Find the layers that could be covered, and the parameters that can't."""
    users: dict[nn.Parameter, dict[str, nn.Module]] = {}
    hosts: dict[nn.Module, Host] = {}
    reasons: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules():
        reason = _why_not(model, path, module, excluded)
        host = _host_of(module) if reason is None else None
        if host is not None:
            for part, layer in _parts_of(path, host).items():
                hosts[layer] = host
                if part in excluded:
                    reasons |= dict.fromkeys(layer.parameters(), "excluded")
                else:
                    users.setdefault(cast(nn.Parameter, layer.weight), {})[part] = layer
        if isinstance(module, nn.MultiheadAttention) and host is not None:
            hosts[module.out_proj] = host
            others = {"bias_k", "bias_v"} & module._parameters.keys()
            reasons |= {
                p: "a key or value that attention adds"
                for p in map(module._parameters.get, others)
                if p is not None
            }
        if host is not None:
            continue
        for kind, parameter in module._parameters.items():
            if parameter is None:
                continue
            if reason is not None:
                reasons.setdefault(parameter, reason)
            elif kind == "weight":
                users.setdefault(parameter, {})[path] = module
    for bias in _shared_biases(users):
        reasons.setdefault(bias, "its bias is shared by layers with different weights")
    return _Use(users, hosts, reasons)


def _host_of(module: nn.Module) -> Host | None:
    """Return the host of a module whose forward is decomposed; None for others."""
    if isinstance(module, nn.MultiheadAttention) and can_spell_out(module):
        return host_of_attention(module)
    if isinstance(module, nn.RNNBase) and is_recurrent(module):
        return host_of_recurrent(module)
    return None


def _parts_of(path: str, host: Host) -> dict[str, Part]:
    """Return the layers that a host does not have as modules of its own, by their full names."""
    return {f"{path}.{name}".lstrip("."): part for name, part in host.parts.items()}


def _shared_biases(users: dict[nn.Parameter, dict[str, nn.Module]]) -> set[nn.Parameter]:
    """Find biases shared by several weights, which belong to no single block."""
    weights: dict[nn.Parameter, set[nn.Parameter]] = {}
    for weight, layers in users.items():
        for module in layers.values():
            bias = module._parameters.get("bias")
            if bias is not None:
                weights.setdefault(bias, set()).add(weight)
    return {bias for bias, found in weights.items() if len(found) > 1}


def _block(
    weight: nn.Parameter,
    layers: dict[str, nn.Module],
    names: dict[nn.Parameter, str],
    chosen: set[nn.Parameter],
    reasons: dict[nn.Parameter, str],
) -> Block | None:
    kinds = {_kind(module) for module in layers.values()}
    if weight in reasons or (len(kinds) > 1 and {kind for kind, _ in kinds} != TIED):
        return None
    if kinds == {(nn.Embedding, 1)} and weight.shape[0] < weight.shape[1]:
        reasons[weight] = "an Embedding of fewer rows than features is no vocabulary"
        return None
    own = dict.fromkeys(m._parameters.get("bias") for m in layers.values())
    biases = tuple(b for b in own if b is not None and b in chosen and b not in reasons)
    parameters = {names[p]: p for p in ((weight,) if weight in chosen else ()) + biases}
    if not parameters:
        return None
    first = next(iter(layers.values()))
    groups = groups_of(first)
    inputs = weight_to_matrix(first, weight.detach()).shape[2] if weight in chosen else 0
    shape = (groups, outputs_of(first) // groups, inputs + len(biases))
    return Block(next(iter(parameters)), layers, weight, biases, parameters, shape)


def _is_adjusted(module: nn.Embedding) -> bool:
    return module.max_norm is not None or module.scale_grad_by_freq or module.sparse


def _in_order(layers: dict[str, nn.Module], trained: bool) -> dict[str, nn.Module]:
    """Sort the layers of one weight so that the block's form comes first: linear, then embeddings.

    An embedding has nothing but its weight.
    """
    others = {n: m for n, m in layers.items() if not isinstance(m, nn.Embedding)}
    return others if others and not trained else {**others, **layers}


def _kind(module: nn.Module) -> tuple[type, int]:
    base = next((kind for kind in COVERED if isinstance(module, kind)), type(module))
    return base, groups_of(module)


def _excluded(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    paths = list[str]()
    for path, module in model.named_modules():
        host = _host_of(module)
        paths += [path, *(() if host is None else _parts_of(path, host))]
    found: set[str] = set()
    for pattern in patterns:
        matches = [p for p in paths if fnmatchcase(p, pattern)]
        if not matches:
            raise UsageError(
                f"exclude contains '{pattern}', but the model has no such module"
                f"{nearest(pattern, paths)}"
            )
        found.update(p for p in paths for m in matches if p == m or p.startswith(f"{m}."))
    return found


def _why_not(model: nn.Module, path: str, module: nn.Module, excluded: set[str]) -> str | None:
    """Return the reason why a module's own parameters can't be in a block; None if they can."""
    name = type(module).__name__
    if path in excluded:
        return "excluded"
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(False)):
        raise UsageError(
            f"layer '{path}' ({name}) is lazy and has no shape yet: call the model once before "
            f"building the optimizer"
        )
    if any(p.is_complex() for p in module.parameters(False)):
        return f"{name} has complex parameters"
    if any(p.numel() == 0 for p in module.parameters(False)):
        return f"{name} has parameters without numbers"
    if can_spell_out(module) or is_recurrent(module):
        return None
    if is_transposed(module):
        return None if same_product(module, nn.Linear) else f"{name} has a forward of its own"
    covered = next((kind for kind in COVERED if isinstance(module, kind)), None)
    if covered is None:
        return f"{name} is not covered"
    if isinstance(module, nn.Embedding) and _is_adjusted(module):
        return f"{name} with max_norm, scale_grad_by_freq or sparse has other gradients"
    parent = model.get_submodule(path.rpartition(".")[0]) if path else None
    if isinstance(parent, nn.MultiheadAttention) and not can_spell_out(parent):
        return "MultiheadAttention multiplies with its weights without calling its layers"
    if not computes(module, covered):
        return f"{name} has a forward of its own"
    if module._parameters.get("weight") is None:
        return f"the weight of this {name} is computed from other parameters"
    return None
