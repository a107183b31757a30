"""Graphs of an export, and their conversion to ONNX.

A weight is stored once, however often the recursion applies it: unrolling repeats nodes, which
name their weights. Weights that a node would transpose first are stored transposed, so that
quantizers see them.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import onnx
import onnx_ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import torch
from onnxscript.rewriter import onnx_fusions
from torch import Tensor, nn

from smallfry.errors import ExportError
from smallfry.models import ReadsOut, RecursionStep, Recursive
from smallfry.models.contract import replace_tensors, tensors
from smallfry.transforms.modes import evaluating

__all__ = ["OPSET", "Graph", "anytime_graphs", "exported_program", "to_onnx", "whole_graph"]

OPSET = 23  # has attention as one operator
ANY_SIZE = 2**40  # bytes of a constant that may be folded


class Graph(NamedTuple):
    """Module to export: tensors in, a tuple of tensors out, the first axis being the batch."""

    name: str
    module: nn.Module
    arguments: dict[str, Tensor | tuple[Tensor, ...]]
    inputs: tuple[str, ...]  # names of the arguments' tensors
    outputs: tuple[str, ...]


class Plain(nn.Module):
    """Images to logits (batch, classes), or several outputs, for any model without recursion."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        """Run the model."""
        outputs = self.model(images)
        return outputs if isinstance(outputs, Tensor) else tuple(outputs)


class Whole(nn.Module):
    """Images to logits (batch, steps, classes) and halting (batch, steps) of every step."""

    def __init__(self, model: Recursive) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run all recursion steps, unrolled."""
        steps = self.model.recurse(images)
        logits = torch.stack([step.logits for step in steps], dim=1)
        return logits, torch.stack([step.halt_logits for step in steps], dim=1).sigmoid()


class Embed(nn.Module):
    """Images to the input of every step, and the initial state tensors."""

    def __init__(self, model: Recursive) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return x and the state: of ViTRM, y (batch, 1, dim) and z (batch, latents, dim)."""
        state = self.model.initial_state(images.shape[0])
        return self.model.embed(images), *tensors(state)


class Step(nn.Module):
    """One recursion step.

    Args:
        model: The model.
        state: Any state of it, for its kind.
    """

    def __init__(self, model: Recursive, state: Any) -> None:
        super().__init__()
        self.model, self.state = model, state

    def forward(
        self, x: Tensor, y: Tensor, z: Tensor | None = None, others: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        """Return the next state; of two tensors, the first is y and the second z."""
        before = replace_tensors(self.state, [y, *([] if z is None else [z]), *others])
        return tuple(tensors(self.model.step(x, before).state))


class ReadOut(nn.Module):
    """Outputs of the heads on the first tensor of a state.

    Args:
        model: The model.
        state: Any state of it, for its kind.
    """

    def __init__(self, model: ReadsOut, state: Any) -> None:
        super().__init__()
        self.model, self.state = model, state

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (batch, classes) and the halting probability (batch,)."""
        others = tensors(self.state)[1:]
        step = self.model.read_out(replace_tensors(self.state, [y, *(y for _ in others)]))
        return step.logits, step.halt_logits.sigmoid()


class WithAnswer(nn.Module):
    """Recursive model with its prediction as the first tensor of the state.

    So a model that gives its answer only as it takes a step has a state to read it off.
    """

    def __init__(self, model: Recursive, classes: int) -> None:
        super().__init__()
        self.model, self.classes = model, classes

    def embed(self, images: Tensor) -> Tensor:
        """Embed images as the model does."""
        return self.model.embed(images)

    def initial_state(self, batch_size: int) -> tuple[Tensor, Any]:
        """Return an empty prediction with the model's state."""
        state = self.model.initial_state(batch_size)
        return tensors(state)[0].new_zeros(batch_size, self.classes + 1), state

    def step(self, x: Tensor, state: tuple[Tensor, Any]) -> RecursionStep:
        """Run the model's step, and add its logits and halting logit to the state."""
        step = self.model.step(x, state[1])
        answer = torch.cat([step.logits, step.halt_logits[:, None]], dim=1)
        return step._replace(state=(answer, step.state))


class ReadAnswer(nn.Module):
    """Prediction in the state of ``WithAnswer``."""

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (batch, classes) and the halting probability (batch,)."""
        return y[:, :-1], y[:, -1].sigmoid()


def whole_graph(model: nn.Module, images: Tensor) -> Graph:
    """Build one graph of the whole model; of a recursive one, with the outputs of every step.

    Outputs of a named tuple have the names of its fields.
    """
    given: dict[str, Any] = {"images": images}
    if isinstance(model, Recursive):
        return Graph("model", Whole(model), given, (*given,), ("logits", "halting"))
    with torch.inference_mode(), evaluating(model):
        outputs = model(images)
    names = getattr(type(outputs), "_fields", ("logits",))
    return Graph("model", Plain(model), given, (*given,), names)


def anytime_graphs(model: Recursive, images: Tensor) -> list[Graph]:
    """Divide the model into three graphs, to decide on early exit after each step."""
    with torch.inference_mode():
        x = model.embed(images)
        if isinstance(model, ReadsOut):
            state = model.initial_state(len(images))
            read_out: nn.Module = ReadOut(model, state)
        else:
            logits = model.step(x, model.initial_state(len(images))).logits
            model = cast(Recursive, WithAnswer(model, logits.shape[1]))
            state, read_out = model.initial_state(len(images)), ReadAnswer()
    x, *parts = (tensor.detach().clone() for tensor in (x, *tensors(state)))
    names = ("y", "z", *(f"z{number}" for number in range(2, len(parts))))[: len(parts)]
    following = tuple(f"next_{name}" for name in names)
    given: dict[str, Any] = {"x": x} | dict(zip(names[:2], parts, strict=False))
    if parts[2:]:
        given["others"] = (*parts[2:],)
    return [
        Graph("embed", Embed(model), {"images": images}, ("images",), ("x", *names)),
        Graph("step", Step(model, state), given, ("x", *names), following),
        Graph("read_out", read_out, {"y": parts[0]}, ("y",), ("logits", "halting")),
    ]


def exported_program(graph: Graph) -> torch.export.ExportedProgram:
    """Trace a graph to PyTorch's ``ExportedProgram``, for batches of any size.

    Raises:
        ExportError: A module that can't be traced, or only for one size of batch.
    """
    batch = torch.export.Dim("batch", min=1)
    shapes = {
        name: {0: batch} if isinstance(given, Tensor) else tuple({0: batch} for _ in given)
        for name, given in graph.arguments.items()
    }
    try:
        with _quiet():
            return torch.export.export(
                graph.module.eval(), (), dict(graph.arguments), dynamic_shapes=shapes
            )
    except Exception as error:  # a tracer meets the model's own code, which raises anything
        raise ExportError(
            f"{graph.name}: PyTorch can't trace it for batches of any size "
            f"({_first_line(error)}); its forward must not depend on values or on the batch size"
        ) from error


def to_onnx(graph: Graph, program: torch.export.ExportedProgram) -> onnx.ModelProto:
    """Convert a traced graph to ONNX, validated by ONNX's checker and shape inference.

    Raises:
        ExportError: An operation that has no form in ONNX.
    """
    try:
        with _quiet():
            translated = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=OPSET,
                verbose=False,
                optimize=False,  # follows below, with weights of any size
            )
            assert translated is not None
            model: Any = translated.model
            # recursion steps repeat much, and the optimizer takes the square of what it is given
            passes.CommonSubexpressionEliminationPass()(model)
            onnxscript.optimizer.optimize(
                model, input_size_limit=ANY_SIZE, output_size_limit=ANY_SIZE
            )
            onnx_fusions.fuse(model)
            for tidy in (
                passes.DeduplicateInitializersPass(size_limit=ANY_SIZE),
                passes.ClearMetadataAndDocStringPass(),
            ):
                tidy(model)
            proto = cast(onnx.ModelProto, onnx_ir.to_proto(model))
    except Exception as error:
        raise ExportError(
            f"{graph.name}: can't be converted to ONNX ({_first_line(error)})"
        ) from error
    del proto.graph.value_info[:]  # what is left of shapes from before the tidying
    _name_transposed(proto, graph.module)
    proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _name_transposed(proto: onnx.ModelProto, module: nn.Module) -> None:
    """Rename weights that were stored transposed after their parameters."""
    names = {
        weight.detach().t().contiguous().numpy().tobytes(): f"{name}.transposed"
        for name, weight in module.named_parameters()
        if weight.ndim == 2
    }
    renamed = {}
    for tensor in proto.graph.initializer:
        if len(tensor.dims) == 2 and (name := names.get(tensor.raw_data)):
            renamed[tensor.name] = tensor.name = name
    for node in proto.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' informational messages."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
