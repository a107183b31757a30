"""Detection of folders written by smallfry, by their files rather than their names."""

from collections.abc import Collection

from smallfry_runtime.engines import engine_of, engines
from smallfry_runtime.storage import SUFFIXES

GRAPHS = tuple(
    suffix + end
    for name in engines()
    for suffix in engine_of(name).SUFFIXES
    for end in SUFFIXES.values()
)
RUN = "config.yaml"
OF_A_RUN = frozenset({".lock", "last", "best", "metrics.csv"})
PAIRS = (
    frozenset({"manifest.json", "model.safetensors"}),  # a checkpoint
    frozenset({"manifest.json", "model.packed"}),  # likewise
    frozenset({"config.json", "model.safetensors"}),  # a shared model
    frozenset({"report.html", "summary.json"}),  # a benchmark
    frozenset({"study.json"}),
    frozenset({"search.json", "space.yaml"}),
    frozenset({"fit.json", "plan.json"}),
    frozenset({"evolution.json", "generations.jsonl"}),
    frozenset({"analysis.json", "index.html"}),
)


def is_artifact(names: Collection[str]) -> bool:
    """Return whether these entries are those of a run, checkpoint, export, study or report."""
    found = frozenset(names)
    if RUN in found and found & OF_A_RUN:
        return True
    if any(pair <= found for pair in PAIRS):
        return True
    return "manifest.json" in found and any(name.endswith(GRAPHS) for name in found)
