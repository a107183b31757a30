"""Local Fisher layers: a reparametrisation for natural gradient by gradient descent.

A layer y = [W b] a with metrics A on its inputs (homogeneous: with a 1 behind, where there is a
bias) and G on its outputs is written as

    [W b] = S_g⁻¹ V S_a⁻¹,    S_a = A^½,  S_g = G^½,

and V is trained. As ∇_V = S_g⁻¹ ∇_W S_a⁻¹, a step of gradient descent on V changes [W b] by
−η G⁻¹ ∇_W A⁻¹: with the inputs' metric alone it is SNGD (Liu et al. 2024, arXiv 2412.07441), with
both it is KFAC. The roots are applied to weights instead of activations, which is the same function
and serves convolutions, whose patches are never formed.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from smallfry.curvature.coverage import Block, cover
from smallfry.curvature.kronecker import NotFiniteError, eigendecompose
from smallfry.errors import UsageError, nearest


class Metric(NamedTuple):
    """Damped metric of a layer's gradient, symmetric positive definite."""

    inputs: Tensor  # A, (groups, inputs, inputs), with the bias's row and column last
    outputs: Tensor | None = None  # G, (groups, outputs, outputs); None for the identity


class FisherLayer(nn.Module):
    """Layer with [W b] = S_g⁻¹ V S_a⁻¹; ``matrix`` is V.

    Args:
        block: The block of one layer that it stands for.
        metric: Metric of that layer.
    """

    input_root: Tensor
    input_inverse: Tensor
    output_root: Tensor | None
    output_inverse: Tensor | None

    def __init__(self, block: Block, metric: Metric) -> None:
        super().__init__()
        weights = {name: p.detach() for name, p in block.parameters.items()}
        plain = block.to_matrix(weights)
        for name in ("input_root", "input_inverse", "output_root", "output_inverse"):
            self.register_buffer(name, None)
        self._set_roots(metric, plain)
        self.matrix = nn.Parameter(self._to_v(plain))
        self._hidden = [block]  # in a list: its layer's parameters are none of this module's

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Compute the output of the original layer."""
        weight = self._hidden[0].weight
        tensors = {"weight" if p is weight else "bias": t for p, t in self.parameters_of_layer()}
        return functional_call(self.layer, tensors, arguments, keywords)

    @property
    def layer(self) -> nn.Module:
        """Original layer; its own parameters are out of date until removal."""
        return self._hidden[0].module

    def plain_matrix(self) -> Tensor:
        """Compute [W b] = S_g⁻¹ V S_a⁻¹, (groups, outputs, inputs)."""
        matrix: Tensor = self.matrix @ self.input_inverse
        return matrix if self.output_inverse is None else self.output_inverse @ matrix

    def parameters_of_layer(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Compute the layer's own parameters from V."""
        block = self._hidden[0]
        tensors = block.from_matrix(self.plain_matrix())
        return [(block.parameters[name], tensor) for name, tensor in tensors.items()]

    @torch.no_grad()
    def refresh(self, metric: Metric) -> Callable[[Tensor], Tensor]:
        """Change the metric without changing the function.

        Returns:
            What a momentum buffer of V is to be replaced by: it holds gradients, which turn
            into S_g'⁻¹ S_g m S_a S_a'⁻¹.
        """
        plain, old_a, old_g = self.plain_matrix(), self.input_root, self.output_root
        self._set_roots(metric, plain)
        self.matrix.copy_(self._to_v(plain))
        new_a, new_g = self.input_inverse, self.output_inverse

        def turned(momentum: Tensor) -> Tensor:
            result = momentum @ old_a @ new_a
            result = result if old_g is None else old_g @ result
            return result if new_g is None else new_g @ result

        return turned

    def extra_repr(self) -> str:
        """Describe the original layer and the sides with a metric."""
        sides = "inputs" if self.output_root is None else "inputs and outputs"
        return f"{self.layer}, metric of {sides}"

    def _set_roots(self, metric: Metric, plain: Tensor) -> None:
        groups, outputs, inputs = plain.shape
        self.input_root, self.input_inverse = _roots(metric.inputs, (groups, inputs), plain)
        self.output_root = self.output_inverse = None
        if metric.outputs is not None:
            both = _roots(metric.outputs, (groups, outputs), plain)
            self.output_root, self.output_inverse = both

    def _to_v(self, plain: Tensor) -> Tensor:
        matrix = plain @ self.input_root
        return matrix if self.output_root is None else self.output_root @ matrix


def insert_fisher_layers(model: nn.Module, metrics: Mapping[str, Metric]) -> dict[str, FisherLayer]:
    """Replace layers by local Fisher layers that compute the same function.

    Parameters change: make optimizers afterwards.

    Args:
        model: Changed in place.
        metrics: By name of the layer: Linear, Conv1d, Conv2d or ConvTranspose2d.

    Raises:
        UsageError: A name is no such layer, its weight is shared with another layer, frozen or
            computed, or a metric has another shape than the layer.
        NotFiniteError: A metric is not finite or not positive definite.
    """
    coverage = cover(model)
    blocks = {name: block for block in coverage.blocks for name in block.layers}
    made = {name: _fisher_layer(model, name, blocks, metric) for name, metric in metrics.items()}
    for name, fisher_layer in made.items():
        _replace(model, model.get_submodule(name), fisher_layer)
    return made


def remove_fisher_layers(model: nn.Module) -> None:
    """Restore the original layers with the parameters of the Fisher layers."""
    for fisher_layer in [m for m in model.modules() if isinstance(m, FisherLayer)]:
        layer = fisher_layer.layer
        for parameter, tensor in fisher_layer.parameters_of_layer():
            parameter.data = tensor.detach().clone()
        layer.train(fisher_layer.training)
        _replace(model, fisher_layer, layer)


def _fisher_layer(
    model: nn.Module, name: str, blocks: Mapping[str, Block], metric: Metric
) -> FisherLayer:
    if name == "":
        raise UsageError("the model itself can't be replaced; put it in nn.Sequential(model) first")
    if name not in blocks:
        names = [path for path, _ in model.named_modules() if path]
        reason = "can't have a Fisher layer" if name in names else "is not there"
        raise UsageError(
            f"layer '{name}' {reason}: expected a Linear, Conv1d, Conv2d or ConvTranspose2d with a "
            f"trained weight of its own{'' if name in names else nearest(name, names)}"
        )
    block = blocks[name]
    if len(block.layers) > 1:
        shared = ", ".join(block.layers)
        raise UsageError(f"the weight of layer '{name}' is shared by several layers ({shared})")
    if len(list(block.module.parameters())) > len(block.parameters):
        raise UsageError(f"layer '{name}' has frozen parameters, or a shared bias")
    return FisherLayer(block, metric)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module wherever it occurs."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _roots(metric: Tensor, shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the square root of a metric and its inverse."""
    groups, size = shape
    if metric.shape != (groups, size, size):
        raise UsageError(
            f"a metric has shape {tuple(metric.shape)}; expected {(groups, size, size)}, "
            "with a row and a column for the bias on the inputs' side"
        )
    values, vectors = eigendecompose(metric.detach().to(like.device, torch.float64))
    if bool((values <= 0).any()):
        raise NotFiniteError("a metric is not positive definite; damp it")
    root = (vectors * values.sqrt()[:, None]) @ vectors.transpose(1, 2)
    inverse = (vectors * values.rsqrt()[:, None]) @ vectors.transpose(1, 2)
    return root.to(like.dtype), inverse.to(like.dtype)
