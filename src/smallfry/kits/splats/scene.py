"""Scenes of Gaussian splats, and their PLY files.

A file is ``binary_little_endian``, with one element ``vertex`` of float32 properties

    x y z  nx ny nz  f_dc_0…2  f_rest_0…  opacity  scale_0…2  rot_0…3

all before activation: opacity is a logit, scales are logarithms, rotations quaternions (w, x, y, z)
of any length. ``f_rest`` is channel-major, with 0, 3, 8 or 15 harmonics for each colour. Source:
the files of Kerbl et al. 2023.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import DataError, UsageError
from smallfry.io.replace import write_whole
from smallfry_runtime.files import open_regular

__all__ = ["FIXED", "RESTS", "Scene", "column_names", "read_scene", "write_scene"]

FIXED = 11  # columns without harmonics: opacity, 3 scales, 4 of a rotation, 3 of a colour
RESTS = (0, 9, 24, 45)  # values of harmonics, by degree
MOST_HEADER = 64 * 2**10  # bytes
MOST_FILE = 64 * 2**30
TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "<i2"),
    **dict.fromkeys(("ushort", "uint16"), "<u2"),
    **dict.fromkeys(("int", "int32"), "<i4"),
    **dict.fromkeys(("uint", "uint32"), "<u4"),
    **dict.fromkeys(("float", "float32"), "<f4"),
    **dict.fromkeys(("double", "float64"), "<f8"),
}


@dataclass(frozen=True)
class Scene:
    """Gaussians of a scene, before activation.

    Args:
        positions: (Gaussians, 3), float32 or float64.
        attributes: (Gaussians, 11, 20, 35 or 56), the columns of ``column_names``.

    Raises:
        UsageError: Arrays of other shapes.

    Example:
        >>> import numpy as np
        >>> from smallfry.kits.splats.scene import Scene
        >>> Scene(np.zeros((5, 3), np.float32), np.zeros((5, 56), np.float32)).degree
        3
    """

    positions: NDArray[np.floating]
    attributes: NDArray[np.floating]

    def __post_init__(self) -> None:
        shapes = self.positions.shape, self.attributes.shape
        rests = [FIXED + rest for rest in RESTS]
        columns = shapes[1][-1] if len(shapes[1]) == 2 else None
        if shapes[0] != (shapes[1][0], 3) or columns not in rests:
            raise UsageError(
                f"a scene has positions (n, 3) and attributes (n, one of {rests}), got "
                f"{shapes[0]} and {shapes[1]}"
            )
        for array in (self.positions, self.attributes):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def degree(self) -> int:
        """Degree of the spherical harmonics, 0 to 3."""
        return RESTS.index(self.attributes.shape[1] - FIXED)

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> "Scene":
        """Select Gaussians."""
        return Scene(self.positions[rows], self.attributes[rows])


def column_names(degree: int) -> tuple[str, ...]:
    """List the columns of attributes, by their names in files."""
    return (
        "opacity",
        *(f"scale_{i}" for i in range(3)),
        *(f"rot_{i}" for i in range(4)),
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(RESTS[degree])),
    )


def read_scene(file: str | Path) -> Scene:
    """Read a scene from a PLY file; properties are found by name, others left out.

    Raises:
        DataError: It can't be read, has another format, lacks a property, has another length than
            that of its header, or a value that is not finite.
    """
    file = Path(file)
    try:
        with open_regular(file, MOST_FILE) as stream:
            head = stream.read(MOST_HEADER)
            end = head.find(b"\nend_header\n")
            if not head.startswith(b"ply\n") or end < 0:
                raise ValueError("no header of a PLY file")
            start = end + len(b"\nend_header\n")
            count, form = _parse_header(head[:end].decode("ascii").split("\n")[1:])
            wanted = start + count * form.itemsize
            length = stream.seek(0, 2)
            if length != wanted:
                raise ValueError(f"it has {length:,} bytes, by its header {wanted:,}")
            stream.seek(start)
            rows = np.frombuffer(stream.read(count * form.itemsize), form)
        return _scene(rows)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: {error}; expected a binary_little_endian PLY of Gaussian splats"
        ) from error


def _parse_header(lines: Sequence[str]) -> tuple[int, np.dtype[np.void]]:
    """Return the number of vertices, and the form of one."""
    count, columns, form = None, [], ""
    for line in lines:
        match line.split():
            case ["format", name, "1.0"]:
                form = name
            case ["comment" | "obj_info", *_] | []:
                continue
            case ["element", "vertex", number] if count is None and number.isdecimal():
                count = int(number)
            case ["property", kind, name] if count is not None and kind in TYPES:
                columns.append((name, TYPES[kind]))
            case _:
                raise ValueError(f"unexpected in its header: '{line[:60]}'")
    if form != "binary_little_endian":
        raise ValueError(f"its format is '{form[:30]}'")
    if count is None or count > MOST_FILE or not columns:
        raise ValueError("its header has no vertices")
    return count, np.dtype(columns)


def _scene(rows: NDArray[np.void]) -> Scene:
    names = set(rows.dtype.names or ())
    rests = sum(name.startswith("f_rest_") for name in names)
    if rests not in RESTS:
        raise ValueError(f"it has {rests} values of harmonics, not one of {RESTS}")
    columns = column_names(RESTS.index(rests))
    missing = [name for name in (*"xyz", *columns) if name not in names]
    if missing:
        raise ValueError(f"it has no property '{missing[0]}'")
    positions, attributes = (
        np.stack([rows[name].astype(np.float32) for name in chosen], axis=1)
        for chosen in ("xyz", columns)
    )
    if not (np.isfinite(positions).all() and np.isfinite(attributes).all()):
        raise ValueError("a value is not finite")
    return Scene(positions, attributes)


def write_scene(scene: Scene, file: str | Path) -> None:
    """Write a scene in the order of the usual files, with normals of zero.

    Raises:
        DataError: It can't be written.
    """
    columns = column_names(scene.degree)
    order = [*range(8, len(columns)), *range(8)]  # colours before opacity, scales and rotations
    names = [*"xyz", "nx", "ny", "nz", *(columns[i] for i in order)]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(scene)}"]
    head += [f"property float {name}" for name in names]
    rows = np.zeros((len(scene), len(names)), "<f4")
    rows[:, :3], rows[:, 6:] = scene.positions, scene.attributes[:, order]
    content = "\n".join([*head, "end_header\n"]).encode() + rows.tobytes()
    try:
        write_whole(Path(file), content)
    except OSError as error:
        raise DataError(f"{file}: the scene can't be written ({error})") from error
