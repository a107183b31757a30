"""Labels that a split lacks, or that training lacks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallfry.data.labels import relabelled, some_of, with_known_labels
from smallfry.data.sources import LACKING, TEST, TRAIN, UNLABELLED, VALIDATION, EncodedSplit, Source
from smallfry.errors import DataError, SmallfryWarning


def split(labels, strangers=()):
    """Images whose content is their number."""
    images = [bytes([number]) for number in range(len(labels))]
    array = np.array(labels, np.int64)
    return EncodedSplit(array, images.__getitem__, "image {}".format, strangers=tuple(strangers))


def source(**splits):
    return Source("photos", ("cat", "dog"), {TRAIN: split([0, 1]), **splits})


def numbers(of):
    return [of.read(i)[0] for i in range(len(of.labels))]


@given(st.lists(st.integers(-1, 3), max_size=12), st.permutations([0, 1, 2, LACKING]))
def test_images_keep_their_order_and_get_the_labels_of_a_table(labels, table):
    found = relabelled(split(labels), np.array(table))
    wanted = [(i, table[v] if v >= 0 else v) for i, v in enumerate(labels)]
    wanted = [(i, v) for i, v in wanted if v != LACKING]
    assert numbers(found) == [i for i, _ in wanted]
    assert found.labels.tolist() == [v for _, v in wanted]


@pytest.mark.parametrize("name", [VALIDATION, TEST])
def test_a_split_without_any_label_is_left_out_with_a_warning(name):
    with pytest.warns(SmallfryWarning, match=f"its {name} split has no labels and is left out"):
        found = with_known_labels(source(**{name: split([UNLABELLED, UNLABELLED])}))
    assert set(found.splits) == {TRAIN}


@pytest.mark.parametrize("name", [VALIDATION, TEST])
def test_images_of_unknown_classes_are_left_out_with_a_warning(name):
    given_split = split([0, LACKING, 1, LACKING], ["owl"])
    with pytest.warns(SmallfryWarning, match=rf"2 of 4 {name} images are of owl, not among"):
        found = with_known_labels(source(**{name: given_split}))
    assert numbers(found.splits[name]) == [0, 2]
    assert found.splits[name].labels.tolist() == [0, 1]


def test_another_spelling_of_a_class_is_an_error_with_a_suggestion():
    with pytest.raises(DataError, match=r"image 1: class ' Dog' is not among .*did you mean 'dog'"):
        with_known_labels(source(**{TEST: split([0, LACKING], [" Dog"])}))


def test_a_split_of_unknown_classes_alone_is_an_error():
    with pytest.raises(DataError, match=r"image 0: class 'owl' is not among the training classes$"):
        with_known_labels(source(**{TEST: split([LACKING, LACKING], ["owl"])}))


def test_splits_with_known_labels_and_empty_ones_are_unchanged():
    given_source = source(**{VALIDATION: split([1, 0]), TEST: split([])})
    found = with_known_labels(given_source)
    assert found.splits == given_source.splits


def test_a_long_list_of_names_is_abbreviated():
    assert some_of(["a", "b"]) == "a, b"
    assert some_of([str(i) for i in range(5)]) == "0, 1, 2, 3, 4"
    assert some_of([str(i) for i in range(12)]) == "0, 1, 2, 3, 4, … (12 in all)"
