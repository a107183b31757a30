"""Which sample the rows of a layer's input belong to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smallfry.curvature.identity import (
    belongs,
    is_ambiguous,
    mixes_samples,
    own_share,
    padded,
    position_first,
    real_rows,
    samples_of,
)

LINEAR, CONV, CONV_1D = nn.Linear(3, 2), nn.Conv2d(3, 2, 1), nn.Conv1d(3, 2, 1)
SIZES = st.integers(1, 6)


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (LINEAR, (4, 3), True),
        (LINEAR, (8, 3), True),  # two rows for each sample
        (LINEAR, (7, 4, 3), True),  # behind a sequence
        (LINEAR, (7, 3), False),
        (LINEAR, (3,), False),
        (CONV, (4, 3, 5, 5), True),
        (CONV, (6, 3, 5, 5), False),
        (CONV, (3, 5, 5), False),  # one image, without a batch
        (CONV_1D, (4, 3, 5), True),
        (CONV_1D, (3, 5), False),
    ],
)
def test_samples_are_in_the_first_dimension_or_behind_a_sequence(module, shape, expected):
    assert belongs(module, shape, 4) == expected


def test_a_layer_without_a_batch_dimension_belongs_to_a_single_sample():
    assert belongs(LINEAR, (3,), 1)
    assert belongs(CONV, (3, 5, 5), 1)


@given(samples=SIZES, tokens=st.integers(2, 6))
def test_samples_folded_with_tokens_are_those_of_the_input(samples, tokens):
    layers = [(LINEAR, (samples, 7)), (LINEAR, (samples * tokens, 3))]
    assert samples_of(layers, samples * tokens, [torch.zeros(samples, 7)]) == samples
    assert samples_of(layers[1:], samples * tokens, [torch.zeros(samples, 7)]) == samples * tokens
    assert samples_of(layers, samples * tokens, ["no tensor"]) == samples * tokens


@given(rows=st.integers(1, 12), samples=SIZES)
def test_padding_divides_evenly_and_counts_nowhere(rows, samples):
    given_rows = torch.arange(1.0, rows * 3 + 1).reshape(rows, 3)
    filled = padded(LINEAR, given_rows, samples)
    assert len(filled) % samples == 0
    assert 0 <= len(filled) - rows < samples
    assert torch.equal(filled[:rows], given_rows)
    assert not filled[rows:].any()
    real = real_rows(LINEAR, given_rows.shape, samples, given_rows)
    assert real.shape == (samples, len(filled) // samples)
    assert torch.equal(real.flatten(), (filled.sum(1) > 0).float())


@given(images=st.integers(1, 5), samples=SIZES, side=st.integers(1, 3))
def test_each_position_of_a_padded_image_is_no_row(images, samples, side):
    shape = torch.Size((images, 2, side, side))
    real = real_rows(CONV, shape, samples, torch.zeros(()))
    assert real.shape == (samples, -(-images // samples) * side**2)
    assert int(real.sum()) == images * side**2


def test_one_image_without_a_batch_is_one_row_of_images():
    assert padded(CONV, torch.ones(3, 2, 2), 2).shape == (2, 3, 2, 2)
    assert padded(CONV_1D, torch.ones(3, 2), 2).shape == (2, 3, 2)


@given(samples=SIZES, positions=SIZES, width=SIZES)
def test_rows_with_positions_first_are_reordered_by_sample(samples, positions, width):
    by_sample = torch.randn(samples, positions, width)
    folded = by_sample.transpose(0, 1).flatten(0, 1)
    found = position_first(folded, samples)
    if positions == 1:
        assert found is None
    else:
        assert torch.equal(found, by_sample.flatten(0, 1))
    assert position_first(torch.zeros(samples * 2 + 1, width), samples + 1) is None or (
        (samples * 2 + 1) % (samples + 1) == 0
    )


def test_the_share_of_a_sample_is_that_of_its_squares():
    gradients = torch.zeros(1, 3, 2, 2)
    assert own_share(gradients, 0) is None
    gradients[0, 0], gradients[0, 2] = 1.0, 2.0
    assert own_share(gradients, 0) == pytest.approx(1 / 5)
    assert own_share(gradients, 1) == 0
    assert sum(own_share(gradients, i) for i in range(3)) == pytest.approx(1)


def test_a_sequence_as_long_as_the_batch_is_ambiguous():
    assert is_ambiguous(LINEAR, (4, 4, 3), 4)
    assert not is_ambiguous(LINEAR, (4, 5, 3), 4)
    assert not is_ambiguous(LINEAR, (4, 4), 4)
    assert not is_ambiguous(CONV, (4, 4, 4, 4), 4)


def test_only_a_batch_norm_in_training_mixes_samples():
    model = nn.Sequential(LINEAR, nn.BatchNorm1d(2))
    assert mixes_samples(model.train())
    assert not mixes_samples(model.eval())
    assert not mixes_samples(nn.Sequential(LINEAR, nn.LayerNorm(2)).train())
