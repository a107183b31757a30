"""Scores beside scikit-learn and plain counting: of one class, of none, with ties and names."""

import csv
import io
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from smallfry.io.csv_text import csv_text, harmless
from smallfry.report.classification import surest_mistakes
from smallfry.report.confusion import balanced_accuracy, count_confusions, macro_f1
from smallfry.report.corruptions import corruption_names, mean_corruption_errors
from smallfry.report.mistakes_page import class_pairs, label_mistakes, name_pairs
from smallfry.report.per_class import (
    class_scores,
    confusion_csv,
    reliability,
    scores_csv,
    scores_dict,
)
from smallfry.report.recursion import interesting

NAMES = ("a", "<b>", "=c", "_d", "e,f", 'g"h')


@st.composite
def answered(draw, least=1):
    """Predicted and true classes, and their number; not every class occurs."""
    classes = draw(st.integers(1, len(NAMES)))
    label = st.integers(0, classes - 1)
    pairs = draw(st.lists(st.tuples(label, label), min_size=least, max_size=30))
    found = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1], classes


def outputs_of(predicted, classes):
    """Logits with that greatest class, in float64."""
    return 3.0 * torch.nn.functional.one_hot(predicted, classes).double()


@settings(max_examples=40)
@given(answered())
def test_means_over_classes_are_those_of_scikit_learn(found):
    predicted, labels, classes = found
    wanted = metrics.f1_score(labels, predicted, average="macro", zero_division=0.0)
    assert macro_f1(predicted, labels, classes) == pytest.approx(wanted, abs=1e-6)
    recall = metrics.recall_score(
        *(labels, predicted), labels=sorted({*labels.tolist()}), average="macro"
    )
    assert balanced_accuracy(predicted, labels, classes) == pytest.approx(recall)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=40)
@given(answered())
def test_balanced_accuracy_is_that_of_scikit_learn(found):
    predicted, labels, classes = found
    wanted = metrics.balanced_accuracy_score(labels.numpy(), predicted.numpy())
    assert balanced_accuracy(predicted, labels, classes) == pytest.approx(wanted)


@settings(max_examples=40)
@given(answered())
def test_scores_of_classes_are_counted(found):
    predicted, labels, classes = found
    scores = class_scores(outputs_of(predicted, classes), labels, NAMES[:classes])
    assert [each.name for each in scores] == [*NAMES[:classes]]
    for i, each in enumerate(scores):
        hits = int(((predicted == i) & (labels == i)).sum())
        taken, there = int((predicted == i).sum()), int((labels == i).sum())
        assert each.images == there
        assert each.precision == pytest.approx(hits / taken if taken else 0)
        assert each.recall == pytest.approx(hits / there if there else 0)
        assert each.f1 == pytest.approx(2 * hits / (taken + there) if taken + there else 0)
        assert type(each.images) is int
    assert sum(each.images for each in scores) == len(labels)


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=40)
@given(answered(least=0))
def test_the_matrix_is_that_of_scikit_learn(found):
    predicted, labels, classes = found
    confusions = count_confusions(predicted, labels, classes)
    everything = confusions.dense(torch.arange(classes))
    assert everything[:, -1].tolist() == [0] * classes  # there are no others
    if len(labels):
        wanted = metrics.confusion_matrix(labels, predicted, labels=range(classes))
        assert (everything[:, :-1].numpy() == wanted).all()
        wrong = wanted.sum(1) - wanted.diagonal()
        assert confusions.mistakes.tolist() == wrong.tolist()
    assert int(confusions.counts.sum()) == len(labels)
    for most in (0, 1, classes, classes + 5):
        worst = confusions.worst(most)
        assert len(worst) == min(most, classes)
        part = confusions.dense(worst)
        assert part.shape == (len(worst), len(worst) + 1)
        assert part.sum(1).tolist() == everything.sum(1)[worst].tolist()
        assert (part[:, :-1] == everything[worst][:, worst]).all()


@settings(max_examples=40)
@given(answered(least=0))
def test_the_tables_can_be_read_back(found):
    predicted, labels, classes = found
    names, outputs = NAMES[:classes], outputs_of(predicted, classes)
    head, *rows = csv.reader(io.StringIO(confusion_csv(outputs, labels, names), newline=""))
    assert head[1:] == [harmless(name) for name in names] == [row[0] for row in rows]
    counted = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    for true, row in enumerate(rows):
        assert [int(cell) for cell in row[1:]] == [counted[true, said] for said in range(classes)]
    if len(labels):
        scores = scores_dict(class_scores(outputs, labels, names))
        text = scores_csv(scores)
        for row in csv.DictReader(io.StringIO(text, newline="")):
            name = next(each for each in names if harmless(each) == row["class"])
            assert {k: float(v) for k, v in row.items() if k != "class"} == scores[name]


CELLS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8),
    st.sampled_from(["a\rb", "\r", "a\r\nb", '"', "x\r", ",", "", "=1+1", " a "]),
)


@given(st.lists(st.lists(CELLS, min_size=2, max_size=3), min_size=1, max_size=4))
def test_any_text_comes_back_from_a_table(rows):
    text = csv_text(rows)
    assert text.endswith("\n")
    wanted = [[harmless(cell) for cell in row] for row in rows]
    assert [*csv.reader(io.StringIO(text, newline=""))] == wanted
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in wanted for cell in row)


def test_lines_of_a_table_end_as_on_unix():
    assert csv_text([["a", "b"], [1, None]]) == "a,b\n1,\n"
    assert csv_text([]) == ""


# Reliability


@given(
    st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.integers(0, 1)), max_size=20),
    st.integers(1, 12),
)
def test_reliability_is_counted_bin_by_bin(rows, bins):
    outputs = torch.tensor([row[:2] for row in rows], dtype=torch.float32).reshape(-1, 2)
    labels = torch.tensor([row[2] for row in rows], dtype=torch.int64)
    found = reliability(outputs, labels, bins)
    confidence, predicted = outputs.softmax(1).max(1)
    edges = torch.linspace(0, 1, bins + 1)
    error = 0.0
    for i in range(bins):
        inside = (confidence >= edges[i]) & ((confidence < edges[i + 1]) | (i == bins - 1))
        assert found.counts[i] == inside.sum()
        if not inside.any():
            assert (found.confidence[i], found.accuracy[i]) == (0, 0)
            continue
        sure = confidence[inside].double().mean().item()
        right = (predicted == labels)[inside].double().mean().item()
        assert found.confidence[i].item() == pytest.approx(sure)
        assert found.accuracy[i].item() == pytest.approx(right)
        error += abs(sure - right) * int(inside.sum()) / len(rows)
    assert found.error == pytest.approx(error, abs=1e-9)


def test_one_class_is_always_right_and_sure():
    outputs, labels = torch.randn(5, 1), torch.zeros(5, dtype=torch.int64)
    found = reliability(outputs, labels)
    assert (found.counts[-1], found.error) == (5, 0)
    assert class_scores(outputs, labels, ["only"])[0][1:] == (1.0, 1.0, 1.0, 5)
    assert macro_f1(labels, labels, 1) == balanced_accuracy(labels, labels, 1) == 1
    assert class_pairs(outputs, labels) == []


def test_no_images_have_no_scores():
    none = torch.zeros(0, dtype=torch.int64)
    assert macro_f1(none, none, 3) == balanced_accuracy(none, none, 3) == 0
    assert surest_mistakes(torch.zeros(0, 3), none).tolist() == []
    assert interesting(torch.zeros(0, 3), none).tolist() == []
    assert confusion_csv(torch.zeros(0, 2), none, "ab") == "true \\ predicted,a,b\na,0,0\nb,0,0\n"


# Mistakes


@settings(max_examples=40)
@given(answered(least=0), st.integers(0, 2**31))
def test_pairs_hold_every_mistake_once_the_surest_first(found, seed):
    predicted, labels, classes = found
    generator = torch.Generator().manual_seed(seed)
    sure = torch.rand(len(labels), 1, generator=generator, dtype=torch.float64)
    outputs = outputs_of(predicted, classes) * (0.1 + sure)
    pairs = class_pairs(outputs, labels)
    counted = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    wrong = {pair: n for pair, n in counted.items() if pair[0] != pair[1]}
    assert {(p.true, p.predicted): len(p.mistakes) for p in pairs} == wrong
    order = [(-len(p.mistakes), p.true, p.predicted) for p in pairs]
    assert order == sorted(order)
    for pair in pairs:
        shares = [each.confidence for each in pair.mistakes]
        assert shares == sorted(shares, reverse=True)
        for position, share in pair.mistakes:
            assert (labels[position], predicted[position]) == (pair.true, pair.predicted)
            assert share == pytest.approx(outputs[position].softmax(0).max().item())
    positions = sorted(each.position for pair in pairs for each in pair.mistakes)
    assert positions == (predicted != labels).nonzero()[:, 0].tolist()
    titles = [group.title for group in name_pairs(pairs, NAMES)]
    assert titles == [f"{NAMES[p.true]}, taken for {NAMES[p.predicted]}" for p in pairs]


@given(st.lists(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=3, max_size=3)))
def test_missing_and_wrong_classes_are_each_in_one_group(rows):
    shares = torch.tensor([[s for s, _ in row] for row in rows]).reshape(-1, 3)
    labels = torch.tensor([[int(h) for _, h in row] for row in rows]).reshape(-1, 3)
    chosen = shares >= 0.5
    groups = label_mistakes(shares, chosen, labels, NAMES[:3])
    sizes = [len(group.mistakes) for group in groups]
    assert sizes == sorted(sizes, reverse=True)
    assert all(sizes)
    found = {(g.label, g.title, each.position) for g in groups for each in g.mistakes}
    wanted = set()
    for i, c in (chosen != labels.bool()).nonzero().tolist():
        kind = "wrong" if chosen[i, c] else "missing"
        wanted.add((NAMES[c], f"{NAMES[c]}, {kind}", i))
    assert found == wanted
    for group in groups:
        order = [each.confidence for each in group.mistakes]
        assert order == sorted(order, reverse=group.title.endswith("wrong"))


def test_the_surest_of_many_mistakes_are_taken():
    outputs = torch.tensor([[3.0, 0], [1, 0], [0, 5], [2, 0], [9, 0]], dtype=torch.float64)
    labels = torch.tensor([1, 1, 0, 1, 0])
    assert surest_mistakes(outputs, labels).tolist() == [2, 0, 3, 1]
    assert surest_mistakes(outputs, labels, most=2).tolist() == [2, 0]
    assert surest_mistakes(outputs, outputs.argmax(1)).tolist() == []


@settings(max_examples=40)
@given(answered(least=0), st.integers(0, 8))
def test_half_of_what_is_traced_are_mistakes_where_there_are_any(found, most):
    predicted, labels, classes = found
    outputs = outputs_of(predicted, classes + 1)
    chosen = interesting(outputs, labels, most)
    wrong = int((predicted != labels).sum())
    assert len({*chosen.tolist()}) == len(chosen)
    mistakes = int((predicted != labels)[chosen].sum())
    assert mistakes == min(wrong, most // 2)
    assert len(chosen) == min(mistakes + len(labels) - wrong, most)


# Corruptions


def test_mean_errors_weigh_corruptions_and_not_their_severities():
    accuracies = {
        ("clean", 0): {"a": 0.0, "b": 1.0},
        ("fog", 1): {"a": 1.0, "b": 0.5},
        ("fog", 3): {"a": 0.5, "b": 0.5},
        ("fog", 5): {"a": 0.0, "b": 0.5},
        ("snow", 1): {"a": 0.75},
    }
    assert mean_corruption_errors(accuracies) == pytest.approx({"a": 0.375, "b": 0.5})
    assert corruption_names(accuracies) == ["fog", "snow"]
    assert mean_corruption_errors({("clean", 0): {"a": 1.0}}) == {}
    assert np.isfinite([*mean_corruption_errors(accuracies).values()]).all()
