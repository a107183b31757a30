"""Candidate architectures: registered models, the scalable ones in several widths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm

from smallfry.errors import UsageError
from smallfry.models import cct, loopnet
from smallfry.studies.study_models import find_study_model

DIVISOR = 4  # of scaled channels
FEWEST = 4  # channels of a scaled layer


class Family(NamedTuple):
    """Related architectures, of which one or two are tried at a time.

    Attributes:
        name: Such as loopnet.
        sizes: Registered names with widths, as factors of the named size's.
    """

    name: str
    sizes: tuple[tuple[str, tuple[float, ...]], ...]


FAMILIES = (
    Family(
        "loopnet",
        (
            ("loopnet_2m", (1.0,)),
            ("loopnet_1m", (1.0, 0.7)),
            ("loopnet_300k", (1.0, 0.7)),
            ("loopnet_70k", (1.0, 0.7, 0.5, 0.42, 0.35, 0.25)),
        ),
    ),
    Family(
        "resnet", (("resnet20_he", (1.0,)), ("resnet8_mlperf_tiny", (1.0, 0.7, 0.5, 0.35, 0.25)))
    ),
    Family("simplenet", (("simplenet_cifar_310k", (1.0, 0.7, 0.5, 0.35, 0.25)),)),
    Family("cct", (("cct_4_3x2_32", (1.0,)), ("cct_2_3x2_32", (1.0, 0.75, 0.5, 0.375, 0.25)))),
    Family("mobilenet", (("mobilenetv3_small_100", (1.0,)), ("mobilenetv3_small_050", (1.0,)))),
    Family("vitrm", (("vitrm_thrifty_patch4_32", (1.0,)), ("vitrm_micro_patch4_8", (1.0,)))),
)


@dataclass(frozen=True)
class Entry:
    """Architecture to try.

    Args:
        label: Name of the model at its full width.
        model: Its name in timm's registry.
        width: Factor of its channels.
        family: Name of its family.
        options: Keyword arguments, besides classes, channels and image size.
        start: Name of the trained model that it starts from, if any.
    """

    label: str
    model: str
    width: float
    family: str
    options: dict[str, Any]
    start: str | None = None

    @property
    def name(self) -> str:
        """Unique name, such as ``loopnet_70k-0.5``."""
        name = self.label if self.width == 1 else f"{self.label}-{self.width:g}"
        return name if self.start is None else f"{name}-from-{self.start}"


def zoo(names: Sequence[str] | None = None) -> list[Entry]:
    """List candidates, family by family, the widest of each size first.

    Args:
        names: Names of study models or of timm's, of which all known widths are listed; default the
            whole zoo.

    Raises:
        UsageError: An unknown name.
    """
    known = {name: (f.name, widths) for f in FAMILIES for name, widths in f.sizes}
    entries = []
    for name in known if names is None else dict.fromkeys(names):
        study = find_study_model(name)
        if not timm.is_model(study.model):
            continue
        family, widths = known.get(study.model, (study.model, (1.0,)))
        for width in (1.0,) if study.options else widths:
            options = {**study.options, **scaled(study.model, width)}
            entries.append(Entry(name, study.model, width, family, options))
    if not entries:
        raise UsageError("none of the candidates is registered with timm here")
    return entries


def scaled(model: str, width: float) -> dict[str, Any]:
    """Return the arguments that scale the channels of a model.

    Raises:
        UsageError: The model can't be scaled.
    """
    if width == 1:
        return {}
    for start, scale in SCALES.items():
        if model.startswith(start):
            return scale(model, width)
    raise UsageError(f"{model} has one width here")


def _channels(counts: Sequence[int], width: float) -> list[int]:
    return [max(FEWEST, DIVISOR * round(width * count / DIVISOR)) for count in counts]


def _loopnet(model: str, width: float) -> dict[str, Any]:
    return {"widths": _channels(loopnet.SIZES[model]["widths"], width)}


def _cct(model: str, width: float) -> dict[str, Any]:
    dim, heads = (cct.SIZES[model][name] for name in ("embed_dim", "num_heads"))
    step = 8 * heads
    return {"embed_dim": max(step, step * round(width * dim / step))}


SCALES: dict[str, Callable[[str, float], dict[str, Any]]] = {
    "loopnet_": _loopnet,
    "resnet8": lambda _, width: {"widths": _channels((16, 32, 64), width)},
    "simplenet": lambda _, width: {"width": width},
    "cct_": _cct,
}
