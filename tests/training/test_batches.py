import pytest
import torch
from torch.testing import assert_close

from smallfry.data import Split, load_data
from smallfry.models.contract import tensors
from smallfry.training.augment import Augment
from smallfry.training.batches import (
    TrainBatches,
    derive_seed,
    flips_by_default,
    resident,
)
from smallfry.training.config import AugmentConfig
from smallfry.training.loader import TrainLoader

EVERYTHING = AugmentConfig(crop_padding=1, flip=True, randaugment_ops=2, mixup=0.2, cutmix=1.0)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", limit=100)


def batches(digits, config=EVERYTHING, seed=0, batch_size=32):
    augment = Augment(config, 8, 10, digits.mean, digits.std, flip=False)
    return TrainBatches(digits.train, augment, batch_size, seed)


def test_a_batch_is_a_function_of_seed_and_step(digits):
    first, second = batches(digits), batches(digits)
    wanted = first[4]
    _ = second[0], second[7], torch.rand(3)  # another history
    for mine, theirs in zip(tensors(wanted), tensors(second[4]), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(wanted.inputs, batches(digits, seed=1)[4].inputs)
    assert not torch.equal(wanted.inputs, first[5].inputs)


def test_making_a_batch_leaves_the_random_state_alone(digits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _ = batches(digits)[0]
    assert torch.equal(torch.rand(3), expected)


def test_worker_processes_change_nothing_and_a_run_can_begin_anywhere(digits):
    made = batches(digits)
    plain = list(TrainLoader(made, range(2, 6), workers=0, pin_memory=False))
    parallel = list(TrainLoader(made, range(2, 6), workers=2, pin_memory=False))
    assert len(plain) == 4
    for step, here, there in zip(range(2, 6), plain, parallel, strict=True):
        assert torch.equal(here.inputs, made[step].inputs)
        assert torch.equal(here.inputs, there.inputs)
        assert torch.equal(here.targets.shares, there.targets.shares)


def test_an_epoch_visits_every_image_at_most_once_in_a_new_order(digits):
    made = batches(digits, AugmentConfig(crop_padding=0, flip=False, mixup=0.0), batch_size=10)
    orders = []
    for epoch in range(2):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        images = torch.cat([made[step].inputs.flatten(1) for step in steps])
        assert len(images.unique(dim=0)) == len(digits.train.images.unique(dim=0))
        orders.append(images)
    assert not torch.equal(*orders)


def test_without_augmentation_images_are_just_normalised(digits):
    made = batches(digits, AugmentConfig(crop_padding=0, flip=False, mixup=0.0), batch_size=1000)
    images = made[0].inputs
    assert images.mean().abs() < 1e-5
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(made[0].targets.shares.argmax(1), made[0].targets.labels)


def test_mixing_keeps_targets_a_distribution_and_labels_unmixed(digits):
    made = batches(digits)
    for step in range(12):
        batch = made[step]
        assert_close(batch.targets.shares.sum(1), torch.ones(32))
        assert batch.targets.labels.dtype == torch.int64
        # what is not the image's own label is its neighbour's, as both mix with a rolled batch
        own = batch.targets.shares.gather(1, batch.targets.labels[:, None])[:, 0]
        other = batch.targets.shares.gather(1, batch.targets.labels.roll(1)[:, None])[:, 0]
        same = batch.targets.labels == batch.targets.labels.roll(1)
        assert_close(torch.where(same, own, own + other), torch.ones(32))


def test_characters_are_not_mirrored_by_default(digits):
    assert not flips_by_default(digits)


def test_images_that_live_on_a_device_give_batches_there(digits):
    there = resident(digits.train, torch.device("meta"), wanted=True)
    augment = Augment(EVERYTHING, 8, 10, digits.mean, digits.std, flip=False)
    (batch,) = TrainLoader(TrainBatches(there, augment, 32, 0), range(1), None, pin_memory=True)
    assert {tensor.device.type for tensor in tensors(batch)} == {"meta"}
    assert batch.inputs.shape == (32, 1, 8, 8)


def test_images_stay_where_they_are_on_a_cpu_or_if_that_is_wanted(digits):
    for device, wanted in (("cpu", True), ("cpu", None), ("meta", False), ("meta", None)):
        assert resident(digits.train, torch.device(device), wanted) is digits.train


def test_where_images_live_does_not_change_a_batch(digits):
    gathered = Split(digits.train.images, torch.arange(len(digits.train)), digits.train.labels)
    augment = Augment(EVERYTHING, 8, 10, digits.mean, digits.std, flip=False)
    found = TrainBatches(gathered, augment, 32, 0)[3]
    for mine, theirs in zip(tensors(found), tensors(batches(digits)[3]), strict=True):
        assert torch.equal(mine, theirs)


def test_seeds_of_different_streams_differ():
    keys = [(s, k, n) for s in range(3) for k in range(3) for n in range(50)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
