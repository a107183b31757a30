"""Pictures of cameras that were held on their side, as kits read them in their own size."""

import numpy as np
import pytest
from PIL import Image

from smallfry_runtime.pairs import read_view


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_a_view_is_upright_and_nothing_of_it_is_cut_off(tmp_path, format, orientation, turns):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"view.{format.lower()}"
    Image.fromarray(pixels).save(file, format, exif=exif)
    assert np.array_equal(read_view(file).transpose(1, 2, 0), np.rot90(pixels, turns))
