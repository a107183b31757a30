"""Chains of seeds: weights to the bit, in this process and in others."""

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from smallfry.errors import RunError, UsageError
from smallfry.search.neuroevolution import SeedChain
from smallfry.search.neuroevolution.network import forward, parameters_of
from smallfry.search.neuroevolution.seed_chain import normals

GOLDEN = {  # first float32 normals by seed, of NumPy 2.4.6
    0: [-0.24822916090488434, -0.02676702, -1.9444162845611572, 0.5245779752731323],
    1: [0.4422069489955902, -0.1334790587425232, -0.2643882930278778, -0.188115656375885],
    12345: [-0.9613757729530334, 0.8724467754364014, -0.3289162218570709, 1.3635509014129639],
}
SIZES = (11, 16, 2)


def long_chain(generations=30):
    chain = SeedChain(SIZES, 5)
    for number in range(generations):
        chain = chain.child(2**40 + number, 0.1 / (1 + number))
    return chain


@pytest.mark.skipif(np.__version__ != "2.4.6", reason="the normals are those of NumPy 2.4.6")
@pytest.mark.parametrize("seed", GOLDEN)
def test_normals_are_those_of_the_specification(seed):
    assert normals(seed, 4).tolist() == pytest.approx(GOLDEN[seed], abs=1e-8)


def test_weights_are_the_first_ones_and_all_mutations_in_order():
    chain = long_chain(3)
    count = parameters_of(SIZES)
    expected = SeedChain(SIZES, 5).weights()
    for seed, power in chain.steps:
        expected = expected + np.float32(power) * normals(seed, count)
    assert chain.weights().dtype == np.float32
    assert np.array_equal(chain.weights(), expected)


def test_first_weights_have_the_published_deviations_and_no_biases():
    sizes = (400, 300, 50)
    weights = SeedChain(sizes, 1).weights()
    end = 400 * 300
    assert weights[:end].std() == pytest.approx(1 / np.sqrt(400), rel=0.02)
    assert not weights[end : end + 300].any()
    last = weights[end + 300 : -50]
    assert last.std() == pytest.approx(0.1 / np.sqrt(300), rel=0.02)
    assert not weights[-50:].any()


def test_a_child_of_known_parents_equals_the_rebuilt_one_to_the_bit():
    chain = long_chain()
    parent = SeedChain(chain.sizes, chain.seed, chain.steps[:-1]).weights()
    assert np.array_equal(chain.weights(parent), chain.weights())


@pytest.mark.slow
def test_another_process_rebuilds_the_weights_to_the_bit(tmp_path):
    chain = long_chain()
    chain.save(tmp_path / "elite.json", "maze")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from smallfry.search.neuroevolution.seed_chain import SeedChain\n"
        "sys.stdout.buffer.write(SeedChain.load(Path(sys.argv[1])).weights().tobytes())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "elite.json")], capture_output=True, check=True
    )
    assert found.stdout == chain.weights().tobytes()
    assert SeedChain.load(tmp_path / "elite.json") == chain


def test_the_size_of_a_file_grows_with_generations_and_not_with_weights(tmp_path):
    sizes = []
    for generations in (0, 10, 110):
        long_chain(generations).save(tmp_path / "a.json")
        sizes.append((tmp_path / "a.json").stat().st_size)
    for before, after in pairwise(sizes):
        assert after > before
    assert (sizes[2] - sizes[1]) / 100 < 40  # bytes a generation
    wide = SeedChain((1000, 1000, 10), 5)
    wide.save(tmp_path / "wide.json")
    assert (tmp_path / "wide.json").stat().st_size < sizes[0] + 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "other weights than those it was written with, by NumPy"),
        ({"seed": 6}, "other weights"),
        ({"format": 2}, "no chain of seeds"),
        ({"sizes": [11]}, "no chain of seeds"),
        ({"sizes": [10**6, 10**6]}, "no chain of seeds"),
        ({"steps": [[1]]}, "no chain of seeds"),
        ({"steps": [[1, 1e999]]}, "no chain of seeds"),
    ],
)
def test_damaged_files_are_refused(change, message, tmp_path):
    file = tmp_path / "a.json"
    SeedChain(SIZES, 5).save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(RunError, match=message):
        SeedChain.load(file)


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(RunError, match="no chain of seeds"):
        SeedChain.load(tmp_path / "none.json")
    (tmp_path / "a.json").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(RunError, match="no chain of seeds"):
        SeedChain.load(tmp_path / "a.json")
    with pytest.raises(UsageError, match="a chain needs"):
        SeedChain(SIZES, -1)


def test_networks_side_by_side_compute_as_each_alone():
    generator = np.random.default_rng(0)
    sizes, count = (5, 7, 6, 3), 4
    weights = generator.standard_normal((count, parameters_of(sizes)))
    inputs = generator.standard_normal((count, 9, 5))
    found = forward(sizes, weights, inputs)
    for row in range(count):
        values, start = inputs[row], 0
        for number, (before, after) in enumerate(pairwise(sizes)):
            matrix = weights[row, start : start + before * after].reshape(before, after)
            start += before * after
            values = values @ matrix + weights[row, start : start + after]
            start += after
            values = np.tanh(values) if number < 2 else values
        assert np.allclose(found[row], values, rtol=0, atol=1e-12)
