"""Folding of batch norms into the convolutions before them, for quantization.

The network computes what it did: the norm's scale becomes one of the weights, which a quantizer
with a scale for each output channel follows, and its shift a bias.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from smallfry._torch import BatchNorm
from smallfry.compress.prune.regions import trace
from smallfry.compress.select import chosen
from smallfry.errors import UsageError
from smallfry.training.method import Method, register_method
from smallfry.transforms.folded import Fold, fold_weights, pair_of
from smallfry.transforms.spec import Transform


@register_method
@dataclass(frozen=True)
class FoldBatchNorm:
    """Batch norms folded into the convolutions before them; put it before ``quantize``.

    Args:
        include: Shell patterns of the convolutions' names.
        exclude: Patterns of convolutions that keep their norm.

    Example:
        >>> import timm, smallfry
        >>> from smallfry.compress import FoldBatchNorm, apply_to_model
        >>> model = timm.create_model("resnet8_mlperf_tiny")
        >>> small, spec = apply_to_model(model, [FoldBatchNorm()])
        >>> any("norm" in type(each).__name__.lower() for each in small.modules())
        False
    """

    name: ClassVar[str] = "fold_batch_norm"
    trains: ClassVar[bool] = False

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Folding(self)


class _Folding(Method):
    def __init__(self, settings: FoldBatchNorm) -> None:
        self._settings = settings

    def finish(self, model: nn.Module) -> Transform | None:
        settings = self._settings
        pairs = find_pairs(model)
        names = chosen(
            pairs, settings.include, settings.exclude, "convolution with a batch norm after it"
        )
        fold = Fold({name: pairs[name] for name in names})
        weights = {n: fold_weights(*pair_of(model, n, norm)) for n, norm in fold.norms.items()}
        fold.apply(model)
        with torch.no_grad():
            for name, (weight, bias) in weights.items():
                layer = model.get_submodule(name)
                layer.get_parameter("weight").copy_(weight)
                layer.get_parameter("bias").copy_(bias)
        return fold


def find_pairs(model: nn.Module) -> dict[str, str]:
    """Find convolutions whose only reader is a batch norm, both of which are called once.

    Args:
        model: A network whose control flow does not depend on values.

    Returns:
        Names of the norms by those of the convolutions.

    Raises:
        UsageError: The network can't be traced.
    """
    graph = trace(model)
    if graph is None:
        raise UsageError(
            f"fold_batch_norm finds norms in a traced network, and {type(model).__name__} can't be "
            "traced: leave it out"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    used = [id(modules[str(node.target)]) for node in calls]
    shared = {
        id(each)
        for layer in modules.values()
        for each in layer.parameters(recurse=False)
        if sum(each is other for m in {*modules.values()} for other in m._parameters.values()) > 1
    }
    found = {}
    for node in calls:
        norm, before = modules[str(node.target)], node.args[0]
        if not isinstance(norm, BatchNorm) or not norm.track_running_stats:
            continue
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        layer = modules[str(before.target)]
        alone = used.count(id(layer)) == used.count(id(norm)) == 1
        own = not any(id(p) in shared for m in (layer, norm) for p in m.parameters())
        if alone and own and type(layer) in (nn.Conv1d, nn.Conv2d):
            found[str(before.target)] = str(node.target)
    return found
