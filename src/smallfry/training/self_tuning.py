"""Self-tuning: hyper-parameters learned within one run (Δ-STN; Bae, Grosse, NeurIPS 2020).

    weights        step on the loss at the hyper-parameters λ, as without tuning
    response       step of the gates' weights θ on the loss at λ + ε, ε drawn for each example, of
                   the network linearised in the gates: f(0) + J ε
    λ and scale    every few batches, a step on the validation loss of the network whose gates are
                   at ε, less an entropy of ε, in evaluation mode; gradients reach λ through the
                   gates alone

The gates are zero at λ, so the network that is evaluated, saved and exported is the ordinary one:
responses hook into its layers while they are trained, and are part of no model.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from smallfry._torch import BatchNorm, without_onednn
from smallfry.data import ImageData
from smallfry.errors import UsageError
from smallfry.io.json_lines import JsonLines
from smallfry.layers.hyper import Response
from smallfry.tasks import Batch
from smallfry.tasks.classification import ClassTargets
from smallfry.training.augment import Normalize
from smallfry.training.batches import derive_seed
from smallfry.training.config import TrainConfig
from smallfry.training.hyper_parameters import Hyper, find_hypers
from smallfry.training.launch_env import launch
from smallfry.training.objective import Objective
from smallfry.training.objective_steps import Step
from smallfry.training.optimization import NATURAL
from smallfry.training.wrapped_objective import WrappedObjective
from smallfry.transforms.modes import evaluating

__all__ = ["FILE", "SelfTuned", "entropy_of", "self_tuned"]

FILE = "self_tuning.jsonl"  # in the run folder: values by step
EVERY = 5  # batches to a step of the hyper-parameters
RATE = 1e-2  # of the hyper-parameters and their scales
RESPONSE_RATE = 3e-3
SCALE = 1.0  # of the perturbation, first
ENTROPY = 1e-3
VALIDATION_BATCH = 256
NOTED = 50  # batches to a line of the file
TURN, SHIFT, ZOOM = math.radians(30), 0.25, 0.25  # of augmentation at full strength
Validation = Callable[[int], Batch]  # a batch of validation images, by the number of the step


class SelfTuned(WrappedObjective):
    """Objective for classification with hyper-parameters tuned on the validation loss.

    Args:
        objective: The one whose loss is trained.
        hypers: Hyper-parameters.
        validation: Draws batches of normalised validation images.
        warmup: Batches before the first step of the hyper-parameters.
        seed: Seed of the responses and perturbations.
        file: Receiver of the values; None for none.
    """

    def __init__(
        self,
        objective: Objective,
        hypers: Sequence[Hyper],
        validation: Validation,
        warmup: int = 0,
        seed: int = 0,
        file: Path | None = None,
    ) -> None:
        super().__init__(objective)
        self.hypers = {each.name: number for number, each in enumerate(hypers)}
        self._hypers, self._validation = tuple(hypers), validation
        self._warmup, self._seed, self._file = warmup, seed, file
        self.raw = nn.Parameter(torch.tensor([each.unconstrained() for each in hypers]))
        self.raw_scale = nn.Parameter(torch.full_like(self.raw, _inverse_softplus(SCALE)))
        self.responses = nn.ModuleDict()
        self._layers: dict[str, nn.Module] = {}
        self._model: nn.Module = nn.Identity()
        self._gates: Tensor | None = None  # (batch, hyper-parameters), while the hooks act
        self._dropout: Tensor | None = None  # (batch,)
        self._count = 0
        self.history: list[dict[str, float]] = []

    @property
    def changes_gradients(self) -> bool:
        """Always True, as penalties are in the loss."""
        return True

    @property
    def values(self) -> dict[str, float]:
        """Hyper-parameters as they are now."""
        return {
            each.name: float(each.value(self.raw.detach()[number]))
            for number, each in enumerate(self._hypers)
        }

    def prepare(self, model: nn.Module) -> nn.Module:
        """Hook responses into the model's layers, and return the wrapped objective's module.

        Raises:
            UsageError: The model has no layers with a response.
        """
        self._model = model
        device = next(model.parameters()).device
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self._seed, 11))
            for layer in model.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    key = str(len(self._layers))
                    self.responses[key] = Response(layer, len(self._hypers)).to(device)
                    self._layers[key] = layer
                    layer.register_forward_hook(self._responding(key))
        if not self._layers:
            raise UsageError("self_tune needs a model with linear layers or convolutions")
        self._hook_dropout(model)
        self.raw.data, self.raw_scale.data = self.raw.to(device), self.raw_scale.to(device)
        parameters = list(self.responses.parameters())
        self._response_optimizer = torch.optim.Adam(parameters, RESPONSE_RATE)
        self._optimizer = torch.optim.RMSprop([self.raw, self.raw_scale], RATE)
        return super().prepare(model)

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """Train responses and hyper-parameters, and yield the wrapped objective's steps."""
        self._count += 1
        if self._count > self._warmup:
            self._step_responses(batch)
            if self._count % EVERY == 0:
                self._step_hypers(self._validation(self._count))
        self._note()
        raw = self.raw.detach().expand(len(batch.inputs), -1)
        changed = self._changed(batch, raw)
        with self._dropping(raw):
            for step in self.objective(prepared, changed):
                yield step._replace(loss=step.loss + self._penalty(raw, torch.zeros_like(raw)))

    # Steps

    def _step_responses(self, batch: Batch) -> None:
        raw = self._perturbed(len(batch.inputs)).detach()
        changed, gates = self._changed(batch, raw), raw - self.raw.detach()
        with self._dropping(raw), _frozen_statistics(self._model):
            outputs = self.linearised(changed.inputs, gates)
        loss = self.task.loss(outputs, changed.targets) + self._penalty(raw, gates)
        parameters = list(self.responses.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self._response_optimizer.step()

    def _step_hypers(self, batch: Batch) -> None:
        with evaluating(self._model):
            raw = self._perturbed(len(batch.inputs))
            outputs = self.gated(batch.inputs, raw - self.raw.detach())
        loss = self.task.loss(outputs, batch.targets) - ENTROPY * entropy_of(self.raw_scale)
        tuned = [self.raw, self.raw_scale]
        gradients = torch.autograd.grad(loss, tuned)
        for parameter, gradient in zip(tuned, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()

    def gated(self, inputs: Tensor, gates: Tensor) -> Tensor:
        """Compute the outputs of the network with its gates.

        Args:
            inputs: (batch, ...).
            gates: What goes into the gates, (batch, hyper-parameters).
        """
        self._gates = gates
        try:
            outputs: Tensor = self._model(inputs)
            return outputs
        finally:
            self._gates = None

    def linearised(self, inputs: Tensor, gates: Tensor) -> Tensor:
        """Compute the outputs of the network linearised in its gates at zero.

        The derivative in the direction of the gates is by forward-mode differentiation in a network
        with batch norms, which have no third derivative in PyTorch; in others it is that of Jᵀ w
        with respect to w, as the forward mode has no gradient for attention.
        """
        with without_onednn(), sdpa_kernel(SDPBackend.MATH):
            if any(isinstance(module, BatchNorm) for module in self._model.modules()):
                forward: Any = forward_ad  # without types
                with forward.dual_level():
                    dual = forward.make_dual(torch.zeros_like(gates), gates)
                    primal, tangent = forward.unpack_dual(self.gated(inputs, dual))
                found: Tensor = primal.detach() + tangent
                return found
            zero = torch.zeros_like(gates, requires_grad=True)
            outputs = self.gated(inputs, zero)
            rows = torch.zeros_like(outputs, requires_grad=True)
            products = torch.autograd.grad(outputs, zero, rows, create_graph=True)[0]
            change = torch.autograd.grad(products, rows, gates, create_graph=True)[0]
        return outputs.detach() + change

    def _perturbed(self, count: int) -> Tensor:
        """Draw hyper-parameters of each example, (count, hyper-parameters)."""
        noise = torch.randn(count, len(self._hypers), device=self.raw.device)
        return self.raw + F.softplus(self.raw_scale) * noise

    # Hyper-parameters in the training

    def _value(self, name: str, raw: Tensor) -> Tensor | None:
        number = self.hypers.get(name)
        return None if number is None else self._hypers[number].value(raw[:, number])

    def _changed(self, batch: Batch, raw: Tensor) -> Batch:
        """Augment images and smooth targets, each by its own strength."""
        inputs, targets = batch
        if (strength := self._value("augment", raw)) is not None:
            inputs = transform(inputs, strength)
        if (noise := self._value("noise", raw)) is not None:
            inputs = inputs + noise.view(-1, *(1 for _ in inputs.shape[1:])) * torch.randn_like(
                inputs
            )
        if (smoothing := self._value("label_smoothing", raw)) is not None:
            shares = targets.shares
            shares = shares + smoothing[:, None] * (1 / shares.shape[1] - shares)
            targets = ClassTargets(targets.labels, shares)
        return Batch(inputs, targets)

    def _penalty(self, raw: Tensor, gates: Tensor) -> Tensor:
        """Compute half the squared norm of the weights, times their decay: the mean of a batch."""
        decay = self._value("weight_decay", raw)
        if decay is None:
            return raw.new_zeros(())
        named = self._layers.items()
        pairs = ((cast(Response, self.responses[key]), layer) for key, layer in named)
        squares = torch.stack([response.squares(layer, gates) for response, layer in pairs]).sum(0)
        return (decay * squares).mean() / 2

    @contextmanager
    def _dropping(self, raw: Tensor) -> Iterator[None]:
        self._dropout = self._value("dropout", raw)
        try:
            yield
        finally:
            self._dropout = None

    # Hooks; functions, as a copy of the model shares them

    def _responding(self, key: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, inputs: Any, outputs: Tensor) -> Tensor | None:
            if self._gates is None:
                return None
            found: Tensor = self.responses[key](layer, inputs[0], outputs, self._gates)
            return found

        return hook

    def _hook_dropout(self, model: nn.Module) -> None:
        """Drop the outputs of the model's dropout layers, or the inputs of its classifier."""
        if "dropout" not in self.hypers:
            return

        def drop(values: Tensor) -> Tensor:
            assert self._dropout is not None
            rates = self._dropout.repeat_interleave(len(values) // len(self._dropout), 0)
            rates = rates.view(-1, *(1 for _ in values.shape[1:]))
            return values * (torch.rand_like(values.detach()) >= rates) / (1 - rates)

        def dropping(layer: nn.Module) -> bool:
            return self._dropout is not None and layer.training

        places = [each for each in model.modules() if type(each) is nn.Dropout]
        for place in places:
            place.register_forward_hook(
                lambda layer, inputs, __: drop(inputs[0]) if dropping(layer) else None
            )
        classifier: Any = getattr(model, "get_classifier", lambda: None)()
        if not places and not isinstance(classifier, nn.Module):
            raise UsageError(
                "self_tune can't tune dropout of a model without dropout layers or get_classifier"
            )
        if not places:
            classifier.register_forward_pre_hook(
                lambda layer, inputs: (drop(inputs[0]), *inputs[1:]) if dropping(layer) else None
            )

    # State

    def _note(self) -> None:
        if self._count % NOTED:
            return
        scales = F.softplus(self.raw_scale.detach()).tolist()
        row: dict[str, float] = {"batch": self._count, **self.values}
        row |= {f"{name}_scale": scales[number] for name, number in self.hypers.items()}
        self.history.append(row)
        if self._file is not None:
            JsonLines(self._file).append(row)

    def state_dict(self) -> dict[str, Any]:
        """Return hyper-parameters, responses, their optimizers, and the wrapped state."""
        return {
            "wrapped": super().state_dict(),
            "count": self._count,
            "raw": self.raw.detach().clone(),
            "raw_scale": self.raw_scale.detach().clone(),
            "responses": {k: v.clone() for k, v in self.responses.state_dict().items()},
            "response_optimizer": self._response_optimizer.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any], batch: Batch) -> None:
        """Continue from a state; lines of the file that came later are taken back."""
        super().load_state_dict(state["wrapped"], batch)
        self._count, self.history = int(state["count"]), list(state["history"])
        self.raw.data.copy_(state["raw"])
        self.raw_scale.data.copy_(state["raw_scale"])
        self.responses.load_state_dict(state["responses"])
        self._response_optimizer.load_state_dict(state["response_optimizer"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            for row in self.history:
                JsonLines(self._file).append(row)


def self_tuned(
    config: TrainConfig, objective: Objective, data: ImageData, normalize: Normalize, file: Path
) -> Objective:
    """Wrap an objective for the configured hyper-parameters; without any, return it as it is.

    Args:
        config: Of the run.
        objective: The run's.
        data: Its validation images decide.
        normalize: Normalisation of the images.
        file: Receiver of the values.

    Raises:
        UsageError: Another task, settings that are tuned and given, no validation images, several
            processes, or natural gradient.
    """
    hypers = find_hypers(config.self_tune)
    if not hypers:
        return objective
    _require_possible(config, {each.name for each in hypers}, data)
    count, split = len(data.validation), data.validation
    assert config.batch_size is not None  # chosen by now
    size, steps = min(VALIDATION_BATCH, count), -(-len(data.train) // config.batch_size)

    def validation(step: int) -> Batch:
        generator = torch.Generator().manual_seed(derive_seed(config.seed, 12, step))
        some = split.take(torch.randperm(count, generator=generator)[:size])
        device = tuned.raw.device
        labels = some.labels.to(device)
        shares = F.one_hot(labels, len(data.classes)).float()
        return Batch(normalize(some.images.to(device)), ClassTargets(labels, shares))

    warmup = min(5, config.epochs // 10) * steps
    tuned = SelfTuned(objective, hypers, validation, warmup, config.seed, file)
    return tuned


def _require_possible(config: TrainConfig, names: set[str], data: ImageData) -> None:
    if config.task != "classification":
        raise UsageError(f"self_tune is for the task classification, not {config.task}")
    if config.optimizer.name in NATURAL:
        raise UsageError(
            f"self_tune calls the model beside the training step, which {config.optimizer.name} "
            "takes for data: take another optimizer, such as adamw"
        )
    if launch().processes > 1 or config.compile or config.accumulate > 1:
        raise UsageError("self_tune works in one process, without compile and accumulate")
    if not len(data.validation):
        raise UsageError("self_tune follows the validation loss: raise data.validation")
    if "weight_decay" in names and config.optimizer.weight_decay:
        raise UsageError(
            "self_tune tunes weight_decay as a penalty in the loss: add --optimizer.weight_decay 0"
        )
    if "label_smoothing" in names and config.objective.label_smoothing:
        raise UsageError("self_tune tunes label_smoothing: leave out objective.label_smoothing")


def entropy_of(raw_scale: Tensor) -> Tensor:
    """Compute the entropy of normal perturbations with scales softplus(ρ).

    Example:
        >>> round(float(entropy_of(torch.tensor([0.5, 1.0], dtype=torch.float64).expm1().log())), 6)
        2.14473
    """
    return (F.softplus(raw_scale) * math.sqrt(2 * math.pi * math.e)).log().sum()


def transform(images: Tensor, strength: Tensor) -> Tensor:
    """Turn, shift and zoom images at random.

    Args:
        images: (batch, channels, height, width).
        strength: 0 for none to 1, (batch,).
    """
    turn, x, y, zoom = strength * (2 * torch.rand(4, len(images), device=images.device) - 1)
    turn, factor = TURN * turn, 1 + ZOOM * zoom
    cosine, sine = factor * turn.cos(), factor * turn.sin()
    rows = [cosine, -sine, 2 * SHIFT * x, sine, cosine, 2 * SHIFT * y]
    matrices = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise by the statistics of a batch without averaging them."""
    norms = [m for m in model.modules() if isinstance(m, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked for norm in norms]
    for norm, count in zip(norms, counts, strict=True):
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))
