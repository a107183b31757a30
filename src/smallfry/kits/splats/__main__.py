"""Commands for scenes in files: ``python -m smallfry.kits.splats compress | expand | report``."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from smallfry.errors import SmallfryError
from smallfry.io.terminal import say
from smallfry.kits.splats.artifact import load
from smallfry.kits.splats.cameras import around
from smallfry.kits.splats.codec import NeuralSplats, compress
from smallfry.kits.splats.scene import read_scene, write_scene

VIEWS, HELD_OUT = 8, 6


def parser() -> argparse.ArgumentParser:
    """Build the parser; every setting of ``NeuralSplats`` but booleans is an option."""
    found = argparse.ArgumentParser(prog="python -m smallfry.kits.splats", description=__doc__)
    verbs = found.add_subparsers(dest="verb", required=True)
    small = verbs.add_parser("compress", help="a PLY file to a compressed scene")
    small.add_argument("scene", type=Path)
    small.add_argument("file", type=Path)
    for each in fields(NeuralSplats):
        if not isinstance(each.default, bool):
            small.add_argument(f"--{each.name}", type=type(each.default), default=each.default)
    large = verbs.add_parser("expand", help="a compressed scene to a PLY file")
    large.add_argument("file", type=Path)
    large.add_argument("scene", type=Path)
    told = verbs.add_parser("report", help="bytes by part, and dB against the original")
    told.add_argument("file", type=Path)
    told.add_argument("scene", type=Path, nargs="?")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit code."""
    given = parser().parse_args(arguments)
    try:
        if given.verb == "compress":
            names = [each.name for each in fields(NeuralSplats) if hasattr(given, each.name)]
            settings = NeuralSplats(**{name: getattr(given, name) for name in names})
            scene = read_scene(given.scene)
            size = compress(scene, around(scene.positions, VIEWS), settings).save(given.file)
            say(f"{given.file}: {size:,} bytes, {given.scene.stat().st_size / size:.1f}× smaller")
        elif given.verb == "expand":
            write_scene(load(given.file).scene(), given.scene)
        else:
            original = None if given.scene is None else read_scene(given.scene)
            views = [] if original is None else around(original.positions, HELD_OUT, start=0.5)
            found = load(given.file).report(original, views)
            for name, size in {**found.bytes, "total": found.total}.items():
                say(f"{name:10} {size:>12,} bytes")
            for number, ratio in enumerate(found.decibels):
                say(f"view {number:<5} {ratio:>12.2f} dB")
    except SmallfryError as error:
        say(f"smallfry: {error}", sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
