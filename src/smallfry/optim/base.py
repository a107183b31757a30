"""Natural gradient as an ordinary optimizer: replace AdamW, change nothing else.

One step, for every covered block with gradient g (of the mean negative log-likelihood):

    m ← μ m + g                          momentum, on the gradient
    v ← (F̂ + λ I)⁻¹ m                    F̂ and its inverse as last refreshed
    ν ← min(1, √(κ n / r Σ lr² ⟨v, m⟩))  ⟨v, m⟩ ≥ vᵀF̂v: twice the divergence that F̂ foretells
    θ ← (1 − lr · decay) θ − lr ν v

With momentum in front of the inverse, the bound on the divergence is that of the step that is made,
and costs one inner product; r, the measured divergence over the modelled, makes it hold for each of
the n targets of a sample (``optim/bound.py``). When statistics are due (``statistics_every``), the
observer takes them during the caller's own forward; running averages count refreshes, and the first
refresh replaces rather than averages. Every ``inverse_every`` steps the inverse is made anew. On
the first ``burn_in`` steps both are refreshed each time. λ is ``damping`` times the mean eigenvalue
of F̂, so that it means the same whatever the batch size and the reduction of the loss. What can't
be covered is trained by an AdamW inside.

A method says how one block is approximated: ``optim/approximation.py``.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smallfry.curvature import Likelihood, Observation, Rows, Taps, as_likelihood, cover
from smallfry.curvature.observer import Observer
from smallfry.errors import UsageError
from smallfry.optim import quadratic
from smallfry.optim.approximation import Approximation, State
from smallfry.optim.bound import clip_step
from smallfry.optim.checks import check_coverage, check_settings, require_model
from smallfry.optim.distribution import Cost, cost_of, owners_of
from smallfry.optim.exchange import Exchange
from smallfry.optim.groups import build_adamw, natural_groups, split_groups
from smallfry.optim.inspect import (
    Diagnosis,
    Distribution,
    Summary,
    diagnose,
    distribution,
    summarize,
)
from smallfry.optim.one_hot import with_embeddings
from smallfry.optim.refresh import (
    anywhere,
    finite,
    nothing_to_do,
    refresh,
    refresh_blocks,
    warn,
    wide,
)
from smallfry.optim.state import load_state, save_state
from smallfry.optim.together import refresh_together
from smallfry.optim.unfreezing import unfreeze


class NaturalGradient(torch.optim.Optimizer):
    """What all natural-gradient methods share.

    Args:
        model: The model, compiled or not. Its training forward passes are watched.
        lr: Learning rate of the covered parameters.
        approximation: How a block's Fisher is approximated.
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
        kl_clip: κ, twice the divergence of a step for each target of a sample (a class, a pixel, a
            token), as measured on batches that the curvature has not seen; None does not clip.
        step_length: "lr", or "quadratic" for the minimum of the exact quadratic model over the
            natural gradient and (with momentum) the last step, times ``lr``; costs two forward-mode
            passes a step.
        ema_decay: Largest share of the old statistics kept at a refresh.
        statistics_every: Steps between refreshes of the statistics.
        inverse_every: Steps between refreshes of the inverses; default ``statistics_every``.
        burn_in: First steps on which both are refreshed every time. One batch shows few of the
            directions that the next ones go; steps along the others would be far too long.
        fisher: "mc" (sampled targets), "exact" (all columns), "empirical" (the actual targets).
        draws: Sampled targets per sample.
        max_rows: Samples times uses that a layer's statistics are taken from, where they are sums
            over uses (sharing="expand"); more uses are drawn at random. None takes all.
        exclude: Modules to leave to AdamW, by name or pattern.
        forward: The module whose call is a training forward pass, where that is not ``model``.
        fallback_lr: Learning rate of the AdamW inside, for what is not covered.
        grad_scaler: The GradScaler, needed with fisher="empirical" only.
        check: What to do if the first gradients are not those of the stated loss and layers:
            "error", "warn", or "off" for a loss with further terms, such as a weight penalty.
        seed: Of the sampled targets.
        process_group: The processes that share each batch and average their gradients, as
            ``DistributedDataParallel`` does: a group of ``torch.distributed``, None for all there
            are, False for this one alone. They refresh the curvature together, and take it of the
            whole batch; ``optim/together.py`` says how.

    Raises:
        UsageError: No layer can be covered, or a setting makes no sense.
    """

    shares_batches = True  # whether several processes can refresh the curvature together
    beside = ""  # what else the summary should tell of each layer

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        approximation: Approximation,
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
        burn_in: int = 10,
        fisher: Literal["mc", "exact", "empirical"] = "mc",
        draws: int = 1,
        max_rows: int | None = 2048,
        exclude: Iterable[str] = (),
        forward: nn.Module | None = None,
        fallback_lr: float = 1e-3,
        grad_scaler: Any = None,
        check: Literal["error", "warn", "off"] = "error",
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        require_model(self, model)
        inverse_every = statistics_every if inverse_every is None else inverse_every
        check_settings(
            lr=lr,
            fallback_lr=fallback_lr,
            damping=damping,
            damping_per=damping_per,
            momentum=momentum,
            weight_decay=weight_decay,
            kl_clip=kl_clip,
            step_length=step_length,
            ema_decay=ema_decay,
            periods=(statistics_every, inverse_every),
            burn_in=burn_in,
            loss_scale=loss_scale,
            max_rows=max_rows,
            check=check,
        )
        if isinstance(model, DistributedDataParallel):
            model = model.module
        bare: nn.Module = getattr(model, "_orig_mod", model)
        self.exclude, self.fallback_lr = tuple(exclude), fallback_lr
        groups = natural_groups(bare, params, lr, momentum, weight_decay, fallback_lr)
        trained = [p for group in groups for p in group["params"]]
        self.tied = approximation.needs_gradients and fisher != "exact" and draws == 1
        coverage = cover(bare, trained, self.exclude, self.tied)
        check_coverage(self, bare, coverage)
        self.blocks, self.uncovered = coverage.blocks, coverage.uncovered
        approximation = with_embeddings(approximation, self.blocks)
        approximation.check(self.blocks)
        self.approximation, self.model = approximation, weakref.ref(bare)
        self.names = {p: name for name, p in bare.named_parameters() if p in set(trained)}
        self.frozen = {n: p for n, p in bare.named_parameters() if not p.requires_grad}
        if params is not None:
            self.frozen = {}
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
        self.burn_in, self.check = burn_in, check
        self.loss_scale, self.max_rows, self.grad_scaler = loss_scale, max_rows, grad_scaler
        self.curvature: dict[str, State] = {block.name: {} for block in self.blocks}
        self.counters = {
            "steps": 0,
            "statistics": 0,  # refreshes
            "inverses": 0,
            "skipped_steps": 0,  # a gradient was not finite
            "failed_refreshes": 0,  # statistics or inverses were not finite: the old ones stayed
            "missed_refreshes": 0,  # no forward pass was seen when one was due
            "measurements": 0,  # of a step's divergence
        }
        self.overdue = self.overdue_inverse = self.checked = False
        self.lambdas: dict[str, float] = {}
        self.clip = 1.0
        self.divergence_ratio = self.targets = 1.0
        self.measuring, self.measurable, self.measured_size = True, True, 0.0
        self.reduction_ratio: float | None = None
        self.milliseconds: dict[str, float] = {}
        self._latest: dict[str, list[Rows]] = {}

        self.exchange, self.seed = Exchange(process_group), seed
        self.owners = owners_of(self.blocks, approximation, self.exchange.count)
        if self.exchange.count > 1 and not self.shares_batches:
            raise UsageError(
                f"{type(self).__name__} works in one process only: take another method, or give "
                "process_group=False where each process trains a model of its own"
            )
        self.device = trained[0].device
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.likelihood = as_likelihood(likelihood)
        self.observer = Observer(
            model if forward is None else forward,
            Taps(self.blocks),
            self.likelihood,
            fisher if approximation.needs_gradients else "none",
            draws,
            self.generator,
            self._wanted,
            self._begin_draw,
        )
        self.observer.process = self.exchange.rank, self.exchange.count
        self.observer.needs_identity = any(not approximation.sums_over_uses(b) for b in self.blocks)
        if grad_scaler is not None:
            self.observer.grad_scale = grad_scaler.get_scale

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UsageError(
            "a natural-gradient optimizer belongs to the model it watches and can't be copied or "
            "pickled: build a new one for the new model, and load_state_dict()"
        )

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__({})

    # The optimizer

    @torch._disable_dynamo  # type: ignore[attr-defined]
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
        if nothing_to_do(self, observations):
            return result
        try:
            self._step(observations)
        finally:
            for seen in observations:
                seen.clear()
            self.counters["steps"] += 1
        return result

    def _step(self, observations: Sequence[Observation]) -> None:
        raw = {self.names[p]: p.grad for p in self.names if p.grad is not None}
        if not finite(raw.values()):
            self.counters["skipped_steps"] += 1
            if self.counters["skipped_steps"] == 1:
                warn("the gradients are not finite: such steps are skipped, and counted")
            self.overdue = self.overdue or self._due(self.statistics_every)
            self.overdue_inverse = self.overdue_inverse or self._due(self.inverse_every)
            return
        factor = self._loss_factor(observations)
        covered = {name: raw[name] for b in self.blocks for name in b.parameters if name in raw}
        refreshed = self.counters["statistics"]
        refresh(self, observations, covered, factor)
        if not self.counters["statistics"]:
            self.counters["skipped_steps"] += 1
            if self.counters["skipped_steps"] == 1:
                warn(
                    "no curvature could be taken yet, as the model's outputs or what goes through "
                    "its layers are not finite: steps are skipped until it can"
                )
            return
        if factor != 1.0:
            covered = {name: grad / factor for name, grad in covered.items()}
        self._move(covered, observations)
        if self.counters["statistics"] > refreshed:
            self.measuring = True  # the next batch is one that F̂ has not seen
        if self.adamw is not None:
            self.adamw.step()

    def weigh(self, weights: Any) -> None:
        """State the weights of the rows of the loss, before its ``backward()``.

        Needed only where the gradient can't show them: soft targets and numbers. The loss is
        Σ weight · nll over rows, with what it divides by in the weights (``w / w.sum()``).

        Args:
            weights: (samples,), or for each row of the output: (samples, positions) of classes,
                else the output's own shape. For a likelihood of parts, a mapping.
        """
        self.observer.given_weights = weights

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients; a backward pass that was not stepped on is forgotten with them."""
        self.observer.drop()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters of the model, such as layers that were frozen."""
        if hasattr(self, "observer"):
            unfreeze(self, param_group)
        else:
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """All that resuming bit for bit needs, by parameter name; plain data and tensors."""
        return save_state(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state; a UsageError if it belongs to another method or model."""
        load_state(self, state_dict)

    def summary(self) -> Summary:
        """What happens to each parameter: approximation, memory, cost of a refresh."""
        return summarize(self)

    def distribution(self) -> Distribution:
        """Which process refreshes which layers, and what the last refresh sent."""
        return distribution(self)

    def costs(self, rows: int) -> dict[str, Cost]:
        """What a refresh of each block costs, for so many ``rows``: uses by the whole batch."""
        return {b.name: cost_of(b, self.approximation, rows) for b in self.blocks}

    def diagnostics(self) -> Diagnosis:
        """How the approximation stands; Fisher errors need ``monitor()``, cosines gradients."""
        return diagnose(self)

    def close(self) -> None:
        """Stop watching the model, for good."""
        self.observer.remove()

    def monitor(self, on: bool = True) -> None:
        """Keep the rows of the last refresh, so that diagnostics can tell the Fisher error."""
        self._monitoring = on
        self._latest = {}

    _monitoring = False

    # Refreshing

    def _due(self, every: int) -> bool:
        return self.counters["steps"] < self.burn_in or self.counters["steps"] % every == 0

    def _wanted(self) -> str:
        quadratic = self.step_length == "quadratic"
        measured = self.measurable and self.kl_clip is not None
        self.observer.keep_arguments = self.adaptive_damping or quadratic or measured
        if self.overdue or self._due(self.statistics_every):
            self.observer.watch_backward = not self.checked
            self.observer.probing = not self.checked and self.check != "off"
            return "taps"
        return "outputs" if measured or quadratic or self.loss_scale == "sum" else ""

    def _begin_draw(self, number: int) -> None:
        self._draw(0, number)

    def _loss_factor(self, observations: Sequence[Observation]) -> float:
        if not isinstance(self.loss_scale, str):
            return float(self.loss_scale)
        if self.loss_scale == "sum":
            samples = self._batch_size(observations)
            self._factor = samples / self.exchange.count if samples else self._factor
        elif observations:
            self._factor = self.likelihood.mean_factor(observations[0].outputs)
        return self._factor

    _factor = 1.0

    def _batch_size(self, observations: Sequence[Observation]) -> float:
        """Samples in the batch of all processes."""
        return self.exchange.sums([sum(seen.size for seen in observations)], self.device)[0]

    def _draw(self, *purpose: int) -> None:
        """Let the generator begin the random numbers of a purpose in this step.

        They don't depend on what was drawn before, so that processes can't fall out of step.
        """
        key = (self.seed, self.counters["steps"], *purpose)
        seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
        self.generator.manual_seed(int(seed >> np.uint64(1)))

    def _refresh_blocks(self, tapped: Sequence[Observation], inverse: bool) -> None:
        """Statistics, damping and inverses of all blocks; for methods that couple blocks."""
        if self.exchange.count == 1:
            refresh_blocks(self, tapped, inverse)
        else:
            refresh_together(self, tapped, inverse)

    # Moving

    def _precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(F̂ + λ I)⁻¹ times the matrices of blocks."""
        by_name = {block.name: block for block in self.blocks}
        return {
            name: self.approximation.apply(
                by_name[name], self.curvature[name], matrix, self.lambdas[name]
            )
            for name, matrix in gradients.items()
        }

    def _directions(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Preconditioned gradients, or momenta, by parameter name."""
        matrices, unseen = {}, dict[str, Tensor]()
        for block in self.blocks:
            present = [name for name in block.parameters if name in grads]
            if present and "inverted" not in self.curvature[block.name]:
                # not called yet when statistics were due: F̂ = 0 until it is
                unit = max(self.lambdas.values(), default=1.0)
                unseen |= {name: grads[name] / unit for name in present}
            elif present:
                zero = {n: torch.zeros_like(p) for n, p in block.parameters.items()}
                matrix = block.to_matrix({n: grads.get(n, zero[n]) for n in block.parameters})
                matrices[block.name] = matrix.to(wide(matrix.dtype))
        found = self._precondition(matrices)
        by_name = {block.name: block for block in self.blocks}
        directions = unseen
        for name, matrix in found.items():
            for parameter, tensor in by_name[name].from_matrix(matrix).items():
                if parameter in grads:
                    directions[parameter] = tensor.to(grads[parameter].dtype)
        return directions

    def _move(self, grads: dict[str, Tensor], observations: Sequence[Observation]) -> None:
        modelled = self.step_length == "quadratic" and not anywhere(self, not observations)
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
        final = {name: step.mul_(rates[name]) for name, step in steps.items()}
        if not modelled:
            size = self._divergence(directions, grads, rates)
            self.clip = clip_step(self, observations, final, size, parameters)
        for step in final.values():
            step.mul_(self.clip)
        tapped = any(seen.calls for seen in observations)
        if self.adaptive_damping and not anywhere(self, not tapped):
            quadratic.adapt_damping(self, observations, final, parameters)
        for name, step in final.items():
            parameter, group = parameters[name], groups[parameters[name]]
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(step)
            if modelled and group["momentum"] > 0:
                self.state[parameter]["last_step"] = step

    def _divergence(
        self,
        directions: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        rates: Mapping[str, float],
    ) -> float:
        """Twice the divergence of a step, or more."""
        terms = [rates[n] ** 2 * (v * grads[n]).sum() for n, v in directions.items()]
        return float(torch.stack(terms).sum().clamp_min(0)) if terms else 0.0

    def _settings(self) -> dict[str, Any]:
        """Plain data that a saved state depends on."""
        return {"approximation": self.approximation.name} | self.approximation.settings()

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
