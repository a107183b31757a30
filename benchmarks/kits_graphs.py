"""Compare relational layers with torch-geometric's: products, time and memory of single layers.

Graphs are generated with the sizes of known data sets, as recalled: relations with frequencies
∝ 1 / rank, sources ∝ 1 / rank^skew within their type, no edge twice. Layers have 32 channels in,
64 out, 4 heads. Written after each layer; the same command goes on.

    python benchmarks/kits_graphs.py --out results/kits/graphs/layers.json
    python benchmarks/kits_graphs.py --graphs aifb --out aifb.json
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch_geometric.nn import HGTConv, RGATConv, RGCNConv

from smallfry.kits.graphs.convert import compact
from smallfry.kits.graphs.heterographs import draw_edges
from smallfry.kits.graphs.pairs import Plan, plan

GRAPHS = {  # nodes, edges, relations; of the larger ones a part, as theirs needs 20 KB an edge
    "aifb": (7_262, 48_810, 104),
    "mutag": (27_163, 148_100, 50),
    "am/40": (41_669, 149_709, 266),
    "fb15k-237/2": (14_541, 136_057, 474),
}
SKEWS = (0.0, 0.5, 1.0)
TYPES, INPUTS, OUTPUTS, HEADS = 7, 32, 64, 4
OURS = ("edges", "compact", "aggregate")


def draw(name: str, skew: float, seed: int = 0) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """Draw a graph: edges, relations, first nodes of types, and types of relations' ends."""
    nodes, edges, relations = GRAPHS[name]
    random = np.random.default_rng([seed, nodes])
    limits = np.linspace(0, nodes, TYPES + 1).round().astype(np.int64)
    ends = random.integers(TYPES, size=(relations, 2))
    ranges = np.stack([limits[:-1], limits[1:]], axis=1)
    drawn = draw_edges(random, ranges, ends, 2 * edges, skew)[:edges]
    index = torch.from_numpy(drawn[:, :2].T.copy())
    return index, torch.from_numpy(drawn[:, 2].copy()), limits, ends


class Case:
    """One layer on one graph: ours and theirs as functions of the same nodes."""

    def __init__(self, kind: str, name: str, skew: float) -> None:
        nodes, _, relations = GRAPHS[name]
        self.index, self.types, limits, ends = draw(name, skew)
        torch.manual_seed(0)
        self.x = torch.randn(nodes, INPUTS)
        self.kind, self.nodes, self.relations = kind, nodes, relations
        width = OUTPUTS // HEADS
        if kind == "rgcn":
            self.theirs: nn.Module = RGCNConv(INPUTS, OUTPUTS, relations)
        elif kind == "rgat":
            self.theirs = RGATConv(INPUTS, width, relations, heads=HEADS)
        else:
            names = [str(number) for number in range(TYPES)]
            edge_types = [(str(a), f"r{r}", str(b)) for r, (a, b) in enumerate(ends)]
            self.theirs = HGTConv(INPUTS, OUTPUTS, (names, edge_types), HEADS)
            self.limits = limits
            self.edges = {}
            for relation, (a, b) in enumerate(ends):
                chosen = self.index[:, self.types == relation]
                first = torch.tensor([[limits[a]], [limits[b]]])
                if chosen.shape[1]:
                    self.edges[edge_types[relation]] = chosen - first

    def plan(self, like: nn.Module) -> Plan:
        """Find the pairs, as the layer numbers its edges."""
        if self.kind != "hgt":
            return plan(self.index, self.types, self.nodes, self.relations)
        joined = like.join(
            dict(zip(like.node_types, np.diff(self.limits).tolist(), strict=True)), self.edges
        )  # type: ignore[operator]
        return plan(*joined, self.nodes, self.relations)

    def run(self, layer: nn.Module, x: Tensor, found: Plan | None = None) -> Tensor:
        """Run a layer, with a plan if it is ours."""
        extra = [] if found is None else [found]
        if self.kind != "hgt":
            out: Tensor = layer(x, self.index, self.types, *extra)
            return out
        parts = x.split(np.diff(self.limits).tolist())
        given = {str(number): part for number, part in enumerate(parts)}
        answer = layer(given, self.edges, *extra)
        return torch.cat([answer[t] for t in given if t in answer])


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the most bytes allocated at once, above those before, by PyTorch's profiler."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        work()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    found = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    total, most = 0, 0
    for event in sorted(found, key=lambda e: e["ts"]):
        total += event["args"]["Bytes"]
        most = max(most, total)
    return most


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the least CPU time of some calls after one more."""
    work()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def measure(case: Case, layer: nn.Module, found: Plan | None, repeats: int) -> dict[str, Any]:
    """Measure a layer forwards, and forwards and backwards."""
    x = case.x.clone().requires_grad_()

    def train() -> None:
        x.grad = None
        layer.zero_grad()
        case.run(layer, x, found).square().mean().backward()

    @torch.no_grad()
    def infer() -> None:
        case.run(layer, case.x, found)

    counter = FlopCounterMode(display=False)
    with counter:
        infer()
    row = {
        "macs": counter.get_total_flops() // 2,
        "infer_seconds": seconds(infer, repeats),
        "infer_peak_bytes": peak_bytes(infer),
    }
    if found is not None or case.kind != "hgt":  # theirs took more than 20 GB without pyg-lib
        row["train_seconds"] = seconds(train, repeats)
        row["train_peak_bytes"] = peak_bytes(train)
    return row


def compare(kind: str, name: str, skew: float, repeats: int) -> dict[str, Any]:
    """Measure theirs and ours on one graph."""
    case = Case(kind, name, skew)
    rows: dict[str, Any] = {"theirs": measure(case, case.theirs, None, repeats)}
    with torch.no_grad():
        wanted = case.run(case.theirs, case.x)
    counts = None
    for execution in OURS:
        layer = compact(case.theirs, execution)
        began = time.process_time()
        found = case.plan(layer)
        counts = found.counts
        with torch.no_grad():
            answer = case.run(layer, case.x, found)
        planned = time.process_time() - began
        row = measure(case, layer, found, repeats)
        row["first_call_seconds"] = planned  # with the plan
        row["counted_macs"] = layer.macs(counts, execution)  # type: ignore[operator]
        row["message_bytes"] = 4 * counts.rows(execution) * OUTPUTS
        row["largest_difference"] = float((answer - wanted).abs().max() / wanted.abs().max())
        for key in ("infer_seconds", "train_seconds", "infer_peak_bytes", "train_peak_bytes"):
            if key not in rows["theirs"]:
                continue
            row[f"{key}_ratio"] = round(rows["theirs"][key] / max(row[key], 1e-9), 3)
        rows[execution] = row
    assert counts is not None
    return {"counts": counts._asdict(), "auto": counts.best(), "rows": rows}


def main() -> None:
    """Measure what is not recorded yet."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--graphs", nargs="+", default=[*GRAPHS], choices=[*GRAPHS])
    parser.add_argument("--skews", type=float, nargs="+", default=[*SKEWS])
    parser.add_argument("--kinds", nargs="+", default=["rgcn", "rgat", "hgt"])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"command": "python benchmarks/kits_graphs.py", "runs": {}}
    if given.out.is_file():
        record = json.loads(given.out.read_text())
    record["device"] = "CPU, AMD EPYC, one thread"
    record["versions"] = {"torch": torch.__version__}
    for name in given.graphs:
        for kind in given.kinds:
            for skew in given.skews:
                key = f"{kind} {name} skew {skew:g}"
                if key in record["runs"]:
                    continue
                found = compare(kind, name, skew, given.repeats)
                record["runs"][key] = found
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(record, indent=1) + "\n")
                best = found["rows"][found["auto"]]
                print(
                    f"{key}: {found['auto']}, times faster: {best['infer_seconds_ratio']} "
                    f"(training {best.get('train_seconds_ratio')}), smaller: "
                    f"{best['infer_peak_bytes_ratio']} ({best.get('train_peak_bytes_ratio')})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
