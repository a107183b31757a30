"""Images to calibrate with."""

import pytest
import torch
from torch import nn

from smallfry.data import Split, load_data
from smallfry.training.augment import Normalize
from smallfry.training.calibration import CalibrationBatches


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_images_are_spread_over_the_split_and_read_anew(digits):
    normalize = Normalize(digits.mean, digits.std)
    batches = CalibrationBatches(digits.train, normalize, nn.Linear(2, 2))
    first, again = list(batches), list(batches)
    assert [len(each) for each in first] == [64] * 4
    assert len(batches) == 4
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    count = len(digits.train)
    ends = normalize(digits.train.take(torch.tensor([0, count - 1])).images)
    assert torch.equal(torch.stack([first[0][0], first[-1][-1]]), ends)
    assert torch.equal(batches.example(), first[0][:2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batches_have_the_type_of_the_model(digits, dtype):
    model = nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2)).to(dtype)
    batches = CalibrationBatches(digits.train, Normalize(digits.mean, digits.std), model)
    assert {batch.dtype for batch in batches} == {batches.example().dtype} == {dtype}


@pytest.mark.parametrize("count", [1, 3])
def test_few_images_are_all_taken(digits, count):
    few = digits.train.take(torch.arange(count))
    batches = CalibrationBatches(few, Normalize(digits.mean, digits.std), nn.Identity())
    assert isinstance(few, Split)
    assert [len(batch) for batch in batches] == [count]
    assert len(batches.example()) == min(count, 2)
