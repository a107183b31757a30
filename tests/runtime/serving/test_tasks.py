"""Exports of every task over HTTP: the answers of ``predict``, their settings and inputs."""

import base64
import importlib.util
import io
import json
import pickle
import pkgutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from handmade_exports import linear, write
from PIL import Image

from smallfry.cli import main
from smallfry_runtime import Runtime, decoders
from smallfry_runtime.__main__ import main as runtime_main
from smallfry_runtime.inputs import InputImage
from smallfry_runtime.manifest import Manifest
from smallfry_runtime.serving import server
from smallfry_runtime.serving.batching import Late
from smallfry_runtime.serving.limits import Limits
from smallfry_runtime.serving.server import KINDS, Service, serving

httpx = pytest.importorskip("httpx", reason="httpx is not installed, which gradio brings")
pytest.importorskip("prometheus_client", reason="the serve extra is not installed")


class Case(NamedTuple):
    """An export: shapes of its input and outputs, and settings of its decoder."""

    shape: tuple[int, int, int]
    outputs: dict[str, tuple[int, ...]]
    classes: tuple[str, ...] = ("floor", "obstacle", "sky")
    values: str = "uint8"
    settings: dict[str, Any] | None = None
    thresholds: tuple[float, ...] = ()


def logits(*shape):
    return {"logits": shape}


CODES = {"in_roi": (1, 8), "x": (3, 8), "y": (3, 8), "points": (8, 3)}
MAPS = {"refined16": (1, 2), "semantics16": (3, 1, 2)}
CAMERA = {"focal": 4.0, "cx": 2.5, "cy": 1.5, "height": 1.0, "pitch": 15}
CASES = {
    "classification": Case((1, 4, 6), logits(3), settings={"top_k": 2}),
    "several": Case((3, 4, 4), logits(3), settings={"top_k": 1}, thresholds=(0.1, 0.9, 0.5)),
    "eeg": Case((3, 1, 8), logits(3), values="float32"),
    "equivariant": Case((1, 4, 4), logits(3)),
    "graphs": Case((5, 2, 2), logits(3, 5)),
    "ocr": Case((1, 4, 8), logits(6, 4), ("", "a", "b", "ß"), settings={"beam": 10}),
    "operators": Case((2, 3, 3), logits(3, 3, 3), values="float32"),
    "places": Case((1, 4, 6), logits(3)),
    "pose": Case((3, 8, 8), CODES, settings={"camera": [9, 9, 4, 4.0], "crop": [0, 0, 8]}),
    "puzzle": Case((1, 4, 4), logits(16, 6), (" ", ".", *"1234")),
    "splats": Case((3, 1, 1), logits(3), values="float32"),
    "stereo": Case((6, 16, 32), MAPS, settings={"focal": 720, "baseline": 0.54}),
    "symbolic": Case((3, 4, 4), logits(3)),
    "uav-policy": Case((2, 4, 4), logits(3)),
    "uav-segmentation": Case((3, 4, 6), logits(3, 4, 6), settings={"mask": True, "camera": CAMERA}),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Exports of all cases, and of numbers too large for their sums."""
    made = {}
    huge = {"huge": CASES["eeg"], "huge-classes": CASES["classification"]}
    for name, case in {**CASES, **huge}.items():
        channels, *size = case.shape
        folder = tmp_path_factory.mktemp(name)
        manifest = Manifest(
            form="whole",
            precision="float32",
            model={"name": "made_by_hand"},
            classes=case.classes,
            image_size=tuple(size) if size[0] != size[1] else size[0],
            channels=channels,
            mean=(0.0,) * channels,
            std=(1e-3 if name in huge else 1.0,) * channels,
            thresholds=case.thresholds,
            task={"huge": "eeg"}.get(name, name if name in TASKS else "classification"),
            values=case.values,
            outputs=tuple(case.outputs),
        )
        scale = 1e38 if name in huge else 1.0
        model = linear(prod(case.shape), case.outputs, scale)
        made[name] = write(folder, manifest, model_onnx=model)
    return made


TASKS = [module.name.replace("_", "-") for module in pkgutil.iter_modules(decoders.__path__)]


@pytest.fixture(scope="module")
def clients(exports):
    """Start a server of an export when it is first asked for, and return a client of it."""
    with ExitStack() as stack:
        started = {}

        def client(name):
            if name not in started:
                runtime = Runtime(exports[name], threads=1)
                url = stack.enter_context(serving(runtime, limits=Limits(images=4)))
                started[name] = stack.enter_context(httpx.Client(base_url=url, timeout=60))
            return started[name]

        yield client


@pytest.fixture(scope="module")
def load_test():
    """The script of the load test."""
    file = Path(__file__).parents[3] / "benchmarks" / "serve.py"
    spec = importlib.util.spec_from_file_location("benchmark_serve", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(name: str, seed: int) -> bytes:
    """Draw an input of a case, as a file."""
    case, random = CASES[name], np.random.default_rng(seed)
    channels, height, width = case.shape
    stream = io.BytesIO()
    if name == "puzzle":
        grids = random.choice([*".1234"], (seed + 1, height, width))
        return "\n\n".join("\n".join(map("".join, grid)) for grid in grids).encode()
    if case.values == "float32":
        np.save(stream, random.normal(size=case.shape))
        return stream.getvalue()
    pixels = random.integers(0, 256, case.shape, np.uint8)
    if channels in (1, 3):
        Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)).save(
            stream, "PNG"
        )
    else:
        np.save(stream, pixels)
    return stream.getvalue()


def query(settings):
    return {name: json.dumps(value) for name, value in (settings or {}).items()}


def by_predict(export: Path, files: list[Path], settings, capsys) -> list[Any]:
    """Answers that ``smallfry predict`` prints."""
    options = ["--decoding", json.dumps(settings)] if settings else []
    if settings and "top_k" in settings:
        options = ["--top_k", str(settings["top_k"])]
    capsys.readouterr()
    assert main(["predict", str(export), *map(str, files), "--json", *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def by_runtime(arguments, capsys) -> tuple[int, list[Any]]:
    """Exit code and answers of the runtime's own command."""
    capsys.readouterr()
    code = runtime_main([str(each) for each in arguments])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_the_runtimes_command_answers_as_predict_whatever_the_task(name, exports, tmp_path, capsys):
    files = [tmp_path / f"{number}.file" for number in range(2)]
    for number, file in enumerate(files):
        file.write_bytes(drawn(name, number))
    settings = CASES[name].settings
    words = ["--decoding", json.dumps(settings)] if settings else []
    if settings and "top_k" in settings:
        words = ["--top_k", settings["top_k"]]
    code, found = by_runtime([exports[name], *files, *words], capsys)
    assert code == 0
    assert found == by_predict(exports[name], files, settings, capsys)
    assert len(found) == (3 if name == "puzzle" else 2)


def test_the_runtimes_command_reads_texts_from_files_globs_and_stdin(
    exports, tmp_path, monkeypatch, capsys
):
    (tmp_path / "a.txt").write_bytes(drawn("puzzle", 0))
    (tmp_path / "b.txt").write_text("1x..")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"1..." * 4)))
    inputs = [tmp_path / "*.txt", "-", tmp_path, tmp_path / "c.txt"]
    code, found = by_runtime([exports["puzzle"], *inputs], capsys)
    assert code == 1
    assert [each.get("file") for each in found[::2]] == [
        str(tmp_path / "a.txt"),
        "<standard input>",
        None,
    ]
    assert found[1]["error"].startswith(f"{tmp_path / 'b.txt'}: puzzle 1: 4 symbols, and the model")
    assert found[3]["error"] == f"{tmp_path}: a folder; name its texts, as {tmp_path}/*.txt"
    assert found[4]["error"] == f"{tmp_path / 'c.txt'}: there is no such file or folder"


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("classification", ["--decoding", '{"beam": 1}'], "decoding has no setting 'beam' here"),
        ("ocr", ["--top_k", "2"], "decoding has the settings beam and words, not 'top_k'"),
        ("ocr", ["--decoding", "beam"], "decoding is not JSON (.*): quote it, as '{\"beam\": 10}'"),
        ("ocr", ["--decoding", "[1]"], "decoding is an object of JSON, such as"),
        ("ocr", ["--decoding", '{"bean": 1}'], "bean"),
    ],
)
def test_the_runtimes_command_refuses_settings_of_another_task(
    name, words, message, exports, tmp_path, capsys
):
    (tmp_path / "a").write_bytes(drawn(name, 0))
    assert runtime_main([str(exports[name]), str(tmp_path / "a"), *words]) == 2
    before, _, after = message.partition("(.*)")
    said = capsys.readouterr().err
    assert before in said
    assert after in said


def test_the_time_of_decoding_inputs_counts_in_that_of_an_answer(exports, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: now[0]))
    service = Service(Runtime(exports["eeg"], threads=1), None, Limits(seconds=8))

    def read(seconds):
        now[0] += seconds
        yield InputImage("array", drawn("eeg", 0))

    try:
        assert len(service.predict(read(7.0))) == 1
        with pytest.raises(Late, match="no answer within 8 s"):
            service.predict(read(8.0))
        with pytest.raises(Late, match="no answer within 8 s"):
            service.predict(read(5.0), begin=now[0] - 4)
    finally:
        service.close()


@pytest.mark.parametrize("name", CASES)
def test_the_load_test_takes_every_task(name, exports, clients, load_test):
    runtime, settings = Runtime(exports[name], threads=1), CASES[name].settings or {}
    sent = load_test.inputs_of(runtime)[:2]
    expected = load_test.answers_of(runtime, sent, settings)
    for content, wanted in zip(sent, expected, strict=True):
        response = clients(name).post("/predict", content=content, params=query(settings))
        (found,) = response.json()["predictions"]
        assert load_test.is_same(found, wanted)


def test_answers_of_the_load_test_may_round_but_not_differ(load_test):
    right = {"image": "b", "p": [0.1, "x"]}
    assert load_test.is_same({"image": "a", "p": [0.1001, "x"]}, right)
    for other in ({"p": [0.2, "x"]}, {"p": [0.1, "y"]}, {"p": [0.1]}, {}):
        assert not load_test.is_same(other, right)


def test_no_decoder_is_left_out():
    assert {*TASKS} < {*CASES}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_predict_whatever_the_task(name, exports, clients, tmp_path, capsys):
    files = [tmp_path / f"{number}.file" for number in range(3)]
    for number, file in enumerate(files):
        file.write_bytes(drawn(name, number))
    forms = [("input", (str(file), file.read_bytes())) for file in files]
    for settings in {str(s): s for s in (CASES[name].settings, None)}.values():
        if name == "pose" and settings is None:
            continue  # which needs its camera
        response = clients(name).post("/predict", files=forms, params=query(settings))
        assert response.status_code == 200, response.text
        found = response.json()["predictions"]
        assert found == by_predict(exports[name], files, settings, capsys)
        assert len(found) == (6 if name == "puzzle" else 3)
        alone = clients(name).post(
            "/predict", content=files[0].read_bytes(), params=query(settings)
        )
        (answer,) = alone.json()["predictions"]
        assert {*answer} == {*found[0]}
        assert answer["file" if name == "puzzle" else "image"] in KINDS


def test_pictures_of_pairs_are_sent_two_by_two(exports, clients, tmp_path, capsys):
    random, files = np.random.default_rng(0), [tmp_path / f"{name}.png" for name in "ab"]
    for file in files:
        Image.fromarray(random.integers(0, 256, (10, 30, 3), np.uint8)).save(file)  # of 16 × 32
    forms = [("pair", (str(file), file.read_bytes())) for file in files]
    forms.insert(1, ("pair", ("array", drawn("stereo", 0))))
    array, pair = clients("stereo").post("/predict", files=forms).json()["predictions"]
    assert [pair] == by_predict(exports["stereo"], files, None, capsys)
    for answer, size in ((pair, (30, 10)), (array, (32, 16))):
        maps = base64.b64decode(answer["disparity_png16"])
        assert Image.open(io.BytesIO(maps)).size == size
    alone = clients("stereo").post("/predict", content=drawn("stereo", 0)).json()["predictions"]
    assert [{**array, "image": "pair"}] == alone
    refused = clients("stereo").post("/predict", files=forms[:1])
    assert refused.status_code == 400
    assert "a.png: a left view without its right one" in refused.json()["error"]


def test_puzzles_are_numbered_in_their_texts(clients):
    response = clients("puzzle").post("/predict", content=b"1..." * 4 + b"\n" + b"." * 16)
    answers = response.json()["predictions"]
    assert [(answer["file"], answer["puzzle"]) for answer in answers] == [("text", 1), ("text", 2)]
    assert all(len(row) == 4 for answer in answers for row in answer["answer"])


class Held(Runtime):
    """Runtime that waits before each batch until it may go on."""

    def outputs(self, threshold, pixels):
        batches.append(len(pixels))
        assert go.wait(60)
        return super().outputs(threshold, pixels)


batches: list[int] = []
go = threading.Event()


def together(export: Path, first: bytes, others: list[bytes]) -> list[Any]:
    """Send inputs that arrive while a first one is computed, and return their responses."""
    batches.clear()
    go.clear()
    with (
        serving(Held(export, threads=1)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(8) as pool,
    ):

        def send(content):
            return pool.submit(client.post, "/predict", content=content)

        try:
            calls = [send(first)]
            while not batches:
                time.sleep(0.001)
            for count, content in enumerate(others, 1):
                calls.append(send(content))
                while client.get("/health").json()["waiting_images"] < count:
                    time.sleep(0.001)
        finally:
            go.set()
        return [call.result(60) for call in calls]


def test_models_of_several_outputs_compute_simultaneous_requests_together(exports):
    inputs = [drawn("stereo", seed) for seed in range(4)]
    responses = together(exports["stereo"], inputs[0], inputs[1:])
    assert batches == [1, 3]
    runtime = Runtime(exports["stereo"], threads=1)
    for content, response in zip(inputs, responses, strict=True):
        (found,) = response.json()["predictions"]
        (wanted,) = runtime.decode([content])
        assert found["disparity"] == pytest.approx(wanted["disparity"], rel=1e-4, abs=1e-4)
        assert found["shares"] == wanted["shares"]
        assert found["labels_png"] == wanted["labels_png"]


def test_an_answer_that_is_no_number_fails_its_own_request_alone(exports):
    zeros = io.BytesIO()
    np.save(zeros, np.zeros((3, 1, 8), np.float32))
    small, large = zeros.getvalue(), io.BytesIO()
    np.save(large, np.full((3, 1, 8), 9, np.float32))
    first, second, third = together(exports["huge"], small, [large.getvalue(), small])
    assert batches == [1, 2]
    assert [each.status_code for each in (first, second, third)] == [200, 500, 200]
    assert "the model's answer is not a number" in second.json()["error"]
    (answer,) = third.json()["predictions"]
    assert answer["probabilities"] == pytest.approx(dict.fromkeys(answer["probabilities"], 1 / 3))


def test_classes_that_are_no_numbers_are_the_servers_failure(clients):
    response = clients("huge-classes").post("/predict", content=drawn("classification", 0))
    assert response.status_code == 500
    assert "image: the model's answer is not a number" in response.json()["error"]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("classification", {"beam": "3"}, "decoding has no setting 'beam' here: leave it out"),
        ("classification", {"top_k": "1e2"}, "top_k must be a whole number above 0, got 100.0"),
        ("eeg", {"top_k": "3"}, "decoding has no setting 'top_k' here"),
        ("ocr", {"top_k": "3"}, "decoding has the settings beam and words, not 'top_k'"),
        ("ocr", {"beam": "101"}, "beam is a whole number from 0 to 100, got 101"),
        ("ocr", {"beam": "ten"}, "beam is a whole number from 0 to 100, got 'ten'"),
        ("ocr", {"beam": "1" * 5000}, "beam is a whole number from 0 to 100"),
        ("ocr", {"beam": ["1", "2"]}, "the setting 'beam' is given twice"),
        ("ocr", {"words": r'["\ud800"]'}, "the word '?' has symbols unknown to the model"),
        ("ocr", {"words": "[" * 3000}, "words must be a list of texts"),
        ("pose", {}, "a pose needs the camera's intrinsics"),
        ("pose", {"camera": f"[{'1' * 400}, 1, 1, 1]"}, "a pose needs the camera's intrinsics"),
        ("stereo", {"focal": "1" * 400}, "focal, baseline and offset are numbers"),
        ("stereo", {"focal": "NaN"}, "focal, baseline and offset are numbers"),
        (
            "uav-segmentation",
            {"camera": json.dumps({**CAMERA, "focal": 10**400})},
            "camera.focal is a finite number",
        ),
    ],
)
def test_wrong_settings_are_refused_with_a_reason(name, settings, words, clients):
    response = clients(name).post("/predict", content=drawn(name, 0), params=settings)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]


class Loaded:
    """An object that leaves a trace when it is unpickled."""

    def __reduce__(self):
        return loaded.append, (1,)


loaded: list[int] = []
SHAPE = "expected an array of float32, 3×1×8, as numpy.save writes it"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("eeg", b"", "no array: send one as the body, or as a form with files"),
        ("eeg", drawn("classification", 0), f"array: can't be read (.*); {SHAPE}"),
        ("eeg", pickle.dumps(np.zeros((3, 1, 8))), f"array: can't be read (.*); {SHAPE}"),
        ("eeg", drawn("classification", 0), f"array: can't be read (not a file of NumPy); {SHAPE}"),
        ("eeg", drawn("splats", 0), f"array: is 3×1×1; {SHAPE}"),
        ("classification", drawn("eeg", 0), "image: not an image, or in an unsupported format"),
        ("puzzle", b"\xff", "text: 'utf-8' codec can't decode"),
        ("puzzle", b"1x..", "text: puzzle 1: 4 symbols, and the model takes 4×4 = 16"),
        ("puzzle", b"1x.." * 4, "text: puzzle 1: unknown symbol 'x'; expected . 1 2 3 4"),
        ("puzzle", b"\n".join([b"." * 16] * 5), "text: 5 puzzles, expected at most 4"),
    ],
)
def test_inputs_of_another_kind_are_refused(name, content, words, clients):
    response = clients(name).post("/predict", content=content)
    assert response.status_code == 400
    before, _, after = words.partition(" (.*)")
    assert before in response.json()["error"]
    assert after in response.json()["error"]


def test_no_pickle_is_read(clients):
    stream = io.BytesIO()
    np.save(stream, np.array([Loaded()], object), allow_pickle=True)
    response = clients("eeg").post("/predict", content=stream.getvalue())
    assert response.status_code == 400
    assert SHAPE in response.json()["error"]
    assert loaded == []


@pytest.mark.parametrize(
    ("name", "kind", "about", "words"),
    [
        ("eeg", "array", {"shape": [3, 1, 8], "values": "float32"}, "input.npy"),
        ("stereo", "pair", {"shape": [6, 16, 32], "values": "uint8"}, "-F pair=@left.png -F pair="),
        ("puzzle", "text", {"rows": 4, "columns": 4}, "POST a text"),
        ("ocr", "image", {"size": [4, 8], "channels": 1, "resize": "crop"}, "POST an image"),
    ],
)
def test_the_page_describes_what_a_model_takes(name, kind, about, words, clients):
    found = clients(name).get("/").json()
    assert found["task"] == name
    assert found["classes"] == list(CASES[name].classes)
    assert found[kind] == about
    assert words in found["help"]
    assert {*KINDS} & {*found} == {kind}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("classification", ["top_k"]),
        ("several", ["top_k"]),
        ("eeg", []),
        ("puzzle", []),
        ("ocr", ["beam", "words"]),
        ("pose", ["camera", "crop", "solver", "seed"]),
        ("uav-segmentation", ["camera", "mask"]),
    ],
)
def test_the_page_names_the_settings_of_a_request(name, settings, clients):
    assert clients(name).get("/").json()["settings"] == settings


@pytest.mark.parametrize("by", [main, runtime_main])
def test_inputs_with_an_answer_get_it_beside_one_without(by, exports, tmp_path, capsys):
    for name, value in (("a", 0), ("b", 9), ("c", 0)):
        np.save(tmp_path / f"{name}.npy", np.full((3, 1, 8), value, np.float32))
    files = [str(tmp_path / f"{name}.npy") for name in "abc"]
    words = ["predict", str(exports["huge"]), "--json"] if by is main else [str(exports["huge"])]
    assert by([*words, *files]) == 1
    printed = capsys.readouterr()
    answers = [json.loads(line) for line in printed.out.splitlines()]
    assert [each["image"] for each in answers if "state" in each] == [files[0], files[2]]
    assert f"{files[1]}: the model's answer is not a number" in printed.out + printed.err


def test_metrics_count_inputs_of_any_task(clients):
    client = clients("operators")
    before = client.get("/metrics").text
    files = [("input", (f"{n}.npy", drawn("operators", n))) for n in range(2)]
    assert client.post("/predict", files=files).status_code == 200
    after = client.get("/metrics").text

    def images(text):
        return float(text.split("smallfry_batch_images_sum ")[1].split()[0])

    assert images(after) - images(before) == 2
