"""Compressed scenes, and their files.

A file is a safetensors file under the lossless coding of ``smallfry.compress.coding``: all large
tensors are bytes, each with the entropy coder that makes it smallest. Of clusters k, rows of layer
l of all networks follow each other:

    positions.{axis}.{low,high}   differences along the first axis within a cluster, then numbers
    codes.l                       weights of 4 to 8 bits; scales.l, one half-precision scale a row
    weights.l.{low,high}          or half-precision weights, by bytes
    biases.l, mean, deviation     half precision

The header of safetensors holds the rest as JSON. Reading runs no code, and sizes are checked before
anything is built.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import nn

from smallfry.compress.coding.packing import pack
from smallfry.errors import DataError
from smallfry.io.replace import write_whole
from smallfry.kits.splats.cameras import psnr
from smallfry.kits.splats.field import WEIGHT_BITS, WHOLE, SplatField, quantise
from smallfry.kits.splats.prepare import HALF, Grid
from smallfry.kits.splats.render import Camera, render
from smallfry.kits.splats.scene import FIXED, RESTS, Scene
from smallfry_runtime.files import parse_json, read_bytes
from smallfry_runtime.packed import is_packed, unpack

__all__ = ["CompressedScene", "Report", "load"]

FORMAT = 1
KEY = "splats"
MOST_FILE = 2**30  # bytes
MOST_GAUSSIANS = 50_000_000
PLAIN_BYTES = 4  # of a number in a scene's file
AT_ONCE = 65_536  # Gaussians


class Report(NamedTuple):
    """Sizes of a compressed scene, and its error in views.

    ``ratio`` is that of the original's PLY file without its header. Bytes of what no entropy coder
    made smaller are those of zlib for that tensor alone; the file has them in one stream.
    """

    bytes: Mapping[str, int]  # positions, networks, rest
    total: int
    original: int
    ratio: float
    decibels: tuple[float, ...]  # of each view, against the original's image


@dataclass(frozen=True)
class CompressedScene:
    """Scene as positions and networks.

    Args:
        header: Plain data: sizes, counts of clusters, grid, settings.
        tensors: Arrays by the names of the file.
    """

    header: Mapping[str, Any]
    tensors: Mapping[str, NDArray[Any]] = field(repr=False)

    @classmethod
    def of(
        cls,
        net: SplatField,
        counts: Sequence[int],
        grid: Grid,
        integers: NDArray[np.uint16],
        weight_bits: int,
        settings: Mapping[str, Any],
        original: int | None = None,
    ) -> "CompressedScene":
        """Store networks and positions.

        Args:
            net: The networks.
            counts: Gaussians of each.
            grid: Of the positions.
            integers: Positions on it, (Gaussians, 3), by cluster.
            weight_bits: 4 to 8, or 16.
            settings: Plain data, kept in the header.
            original: Gaussians before pruning; default from the settings' share.
        """
        header = {
            "format": FORMAT,
            "columns": net.num_classes,
            "frequencies": net.frequencies,
            "sizes": net.sizes,
            "counts": list(counts),
            "weight_bits": weight_bits,
            "grid": [list(grid.centre), list(grid.half_sides), grid.bits],
            "settings": dict(settings),
            "original": original or len(integers),
        }
        return cls(header, {**_planes(integers, counts), **_stored(net, weight_bits)})

    def __len__(self) -> int:
        return sum(self.header["counts"])

    def field(self) -> SplatField:
        """Build the networks from the stored numbers."""
        sizes: list[int] = self.header["sizes"]
        columns, layers = self.header["columns"], len(sizes) - 1
        width = sizes[1] if layers > 1 else 1
        clusters = len(self.header["counts"])
        net = SplatField(clusters, width, self.header["frequencies"], layers, columns)
        with torch.no_grad():
            for number in range(layers):
                rows = sizes[number + 1]
                weights = self._weights(number).reshape(clusters, rows, sizes[number])
                biases = self.tensors[f"biases.{number}"].astype(np.float32)
                for k, network in enumerate(net.networks):
                    layer = cast(nn.Linear, cast(nn.ModuleList, network)[number])
                    layer.weight.copy_(torch.from_numpy(weights[k]))
                    layer.bias.copy_(torch.from_numpy(biases[k]))
            net.output_mean.copy_(torch.from_numpy(self.tensors["mean"].astype(np.float32)))
            net.output_std.copy_(torch.from_numpy(self.tensors["deviation"].astype(np.float32)))
        return net

    def _weights(self, number: int) -> NDArray[np.float32]:
        if self.header["weight_bits"] != WHOLE:
            scales = self.tensors[f"scales.{number}"].astype(np.float32)
            return self.tensors[f"codes.{number}"].astype(np.float32) * scales[:, None]
        parts = (self.tensors[f"weights.{number}.{end}"] for end in ("low", "high"))
        return _joined(*parts).view(np.float16).astype(np.float32)

    def require_numbers(self) -> None:
        """Refuse positions outside of their box, and numbers of networks that are none.

        Raises:
            ValueError: There is one.
        """
        codes = self.grid().codes(_integers(self.tensors, self.header["counts"]))
        if not (np.abs(codes) <= 1).all():
            raise ValueError("a position is outside of its box")
        numbers = [each for each in self.tensors.values() if each.dtype == np.float16]
        numbers += [self._weights(number) for number in range(len(self.header["sizes"]) - 1)]
        if not all(np.isfinite(each).all() for each in numbers):
            raise ValueError("a number of its networks is not finite")

    def grid(self) -> Grid:
        """Return the grid of the positions."""
        centre, half_sides, bits = self.header["grid"]
        return Grid(tuple(centre), tuple(half_sides), bits)

    def scene(self) -> Scene:
        """Decode the scene, in float32."""
        grid = self.grid()
        codes = grid.codes(_integers(self.tensors, self.header["counts"]))
        net, found = self.field(), []
        start = 0
        with torch.no_grad():
            for k, count in enumerate(self.header["counts"]):
                for part in torch.split(torch.from_numpy(codes[start : start + count]), AT_ONCE):
                    counts = [len(part) if i == k else 0 for i in range(net.clusters)]
                    found.append(net.decode(part, counts).numpy())
                start += count
        return Scene(grid.positions(codes), np.concatenate(found))

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        return pack(self.plain_bytes()).data

    def plain_bytes(self) -> bytes:
        """Return the content before coding, a safetensors file."""
        tensors = {name: np.ascontiguousarray(each) for name, each in self.tensors.items()}
        return safetensors.numpy.save(tensors, metadata={KEY: json.dumps(dict(self.header))})

    def save(self, file: str | Path) -> int:
        """Write the file, and return its bytes.

        Raises:
            DataError: It can't be written.
        """
        content = self.to_bytes()
        try:
            write_whole(Path(file), content)
        except OSError as error:
            raise DataError(f"{file}: the scene can't be written ({error})") from error
        return len(content)

    def report(self, scene: Scene | None = None, cameras: Sequence[Camera] = ()) -> Report:
        """Report bytes by part, and errors in views.

        Args:
            scene: The original, with whose images the decoded ones are compared.
            cameras: Views, best others than those of the compression.
        """
        packed = pack(self.plain_bytes())
        parts = {"positions": 0, "networks": 0}
        for row in packed.rows:
            name = "positions" if row.name.startswith("positions") else "networks"
            parts[name] += row.bytes
        parts["rest"] = len(packed.data) - sum(parts.values())
        count = self.header["original"] if scene is None else len(scene)
        original = count * PLAIN_BYTES * (6 + self.header["columns"])
        ratios = []
        if scene is not None and cameras:
            found = self.scene()
            ratios = [psnr(render(found, each), render(scene, each)) for each in cameras]
        total = len(packed.data)
        return Report(parts, total, original, original / total, tuple(ratios))


def load(file: str | Path) -> CompressedScene:
    """Read a file that ``CompressedScene.save`` wrote.

    Raises:
        DataError: Missing, damaged, of another form, or larger than its parts can be.
    """
    try:
        content = read_bytes(Path(file), MOST_FILE)
        plain = unpack(content) if is_packed(content) else content
        length = int.from_bytes(plain[:8], "little")
        if not 0 < length <= len(plain) - 8:
            raise ValueError("it is no compressed scene")
        header = parse_json(parse_json(plain[8 : 8 + length])["__metadata__"][KEY].encode())
        tensors = safetensors.numpy.load(plain)
        _require_fit(header, tensors)
        found = CompressedScene(header, tensors)
        found.require_numbers()
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError) as error:
        raise DataError(f"{file}: no readable compressed scene ({error})") from error
    except safetensors.SafetensorError as error:
        raise DataError(f"{file}: no readable compressed scene ({error})") from error


def _planes(integers: NDArray[np.uint16], counts: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Split positions in bytes, those of the first axis as differences within clusters."""
    first = integers[:, 0].copy()
    for part in np.split(np.arange(len(first)), np.cumsum(counts)[:-1]):
        first[part[1:]] -= integers[part[:-1], 0]  # modulo 2^16
    found: dict[str, NDArray[Any]] = {}
    for axis, values in zip("xyz", (first, *integers.T[1:]), strict=True):
        found |= _split(f"positions.{axis}", values)
    return found


def _integers(tensors: Mapping[str, NDArray[Any]], counts: Sequence[int]) -> NDArray[np.uint16]:
    axes = [
        _joined(*(tensors[f"positions.{axis}.{end}"] for end in ("low", "high"))) for axis in "xyz"
    ]
    for part in np.split(np.arange(len(axes[0])), np.cumsum(counts)[:-1]):
        axes[0][part] = np.cumsum(axes[0][part], dtype=np.uint16)
    return np.stack(axes, 1)


def _split(name: str, values: NDArray[np.uint16]) -> dict[str, NDArray[np.int8]]:
    """Split numbers in bytes, one row each: signed, as the coders' distributions are about 0."""
    ends = {"low": values & 255, "high": values >> 8}
    return {
        f"{name}.{end}": each.astype(np.uint8).view(np.int8).reshape(1, -1)
        for end, each in ends.items()
    }


def _joined(low: NDArray[np.int8], high: NDArray[np.int8]) -> NDArray[np.uint16]:
    unsigned = [each.view(np.uint8).astype(np.uint16).ravel() for each in (low, high)]
    found: NDArray[np.uint16] = (unsigned[0] | (unsigned[1] << 8)).astype(np.uint16)
    return found


@torch.no_grad()
def _stored(net: SplatField, bits: int) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for number in range(len(net.sizes) - 1):
        layers = [cast(nn.Linear, cast(nn.ModuleList, each)[number]) for each in net.networks]
        weight = torch.cat([layer.weight for layer in layers])
        if bits != WHOLE:
            codes, scales = quantise(weight, bits)
            found[f"codes.{number}"] = codes.to(torch.int8).numpy()
            found[f"scales.{number}"] = scales[:, 0].half().numpy()
        else:
            found |= _split(f"weights.{number}", weight.half().numpy().view(np.uint16))
        biases = torch.stack([layer.bias for layer in layers])
        found[f"biases.{number}"] = biases.half().numpy()
    found["mean"] = net.output_mean.half().numpy()
    found["deviation"] = net.output_std.half().numpy()
    return found


def _require_fit(header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> None:
    """Require the shapes and types that the header implies, all within bounds."""
    if header["format"] != FORMAT:
        raise ValueError(f"its format is {header['format']!r}, this version reads {FORMAT}")
    counts, sizes, columns = header["counts"], header["sizes"], header["columns"]
    whole = [*counts, *sizes, columns, header["frequencies"], header["original"]]
    centre, half_sides, bits = header["grid"]
    numbers = [*centre, *half_sides]
    if any(type(each) is not int or not 0 <= each <= MOST_GAUSSIANS for each in whole):
        raise ValueError("a size is no number, or out of range")
    if not all(type(each) in (int, float) and abs(each) < 1e30 for each in numbers):
        raise ValueError("its grid is no box")
    if len(centre) != 3 or len(half_sides) != 3 or not (type(bits) is int and 8 <= bits <= HALF):
        raise ValueError("its grid is no box")
    clusters, gaussians = len(counts), sum(counts)
    if not (1 <= clusters <= 1024 and 2 <= len(sizes) <= 17 and columns - FIXED in RESTS):
        raise ValueError("it has no clusters, layers or columns that a scene can have")
    expected = [3 + 6 * header["frequencies"], *[sizes[1]] * (len(sizes) - 2), columns]
    if sizes != expected or max(sizes) > 1024 or min(sizes) < 1:
        raise ValueError(f"its layers are {sizes}")
    if gaussians > MOST_GAUSSIANS:
        raise ValueError(f"it has {gaussians:,} Gaussians")
    bits_of_weights = header["weight_bits"]
    if bits_of_weights not in WEIGHT_BITS:
        raise ValueError(f"its weights have {bits_of_weights!r} bits")
    shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        f"positions.{axis}.{end}": ((1, gaussians), np.int8)
        for axis in "xyz"
        for end in ("low", "high")
    }
    for number, pair in enumerate(pairwise(sizes)):
        rows = clusters * pair[1]
        if bits_of_weights != WHOLE:
            shapes[f"codes.{number}"] = ((rows, pair[0]), np.int8)
            shapes[f"scales.{number}"] = ((rows,), np.float16)
        else:
            for end in ("low", "high"):
                shapes[f"weights.{number}.{end}"] = ((1, rows * pair[0]), np.int8)
        shapes[f"biases.{number}"] = ((clusters, pair[1]), np.float16)
    shapes["mean"] = shapes["deviation"] = ((clusters, columns), np.float16)
    if {name: (each.shape, each.dtype.type) for name, each in tensors.items()} != shapes:
        raise ValueError("its tensors are not those of its header")
