"""Graphs that are not what their manifest says, and manifests of values that fit no graph."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pytest
from handmade_exports import graph, write
from onnx import TensorProto
from PIL import Image

from smallfry_runtime.early_exit import NEVER, Point
from smallfry_runtime.errors import DataError, ExportError, UsageError
from smallfry_runtime.inputs import InputImage
from smallfry_runtime.manifest import MANIFEST, Manifest
from smallfry_runtime.runtime import Runtime, sigmoid, softmax
from smallfry_runtime.serving.limits import Limits
from smallfry_runtime.serving.server import Service, serving

WHOLE = Manifest(
    form="whole",
    precision="float32",
    model={"name": "made_by_hand"},
    classes=("cat", "dog", "eel"),
    image_size=2,
    channels=1,
    mean=(0.5,),
    std=(0.25,),
)
WEIGHT = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
PIXELS = np.random.default_rng(1).integers(0, 256, (5, 1, 2, 2), np.uint8)
LOGITS = (PIXELS.reshape(5, 4) / 255 - 0.5) / 0.25 @ WEIGHT.astype(np.float64)


FLAT = ("Flatten", ["x"], "flat", {})
LINEAR = ("MatMul", ["flat", "w"], "y", {})
CLASSIFIER = graph(FLAT, LINEAR, w=WEIGHT)


def over_steps(count: int, answers: str = "MatMul") -> bytes:
    """A recursive model in one graph: (images, count, classes), and halting (images, count)."""
    return graph(
        FLAT,
        (answers, ["flat", "w"] if answers == "MatMul" else ["flat"], "once", {}),
        ("Unsqueeze", ["once", "one"], "row", {}),
        ("Expand", ["row", "shape"], "y", {}),
        ("ReduceMean", ["y"], "mean", {"axes": [2], "keepdims": 0}),
        ("Sigmoid", ["mean"], "h", {}),
        outputs=("y", "h"),
        w=WEIGHT,
        one=np.array([1]),
        shape=np.array([1, count, 1]),
    )


ANYTIME = {
    "embed.onnx": graph(
        FLAT, ("Mul", ["flat", "zero"], "s", {}), outputs=("flat", "s"), zero=np.float32(0)
    ),
    "step.onnx": graph(("Add", ["e", "s"], "y", {}), inputs=("e", "s")),
    "read_out.onnx": graph(
        ("MatMul", ["s", "w"], "y", {}),
        ("ReduceMean", ["s"], "mean", {"axes": [1], "keepdims": 0}),
        ("Sigmoid", ["mean"], "h", {}),
        inputs=("s",),
        outputs=("y", "h"),
        w=WEIGHT,
    ),
}


def anytime(folder: Path, changes=None, **parts: bytes) -> Runtime:
    manifest = replace(WHOLE, form="anytime", recursion_steps=3, **(changes or {}))
    graphs = {name.replace(".", "_"): data for name, data in ANYTIME.items()}
    return Runtime(write(folder, manifest, **{**graphs, **parts}), threads=1)


def test_probabilities_are_those_of_the_same_sums_in_float64(tmp_path):
    runtime = Runtime(write(tmp_path, WHOLE, model_onnx=CLASSIFIER), threads=1)
    wanted = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    for batch_size in (1, 2, 5, 64):
        found = runtime.predict(PIXELS, batch_size=batch_size)
        np.testing.assert_allclose(found.probabilities, wanted, atol=2e-5)
        assert found.halting is None
        assert found.steps is None
    assert runtime.predict(PIXELS[:0]).probabilities.shape == (0, 3)
    strided = np.repeat(PIXELS, 2, axis=0)[::2]
    assert np.array_equal(runtime.predict(strided).probabilities, found.probabilities)
    stream = BytesIO()
    Image.fromarray(PIXELS[0, 0]).save(stream, "PNG")
    for one in (stream.getvalue(), Image.fromarray(PIXELS[0, 0])):
        assert np.array_equal(runtime.predict([one]).probabilities, found.probabilities[:1])


def test_early_exit_is_a_loop_over_single_images(tmp_path):
    runtime = anytime(tmp_path)
    flat = (PIXELS.reshape(5, 4) / 255 - 0.5) / 0.25
    halting = 1 / (1 + np.exp(-np.arange(1, 4)[:, None] * flat.mean(axis=1)))  # (steps, images)
    for threshold in (0.0, 0.4, 0.55, 0.7, NEVER):
        found = runtime.predict(PIXELS, threshold=threshold, batch_size=2)
        passed = halting >= threshold
        passed[-1] = True
        last = passed.argmax(axis=0)
        assert found.steps.tolist() == (last + 1).tolist()
        np.testing.assert_allclose(found.halting, halting[last, np.arange(5)], atol=1e-5)
        logits = (last + 1)[:, None] * LOGITS
        np.testing.assert_allclose(found.probabilities, softmax(logits), atol=5e-5)
    assert {1, 3} <= {*runtime.predict(PIXELS, threshold=0.55).steps.tolist()}


def test_the_last_of_all_steps_counts_in_a_single_graph(tmp_path):
    manifest = replace(WHOLE, recursion_steps=4)
    runtime = Runtime(write(tmp_path, manifest, model_onnx=over_steps(4)), threads=1)
    found = runtime.predict(PIXELS)
    np.testing.assert_allclose(found.probabilities, softmax(LOGITS), atol=2e-5)
    assert found.steps.tolist() == [4] * 5
    assert runtime.predict(PIXELS[:0]).halting.shape == (0,)


CONTRADICTION = r"the graph '{}' contradicts the export's manifest \(.*; export the run again"
PUZZLE = {"task": "puzzle"}


@pytest.mark.parametrize("changes", [{}, PUZZLE, {"task": "eeg"}])
@pytest.mark.parametrize(
    ("steps", "model"),
    [
        (None, graph(FLAT, LINEAR, (*LINEAR[:2], "z", {}), outputs=("y", "z"), w=WEIGHT)),
        (None, graph(("ReduceMean", ["x"], "y", {"keepdims": 0}))),
        (None, graph(("Transpose", ["x"], "y", {"perm": [1, 0, 2, 3]}))),
        (None, graph(("Add", ["x", "w"], "y", {}), w=np.zeros((5, 7), np.float32))),
        (None, graph(FLAT, LINEAR, inputs=("x", "other"), w=WEIGHT)),
        (3, CLASSIFIER),
        (3, over_steps(2)),
        (2, graph(FLAT, LINEAR, ("Identity", ["y"], "h", {}), outputs=("y", "h"), w=WEIGHT)),
        (3, graph(FLAT, ("ReduceMean", ["x"], "h", {}), outputs=("flat", "h"))),
    ],
    ids=range(9),
)
def test_a_whole_graph_of_other_results_is_told_for_every_task(tmp_path, changes, steps, model):
    manifest = replace(WHOLE, recursion_steps=steps, **changes)
    runtime = Runtime(write(tmp_path, manifest, model_onnx=model), threads=1)
    with pytest.raises(ExportError, match=CONTRADICTION.format("model")):
        runtime.compute(PIXELS)


STATE = ("MatMul", ["s", "w"], "y", {})
HALT = ("Sigmoid", ["s"], "h", {})


@pytest.mark.parametrize("changes", [{}, PUZZLE])
@pytest.mark.parametrize(
    ("part", "content", "named"),
    [
        ("read_out", graph(STATE, inputs=("s",), w=WEIGHT), "read_out"),
        ("read_out", graph(STATE, HALT, inputs=("s",), outputs=("y", "h"), w=WEIGHT), "read_out"),
        (
            "read_out",
            graph(STATE, HALT, inputs=("s",), outputs=("y", "h", "h"), w=WEIGHT),
            "read_out",
        ),
        ("step", graph(("ReduceMean", ["s"], "y", {"keepdims": 0}), inputs=("e", "s")), "step"),
        ("step", graph(("Concat", ["e", "s"], "y", {"axis": 0}), inputs=("e", "s")), "step"),
        ("step", graph(("Add", ["e", "s"], "y", {}), inputs=("e", "s", "t")), "step"),
        ("embed", graph(FLAT, outputs=("flat",)), "step"),
        ("embed", graph(("ReduceMean", ["x"], "y", {"keepdims": 0})), "embed"),
    ],
    ids=range(8),
)
def test_parts_of_an_anytime_form_that_do_not_fit_are_told(tmp_path, changes, part, content, named):
    with pytest.raises(ExportError, match=CONTRADICTION.format(named)):
        anytime(tmp_path, changes, **{f"{part}_onnx": content}).compute(PIXELS)


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("puzzle", graph(FLAT, ("ReduceMean", ["flat"], "y", {"axes": [1], "keepdims": 0}))),
        ("eeg", graph(FLAT, ("Identity", ["flat"], "y", {}))),
        ("ocr", CLASSIFIER),
        ("pose", CLASSIFIER),
        ("stereo", CLASSIFIER),
        ("graphs", CLASSIFIER),
        ("operators", CLASSIFIER),
        ("splats", graph(FLAT, ("Identity", ["flat"], "y", {}))),
    ],
)
def test_answers_of_another_task_are_told(tmp_path, task, model):
    manifest = replace(WHOLE, task=task)
    runtime = Runtime(write(tmp_path, manifest, model_onnx=model), threads=1)
    settings = {"camera": [9, 9, 1, 1], "crop": [0, 0, 2]} if task == "pose" else None
    with pytest.raises(ExportError, match=f"the answers are not those of the task '{task}'"):
        runtime.decode(PIXELS, settings=settings)


def test_wishes_for_a_decoder_stay_errors_of_use(tmp_path):
    manifest = replace(WHOLE, task="symbolic")
    runtime = Runtime(write(tmp_path, manifest, model_onnx=CLASSIFIER), threads=1)
    with pytest.raises(UsageError, match="decoding has no setting 'beam' here"):
        runtime.decode(PIXELS, settings={"beam": 3})
    (answer, *_) = runtime.decode(PIXELS)
    assert answer["colour"] == WHOLE.classes[LOGITS[0].argmax()]
    with pytest.raises(UsageError, match="for symbolic, and its answers are not classes"):
        runtime.predict(PIXELS)
    unknown = replace(WHOLE, task="telepathy")
    runtime = Runtime(write(tmp_path, unknown, model_onnx=CLASSIFIER), threads=1)
    with pytest.raises(UsageError, match="no decoder for the task 'telepathy'; there are eeg,"):
        runtime.decode(PIXELS)


def test_a_server_refuses_tasks_without_a_decoder_before_it_listens(tmp_path):
    manifest = replace(WHOLE, task="telepathy")
    runtime = Runtime(write(tmp_path, manifest, model_onnx=CLASSIFIER), threads=1)
    words = (
        r"no decoder for the task 'telepathy', so its export can't be served: it takes images "
        r"\(size 2, channels 1, resize crop\), and Runtime.compute has its outputs"
    )
    with pytest.raises(UsageError, match=words):
        Service(runtime, None, Limits())
    with pytest.raises(UsageError, match=words), serving(runtime):
        pass


@pytest.mark.parametrize("threshold", [None, 0.0, 0.55])
def test_images_are_answered_one_by_one_as_all_together_with_early_exit(tmp_path, threshold):
    runtime = anytime(tmp_path, {"task": "eeg"})
    images = [InputImage(f"{n}.png", Image.fromarray(each[0])) for n, each in enumerate(PIXELS)]
    found = runtime.answer_each([*images, InputImage("no", b"")], threshold=threshold)
    *answers, failed = found
    assert [answer.value for answer in answers] == runtime.decode(PIXELS, threshold)
    assert [answer.name for answer in answers] == [image.name for image in images]
    assert failed.error.startswith("no: ")
    shares = [answer.value["probabilities"]["cat"] for answer in answers]
    steps = runtime.compute(PIXELS, threshold).steps[:, None]
    assert shares == pytest.approx(softmax(steps * LOGITS)[:, 0].tolist(), abs=5e-5)


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "3", None])
def test_the_number_of_named_classes_is_a_whole_one(tmp_path, wrong):
    runtime = Runtime(write(tmp_path, WHOLE, model_onnx=CLASSIFIER), threads=1)
    with pytest.raises(UsageError, match="top_k must be a whole number above 0, got"):
        runtime.answer_each([], {"top_k": wrong})
    with pytest.raises(UsageError, match="decoding has no setting 'beam' here"):
        runtime.answer_each([], {"top_k": 2, "beam": 3})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_limits_are_finite(value):
    with pytest.raises(UsageError, match=r"seconds must be (finite|above 0), got"):
        Limits(seconds=value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("thresholds", [(), (0.5, 0.5, 0.5)])
def test_a_score_that_is_no_number_is_no_answer_even_of_a_class_that_is_not_named(
    tmp_path, bad, thresholds
):
    bias = np.array([4, 0, 0], np.float32)
    if thresholds:
        bias[2] = np.nan if np.isinf(bad) else bad  # infinite scores of one class are certainties
    else:
        bias[2] = bad
    model = graph(FLAT, ("MatMul", ["flat", "w"], "m", {}), ("Add", ["m", "b"], "y", {}),
                  w=WEIGHT * 0, b=bias)  # fmt: skip
    manifest = replace(WHOLE, thresholds=thresholds)
    runtime = Runtime(write(tmp_path, manifest, model_onnx=model), threads=1)
    with pytest.raises(ExportError, match="the model's answer is not a number"):
        runtime.predict(PIXELS)
    if bad == -np.inf and not thresholds:
        return  # a share of 0
    image = InputImage("a.png", Image.fromarray(PIXELS[0, 0]))
    (answer,) = runtime.classify([image], top_k=1)
    assert answer.error.startswith("a.png: the model's answer is not a number")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"channels": 0, "mean": [], "std": []}, "channels"),
        ({"channels": False, "mean": [], "std": []}, "channels"),
        ({"classes": "cat"}, "TypeError: classes is no list"),
        ({"classes": {"cat": 1}}, "TypeError: classes is no list"),
        ({"mean": "5"}, "TypeError: mean is no list"),
        ({"outputs": "logits"}, "TypeError: outputs is no list"),
        ({"outputs": ["a", "b"]}, "outputs"),
        ({"outputs": ["a", "b"], "task": "pose", "recursion_steps": 3}, "outputs"),
        ({"thresholds": None}, "TypeError: thresholds is no list"),
        ({"thresholds": [0.5]}, "thresholds"),
        ({"thresholds": [0.5, float("nan"), 1]}, "thresholds"),
        ({"thresholds": [0.5, 10**400, 1]}, "a number of 401 digits"),
        ({"std": [float("inf")]}, "mean and std"),
        ({"mean": [None]}, "mean and std"),
        ({"storage": []}, "TypeError"),
        ({"storage": "hidden"}, "storage 'hidden'"),
        ({"engine": "../onnx"}, "engine"),
        ({"form": {}}, "TypeError"),
        ({"image_size": {"height": 2}}, "image_size"),
        ({"image_size": [2, True]}, "image_size"),
        ({"submodels": [{"name": "a", "place": "../x", "ms": 1, "accuracy": 1, "macs": 1}]},
         r"TypeError: a sub-model is at '\.\./x'"),
        ({"submodels": [{"name": "a", "place": "1", "ms": 1, "accuracy": 1, "macs": 1}]},
         "no hash of submodels/1/manifest.json"),
        ({"submodels": [{"name": "a", "place": "1", "ms": -1, "accuracy": 1, "macs": 1}]},
         "TypeError: a figure of a sub-model"),
        ({"submodels": [{"name": "a", "place": "1", "ms": 10**400, "accuracy": 1, "macs": 1}]},
         "a number of 401 digits"),
        ({"submodels": [{"place": "1"}]}, "TypeError"),
        ({"submodels": {}}, "TypeError: submodels is not a list"),
        ({"files": ["model.onnx"]}, "AttributeError"),
        ({"task": None}, "task None"),
    ],
)  # fmt: skip
def test_no_odd_value_of_a_manifest_is_another_error(tmp_path, content, problem):
    write(tmp_path, WHOLE, content=content, model_onnx=CLASSIFIER)
    with pytest.raises(ExportError, match=rf"damaged \({problem}.*export the run again"):
        Runtime(tmp_path)


def test_a_name_that_no_system_has_is_an_export_that_is_not_there():
    with pytest.raises(ExportError, match="aaa: no such export folder"):
        Runtime("a" * 5000)


def test_a_graph_that_is_no_onnx_or_points_outside_is_not_run(tmp_path):
    write(tmp_path, WHOLE, model_onnx=b"no graph")
    with pytest.raises(ExportError, match=r"model\.onnx: ONNX Runtime .* can't run it"):
        Runtime(tmp_path)
    model = onnx.load_from_string(CLASSIFIER)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=MANIFEST)
    write(tmp_path, WHOLE, model_onnx=model.SerializeToString())
    with pytest.raises(ExportError, match=r"model\.onnx: ONNX Runtime .* can't run it"):
        Runtime(tmp_path)


def test_wrong_arrays_are_told_with_what_is_expected(tmp_path):
    runtime = Runtime(write(tmp_path, WHOLE, model_onnx=CLASSIFIER), threads=1)
    for wrong in (PIXELS.astype(float), PIXELS[0], PIXELS[..., :1], np.array(3, np.uint8)):
        with pytest.raises(DataError, match=r"expected uint8 pixels of shape \(images, 1, 2, 2\)"):
            runtime.predict(wrong)
    with pytest.raises(UsageError, match="batch_size must be at least 1, got 0"):
        runtime.predict(PIXELS, batch_size=0)
    exits = (Point(0.5, 0.7, 1.0), Point(NEVER, 0.8, 3.0))
    timed = anytime(tmp_path, {"exits": exits})
    assert timed.exit_threshold(budget=1.5) == 0.5
    assert timed.exit_threshold(drop=0.05) == NEVER
    with pytest.raises(UsageError, match="exclude each other"):
        timed.predict(PIXELS, budget=2, drop=0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probabilities_of_huge_logits_do_not_overflow(dtype):
    logits = np.array([[1e4, -1e4, 0], [-3e38, 0, 3e38], [0, 0, 0]], dtype)
    with np.errstate(all="raise", under="ignore"):
        found = softmax(logits)
        assert found[:2].tolist() == [[1, 0, 0], [0, 0, 1]]
        assert found[2] == pytest.approx([1 / 3] * 3)
        assert sigmoid(logits).tolist() == [[1, 0, 0.5], [0, 0.5, 1], [0.5] * 3]
