"""Reference outputs of the zoo: the deterministic fill and the comparison.

``golden/zoo.json`` holds numbers of the authors' implementations whose every tensor was filled by
the rule of ``fill``. A model here is filled under the authors' names and through its renaming
filter, so that a mistake in either shows.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smallfry  # noqa: F401  # registers the models
from smallfry.costing import macs

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "zoo.json").read_text(encoding="utf-8")
)
MODELS: dict[str, Any] = GOLDEN["models"]
DIGITS = 2e-8  # relative: ten digits are stored

Named = tuple[str, tuple[int, ...]]
Filter = Callable[[Mapping[str, Tensor], nn.Module], Mapping[str, Tensor]]


def series(name: str, count: int) -> Tensor:
    """Pseudo-random numbers in [-1, 1) of a name."""
    h = np.arange(1, count + 1, dtype=np.uint64) * 0x9E3779B1
    h = (h + np.uint64(crc32(name.encode()) * 0x85EBCA6B % 2**32)) % 2**32
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h ^= h >> np.uint64(shift)
        h = h * np.uint64(factor) % 2**32
    h ^= h >> np.uint64(15)
    return torch.from_numpy(h.astype(np.float64) / 2**31 - 1)


def filled(name: str, shape: Iterable[int]) -> Tensor:
    """The value of a tensor by its full name under the authors' names."""
    shape = tuple(shape)
    numbers = series(name, int(np.prod(shape)))
    if name.endswith("running_var"):
        numbers = 1 + 0.5 * numbers
    elif len(shape) > 1:
        numbers = numbers * (3 / (numbers.numel() / shape[0])) ** 0.5
    else:
        scaled = 0.2 * numbers
        one = name.rpartition(".")[2] == "weight"
        numbers = 1 + scaled if one else scaled
    return numbers.reshape(shape)


def images(shape: Iterable[int], name: str = "input") -> Tensor:
    """Images, or another named input."""
    shape = tuple(shape)
    return 3**0.5 * series(name, int(np.prod(shape))).reshape(shape)


def tensors(entry: Mapping[str, Any]) -> list[Named]:
    """Names and shapes of the authors' tensors, where an entry has them."""
    return [(name, tuple(shape)) for name, shape in entry["tensors"] + entry["buffers"]]


def own_tensors(model: nn.Module) -> list[Named]:
    """Names and shapes of a model's tensors, without counters of batches."""
    state = model.state_dict()
    return [(k, tuple(v.shape)) for k, v in state.items() if not k.endswith("_tracked")]


def load(model: nn.Module, named: Iterable[Named], rename: Filter | None = None) -> nn.Module:
    """Fill a model in float64 through its filter; nothing may be missing or left over."""
    state: Mapping[str, Tensor] = {name: filled(name, shape) for name, shape in named}
    if rename is not None:
        state = rename(state, model)
    model = model.double()
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in found.missing_keys)
    return model.eval()


def assert_summary(found: Tensor, wanted: Mapping[str, Any], rtol: float = DIGITS) -> None:
    """Compare with the summary of a tensor: its first numbers, sum, mean magnitude and norm."""
    found = found.detach()
    assert list(found.shape) == wanted["shape"]
    flat = found.flatten()
    size = wanted["absmean"]
    for key, value in {
        "head": flat[:10],
        "sum": flat.sum(),
        "absmean": flat.abs().mean(),
        "l2": flat.norm(),
    }.items():
        near = rtol * size * (flat.numel() if key == "sum" else 1)
        expected = torch.as_tensor(wanted[key], dtype=torch.float64)
        torch.testing.assert_close(value, expected, rtol=rtol, atol=near)


def assert_gradients(
    model: nn.Module, wanted: Mapping[str, float], rename: Callable[[str], str] = lambda name: name
) -> None:
    """Compare the norms of all gradients, by the authors' names."""
    found = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert {rename(name) for name in wanted} == found.keys()
    for name, norm in wanted.items():
        near = max(1e-7 * norm, 1e-12)
        assert abs(found[rename(name)] - norm) < near, name


def loss_gradients(model: nn.Module, inputs: Tensor, entry: Mapping[str, Any]) -> float:
    """Back-propagate the cross-entropy of an entry, and return it."""
    loss = F.cross_entropy(model(inputs), torch.tensor(entry["loss"]["targets"]))
    loss.backward()
    return loss.item()


class Measured(NamedTuple):
    """Sizes of a model."""

    parameters: int
    macs: int


def measured(name: str, shape: Iterable[int], **settings: Any) -> Measured:
    """Sizes of a registered model on one image, without computing anything."""
    with torch.device("meta"):
        model = timm.create_model(name, **settings)
        parameters = sum(weight.numel() for weight in model.parameters())
        return Measured(parameters, macs(model, torch.zeros(1, *shape)))
