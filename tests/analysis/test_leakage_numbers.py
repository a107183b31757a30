"""Traces, periods, features of observers and the attack, against computations by hand."""

import json
from collections import Counter
from itertools import pairwise
from math import log, log2

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import nn

from smallfry.analysis import families as block_families
from smallfry.analysis import leakage
from smallfry.analysis.leakage import OBSERVERS, Identified, features_of, identify
from smallfry.analysis.traces import Operation, find_period, trace_model
from smallfry.errors import UsageError
from smallfry.io.json import strict

# Traces


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: nn.Conv2d(4, 8, 1), ["pointwise"]),
        (lambda: nn.Conv2d(4, 8, 1, stride=2), ["pointwise"]),
        (lambda: nn.Conv2d(4, 8, (1, 3)), ["convolution"]),
        (lambda: nn.Conv2d(4, 8, 3, groups=4), ["depthwise"]),
        (lambda: nn.Conv2d(4, 8, 3, groups=2), ["grouped"]),
        (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()), ["relu"]),
        (lambda: nn.Identity(), []),
        (lambda: nn.Sequential(nn.Dropout(0.5), nn.Hardtanh()), ["hardtanh"]),
    ],
)
def test_operators_have_the_names_of_their_kernels(build, names):
    assert [each.name for each in trace_model(build(), (4, 8, 8))] == names


def test_bytes_follow_the_life_of_tensors_and_not_their_views():
    class Branches(nn.Module):
        def forward(self, images):
            kept = images.exp()
            views = kept.flatten(1).view(1, 2, -1)
            large = torch.cat([views, views, views])
            total = large.sum()
            del large
            return kept.sin() + total

    trace = trace_model(Branches(), (2, 3, 3))
    size = 2 * 3 * 3 * 4
    found = {each.name: each.allocated for each in trace}
    assert found["exp"] == size
    assert found["cat"] == 4 * size
    assert found["sum"] == 4 * size + 4
    assert found["sin"] == 2 * size + 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_images_have_the_type_of_the_weights(dtype):
    (only,) = trace_model(nn.Conv2d(1, 2, 3).to(dtype), (1, 5, 5))
    assert only.allocated == 2 * 3 * 3 * dtype.itemsize


class Wrong(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.call = forward

    def forward(self, images):
        return self.call(images)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x[: int(x.sum())],
        lambda x: x.cpu().numpy(),
        lambda x: x[:, 5],
        lambda x: x @ x.new_zeros(9, 9),
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: torch.tensor(float(x.max())),
        lambda x, missing: x,
    ],
)
def test_what_needs_values_or_other_images_is_refused(call):
    with pytest.raises(UsageError, match="Wrong can't be traced without values"):
        trace_model(Wrong(call), (2, 4, 4))


def test_tracing_changes_neither_mode_nor_statistics():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    before = model[1].running_mean.clone()
    trace_model(model, (1, 6, 6))
    assert model.training
    assert torch.equal(model[1].running_mean, before)
    assert model[1].num_batches_tracked == 0


# Periods


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("", (0, 1)),
        ("a", (0, 1)),
        ("ab", (0, 1)),
        ("abab", (2, 2)),
        ("ababa", (2, 2)),
        ("abcab", (0, 1)),
        ("aa", (1, 2)),
        ("aaaaaaa", (1, 7)),
        ("xaaaaay", (1, 5)),
        ("aabaab", (3, 2)),  # not the pair within it
        ("xyabcabcabcz", (3, 3)),
        ("abcdabcdabcd" + "pqrstuvw", (4, 3)),
        ("ab" * 2 + "uvwxyz" + "cdefg" * 4, (5, 4)),
    ],
)
def test_periods_are_the_longest_repetition(names, found):
    assert find_period(list(names)) == found


def test_one_operator_in_ten_may_differ_within_a_repetition():
    block = list("abcdefghijklmnopqrst")
    other = [*block[:-1], "?"]
    assert find_period([*block, *other, *block]) == (20, 3)
    worse = ["?" if i % 3 == 0 else name for i, name in enumerate(block)]
    assert find_period([*block, *worse]) == (0, 1)


# Features


def drawn(seed, length=40):
    draw = np.random.default_rng(seed)
    kinds = ["convolution", "pointwise", "relu", "add", "mean", "cat", "mul", "depthwise"]
    return [
        Operation(
            str(draw.choice(kinds)),
            (1, int(2 ** draw.integers(1, 6)), int(draw.integers(1, 9)), 4),
            int(draw.integers(0, 5000)),
        )
        for _ in range(length)
    ]


def shares(ratios):
    counts = Counter(int(np.clip(np.round(np.log2(r)), -6, 6)) for r in ratios)
    return {place: n / len(ratios) for place, n in counts.items()}


@pytest.mark.parametrize("seed", range(4))
def test_features_are_shares_of_what_each_observer_sees(seed):
    trace = drawn(seed)
    seen = features_of(trace, "operators")
    sizes = [np.prod(each.shape) for each in trace]
    pairs = [b / a for a, b in pairwise(sizes)]
    found = {n: v for n, v in seen.items() if n.startswith("size")}
    assert found == pytest.approx({f"size × 2^{k}": v for k, v in shares(pairs).items()})
    widths = [e.shape[1] for e in trace if e.name in ("convolution", "pointwise", "depthwise")]
    pairs = [b / a for a, b in pairwise(widths)]
    found = {n: v for n, v in seen.items() if n.startswith("width")}
    assert found == pytest.approx({f"width × 2^{k}": v for k, v in shares(pairs).items()})
    assert seen["same width"] == sum(ratio == 1 for ratio in pairs) / len(widths)
    names = [each.name for each in trace]
    for length in (1, 2, 3):
        grams = {n: v for n, v in seen.items() if n.startswith(f"{length} ")}
        assert sum(grams.values()) == pytest.approx(1)
        assert grams[f"{length} {' '.join(names[:length])}"] > 0
    for name in ("add", "cat", "mean", "mul", "sigmoid"):
        assert seen[f"{name} per convolution"] == names.count(name) / len(widths)
    bytes_ = [each.allocated for each in trace]
    peak, mean = max(bytes_), float(np.mean(bytes_))
    expected = {"operators": log(40), "peak": log(peak), "mean": mean / peak}
    assert features_of(trace, "totals") == pytest.approx(expected)
    memory = features_of(trace, "memory")
    pairs = [b / a for a, b in pairwise(bytes_) if a and b]
    assert memory.pop("mean") == pytest.approx(mean / peak)
    assert memory == pytest.approx({f"bytes × 2^{k}": v for k, v in shares(pairs).items()})


def test_a_network_without_convolutions_has_no_ratio_of_them():
    trace = [Operation("addmm", (1, 8), 32), Operation("mean", (1,), 36)]
    found = features_of(trace, "operators")
    assert found["mean per convolution"] == 1
    assert found["same width"] == 0
    assert not any(name.startswith(("width", "pointwise ×", "3 ")) for name in found)


def test_ratios_beyond_the_widest_count_there():
    trace = [Operation("relu", (1, 4), size) for size in (1, 2**20, 1)]
    found = features_of(trace, "memory")
    assert (found["bytes × 2^6"], found["bytes × 2^-6"]) == (0.5, 0.5)


# The attack


def test_the_bits_are_the_information_of_what_is_found_about_what_is_true(monkeypatch):
    answers = iter([["a"], ["b"], ["a"], ["c"], ["c"], ["b"]])

    class Fixed:
        def fit(self, features, families):
            assert len(features) == len(families) == 5
            return self

        def predict(self, features):
            return np.array(next(answers))

    monkeypatch.setattr(leakage, "make_attack", lambda seed: Fixed())
    names = [f"n{i}" for i in range(6)]
    families = dict(zip(names, "aabbcc", strict=True))
    found = identify({n: {"x": 1.0} for n in names}, families, {n: n for n in names})
    assert found.found == tuple("abaccb")
    assert found.accuracy == 2 / 6
    assert found.bits == pytest.approx(mutual_info_score(list("aabbcc"), list("abaccb")) / log(2))
    table = Counter(zip("aabbcc", "abaccb", strict=True))
    bits = sum(n / 6 * log2(n / 6 / (1 / 3 * 1 / 3)) for n in table.values())
    assert found.bits == pytest.approx(bits)


@pytest.mark.slow
def test_the_same_seed_finds_the_same_families():
    draw = np.random.default_rng(0)
    names = [f"{family}{n}" for family in "ab" for n in range(3)]
    features = {n: {"x": float(draw.normal("ab".index(n[0]))), "y": draw.random()} for n in names}
    told = (features, {n: n[0] for n in names}, {n: n for n in names})
    assert identify(*told, seed=3) == identify(*told, seed=3)


FAMILIES = {"wide": (("w1",), ("w2",)), "deep": (("d1", "d2"), ("d3",)), "odd": (("o1",), ("o2",))}


def test_the_answer_counts_what_the_attack_finds_and_leaves_the_models_code_out(monkeypatch):
    own = [Operation(name, (1, 4, 4, 4), 256) for name in ["convolution", "relu", "add"] * 4]
    results = {
        name: Identified(("w1", "d1", "o1"), ("wide", "deep", "odd"), found, bits)
        for name, found, bits in (
            ("operators", ("wide", "deep", "odd"), log2(3)),
            ("memory", ("wide", "wide", "odd"), 0.9),
            ("totals", ("odd", "odd", "odd"), 0.0),
        )
    }
    posteriors = {name: {"wide": 0.2, "deep": 0.7, "odd": 0.1} for name in OBSERVERS}
    monkeypatch.setattr(block_families, "FAMILIES", FAMILIES)
    answer = leakage._answer(results, posteriors, own, "wide")
    text = " ".join(answer.findings)
    assert "100% of 3 known networks are assigned to the right one of 3 families" in text
    assert "from allocated bytes 67%, from their peak 33%; chance is 33%" in text
    assert "looks like “deep” (70% of the trees; it is listed as “wide”)" in text
    assert "4 products of 12 operators are visible" in text
    assert "repeat 4 times with a period of 3, 100% of all" in text
    assert answer.numbers["accuracy"] == pytest.approx(
        {"operators": 1, "memory": 2 / 3, "totals": 1 / 3}
    )
    assert (answer.numbers["period"], answer.numbers["repetitions"]) == (3, 4)
    rows = {row[0]: row[1:] for row in answer.tables[0].rows}
    assert rows["memory"] == [pytest.approx(2 / 3), 0.9, "deep", 0.7]
    json.dumps(strict(dict(answer.numbers)), allow_nan=False)
    assert answer.pictures[0].drawing.startswith(b"\x89PNG")
    alone = leakage._answer(results, posteriors, own[:4], None)
    assert "listed as" not in " ".join(alone.findings)
    assert "repeat" not in " ".join(alone.findings)
