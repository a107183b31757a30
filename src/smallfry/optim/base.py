"""Natural gradient as an ordinary optimizer, a drop-in replacement for AdamW.

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

The approximation of a block is that of a method: ``optim/approximation.py``.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smallfry._torch import disable_dynamo
from smallfry.curvature import Block, Observation, Taps, as_likelihood, cover
from smallfry.curvature.observer import Observer
from smallfry.errors import UsageError, nearest
from smallfry.optim import quadratic
from smallfry.optim.approximation import Approximation
from smallfry.optim.bound import clip_step, fallback_share, step_fallback
from smallfry.optim.checks import (
    check_coverage,
    check_first_batch,
    complain_unseen,
    require_model,
    warn,
    warn_of_unfrozen,
)
from smallfry.optim.collectives import Collectives
from smallfry.optim.groups import build_adamw, natural_groups, split_groups
from smallfry.optim.hindsight import keep_step
from smallfry.optim.inspect import (
    Diagnosis,
    Summary,
    diagnose_blocks,
    left_out_rows,
    summarize,
)
from smallfry.optim.numerics import finite
from smallfry.optim.one_hot import with_embeddings
from smallfry.optim.preconditioned import PreconditionedOptimizer
from smallfry.optim.preconditioner import Preconditioner
from smallfry.optim.settings import MODEL_KEYWORDS, CurvatureSettings, Settings
from smallfry.optim.state import load_state, save_state
from smallfry.optim.unfreezing import unfreeze
from smallfry.optim.weighing import weigh_rows


class NaturalGradient(PreconditionedOptimizer):
    """Natural-gradient optimizer with a given approximation of the Fisher.

    Args:
        model: The model, compiled or not. Its training forward passes are watched.
        lr: Learning rate of the covered parameters.
        approximation: Approximation of a block's Fisher.
        settings: Those of ``CurvatureSettings``, and what belongs to the model:
            ``params``, the parameters to train, or groups with their own ``lr``, ``momentum`` and
            ``weight_decay``; default all that require a gradient.
            ``forward``, the module whose call is a training forward pass, where that is not
            ``model``.
            ``grad_scaler``, the GradScaler, needed with fisher="empirical" only.
            ``process_group``, the processes that share each batch and average their gradients, as
            ``DistributedDataParallel`` does: a group of ``torch.distributed``, None for all there
            are, False for this one alone. They refresh the curvature together, and take it of the
            whole batch (``optim/collective_update.py``).

    Raises:
        UsageError: No layer can be covered, or a setting makes no sense.
    """

    shares_batches: ClassVar[bool] = True  # several processes can refresh the curvature together
    beside: ClassVar[str] = ""  # further words of the summary on each layer

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        approximation: Approximation,
        **settings: Unpack[Settings],
    ) -> None:
        require_model(self, model)
        given = {key: value for key, value in settings.items() if key not in MODEL_KEYWORDS}
        for name in given:
            if name not in Settings.__annotations__:
                near = nearest(name, Settings.__annotations__)
                raise UsageError(f"{type(self).__name__} has no setting '{name}'{near}")
        lr = float(lr) if isinstance(lr, Tensor) else lr
        self.settings = CurvatureSettings(lr=lr, **given)  # type: ignore[arg-type]
        params, forward = settings.get("params"), settings.get("forward")
        momentum, decay = self.settings.momentum, self.settings.weight_decay
        self.fallback_lr, self.exclude = self.settings.fallback_lr, tuple(self.settings.exclude)
        if isinstance(model, DistributedDataParallel):
            model = model.module
        bare: nn.Module = getattr(model, "_orig_mod", model)
        groups = natural_groups(bare, params, lr, momentum, decay, self.fallback_lr)
        trained = [p for group in groups for p in group["params"]]
        fisher, draws = self.settings.fisher, self.settings.draws
        self.tied = approximation.needs_gradients and fisher != "exact" and draws == 1
        coverage = cover(bare, trained, self.exclude, self.tied)
        check_coverage(self, bare, coverage)
        self.uncovered, self.model = coverage.uncovered, weakref.ref(bare)
        approximation = with_embeddings(approximation, coverage.blocks)
        self.names = {p: name for name, p in bare.named_parameters() if p in set(trained)}
        self.frozen = {n: p for n, p in bare.named_parameters() if not p.requires_grad}
        if params is not None:
            self.frozen = {}
        collectives = Collectives(settings.get("process_group"), trained[0].device)
        blocks = coverage.blocks
        self.preconditioner = self._build_preconditioner(blocks, approximation, collectives)
        covered, rest = split_groups(
            groups, {p for b in self.blocks for p in b.parameters.values()}
        )
        super().__init__(covered, {"lr": lr, "momentum": momentum, "weight_decay": decay})
        self.adamw = build_adamw(rest)
        if self.adamw is not None:
            self.param_groups += self.adamw.param_groups

        self.overdue = self.overdue_inverse = self.checked = False
        self.clip = 1.0
        self.divergence_ratio = self.targets = 1.0
        self.measuring, self.measurable, self.measured_size = True, True, 0.0
        self.measured, self.fallback_ratio, self.last_step = False, 0.0, None
        self.reduction_ratio: float | None = None
        self.kl_clip, self.loss_scale = self.settings.kl_clip, self.settings.loss_scale
        self._factor = 1.0
        if collectives.count > 1 and not self.shares_batches:
            raise UsageError(
                f"{type(self).__name__} works in one process only: take another method, or give "
                "process_group=False where each process trains a model of its own"
            )
        self.likelihood = as_likelihood(self.settings.likelihood)
        self.observer = Observer(
            model if forward is None else forward,
            Taps(self.blocks),
            self.likelihood,
            self.settings.fisher if approximation.needs_gradients else "none",
            self.settings.draws,
            self.generator,
            self._wanted,
            self._begin_draw,
        )
        self.observer.process = collectives.rank, collectives.count
        self.observer.needs_identity = self.preconditioner.needs_identity
        self.grad_scaler = settings.get("grad_scaler")
        if self.grad_scaler is not None:
            self.observer.grad_scale = self.grad_scaler.get_scale

    def _build_preconditioner(
        self, blocks: Sequence[Block], approximation: Approximation, collectives: Collectives
    ) -> Preconditioner:
        """Build the preconditioner of these blocks; overridden by methods that couple blocks."""
        return Preconditioner(blocks, approximation, self.settings, collectives)

    @disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Refresh the curvature if due, and update the parameters.

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
        if self._nothing_to_do(observations):
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
            self.overdue, self.overdue_inverse = self._due()
            return
        factor = self._loss_factor(observations)
        covered = {name: raw[name] for b in self.blocks for name in b.parameters if name in raw}
        refreshed = self.counters["statistics"]
        self._refresh(observations, covered, factor)
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
        step_fallback(self, observations)
        if self.counters["statistics"] > refreshed:
            self.measuring = True  # the next batch is one that F̂ has not seen
        if not self.measuring:
            self.last_step = None

    def weigh(self, weights: Any) -> None:
        """Set the row weights of the loss, before its ``backward()``.

        Needed only where the gradient can't show them: soft targets and numbers. The loss is
        Σ weight · nll over rows, with what it divides by in the weights (``w / w.sum()``).

        Args:
            weights: (samples,), or for each row of the output: (samples, positions) of classes,
                else the output's own shape. For a likelihood of parts, a mapping.
        """
        self.observer.given_weights = weights

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and discard backward passes without a step."""
        self.observer.drop()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, such as layers that were frozen."""
        if hasattr(self, "observer"):
            unfreeze(self, param_group)
        else:
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state, by parameter name, as plain data and tensors."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        found = save_state(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            found = after(self, found) or found
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state; a UsageError if it belongs to another method or model."""
        given = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            given = before(self, given) or given
        load_state(self, given)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def summary(self) -> Summary:
        """Summarise each parameter: approximation, memory, cost of a refresh."""
        momentum = any(group.get("momentum", 0) > 0 for group in self.param_groups)
        rows = summarize(self.preconditioner, momentum, self.beside)
        parameters = {name: p for p, name in self.names.items()}
        rows += left_out_rows(parameters, self.uncovered, self.frozen)
        return Summary(type(self).__name__, tuple(rows), self._bound())

    def _bound(self) -> str:
        """Describe the bound on a step's divergence."""
        if self.kl_clip is None:
            return "divergence of a step: without bound"
        allowed = f"divergence of a step: at most {self.kl_clip / 2:g} for each target"
        if self.settings.step_length == "quadratic":
            return f"{allowed}, by the exact quadratic model of each batch"
        if not self.measurable:
            return f"{allowed}, by the model alone"
        ratio, count = self.divergence_ratio, self.counters["measurements"]
        share = f"; {fallback_share(self):.2g} of it by the AdamW inside" if self.adamw else ""
        return f"{allowed}{share}; measured {ratio:.3g} × the modelled, in {count} measurements"

    def diagnostics(self) -> Diagnosis:
        """Compute diagnostics; Fisher errors need ``monitor()``, cosines gradients."""
        return Diagnosis(
            diagnose_blocks(self.preconditioner),
            self.clip,
            self.damping_factor,
            self.reduction_ratio,
            getattr(self.preconditioner, "energy", None),
            dict(self.counters),
            self.divergence_ratio,
            self.targets,
            fallback_share(self),
        )

    def close(self) -> None:
        """Stop observing the model permanently."""
        self.observer.remove()

    # Refreshing

    def _due(self) -> tuple[bool, bool]:
        """Return whether statistics and inverses are due."""
        step, settings = self.counters["steps"], self.settings
        early = step < settings.burn_in
        statistics = early or step % settings.statistics_every == 0
        inverse = early or step % settings.refresh_every == 0
        return self.overdue or statistics, self.overdue_inverse or inverse

    def _wanted(self) -> str:
        quadratic = self.settings.step_length == "quadratic"
        measured = self.measurable and self.kl_clip is not None
        if self._due()[0]:
            kept = self.settings.adaptive_damping or quadratic or measured
            self.observer.keep_arguments = kept
            self.observer.watch_backward = not self.checked
            self.observer.probing = not self.checked and self.settings.check != "off"
            return "taps"
        self.observer.keep_arguments = quadratic or (measured and self.measuring)
        if self.observer.keep_arguments:
            return "outputs"
        return "sizes" if isinstance(self.loss_scale, str) else ""  # they scale the loss

    def _begin_draw(self, number: int) -> None:
        self.preconditioner.draw(0, number)

    def _nothing_to_do(self, observations: Sequence[Observation]) -> bool:
        """Return whether a refresh is due, nothing was observed, and all gradients are zero.

        So it is for an empty batch, and where ``torch.distributed.checkpoint`` steps only to make
        an optimizer's state.
        """
        any_process = self.collectives.any_process
        if not self._due()[0] or any_process(bool(observations)):
            return False
        grads = [p.grad for p in self.names if p.grad is not None]
        return not any_process(not grads or any(bool(g.any()) for g in grads))

    def _refresh(
        self, observations: Sequence[Observation], grads: Mapping[str, Tensor], factor: float
    ) -> None:
        """Refresh statistics and inverses if due.

        Args:
            observations: Observations of the current batch.
            grads: ``.grad`` of the covered parameters, by name.
            factor: The training loss over the mean negative log-likelihood.

        Raises:
            UsageError: No forward pass was ever seen, or what was seen is not what was stated.
        """
        any_process = self.collectives.any_process
        statistics, inverse = self._due()
        foreign = [name for seen in observations for name in seen.foreign]
        if any_process(bool(foreign)) if statistics else foreign:
            raise UsageError(
                f"layer '{(foreign or ['of another process'])[0]}' has another weight than when "
                "the optimizer was built; build the optimizer after the model has its final layers"
            )
        tapped = [seen for seen in observations if seen.calls]
        if statistics and any_process(not tapped):
            complain_unseen(self.counters)
            self.overdue, statistics = True, False
        if not statistics and not inverse:
            return
        if statistics and not self._prepare(tapped, grads, factor):
            self.counters["failed_refreshes"] += 1
            self.overdue, self.overdue_inverse = True, inverse
            return
        self.preconditioner.refresh(tapped if statistics else [], inverse)
        self.overdue = self.overdue and not statistics
        self.overdue_inverse = self.overdue_inverse and not inverse

    def _prepare(
        self, tapped: Sequence[Observation], grads: Mapping[str, Tensor], factor: float
    ) -> bool:
        """Check and weight the observations; False if they are not finite."""
        collectives, observer = self.collectives, self.observer
        weighed = weigh_rows(tapped, factor, self.loss_scale, observer.rescaled, collectives)
        warn_of_unfrozen(self.frozen)
        # processes average their gradients: a mean share of the samples is what one stands for
        share = self.batch_size(tapped) / collectives.count
        if not self.checked and self.settings.check != "off":
            self.checked = True
            try:
                check_first_batch(
                    self.blocks, tapped, grads, collectives, self.likelihood, factor,
                    weighed.values(), self.loss_scale, share, self.settings.check,
                )  # fmt: skip
            except UsageError:
                self.checked = False
                raise
        for seen in tapped:
            seen.put_together()
        if observer.fisher == "empirical":
            observer.use_training_gradients(tapped, share / factor)
        drawn = not self.approximation.needs_gradients or all(seen.draws for seen in tapped)
        tame = drawn and finite(t for seen in tapped for t in seen.tensors())
        return not collectives.any_process(not tame)

    # Moving

    def _directions(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute preconditioned gradients, or momenta, by parameter name."""
        return self.preconditioner.directions(grads)

    def _move(self, grads: dict[str, Tensor], observations: Sequence[Observation]) -> None:
        any_process, settings = self.collectives.any_process, self.settings
        modelled = settings.step_length == "quadratic" and not any_process(not observations)
        groups = {p: g for g in self.param_groups if "momentum" in g for p in g["params"]}
        parameters = {self.names[p]: p for p in groups}
        if not modelled and settings.step_length == "lr":
            grads = {name: self._momentum(parameters[name], g, groups) for name, g in grads.items()}
        directions = self._directions(grads)
        self.clip = 1.0
        steps = {name: -v for name, v in directions.items()}
        if modelled:
            steps = self._best_step(observations, grads, steps, parameters)
        rates = {name: groups[parameters[name]]["lr"] for name in steps}
        final = {name: step.mul_(rates[name]) for name, step in steps.items()}
        if not modelled:
            size = self.preconditioner.divergence(directions, grads, rates)
            self.clip = clip_step(self, observations, final, size)
        for step in final.values():
            step.mul_(self.clip)
        if not modelled:
            keep_step(self, final, size, self.clip)
        tapped = any(seen.calls for seen in observations)
        if settings.adaptive_damping and not any_process(not tapped):
            damping = self.preconditioner.damping_of_parameters()
            ratio = quadratic.reduction_ratio(self.weighed(observations), final, damping)
            factor, every = self.damping_factor, settings.statistics_every
            self.damping_factor = quadratic.adapted_damping(factor, ratio, every)
            self.reduction_ratio = ratio
        for name, step in final.items():
            parameter, group = parameters[name], groups[parameters[name]]
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(step)
            if modelled and group["momentum"] > 0:
                self.state[parameter]["last_step"] = step

    def _best_step(
        self,
        observations: Sequence[Observation],
        grads: Mapping[str, Tensor],
        steps: dict[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
    ) -> dict[str, Tensor]:
        """Find the best combination of steps and the last ones; ``clip`` bounds its divergence."""
        last = {name: self.state[parameters[name]].get("last_step") for name in steps}
        bases = [steps]
        if any(step is not None for step in last.values()):
            bases.append(
                {n: torch.zeros_like(steps[n]) if d is None else d for n, d in last.items()}
            )
        batch = self.weighed(observations)
        damping = self.preconditioner.damping_of_parameters()
        best = quadratic.best_step(batch, grads, bases, damping)
        rate = max(group["lr"] for group in self.param_groups if "momentum" in group)
        size = rate**2 * best.curvature
        if self.kl_clip is not None:
            self.count_targets(batch)
            self.clip = min(1.0, (self.kl_clip * self.targets / max(size, 1e-300)) ** 0.5)
        return best.step

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
