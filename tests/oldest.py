"""Prints the oldest versions that pyproject.toml allows, one a line, as constraints for pip."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lower_bounds(*projects: dict) -> list[str]:
    """``name==version`` for the lower bound of each library that the projects or tests need."""
    extras = [extra for p in projects for extra in p.get("optional-dependencies", {}).values()]
    wanted = [entry for each in (*(p["dependencies"] for p in projects), *extras) for entry in each]
    found = [re.fullmatch(r"([\w-]+)(\[.*\])?>=([\w.]+)", entry) for entry in wanted]
    return [f"{match[1]}=={match[3]}" for match in found if match is not None]


if __name__ == "__main__":
    files = (ROOT / "pyproject.toml", ROOT / "runtime/pyproject.toml")
    projects = [tomllib.loads(file.read_text())["project"] for file in files]
    print("\n".join(lower_bounds(*projects)))
