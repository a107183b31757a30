"""Generated words and folders of words: the texts, their splits, and what is refused."""

import csv
import zlib
from importlib import metadata
from pathlib import PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from smallfry.data import load_data
from smallfry.errors import DataError, UsageError
from smallfry.kits.ocr.fonts import draw_text, family, find_fonts, glyphs
from smallfry.kits.ocr.task import require_feasible
from smallfry.kits.ocr.words import WordSettings, _varied, draw_word

SMALL = {"words": 40, "seed": 3}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path / "cache"))
    yield
    find_fonts.cache_clear()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALLFRY_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_data("ocr-words", options=SMALL)


def texts(data, split):
    return ["".join(data.classes[n] for n in row if n) for row in split.labels.tolist()]


def test_words_have_their_splits_and_symbols(words):
    assert [len(s) for s in (words.train, words.validation, words.test)] == [29, 3, 8]
    assert words.input_shape == (1, 32, 128)
    assert words.resize == "letterbox"
    assert words.classes == ("", *"0123456789abcdefghijklmnopqrstuvwxyz")
    assert words.generated["family"] == "ocr-words"
    for split in (words.train, words.validation, words.test):
        for text in texts(words, split):
            assert 2 <= len(text) <= 8
    known = {*texts(words, words.train), *texts(words, words.validation)}
    assert not known & {*texts(words, words.test)}
    assert all(zlib.crc32(text.encode()) % 5 == 0 for text in texts(words, words.test))


def test_words_are_the_same_each_time(words):
    again = load_data("ocr-words", options=SMALL)
    assert again.fingerprint == words.fingerprint
    assert torch.equal(again.train.images, words.train.images)
    other = load_data("ocr-words", options={**SMALL, "seed": 4})
    assert not torch.equal(other.train.labels, words.train.labels)
    more = load_data("ocr-words", options={**SMALL, "words": 50}, test=0.2)  # of the same words
    assert texts(more, more.validation)[:3] == texts(words, words.validation)


def test_a_word_depends_on_its_number_alone():
    settings = WordSettings(**SMALL)
    pixels, text, _ = draw_word(settings, "train", 5)
    again, same, _ = draw_word(settings, "train", 5)
    assert text == same
    assert pixels.tobytes() == again.tobytes()
    assert draw_word(settings, "test", 5)[1] != text
    assert draw_word(settings, "train", 6)[1] != text


def test_test_words_are_in_fonts_that_training_has_none_of():
    settings = WordSettings(level="easy")
    train, held = find_fonts()
    seen = {
        split: {draw_word(settings, split, i)[2] for i in range(60)} for split in ("train", "test")
    }
    assert seen["train"] <= {*train}
    assert seen["test"] <= {*held}
    assert len(seen["train"]) > 6
    families = [
        {ImageFont.truetype(str(f), 20).getname()[0] for f in part} for part in (train, held)
    ]
    assert not families[0] & families[1]


def packaged(monkeypatch, folder, files, groups=("fonts_ttf",)):
    """Let a package have files, and entry points in groups."""

    package = SimpleNamespace(
        entry_points=[metadata.EntryPoint("one", "not_there:files", group) for group in groups],
        files=[PurePosixPath(name) for name in files],
        locate_file=lambda file: folder / file,
    )
    find_fonts.cache_clear()
    monkeypatch.setattr(metadata, "distributions", lambda: [package])


def test_fonts_of_packages_are_trained_on_but_for_held_out_families(monkeypatch, tmp_path):
    train, held = find_fonts()
    copied = {"own/sans.ttf": train[0], "own/again.TTF": train[0], "own/held.ttf": held[0]}
    (tmp_path / "own").mkdir()
    for name, file in copied.items():
        (tmp_path / name).write_bytes(file.read_bytes())
    packaged(monkeypatch, tmp_path, [*copied, "own/__init__.py"])
    found = find_fonts("packages")
    assert found[1] == held
    assert [each.name for each in found[0][len(train) :]] == ["again.TTF"]  # a face once
    assert family(found[0][-1]) == "DejaVu Sans"


@pytest.mark.parametrize("groups", [(), ("console_scripts",)])
def test_without_packages_of_fonts_a_message_names_what_to_install(monkeypatch, tmp_path, groups):
    packaged(monkeypatch, tmp_path, ["own/sans.ttf"], groups)
    with pytest.raises(DataError, match=r"no package of fonts is installed: pip install smallfry"):
        find_fonts("packages")


def test_the_fonts_of_packages_are_part_of_what_the_data_is(monkeypatch, tmp_path):
    """Other packages draw other words: they are not taken from the cache."""
    train, _ = find_fonts()
    drawn = []
    for number in (0, 4):  # sans, serif
        (tmp_path / f"{number}.ttf").write_bytes(train[number].read_bytes())
        packaged(monkeypatch, tmp_path, [f"{number}.ttf"])
        data = load_data("ocr-words", options={**SMALL, "fonts": "packages"})
        drawn.append(data.train.images)
    assert not torch.equal(*drawn)


def test_families_of_many_faces_are_not_drawn_more_often():
    settings = WordSettings(level="easy")
    drawn = [family(draw_word(settings, "test", i)[2]) for i in range(400)]
    counts = {name: drawn.count(name) for name in set(drawn)}
    assert len(counts) == 5  # one family has one face, another four
    assert min(counts.values()) > 0.6 * max(counts.values())


def test_training_words_vary_more_than_those_of_tests():
    """One face and one text at a time: widths, strokes and slants differ in training."""
    font = ImageFont.truetype(str(find_fonts()[0][0]), 24)
    plain = draw_text(font, "abc")
    varied = [_varied(font, "abc", np.random.default_rng(i)) for i in range(200)]
    widths = np.array([each.shape[1] for each in varied]) / plain.shape[1]
    assert widths.min() < 0.75
    assert widths.max() > 1.25
    ink = np.array([each.sum() / each.shape[1] for each in varied]) / (plain.sum() / plain.shape[1])
    assert ink.min() < 0.8
    assert ink.max() > 1.2
    assert ink.min() > 0.3  # thin strokes do not vanish


def test_a_gap_moves_characters_apart():
    font = ImageFont.truetype(str(find_fonts()[0][0]), 24)
    plain, apart = draw_text(font, "nnn"), draw_text(font, "nnn", 5)
    assert apart.shape == (plain.shape[0], plain.shape[1] + 10)
    blank = (apart.max(axis=0) == 0).sum() - (plain.max(axis=0) == 0).sum()
    assert blank >= 8


def test_every_character_of_a_font_is_drawn():
    for file in (font for part in find_fonts() for font in part):
        known = glyphs(file, "0aZ\ue000\u4e2d")
        assert known.startswith("0aZ"), file
        assert "\u4e2d" not in known
        font = ImageFont.truetype(str(file), 24)
        assert len({draw_text(font, each).tobytes() for each in known}) == len(known)


@pytest.mark.parametrize("number", range(12))
def test_ink_differs_from_paper(number):
    pixels, *_ = draw_word(WordSettings(level="easy"), "train", number)
    assert int(np.ptp(pixels)) >= 0.3 * 255


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"words": 5}}, "words is 10 to"),
        ({"options": {"alphabet": "aa"}}, "two characters or more, each once"),
        ({"options": {"longest": 20}}, "longest 20 needs images 160 pixels wide, not 128"),
        ({"options": {"shortest": 0}}, "shortest is 1 to longest"),
        ({"options": {"level": "hard"}}, "level is full or easy, got 'hard'"),
        ({"options": {"letters": "ab"}}, "data.options has no 'letters'"),
        ({"root": "."}, "does not use data.root: see ocr-folder"),
        ({"channels": 3}, "has no data.channels"),
        ({"image_size": 64}, "images 32 pixels high, and any width: data.image_size 32 64"),
        ({"resize": "squash"}, "has no data.resize"),
    ],
)
def test_wrong_settings_of_words_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        load_data("ocr-words", **settings)


def test_a_folder_of_fonts_needs_two_sides(tmp_path):
    (tmp_path / "a.ttf").write_bytes(b"no font")
    with pytest.raises(DataError, match=r"a\.ttf: not a readable font"):
        find_fonts(str(tmp_path))
    (tmp_path / "a.ttf").write_bytes(find_fonts()[0][0].read_bytes())
    with pytest.raises(DataError, match=r"its 1 fonts .* add families"):
        find_fonts(str(tmp_path))
    for file in (*find_fonts()[0], *find_fonts()[1]):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    train, held = find_fonts(str(tmp_path))
    assert {f.name for f in train} & {f.name for f in held} == set()
    assert train
    assert held


def test_a_text_needs_a_step_for_each_symbol_and_between_equal_ones():
    assert require_feasible([[1, 2], [1, 1], [1, 1, 1], []], 3) == [True, True, False, True]
    assert require_feasible([[1, 1]], 2) == [False]


def folder_of(place, rows, header=("file", "text")):
    place.mkdir()
    with (place / "labels.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
    for number, (name, *_) in enumerate(rows):
        Image.new("L", (40 + number, 20), 255 - number).save(place / name)
    return place


def test_a_folder_of_words_is_read(tmp_path):
    rows = [
        (f"{i}.png", text) for i, text in enumerate(["Hi", "ho", "hiho", "Hoho", "i", "oo"] * 5)
    ]
    data = load_data("ocr-folder", folder_of(tmp_path / "words", rows), validation=0.2, test=0.2)
    assert data.classes == ("", "H", "h", "i", "o")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [19, 5, 6]
    assert data.input_shape == (1, 32, 128)
    every = {
        (int(image[0, 16, 64]), text)
        for split in (data.train, data.validation, data.test)
        for image, text in zip(split.images, texts(data, split), strict=True)
    }
    assert every == {(255 - i, text) for i, (_, text) in enumerate(rows)}
    assert data.locate("train", 0).endswith(".png")
    folded = load_data("ocr-folder", tmp_path / "words", options={"fold_case": True})
    assert folded.classes == ("", "h", "i", "o")


def test_the_columns_and_splits_of_a_folder(tmp_path):
    rows = [("a.png", "x", "train"), ("b.png", "xy", "test"), ("c.png", "y", "validation")]
    place = folder_of(tmp_path / "words", rows, ("image", "transcription", "split"))
    data = load_data("ocr-folder", place)
    assert [texts(data, s) for s in (data.train, data.validation, data.test)] == [
        ["x"],
        ["y"],
        ["xy"],
    ]
    assert load_data("ocr-folder", place, label="transcription").classes == data.classes


def test_symbols_are_those_of_a_model(tmp_path):
    rows = [(f"{i}.png", text) for i, text in enumerate(["ab", "ba", "b", "a"])]
    data = load_data("ocr-folder", folder_of(tmp_path / "words", rows), validation=0, test=0)
    wider = data.relabelled(("", "b", "x", "a"))
    assert wider.classes == ("", "b", "x", "a")
    assert texts(wider, wider.train) == texts(data, data.train)
    assert wider.train.labels.tolist()[0] == [3, 1]
    with pytest.raises(DataError, match=r"symbols unknown to the model \('?a"):
        data.relabelled(("", "b"))


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([("a.png", "")], {}, "has no text in the column 'text'"),
        ([("a.png", "a" * 40)], {}, "its text is too long for images 128 pixels wide, .* 32 steps"),
        ([("a.png", "a")], {"width": 4}, "data.options has no 'width'"),
        ([("a.png", "a")], {"labels": "texts.csv"}, "no such file of labels"),
    ],
)
def test_wrong_folders_of_words_are_refused(tmp_path, rows, options, words):
    with pytest.raises((DataError, UsageError), match=words):
        load_data("ocr-folder", folder_of(tmp_path / "words", rows), options=options)


def test_a_damaged_picture_and_a_missing_folder_are_refused(tmp_path):
    place = folder_of(tmp_path / "words", [("a.png", "a"), ("b.png", "b")])
    (place / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png.*remove it from the file of labels"):
        load_data("ocr-folder", place)
    with pytest.raises(UsageError, match=r"give data\.root"):
        load_data("ocr-folder")
