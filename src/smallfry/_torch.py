"""Private names of PyTorch, all of them here: what a new version moves is mended in one file.

``tests/test_private_torch.py`` names what is missing, and what is used elsewhere.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import UntypedStorage, nn
from torch import _disable_dynamo as disable_dynamo  # type: ignore[attr-defined]
from torch import _foreach_norm as foreach_norm
from torch._C import _current_autograd_node as current_autograd_node
from torch._C import _current_graph_task_id as current_graph_task_id
from torch._C import _get_mkldnn_enabled as is_onednn_enabled
from torch._C import _set_mkldnn_enabled as enable_onednn
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import Variable
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "BatchNorm",
    "TorchDispatchMode",
    "after_backward",
    "aliases_of",
    "current_autograd_node",
    "current_graph_task_id",
    "disable_dynamo",
    "enable_onednn",
    "flat_weight_names",
    "foreach_norm",
    "has_forward_hooks",
    "is_fake",
    "is_functorch_wrapped_tensor",
    "is_onednn_enabled",
    "is_transformed",
    "storage_key",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "without_onednn",
]


def is_transformed() -> bool:
    """Return whether code runs inside a transform of ``torch.func``, such as ``vmap``."""
    return peek_interpreter_stack() is not None


def after_backward(function: Callable[[], None]) -> None:
    """Call a function at the end of the current backward pass."""
    engine: Any = Variable._execution_engine
    engine.queue_callback(function)


@contextmanager
def without_onednn() -> Iterator[None]:
    """Compute without oneDNN, whose operators have no higher derivatives.

    The public ``torch.backends.mkldnn.flags`` warns of TF32 on machines that do not have it.
    """
    before = is_onednn_enabled()
    enable_onednn(False)
    try:
        yield
    finally:
        enable_onednn(before)


def aliases_of(operator: Any) -> list[Any]:
    """List what the outputs of an operator share with its inputs; None for new tensors."""
    return [each.alias_info for each in operator._schema.returns]


def storage_key(storage: UntypedStorage) -> int:
    """Return a number that no other storage has at the same time, on any device."""
    return int(storage._cdata)


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward hooks or forward pre-hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def flat_weight_names(module: nn.RNNBase) -> list[str]:
    """Return the names of a recurrent layer's weights, in PyTorch's order."""
    return list(cast(Any, module)._flat_weights_names)
