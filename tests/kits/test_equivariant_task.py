"""Runs of the kit: training, pictures, export and answers that quarter turns leave."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import smallfry
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import UsageError
from smallfry.kits.equivariant.pictures import accuracy_by_angle, draw_turns, turn
from smallfry.kits.equivariant.task import Equivariant, turned_alike
from smallfry_runtime.decoders.equivariant import decode
from smallfry_runtime.runtime import Runtime


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a small network on a few upright digits."""
    folder = tmp_path_factory.mktemp("equivariant") / "run"
    code = main(
        [
            *("train", "--task", "equivariant", "--run", str(folder), "--threads", "1"),
            *("--model.options", "{width: 6}", "--data.limit", "400"),
            *("--epochs", "5", "--batch_size", "16", "--data.test", "0.1"),
        ]
    )
    assert code == 0
    return folder


@pytest.mark.slow
def test_a_run_learns_and_quarter_turns_leave_every_answer(run, tmp_path):
    trained = smallfry.load(run)
    data = load_data("equivariant-digits", test=0.1)
    upright = trained.evaluate(split="validation")
    assert upright["accuracy"] > 0.2  # of ten classes
    images = trained.normalize(data.test.images)
    for turns in (1, 2, 3):
        assert turned_alike(trained.model.eval(), images, turns)[0].all()
    few = data.test.take(torch.arange(10))
    Equivariant().explain(trained.model, few, trained.normalize, trained.classes, tmp_path)
    assert Image.open(tmp_path / "turns.png").size[0] > 600


@pytest.mark.slow
def test_an_export_answers_with_labels(run, tmp_path, capsys):
    smallfry.export(run, tmp_path / "export")
    runtime = Runtime(tmp_path / "export")
    pixels = load_data("equivariant-digits", test=0.1).test.images.numpy()[:20]
    trained = smallfry.load(run)
    with torch.no_grad():
        wanted = trained.model(trained.normalize(torch.from_numpy(pixels))).numpy()
    assert np.abs(runtime.compute(pixels).logits - wanted).max() < 1e-4
    Image.fromarray(pixels[0, 0]).save(tmp_path / "a.png")
    for source in (run, tmp_path / "export"):
        capsys.readouterr()
        assert main(["predict", str(source), str(tmp_path / "a.png"), "--json"]) == 0
        answer = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert answer["label"] == trained.classes[int(wanted[0].argmax())]
        assert sum(answer["probabilities"].values()) == pytest.approx(1)


@pytest.mark.slow
def test_a_network_that_draws_samples_is_exported_once_they_are_frozen(run, tmp_path):
    trained = smallfry.load(run)
    trained.model.sampling = "fresh"
    with pytest.raises(smallfry.errors.ExportError, match="draws samples"):
        smallfry.export(trained, tmp_path / "export")
    trained.model.freeze_samples(seed=1)
    smallfry.export(trained, tmp_path / "export")
    pixels = load_data("equivariant-digits", test=0.1).test.images[:4]
    with torch.no_grad():
        wanted = trained.model.eval()(trained.normalize(pixels)).numpy()
    found = Runtime(tmp_path / "export").compute(pixels.numpy()).logits
    assert np.abs(found - wanted).max() < 1e-4


def test_decoding():
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    first, second = Equivariant().decode(logits, ["a", "b"])
    assert (first["label"], second["label"]) == ("b", "a")
    assert first["probabilities"]["b"] == pytest.approx(1 / (1 + np.exp(-2)))
    with pytest.raises(UsageError, match="no setting 'top'"):
        decode(logits.numpy(), ["a", "b"], {"top": 1})


def test_turns_are_exact_by_quarters_and_accuracies_follow_them(tmp_path):
    images = torch.zeros(2, 1, 9, 9)
    images[0, 0, :4] = 255  # bright above
    images[1, 0, 5:] = 255  # bright below
    assert torch.equal(turn(images, 270), images.rot90(3, (2, 3)))
    there = turn(turn(images, 30), -30)
    assert (there - images)[..., 3:6, 3:6].abs().mean() < 40
    eighths = turn(images, 45)  # counter-clockwise: from above to above and left
    assert eighths[0, 0, 2, 2] > 200
    assert eighths[0, 0, 6, 6] == 0

    class Above(torch.nn.Module):
        """Logits: brightness above and below."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, given):
            return self.scale * torch.stack(
                [given[:, 0, :4].mean((1, 2)), given[:, 0, 5:].mean((1, 2))], dim=1
            )

    pixels, angles = images.to(torch.uint8), (0, 30, 180, 360)
    found = accuracy_by_angle(Above(), pixels, torch.tensor([0, 1]), torch.Tensor.float, angles)
    assert found == [1, 1, 0, 1]
    same, change = turned_alike(Above(), images, 2, batch=1)
    assert not same.any()
    assert change.tolist() == [255, 255]
    draw_turns(pixels, {"a": found, "b": found}, angles, tmp_path / "turns.png")
    assert Image.open(tmp_path / "turns.png").size[0] > 600
