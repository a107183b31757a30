"""Methods of compression in a training run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from compress_methods import Freeze, Observe, Scaled, Shrink
from run_helpers import TINY, StopAt, assert_same_run, metrics
from safetensors.torch import load_file

import smallfry
from smallfry import compress
from smallfry.cli import main
from smallfry.errors import RunError, Stopped, UsageError
from smallfry.training import train as training
from smallfry.training.checkpoint import load_checkpoint, save_checkpoint
from smallfry.training.config import (
    EMAConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    read_config,
)
from smallfry.training.evaluation_data import load_like
from smallfry.training.method import Running, Setting
from smallfry.training.run import load_run
from smallfry.training.train import resume, train

ROUND = {"round_weights": {"bits": 8}}
TWO = [Observe(), Freeze(share=0.1)]
ALL = [*TWO, Shrink(), Scaled(), compress.Magnitude(0.3, divisible=1), ROUND]


@pytest.fixture(scope="module")
def rounded_once(whole, tmp_path_factory):
    """A run of an epoch that rounds at its end, which tests copy."""
    folder = tmp_path_factory.mktemp("rounded") / "run"
    train(replace(read_config(whole / "config.yaml"), run=folder, methods=[ROUND], epochs=1))
    return folder


@pytest.fixture
def rounded(rounded_once, tmp_path):
    return Path(shutil.copytree(rounded_once, tmp_path / "rounded"))


def states(run):
    trainer = load_checkpoint(run / "last").trainer
    return trainer["methods"], trainer["optimizer"]["state"]


def assert_equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    else:
        assert one == other


def assert_resumes(variant, tmp_path, step, **settings):
    train(variant(run=tmp_path / "whole", **settings))
    with pytest.raises(Stopped, match=f"after step {step} of 12"):
        train(variant(run=tmp_path / "parted", **settings), StopAt(step))
    resume(tmp_path / "parted")
    assert_same_run(tmp_path / "whole", tmp_path / "parted")
    assert_equal(states(tmp_path / "whole"), states(tmp_path / "parted"))
    manifests = [
        json.loads((tmp_path / run / "best" / "manifest.json").read_text())
        for run in ("whole", "parted")
    ]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize(
    "methods",
    [
        pytest.param(TWO, id="two", marks=pytest.mark.slow),
        pytest.param(ALL, id="all"),
        pytest.param([compress.LSQ(), Observe()], id="lsq"),
    ],
)
def test_a_run_that_is_stopped_in_mid_method_equals_an_undisturbed_one(
    variant, tmp_path, step, methods
):
    assert_resumes(variant, tmp_path, step, methods=methods)


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate": 3},
        pytest.param({"ema": EMAConfig(0.0)}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16-mixed"}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16-true"}, marks=pytest.mark.slow),
        {"optimizer": OptimizerConfig("kfac")},
        pytest.param(
            {"optimizer": OptimizerConfig("sgd"), "objective": ObjectiveConfig("cross_entropy")},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_methods_run_in_every_kind_of_run(variant, tmp_path, settings):
    assert_resumes(variant, tmp_path, 7, methods=ALL, **settings)


@pytest.mark.parametrize("step", [2, 10])
def test_binary_layers_resume_in_either_stage(variant, tmp_path, step):
    model = ModelConfig("resnet20_biper", options={"widths": [8, 16], "depth": 1})
    methods = [compress.BiPer(second_stage=0.5)]
    objective = ObjectiveConfig("cross_entropy")
    assert_resumes(variant, tmp_path, step, methods=methods, model=model, objective=objective)
    assert states(tmp_path / "whole")[0]["methods"] == [{"stage": 2}]


def test_a_method_that_only_observes_changes_nothing(variant, tmp_path, whole):
    observed = tmp_path / "observed"
    train(variant(run=observed, methods=[Observe()]))
    assert metrics(whole) == metrics(observed)
    first, second = (load_checkpoint(run / "last") for run in (whole, observed))
    assert_equal(first.weights, second.weights)
    assert_equal(first.trainer["weights"], second.trainer["weights"])
    steps = round(sum(6 * float(row["supervision_steps"]) for row in metrics(observed)))
    assert len(states(observed)[0]["methods"][0]["norms"]) == steps


def test_frozen_channels_keep_their_values(variant, tmp_path):
    train(variant(methods=[Freeze(share=0.5)]))
    trainer = load_checkpoint(variant().run / "last").trainer
    state = trainer["methods"]["methods"][0]
    assert sum(map(len, state["frozen"].values())) > 0
    for name, rows in state["frozen"].items():
        assert torch.equal(trainer["weights"][name][rows], state["first"][name])
        assert not torch.equal(trainer["weights"][name], load_run_first(name, variant))


def load_run_first(name, variant):
    torch.manual_seed(variant().seed)
    return smallfry.transforms.build(load_run(variant().run, "last").spec).state_dict()[name]


def test_a_method_is_given_data_and_rising_numbers_of_steps(variant):
    train(variant(methods=[Scaled()], objective=ObjectiveConfig(supervision_steps=3)))
    state = states(variant().run)[0]["methods"][0]
    assert state["calibrated"] == [64, 64, 64, 8]  # all 200 images
    assert state["steps"] == 2 * 6 * 3
    assert state["numbers"] == sorted(set(state["numbers"]))
    assert state["numbers"][-1] < state["steps"]
    assert {number // 3 for number in state["numbers"]} == set(range(12))


def test_the_best_checkpoint_is_finished_and_the_last_is_not(variant):
    summary = train(variant(methods=ALL))
    best, last = (load_checkpoint(variant().run / name) for name in ("best", "last"))
    assert [each["kind"] for each in best.manifest["model"]["transforms"]] == ["resize", "bits"]
    assert [next(iter(each)) for each in best.manifest["methods"]] == [
        *("observe", "freeze", "shrink", "scaled", "magnitude", "round_weights")
    ]
    assert "unfinished" not in best.manifest
    assert best.manifest["training"]["step"] == 12
    assert summary["measured"]["best_epoch"] == 2
    assert summary["methods"] == best.manifest["methods"] == last.manifest["unfinished"]
    assert "transforms" not in last.manifest["model"]
    model = load_run(variant().run).model
    assert summary["measured"]["parameters"] == sum(p.numel() for p in model.parameters()) + sum(
        b.numel() for n, b in model.named_buffers() if n.endswith("codes")
    )
    with pytest.raises(RunError, match=r"before the run's methods have finished.*--resume"):
        load_run(variant().run, "last")


def test_methods_that_act_once_give_what_compression_after_training_gives(variant, tmp_path, whole):
    methods = [compress.Magnitude(0.3, divisible=1), compress.RoundWeights(8)]
    train(variant(run=tmp_path / "small", methods=methods))
    trained = load_run(whole)
    data, *_ = load_like(trained, whole, split="train")
    expected, found = compress.apply(trained, methods, data), load_run(tmp_path / "small")
    assert found.spec == expected.spec
    assert found.manifest["methods"] == json.loads(json.dumps(expected.manifest["methods"]))
    assert_equal(found.model.state_dict(), expected.model.state_dict())
    position = [each.manifest["training"]["step"] for each in (trained, found)]
    assert position[0] == position[1]


@pytest.mark.parametrize("methods", [[ROUND], [Freeze(), ROUND]], ids=["once", "training"])
def test_a_longer_run_is_finished_once_more(variant, methods):
    train(variant(methods=methods, epochs=1))
    first = load_checkpoint(variant().run / "best")
    summary = resume(variant().run, changes={"epochs": 3})
    assert summary["measured"]["epochs"] == 3
    best = load_checkpoint(variant().run / "best")
    assert best.manifest["methods"] == first.manifest["methods"]
    assert "unfinished" not in best.manifest
    assert best.manifest["training"]["step"] == 6 * summary["measured"]["best_epoch"]


def test_a_run_that_was_killed_before_its_end_was_written_ends_on_resume(variant, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training, "conclude", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(variant(methods=ALL))
    before = load_checkpoint(variant().run / "best").weights
    resume(variant().run)
    assert_equal(load_checkpoint(variant().run / "best").weights, before)


def test_a_run_that_loses_patience_is_finished(variant):
    methods = [Freeze(), ROUND]
    still = OptimizerConfig("sgd", lr=1e-12)
    train(variant(methods=methods, epochs=9, patience=1, optimizer=still, ema=EMAConfig(0.0)))
    best = load_checkpoint(variant().run / "best").manifest
    assert best["training"]["step"] < 9 * 6
    assert [next(iter(each)) for each in best["methods"]] == ["freeze", "round_weights"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_penalty_counts_once_whatever_the_micro_batches(variant, tmp_path, optimizer):
    same = {
        "model": ModelConfig(options=TINY, drop_rate=0.0),
        "precision": "64-true",
        "epochs": 1,
        "methods": [Shrink(0.1)],
        "optimizer": OptimizerConfig(optimizer, lr=0.01),
    }
    for parts in (1, 3):
        train(variant(run=tmp_path / str(parts), accumulate=parts, **same))
    train(variant(run=tmp_path / "without", **{**same, "methods": []}))
    one, three = (load_file(tmp_path / n / "last" / "model.safetensors") for n in ("1", "3"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, three[name], atol=1e-8, rtol=1e-8)
    losses = [float(metrics(tmp_path / n)[0]["train_loss"]) for n in ("1", "3", "without")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] > losses[2] + 0.1


def test_the_gradient_of_a_penalty_is_added_scaled_and_the_penalty_returned_as_it_is():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    setting = Setting(smallfry.transforms.ModelSpec("unknown"), torch.zeros(1, 3))
    running = Running([Shrink(0.5), Observe()], model, setting)
    first, second = model[0].weight, model[1].weight
    first.grad = torch.ones_like(first)
    found = running.add_penalty(lambda term: 8 * term)
    squares = first.detach().square().sum() + second.detach().square().sum()
    assert found.item() == pytest.approx(0.5 * float(squares))
    assert not found.requires_grad
    torch.testing.assert_close(first.grad, 1 + 8 * first.detach())
    torch.testing.assert_close(second.grad, 8 * second.detach())
    assert model[0].bias.grad is None
    assert Running([Observe()], model, setting).add_penalty() is None
    first.requires_grad_(False)
    second.requires_grad_(False)
    assert running.add_penalty().item() == pytest.approx(found.item())


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["obsrve"], "no method 'obsrve'.*did you mean 'observe'"),
        ([{"freeze": {"shar": 0.1}}], "did you mean 'share'"),
        ([{"round_weights": {"bits": 1}}], "2 to 8"),
        ([3], "a method is NAME"),
    ],
)
def test_wrong_methods_are_refused_before_any_data_is_read(variant, monkeypatch, methods, message):
    monkeypatch.setattr(training, "load_training_data", lambda *_: pytest.fail("data was read"))
    with pytest.raises(UsageError, match=message):
        train(variant(methods=methods))
    assert not variant().run.exists()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["round_weights", "low_rank"], "no linear layer or convolution left"),
        ([{"round_weights": {"include": ["nothing"]}}], "no linear layer"),
        ([{"round_weights": {"include": ["head"]}}, {"low_rank": {"smallest": 1}}], "the order is"),
    ],
)
def test_methods_that_could_not_finish_are_refused_before_the_training(variant, methods, message):
    with pytest.raises(UsageError, match=message):
        train(variant(methods=methods))
    assert not variant().run.exists()


def test_methods_can_not_change_once_they_have_begun(variant, tmp_path):
    with pytest.raises(Stopped):
        train(variant(methods=[Freeze(share=0.1)]), StopAt(3))
    file = variant().run / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["methods"][0]["freeze"]["share"] = 0.2
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(RunError, match=r"methods .*0\.2.*began with .*0\.1"):
        resume(variant().run)


@pytest.mark.parametrize("methods", [3, [3], [[]], [{}], [[5]]])
def test_methods_that_a_stranger_has_written_are_refused(rounded, methods):
    file = rounded / "summary.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "methods": methods}))
    with pytest.raises(RunError, match="damaged"):
        resume(rounded)


def test_a_manifest_whose_methods_are_no_list_is_damaged(rounded):
    best = load_checkpoint(rounded / "best")
    kept = {k: v for k, v in best.manifest.items() if k not in ("files", "digest")}
    save_checkpoint(rounded / "best", {**kept, "methods": 3}, best.weights)
    with pytest.raises(RunError, match=r"manifest is damaged.*methods must be a list"):
        load_run(rounded)


def test_a_configuration_holds_methods_in_full(variant, tmp_path):
    config = TrainConfig(methods=(Observe(), "freeze", ROUND))
    assert config.methods == [{"observe": {"every": 1}}, "freeze", ROUND]
    train(variant(methods=[compress.RoundWeights(bits=6)]))
    written = read_config(variant().run / "config.yaml")
    assert written.methods == [{"round_weights": {"bits": 6, "include": ["*"], "exclude": []}}]


@pytest.fixture
def small(tmp_path, monkeypatch, capsys):
    """A run with methods by the command, and what it printed."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(
        "data: {limit: 100}\nepochs: 1\nreferences: false\nthreads: 1\nprogress: quiet\n"
        f"model: {{options: {json.dumps(TINY)}}}\n"
    )
    methods = "[{freeze: {share: 0.3}}, round_weights]"
    assert main(["train", "--config", "small.yaml", "--run", "run", "--methods", methods]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_command_trains_with_methods(small, capsys):
    assert "last epoch 1 of 1, finished by freeze, round_weights" in small
    assert main(["evaluate", "run", "--json"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 0
    assert "finished by freeze, round_weights" in " ".join(capsys.readouterr().out.split())
    assert main(["compress", "run", "--methods", "[round_weights]", "--to", "again"]) == 2


@pytest.mark.slow
def test_a_run_with_methods_is_exported_and_shared(small):
    assert main(["export", "run", "--to", "export"]) == 0
    assert main(["share", "run", "--to", "shared"]) == 0
    card = Path("shared/README.md").read_text()
    assert "best epoch chosen" not in card
    assert "freeze" in card
    for model in ("run", "shared"):
        trained = smallfry.load(model)
        assert [each.kind for each in trained.spec.transforms] == ["bits"]
        assert [next(iter(each)) for each in trained.manifest["methods"]] == [
            *("freeze", "round_weights")
        ]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("low_rank", {"keep": "0.5"}, "low_rank.keep must be a number, not '0.5'"),
        ("low_rank", {"smallest": 1.5}, "low_rank.smallest must be a whole number, not 1.5"),
        ("quantize", {"exclude": "head"}, "quantize.exclude must be a list, not 'head'"),
        ("quantize", {"per_call": 1}, "quantize.per_call must be True or False, not 1"),
        ("hesso", {"begin": float("nan")}, "hesso.begin is not a number"),
        ("hesso", {"of": "rows"}, "hesso.of must be one of"),
        ("sorted_net", {"widths": 0.5}, "sorted_net.widths must be a list, not 0.5"),
    ],
)
def test_settings_of_another_type_are_refused(name, settings, message):
    with pytest.raises(UsageError, match=message):
        compress.methods()[name](**settings)


def test_every_method_refuses_patterns_that_are_no_list():
    taken = [kind for kind in compress.methods().values() if hasattr(kind, "exclude")]
    assert len(taken) > 15
    for kind in taken:
        with pytest.raises(UsageError, match=r"exclude must be a list, not 'head'"):
            kind(exclude="head")
    assert compress.LowRank(include=["head"]).include == ("head",)
