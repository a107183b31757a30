"""Critical initialisation of a model, in place.

Without norms, weights have the variance C_W / fan-in and biases C_b of the activation's critical
point, the first layer brings its inputs to K*, and the classifier has variance 1 / fan-in.

With norms, signals have mean square 1 before each layer whatever its weights, so all have variance
1 / fan-in, and only the residual sum can grow: n changes by different weights add as √n, T changes
by the same weights as T (``critical.residual_kernels``). The last layer of a residual branch is
therefore divided by T √n, which leaves the sum at about twice its start for any T.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smallfry.curvature.layers import input_of
from smallfry.errors import UsageError
from smallfry.models.critical import Criticality, find_critical
from smallfry.transforms.modes import evaluating
from smallfry.transforms.norms import is_norm

__all__ = ["Initialised", "activation_of", "init_critical_"]

BRANCH_ENDS = ("proj", "fc2")  # timm's names of the last layer of a residual branch
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
MODULES = {  # of PyTorch and timm, by the names of their classes
    **{"ReLU": "relu", "LeakyReLU": "leaky_relu_0.01", "Tanh": "tanh", "GELU": "gelu"},
    **{"SiLU": "silu", "Swish": "silu", "Mish": "mish", "Hardswish": "hardswish"},
    **{"HardSwish": "hardswish", "ELU": "elu", "SELU": "selu", "Sigmoid": "sigmoid"},
    **{"Softplus": "softplus", "GELUTanh": "gelu_tanh"},
}


class Initialised(NamedTuple):
    """Changes of a critical initialisation.

    Attributes:
        layers: Names of the initialised layers, in the order of their first calls.
        point: Critical point of the activation; None with norms.
        uses: Calls of the last layer of a residual branch in a pass, by its name.
    """

    layers: tuple[str, ...]
    point: Criticality | None
    uses: dict[str, int]


def activation_of(model: nn.Module) -> str:
    """Return the name of a model's activation.

    Raises:
        UsageError: Its modules have none, or several kinds.
    """
    found = {MODULES[type(m).__name__] for m in model.modules() if type(m).__name__ in MODULES}
    if len(found) != 1:
        listed = ", ".join(sorted(found)) or "none"
        raise UsageError(
            f"critical initialisation needs one kind of activation among the modules, found "
            f"{listed}; name it (activation=)"
        )
    return found.pop()


@torch.no_grad()
def init_critical_(model: nn.Module, images: Tensor, activation: str | None = None) -> Initialised:
    """Initialise all trainable linear layers and convolutions critically.

    Args:
        model: Changed in place; norms, positions and frozen layers stay.
        images: Inputs (images, …), normalised; they show the order of the layers, and the mean
            square that the first one starts from.
        activation: Name of the activation, where the model has no norms; default ``activation_of``.

    Raises:
        UsageError: No activation is known, it has no critical point, no layer is trainable, or the
            weight of one is computed from other parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
        >>> init_critical_(model, torch.randn(16, 8)).point.weight
        1.0
    """
    calls = _calls(model, images)
    modules = dict(model.named_modules())
    computed = next((n for n in calls if "weight" not in modules[n]._parameters), None)
    if computed is not None:
        raise UsageError(
            f"the weight of '{computed}' is computed from other parameters: initialise the model "
            "before nn.utils.parametrize, weight_norm or prune change it"
        )
    trainable = [name for name in calls if _weight(modules[name]).requires_grad]
    if not trainable:
        raise UsageError("critical initialisation found no trainable linear layer or convolution")
    if any(map(is_norm, modules.values())):
        uses = {n: calls[n][0] for n in trainable if n.rpartition(".")[2] in BRANCH_ENDS}
        for name in trainable:
            divisor = uses[name] * math.sqrt(len(uses)) if name in uses else 1.0
            _fill(modules[name], 1 / divisor**2, 0.0)
        return Initialised(tuple(trainable), None, uses)
    point = find_critical(activation or activation_of(model))
    first, *inner = trainable
    if inner:
        *inner, last = inner
        _fill(modules[last], 1.0, 0.0)
    _fill(modules[first], point.first_weight(calls[first][1]), point.bias)
    for name in inner:
        _fill(modules[name], point.weight, point.bias)
    return Initialised(tuple(trainable), point, {})


def _calls(model: nn.Module, images: Tensor) -> dict[str, tuple[int, float]]:
    """Count the calls of layers in a pass, with the mean square of each one's first input."""
    found: dict[str, tuple[int, float]] = {}

    def note(name: str, inputs: Tensor) -> None:
        count, square = found.get(name, (0, float(inputs.double().square().mean())))
        found[name] = (count + 1, square)

    handles = [
        module.register_forward_pre_hook(
            lambda _, given, named, name=name: note(name, input_of(given, named)), with_kwargs=True
        )
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    try:
        with evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _fill(module: nn.Module, weight: float, bias: float) -> None:
    """Draw a layer's weights and biases from normal distributions of variances."""
    matrix = _weight(module)
    nn.init.normal_(matrix, std=math.sqrt(weight / matrix[0].numel()))
    if isinstance(module.bias, Tensor):
        nn.init.normal_(module.bias, std=math.sqrt(bias))
