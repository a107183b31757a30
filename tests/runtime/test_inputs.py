"""Images named by files, folders, patterns and standard input."""

import io

import pytest

from smallfry_runtime.artifacts import is_artifact
from smallfry_runtime.inputs import (
    STDIN,
    InputImage,
    find_images,
    in_order,
    is_hidden,
    is_image,
    unread_pictures,
)

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.jpg", "deep/c.png", "deep/er/d.PNG", "notes.txt", ".hidden.png"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(PNG)
    return tmp_path


def found(*inputs, stdin=b""):
    return list(find_images(inputs, io.BytesIO(stdin)))


def names(*inputs, stdin=b""):
    return [image.name for image in found(*inputs, stdin=stdin)]


def test_a_folder_gives_its_images_in_order_and_those_below(photos):
    expected = ["a.jpg", "b.png", "deep/c.png", "deep/er/d.PNG"]
    assert names(".") == expected
    assert names(str(photos)) == [str(photos / name) for name in expected]


def test_inputs_are_answered_in_the_order_given(photos):
    assert names("b.png", "a.jpg", "b.png") == ["b.png", "a.jpg", "b.png"]
    assert names("deep", "a.jpg") == ["deep/c.png", "deep/er/d.PNG", "a.jpg"]


def test_a_file_is_an_image_whatever_its_name(photos):
    """It was named by the user; whether it can be read shows later."""
    (image,) = found("notes.txt")
    assert (image.encoded.name, image.error) == ("notes.txt", None)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["b.png"]),
        ("*.[jp]*g", ["a.jpg", "b.png"]),
        ("**/*.png", ["b.png", "deep/c.png"]),
        ("d*p", ["deep/c.png", "deep/er/d.PNG"]),
        ("?.jpg", ["a.jpg"]),
    ],
)
def test_patterns_name_files_and_folders(photos, pattern, expected):
    assert names(pattern) == expected


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(photos):
    (photos / "a[1].png").write_bytes(PNG)
    (image,) = found("a[1].png")
    assert image.error is None
    assert image.encoded.name == "a[1].png"


def test_a_folder_whose_name_looks_like_a_pattern_is_that_folder(photos):
    (photos / "[a] ?" / "b[1]").mkdir(parents=True)
    (photos / "[a] ?" / "b[1]" / "x.png").write_bytes(PNG)
    assert names("[a] ?/b[1]/*.png") == ["[a] ?/b[1]/x.png"]
    assert names("[a] ?/*/x.png") == ["[a] ?/b[1]/x.png"]
    assert names(f"{photos}/[a] ?/**/*.png") == [f"{photos}/[a] ?/b[1]/x.png"]
    (image,) = found("[a] ?/b[1]/*.jpg")
    assert image.error == "[a] ?/b[1]/*.jpg: there is no such file or folder"


@pytest.mark.parametrize("missing", ["nowhere.png", "*.tiff", "no/where"])
def test_what_is_not_there_is_named(photos, missing):
    (image,) = found(missing)
    assert image.encoded is None
    assert image.error == f"{missing}: there is no such file or folder"


def test_an_empty_name_is_not_the_current_folder(photos):
    """As of a variable of the shell that is not set."""
    (image,) = found("")
    assert image == InputImage("", None, "an input has no name; expected a file or folder")


def test_an_empty_folder_is_named(photos):
    (photos / "empty").mkdir()
    assert found("empty") == [
        InputImage("empty", None, "empty: there are no images in this folder")
    ]


def test_pictures_that_are_not_read_are_named_one_by_one(photos):
    (photos / "phone").mkdir()
    (photos / "phone" / "x.heic").write_bytes(b"")
    (image,) = found("phone")
    assert image.error == "phone/x.heic: of a format that is not read; convert it"


def test_a_home_folder_is_understood(photos, monkeypatch):
    monkeypatch.setenv("HOME", str(photos))
    (image,) = found("~/b.png")
    assert image.encoded == photos / "b.png"


def test_standard_input_is_a_list_of_inputs(photos):
    assert names("-", stdin=b"b.png\n\n  a.jpg  \r\ndeep\n") == [
        "b.png", "a.jpg", "deep/c.png", "deep/er/d.PNG"
    ]  # fmt: skip


def test_standard_input_is_an_image_where_it_is_no_text(photos):
    (image,) = found("-", stdin=PNG)
    assert image == InputImage(STDIN, PNG)


@pytest.mark.parametrize("nothing", [b"", b"\n", b"  \n\t\n"])
def test_an_empty_standard_input_is_an_error(nothing):
    (image,) = found("-", stdin=nothing)
    assert image.error == f"{STDIN}: empty; expected an image, or one file per line"


def test_names_are_sorted_alike_however_accents_are_encoded():
    composed, apart = "\u00e9tude.png", "e\u0301tude.png"
    assert in_order(["z.png", composed, "a.png"]) == ["a.png", "z.png", composed]
    assert in_order(["z.png", apart, "a.png"]) == ["a.png", "z.png", apart]
    assert in_order([composed, apart]) == in_order([apart, composed])


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        (".git", True),
        ("@eaDir", True),
        ("Thumbs.db", True),
        ("$RECYCLE.BIN", True),
        ("__MACOSX", True),
        ("photos", False),
        ("thumbs", False),
    ],
)
def test_files_of_systems_are_hidden(name, hidden):
    assert is_hidden(name) is hidden


@pytest.mark.parametrize(
    ("name", "image"),
    [("a.png", True), ("a.JPEG", True), (".a.png", False), ("a.txt", False), ("png", False)],
)
def test_images_are_known_by_their_extension(name, image):
    assert is_image(name) is image


def test_pictures_without_an_extension_are_known_by_their_first_bytes(tmp_path):
    contents = {
        "png": PNG,
        "jpeg": b"\xff\xd8\xff\xe0",
        "gif": b"GIF89a",
        "tiff": b"MM\0*",
        "text": b"hello",
        "empty": b"",
        "short": b"\x89P",
        "document.txt": PNG,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = unread_pictures([tmp_path / name for name in [*contents, "absent"]])
    assert [file.name for file in found] == ["png", "jpeg", "gif", "tiff"]


@pytest.mark.parametrize(
    ("entries", "artifact"),
    [
        (["config.yaml", "metrics.csv"], True),
        (["config.yaml", "last"], True),
        (["config.yaml"], False),
        (["config.yaml", "cat", "dog"], False),
        (["manifest.json", "model.safetensors"], True),
        (["manifest.json", "model.packed"], True),
        (["manifest.json", "step.onnx"], True),
        (["manifest.json"], False),
        (["model.onnx"], False),
        (["config.json", "model.safetensors", "README.md"], True),
        (["report.html", "summary.json"], True),
        (["study.json"], True),
        (["fit.json", "plan.json"], True),
        (["search.json", "space.yaml"], True),
        (["evolution.json", "generations.jsonl"], True),
        (["analysis.json", "index.html"], True),
        (["analysis.json", "labels.json"], False),
        ([], False),
        (["a.png", "b.png"], False),
    ],
)
def test_folders_of_smallfry_are_known_by_their_files(entries, artifact):
    assert is_artifact(entries) is artifact
    assert is_artifact([*entries, "a.png"]) is artifact
