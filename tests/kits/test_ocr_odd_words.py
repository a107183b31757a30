"""Words, fonts and folders of words that are odd: empty, unknown, of few strings, or cut."""

import csv
import json
import string
import zlib
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from smallfry.data import load_data
from smallfry.errors import DataError, UsageError
from smallfry.kits.ocr.fonts import draw_text, family, find_fonts, glyphs
from smallfry.kits.ocr.models import CompactCRNN
from smallfry.kits.ocr.pictures import confusions
from smallfry.kits.ocr.task import OCR, require_feasible
from smallfry.kits.ocr.words import WordSettings, draw_word
from smallfry_runtime.decoders.ocr import (
    beam,
    decode,
    edit_distance,
    greedy,
    log_likelihood,
    log_softmax,
    right,
)
from smallfry_runtime.errors import UsageError as RuntimeUsageError

CLASSES = ("", "a", "b", "c")


def random_logits(seed, *shape):
    return 2 * np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("", "the word '' has no symbols: leave it out"),
        ("abd", r"the word 'abd' has symbols .*: \['d'\]; leave it out"),
        ("a b", r"\[' '\]"),
        ("A", r"\['A'\]"),  # capitals are other symbols
        ("ä", r"\['ä'\]"),
    ],
)
def test_empty_words_and_unknown_characters_are_refused(word, words):
    with pytest.raises(RuntimeUsageError, match=words):
        decode(random_logits(0, 1, 5, 4), CLASSES, {"words": ["ab", word]})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beam": True}, "beam is a whole number from 0 to 100, got True"),
        ({"beam": 101}, "beam is a whole number from 0 to 100, got 101"),
        ({"beam": "5"}, "beam is a whole number from 0 to 100, got '5'"),
        ({"words": ["a", 1]}, "words must be a list of texts"),
        ({"words": None}, "words must be a list of texts"),
        ({"words": 3}, "words must be a list of texts"),
    ],
)
def test_settings_of_another_type_are_refused(settings, words):
    with pytest.raises(RuntimeUsageError, match=words):
        decode(random_logits(0, 1, 5, 4), CLASSES, settings)


def collapsed(path):
    merged = [s for i, s in enumerate(path) if i == 0 or s != path[i - 1]]
    return tuple(s for s in merged if s)


@pytest.mark.parametrize("seed", range(6))
def test_a_lexicon_gives_the_word_with_the_most_paths(seed):
    logits = random_logits(seed, 4, 4)
    logs = log_softmax(logits)
    totals = {}
    for path in product(range(4), repeat=4):
        text = collapsed(path)
        totals[text] = totals.get(text, 0.0) + np.exp(logs[range(4), path].sum())
    assert sum(totals.values()) == pytest.approx(1, abs=1e-12)
    words = ["a", "ab", "cab", "bb", "c"]
    spelled = {word: tuple(CLASSES.index(each) for each in word) for word in words}
    best = max(words, key=lambda word: totals[spelled[word]])
    (found,) = decode(logits[None], CLASSES, {"words": words})
    assert found["text"] == best
    assert found["confidence"] == pytest.approx(totals[spelled[best]], rel=1e-9)
    assert log_likelihood(logs, ()) == pytest.approx(np.log(totals[()]))


def test_words_far_from_the_greedy_text_are_left_out_unless_all_are():
    logits = np.full((9, 4), -9.0)
    logits[range(9), [1, 2, 1, 2, 1, 2, 1, 2, 1]] = 9
    (near,) = decode(logits[None], CLASSES, {"words": ["ababab", "c"]})
    assert near["text"] == "ababab"
    (far,) = decode(logits[None], CLASSES, {"words": ["c", "cc"]})
    assert far["text"] in ("c", "cc")
    assert 0 <= far["confidence"] < 1e-6


def test_words_that_no_step_can_hold_have_no_probability():
    (found,) = decode(random_logits(0, 1, 2, 4), CLASSES, {"words": ["aa", "abc"]})
    assert found["confidence"] == 0
    assert len(found["characters"]) == len(found["text"])
    (sure,) = decode(random_logits(0, 1, 2, 4), CLASSES, {"words": ["aa", "ab"]})
    assert sure["text"] == "ab"


@pytest.mark.parametrize("seed", range(4))
def test_a_beam_of_one_never_beats_a_wide_one(seed):
    logs = log_softmax(random_logits(seed, 6, 4))
    best = beam(logs, 10**6)
    assert best.log_probability == pytest.approx(log_likelihood(logs, best.symbols))
    for width in (1, 2, 5, 50):
        assert beam(logs, width).log_probability <= best.log_probability + 1e-12
    assert greedy(logs).log_probability <= log_likelihood(logs, greedy(logs).symbols) + 1e-12


def test_probabilities_forget_a_constant_and_the_type_of_numbers():
    logits = random_logits(1, 5, 4)
    assert log_softmax(logits + 500) == pytest.approx(log_softmax(logits))
    assert log_softmax(logits.astype(np.float16)).dtype == np.float64
    assert np.exp(log_softmax(np.array([[60000, -60000]], np.float16))).tolist() == [[1, 0]]


def test_no_images_are_no_texts():
    assert decode(np.zeros((0, 5, 4)), CLASSES) == []
    found = right(np.zeros((0, 5, 4)), np.zeros((0, 3), np.int64))
    assert found.dtype == np.bool_
    assert found.shape == (0,)


@pytest.mark.parametrize("seed", range(3))
def test_edit_distances_are_a_metric(seed):
    random = np.random.default_rng(seed)
    one, two, three = ("".join(random.choice(list("abc"), random.integers(0, 8))) for _ in range(3))
    assert edit_distance(one, one) == 0
    assert edit_distance(one, "") == len(one)
    assert edit_distance(one, two) == edit_distance(two, one)
    assert edit_distance(one, three) <= edit_distance(one, two) + edit_distance(two, three)
    assert edit_distance(one[::-1], two[::-1]) == edit_distance(one, two)


def test_pytorch_and_the_decoder_have_one_loss():
    logits = torch.from_numpy(random_logits(2, 3, 7, 4))
    labels = torch.tensor([[1, 1, 2], [3, 0, 0], [0, 0, 0]])
    losses = OCR().losses(logits, labels)
    for row, label, loss in zip(logits.numpy(), labels.tolist(), losses.tolist(), strict=True):
        wanted = -log_likelihood(log_softmax(row), [n for n in label if n])
        assert loss == pytest.approx(wanted, rel=1e-5)
    scores = OCR().metrics(logits, labels)
    found = [decode(logits.numpy()[i : i + 1], CLASSES)[0]["text"] for i in range(3)]
    texts = ["aab", "c", ""]
    edits = sum(edit_distance(f, t) for f, t in zip(found, texts, strict=True))
    assert scores["character_error"] == pytest.approx(edits / 4)
    assert scores["accuracy"] == sum(f == t for f, t in zip(found, texts, strict=True)) / 3
    task_right = OCR().right(logits, labels)
    assert task_right.tolist() == right(logits.numpy(), labels.numpy()).tolist()


def test_a_text_is_feasible_where_some_path_gives_it():
    every = {collapsed(path) for path in product(range(3), repeat=4)}
    for length in range(5):
        for text in product((1, 2), repeat=length):
            assert require_feasible([text], 4) == [text in every], text


def test_confusions_are_of_texts_of_the_right_length_alone():
    logits = np.full((2, 5, 4), -9.0)
    logits[0, range(5), [1, 0, 2, 0, 0]] = 9  # ab
    logits[1, range(5), [3, 0, 0, 0, 0]] = 9  # c
    labels = torch.tensor([[1, 3], [1, 2]])
    assert confusions(torch.from_numpy(logits), labels) == {(3, 2): 1}


@pytest.mark.parametrize("width", [8, 33, 34, 35, 130])
def test_compact_networks_round_their_steps_up(width):
    model = CompactCRNN((32, width), num_classes=5, widths=(4, 4, 4, 4, 4), context="conv").eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 32, width)).shape == (1, -(-width // 4), 5)


@pytest.mark.parametrize("alphabet", ["日本", "\ufffe\uffff", " 日"])
def test_characters_that_no_font_draws_are_refused_and_end(alphabet):
    with pytest.raises(UsageError, match=r"no train words of 2 to 8 characters of .* drawn"):
        load_data("ocr-words", options={"words": 10, "alphabet": alphabet})


def test_too_few_strings_for_both_splits_are_refused_and_end():
    letters = [c for c in string.ascii_lowercase if zlib.crc32(c.encode()) % 5 != 0][:3]
    options = {"words": 10, "alphabet": "".join(letters), "shortest": 1, "longest": 1}
    with pytest.raises(UsageError, match="no test words of 1 to 1 characters"):
        load_data("ocr-words", options=options)


@pytest.mark.parametrize("kind", ["train", "test"])
def test_a_character_that_a_font_lacks_is_in_none_of_its_words(kind):
    settings = WordSettings(alphabet="ab日", level="easy", longest=5)
    for number in range(6):
        pixels, text, file = draw_word(settings, kind, number)
        assert {*text} <= {"a", "b"}
        assert (zlib.crc32(text.encode()) % 5 == 0) == (kind == "test")
        assert pixels.dtype == np.uint8
        assert file in find_fonts()[kind == "test"]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_are_whole_numbers_from_0(seed):
    with pytest.raises(UsageError, match=rf"a seed is a whole number from 0 to .*, got {seed}"):
        draw_word(WordSettings(seed=seed), "train", 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alphabet": ""}, "two characters or more, each once"),
        ({"alphabet": "a"}, "two characters or more, each once"),
        ({"shortest": 5, "longest": 4}, "shortest is 1 to longest, got 5 and 4"),
        ({"fonts": "nowhere"}, "nowhere: its 0 fonts .* add families"),
        ({"seed": 1.5}, "data.options.seed must be of type int, got 1.5"),
    ],
)
def test_other_wrong_settings_are_refused(options, words):
    with pytest.raises((UsageError, DataError), match=words):
        load_data("ocr-words", options=options)


def test_glyphs_keep_their_order_and_leave_out_what_is_empty():
    file = find_fonts()[0][0]
    assert glyphs(file, "zaZ 9") == "zaZ9"
    assert glyphs(file, "") == ""
    assert family(file) == "DejaVu Sans"


@pytest.mark.parametrize("number", [0, 2, 7, 9])  # upright, slanted, and of other families
@pytest.mark.parametrize("text", ["i", ".", "fjW", "l1"])
def test_no_ink_of_a_text_is_cut_off(number, text):
    font = ImageFont.truetype(str(find_fonts()[0][number]), 24)
    large = Image.new("L", (200, 100))
    ImageDraw.Draw(large).text((50, 30), text, fill=255, font=font)
    ink = np.asarray(large)
    drawn = draw_text(font, text)
    assert drawn.sum(dtype=int) == ink.sum(dtype=int)
    rows, columns = (np.flatnonzero(ink.any(axis=axis)) for axis in (1, 0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert drawn.shape[0] >= height
    assert width <= drawn.shape[1] <= width + 6
    apart = draw_text(font, text, 3)
    assert apart.shape == (drawn.shape[0], drawn.shape[1] + 3 * (len(text) - 1))


def folder_of(place, content, name="labels.csv"):
    place.mkdir()
    (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for stem in "abc":
        Image.new("L", (40, 20), 200).save(place / f"{stem}.png")
    return place


def texts(data, split):
    return ["".join(data.classes[n] for n in row if n) for row in split.labels.tolist()]


def load(place, **settings):
    return load_data("ocr-folder", place, **{"validation": 0.0, "test": 0.0, **settings})


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("file;text\na.png;x,y\nb.png;z\n", ["x,y", "z"]),
        ("file\ttext\na\tx y\nb\tz\n", ["x y", "z"]),
        ('file,text\na.png,"say ""x"""\nb.png,"z,"\n', ['say "x"', "z,"]),
        ("\ufefffile,text\r\na.png,ä\r\nb.png,ß\r\n", ["ä", "ß"]),
        ("file,text\na.png, x \nb.png,\tz\n", ["x", "z"]),  # spaces around are no symbols
        ("text,file\n0,a.png\n00,b.png\n", ["0", "00"]),
    ],
)
def test_files_of_texts_are_read_in_all_their_forms(tmp_path, content, wanted):
    data = load(folder_of(tmp_path / "words", content))
    assert texts(data, data.train) == wanted
    assert data.classes == ("", *sorted({*"".join(wanted)}))


def test_numbers_of_json_are_texts_and_lists_are_not(tmp_path):
    rows = [{"file": "a.png", "text": 0}, {"file": "b.png", "text": 10}]
    place = folder_of(tmp_path / "words", "\n".join(map(json.dumps, rows)), "texts.jsonl")
    data = load(place, options={"labels": "texts.jsonl"})
    assert texts(data, data.train) == ["0", "10"]
    rows[1]["text"] = ["1", "0"]
    (place / "texts.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"entry 2: a cell holds several values .*; expected one"):
        load(place, options={"labels": "texts.json"})
    rows[1]["text"] = None
    (place / "texts.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="entry 2: has no text in the column 'text'"):
        load(place, options={"labels": "texts.json"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no images"),
        ("file,text\n", "holds no images"),
        (
            "file,text\na.png,  \n",
            "line 2: has no text in the column 'text': write it there",
        ),
        ("file,text\nnone.png,x\n", "line 2: no image 'none.png'"),
        ("file,text\n../a.png,x\n", "is outside"),
        ("file,text\na.png\n", "2 cells were expected"),
        ("file,text,word\na.png,x,y\n", "text and word could be it"),
        ("file,said\na.png,x\n", "none has a usual name"),
        (b"file,text\na.png,\xff\n", "can't be read as UTF-8 text"),
        ('file,text\na.png,"x\n', "not CSV"),
        (f"file,text\na.png,{'aa' * 11}\n", "its text is too long for images 128 pixels wide"),
    ],
)
def test_wrong_files_of_texts_are_refused(tmp_path, content, words):
    with pytest.raises((DataError, UsageError), match=words):
        load(folder_of(tmp_path / "words", content))


def test_a_wider_image_has_steps_for_a_longer_text(tmp_path):
    place = folder_of(tmp_path / "words", f"file,text\na.png,{'a' * 20}\n")
    assert load(place, image_size=(32, 160)).input_shape == (1, 32, 160)  # 20 and 19 between them
    with pytest.raises(DataError, match="images 152 pixels wide, which have 38 steps"):
        load(place, image_size=(32, 152))


@pytest.mark.parametrize(
    ("splits", "wanted"),
    [
        (("train", "train", "test"), [2, 0, 1]),
        (("", "val", "test"), [1, 1, 1]),
        (("train", "train", "train"), [1, 1, 1]),
    ],
)
def test_shares_are_held_out_where_the_file_has_no_such_split(tmp_path, splits, wanted):
    place = folder_of(tmp_path / "words", "")
    with (place / "labels.csv").open("w", newline="") as stream:
        rows = [(f"{stem}.png", stem, split) for stem, split in zip("abc", splits, strict=True)]
        csv.writer(stream).writerows([("file", "text", "split"), *rows])
    data = load(place, validation=0.34 if "test" not in splits else 0.0, test=0.34)
    assert [len(each) for each in (data.train, data.validation, data.test)] == wanted
