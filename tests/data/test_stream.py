"""Images stay in their shards, and come in an order that only the seed decides."""

import pickle
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import WRITERS, numbers, picture, write_parquet_shards, write_tar_shards

from smallfry.data import Split, dataset, load_data, shards, stream
from smallfry.data.shards import ShardReader, Shards
from smallfry.data.stream import ShardPixels, windows_of
from smallfry.errors import DataError, UsageError
from smallfry.training.augment import Augment
from smallfry.training.batches import TrainBatches, resident
from smallfry.training.config import AugmentConfig
from smallfry.training.loader import TrainLoader

NOTHING = AugmentConfig(crop_padding=0, flip=False, mixup=0.0, cutmix=0.0)


@pytest.fixture(params=["parquet", "tar"])
def folder(request, tmp_path):
    """120 training images, 9 to validate, 10 to test."""
    place, write = tmp_path / "shards", WRITERS[request.param]
    write(place, [50, 37, 33])
    write(place, [9], split="validation", first=200)
    write(place, [10], split="test", first=300)
    return place


def load(folder, **options):
    return load_data(str(folder), stream=True, **options)


def batches(data, seed=0, batch_size=16):
    augment = Augment(NOTHING, 8, len(data.classes), (0.0,), (1 / 255,), flip=False)
    return TrainBatches(data.train, augment, batch_size, seed)


# The order


def written(place, layout):
    """Parquet shards of arbitrary bytes, given the sizes of the row groups of each."""
    files, row = [], 0
    for number, groups in enumerate(layout):
        files.append(Path(place, f"{number}.parquet"))
        kind = pa.schema([("image", pa.struct([("bytes", pa.binary())]))])
        with pq.ParquetWriter(files[-1], kind) as writer:
            for size in groups:
                cells = [{"bytes": b"%d" % i} for i in range(row, row + size)]
                writer.write_table(pa.table({"image": cells}, kind), row_group_size=size)
                row += size
    return files


def indexed(layout, files=(), weight=100):
    sizes = [size for groups in layout for size in groups]
    heads = [0, *torch.tensor([len(groups) for groups in layout]).cumsum(0).tolist()]
    first = [0, *torch.tensor([sum(groups) for groups in layout]).cumsum(0).tolist()]
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    array = [torch.tensor(x, dtype=torch.int64).numpy() for x in (first, heads, starts)]
    weights = torch.tensor(sizes).mul(weight).numpy()
    return Shards(tuple(files), "image", *array, weights, torch.empty(0, 2).long().numpy(), "")


LAYOUTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4)
SEEDS = st.integers(0, 1000)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@given(LAYOUTS, st.integers(1, 30), SEEDS, st.data())
def test_an_order_holds_every_sample_once_and_keeps_windows_together(layout, window, seed, data):
    index = indexed(layout)
    chosen = data.draw(st.sets(st.integers(0, len(index) - 1), min_size=1))  # the rest is held out
    rows = torch.tensor(sorted(chosen))
    order = ShardPixels(index, 8, 1, window).order(rows, generator(seed))
    assert sorted(order.tolist()) == list(range(len(rows)))
    assert torch.equal(order, ShardPixels(index, 8, 1, window).order(rows, generator(seed)))
    blocks = index.blocks_of(rows[order].numpy()).tolist()
    first_seen = list(dict.fromkeys(blocks))
    last_seen = {block: place for place, block in enumerate(blocks)}
    sizes = [size for groups in layout for size in groups]
    for place, block in enumerate(blocks):  # what is open here: begun, and not yet at its end
        begun = first_seen[: first_seen.index(block) + 1]
        needed = {b for b in begun if last_seen[b] >= place}
        assert sum(sizes[b] for b in needed) <= max(window, *sizes)


@given(LAYOUTS, st.integers(1, 30), st.integers(1, 1000))
def test_windows_fill_up_but_hold_one_block_at_least(layout, window, weight):
    index = indexed(layout, weight=weight)
    sizes = [size for groups in layout for size in groups]
    blocks = torch.randperm(len(sizes)).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW_BYTES", 2000)
        windows = windows_of(index, blocks, window).tolist()
    parts = {
        w: [sizes[b] for b, of in zip(blocks, windows, strict=True) if of == w] for w in windows
    }
    assert windows == sorted(windows)
    assert set(windows) == set(range(len(parts)))
    for number, part in parts.items():
        assert len(part) == 1 or (sum(part) <= window and sum(part) * weight <= 2000)
        if number + 1 in parts:  # the next block did not fit
            more = sum(part) + parts[number + 1][0]
            assert more > window or more * weight > 2000


@settings(max_examples=25, deadline=None)
@given(LAYOUTS, st.integers(1, 30), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_any_number_of_processes_reads_the_same_and_none_holds_more_than_a_window(
    layout, window, batch_size, ranks, workers, seed
):
    with tempfile.TemporaryDirectory() as place:
        index = indexed(layout, written(place, layout))
        rows = torch.arange(len(index))
        order = ShardPixels(index, 8, 1, window).order(rows, generator(seed))
        steps = order.split(batch_size)
        largest = max(size for groups in layout for size in groups)
        readers = {(r, w): ShardReader(index, window) for r in range(ranks) for w in range(workers)}
        seen = []
        for step, batch in enumerate(steps):
            parts = {}
            for rank in range(ranks):  # every rank reads its share of each batch
                reader = readers[rank, step % workers]
                for place_in_batch in range(rank, len(batch), ranks):
                    row = rows[batch[place_in_batch : place_in_batch + 1]].numpy()
                    parts[place_in_batch] = int(reader.read(row)[0])
                assert reader.held[0] <= max(window, largest)
            seen += [parts[i] for i in range(len(batch))]
        assert seen == order.tolist()


@settings(max_examples=25, deadline=None)
@given(LAYOUTS, st.integers(1, 30), st.integers(1, 12), SEEDS)
def test_one_process_reads_every_row_group_once_an_epoch(layout, window, batch_size, seed):
    with tempfile.TemporaryDirectory() as place:
        index = indexed(layout, written(place, layout))
        pixels = ShardPixels(index, 8, 1, window)
        loads, load = Counter(), pixels.reader._load
        pixels.reader._load = lambda block: (loads.update([block]), load(block))[1]
        order = pixels.order(torch.arange(len(index)), generator(seed))
        for batch in order.split(batch_size):
            assert [int(cell) for cell in pixels.reader.read(batch.numpy())] == batch.tolist()
        assert set(loads.values()) == {1}
        assert len(loads) == len(index.weights)


def test_what_is_held_is_bounded_in_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "WINDOW_BYTES", 1000)
    layout = [[5] * 20]
    reader = ShardReader(indexed(layout, written(tmp_path, layout)), window=1000)
    for row in range(100):
        reader.read_one(row)
        assert reader.held[1] <= 1000
    assert reader.held == (10, 1000)


def test_another_epoch_has_another_order_and_a_window_mixes_blocks_from_everywhere():
    index = indexed([[10] * 50] * 4)
    pixels, rows = ShardPixels(index, 8, 1, 200), torch.arange(2000)
    first, second = (pixels.order(rows, generator(seed)) for seed in (0, 1))
    assert not torch.equal(first, second)
    blocks = index.blocks_of(first[:200].numpy())
    assert len(set(blocks.tolist())) == 20
    assert {int(block) // 50 for block in blocks} == {0, 1, 2, 3}  # all shards
    assert (torch.tensor(blocks[1:] == blocks[:-1])).float().mean() < 0.2  # and shuffled


# The data set


def test_streamed_data_is_what_it_would_be_in_memory(folder):
    data, memory = load(folder), load_data(str(folder), stream=False)
    assert isinstance(data.train.pixels, ShardPixels)
    assert isinstance(memory.train.pixels, torch.Tensor)
    assert (data.image_size, data.channels, data.classes) == (8, 1, memory.classes)
    for name in ("train", "validation", "test"):
        mine, theirs = getattr(data, name), getattr(memory, name)
        assert torch.equal(mine.labels, theirs.labels)
        assert torch.equal(mine.images, theirs.images)
    assert data.mean == pytest.approx(memory.mean)
    assert data.std == pytest.approx(memory.std)


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_held_out_of_training_is_the_same_as_in_memory(kind, tmp_path):
    WRITERS[kind](tmp_path / "s", [60, 60])
    data = load(tmp_path / "s", test=0.25, validation=0.2)
    memory = load_data(str(tmp_path / "s"), test=0.25, validation=0.2, stream=False)
    parts = [numbers(split.images) for split in (data.train, data.validation, data.test)]
    assert sorted(chain(*parts)) == list(range(120))
    assert [len(part) for part in parts] == [72, 18, 30]
    for mine, split in zip(parts, (memory.train, memory.validation, memory.test), strict=True):
        assert mine == numbers(split.images)


def test_not_more_than_enough_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MOST_HELD_OUT", 6)
    write_parquet_shards(tmp_path / "s", [120])
    data = load(tmp_path / "s")
    assert (len(data.validation), data.test_count, len(data.train)) == (6, 6, 108)


def test_an_epoch_shows_every_image_once_and_each_batch_is_a_function_of_seed_and_step(folder):
    made, again = batches(load(folder, window=40)), batches(load(folder, window=40))
    seen = []
    for step in range(made.steps_per_epoch):
        batch = made[step]
        assert [n % 3 for n in numbers(batch.inputs.round())] == batch.targets.labels.tolist()
        seen += numbers(batch.inputs.round())
    assert len(set(seen)) == len(seen) == 112
    assert max(seen) < 120
    for step in (9, 3, 20):  # another history
        assert torch.equal(made[step].inputs, again[step].inputs)
    assert not torch.equal(made[0].inputs, made[made.steps_per_epoch].inputs)
    assert not torch.equal(made[0].inputs, batches(load(folder), seed=1)[0].inputs)


def test_worker_processes_change_nothing_and_a_run_can_begin_anywhere(folder):
    made = batches(load(folder, window=40))
    plain = [made[step].inputs for step in range(3, 12)]
    parallel = TrainLoader(made, range(3, 12), workers=2, pin_memory=False)
    for mine, theirs in zip(plain, parallel, strict=True):
        assert torch.equal(mine, theirs.inputs)


def test_a_rank_that_reads_its_share_of_a_batch_reads_no_other_tar_members(tmp_path, monkeypatch):
    write_tar_shards(tmp_path / "s", [60])
    data = load(tmp_path / "s")
    rows = data.train.shuffled(generator(0))[:16]
    whole = data.train.take(rows).images
    asked = []
    read = ShardReader.read_in_parts
    monkeypatch.setattr(
        ShardReader, "read_in_parts", lambda self, r: (asked.append(len(r)), read(self, r))[1]
    )
    parts = [data.train.take(rows[rank::4]).images for rank in range(4)]
    assert asked == [4, 4, 4, 4]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


def test_rows_of_any_shape_index_the_pixels_of_a_split(folder):
    pixels = load(folder).train.pixels
    assert pixels[torch.tensor(5)].shape == (1, 8, 8)
    assert pixels[torch.tensor([[5, 6]])].shape == (1, 2, 1, 8, 8)
    assert pixels[torch.tensor([], dtype=torch.int64)].shape == (0, 1, 8, 8)


def test_threads_decode_as_one_does(folder, monkeypatch):
    train = load(folder).train
    alone = train.images
    monkeypatch.setattr(stream, "WORTH_THREADS", 0)
    assert torch.equal(train.images, alone)


def test_a_reader_travels_to_another_process_without_what_it_holds(tmp_path):
    layout = [[3, 3]]
    reader = ShardReader(indexed(layout, written(tmp_path, layout)), window=3)
    reader.read_one(4)
    copy = pickle.loads(pickle.dumps(reader))
    assert (reader.held[0], copy.held[0], copy.window) == (3, 0, 3)
    assert copy.read_one(4) == b"4"


def test_the_fingerprint_says_what_is_in_the_shards_and_not_where_they_are(tmp_path):
    for name in ("a", "b"):
        write_tar_shards(tmp_path / name, [40, 20])
    write_tar_shards(tmp_path / "c", [20, 40])
    prints = [load(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    assert load(tmp_path / "a", split_seed=1).fingerprint != prints[0]


def test_what_would_take_too_much_room_is_streamed_without_being_asked(tmp_path, monkeypatch):
    write_parquet_shards(tmp_path / "s", [40])
    assert isinstance(load_data(str(tmp_path / "s")).train.pixels, torch.Tensor)
    monkeypatch.setattr(dataset, "LARGEST_DECODED", 39 * 3 * 64 * 64)
    assert isinstance(load_data(str(tmp_path / "s")).train.pixels, ShardPixels)
    assert isinstance(load_data(str(tmp_path / "s"), image_size=8).train.pixels, torch.Tensor)
    assert isinstance(load_data(str(tmp_path / "s"), stream=False).train.pixels, torch.Tensor)


def test_some_images_of_all_classes_can_be_asked_for(folder):
    train = load(folder, limit=12).train
    assert torch.bincount(train.labels).tolist() == [4, 4, 4]


@pytest.mark.parametrize("name", ["photos", "digits"])
def test_only_shards_can_be_streamed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, label in enumerate(("cat", "dog")):
        place = tmp_path / "photos" / label
        place.mkdir(parents=True)
        (place / "1.png").write_bytes(picture(number))
    with pytest.raises(UsageError, match="stream needs a folder of parquet or tar files"):
        load_data(name, stream=True)


def test_a_window_holds_at_least_one_sample(folder):
    with pytest.raises(UsageError, match=r"data\.window must be at least 1, got 0"):
        load(folder, window=0)


def test_streamed_images_do_not_move_to_the_device(folder):
    train = load(folder).train
    assert resident(train, torch.device("cuda"), None) is train
    with pytest.raises(UsageError, match="leave one of them out"):
        resident(train, torch.device("cuda"), True)


def test_an_unreadable_image_is_named_by_workers_too_in_one_line(tmp_path):
    write_parquet_shards(tmp_path / "s", [30], group=10, spoilt=[7])
    data = load(tmp_path / "s", test=0.0, validation=0.0)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"00001\.parquet row 7: the image is damaged") as told:
            list(TrainLoader(batches(data), range(2), workers, pin_memory=False))
        assert len(str(told.value).splitlines()) == 1


def test_splits_in_memory_are_shuffled_as_ever():
    split = Split(torch.zeros(9, 1, 2, 2), torch.arange(9), torch.zeros(9).long())
    expected = torch.randperm(9, generator=generator(3))
    assert torch.equal(split.shuffled(generator(3)), expected)
