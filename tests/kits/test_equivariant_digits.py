"""Generated affine digits: the maps, the pixels, and the splits."""

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from smallfry.data import load_data
from smallfry.errors import UsageError
from smallfry.kits.equivariant.digits import AffineDigits, distort, draw_matrix, resample


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep generated images out of the user's cache."""
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "cache"))


def original(seed=0, rows=8):
    """A digit-like square with dark borders."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, rows))
    pixels[:, :2] = pixels[:, -1:] = 0
    return pixels.astype(np.uint8)


def test_resampling_equals_scipys():
    linear = draw_matrix(AffineDigits(rotation=180.0, shear=0.3), np.random.default_rng(1))
    matrix = np.concatenate([linear, [[1.3], [-0.7]]], axis=1)
    found = resample(original(), 24, 12, matrix)
    swap = np.array([[0, 1], [1, 0]])  # SciPy's places are (row, column)
    back = swap @ np.linalg.inv(linear) @ swap * (8 / 12)
    middle = np.array([11.5, 11.5])
    offset = 3.5 - back @ (middle + matrix[::-1, 2]) + 1  # of the padded digit
    wanted = affine_transform(np.pad(original().astype(float), 1), back, offset, (24, 24), order=1)
    assert found == pytest.approx(wanted, abs=1e-9)


def test_maps_that_are_whole_steps_are_exact():
    pixels = original()
    assert np.array_equal(resample(pixels, 8, 8, np.eye(2, 3)), pixels)
    clockwise = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
    assert resample(pixels, 8, 8, clockwise) == pytest.approx(np.rot90(pixels, -1), abs=1e-9)
    right = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    assert resample(pixels, 8, 8, right)[:, 1:] == pytest.approx(pixels[:, :-1], abs=1e-9)


def test_matrices_are_in_their_ranges():
    settings = AffineDigits(rotation=30.0, shear=0.1, scale_low=0.9, scale_high=1.5)
    random = np.random.default_rng(0)
    turns, shears, scales = [], [], []
    for _ in range(2000):
        q, r = np.linalg.qr(draw_matrix(settings, random))
        sign = np.sign(np.diag(r))
        q, r = q * sign, r * sign[:, None]
        turns.append(np.degrees(np.arctan2(q[1, 0], q[0, 0])))
        scales.append(np.diag(r))
        shears.append(r[0, 1] / r[1, 1])
    for values, low, high in ((turns, -30, 30), (shears, -0.1, 0.1), (np.array(scales), 0.9, 1.5)):
        assert low <= np.min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < np.max(values) <= high


def test_the_matrix_is_that_of_the_image_and_no_ink_leaves_it():
    settings = AffineDigits(rotation=45.0)
    pixels = original()
    for number in range(40):
        found = distort(pixels, settings, "test", number)
        again = np.rint(resample(pixels, 16, 10, found.matrix)).astype(np.uint8)
        assert np.array_equal(found.pixels[0], again)
        large = resample(pixels, 64, 10, found.matrix)  # the same around the same middle
        inside = large[24:40, 24:40].sum()
        assert inside == pytest.approx(large.sum(), rel=1e-9)
    still = distort(pixels, AffineDigits(translation="none"), "test", 0)
    assert still.matrix[:, 2].tolist() == [0, 0]
    empty = distort(np.zeros((8, 8), np.uint8), settings, "test", 0)
    assert empty.pixels.max() == 0
    # one too large is in the middle
    wide = distort(
        np.full((8, 8), 9, np.uint8), AffineDigits(scale_low=3.0, scale_high=3.0), "test", 0
    )
    assert wide.matrix[:, 2] == pytest.approx([0, 0], abs=1e-9)


def test_images_depend_on_settings_split_number_and_version_alone():
    settings = AffineDigits()
    first = distort(original(), settings, "test", 3, 1)
    assert np.array_equal(first.pixels, distort(original(), settings, "test", 3, 1).pixels)
    others = [
        distort(original(), settings, "train", 3, 1),
        distort(original(), settings, "test", 4, 1),
        distort(original(), settings, "test", 3, 0),
        distort(original(), AffineDigits(seed=1), "test", 3, 1),
    ]
    assert not any(np.array_equal(first.matrix, other.matrix) for other in others)


def test_the_data_set_is_upright_in_training_and_distorted_in_the_test():
    upright = load_data("equivariant-digits", options={"distorted": "none"})
    data = load_data("equivariant-digits", options={"versions": 2})
    digits = load_data("digits")
    assert data.input_shape == (1, 16, 16)
    assert len(data.train) == len(digits.train)
    assert torch.equal(data.train.images, upright.train.images)
    assert torch.equal(data.train.labels, digits.train.labels)
    assert torch.equal(data.test.labels, digits.test.labels.repeat_interleave(2))
    assert not torch.equal(data.test.images[::2], upright.test.images)
    assert not torch.equal(data.test.images[::2], data.test.images[1::2])
    assert data.generated["family"] == "equivariant-digits"
    assert data.generated["of"] == "scikit-learn"
    everywhere = load_data("equivariant-digits", options={"distorted": "all", "size": 20}, limit=50)
    assert everywhere.input_shape == (1, 20, 20)
    assert len(everywhere.train) == 50
    assert torch.equal(data.test.labels[::2], everywhere.test.labels)


def test_a_folder_of_mnist_is_distorted_too(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        pictures = [Image.fromarray(original(i, 28)) for i in range(count)]
        labels = [int(i % 10) for i in random.permutation(count)]
        table = datasets.Dataset.from_dict(
            {"image": pictures, "label": labels},
            features=datasets.Features(
                {"image": datasets.Image(), "label": datasets.ClassLabel(10)}
            ),
        )
        (tmp_path / "mnist").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "mnist" / f"{split}-00000-of-00001.parquet")
    data = load_data("equivariant-digits", tmp_path / "mnist", validation=0.25)
    assert data.input_shape == (1, 40, 40)
    assert [len(data.train), len(data.validation), len(data.test)] == [30, 10, 10]
    plain = load_data("mnist", tmp_path / "mnist", validation=0.25)
    assert torch.equal(data.train.images[..., 6:-6, 6:-6], plain.train.images)
    assert torch.equal(data.test.labels, plain.test.labels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rotation": 181.0}, "rotation is 0 to 180"),
        ({"shear": -0.1}, "shear 0 to 1"),
        ({"scale_low": 2.0}, "scale_low is 0.1 to scale_high"),
        ({"translation": "left"}, "inside or none, not 'left'"),
        ({"distorted": "train"}, "test, all or none"),
        ({"versions": 0}, "versions is 1 to 100"),
        ({"size": 4}, "size 0 or 8 to 128"),
        ({"angle": 4}, "no 'angle'"),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        load_data("equivariant-digits", options=options)


def test_other_sizes_are_an_option_not_a_resize():
    with pytest.raises(UsageError, match=r"no data\.image_size"):
        load_data("equivariant-digits", image_size=32)
