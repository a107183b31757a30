"""Prune, factorise, quantise, save, load and export: one spec after another."""

import shutil
from pathlib import Path

import pytest
import torch
from compress_methods import Freeze, Observe
from torch import nn
from torch.nn import functional as F

from smallfry import compress, cost
from smallfry.cli import main
from smallfry.deploy.export import export
from smallfry.deploy.pretrained import load_trained, save_pretrained
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.training.augment import Normalize
from smallfry.training.evaluation_data import load_like
from smallfry.training.method import from_dict, register_method, to_dict
from smallfry.training.run import TrainedModel, load_run
from smallfry.transforms import ModelSpec, build
from smallfry_runtime import Runtime

pytest.importorskip("torch_pruning", reason="finding channels of convolutions needs Torch-Pruning")

RUN = Path(__file__).parents[1] / "fixtures" / "format_2" / "run"
THREE = [
    compress.Magnitude(sparsity=0.4, divisible=2),
    compress.LowRank(keep=0.6, exclude=("*head*", "*fc", "*classifier*")),
    compress.RoundWeights(bits=6),
]
VITRM = ModelSpec("vitrm_micro_patch4_8", {"num_classes": 4, "drop_rate": 0.0})
MODELS = {
    "vitrm_micro_patch4_8": ({"num_classes": 4}, 1, 8),
    "cct_2_3x2_32": ({"num_classes": 4}, 3, 32),
    "resnet18_cifar": ({"num_classes": 4}, 3, 32),
    "mobilenetv3_small_050": ({"num_classes": 4}, 3, 32),
}


def trained_like(name):
    """An untrained model, in the place of a trained one."""
    arguments, channels, size = MODELS[name]
    torch.manual_seed(0)
    spec = ModelSpec(name, arguments)
    sample = {"size": size, "channels": channels, "mean": [0.5] * channels, "std": [0.2] * channels}
    manifest = {
        "model": spec.to_dict(),
        "classes": [*"abcd"],
        "input": sample,
        "data": {"name": "none", "fingerprint": "none"},
    }
    normalize = Normalize(sample["mean"], sample["std"])
    return TrainedModel(build(spec), tuple("abcd"), size, channels, normalize, manifest)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")
@pytest.mark.parametrize("name", MODELS)
def test_pruned_factorised_quantised_and_exported(name, tmp_path):
    trained = trained_like(name)
    small = compress.apply(trained, THREE)
    kinds = [each.kind for each in small.spec.transforms]
    assert kinds == ["resize", "replace", "bits"]
    assert small.manifest["methods"] == [to_dict(each) for each in THREE]
    images = torch.rand(2, trained.channels, trained.image_size, trained.image_size)
    expected = small.model(images)
    again = build(small.spec, small.model.state_dict())
    assert torch.equal(again(images), expected)
    assert cost(small.model, images).parameters < cost(trained.model, images).parameters
    shared = load_trained(save_pretrained(small, tmp_path / "shared"))
    assert shared.spec.transforms == small.spec.transforms
    assert torch.equal(shared.model(images), expected)
    export(small, tmp_path / "export", form="whole")
    pixels = (images * 255).byte().numpy()
    with torch.no_grad():
        logits = small.model(small.normalize(torch.from_numpy(pixels)))
    given = torch.from_numpy(Runtime(tmp_path / "export").predict(pixels).probabilities)
    torch.testing.assert_close(given, logits.softmax(1), atol=1e-4, rtol=0)


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(RUN, tmp_path / "run")


@pytest.mark.slow
def test_a_compressed_run_is_a_run(run, tmp_path):
    trained = load_run(run)
    data, test, _ = load_like(trained, run)
    small = compress.apply(trained, [compress.RoundWeights(bits=8)], data)
    small.save(tmp_path / "small")
    again = load_trained(tmp_path / "small")
    images = small.normalize(test.images[:8])
    assert torch.equal(again.model(images), small.model(images))
    torch.testing.assert_close(again.model(images), trained.model(images), atol=0.2, rtol=0)
    assert again.manifest["methods"] == [{"round_weights": {
        "bits": 8, "include": ["*"], "exclude": []
    }}]  # fmt: skip
    sizes = [
        (folder / "best/model.safetensors").stat().st_size for folder in (tmp_path / "small", run)
    ]
    assert sizes[0] < 0.6 * sizes[1]
    export(tmp_path / "small", tmp_path / "export")


def test_a_compressed_model_is_shared_without_a_line_for_timm(run, tmp_path, capsys):
    compress.apply(load_run(run), [compress.RoundWeights()]).save(tmp_path / "small")
    for source, has_timm in ((run, True), (tmp_path / "small", False)):
        folder = tmp_path / f"shared_{source.name}"
        assert main(["share", str(source), "--to", str(folder)]) == 0
        card = (folder / "README.md").read_text()
        assert ("timm.create_model(" in capsys.readouterr().out) == has_timm
        assert ("timm.create_model(" in card) == has_timm
        assert ("smallfry.load(" in card) != has_timm


def test_channels_need_an_example():
    with pytest.raises(UsageError, match="pass example="):
        compress.apply_to_model(nn.Linear(2, 2), [compress.Magnitude()])


def test_methods_in_the_wrong_order_are_refused(run):
    methods = [compress.RoundWeights(include=("head",)), compress.LowRank(smallest=1)]
    with pytest.raises(UsageError, match=r"comes before .*: the order is"):
        compress.apply(load_run(run), methods)


def test_the_model_that_is_compressed_stays(run):
    trained = load_run(run)
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    compress.apply(trained, [compress.RoundWeights(bits=2)])
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_method_that_trains_needs_steps(run):
    with pytest.raises(UsageError, match="'observe' acts during training"):
        compress.apply(load_run(run), [Observe()])


def test_all_methods_are_found_by_their_names():
    assert {"low_rank", "magnitude", "round_weights"} <= set(compress.methods())
    assert compress.LowRank.__name__ in dir(compress)
    for settings in THREE:
        assert from_dict(to_dict(settings)) == settings
    assert from_dict("low_rank") == compress.LowRank()
    with pytest.raises(AttributeError, match="Lowrank"):
        _ = compress.Lowrank


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"low_rnk": {}}, "did you mean 'low_rank'"),
        ({"low_rank": {"kep": 1}}, "did you mean 'keep'"),
        ({"low_rank": {"keep": 2}}, "between 0 and 1"),
        ({"low_rank": 3}, "expected settings"),
        ({"low_rank": {}, "magnitude": {}}, "a method is NAME"),
        ({"round_weights": {"bits": 1}}, "2 to 8"),
        ({"low_rank": {"include": ["nothing.*"]}}, None),
    ],
)
def test_settings_that_can_not_be_meant_are_refused(content, message, run):
    if message is None:
        with pytest.raises(UsageError, match="no linear layer"):
            compress.apply(load_run(run), [from_dict(content)])
    else:
        with pytest.raises(UsageError, match=message):
            from_dict(content)


def test_only_frozen_dataclasses_are_settings():
    with pytest.raises(UsageError, match="frozen dataclass"):
        register_method(type("Loose", (), {"name": "loose"}))


# In a loop of one's own


def steps(model, session, optimizer, count, seed=0):
    torch.manual_seed(seed)
    inputs, labels = torch.randn(16, 1, 8, 8), torch.randint(4, (16,))
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels) + session.penalty()
        loss.backward()
        optimizer.step()


def begin(methods, spec=None):
    spec = spec or VITRM
    torch.manual_seed(0)
    model = build(spec)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    session = compress.Session(model, methods, torch.zeros(2, 1, 8, 8), 6, spec=spec)
    session.attach(optimizer)
    return model, session, optimizer


def test_a_session_continues_from_its_state_to_the_bit():
    methods = [Observe(every=2), Freeze(share=0.3)]
    model, session, optimizer = begin(methods)
    first = {n: t.clone() for n, t in model.state_dict().items()}
    steps(model, session, optimizer, 6)
    halfway, half, other = begin(methods)
    steps(halfway, half, other, 3)
    saved = [half.state_dict(), other.state_dict(), halfway.state_dict()]
    again, resumed, optimizer = begin(methods)
    for part, state in zip((resumed, optimizer, again), saved, strict=True):
        part.load_state_dict(state)
    steps(again, resumed, optimizer, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    state = session.state_dict()
    assert state == {**resumed.state_dict(), "methods": state["methods"]}
    assert state["methods"][0] == resumed.state_dict()["methods"][0]
    assert len(state["methods"][0]["norms"]) == 3
    frozen = state["methods"][1]["frozen"]
    assert sum(map(len, frozen.values())) > 0
    for name, rows in frozen.items():
        assert torch.equal(model.state_dict()[name][rows], first[name][rows])
        assert not torch.equal(model.state_dict()[name], first[name])


def test_a_method_that_only_observes_changes_nothing():
    model, session, optimizer = begin([Observe()])
    steps(model, session, optimizer, 4)
    alone, _, optimizer = begin([])
    steps(alone, session, optimizer, 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name])
    assert session.finish() == ModelSpec(
        "vitrm_micro_patch4_8", {"num_classes": 4, "drop_rate": 0.0}
    )


def test_a_session_ends_in_the_spec_of_what_the_model_has_become():
    methods = [
        Freeze(),
        compress.Magnitude(sparsity=0.3, divisible=1),
        compress.RoundWeights(bits=4),
    ]
    model, session, optimizer = begin(methods)
    steps(model, session, optimizer, 2)
    spec = session.finish()
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(build(spec, model.state_dict())(images), model.eval()(images))
    assert not optimizer._optimizer_step_post_hooks  # the session has let go of it


def test_a_session_without_an_optimizer_is_warned_of():
    for method in (compress.HESSO(0.4, begin=0), compress.RigL(0.5), compress.DHSPG(0.3)):
        session = compress.Session(build(VITRM), [method], torch.zeros(2, 1, 8, 8), 2, spec=VITRM)
        with pytest.warns(SmallfryWarning, match=f"'{method.name}' acts after steps .* attach"):
            session.finish()
    resumed = compress.Session(build(VITRM), [method], torch.zeros(2, 1, 8, 8), 2, spec=VITRM)
    resumed.load_state_dict(session.state_dict())
    resumed.finish()


def test_natural_gradient_runs_under_methods():
    from smallfry.optim import KFAC

    spec, model = VITRM, build(VITRM)
    optimizer = KFAC(model.train(), likelihood="categorical")
    session = compress.Session(model, [Freeze(0.5)], torch.zeros(2, 1, 8, 8), 2, spec=spec)
    session.attach(optimizer)
    first = {n: t.clone() for n, t in model.state_dict().items()}
    steps(model, session, optimizer, 2)
    for name, rows in session.state_dict()["methods"][0]["frozen"].items():
        assert torch.equal(model.state_dict()[name][rows], first[name][rows])


def test_a_session_needs_steps():
    with pytest.raises(UsageError, match="at least 1"):
        compress.Session(nn.Linear(2, 2), [], torch.zeros(1, 2), 0)
