"""Sharing: what is written is what is read, by smallfry and by timm, and nothing else is let in."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from fake_hub import COMMIT, TOKEN, FakeHub
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import smallfry
from smallfry import compress
from smallfry.cli import main
from smallfry.deploy.pretrained import (
    from_pretrained,
    load_trained,
    push_to_hub,
    require_model,
    save_pretrained,
)
from smallfry.errors import HubError, RunError, SmallfryError, SmallfryWarning, UsageError
from smallfry.training.augment import Normalize
from smallfry.training.inference import classify
from smallfry.training.run import TrainedModel, load_run
from smallfry_runtime.files import with_digest
from smallfry_runtime.inputs import InputImage

FAST = [
    "--model.options={embed_dim: 16, num_heads: 2, mlp_hidden_dim: 16, depth: 1, latent_steps: 1}",
    *("--model.recursion_steps=4", "--epochs=1", "--data.limit=200", "--progress=quiet"),
]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "format_2"
TINY = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run of 4 recursion steps that the tests only read."""
    folder = tmp_path_factory.mktemp("run of ann") / "run"
    assert main(["train", *FAST, "--run", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def shared(run, tmp_path_factory):
    """The run as a shared folder that the tests only read."""
    return save_pretrained(run, tmp_path_factory.mktemp("shared") / "digits", license="Apache-2.0")


@pytest.fixture
def copied(shared, tmp_path):
    """The shared folder, to be damaged."""
    return Path(shutil.copytree(shared, tmp_path / "copied"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that huggingface_hub talks to, with an empty cache and a token."""
    fake = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", fake.address)
    template = fake.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield fake
    fake.close()


def untrained(name, size, channels, classes=("a", "b", "c"), **arguments):
    """A model with random weights, as a run of it would be loaded."""
    arguments |= {"num_classes": len(classes), "in_chans": channels}
    model = timm.create_model(name, **arguments).eval()
    for name_of_buffer, buffer in model.named_buffers():
        if "running" in name_of_buffer:  # statistics that aren't those of a fresh model
            buffer.uniform_(0.5, 1.5)
    mean, std = [0.1234567890123] * channels, [0.3] * channels
    manifest = {
        "format": 1,
        "smallfry": "0.1.0",
        "model": {"name": name, "arguments": arguments},
        "classes": list(classes),
        "input": {"size": size, "channels": channels, "mean": mean, "std": std},
        "data": {"name": "things", "fingerprint": "0123"},
    }
    return TrainedModel(model, tuple(classes), size, channels, Normalize(mean, std), manifest)


def logits(model, size, channels):
    images = torch.randn(7, channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(images)


def same(one, other, size, channels):
    return torch.equal(logits(one, size, channels), logits(other, size, channels))


def change(folder, **entries):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


# There and back


@pytest.mark.parametrize(
    ("name", "size", "channels", "arguments"),
    [
        ("vitrm_micro_patch4_8", 8, 1, {"img_size": 8, "recursion_steps": 4, "drop_rate": 0.2}),
        ("vitrm_thrifty_patch4_32", 16, 3, {**TINY, "img_size": 16, "latents": 3}),
        ("paper_vit_small_patch4_32", 8, 3, {"img_size": 8, "embed_dim": 16, "depth": 1}),
        ("resnet18_cifar", 12, 1, {"layers": [1, 1, 1, 1]}),
        ("resnet10t", 32, 3, {}),
        ("resnet10t.c3_in1k", 32, 1, {"pretrained": False, "output_stride": 16}),
        ("vit_tiny_patch16_224", 32, 1, {"img_size": 32, "depth": 1, "patch_size": 8}),
    ],
)
def test_logits_are_the_same_bit_for_bit(name, size, channels, arguments, tmp_path):
    trained = untrained(name, size, channels, **arguments)
    folder = save_pretrained(trained, tmp_path / "out")
    back = from_pretrained(folder)
    assert same(trained.model, back.model, size, channels)
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert same(trained.model, by_timm, size, channels)
    kept = {k: v for k, v in arguments.items() if k != "pretrained"}
    assert back.manifest["model"]["arguments"].items() >= kept.items()
    images = torch.randint(256, (2, channels, size, size), dtype=torch.uint8)
    assert torch.equal(back.normalize(images), trained.normalize(images))
    fields = ("classes", "image_size", "channels")
    assert all(getattr(back, field) == getattr(trained, field) for field in fields)


@pytest.mark.parametrize("name", ["vitrm_plus", "cct"])
def test_every_family_of_smallfry_can_be_shared(name, tmp_path):
    model = next(m for m in timm.list_models(f"{name}*") if timm.get_pretrained_cfg(m))
    channels, size, _ = timm.get_pretrained_cfg(model).input_size
    trained = untrained(model, size, channels)
    folder = save_pretrained(trained, tmp_path / "out")
    assert same(trained.model, from_pretrained(folder).model, size, channels)
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert same(trained.model, by_timm, size, channels)


def test_sharing_leaves_the_model_as_it_was(tmp_path):
    trained = untrained("resnet10t", 32, 3)
    before = dict(trained.model.pretrained_cfg)
    trained.model.to(memory_format=torch.channels_last)
    folder = save_pretrained(trained, tmp_path / "out")
    assert trained.model.pretrained_cfg == before
    assert same(trained.model, from_pretrained(folder).model, 32, 3)


def test_a_run_comes_back_with_what_it_knew(run, shared):
    trained, back = load_run(run), from_pretrained(shared)
    assert back.model.recursion_steps == 4
    assert same(trained.model, back.model, 8, 1)
    assert not back.model.training
    summary = json.loads((run / "summary.json").read_text())
    assert back.manifest["measured"] == summary["measured"]
    assert back.manifest["input"] == trained.manifest["input"]
    assert back.manifest["data"]["fingerprint"] == summary["data"]["fingerprint"]
    assert back.manifest["license"] == "apache-2.0"
    assert (shared / "confusion_matrix.png").read_bytes() == (
        run / "pictures/confusion_matrix.png"
    ).read_bytes()


def test_the_folder_holds_nothing_else(shared):
    files = {"model.safetensors", "config.json", "README.md", "confusion_matrix.png"}
    assert {file.name for file in shared.iterdir()} == files
    assert [file.name for file in shared.parent.iterdir()] == [shared.name]


def test_sharing_what_was_shared_gives_the_same(shared, tmp_path):
    again = save_pretrained(shared, tmp_path / shared.name)
    for file in shared.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("side", [8, 13])
def test_timm_prepares_pictures_as_smallfry_does(shared, tmp_path, side):
    """With the very code of the card; beyond the model's size, for square pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    answer = next(classify(from_pretrained(shared), [InputImage("", tmp_path / "image.png")], 1))
    text = (shared / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    code = code.replace("local-dir:digits", f"local-dir:{shared}")
    code = code.replace("image.png", str(tmp_path / "image.png"))
    printed = []
    exec(code, {"print": lambda *values: printed.extend(values)})
    assert printed[0] == answer.top[0][0]
    assert printed[1] == pytest.approx(answer.top[0][1], abs=1e-5)


def test_the_last_weights_carry_no_figures_of_the_best(run, tmp_path):
    folder = save_pretrained(run, tmp_path / "out", checkpoint="last")
    told = from_pretrained(folder).manifest
    assert told["checkpoint"] == "last"
    assert "test" not in told["measured"]
    assert "references" not in told["measured"]
    assert "epochs" in told["measured"]
    assert not (folder / "confusion_matrix.png").exists()
    assert same(load_run(run, "last").model, from_pretrained(folder).model, 8, 1)
    by_checkpoint = save_pretrained(run / "last", tmp_path / "again")
    assert from_pretrained(by_checkpoint).manifest == told


def test_a_run_that_has_not_ended_is_shared_without_figures(run, tmp_path):
    unfinished = Path(shutil.copytree(run, tmp_path / "unfinished"))
    (unfinished / "summary.json").unlink()
    folder = save_pretrained(unfinished, tmp_path / "out")
    measured = from_pretrained(folder).manifest["measured"]
    assert measured["parameters"] > 0
    assert "test" not in measured
    assert "the run had not ended" in (folder / "README.md").read_text()


def test_loading_a_run_of_fine_tuned_weights_fetches_nothing(run, tmp_path, monkeypatch):
    tuned = Path(shutil.copytree(run, tmp_path / "tuned"))
    file = tuned / "best/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["model"]["arguments"]["pretrained"] = True
    file.write_text(json.dumps(with_digest(manifest)))
    folder = save_pretrained(tuned, tmp_path / "out")
    assert "pretrained" not in from_pretrained(folder).manifest["model"]["arguments"]
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert same(load_run(run).model, by_timm.eval(), 8, 1)


# The command


def test_the_command_shares_and_uses_what_it_shared(run, tmp_path, capsys):
    out = tmp_path / "my model"
    assert main(["share", str(run), "--to", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"smallfry predict '{out}'" in printed
    assert "license: none" in printed
    assert main(["evaluate", str(out), "--data", "digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    measured = json.loads((run / "summary.json").read_text())["measured"]["test"]
    assert (found["split"], found["images"]) == ("test", 359)
    assert {key: found[key] for key in measured} == pytest.approx(measured)
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(tmp_path / "a.png")
    assert main(["predict", str(out), str(tmp_path / "a.png"), "--json"]) == 0
    by_folder = capsys.readouterr().out
    assert main(["predict", str(run), str(tmp_path / "a.png"), "--json"]) == 0
    assert capsys.readouterr().out == by_folder


def test_other_data_than_that_of_the_training_is_taken_whole(shared, tmp_path, capsys):
    for number in range(10):
        (tmp_path / "digits" / str(number)).mkdir(parents=True)
        for index in range(2):
            image = Image.fromarray(np.full((8, 8), 20 * number + index, np.uint8))
            image.save(tmp_path / "digits" / str(number) / f"{index}.png")
    assert main(["evaluate", str(shared), "--data", str(tmp_path / "digits"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["images"]) == ("all", 20)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--to FOLDER, or --hub USER/NAME"),
        (["--to", "x", "--hub", "a/b"], 2, "--to FOLDER, or --hub USER/NAME"),
        (["--to", "x", "--private"], 2, "--to FOLDER, or --hub USER/NAME"),
        (["--to", "x", "--license", "my own: all"], 2, "is not a license"),
        (["--hub", "no-user"], 2, "expected USER/NAME"),
        (["--hub", "../x"], 2, "expected USER/NAME"),
        (["--to", "."], 1, "not empty"),
    ],
)
def test_wrong_usage_is_told_in_a_line(run, arguments, code, message, capsys):
    assert main(["share", str(run), *arguments]) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert not Path("x").exists()


def test_evaluating_needs_to_be_told_where_the_data_is(shared, capsys):
    assert main(["evaluate", str(shared)]) == 2
    assert "give --data" in capsys.readouterr().err


# The hub


def test_what_is_pushed_is_what_is_saved_and_comes_back(run, shared, hub, tmp_path, capsys):
    assert main(["share", str(run), "--hub", "ann/digits", "--license", "apache-2.0"]) == 0
    assert f"{hub.address}/ann/digits" in capsys.readouterr().out
    uploaded = hub.repositories["ann/digits"]
    assert uploaded.keys() == {file.name for file in shared.iterdir()}
    for name in ("model.safetensors", "config.json", "confusion_matrix.png"):
        assert uploaded[name] == (shared / name).read_bytes(), name
    assert b'timm.create_model("hf_hub:ann/digits", pretrained=True)' in uploaded["README.md"]
    uploaded["pytorch_model.bin"] = b"a pickle"  # somebody adds what nobody should load
    hub.requests.clear()
    for name in ("ann/digits", "hf_hub:ann/digits", f"hf-hub:ann/digits@{COMMIT}"):
        assert same(load_run(run).model, from_pretrained(name).model, 8, 1)
    by_timm = timm.create_model("hf_hub:ann/digits", pretrained=True, cache_dir=tmp_path / "other")
    assert same(load_run(run).model, by_timm.eval(), 8, 1)
    assert not [path for _, path in hub.requests if path.endswith((".bin", ".png"))]
    assert main(["evaluate", "hf_hub:ann/digits", "--data", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 359


def test_a_compressed_model_of_the_hub_is_loaded_by_smallfry(run, hub, tmp_path, capsys):
    small = compress.apply(load_run(run), [compress.RoundWeights()])
    small.save(tmp_path / "small")
    assert main(["share", str(tmp_path / "small"), "--hub", "ann/small"]) == 0
    out = capsys.readouterr().out
    assert "smallfry.load('hf_hub:ann/small').model" in out
    assert "timm" not in out
    images = small.normalize(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    assert torch.equal(smallfry.load("hf_hub:ann/small").model(images), small.model(images))


def test_a_private_model_is_never_uploaded_to_a_public_repository(run, hub):
    push_to_hub(run, "ann/secret", private=True)
    assert hub.private["ann/secret"]
    push_to_hub(run, "ann/secret", private=True)
    push_to_hub(run, "ann/open")
    hub.repositories["ann/open"].clear()
    with pytest.raises(HubError, match="public; nothing was uploaded"):
        push_to_hub(run, "ann/open", private=True)
    assert hub.repositories["ann/open"] == {}


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda run: from_pretrained("ann/nothing"), "has no such model, or it is private"),
        (lambda run: from_pretrained("ann/digits", "v9"), "no branch, tag or commit 'v9'"),
        (lambda run: push_to_hub(run, "somebody/digits"), "the token may not do that"),
    ],
)
def test_refusals_of_the_hub_are_told(run, hub, do, message):
    push_to_hub(run, "ann/digits")
    with pytest.raises(HubError, match=message) as raised:
        do(run)
    assert "\n" not in str(raised.value)


def test_a_token_is_asked_for(run, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="does not accept the token"):
        push_to_hub(run, "ann/digits")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match=r"needs a token with write access.*HF_TOKEN"):
        push_to_hub(run, "ann/digits")
    assert hub.repositories == {}


def test_without_a_connection_the_way_out_is_told(run, hub, capsys):
    hub.close()
    for action in (lambda: from_pretrained("ann/digits"), lambda: push_to_hub(run, "ann/digits")):
        with pytest.raises(HubError, match=r"can't be reached.*HF_ENDPOINT.*local folder"):
            action()
    assert main(["predict", "hf_hub:ann/digits", "x.png"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_what_was_fetched_before_is_there_offline(shared, tmp_path):
    """Timm and smallfry read a cache laid out as huggingface_hub does, in a fresh process."""
    place = tmp_path / "hub/models--ann--digits"
    shutil.copytree(shared, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(COMMIT)
    code = (
        "import torch, timm, smallfry, sys\n"
        "from smallfry.deploy.pretrained import from_pretrained\n"
        "from smallfry.errors import HubError\n"
        f"here, images = from_pretrained({str(shared)!r}).model, torch.randn(3, 1, 8, 8)\n"
        "one = timm.create_model('hf_hub:ann/digits', pretrained=True).eval()\n"
        "two = from_pretrained('ann/digits').model\n"
        "print(all(torch.equal(here(images), m(images)) for m in (one, two)))\n"
        "try: from_pretrained('ann/other')\n"
        "except HubError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "True"
    assert "ann/other: could not be fetched: HF_HUB_OFFLINE is set" in second


# What is refused


def test_a_taken_folder_stays_as_it_is(run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        save_pretrained(run, tmp_path)
    with pytest.raises(RunError, match="not empty"):
        save_pretrained(run, tmp_path / "mine")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert from_pretrained(save_pretrained(run, tmp_path / "empty"))


def test_a_failure_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(RunError, match="no space left"):
        save_pretrained(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_are_refused(copied):
    file = copied / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match=r"model\.safetensors: damaged, its hash"):
        from_pretrained(copied)
    file.write_bytes(data[:100])
    with pytest.raises(RunError, match="damaged"):
        from_pretrained(copied)
    file.unlink()
    with pytest.raises(RunError, match="missing; weights are read from no other file"):
        from_pretrained(copied)


def test_weights_of_another_size_are_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    change(copied, model_args=config["model_args"] | {"embed_dim": 32})
    with pytest.raises(RunError, match="weights don't fit its model"):
        from_pretrained(copied)


def test_a_newer_format_is_refused(copied):
    told = json.loads((copied / "config.json").read_text())["smallfry"]
    change(copied, smallfry=told | {"format": 5, "version": "9.9"})
    with pytest.raises(RunError, match=r"written by smallfry 9\.9 in format 5.*install a newer"):
        from_pretrained(copied)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architecture": "vitrm_micro_patch4_9"}, "did you mean|unknown architecture"),
        ({"architecture": None}, "has no architecture"),
        ({"label_names": ["a", "b"]}, "has 10 classes, but 2 names"),
        ({"pretrained_cfg": {}}, "damaged or incomplete"),
        ({"pretrained_cfg": 3}, "damaged or incomplete"),
        ({"smallfry": {}}, "has no format"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "may not hold checkpoint_path"),
        ({"model_args": {"nonsense": 1}}, "can't be built from its description"),
    ],
)
def test_a_wrong_description_is_refused(copied, entries, message):
    change(copied, **entries)
    with pytest.raises(RunError, match=message):
        from_pretrained(copied)


def test_what_is_no_shared_folder_is_told(tmp_path, shared):
    with pytest.raises(RunError, match=r"config\.json is missing"):
        from_pretrained(tmp_path)
    with pytest.raises(RunError, match="no such folder"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has no revision"):
        from_pretrained(shared, "main")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RunError, match="models of other libraries are not supported"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match="can't be read"):
        from_pretrained(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data(), value=VALUES)
def test_no_change_to_the_description_ends_in_a_crash(shared, tmp_path, data, value):
    """Whatever one entry is turned into: a model, or an error that smallfry tells."""
    folder = tmp_path / "changed"
    if not folder.exists():
        shutil.copytree(shared, folder)
    config = json.loads((shared / "config.json").read_text())
    part = config
    while isinstance(part, dict) and part:
        key = data.draw(st.sampled_from(sorted(part)))
        if not isinstance(part[key], dict) or data.draw(st.booleans()):
            part[key] = value
            break
        part = part[key]
    (folder / "config.json").write_text(json.dumps(config))
    target = tmp_path / "again"
    try:
        save_pretrained(folder, target)
        assert from_pretrained(target)
    except SmallfryError:
        pass
    finally:
        shutil.rmtree(target, ignore_errors=True)


# Models that timm wrote


@pytest.fixture
def foreign(tmp_path):
    """A model as timm saves it, with the classes in the order of their numbers."""
    model = timm.create_model("resnet10t", num_classes=11, in_chans=3).eval()
    names = {str(number): f"class {number}" for number in range(11)}
    config = {"label_names": names, "pretrained_cfg": {"input_size": (3, 32, 32)}}
    timm.models.save_for_hf(model, tmp_path / "foreign", config, safe_serialization=True)
    file = tmp_path / "foreign/config.json"
    written = json.loads(file.read_text())
    written["pretrained_cfg"] = dict(model.pretrained_cfg) | {
        "input_size": [3, 32, 32],
        "num_classes": 11,
        "url": "https://example.org/weights.pth",
    }
    file.write_text(json.dumps(written))
    return model, tmp_path / "foreign"


def test_a_model_of_timm_with_names_of_classes_is_read(foreign, quiet_warnings, tmp_path):
    model, folder = foreign
    trained = from_pretrained(folder)
    assert same(model, trained.model, 32, 3)
    assert trained.classes[9:] == ("class 9", "class 10")
    assert (trained.image_size, trained.channels) == (32, 3)
    again = save_pretrained(folder, tmp_path / "again")
    assert "What it was trained on is not recorded" in (again / "README.md").read_text()
    assert same(model, from_pretrained(again).model, 32, 3)


def test_that_smallfry_looks_at_pictures_otherwise_is_warned_of(foreign):
    with pytest.warns(SmallfryWarning, match="scaled bicubic"):
        from_pretrained(foreign[1])


def test_a_model_of_timm_without_names_needs_them(foreign, quiet_warnings):
    _, folder = foreign
    config = json.loads((folder / "config.json").read_text())
    del config["label_names"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="does not name its 11 classes"):
        from_pretrained(folder)
    with pytest.raises(UsageError, match="has 11 classes, but 2 names"):
        from_pretrained(folder, classes=["a", "b"])
    assert from_pretrained(folder, classes=list("abcdefghijk")).classes[2] == "c"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"input_size": [3, 32, 4097]}, "supports at most 4096 pixels per side"),
        ({"mean": [0.5]}, "don't fit 3 channels"),
        ({"std": [0.5, 0.5, 0.0]}, "don't fit 3 channels"),
    ],
)
def test_a_model_that_smallfry_can_not_feed_is_refused(foreign, entry, message):
    _, folder = foreign
    config = json.loads((folder / "config.json").read_text())
    change(folder, pretrained_cfg=config["pretrained_cfg"] | entry)
    with pytest.raises(RunError, match=message):
        from_pretrained(folder)


def test_pickled_weights_are_not_read(foreign, tmp_path):
    model, folder = foreign
    buffer = BytesIO()
    torch.save(model.state_dict(), buffer)
    (folder / "pytorch_model.bin").write_bytes(buffer.getvalue())
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunError, match="pickles can run code"):
        from_pretrained(folder)


def test_a_run_a_checkpoint_and_a_shared_folder_are_told_apart(run, shared):
    weights = safetensors.torch.load_file(run / "best/model.safetensors")
    for name in (run, run / "best", shared, f"local-dir:{shared}"):
        with warnings.catch_warnings():
            loaded = load_trained(name).model.state_dict()
        assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    with pytest.raises(RunError, match=r"there is no such file or folder; .* or hf_hub:USER/NAME"):
        load_trained("ann/digits")  # a name on the hub says so: hf_hub:ann/digits


def test_a_folder_of_models_is_no_model_and_the_first_is_suggested(run, tmp_path):
    shutil.copytree(FIXTURES / "exports" / "float32", tmp_path / "b")
    with pytest.raises(RunError, match=r"the folder holds b; expected .*USER/NAME$"):
        load_trained(tmp_path)
    with pytest.raises(RunError, match=rf"did you mean {tmp_path}/b\?$"):
        require_model(tmp_path, exports=True)
    (tmp_path / "c").symlink_to(run)
    for name in "adef":
        (tmp_path / name).touch()
    with pytest.raises(RunError, match=rf"holds a, b, c, …; .*did you mean {tmp_path}/c\?$"):
        load_trained(tmp_path)
    require_model(tmp_path / "c")
