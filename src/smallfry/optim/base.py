"""Natural gradient as an ordinary optimizer: replace AdamW, change nothing else.

One step, for every covered block with gradient g (of the mean negative log-likelihood):

    m ← μ m + g                          momentum, on the gradient
    v ← (F̂ + λ I)⁻¹ m                    F̂ and its inverse as last refreshed
    ν ← min(1, √(κ / Σ lr² ⟨v, m⟩))      ⟨v, m⟩ ≥ vᵀF̂v: twice the divergence of the real step
    θ ← (1 − lr · decay) θ − lr ν v

With momentum in front of the inverse, the bound on the divergence holds for the step that is made,
and costs one inner product. When statistics are due (``statistics_every``), the observer takes
them during the caller's own forward; running averages count refreshes, and the first refresh
replaces rather than averages. Every ``inverse_every`` steps the inverse is made anew. λ is
``damping`` times the mean eigenvalue of F̂, so that it means the same whatever the batch size and
the reduction of the loss. What can't be covered is trained by an AdamW inside.

A method says how one block is approximated: ``_update``, ``_invert``, ``_apply``, ``_trace``.
"""

import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smallfry.curvature import Block, Likelihood, Observation, Rows, Taps, as_likelihood, cover
from smallfry.curvature.kronecker import NotFiniteError
from smallfry.curvature.observer import Observer
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.optim import quadratic
from smallfry.optim.checks import check_layers, check_loss
from smallfry.optim.groups import build_adamw, natural_groups, split_groups
from smallfry.optim.inspect import Diagnosis, Summary, SummaryRow, diagnose
from smallfry.optim.state import load_state, save_state

State = dict[str, Any]


class NaturalGradient(torch.optim.Optimizer):
    """What all natural-gradient methods share.

    Args:
        model: The model, compiled or not. Its training forward passes are watched.
        lr: Learning rate of the covered parameters.
        params: Parameters to train, or groups with their own ``lr``, ``momentum`` and
            ``weight_decay``; default all that require a gradient.
        likelihood: The density that the loss is the negative logarithm of: "categorical",
            "bernoulli", "bernoulli_probabilities", "gaussian", a Likelihood, a mapping from parts
            of the output to likelihoods, or a function from the output to a
            ``torch.distributions`` object.
        loss_scale: The loss over the mean over samples of the negative log-likelihood, summed
            over outputs. "mean" is PyTorch's reduction over all entries, "sum" a sum over samples.
        damping: λ over the mean eigenvalue of the approximated Fisher.
        damping_per: That mean is over the whole "network", or each "layer" has its own λ.
        adaptive_damping: Adapt λ by Levenberg and Marquardt's rule on refreshing steps, from how
            the loss of the batch changes; costs two more forward passes there.
        momentum: μ.
        weight_decay: Decoupled weight decay.
        kl_clip: κ, the largest divergence of a step; None does not clip.
        step_length: "lr", or "quadratic" for the minimum of the exact quadratic model over the
            natural gradient and (with momentum) the last step, times ``lr``; costs two forward-mode
            passes a step.
        ema_decay: Largest share of the old statistics kept at a refresh.
        statistics_every: Steps between refreshes of the statistics.
        inverse_every: Steps between refreshes of the inverses; default ``statistics_every``.
        fisher: "mc" (sampled targets), "exact" (all columns), "empirical" (the actual targets).
        draws: Sampled targets per sample.
        max_rows: Samples times uses that a layer's statistics are taken from; more uses are drawn
            at random. None takes all.
        exclude: Modules to leave to AdamW, by name or pattern.
        forward: The module whose call is a training forward pass, where that is not ``model``.
        fallback_lr: Learning rate of the AdamW inside, for what is not covered.
        grad_scaler: The GradScaler, needed with fisher="empirical" only.
        seed: Of the sampled targets.

    Raises:
        UsageError: No layer can be covered, or a setting makes no sense.
    """

    method = "natural gradient"
    sharing_choices: tuple[str, ...] = ("expand", "reduce")

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        params: Iterable[Any] | None = None,
        likelihood: str
        | Likelihood
        | Mapping[str | int, Any]
        | Callable[[Any], Any] = "categorical",
        loss_scale: float | Literal["mean", "sum"] = 1.0,
        damping: float = 0.1,
        damping_per: Literal["network", "layer"] = "network",
        adaptive_damping: bool = False,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        kl_clip: float | None = 1e-2,
        step_length: Literal["lr", "quadratic"] = "lr",
        ema_decay: float = 0.95,
        statistics_every: int = 10,
        inverse_every: int | None = None,
        fisher: Literal["mc", "exact", "empirical"] = "mc",
        draws: int = 1,
        max_rows: int | None = 8192,
        exclude: Iterable[str] = (),
        forward: nn.Module | None = None,
        fallback_lr: float = 1e-3,
        grad_scaler: Any = None,
        seed: int = 0,
    ) -> None:
        inverse_every = statistics_every if inverse_every is None else inverse_every
        _check(lr >= 0 and fallback_lr >= 0, f"lr and fallback_lr can't be negative, got {lr}")
        _check(damping > 0, f"damping must be positive, got {damping}")
        _check(0 <= momentum < 1, f"momentum is 0 to below 1, got {momentum}")
        _check(0 <= ema_decay < 1, f"ema_decay is 0 to below 1, got {ema_decay}")
        _check(weight_decay >= 0, f"weight_decay can't be negative, got {weight_decay}")
        _check(kl_clip is None or kl_clip > 0, f"kl_clip must be positive or None, got {kl_clip}")
        _check(min(statistics_every, inverse_every) >= 1, "periods are at least 1 step")
        _check(damping_per in ("network", "layer"), "damping_per is 'network' or 'layer'")
        _check(step_length in ("lr", "quadratic"), "step_length is 'lr' or 'quadratic'")
        _check(
            loss_scale in ("mean", "sum") or (not isinstance(loss_scale, str) and loss_scale > 0),
            f"loss_scale is a positive number, 'mean' or 'sum', not {loss_scale!r}",
        )
        _check(max_rows is None or max_rows >= 1, f"max_rows is positive or None, got {max_rows}")
        bare: nn.Module = getattr(model, "_orig_mod", model)
        groups = natural_groups(bare, params, lr, momentum, weight_decay, fallback_lr)
        trained = [p for group in groups for p in group["params"]]
        coverage = cover(bare, trained, exclude)
        if not coverage.blocks:
            raise UsageError(
                f"{type(bare).__name__} has no layer that {type(self).__name__} can cover (Linear, "
                "Conv1d, Conv2d, ConvTranspose2d with a trained weight or bias): take AdamW"
            )
        self.blocks, self.uncovered = coverage.blocks, coverage.uncovered
        self.names = {p: name for name, p in bare.named_parameters() if p in set(trained)}
        covered, rest = split_groups(
            groups, {p for b in self.blocks for p in b.parameters.values()}
        )
        super().__init__(covered, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.adamw = build_adamw(rest)
        if self.adamw is not None:
            self.param_groups += self.adamw.param_groups

        self.damping, self.damping_per = damping, damping_per
        self.adaptive_damping, self.damping_factor = adaptive_damping, 1.0
        self.kl_clip, self.step_length, self.ema_decay = kl_clip, step_length, ema_decay
        self.statistics_every, self.inverse_every = statistics_every, inverse_every
        self.loss_scale, self.max_rows, self.grad_scaler = loss_scale, max_rows, grad_scaler
        self.curvature: dict[str, State] = {block.name: {} for block in self.blocks}
        self.counters = {
            "steps": 0,
            "statistics": 0,  # refreshes
            "inverses": 0,
            "skipped_steps": 0,  # a gradient was not finite
            "failed_refreshes": 0,  # statistics or inverses were not finite: the old ones stayed
            "missed_refreshes": 0,  # no forward pass was seen when one was due
        }
        self.overdue = self.overdue_inverse = self.checked = False
        self.lambdas: dict[str, float] = {}
        self.clip = 1.0
        self.reduction_ratio: float | None = None
        self.milliseconds: dict[str, float] = {}
        self._latest: dict[str, list[Rows]] = {}

        device = trained[0].device
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.likelihood = as_likelihood(likelihood)
        self.observer = Observer(
            model if forward is None else forward,
            Taps(self.blocks),
            self.likelihood,
            fisher,
            draws,
            self.generator,
            self._wanted,
        )
        self.observer.keep_arguments = adaptive_damping or step_length == "quadratic"
        if grad_scaler is not None:
            self.observer.grad_scale = grad_scaler.get_scale

    # What a method says of one block

    @abstractmethod
    def _update(self, block: Block, state: State, rows: Sequence[Rows], keep: float) -> None:
        """Fold a batch into the running statistics; ``keep`` is the share of the old."""

    @abstractmethod
    def _invert(self, block: Block, state: State, damping: float) -> None:
        """Make anew what ``_apply`` needs; raises NotFiniteError before anything is changed."""

    def _settle(self, block: Block, state: State, rows: Sequence[Rows], keep: float) -> None:
        """Fold in what depends on the new inverse, such as a diagonal in its basis."""

    @abstractmethod
    def _apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """(F̂ + λ I)⁻¹ times a matrix (groups, outputs, inputs)."""

    @abstractmethod
    def _trace(self, block: Block, state: State) -> float:
        """tr F̂."""

    @abstractmethod
    def _cost(self, block: Block) -> tuple[str, int, int]:
        """The approximation in words, numbers kept, multiply-adds of an inversion."""

    def _diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Eigenvalue ranges ``inputs`` and ``outputs`` and, given rows, ``fisher_error``."""
        return {}

    def _loaded(self) -> None:
        """A state was put in place."""

    # The optimizer

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Refresh the curvature if that is due, and move the parameters.

        Args:
            closure: Computes the loss and its gradients, if they are not there yet.

        Returns:
            What the closure returned.

        Raises:
            UsageError: No forward pass was seen; or the loss, the likelihood and the layers are
                not what the optimizer was told.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        observations = self.observer.take()
        raw = {self.names[p]: p.grad for p in self.names if p.grad is not None}
        if not _finite(raw.values()):
            self.counters["skipped_steps"] += 1
            self.overdue = self.overdue or self._due(self.statistics_every)
            self.overdue_inverse = self.overdue_inverse or self._due(self.inverse_every)
            self.counters["steps"] += 1
            return result
        factor = self._loss_factor(observations)
        covered = {name: raw[name] for b in self.blocks for name in b.parameters if name in raw}
        self._refresh(observations, covered, factor)
        if factor != 1.0:
            covered = {name: grad / factor for name, grad in covered.items()}
        self._move(covered, observations)
        if self.adamw is not None:
            self.adamw.step()
        self.counters["steps"] += 1
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients; a backward pass that was not stepped on is forgotten with them."""
        self.observer.drop_arrived()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: curvature belongs to the layers known then."""
        if hasattr(self, "blocks") and hasattr(self, "observer"):
            raise UsageError(
                "parameters can't be added to a natural-gradient optimizer; build a new one, "
                "with groups in params="
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """All that resuming bit for bit needs, by parameter name; plain data and tensors."""
        return save_state(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            UsageError: It belongs to another method or model.
        """
        load_state(self, state_dict)

    def summary(self) -> Summary:
        """What happens to each parameter: approximation, memory, cost of a refresh."""
        rows = []
        for block in self.blocks:
            words, numbers, work = self._cost(block)
            momentum = any(g["momentum"] > 0 for g in self.param_groups if "momentum" in g)
            numbers += block.size if momentum else 0
            layers, size = ", ".join(block.layers), next(iter(block.parameters.values()))
            rows.append(
                SummaryRow(layers, block.size, words, numbers * size.element_size(), work, "")
            )
        model = {name: p for p, name in self.names.items()}
        for name, reason in self.uncovered.items():
            p = model[name]
            memory = 2 * p.numel() * p.element_size()
            rows.append(SummaryRow(name, p.numel(), "AdamW", memory, 0, reason))
        return Summary(type(self).__name__, tuple(rows))

    def diagnostics(self) -> Diagnosis:
        """How the approximation stands, layer by layer.

        Cosines need the gradients of the last step, Fisher errors ``monitor()``.
        """
        return diagnose(self)

    def monitor(self, on: bool = True) -> None:
        """Keep the rows of the last refresh, so that diagnostics can tell the Fisher error."""
        self._monitoring = on
        self._latest = {}

    _monitoring = False

    # Refreshing

    def _due(self, every: int) -> bool:
        return self.counters["steps"] % every == 0

    def _wanted(self) -> str:
        if self.overdue or self._due(self.statistics_every):
            self.observer.watch_backward = not self.checked
            return "taps"
        always = self.step_length == "quadratic" or self.loss_scale == "sum"
        return "outputs" if always else ""

    def _loss_factor(self, observations: Sequence[Observation]) -> float:
        if not isinstance(self.loss_scale, str):
            return float(self.loss_scale)
        if observations:
            samples = sum(seen.samples for seen in observations)
            if self.loss_scale == "sum":
                self._factor = float(samples)
            else:
                self._factor = self.likelihood.mean_factor(observations[0].outputs)
        return self._factor

    _factor = 1.0

    def _refresh(
        self, observations: Sequence[Observation], grads: Mapping[str, Tensor], factor: float
    ) -> None:
        statistics = self.overdue or self._due(self.statistics_every)
        inverse = self.overdue_inverse or self._due(self.inverse_every)
        for layer in (name for seen in observations for name in seen.foreign):
            raise UsageError(
                f"layer '{layer}' has another weight than when the optimizer was built; build the "
                "optimizer after the model has its final layers"
            )
        tapped = [seen for seen in observations if seen.calls]
        if statistics and not tapped:
            self._complain_unseen()
            statistics = False
        if not statistics and not inverse:
            return
        if statistics and not self.checked:
            rescaled = check_layers(self.blocks, tapped, grads)
            check_loss(self.likelihood, tapped, factor, rescaled)
            self.checked = True
        if statistics and self.observer.fisher == "empirical":
            _use_actual_targets(tapped, factor, self.observer.grad_scale())
        drawn = all(seen.draws for seen in tapped)
        rows = self._rows(tapped) if statistics and drawn else {}
        if not drawn or not _finite(t for parts in rows.values() for r in parts for t in r):
            self.counters["failed_refreshes"] += 1
            self.overdue, self.overdue_inverse = True, self.overdue_inverse or inverse
            return
        self._refresh_all(rows, inverse)
        if statistics:
            self.overdue = False
        if inverse:
            self.overdue_inverse = False
        if self._monitoring and rows:
            self._latest = {name: list(parts) for name, parts in rows.items()}

    def _refresh_all(self, rows: Mapping[str, Sequence[Rows]], inverse: bool) -> None:
        """Statistics, damping, inverses, of all blocks."""
        count = self.counters["statistics"] + 1
        keep = min(1 - 1 / count, self.ema_decay)
        for block in self.blocks:
            if block.name in rows:
                began = time.perf_counter()
                first = not self.curvature[block.name]
                share = 0.0 if first else keep
                self._update(block, self.curvature[block.name], rows[block.name], share)
                self.curvature[block.name]["shape"] = list(block.shape)
                self.milliseconds[block.name] = 1e3 * (time.perf_counter() - began)
        self._set_lambdas()
        for block in self.blocks:
            state = self.curvature[block.name]
            if not state:
                continue
            began = time.perf_counter()
            if inverse:
                try:
                    self._invert(block, state, self.lambdas[block.name])
                except NotFiniteError as error:
                    self.counters["failed_refreshes"] += 1
                    _warn(f"layer '{block.name}': {error}; the last inverse is kept")
            if block.name in rows:
                share = 0.0 if count == 1 else keep
                self._settle(block, state, rows[block.name], share)
            spent = 1e3 * (time.perf_counter() - began)
            self.milliseconds[block.name] = self.milliseconds.get(block.name, 0.0) + spent
        self._set_lambdas()
        self.counters["statistics"] += bool(rows)
        self.counters["inverses"] += inverse

    def _set_lambdas(self) -> None:
        known = [block for block in self.blocks if self.curvature[block.name]]
        traces = {block.name: self._trace(block, self.curvature[block.name]) for block in known}
        relative = self.damping * self.damping_factor
        mean = sum(traces.values()) / max(1, sum(block.size for block in known))
        for block in known:
            unit = traces[block.name] / block.size if self.damping_per == "layer" else mean
            self.lambdas[block.name] = max(relative * unit, 1e-12)

    def _rows(self, observations: Sequence[Observation]) -> dict[str, list[Rows]]:
        found: dict[str, list[Rows]] = {}
        for block in self.blocks:
            dtype = next(iter(block.parameters.values())).dtype
            dtype = dtype if dtype == torch.float64 else torch.float32
            for seen in observations:
                rows = seen.rows(block, dtype, partial(self._drawn, seen))
                if rows is not None:
                    found.setdefault(block.name, []).append(rows)
        return found

    def _drawn(self, seen: Observation, uses: int) -> Tensor | None:
        """Which uses to take statistics from, where there are more than needed."""
        if self.max_rows is None or seen.samples * uses <= self.max_rows or not self._may_draw():
            return None
        kept = max(1, self.max_rows // seen.samples)
        device = self.generator.device
        return torch.randperm(uses, generator=self.generator, device=device)[:kept].sort().values

    def _may_draw(self) -> bool:
        """Whether statistics are sums over uses, so that some can stand for all."""
        return False

    def _complain_unseen(self) -> None:
        if self.counters["statistics"] == 0:
            raise UsageError(
                "no training forward pass was seen, so there is no curvature to step with: call "
                "the model that the optimizer was given (model.train(), with gradients), or name "
                "the module that is called with forward=; give the compiled model if it is compiled"
            )
        self.counters["missed_refreshes"] += 1
        self.overdue = True
        if self.counters["missed_refreshes"] == 1:
            _warn("a refresh was due, but no training forward pass was seen; it waits for the next")

    # Moving

    def _precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(F̂ + λ I)⁻¹ times the matrices of blocks."""
        by_name = {block.name: block for block in self.blocks}
        return {
            name: self._apply(by_name[name], self.curvature[name], matrix, self.lambdas[name])
            for name, matrix in gradients.items()
        }

    def _directions(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Preconditioned gradients, or momenta, by parameter name."""
        matrices, unseen = {}, dict[str, Tensor]()
        for block in self.blocks:
            present = [name for name in block.parameters if name in grads]
            if present and not self.curvature[block.name]:
                # not called when statistics were last due: F̂ = 0 until it is
                unit = max(self.lambdas.values(), default=1.0)
                unseen |= {name: grads[name] / unit for name in present}
            elif present:
                zero = {n: torch.zeros_like(p) for n, p in block.parameters.items()}
                matrices[block.name] = block.to_matrix(
                    {n: grads[n] if n in grads else zero[n] for n in block.parameters}
                )
        found = self._precondition(matrices)
        by_name = {block.name: block for block in self.blocks}
        directions = unseen
        for name, matrix in found.items():
            for parameter, tensor in by_name[name].from_matrix(matrix).items():
                if parameter in grads:
                    directions[parameter] = tensor
        return directions

    def _move(self, grads: dict[str, Tensor], observations: Sequence[Observation]) -> None:
        modelled = self.step_length == "quadratic" and bool(observations)
        groups = {p: g for g in self.param_groups if "momentum" in g for p in g["params"]}
        parameters = {self.names[p]: p for p in groups}
        if not modelled and self.step_length == "lr":
            grads = {name: self._momentum(parameters[name], g, groups) for name, g in grads.items()}
        directions = self._directions(grads)
        self.clip = 1.0
        if modelled:
            steps = quadratic.best_step(self, observations, grads, directions, parameters)
        else:
            steps = {name: -v for name, v in directions.items()}
        rates = {name: groups[parameters[name]]["lr"] for name in steps}
        if self.kl_clip is not None and not modelled:
            terms = [rates[n] ** 2 * (directions[n] * grads[n]).sum() for n in steps]
            size = float(torch.stack(terms).sum().clamp_min(0)) if terms else 0.0
            self.clip = 1.0 if size <= self.kl_clip else (self.kl_clip / size) ** 0.5
        final = {name: step.mul_(rates[name] * self.clip) for name, step in steps.items()}
        if self.adaptive_damping and any(seen.calls for seen in observations):
            self._adapt(observations, grads, final, parameters)
        for name, step in final.items():
            parameter, group = parameters[name], groups[parameters[name]]
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(step)
            if modelled and group["momentum"] > 0:
                self.state[parameter]["last_step"] = step

    def _momentum(self, parameter: Tensor, grad: Tensor, groups: Mapping[Any, Any]) -> Tensor:
        mu = groups[parameter]["momentum"]
        if mu == 0:
            return grad
        state = self.state[parameter]
        if "momentum" in state:
            state["momentum"].mul_(mu).add_(grad)
        else:
            state["momentum"] = grad.clone()
        buffer: Tensor = state["momentum"]
        return buffer

    def _adapt(
        self,
        observations: Sequence[Observation],
        grads: Mapping[str, Tensor],
        final: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        """λ falls where the quadratic model foretold the change of the loss, else rises."""
        ratio = quadratic.reduction_ratio(self, observations, final, parameters)
        self.reduction_ratio = ratio
        if ratio is None:
            return
        omega = 0.95**self.statistics_every
        if ratio > 0.75:
            self.damping_factor = max(self.damping_factor * omega, 1e-6)
        elif ratio < 0.25:
            self.damping_factor = min(self.damping_factor / omega, 1e6)


def _use_actual_targets(observations: Sequence[Observation], factor: float, scale: float) -> None:
    """Take the empirical Fisher's gradients from the caller's own backward pass."""
    samples = sum(seen.samples for seen in observations)
    unit = samples / (factor * scale)
    for seen in observations:
        draw = [None if c.backward is None else _wide(c.backward) * unit for c in seen.calls]
        seen.draws = [draw]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _finite(tensors: Iterable[Tensor]) -> bool:
    found = list(tensors)
    if not found:
        return True
    norms = torch._foreach_norm(found)
    return bool(torch.stack([n.float() for n in norms]).isfinite().all())


def _warn(message: str) -> None:
    warnings.warn(message, SmallfryWarning, stacklevel=3)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)
