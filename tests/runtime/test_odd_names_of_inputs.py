"""Inputs of odd names, lists of odd texts, and images in bytes that could be a text."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smallfry_runtime.__main__ import main
from smallfry_runtime.images import decode
from smallfry_runtime.inputs import STDIN, find_images, list_folder
from smallfry_runtime.names import path_of


def found(*inputs, stdin=b""):
    return list(find_images(inputs, io.BytesIO(stdin)))


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(folder / name, "PNG")


ODD = ["~a.png", "~$draft.png", "a[1].png", "a b.png", "-.png", "ä.png", "a\nb.png", "*.png"]


@pytest.mark.parametrize("name", ODD)
def test_a_file_of_any_name_is_found_by_it_by_its_folder_and_by_a_pattern(
    tmp_path, monkeypatch, name
):
    pictures(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    for given in (name, "*.png", f"./{name}"):
        (image,) = found(given)
        assert image.error is None
        assert decode(image.encoded, "x", 2, 1).shape == (1, 2, 2)
    assert [image.name for image in found(".")] == [name]


@pytest.mark.parametrize("name", ["~nobody.png", "~no-such-user/a.png", "~~", "~"])
def test_a_tilde_of_no_user_is_a_name_like_others(name):
    if name == "~":
        assert path_of(name) == Path(os.path.expanduser("~"))
        return
    assert path_of(name) == Path(name)
    (image,) = found(name)
    assert image[:3] == (name, None, f"{name}: there is no such file or folder")


def test_patterns_below_the_home_folder_are_understood(tmp_path, monkeypatch):
    pictures(tmp_path, "a.png", "b.png", "deep/c.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [Path(image.name).name for image in found("~/*.png")] == ["a.png", "b.png"]
    assert [Path(image.name).name for image in found("~/**/c.png")] == ["c.png"]
    (image,) = found("~/a.png")
    assert (image.name, image.encoded) == ("~/a.png", tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "a\0b", "\ud800", "[" * 500])
def test_what_no_system_can_have_is_not_there(name):
    (image,) = found(name)
    assert image[:3] == (name, None, f"{name}: there is no such file or folder")


def test_a_list_may_begin_with_a_mark_and_end_its_lines_in_any_way(tmp_path, monkeypatch):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    monkeypatch.chdir(tmp_path)
    content = b"\xef\xbb\xbfa.png\r\n\r\n  b.png \rc.png"
    assert [image.name for image in found("-", stdin=content)] == ["a.png", "b.png", "c.png"]
    assert all(image.error is None for image in found("-", stdin=content))


def netpbm(kind: str, pixels, comment="") -> bytes:
    head = f"{kind}\n{comment}{pixels.shape[1]} {pixels.shape[0]}\n"
    head += "" if kind in ("P1", "P4") else "127\n"
    if kind in ("P4", "P5", "P6"):
        return head.encode() + pixels.tobytes()
    return (head + " ".join(map(str, pixels.ravel()))).encode()


GREY = np.arange(6, dtype=np.uint8).reshape(2, 3) * 20 + 9
COLOUR = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 5 + 33


@pytest.mark.parametrize("comment", ["", "# by hand\n", "# 1\n#\n"])
@pytest.mark.parametrize(
    ("kind", "pixels"), [("P2", GREY), ("P3", COLOUR), ("P5", GREY), ("P6", COLOUR)]
)
def test_a_picture_whose_bytes_are_those_of_a_text_is_a_picture(kind, pixels, comment):
    content = netpbm(kind, pixels, comment)
    content.decode()  # is a text, indeed
    (image,) = found("-", stdin=content)
    assert (image.name, image.encoded) == (STDIN, content)
    seen = decode(image.encoded, "x", (2, 3), 3).transpose(1, 2, 0).astype(float)
    wanted = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    assert np.abs(seen - wanted * (255 / 127)).max() <= 1


def test_a_dark_picture_is_one_as_a_bright_one_is():
    for value in (0, 200):
        stream = io.BytesIO()
        Image.new("RGB", (2, 2), (value,) * 3).save(stream, "PPM")
        assert [image.encoded for image in found("-", stdin=stream.getvalue())] == [
            stream.getvalue()
        ]


@pytest.mark.parametrize("text", [b"P3\nP4\n", b"P6", b"P1 photos\n", b"P7\n3\n3\n"])
def test_names_like_those_of_such_pictures_are_names(text):
    assert [image.encoded for image in found("-", stdin=text)] == [None] * len(text.splitlines())


def test_links_lead_into_no_folder_twice_and_to_none_around(tmp_path):
    pictures(tmp_path, "in/a.png", "in/deep/b.png", "in/deep/er/c.png", "out/d.png")
    (tmp_path / "in/deep/back").symlink_to(tmp_path / "in")
    (tmp_path / "in/deep/up").symlink_to(tmp_path)
    (tmp_path / "in/other").symlink_to(tmp_path / "out")
    (tmp_path / "in/again").symlink_to(tmp_path / "out")
    (tmp_path / "in/gone.png").symlink_to(tmp_path / "nothing.png")
    images = list_folder(tmp_path / "in").images
    assert [str(file.relative_to(tmp_path / "in")) for file in images] == [
        "a.png",
        "gone.png",
        "again/d.png",
        "deep/b.png",
        "deep/er/c.png",
    ]


def test_the_command_names_an_export_of_an_odd_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a" * 5000, "~nobody", "\x1b[2J"):
        assert main([name, "a.png"]) == 1
        said = capsys.readouterr().err
        assert said.startswith("smallfry-runtime: ")
        assert "no such export folder" in said
        assert "\x1b" not in said
