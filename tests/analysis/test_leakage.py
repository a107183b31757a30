"""Traces of models without computation, and the attack that reads families of blocks from them."""

import sys
from math import log2
from pathlib import Path

import pytest
import timm
from torch import nn

from smallfry.analysis import families as block_families
from smallfry.analysis.families import build_member, members
from smallfry.analysis.leakage import OBSERVERS, features_of, identify, known_traces
from smallfry.analysis.traces import Operation, find_period, trace_model
from smallfry.errors import UsageError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


# Traces


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.point = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.depth, self.grouped = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Linear(8, 2)

    def forward(self, images):
        features = self.grouped(self.depth(self.point(self.dense(images).relu_())))
        return self.head(features.flatten(2).mean(2).view(-1, 8))


def test_a_trace_names_what_computes_and_leaves_views_out():
    trace = trace_model(Small(), (3, 8, 8))
    names = ["convolution", "relu", "pointwise", "depthwise", "grouped", "mean", "addmm"]
    assert [each.name for each in trace] == names
    assert [each.shape for each in trace][:4] == [(1, 8, 6, 6)] * 3 + [(1, 8, 4, 4)]
    assert trace[-1].shape == (1, 2)


def test_allocated_bytes_are_those_of_tensors_that_are_still_needed():
    trace = trace_model(nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3))), (4, 8, 8))
    each = 4 * 8 * 8 * 4
    assert [operation.allocated for operation in trace] == [each, 2 * each, 2 * each]


def test_traces_of_large_images_compute_nothing_and_repeat():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)).double()
    first = trace_model(model, (3, 4000, 4000))
    assert first == trace_model(model, (3, 4000, 4000))
    assert first[0].allocated == 8 * 3998**2 * 8
    assert not model[0].weight.is_meta


def test_a_model_whose_flow_depends_on_values_is_refused():
    class Branching(nn.Module):
        def forward(self, images):
            return images * 2 if images.sum() > 0 else images

    with pytest.raises(UsageError, match="Branching can't be traced without values"):
        trace_model(Branching(), (3, 4, 4))


def test_periods_are_found_with_what_surrounds_them():
    assert find_period(list("abcd")) == (0, 1)
    assert find_period([*"xy", *"abcde" * 6, *"pqr"]) == (5, 6)
    assert find_period([*"abcdefghij" * 3]) == (10, 3)
    steps = 4
    model = timm.create_model("vitrm_micro_patch4_8", recursion_steps=1, latent_steps=steps)
    period, repeats = find_period([each.name for each in trace_model(model, (1, 8, 8))])
    assert repeats == steps + 1  # and the step of the prediction token
    assert period > 20


# Features


def test_features_of_operators_are_shares_and_ratios():
    shapes = [(1, 8, 4, 4), (1, 8, 4, 4), (1, 32, 4, 4), (1, 32, 4, 4)]
    kinds = ["pointwise", "relu", "pointwise", "relu"]
    trace = [Operation(n, s, 100) for n, s in zip(kinds, shapes, strict=True)]
    found = features_of(trace, "operators")
    assert found["1 relu"] == found["1 pointwise"] == 0.5
    assert found["2 pointwise relu"] == pytest.approx(2 / 3)
    assert found["3 pointwise relu pointwise"] == 0.5
    assert found["width × 2^2"] == found["pointwise × 2^2"] == 1
    assert found["size × 2^0"] == pytest.approx(2 / 3)


def test_weaker_observers_see_neither_names_nor_shapes():
    one = [Operation("convolution", (1, 8), 64), Operation("relu", (1, 8), 128)]
    other = [Operation("addmm", (3, 1), 64), Operation("gelu", (9, 1), 128)]
    for observer in OBSERVERS[1:]:
        assert features_of(one, observer) == features_of(other, observer)
    assert features_of(one, "memory")["bytes × 2^1"] == 1
    assert features_of(one, "operators") != features_of(other, "operators")


# The attack


def test_versions_are_held_out_whole():
    features = {f"{family}{n}": {family: 1.0} for family in "ab" for n in range(4)}
    families = {name: name[0] for name in features}
    apart = identify(features, families, {name: name for name in features})
    assert apart.accuracy == 1
    assert apart.bits == pytest.approx(1)
    together = identify(features, families, {name: name[0] for name in features})
    assert together.accuracy == 0  # a family that only one version has is never learnt
    assert together.found == ("b",) * 4 + ("a",) * 4


def test_networks_that_look_alike_give_nothing_away():
    features = {f"{family}{n}": {"same": 1.0} for family in "abc" for n in range(3)}
    families = {name: name[0] for name in features}
    found = identify(features, families, {name: name for name in features})
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.bits == pytest.approx(0, abs=1e-12)


def test_every_known_network_is_of_one_version_and_family():
    known = list(members())
    assert len({each.name for each in known}) == len(known) >= 40
    versions = {}
    for each in known:
        assert versions.setdefault(each.version, each.family) == each.family
    for family in block_families.FAMILIES:
        assert sum(found == family for found in versions.values()) >= 2
    model, shape = build_member(next(each for each in known if each.name == "loopnet_2m"))
    assert (shape, next(model.parameters()).is_meta) == ((3, 32, 32), True)


@pytest.mark.slow
def test_nine_of_ten_known_networks_are_identified_from_their_operators():
    known = list(members())
    families = {each.name: each.family for each in known}
    versions = {each.name: each.version for each in known}
    accuracy = {}
    for observer in OBSERVERS:
        features = {name: features_of(trace, observer) for name, trace in known_traces().items()}
        accuracy[observer] = identify(features, families, versions)
    assert accuracy["operators"].accuracy >= 0.9
    assert accuracy["operators"].accuracy > accuracy["memory"].accuracy > 0.3
    assert accuracy["totals"].accuracy > 2 / len(block_families.FAMILIES)
    assert accuracy["operators"].bits <= log2(len(block_families.FAMILIES))


@pytest.mark.slow
def test_the_defence_leaves_an_attack_with_chance():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from leakage import measure
    finally:
        sys.path.remove(str(BENCHMARKS))
    found = measure()
    assert found["before"]["accuracy"] > 0.9
    assert found["after"]["accuracy"] == pytest.approx(1 / 3)
    assert found["largest change of the outputs"] < 1e-5
    assert min(found[family]["macs"] for family in ("plain", "separable", "inverted")) > 1
