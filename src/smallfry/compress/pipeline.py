"""Compression of a model by a sequence of methods.

``apply`` is for methods that act once; ``Session`` goes into a training loop of one's own.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from smallfry.data import ImageData
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.settings import fitted
from smallfry.training.calibration import EXAMPLES, CalibrationBatches
from smallfry.training.method import (
    MethodSettings,
    Running,
    Setting,
    packing_of,
    require_methods,
    to_dict,
)
from smallfry.training.run import TrainedModel
from smallfry.training.trained_run import TrainedRun
from smallfry.transforms.spec import ModelSpec
from smallfry_runtime.arrays import random_inputs

UNKNOWN = ModelSpec("unknown")


def apply(
    trained: TrainedModel | TrainedRun,
    methods: Sequence[MethodSettings],
    data: ImageData | None = None,
    seed: int = 0,
    reports: list[dict[str, Any]] | None = None,
) -> TrainedModel:
    """Compress a trained model without training.

    Args:
        trained: Result of ``smallfry.load`` or ``smallfry.train``; unchanged.
        methods: Settings, in the order of their stages.
        data: To calibrate with, as ``smallfry.data.load_data`` gives it; random pixels without it.
        seed: Random seed.
        reports: Filled with plain data on what methods have done, such as bits of each layer.

    Returns:
        The compressed model, whose ``save`` writes a run folder.

    Raises:
        UsageError: A method that needs training, methods in the wrong order, or arguments that are
            something else.

    Example:
        >>> import smallfry  # doctest: +SKIP
        >>> from smallfry import compress  # doctest: +SKIP
        >>> trained = smallfry.load("runs/a")  # doctest: +SKIP
        >>> small = compress.apply(trained, [compress.Magnitude(sparsity=0.5)])  # doctest: +SKIP
        >>> small.save("runs/b")  # doctest: +SKIP
    """
    trained = trained.model if isinstance(trained, TrainedRun) else trained
    if not isinstance(trained, TrainedModel):
        raise UsageError(
            f"a model is what smallfry.load returns, not {type(trained).__name__}; for a model of "
            "your own take compress.apply_to_model"
        )
    if data is not None and not isinstance(data, ImageData):
        raise UsageError(f"data is what smallfry.data.load_data returns, not {type(data).__name__}")
    batches: Iterable[Tensor] = ()
    if data is None:
        example = trained.normalize(_noise(trained))
    else:
        batches = CalibrationBatches(data.train, trained.normalize, trained.model)
        example = batches.example()
    model, spec = apply_to_model(
        trained.model,
        methods,
        spec=trained.spec,
        example=example,
        batches=batches,
        seed=seed,
        reports=reports,
    )
    small = trained.compressed(model, spec, [to_dict(each) for each in methods])
    return small._replace(packing=packing_of(methods))


def apply_to_model(
    model: nn.Module,
    methods: Sequence[MethodSettings],
    *,
    spec: ModelSpec = UNKNOWN,
    example: Tensor | None = None,
    batches: Iterable[Tensor] = (),
    seed: int = 0,
    reports: list[dict[str, Any]] | None = None,
) -> tuple[nn.Module, ModelSpec]:
    """Compress a copy of any model without training.

    Args:
        model: Left as it is.
        methods: Settings, in the order of their stages.
        spec: Its identity, for the spec of the result.
        example: A batch of inputs; needed by methods that cut channels or calibrate.
        batches: More inputs to calibrate with.
        seed: Random seed.
        reports: Filled with plain data on what methods have done.

    Returns:
        The compressed model in evaluation mode, and its spec.

    Raises:
        UsageError: A method that needs training, methods in the wrong order, or a model that can't
            be copied.

    Example:
        >>> import torch
        >>> from smallfry import compress
        >>> dense = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh())
        >>> small, spec = compress.apply_to_model(dense, [compress.LowRank(keep=0.25)])
        >>> sum(p.numel() for p in small.parameters()) < 64 * 65
        True
        >>> [each.kind for each in spec.transforms]
        ['replace']
    """
    methods = require_methods(methods)
    _require_tensor(example)
    training = [each.name for each in methods if each.trains]
    if training:
        raise UsageError(
            f"'{training[0]}' acts during training: use compress.Session in your own loop"
        )
    try:
        small = deepcopy(model).eval()
    except RuntimeError as error:  # of a weight that a hook has computed
        raise UsageError(
            f"the model can't be copied ({error}): make computed weights ordinary first, by "
            "nn.utils.prune.remove, nn.utils.remove_weight_norm or remove_spectral_norm"
        ) from error
    inputs = torch.empty(0) if example is None else example
    running = Running(methods, small, Setting(spec, inputs, _checked(batches), 0, seed))
    found = running.finish()
    if reports is not None:
        reports += running.reports
    return small, found


def _noise(trained: TrainedModel) -> Tensor:
    return torch.from_numpy(random_inputs(EXAMPLES, trained.frame, trained.channels))


def _require_tensor(example: Any) -> None:
    if example is not None and not isinstance(example, Tensor):
        raise UsageError(f"example= must be a tensor of inputs, not {type(example).__name__}")


def _checked(batches: Iterable[Tensor]) -> Iterable[Tensor]:
    """Check batches of a caller; those of a run have further methods, and stay as they are."""
    return batches if isinstance(batches, CalibrationBatches) else _Batches(batches)


class _Batches:
    """Batches of inputs that can be read again, checked."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        if isinstance(batches, Tensor) or iter(batches) is batches:
            raise UsageError(
                "batches= is read several times, batch by batch: give a list of tensors, not "
                f"{type(batches).__name__}"
            )
        self._batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            if not isinstance(batch, Tensor):
                raise UsageError(
                    f"each of batches= must be a tensor of inputs, not {type(batch).__name__}; "
                    "without labels, such as [images for images, _ in loader]"
                )
            yield batch


class Session:
    """Compression methods in a custom training loop, with any optimizer.

    Args:
        model: The model that is trained; changed in place.
        methods: Settings.
        example: A batch of inputs.
        steps: Optimizer steps there will be.
        spec: Identity of the model, for the spec of the result; without it, that can't be built.
        batches: Inputs to calibrate with.
        seed: Random seed.

    Example:
        >>> import timm, torch, smallfry
        >>> from smallfry import compress
        >>> model = timm.create_model("vitrm_micro_patch4_8")
        >>> images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> session = compress.Session(model, [compress.RoundWeights(bits=8)], images, steps=1)
        >>> session.attach(optimizer)
        >>> loss = torch.nn.functional.cross_entropy(model(images), labels) + session.penalty()
        >>> loss.backward()
        >>> _ = optimizer.step()
        >>> [each.kind for each in session.finish().transforms]
        ['bits']
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[MethodSettings],
        example: Tensor,
        steps: int,
        *,
        spec: ModelSpec = UNKNOWN,
        batches: Iterable[Tensor] = (),
        seed: int = 0,
    ) -> None:
        if fitted(steps, int, "steps") < 1:
            raise UsageError(f"steps must be at least 1, got {steps}")
        _require_tensor(example)
        before = set(model.parameters())
        self._running = Running(
            methods, model, Setting(spec, example, _checked(batches), steps, seed)
        )
        self._added = {n: p for n, p in model.named_parameters() if p not in before}
        self._idle = self._running.need_steps  # until an optimizer is attached

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook into every step of an optimizer, until ``finish``.

        Methods that replace layers bring parameters of their own, and a warning names one that the
        optimizer does not have: build it after the session.
        """
        held = {p for group in optimizer.param_groups for p in group["params"]}
        lacking = [n for n, p in self._added.items() if p.requires_grad and p not in held]
        if lacking:
            warnings.warn(
                f"{len(lacking)} parameters of layers that the session replaced, such as "
                f"'{lacking[0]}', are not in the optimizer, which does not train them: build it "
                "after the session",
                SmallfryWarning,
                stacklevel=2,
            )
        self._running.attach(optimizer)
        self._idle = []

    def penalty(self) -> Tensor | float:
        """Sum the methods' loss terms; 0.0 if there are none."""
        penalty = self._running.penalty()
        return 0.0 if penalty is None else penalty

    def observe(self, loss: Tensor) -> None:
        """Pass the loss before the optimizer's step, for methods that need it, such as CRIC."""
        self._running.observe(loss.detach)

    def finish(self) -> ModelSpec:
        """Convert the model to its compressed form, return its spec and detach the optimizers.

        There is a warning for a method that acts after steps, if no optimizer was attached.
        """
        if self._idle:
            warnings.warn(
                f"'{self._idle[0]}' acts after steps of an optimizer, and none was attached: call "
                "attach(optimizer) before the training",
                SmallfryWarning,
                stacklevel=2,
            )
        self.detach()
        return self._running.finish()

    def detach(self) -> None:
        """Detach the optimizers."""
        self._running.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return self._running.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of the same methods."""
        self._running.load_state_dict(state)
        self._idle = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()
