"""Methods: actions on a model during or after training, each ending in a transform.

A method's settings are a frozen dataclass, registered by name: at once the Python argument, the
entry in YAML and that in the manifest. A kit's methods begin with its name and a hyphen. ``start``
of the settings gives the method itself, which has state. Methods run over any optimizer, through
torch's hooks around a step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from smallfry.errors import UsageError, nearest
from smallfry.io.plugins import load_kit, load_plugins, scan
from smallfry.io.registry import add, require_frozen
from smallfry.settings import strict
from smallfry.transforms.spec import ModelSpec, Transform

PACKAGE = "smallfry.compress"
T = TypeVar("T", bound=type)

_methods: dict[str, Any] = {}


@dataclass(frozen=True)
class Setting:
    """Context of the start of a method.

    Args:
        spec: Identity of the model.
        example: A batch of inputs in the model's own dtype and device.
        batches: Batches of training inputs to calibrate with, likewise, which can be read again;
            empty where there is no data.
        steps: Optimizer steps there will be at most; 0 where nothing is trained.
        seed: Random seed.
        rehearsal: True where only errors are looked for, on an untrained model: spare the work.
    """

    spec: ModelSpec
    example: Tensor
    batches: Iterable[Tensor] = ()
    steps: int = 0
    seed: int = 0
    rehearsal: bool = False


class Method:
    """Running method; the base class does nothing.

    A training run that is resumed calls ``begin`` again and then ``load_state_dict``. So does the
    end of a run, on a copy of the model: what ``finish`` needs is in the state, or follows from
    the settings and the spec.

    Attributes:
        removes: What ``finish`` removes that was found before training: channels or layers.
        needs: What ``finish`` needs as it was before training: channels or layers.
    """

    removes: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()

    def begin(self, model: nn.Module, setting: Setting) -> None:
        """Calibrate, find groups, replace layers.

        Of a run that is resumed, the weights are not loaded yet: replace layers by the
        settings and the spec alone.
        """

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return a loss term, a function of the weights; None for none."""
        return None

    def observe(self, loss: Tensor) -> None:
        """Take the loss of the step that comes, detached; before ``before_step``."""

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Act on gradients before step number ``step``, below ``Setting.steps``.

        Numbers rise from 0; where deep supervision leaves a batch early, some are left out.
        """

    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Act on weights after a step: project, mask, regrow."""

    def settle(self, model: nn.Module) -> None:
        """Change weights of the final model in place, before any method rewrites it.

        It is not the trained one where that is an average of weights.
        """

    def finish(self, model: nn.Module) -> Transform | None:
        """Rewrite the model in place and return its transform, if any.

        It may come at any step, as a run can end early.
        """
        return None

    def report(self) -> dict[str, Any] | None:
        """Return plain data on what ``finish`` has done, for the report; None for nothing.

        It has the name of the ``method``. Pages also show ``lists``, the names of layers that have
        something in common, such as ``{"branches erased": ["layer4.1"]}``, and ``profile``, what
        each ``choices`` for one layer alone ``costs``, as
        ``smallfry.report.compression.draw_profile`` takes it, and count ``bytes`` of tensors, by
        their name, that the file has in another form.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state with its tensors on the CPU, after ``begin``."""


@runtime_checkable
class MethodSettings(Protocol):
    """Settings of a method: a frozen dataclass of plain values.

    Attributes:
        name: Name in configurations and manifests.
        trains: True if it needs optimizer steps.
        tunable: Optional: True if it acts once and its result is to be trained further.
    """

    name: ClassVar[str]
    trains: ClassVar[bool]

    def start(self) -> Method:
        """Create the method with these settings."""


def register_method(kind: T) -> T:
    """Register settings of a method by their ``name``; a decorator.

    From now on values of other types than the fields' are refused.

    Raises:
        UsageError: No frozen dataclass, or another method has the name.
    """
    require_frozen(kind)
    add(_methods, kind.name, kind, "methods")  # type: ignore[attr-defined]
    return strict(kind)


def methods() -> dict[str, Any]:
    """Return the settings of all methods by name.

    Example:
        >>> from smallfry.training.method import methods
        >>> methods()["low_rank"].trains
        False
    """
    scan(PACKAGE)
    load_plugins()
    return dict(_methods)


def to_dict(settings: MethodSettings) -> dict[str, dict[str, Any]]:
    """Convert settings to an entry of a configuration: ``{"low_rank": {"keep": 0.5}}``."""
    each: Any = settings
    return {settings.name: {f.name: getattr(each, f.name) for f in fields(each)}}


def from_dict(content: Any) -> MethodSettings:
    """Parse an entry of a configuration: a name, or a name with values.

    Raises:
        UsageError: An unknown method, or settings that it does not have.
    """
    if isinstance(content, str):
        content = {content: {}}
    if not isinstance(content, Mapping) or len(content) != 1:
        raise UsageError(f"a method is NAME or NAME: {{SETTING: VALUE}}, not {content!r}")
    ((name, values),) = content.items()
    load_kit(str(name))
    known = methods()
    if name not in known:
        raise UsageError(f"there is no method '{name}'{nearest(str(name), known)}")
    values = {} if values is None else values
    names = [field.name for field in fields(known[name])]
    if not isinstance(values, Mapping):
        raise UsageError(f"{name}: expected settings by their names, got {values!r}")
    for key in values:
        if key not in names:
            raise UsageError(f"{name} has no setting '{key}'{nearest(str(key), names)}")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    try:
        settings: MethodSettings = known[name](**values)
    except TypeError as error:
        raise UsageError(f"{name}: {error}") from error
    return settings


def find_methods(contents: Sequence[Any]) -> tuple[MethodSettings, ...]:
    """Parse the methods in entries of a configuration.

    Args:
        contents: Each as ``from_dict`` takes it.

    Raises:
        UsageError: See ``from_dict``.
    """
    return tuple(from_dict(each) for each in contents)


def packing_of(settings: Sequence[MethodSettings]) -> Callable[[bytes], bytes] | None:
    """Return the packing of the file of weights, ``write`` of the last settings that have it."""
    found = [write for each in settings if (write := getattr(each, "write", None)) is not None]
    return found[-1] if found else None


def files_of(
    settings: Sequence[MethodSettings], model: nn.Module, manifest: Mapping[str, Any]
) -> dict[str, bytes]:
    """Return files to be written beside the weights, of all settings that have ``files``."""
    found: dict[str, bytes] = {}
    for each in settings:
        files = getattr(each, "files", None)
        found |= {} if files is None else files(model, manifest)
    return found


def require_methods(settings: Any) -> tuple[MethodSettings, ...]:
    """Require a list of methods' settings.

    Raises:
        UsageError: Something else, such as one method alone, a class or a name.
    """
    if isinstance(settings, str | Mapping) or not isinstance(settings, Iterable):
        raise UsageError(
            f"methods must be a list of settings, such as [LowRank()], not {settings!r}"
        )
    found = tuple(settings)
    for each in found:
        if isinstance(each, type) or not isinstance(each, MethodSettings):
            raise UsageError(
                f"a method is given by its settings, such as LowRank(keep=0.5), not {each!r}; "
                "compress.methods() has them by name"
            )
    return found


class Running:
    """Ordered methods running on one model.

    Args:
        settings: Settings of the methods.
        model: Changed in place.
        setting: Circumstances; its spec is that of the model.

    Raises:
        UsageError: A method removes what another one needs to the end.
    """

    def __init__(
        self, settings: Sequence[MethodSettings], model: nn.Module, setting: Setting
    ) -> None:
        self.model, self.spec, self.step = model, setting.spec, 0
        self.settings = require_methods(settings)
        self._finished = False
        self._setting = setting
        self._hooks: list[Any] = []
        self.reports: list[dict[str, Any]] = []  # of the methods that have finished
        self._started = [each.start() for each in self.settings]
        self._late = [not each.trains for each in self.settings]
        self._require_compatible()
        for method, late in zip(self._started, self._late, strict=True):
            if not late:
                method.begin(model, setting)

    def _require_compatible(self) -> None:
        """Refuse methods that train together, but that can't rewrite the model one by one.

        Raises:
            UsageError: One removes what another one needs to the end.
        """
        pairs = [
            (settings.name, method)
            for settings, method in zip(self.settings, self._started, strict=True)
            if settings.trains
        ]
        for place, (name, method) in enumerate(pairs):
            for other, second in pairs[:place] + pairs[place + 1 :]:
                if method.removes and (second.removes or method.removes in second.needs):
                    raise UsageError(
                        f"{name} removes {method.removes}, which {other} needs until the end: "
                        "compress with one of them, and its result with the other"
                    )

    @property
    def changes_gradients(self) -> bool:
        """True if gradients may differ from those of the loss, by a penalty or a hook."""
        names = ("penalty", "before_step")
        return any(
            getattr(type(method), name) is not getattr(Method, name)
            for method in self._training()
            for name in names
        )

    @property
    def need_steps(self) -> list[str]:
        """Names of the methods that act after steps of an optimizer."""
        pairs = zip(self.settings, self._started, strict=True)
        return [s.name for s, m in pairs if type(m).after_step is not Method.after_step]

    def observe(self, loss: Callable[[], Tensor]) -> None:
        """Pass the loss of the next step to methods that take it; it is computed for them alone."""
        takers = [m for m in self._training() if type(m).observe is not Method.observe]
        if takers:
            value = loss()
            for method in takers:
                method.observe(value)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook into every step of an optimizer, until ``detach``."""
        if self._training():
            self._hooks += [
                optimizer.register_step_pre_hook(lambda opt, *_: self.before_step(opt)),
                optimizer.register_step_post_hook(lambda opt, *_: self.after_step(opt)),
            ]

    def detach(self) -> None:
        """Detach the optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def penalty(self) -> Tensor | None:
        """Sum the loss terms; None without any."""
        terms = [term for m in self._training() if (term := m.penalty(self.model)) is not None]
        return torch.stack(terms).sum() if terms else None

    def add_penalty(self, scale: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
        """Add the gradient of the penalty to ``.grad``, after the backward pass of the loss.

        Args:
            scale: Loss scale in half precision, as ``GradScaler.scale``.

        Returns:
            The penalty, detached; None if no method has one.
        """
        penalty = self.penalty()
        if penalty is None or not penalty.requires_grad:
            return penalty
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        term = penalty if scale is None else scale(penalty)
        # not by backward(), whose hooks distributed training takes for those of the loss
        found = torch.autograd.grad(term, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient
            elif gradient is not None:
                parameter.grad = gradient.clone()
        return penalty.detach()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Act before the optimizer's next step."""
        for method in self._training():
            method.before_step(optimizer, self.step)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Act after a step, and count it."""
        for method in self._training():
            method.after_step(optimizer, self.step)
        self.step += 1

    def finish(self) -> ModelSpec:
        """Rewrite the model by each method in turn and return its new spec.

        Raises:
            UsageError: The transforms are in no order that a model can have, or all is done.
        """
        if self._finished:
            raise UsageError("the methods have finished: the model is compressed already")
        self._finished = True
        for method in self._training():
            method.settle(self.model)
        for method, late in zip(self._started, self._late, strict=True):
            if late:  # of the model as the ones before it leave it
                method.begin(self.model, replace(self._setting, spec=self.spec))
            transform = method.finish(self.model)
            report = method.report()
            if report is not None:
                self.reports.append(report)
            if transform is not None:
                self.spec = self.spec.then(transform)
        return self.spec

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the states, for a checkpoint."""
        return {"step": self.step, "methods": [m.state_dict() for m in self._training()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a checkpoint.

        Raises:
            ValueError: It is of other methods.
        """
        self.step = int(state["step"])
        for method, each in zip(self._training(), state["methods"], strict=True):
            method.load_state_dict(_copied(each))

    def _training(self) -> list[Method]:
        return [m for m, late in zip(self._started, self._late, strict=True) if not late]


def _copied(state: Any) -> Any:
    """Copy a state, with tensors on the CPU as in a checkpoint."""
    if isinstance(state, Tensor):
        return state.detach().clone().cpu()
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_copied, state))
    return state
