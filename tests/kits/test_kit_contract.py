"""What a kit may have: inputs that are no pictures, and models of several outputs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

import smallfry
from smallfry.cli import main
from smallfry.data import ImageData, Split, load_data
from smallfry.data.registered import Wanted, register_data
from smallfry.errors import DataError, UsageError
from smallfry.models.sources import register_sizes
from smallfry.tasks import register
from smallfry.training.evaluation import predict
from smallfry_runtime.runtime import Runtime

CHANNELS, HEIGHT, WIDTH = 5, 4, 6


class Answers(NamedTuple):
    """Outputs of the model: a class of each place, and a number of the whole."""

    places: Tensor  # (batch, 2, height, width)
    total: Tensor  # (batch, 1)


class Places(nn.Module):
    """Two 1×1 convolutions, and a mean."""

    def __init__(self, num_classes: int = 2, in_chans: int = CHANNELS, **_: Any) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.body = nn.Conv2d(in_chans, 8, 1)
        self.head, self.sum = nn.Conv2d(8, num_classes, 1), nn.Linear(8, 1)

    def forward(self, images: Tensor) -> Answers:
        """Compute both outputs."""
        found = torch.relu(self.body(images))
        return Answers(self.head(found), self.sum(found.mean((2, 3))))


@register
@dataclass(frozen=True)
class Fields:
    """Signs of the first channel at each place, and the mean of the last."""

    name: ClassVar[str] = "contract-fields"
    likelihood: ClassVar[Any] = {"places": "categorical_mean", "total": "gaussian"}
    augmentations: ClassVar[frozenset[str]] = frozenset()

    def outputs(self, classes: int) -> int:
        """Return the classes."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> Tensor:
        """Return the labels."""
        assert torch.equal(labels.to(shares.dtype), shares)
        return labels

    def loss(self, outputs: Answers, targets: Tensor) -> Tensor:
        """Compute cross-entropy and half a squared error."""
        signs, mean = targets[:, 0].long(), targets[:, 1, 0, :1]
        errors = (outputs.total.float() - mean).square().sum(1).mean() / 2
        return F.cross_entropy(outputs.places.float(), signs) + errors

    def right(self, outputs: Answers, targets: Tensor) -> Tensor:
        """Mark samples whose signs are all right."""
        return (outputs.places.argmax(1) == targets[:, 0].long()).flatten(1).all(1)

    def metrics(self, outputs: Answers, labels: Tensor) -> dict[str, float]:
        """Compute loss, right places, and the error of the mean."""
        right = (outputs.places.argmax(1) == labels[:, 0].long()).double().mean()
        error = (outputs.total[:, 0] - labels[:, 1, 0, 0]).abs().mean()
        return {
            "loss": float(self.loss(outputs, labels)),
            "accuracy": float(right),
            "mean_error": float(error),
        }

    def rank(self, scores: Any) -> tuple[float, ...]:
        """Rank by right places."""
        return scores["accuracy"], -scores["loss"]

    def decode(self, outputs: Answers, classes: Any, settings: Any = None) -> list[Any]:
        """Decode to the number and the share of places."""
        shares = (outputs.places.argmax(1) == 1).double().mean((1, 2))
        pairs = zip(outputs.total[:, 0].tolist(), shares.tolist(), strict=True)
        return [{"mean": mean, "share": share} for mean, share in pairs]


def draw(count: int, seed: int, floats: bool) -> Split:
    """Draw samples whose labels are a function of the inputs."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, CHANNELS, HEIGHT, WIDTH, generator=random)
    if not floats:
        inputs = (40 * inputs + 128).round().clamp(0, 255).to(torch.uint8)
    signs = (inputs[:, :1].float() > (0 if floats else 128)).float()
    last = inputs[:, -1:].float() / (1 if floats else 255)
    mean = last.mean((2, 3), keepdim=True).expand(-1, 1, HEIGHT, WIDTH)
    return Split(inputs, torch.arange(count), torch.cat([signs, mean], dim=1))


def read(name: str, wanted: Wanted) -> ImageData:
    """Build the data set."""
    parts = [draw(n, seed, name.endswith("floats")) for seed, n in enumerate((96, 32, 32))]
    return ImageData(
        name, "generated", ("minus", "plus"), (HEIGHT, WIDTH), CHANNELS, *parts, generated={}
    )


register_data(("contract-floats", "contract-bytes"), read)


default_cfgs = generate_default_cfgs({"contract_places": {"num_classes": 2}})


def create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Build the model in timm's manner."""
    return build_model_with_cfg(Places, name, pretrained, **options)


register_sizes(__name__, ("contract_places",), create)


@pytest.fixture(scope="module", params=["contract-floats", "contract-bytes"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on either kind of inputs."""
    folder = tmp_path_factory.mktemp("contract") / "run"
    smallfry.train(
        task="contract-fields",
        data={"name": request.param},
        model={"name": "contract_places"},
        optimizer={"name": "kfac" if request.param.endswith("floats") else "adamw", "lr": 0.05},
        epochs=12,
        batch_size=16,
        run=folder,
    )
    return folder


def test_a_model_of_several_outputs_learns_from_inputs_of_five_channels(run: Path) -> None:
    scores = smallfry.load(run).evaluate()
    assert scores["accuracy"] > 0.9
    assert scores["mean_error"] < 0.2


def test_float_inputs_are_normalised_by_their_own_moments(run: Path) -> None:
    data = load_data(smallfry.load(run).manifest["data"]["name"])
    pixels = data.train.images.double()
    scale = 1 if pixels.abs().max() < 20 else 255
    wanted = (pixels / scale).transpose(0, 1).flatten(1)
    assert np.allclose(data.mean, wanted.mean(1), atol=1e-9)
    assert np.allclose(data.std, wanted.std(1, correction=0), atol=1e-9)
    found = smallfry.load(run).normalize(data.train.images).double().transpose(0, 1).flatten(1)
    assert found.mean(1).abs().max() < 1e-5
    assert (found.std(1, correction=0) - 1).abs().max() < 1e-5


def test_an_export_has_the_names_of_the_outputs_and_equals_the_model(
    run: Path, tmp_path: Path
) -> None:
    trained = smallfry.load(run)
    runtime = Runtime(smallfry.export(run, tmp_path / "export"))
    assert runtime.manifest.outputs == ("places", "total")
    assert runtime.manifest.values == trained.frame.values
    test = load_data(trained.manifest["data"]["name"]).test
    wanted = predict(trained.model, test, trained.normalize).logits
    found = runtime.compute(test.images.numpy()).logits
    assert np.abs(found["places"] - wanted.places.numpy()).max() < 1e-4
    assert np.abs(found["total"] - wanted.total.numpy()).max() < 1e-4
    assert runtime.compute(test.images.numpy()[:0]).logits.keys() == found.keys()
    other = np.zeros((1, CHANNELS, HEIGHT, WIDTH), np.float64)
    with pytest.raises(DataError, match=f"expected {trained.frame.values}"):
        runtime.compute(other)


def test_predict_reads_files_of_numpy(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = smallfry.load(run)
    array = load_data(trained.manifest["data"]["name"]).test.images.numpy()[0]
    np.save(tmp_path / "one.npy", array)
    assert main(["predict", str(run), str(tmp_path / "one.npy"), "--json"]) == 0
    assert '"mean"' in capsys.readouterr().out
    (wanted,) = trained.decode(array)
    assert trained.decode([array, tmp_path / "one.npy"])[1] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((CHANNELS, HEIGHT, WIDTH + 1), np.uint8), "expected an array of .* 5×4×6"),
        (np.zeros((HEIGHT, WIDTH), np.uint8), "is 4×6; expected"),
        (np.full((CHANNELS, HEIGHT, WIDTH), "a"), "its values are <U1"),
        (np.array([{}], object), "can't be read"),
    ],
)
def test_other_arrays_are_refused(run: Path, tmp_path: Path, array: Any, words: str) -> None:
    np.save(tmp_path / "wrong.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=words):
        smallfry.load(run).decode(tmp_path / "wrong.npy")


def test_pictures_and_damaged_files_are_refused(run: Path, tmp_path: Path) -> None:
    trained = smallfry.load(run)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(DataError, match="can't be read"):
        trained.decode(tmp_path / "cut.npy")
    np.savez(tmp_path / "two.npz", np.zeros(3), np.zeros(3))
    with pytest.raises(DataError, match="several arrays"):
        trained.decode(tmp_path / "two.npz")


def test_values_that_are_not_finite_are_refused(tmp_path: Path, run: Path) -> None:
    trained = smallfry.load(run)
    if trained.frame.values == "uint8":
        pytest.skip("bytes are finite")
    array = np.full((CHANNELS, HEIGHT, WIDTH), np.nan, np.float32)
    with pytest.raises(DataError, match="not finite"):
        trained.decode(array)


@pytest.mark.slow
def test_benchmark_and_compress_take_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    methods = "[{quantize: {weights: 8, activations: 8}}]"
    assert main(["compress", str(run), "--methods", methods, "--to", str(small)]) == 0
    assert abs(smallfry.load(small).evaluate()["accuracy"]) > 0.85
    capsys.readouterr()
    options = ["--seconds", "0.05", "--forms", "eager", "float32", "int8_dynamic"]
    options += ["--batch_sizes", "1", "--folder", str(tmp_path / "benchmark")]
    assert main(["benchmark", str(run), str(small), *options]) == 0
    told = capsys.readouterr().out
    assert "PyTorch eager" in told
    assert "ONNX" in told


def test_augmentation_that_moves_places_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"augment\.flip"):
        smallfry.train(
            task="contract-fields",
            data={"name": "contract-bytes"},
            model={"name": "contract_places"},
            augment={"flip": True},
            run=tmp_path / "run",
        )
