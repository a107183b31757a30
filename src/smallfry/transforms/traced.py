"""Channel groups of convolutions and linear layers, by Torch-Pruning's dependency graph.

The graph is not to be trusted with a module that is called more than once, and on some models it
never returns: such modules are left out, it has a limit of time, and every group is verified by
the caller. Torch-Pruning (MIT) is optional: ``pip install 'smallfry[compress]'``.
"""

import copy
import ctypes
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from smallfry.errors import SmallfryWarning
from smallfry.transforms.groups import ChannelGroup, Slice
from smallfry.transforms.modes import evaluating
from smallfry.transforms.resize import CONVOLUTIONS, TRANSPOSED
from smallfry_runtime.background import BackgroundThread

SECONDS = 20.0
UNKNOWN = (nn.GRU, nn.RNN)  # to Torch-Pruning, unlike nn.LSTM
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
T = TypeVar("T")


def traced_groups(
    model: nn.Module, example: Tensor, skip: Collection[str] = (), seconds: float = SECONDS
) -> list[ChannelGroup]:
    """Find groups of channels, unverified.

    Args:
        model: Left as it is.
        example: A batch of inputs.
        skip: Names of layers whose channels are known already.
        seconds: Limit of time; a graph that takes longer is given up, with a warning.
    """
    layers = [name for name, m in model.named_modules() if isinstance(m, LAYERS)]
    calls = _calls(model, example)
    if not any(calls[name] == 1 and name not in skip for name in layers):
        return []
    if any(count > 1 for name, count in calls.items() if name in layers):
        return []  # the graph follows one call of each module
    try:
        import torch_pruning
    except ImportError:
        if any(isinstance(m, CONVOLUTIONS + TRANSPOSED) for m in model.modules()):
            warnings.warn(
                "finding channels of convolutions needs Torch-Pruning: pip install "
                "'smallfry[compress]'",
                SmallfryWarning,
                stacklevel=3,
            )
        return []
    traced = copy.deepcopy(model).eval()
    try:
        return _within(seconds, lambda: _groups(torch_pruning, traced, example, skip))
    except TimeoutError:
        reason = f"took longer than {seconds:g} s"
    except Exception as error:  # of a graph that does not fit it
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
    warnings.warn(
        f"Torch-Pruning found no groups of {type(model).__name__} ({reason}): only known blocks "
        f"can be cut",
        SmallfryWarning,
        stacklevel=3,
    )
    return []


def _groups(
    library: Any, model: nn.Module, example: Tensor, skip: Collection[str]
) -> list[ChannelGroup]:
    names = {id(module): name for name, module in model.named_modules()}
    ignored = [model.get_submodule(name) for name in skip]
    classifier = getattr(model, "get_classifier", lambda: None)()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recurrent = dict.fromkeys(UNKNOWN, library.pruner.function.LSTMPruner())
        for module in model.modules():
            if isinstance(module, UNKNOWN):
                module.forward = partial(_as_one_node, module)  # type: ignore[method-assign]
        graph = library.DependencyGraph()
        graph.build_dependency(model, example, customized_pruners=recurrent)
        if isinstance(classifier, nn.Module):
            ignored.append(classifier)
        every = list(graph.get_all_groups(ignored, list(LAYERS)))
    found = [_group(graph, each, names) for each in every]
    return [group for group in found if group is not None]


class _OneNode(torch.autograd.Function):
    """Recurrent layer as one node of the graph, whose operations on time steps mislead it."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, inputs: Tensor, state: Any) -> Any:
        outputs, last = type(module).forward(module, inputs, state)
        return outputs, last


def _as_one_node(module: nn.Module, inputs: Tensor, state: Tensor | None = None) -> Any:
    return _OneNode.apply(module, inputs, state)


def _group(graph: Any, items: Any, names: dict[int, str]) -> ChannelGroup | None:
    """Convert a group to ``ChannelGroup``; None if its channels differ in kind."""
    root = items[0]
    channels = len(root.idxs)
    zeroed: list[Slice] = []
    others: list[Slice] = []
    for item in items:
        module = item.dep.target.module
        name = names.get(id(module))
        if name is None:  # an operation without weights
            continue
        entries = _entries(item.idxs, item.root_idxs, channels)
        is_out = graph.is_out_channel_pruning_fn(item.dep.handler)
        if entries is None or not _is_known(module, is_out):
            return None
        is_turned = isinstance(module, TRANSPOSED)
        if is_out:
            zeroed += [
                Slice(f"{name}.{p}", int(is_turned and p == "weight"), entries)
                for p in module._parameters
                if module._parameters[p] is not None
            ]
            others += [
                Slice(f"{name}.{b}", 0, entries)
                for b, buffer in module._buffers.items()
                if buffer is not None and buffer.ndim
            ]
        elif isinstance(module, nn.RNNBase):
            inputs = [p for p in module._parameters if p.startswith("weight_ih_l0")]
            others += [Slice(f"{name}.{p}", 1, entries) for p in inputs]
        else:
            others.append(Slice(f"{name}.weight", int(not is_turned), entries))
    if not zeroed:
        return None
    name = names[id(root.dep.target.module)]
    return ChannelGroup(name, channels, _merged(zeroed), _merged([*zeroed, *others]))


def _is_known(module: nn.Module, is_out: bool) -> bool:
    """Return whether a layer's shape follows from its weight: ungrouped or depthwise.

    Of recurrent layers, that of the inputs does.
    """
    if isinstance(module, CONVOLUTIONS):
        return module.groups in (1, module.out_channels)
    if isinstance(module, TRANSPOSED):
        return module.groups == 1
    if isinstance(module, nn.RNNBase):
        return not is_out
    return isinstance(module, nn.Linear | nn.modules.batchnorm._NormBase)


def _entries(positions: Any, roots: Any, channels: int) -> Tensor | None:
    """Return positions by channel, (channels, positions per channel); None if uneven."""
    rows: list[list[int]] = [[] for _ in range(channels)]
    for position, root in zip(positions, roots, strict=True):
        if not 0 <= int(root) < channels:
            return None
        rows[int(root)].append(int(position))
    sizes = {len(row) for row in rows}
    return torch.tensor(rows) if len(sizes) == 1 and sizes != {0} else None


def _merged(slices: list[Slice]) -> tuple[Slice, ...]:
    """Deduplicate slices: the graph reaches a layer on several paths."""
    seen: dict[tuple[str, int, bytes], Slice] = {}
    for each in slices:
        seen.setdefault((each.tensor, each.dim, each.entries.numpy().tobytes()), each)
    return tuple(seen.values())


@torch.no_grad()
def _calls(model: nn.Module, example: Tensor) -> Counter[str]:
    """Count the calls of each module in one forward pass."""
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name, module in model.named_modules()
    ]
    try:
        with evaluating(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Run Python code in its thread with a time limit, enforced by an exception.

    Raises:
        TimeoutError: It took longer.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = BackgroundThread(run)
    if not thread.start():
        raise MemoryError("no memory for another thread")
    ended = thread.wait(seconds)
    while not ended and thread.ident is not None:
        raised = ctypes.py_object(TimeoutError)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), raised)
        ended = thread.wait(0.1)
    thread.join()
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError("a thread did not begin")
    return results[0]
