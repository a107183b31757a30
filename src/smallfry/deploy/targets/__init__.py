"""Device formats: each converts the graphs of a model to files that an engine of the runtime runs.

A format is a file here and its engine in ``smallfry_runtime.engines``.
"""

from smallfry.deploy.targets.target import (
    Source,
    Target,
    find_target,
    is_installed,
    register_target,
    require_installed,
    targets,
)

__all__ = [
    "Source",
    "Target",
    "find_target",
    "is_installed",
    "register_target",
    "require_installed",
    "targets",
]
