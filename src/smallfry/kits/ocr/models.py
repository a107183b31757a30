"""CRNN: convolutions down to one row, and a recurrent network along it.

    crnn_vgg       the paper's: seven convolutions, two bidirectional LSTMs, 8.3 million weights
    crnn_dw_s,m,l  compact, ours: depthwise separable convolutions, one LSTM of two layers

Images are 32 pixels high. Logits are (batch, steps, classes), a step being about 4 pixels wide.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.models.sources import Source, register_sizes

__all__ = ["CRNN", "CompactCRNN"]

SOURCE = Source("Shi et al. 2017, TPAMI 39(11), arXiv 1507.05717", "bgshih/crnn", "MIT")
HEIGHT = 32
VGG = {"hidden": 256}
COMPACT: Mapping[str, Mapping[str, Any]] = {
    "crnn_dw_s": {"widths": (8, 16, 32, 48, 64), "hidden": 48},
    "crnn_dw_m": {"widths": (16, 32, 64, 96, 128), "hidden": 64},
    "crnn_dw_l": {"widths": (24, 48, 96, 160, 192), "hidden": 128},
}
KERNEL = 7  # of convolutions along the text


class Recurrent(nn.Module):
    """Bidirectional LSTM along a sequence (batch, steps, features), and a linear layer.

    Args:
        features: Input features.
        hidden: Units of each direction.
        outputs: Output features; 0 leaves the linear layer out.
        layers: Layers of the LSTM.
    """

    def __init__(self, features: int, hidden: int, outputs: int, layers: int = 1) -> None:
        super().__init__()
        self.rnn = nn.LSTM(features, hidden, layers, bidirectional=True, batch_first=True)
        self.embedding = linear_classifier(2 * hidden, outputs)

    def forward(self, sequence: Tensor) -> Tensor:
        """Return (batch, steps, outputs)."""
        return cast(Tensor, self.embedding(self.rnn(sequence)[0]))


class Reader(nn.Module):
    """Base of CRNNs: columns of a feature map as a sequence, and a classifier of each step.

    Args:
        img_size: Height, 32, and width of images.
        in_chans: Channels.
        num_classes: Symbols with the blank; 0 leaves the classifier out.
        num_features: Features of a step.

    Raises:
        UsageError: Another height, or a width of less than 8 pixels.
    """

    def __init__(
        self, img_size: int | tuple[int, int], in_chans: int, num_classes: int, num_features: int
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height != HEIGHT or width < 8:
            raise UsageError(
                f"a CRNN reads images {HEIGHT} pixels high and 8 wide at least, not "
                f"{height}×{width}: set data.image_size"
            )
        self.img_size = (height, width)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = num_features

    def columns(self, images: Tensor) -> Tensor:
        """Compute the sequence (batch, steps, channels) of images."""
        raise NotImplementedError

    def context(self, sequence: Tensor) -> Tensor:
        """Mix the steps of a sequence, (batch, steps, num_features)."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute features of every step, (batch, steps, num_features)."""
        return self.context(self.columns(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify every step, (batch, steps, classes)."""
        return features if pre_logits else cast(Tensor, self.get_classifier()(features))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, steps, classes) of images (batch, channels, 32, width)."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """Return the layer that classifies a step."""
        raise NotImplementedError


class CRNN(Reader):
    """CRNN of the paper, with steps = ⌊width / 4⌋ + 1.

    Args:
        img_size: Height, 32, and width of images.
        in_chans: Channels.
        num_classes: Symbols with the blank; 0 leaves the classifier out.
        hidden: Units of an LSTM in each direction.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = (HEIGHT, 100),
        in_chans: int = 1,
        num_classes: int = 37,
        hidden: int = 256,
    ) -> None:
        super().__init__(img_size, in_chans, num_classes, 2 * hidden)
        widths, normed = (64, 128, 256, 256, 512, 512, 512), (2, 4, 6)
        layers: dict[str, nn.Module] = {}
        before = in_chans
        for i, width in enumerate(widths):
            kernel, padding = (2, 0) if i == 6 else (3, 1)
            layers[f"conv{i}"] = nn.Conv2d(before, width, kernel, padding=padding)
            if i in normed:
                layers[f"batchnorm{i}"] = nn.BatchNorm2d(width)
            layers[f"relu{i}"] = nn.ReLU()
            if i in (0, 1):
                layers[f"pooling{i}"] = nn.MaxPool2d(2)
            elif i in (3, 5):
                layers[f"pooling{i}"] = nn.MaxPool2d(2, (2, 1), (0, 1))
            before = width
        self.cnn = nn.Sequential()
        for name, layer in layers.items():
            self.cnn.add_module(name, layer)
        self.rnn = nn.Sequential(
            Recurrent(before, hidden, hidden), Recurrent(hidden, hidden, num_classes)
        )

    def columns(self, images: Tensor) -> Tensor:
        """Compute the sequence (batch, steps, 512)."""
        return cast(Tensor, self.cnn(images)).squeeze(2).transpose(1, 2)

    def context(self, sequence: Tensor) -> Tensor:
        """Run both LSTMs, without the classifier."""
        last = cast(Recurrent, self.rnn[1])
        return cast(Tensor, last.rnn(self.rnn[0](sequence))[0])

    def get_classifier(self) -> nn.Module:
        """Return the linear layer behind the second LSTM."""
        return cast(Recurrent, self.rnn[1]).embedding

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 removes it."""
        self.num_classes = num_classes
        last = cast(Recurrent, self.rnn[1])
        new = linear_classifier(self.num_features, num_classes)
        last.embedding = new.to(next(self.parameters()))


class CompactCRNN(Reader):
    """CRNN of depthwise separable convolutions, with steps = width / 4, rounded up.

    Args:
        img_size: Height, 32, and width of images.
        in_chans: Channels.
        num_classes: Symbols with the blank; 0 leaves the classifier out.
        widths: Channels of the five stages.
        hidden: Units of the LSTM in each direction.
        context: ``lstm``, of two layers; or ``conv``, three residual depthwise convolutions of 7
            steps, which run on any width and in integers.

    Raises:
        UsageError: Another ``context``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = (HEIGHT, 128),
        in_chans: int = 1,
        num_classes: int = 37,
        widths: tuple[int, int, int, int, int] = (16, 32, 64, 96, 128),
        hidden: int = 64,
        context: Literal["lstm", "conv"] = "lstm",
    ) -> None:
        if context not in ("lstm", "conv"):
            raise UsageError(f"context is lstm or conv, not '{context}'")
        a, b, c, d, e = widths
        recurrent = context == "lstm"
        super().__init__(img_size, in_chans, num_classes, 2 * hidden if recurrent else e)
        self.cnn = nn.Sequential(
            *_normed(nn.Conv2d(in_chans, a, 3, 2, 1, bias=False)),
            *_separable(a, b, 1),
            *_separable(b, c, 2),
            *_separable(c, c, 1),
            *_separable(c, d, (2, 1)),
            *_separable(d, d, 1),
            *_separable(d, e, (2, 1)),
            *_normed(nn.Conv2d(e, e, (2, 1), bias=False)),
        )
        self.mixer: nn.Module
        if recurrent:
            self.mixer = Recurrent(e, hidden, 0, layers=2)
        else:
            self.mixer = nn.Sequential(*(Along(e) for _ in range(3)))
        self.head = linear_classifier(self.num_features, num_classes)

    def columns(self, images: Tensor) -> Tensor:
        """Compute the sequence (batch, steps, channels of the last stage)."""
        return cast(Tensor, self.cnn(images)).squeeze(2).transpose(1, 2)

    def context(self, sequence: Tensor) -> Tensor:
        """Run the LSTM, or the convolutions in its place."""
        return cast(Tensor, self.mixer(sequence))

    def get_classifier(self) -> nn.Module:
        """Return the classifier of a step."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 removes it."""
        self.num_classes = num_classes
        new = linear_classifier(self.num_features, num_classes)
        self.head = new.to(next(self.parameters()))


class Along(nn.Module):
    """Residual depthwise separable convolution along a sequence (batch, steps, features).

    Args:
        features: Features of a step.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(
            features, features, KERNEL, padding=KERNEL // 2, groups=features, bias=False
        )
        self.norm = nn.BatchNorm1d(features)
        self.pointwise = nn.Conv1d(features, features, 1)
        self.act = nn.ReLU6()

    def forward(self, sequence: Tensor) -> Tensor:
        """Return the sequence with its neighbourhood mixed in."""
        mixed = self.act(self.norm(self.depthwise(sequence.transpose(1, 2))))
        return sequence + cast(Tensor, self.pointwise(mixed)).transpose(1, 2)


def _normed(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU6()


def _separable(inputs: int, outputs: int, stride: int | tuple[int, int]) -> tuple[nn.Module, ...]:
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
    return *_normed(depthwise), *_normed(nn.Conv2d(inputs, outputs, 1, bias=False))


def _cfg(first_conv: str, classifier: str, width: int) -> dict[str, Any]:
    return {
        "num_classes": 37,
        "input_size": (1, HEIGHT, width),
        "fixed_input_size": True,
        "mean": (0.5,),
        "std": (0.5,),
        "first_conv": first_conv,
        "classifier": classifier,
    }


default_cfgs = generate_default_cfgs(
    {
        "crnn_vgg": _cfg("cnn.conv0", "rnn.1.embedding", 100),
        **dict.fromkeys(COMPACT, _cfg("cnn.0", "head", 128)),
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    kind: type[Reader] = CRNN if name == "crnn_vgg" else CompactCRNN
    sizes = VGG if name == "crnn_vgg" else COMPACT[name]
    return cast(nn.Module, build_model_with_cfg(kind, name, pretrained, **{**sizes, **kwargs}))


register_sizes(__name__, ("crnn_vgg", *COMPACT), _create)
