import pytest
import torch
from torch.testing import assert_close

from smallfry.data import load_data
from smallfry.training.batches import (
    Augment,
    Normalize,
    TrainBatches,
    derive_seed,
    flips_by_default,
    train_loader,
)
from smallfry.training.config import AugmentConfig

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
    for mine, theirs in zip(wanted, second[4], strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(wanted.images, batches(digits, seed=1)[4].images)
    assert not torch.equal(wanted.images, first[5].images)


def test_making_a_batch_leaves_the_random_state_alone(digits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _ = batches(digits)[0]
    assert torch.equal(torch.rand(3), expected)


def test_worker_processes_change_nothing_and_a_run_can_begin_anywhere(digits):
    made = batches(digits)
    plain = list(train_loader(made, range(2, 6), workers=0, pin_memory=False))
    parallel = list(train_loader(made, range(2, 6), workers=2, pin_memory=False))
    assert len(plain) == 4
    for step, here, there in zip(range(2, 6), plain, parallel, strict=True):
        assert torch.equal(here.images, made[step].images)
        assert torch.equal(here.images, there.images)
        assert torch.equal(here.targets, there.targets)


def test_an_epoch_visits_every_image_at_most_once_in_a_new_order(digits):
    made = batches(digits, AugmentConfig(crop_padding=0, flip=False, mixup=0.0), batch_size=10)
    orders = []
    for epoch in range(2):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        images = torch.cat([made[step].images.flatten(1) for step in steps])
        assert len(images.unique(dim=0)) == len(digits.train.images.unique(dim=0))
        orders.append(images)
    assert not torch.equal(*orders)


def test_without_augmentation_images_are_just_normalised(digits):
    made = batches(digits, AugmentConfig(crop_padding=0, flip=False, mixup=0.0), batch_size=1000)
    images = made[0].images
    assert images.mean().abs() < 1e-5
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(made[0].targets.argmax(1), made[0].labels)


def test_mixing_keeps_targets_a_distribution_and_labels_unmixed(digits):
    made = batches(digits)
    for step in range(12):
        batch = made[step]
        assert_close(batch.targets.sum(1), torch.ones(32))
        assert batch.labels.dtype == torch.int64
        # what is not the image's own label is its neighbour's, as both mix with a rolled batch
        own = batch.targets.gather(1, batch.labels[:, None])[:, 0]
        other = batch.targets.gather(1, batch.labels.roll(1)[:, None])[:, 0]
        same = batch.labels == batch.labels.roll(1)
        assert_close(torch.where(same, own, own + other), torch.ones(32))


@pytest.mark.parametrize(
    ("alphas", "expected"), [((1.0, 0.0), {"mixup"}), ((0.0, 1.0), {"cutmix"}), ((1.0, 1.0), None)]
)
def test_mixup_blends_pixels_and_cutmix_pastes_them(alphas, expected):
    mixup, cutmix = alphas
    config = AugmentConfig(crop_padding=0, flip=False, mixup=mixup, cutmix=cutmix)
    augment = Augment(config, 8, 2, (0.0,), (1 / 255,), flip=False)
    images = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    seen = set()
    for _ in range(20):
        values = augment(images, torch.tensor([0, 1])).images.unique().tolist()
        between = any(1 < value < 199 for value in values)
        seen.add("mixup" if between else "cutmix")
    assert seen == (expected or {"mixup", "cutmix"})


def test_crops_and_flips_only_move_pixels():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    augment = Augment(
        AugmentConfig(crop_padding=1, flip=True, mixup=0.0), 8, 2, (0.0,), (1 / 255,), flip=False
    )
    moved = augment(images, torch.zeros(200, dtype=torch.int64)).images.round().long()
    centres = {tuple(row) for row in moved[:, 0, 4, 3:5].tolist()}
    assert len(centres) == 18  # 9 shifts, mirrored or not


@pytest.mark.parametrize(("size", "padding"), [(8, None), (32, 4)])
def test_the_default_crop_pads_an_eighth_but_not_tiny_images(size, padding):
    augment = Augment(AugmentConfig(flip=False), size, 2, (0.5,), (0.5,), flip=False)
    if padding is None:
        assert augment.per_image is None
    else:
        assert augment.per_image.transforms[0].padding == [padding] * 4


def test_characters_are_not_mirrored_by_default(digits):
    assert not flips_by_default(digits)


def test_normalize_is_shift_and_scale_of_the_unit_range():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert_close(Normalize((0.5,), (0.25,))(images).flatten(), torch.tensor([-2.0, 2.0]))


def test_seeds_of_different_streams_differ():
    keys = [(s, k, n) for s in range(3) for k in range(3) for n in range(50)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
