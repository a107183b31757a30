"""Table of latencies of a model with one group of channels narrower at a time, for pruning.

    python benchmarks/latency_table.py RUN --to latencies.json
    smallfry compress RUN --methods "[{hesso: {sparsity: 0.5, of: ms, table: latencies.json}}]" …

Latency is the median of one image in ONNX Runtime on one thread, all sizes in turns. Measure on the
device that the model is for, when it is idle.
"""

import argparse
import copy
from functools import partial
from math import ceil
from pathlib import Path

import torch

from smallfry.compress.prune.budget import LatencyTable
from smallfry.compress.prune.selection import block_size, can_lose
from smallfry.deploy.graphs import exported_program, to_onnx, whole_graph
from smallfry.deploy.latency import take_turns
from smallfry.deploy.pretrained import load_trained
from smallfry.deploy.submodels import session
from smallfry.transforms.find import find_groups
from smallfry.transforms.groups import cut

WHOLE = ""


def main() -> int:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--divisible", type=int, default=8)
    parser.add_argument("--points", type=int, default=4, help="sizes of each group")
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    trained = load_trained(arguments.run)
    images = torch.zeros(2, trained.channels, trained.image_size, trained.image_size)
    groups = [
        group
        for group in find_groups(trained.model, images)
        if can_lose(group, arguments.divisible)
    ]
    models = {(WHOLE, 0): trained.model}
    for group in groups:
        block = block_size(group, arguments.divisible)
        for point in range(1, arguments.points + 1):
            share = point / (arguments.points + 1)
            channels = min(group.channels, block * ceil(share * group.channels / block))
            small = copy.deepcopy(trained.model)
            cut(small, [group], {group.name: torch.arange(channels)})
            models[group.name, channels] = small
    calls = {}
    for (name, channels), model in models.items():
        graph = whole_graph(model, images)
        content = to_onnx(graph, exported_program(graph)).SerializeToString()
        inputs = {"images": images[:1].numpy()}
        calls[f"{name} {channels}"] = partial(session(content).run, None, inputs)
    taken = take_turns(calls, seconds=0, rounds=arguments.rounds)
    found: dict[str, dict[str, float]] = {group.name: {} for group in groups}
    for name, channels in models:
        if name != WHOLE:
            found[name][str(channels)] = taken[f"{name} {channels}"].p50
    table = LatencyTable(taken[f"{WHOLE} 0"].p50, found)
    table.write(arguments.to)
    print(f"{arguments.to}: {len(models)} sizes, the whole model {table.whole:.3f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
