"""Prints the oldest versions that pyproject.toml allows, one a line, as constraints for pip."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lower_bounds(project: dict) -> list[str]:
    """``name==version`` for the lower bound of each library that the project or its tests need."""
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    found = [re.fullmatch(r"([\w-]+)(\[.*\])?>=([\w.]+)", entry) for entry in wanted]
    return [f"{match[1]}=={match[3]}" for match in found if match is not None]


if __name__ == "__main__":
    print("\n".join(lower_bounds(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])))
