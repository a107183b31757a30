"""Whole runs: what they leave, what settings change, and how they fail."""

import json
import shutil
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from run_helpers import TINY, StopAt, all_metrics, metrics

import smallfry
from smallfry.costing import Cost
from smallfry.errors import (
    DataError,
    RunError,
    SmallfryWarning,
    Stopped,
    TrainingError,
    UsageError,
)
from smallfry.models.vitrm import Layer
from smallfry.training import progress
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import (
    AugmentConfig,
    DataConfig,
    EMAConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    TrainSettings,
    read_config,
)
from smallfry.training.default_settings import with_defaults
from smallfry.training.evaluation import predict
from smallfry.training.loop import Trainer
from smallfry.training.progress import (
    PlainReporter,
    QuietReporter,
    RichReporter,
    build_reporter,
)
from smallfry.training.run import load_run, require_classes
from smallfry.training.train import resume, train
from smallfry_runtime.files import with_digest

# What a run leaves


@pytest.mark.usefixtures("pictures_drawn")
def test_a_run_leaves_its_configuration_metrics_checkpoints_summary_and_pictures(config):
    summary = train(config)
    run = config.run
    assert read_config(run / "config.yaml") == with_defaults(config, 1295, 8)
    rows = metrics(run)
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    assert {"train_loss", "validation_accuracy", "validation_macro_f1", "learning_rate"} <= set(
        rows[0]
    )
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {p.name for p in (run / "pictures").iterdir()} == {
        "learning_curves.png",
        "confusion_matrix.png",
        "mistakes.png",
        "reliability.png",
        "recursion_trace.png",
    }
    for picture in (run / "pictures").iterdir():
        assert np.asarray(Image.open(picture)).std() > 5, picture
    assert not list(run.rglob(".smallfry-*"))


def test_tensorboard_holds_the_numbers_of_the_csv(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    rows = all_metrics(whole)
    for column in ("train_loss", "validation_accuracy", "learning_rate", "images_per_second"):
        logged = [event.value for event in events.Scalars(column.replace("_", "/", 1))]
        assert logged == pytest.approx([float(row[column]) for row in rows], rel=1e-6)


def test_the_summary_says_how_to_get_the_figure_again(config, whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["measured"]["select_on"] == "validation"
    assert summary["measured"]["seed"] == config.seed
    assert summary["data"]["fingerprint"]
    assert {"command", "commit", "device", "versions", "date"} <= set(summary["provenance"])


def test_the_summary_counts_the_seconds_of_the_processor(config):
    before = time.process_time()
    summary = train(config)
    assert 0 < summary["measured"]["cpu_seconds"] <= time.process_time() - before


def test_the_reported_accuracy_is_that_of_the_saved_best_weights(whole):
    summary = json.loads((whole / "summary.json").read_text())
    from smallfry.data import load_data
    from smallfry.training.evaluation import predict, score

    trained = load_run(whole)
    data = load_data("digits", limit=200)
    found = score(predict(trained.model, data.test, trained.normalize))
    assert found == pytest.approx(summary["measured"]["test"])


def test_references_are_fitted_on_the_same_split(variant):
    summary = train(variant(references=True, epochs=1))
    found = {r["name"]: r["test_accuracy"] for r in summary["measured"]["references"]}
    from sklearn.svm import SVC

    from smallfry.data import load_data

    data = load_data("digits", limit=200)
    machine = SVC().fit(data.train.images.flatten(1).numpy() / 255, data.train.labels)
    wanted = machine.score(data.test.images.flatten(1).numpy() / 255, data.test.labels)
    assert found["RBF support vector machine"] == pytest.approx(wanted, abs=0.003)
    assert set(found) == {"RBF support vector machine", "logistic regression"}


@pytest.mark.slow
def test_training_learns(variant):
    summary = train(
        variant(
            augment=AugmentConfig(),
            data=DataConfig(),
            model=ModelConfig(drop_rate=0.0),
            objective=ObjectiveConfig(),
            epochs=4,
            schedule=ScheduleConfig(warmup_epochs=1),
        )
    )
    assert summary["measured"]["test"]["accuracy"] > 0.8


# Settings that change what happens


def test_patience_ends_a_run_that_no_longer_improves(variant):
    still = OptimizerConfig(lr=1e-12)
    summary = train(variant(epochs=9, patience=2, optimizer=still, ema=EMAConfig(0.0)))
    assert summary["measured"]["epochs"] < 9
    assert summary["measured"]["epochs"] == summary["measured"]["best_epoch"] + 2
    assert resume(variant().run)["measured"]["epochs"] == summary["measured"]["epochs"]


@pytest.mark.parametrize(("width", "threads"), [(16, 1), (288, 2)])
def test_small_models_take_one_thread_and_larger_ones_what_there_is(
    variant, monkeypatch, width, threads
):
    def begun(_):
        raise TrainingError(f"{torch.get_num_threads()} threads")

    monkeypatch.setattr(Trainer, "fit", begun)
    torch.set_num_threads(2)
    sizes = {"embed_dim": width, "mlp_hidden_dim": 1000, "latent_steps": 3}
    model = ModelConfig(options={**TINY, **sizes})
    with pytest.raises(TrainingError, match=f"^{threads} threads"):
        train(variant(model=model, threads=None, data=DataConfig(limit=70)))


def test_selecting_on_the_test_split_is_possible_and_said(variant):
    summary = train(variant(select_on="test", data=DataConfig(limit=200, validation=0.0)))
    assert summary["measured"]["select_on"] == "test"
    best = max(float(row["test_accuracy"]) for row in metrics(variant().run))
    assert summary["measured"]["test"]["accuracy"] == pytest.approx(best)


def test_a_batch_is_left_once_the_model_says_it_has_finished(variant):
    train(variant(objective=ObjectiveConfig(supervision_steps=4, halt_threshold=0.0)))
    assert [float(row["supervision_steps"]) for row in metrics(variant().run)] == [1.0, 1.0]


def test_deep_supervision_takes_an_optimizer_step_for_each_recursion_step(variant):
    train(variant(objective=ObjectiveConfig(supervision_steps=3, halt_threshold=1.1)))
    trainer = load_checkpoint(variant().run / "last").trainer
    assert trainer["progress"]["updates"] == 3 * trainer["progress"]["step"]


@pytest.mark.usefixtures("pictures_drawn")
def test_a_model_of_timm_trains_with_cross_entropy(variant):
    small = ModelConfig("resnet10t", options={"stem_width": 8})
    summary = train(variant(model=small, objective=ObjectiveConfig(), epochs=1))
    assert summary["model"]["name"] == "resnet10t"
    assert not (variant().run / "pictures" / "recursion_trace.png").exists()
    assert "train_halting" not in metrics(variant().run)[0]


@pytest.mark.parametrize("supervised", ["deep_supervision", "cross_entropy"])
def test_mixed_precision_reaches_the_model(variant, monkeypatch, supervised):
    seen = []
    forward = Layer.forward

    def watched(layer, *arguments):
        if layer.training and torch.is_grad_enabled():
            seen.append(torch.is_autocast_enabled("cpu"))
        return forward(layer, *arguments)

    monkeypatch.setattr(Layer, "forward", watched)
    monkeypatch.setattr("smallfry.training.conclusion.cost", lambda *_: Cost(0, 0, 0, 0))
    train(variant(precision="bf16-mixed", epochs=1, objective=ObjectiveConfig(supervised)))
    assert len(seen) > 6
    assert all(seen)


# Failures


@pytest.mark.filterwarnings("ignore:You passed")
def test_half_precision_is_refused_where_another_would_take_its_place(variant):
    with pytest.raises(UsageError, match="16-mixed needs a GPU: take bf16-mixed"):
        train(variant(precision="16-mixed", device="cpu"))
    assert not variant().run.exists()


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(variant):
    wild = variant(
        optimizer=OptimizerConfig("sgd", lr=1e18, clip=None),
        objective=ObjectiveConfig(supervision_steps=1),
        checkpoint_seconds=0.0,
    )
    with pytest.raises(
        TrainingError, match=r"step 2 \(epoch 1\): the loss is .*the last good.*optimizer.lr"
    ):
        train(wild)
    kept = load_checkpoint(wild.run / "last")
    assert all(weight.isfinite().all() for weight in kept.weights.values())
    assert all(weight.isfinite().all() for weight in kept.trainer["weights"].values())


def test_weights_that_are_no_numbers_never_become_the_best(variant, monkeypatch):
    class Poison(QuietReporter):
        def __init__(self):
            self.steps = 0

        def step(self, loss, images_per_second):
            self.steps += 1
            if self.steps == 12:
                with torch.no_grad():
                    trainers[0].raw_model.y_init.fill_(float("nan"))

    trainers = []
    start = Trainer.__init__
    monkeypatch.setattr(
        Trainer, "__init__", lambda self, *given: trainers.append(self) or start(self, *given)
    )
    with pytest.raises(TrainingError, match=r"step 12 \(epoch 2\): a weight is not"):
        train(variant(), Poison())
    best = load_checkpoint(variant().run / "best")
    assert best.manifest["training"]["epoch"] == 1
    assert all(weight.isfinite().all() for weight in best.weights.values())


def test_answers_that_are_no_numbers_become_neither_the_best_nor_a_score(variant, monkeypatch):
    calls = []

    def spoiled(*given, **options):
        calls.append(given)
        said = predict(*given, **options)
        return said._replace(logits=said.logits / 0) if len(calls) == spoils else said

    for module in ("loop", "conclusion"):
        monkeypatch.setattr(f"smallfry.training.{module}.predict", spoiled)
    monkeypatch.setattr("smallfry.training.conclusion.cost", lambda *_: Cost(0, 0, 0, 0))
    spoils = 2  # the second epoch's
    with pytest.raises(TrainingError, match=r"\(epoch 2\): an answer to the validation images is"):
        train(variant())
    assert load_checkpoint(variant().run / "best").manifest["training"]["epoch"] == 1
    spoils = len(calls) + 2  # after the last epoch, of the test images
    with pytest.raises(TrainingError, match=r"best: on the test images, the model's answer is not"):
        resume(variant().run)
    assert not (variant().run / "summary.json").exists()


@pytest.mark.usefixtures("pictures_drawn")
def test_a_picture_that_can_not_be_drawn_does_not_cost_the_result(config, monkeypatch):
    def broken(*_):
        raise ValueError("no ink")

    monkeypatch.setattr("smallfry.report.curves.learning_curves", broken)
    with pytest.warns(SmallfryWarning, match="no ink"):
        train(config)
    assert (config.run / "summary.json").exists()


def test_no_test_images_are_told_before_the_training(variant):
    with pytest.raises(DataError, match="there are no test images"):
        train(variant(data=DataConfig(test=0.0)))
    assert not variant().run.exists()


def test_throughput_is_that_of_training_alone(variant, monkeypatch):
    """By a clock on which a batch takes a second, and an evaluation a thousand."""
    from smallfry.training import loop

    now, fit, predict = [0.0], loop.Trainer._fit_batch, loop.predict

    def passing(seconds, call):
        def work(*given):
            now[0] += seconds
            return call(*given)

        return work

    clock = {name: lambda: now[0] for name in ("monotonic", "process_time")}
    monkeypatch.setattr(loop, "time", SimpleNamespace(**clock))
    monkeypatch.setattr(loop.Trainer, "_fit_batch", passing(1.0, fit))
    monkeypatch.setattr(loop, "predict", passing(1000.0, predict))
    train(variant(epochs=3))
    assert [row["images_per_second"] for row in all_metrics(variant().run)] == ["32.0"] * 3


@pytest.mark.parametrize(
    ("jupyter", "widgets", "kind"),
    [(True, None, PlainReporter), (True, "there", RichReporter), (False, None, RichReporter)],
)
def test_a_notebook_without_widgets_has_lines_and_no_warnings(monkeypatch, jupyter, widgets, kind):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: jupyter)
    monkeypatch.setattr(progress, "find_spec", lambda name: widgets)
    assert type(build_reporter("rich")) is kind
    assert type(build_reporter("plain")) is PlainReporter


def test_two_runs_in_one_folder_are_refused(config):
    config.run.mkdir()
    with FileLock(config.run / ".lock"), pytest.raises(RunError, match="another process"):
        train(config)


def test_a_second_run_in_one_folder_is_refused(variant, whole):
    with pytest.raises(RunError, match=r"there is a run in this folder already.*--resume"):
        train(variant(run=whole))


def test_a_wrong_configuration_leaves_no_folder_behind(variant):
    wrong = {
        "unknown model 'vitrm_smal'; did you mean 'vitrm_small": {
            "model": ModelConfig("vitrm_smal")
        },
        "can't be built for images of 1×8×8: .*no_such_option": {
            "model": ModelConfig(options={"no_such_option": 1})
        },
        "does not divide": {"data": DataConfig(image_size=9)},
        "num_classes comes from the data": {"model": ModelConfig(options={"num_classes": 5})},
        "vgg11 can't be built for images of 1×8×8": {
            "model": ModelConfig("vgg11", options={"mlp_ratio": 0.01})
        },
        "selecsls42 can't recompute": {
            "model": ModelConfig("selecsls42", checkpoint_gradients=True)
        },
        "adahessian": {"optimizer": OptimizerConfig("adahessian")},
        "adamw can't be built": {"optimizer": OptimizerConfig(betas=(2.0, 0.9))},
        "unknown optimizer": {"optimizer": OptimizerConfig("adamm")},
        "device abacus": {"device": "abacus"},
        "precision 17": {"precision": "17"},
        "data.mean needs 1 values": {"data": DataConfig(mean=[0.1, 0.2], std=[1.0, 1.0])},
    }
    for message, change in wrong.items():
        with pytest.raises(UsageError, match=message):
            train(variant(**change))
    assert not variant().run.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"accumulate": 100}, "accumulate can't exceed"),
        ({"patience": 0}, "patience must be"),
    ],
)
def test_impossible_values_are_refused_when_they_are_given(arguments, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**arguments)


def test_resuming_on_changed_data_is_refused(variant, monkeypatch):
    with pytest.raises(Stopped):
        train(variant(), StopAt(2))
    text = (variant().run / "config.yaml").read_text()
    (variant().run / "config.yaml").write_text(text.replace("split_seed: 0", "split_seed: 5"))
    with pytest.raises(DataError, match="was trained on other data"):
        resume(variant().run)


def test_folders_that_are_no_runs_are_named(tmp_path):
    with pytest.raises(RunError, match="there is no such run folder"):
        resume(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"config.yaml is missing"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("epochz: 3\n")
    with pytest.raises(RunError, match="not a configuration of this version"):
        resume(tmp_path)


def resealed(manifest, text):
    manifest.write_text(json.dumps(with_digest(json.loads(text))))


def test_damaged_weights_and_foreign_manifests_are_refused(whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "damaged"))
    manifest = run / "best" / "manifest.json"
    before = manifest.read_text()
    resealed(manifest, before.replace('"embed_dim": 16', '"embed_dim": 32'))
    with pytest.raises(RunError, match="weights don't fit its model"):
        load_run(run)
    resealed(manifest, before.replace('"classes"', '"klasses"'))
    with pytest.raises(RunError, match="its manifest lacks 'classes'"):
        load_run(run)
    manifest.write_text(before)
    weights = run / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(RunError, match="damaged"):
        load_run(run)


def test_a_model_is_not_evaluated_on_other_classes(whole):
    trained = load_run(whole)
    require_classes(trained, trained.classes, "here")
    with pytest.raises(DataError, match=r"has 10 classes \(0, 1, 2, 3, …\), there has 2"):
        require_classes(trained, ("cat", "dog"), "there")


def test_the_public_function_takes_settings_by_their_names(tmp_path):
    model = {"name": "vitrm_micro_patch4_8", "options": {"embed_dim": 16, "num_heads": 2}}
    data = {"limit": 100}
    quiet = {"epochs": 1, "references": False, "progress": "quiet"}
    summary = smallfry.train(data=data, model=model, run=tmp_path / "run", **quiet)
    assert summary["measured"]["epochs"] == 1
    assert smallfry.load(tmp_path / "run").model.embed_dim == 16
    with pytest.raises(UsageError, match="did you mean 'epochs'"):
        smallfry.train(epoch=1)
    with pytest.raises(UsageError, match="not both"):
        smallfry.train(TrainConfig(), epochs=1)
    assert [*TrainSettings.__annotations__] == [entry.name for entry in fields(TrainConfig)]
