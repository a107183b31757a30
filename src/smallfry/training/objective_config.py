"""Configuration of the objective: its name, and the settings of the one of that name.

The fields are made from the table of objectives, so that each setting is an option of the command.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, make_dataclass
from inspect import cleandoc
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints

from docstring_parser import DocstringStyle
from docstring_parser import parse as parse_docstring

from smallfry.errors import UsageError
from smallfry.settings import check, check_values
from smallfry.training.objectives.registry import ObjectiveSettings, objectives
from smallfry.training.own_code import require_path

AUTO = "auto"
TABLE = objectives()


@dataclass(frozen=True)
class _Common:
    """Loss, and the settings of the named objective; those of another one are refused.

    Args:
        name: An objective, or auto for the task's own, else deep_supervision where the model recurs
            and cross_entropy elsewhere.
        label_smoothing: Share of the target spread over all classes.
        loss: Your own loss instead of cross-entropy, as MODULE:NAME of code given with --code.
    """

    name: str = AUTO
    label_smoothing: float = 0.0
    loss: str | None = None

    def __post_init__(self) -> None:
        check_values(self, "objective.")
        if self.loss is not None:
            require_path(self.loss, "objective.loss")
        check(0 <= self.label_smoothing < 1, "objective.label_smoothing is 0 to below 1")
        each = {name: self.settings(name) for name in TABLE if self.name in (name, AUTO)}
        if self.name != AUTO:
            self.require_taken(self.name)
        for name, setting in SETTINGS.items():
            value = getattr(each.get(self.name), name, None)
            if self.name == AUTO and {getattr(self, name)} != set(setting.defaults):
                value = getattr(self, name)
            object.__setattr__(self, name, value)

    def require_taken(self, objective: str) -> None:
        """Require that an objective takes the settings that are given.

        A default of another objective passes: runs of earlier versions recorded all of them.

        Args:
            objective: Name of the chosen objective.

        Raises:
            UsageError: It does not take one.
        """
        own = [entry.name for entry in fields(TABLE[objective])]  # type: ignore[arg-type]
        for name, setting in SETTINGS.items():
            if name not in own and getattr(self, name) not in (None, *setting.defaults):
                others = [k for k, kind in TABLE.items() if hasattr(kind, name)]
                raise UsageError(
                    f"objective {objective} has no setting '{name}', which {' and '.join(others)} "
                    f"{'has' if len(others) == 1 else 'have'}: remove objective.{name} "
                    f"({objective} takes {', '.join(['label_smoothing', *own])})"
                )

    def settings(self, name: str) -> ObjectiveSettings:
        """Return the settings of an objective, with its defaults where none are given."""
        kind: Any = TABLE[name]
        given = {entry.name: getattr(self, entry.name) for entry in fields(kind)}
        found: ObjectiveSettings = kind(**{k: v for k, v in given.items() if v is not None})
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that have an effect."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def taken_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out settings that the named objective does not take, as earlier versions recorded."""
    kind: Any = TABLE.get(str(given.get("name")))
    others = set() if kind is None else {*SETTINGS} - {entry.name for entry in fields(kind)}
    return {name: value for name, value in given.items() if name not in others}


class _Setting(NamedTuple):
    """Setting of one objective, or of several."""

    kind: Any
    defaults: tuple[Any, ...]
    text: str


def _settings() -> dict[str, _Setting]:
    """Return every setting of the table."""
    found: dict[str, _Setting] = {}
    for kind in TABLE.values():
        hints = get_type_hints(kind)
        parsed = parse_docstring(kind.__doc__ or "", style=DocstringStyle.GOOGLE)
        texts = {each.arg_name: each.description or "" for each in parsed.params}
        for entry in fields(kind):  # type: ignore[arg-type]
            text = " ".join((f"({kind.name})", *texts[entry.name].split()))
            one = found.get(entry.name)
            if one is None:
                found[entry.name] = _Setting(hints[entry.name], (entry.default,), text)
            elif one.kind == hints[entry.name]:
                both = (*one.defaults, entry.default)
                found[entry.name] = _Setting(one.kind, both, f"{one.text} {text}")
            else:
                raise TypeError(f"{kind.__name__}.{entry.name} has another type than elsewhere")
    return found


SETTINGS = _settings()

if TYPE_CHECKING:

    class ObjectiveConfig(_Common):
        """Objective by its name, with settings of the table."""

        def __init__(
            self,
            name: str = AUTO,
            label_smoothing: float = 0.0,
            loss: str | None = None,
            **settings: float | str | None,
        ) -> None: ...

else:
    ObjectiveConfig = make_dataclass(
        "ObjectiveConfig",
        [("name", Literal[(AUTO, *TABLE)], AUTO)]
        + [(name, setting.kind | None, None) for name, setting in SETTINGS.items()],
        bases=(_Common,),
        frozen=True,
    )
    ObjectiveConfig.__module__ = __name__
    ObjectiveConfig.__doc__ = cleandoc(_Common.__doc__) + "".join(
        f"\n    {name}: {setting.text}" for name, setting in SETTINGS.items()
    )
