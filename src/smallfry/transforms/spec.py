"""Model specs: a timm architecture, its arguments, and an ordered list of transforms.

A spec and the weights are a model. A spec is plain data, so that a file can hold it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn

from smallfry.errors import RunError, UsageError
from smallfry.order import Stage

# arguments of timm's factory that name a source of weights, or how layers are compiled
OF_THE_FACTORY = frozenset(
    {
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"),
        *("cache_dir", "checkpoint_path", "scriptable", "exportable", "no_jit", "device", "dtype"),
    }
)


@runtime_checkable
class Transform(Protocol):
    """Structural change of a model: a frozen dataclass of plain values, registered by kind.

    Attributes:
        kind: Name in files.
        version: Version of the fields; files of a later one are refused.
        stage: Place in the order of transforms.
    """

    kind: ClassVar[str]
    version: ClassVar[int]

    @property
    def stage(self) -> Stage:
        """Stage in the order of transforms."""

    def apply(self, model: nn.Module) -> None:
        """Change the structure in place; weights are loaded afterwards.

        Raises:
            ValueError: The model has no such layers or sizes.
        """


@dataclass(frozen=True)
class ModelSpec:
    """Identity of a model, without its weights.

    Args:
        architecture: Name in timm's registry.
        arguments: Keyword arguments of ``timm.create_model``.
        transforms: Applied transforms, in order.

    Example:
        >>> from smallfry.transforms import ModelSpec, build
        >>> spec = ModelSpec("vitrm_micro_patch4_8", {"num_classes": 10})
        >>> ModelSpec.from_dict(spec.to_dict()) == spec
        True
        >>> sum(p.numel() for p in build(spec).parameters())
        109131
    """

    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[Transform, ...] = ()

    def then(self, transform: Transform) -> "ModelSpec":
        """Append a transform to the spec.

        Raises:
            UsageError: The transform belongs before one that the model has already.
        """
        for earlier in self.transforms:
            if earlier.stage > transform.stage:
                raise UsageError(
                    f"'{transform.kind}' ({transform.stage.name.lower()}) comes before "
                    f"'{earlier.kind}' ({earlier.stage.name.lower()}), which was applied already: "
                    f"the order is architecture, width, factor, sparse, adapter, bits, "
                    "nest"
                )
        return replace(self, transforms=(*self.transforms, transform))

    def portable(self) -> "ModelSpec":
        """Drop arguments that name a source of weights."""
        kept = {key: v for key, v in self.arguments.items() if key not in OF_THE_FACTORY}
        return replace(self, arguments=kept)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data for manifests."""
        content: dict[str, Any] = {"name": self.architecture, "arguments": dict(self.arguments)}
        if self.transforms:
            content["transforms"] = [transform_to_dict(each) for each in self.transforms]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "model") -> "ModelSpec":
        """Parse a spec from untrusted plain data.

        Args:
            content: Output of ``to_dict``.
            where: Prefix of error messages.

        Raises:
            RunError: Damaged, or a transform that this version does not have.
        """
        name, arguments = content.get("name"), content.get("arguments", {})
        transforms = content.get("transforms", [])
        if not isinstance(name, str):
            raise RunError(f"{where}: unknown architecture {name!r}")
        if not isinstance(arguments, Mapping):
            raise RunError(f"{where}: the model's arguments need names, got {arguments!r}")
        if not isinstance(transforms, list) or len(transforms) > MOST_TRANSFORMS:
            raise RunError(
                f"{where}: its transforms are not a list, or more than {MOST_TRANSFORMS}"
            )
        spec = cls(name, dict(arguments))
        for each in transforms:
            try:
                spec = spec.then(_transform(each, where))
            except UsageError as error:
                raise RunError(f"{where}: {error}") from error
        return spec


MOST_TRANSFORMS = 100


def transform_to_dict(transform: Transform) -> dict[str, Any]:
    """Convert a transform to plain data."""
    fields: dict[str, Any] = asdict(transform)  # type: ignore[call-overload]
    return {"kind": transform.kind, "version": transform.version, **fields}


def _transform(content: Any, where: str) -> Transform:
    from smallfry.transforms.registry import find  # the registry scans modules that import this one

    if not isinstance(content, Mapping) or not isinstance(content.get("kind"), str):
        raise RunError(f"{where}: a transform has no kind")
    fields = dict(content)
    kind, version = find(fields.pop("kind"), where), fields.pop("version", None)
    if version != kind.version:
        raise RunError(
            f"{where}: has the transform '{kind.kind}' in version {version}, this smallfry reads "
            f"version {kind.version}: install the version that wrote it"
        )
    try:
        transform: Transform = kind(**fields)
    except (TypeError, ValueError, UsageError, AttributeError, LookupError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise RunError(f"{where}: its transform '{kind.kind}' is damaged ({reason})") from error
    return transform
