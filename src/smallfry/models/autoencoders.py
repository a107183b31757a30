"""Auto-encoders for comparing second-order methods, and a deep linear network.

The three of Hinton and Salakhutdinov (Science 313, 2006) as used by Martens and Grosse (2015,
arXiv 1503.05671) and Koroko et al. (2022, arXiv 2201.10285): an encoder of ever smaller layers, a
code, and the encoder's mirror image as the decoder. The original codes are linear, those of Koroko
et al. go through the activation. A code of 6 rectified units may die, and nothing learns from then
on but the mean image: here the code is linear unless asked for otherwise.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from smallfry.errors import UsageError

Activation = Literal["relu", "tanh"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}

CURVES_SIZES = (784, 400, 200, 100, 50, 25, 6)
MNIST_SIZES = (784, 1000, 500, 250, 30)
FACES_SIZES = (625, 2000, 1000, 500, 30)


class Autoencoder(nn.Module):
    """Fully connected encoder and mirrored decoder.

    Args:
        sizes: Features from the input to the code, such as ``CURVES_SIZES``.
        activation: Behind every layer but the code's and the last.
        code: "linear", or "activation" to put the activation behind the code too.

    Raises:
        UsageError: Fewer than two sizes, or one below 1, or an unknown choice.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Activation = "relu",
        code: Literal["linear", "activation"] = "linear",
    ) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise UsageError(f"sizes are two or more numbers from 1 on, not {list(sizes)}")
        if activation not in ACTIVATIONS:
            raise UsageError(f"activation is {' or '.join(ACTIVATIONS)}, not '{activation}'")
        if code not in ("linear", "activation"):
            raise UsageError(f"code is 'linear' or 'activation', not '{code}'")
        self.encoder = _layers(sizes, activation)
        if code == "activation":
            self.encoder.append(ACTIVATIONS[activation]())
        self.decoder = _layers(sizes[::-1], activation)
        initialize(self)

    def encode(self, inputs: Tensor) -> Tensor:
        """Encode inputs (batch, features) or images (batch, 1, side, side) to (batch, code)."""
        code: Tensor = self.encoder(inputs.flatten(1))
        return code

    def decode(self, code: Tensor) -> Tensor:
        """Decode (batch, code) to outputs (batch, features): logits, or means of a Gaussian."""
        outputs: Tensor = self.decoder(code)
        return outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute outputs (batch, features); the loss decides: Bernoulli or Gaussian."""
        return self.decode(self.encode(inputs))


class DeepLinear(nn.Sequential):
    """64 linear layers 784→10, then 10→10, with no activation (Koroko et al. 2023, 2303.18083).

    Args:
        batch_norm: Batch normalisation between the layers, as in the paper.
        inputs: Features.
        width: Width of all layers after the first, and so the number of classes.
        depth: Linear layers.
    """

    def __init__(
        self, batch_norm: bool = True, inputs: int = 784, width: int = 10, depth: int = 64
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for i in range(depth):
            layers.append(nn.Linear(width if i else inputs, width))
            if batch_norm and i < depth - 1:
                layers.append(nn.BatchNorm1d(width))
        super().__init__(*layers)
        initialize(self)


class SmallConvNet(nn.Sequential):
    """Convnet of Koroko et al. for 32×32 images, after cuda-convnet: 3 convolutions, 1 layer.

    Args:
        classes: Number of classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(3),
            nn.BatchNorm2d(32),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(3),
            nn.BatchNorm2d(32),
            nn.Conv2d(32, 64, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, classes),
        )
        initialize(self)


def initialize(model: nn.Module) -> None:
    """Initialise with Xavier-uniform weights and zero bias, as in the papers."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _layers(sizes: Sequence[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])
