"""Neural operators: MgNO, of multigrid convolutions, and FNO, of products in Fourier space.

    MgNO   u ← act(multigrid_i(u) + conv1×1_i(u)),  i = 1 … layers;  then a 1×1 convolution
    FNO    v ← conv1×1(x);  v ← act(spectral_i(v) + conv1×1_i(v));  then two 1×1 convolutions

Both give fields (batch, outputs, height, width) in physical units: what the last layer computes,
times the standard deviation of the training fields plus their mean, which are buffers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.layers.multigrid import MultigridConv2d, PaddingMode
from smallfry.models.sources import Source, register_sizes

__all__ = ["FNO2d", "MgNO", "SpectralConv2d"]

SOURCE = {
    "mgno_*": Source("He et al. 2024, ICLR, arXiv 2310.19809", "xlliu2017/MgNO", "MIT"),
    "fno_*": Source(
        "Li et al. 2021, ICLR, arXiv 2010.08895", "neuraloperator/neuraloperator", "MIT"
    ),
}


class Operator(nn.Module):
    """Base of neural operators: the scale of the fields, and timm's manner.

    Args:
        img_size: Height and width of the grid.
        in_chans: Fields given.
        num_classes: Fields wanted.
    """

    output_mean: Tensor
    output_std: Tensor
    head: nn.Module

    def __init__(self, img_size: int | tuple[int, int], in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (*img_size,)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.register_buffer("output_mean", torch.zeros(num_classes, 1, 1))
        self.register_buffer("output_std", torch.ones(num_classes, 1, 1))

    @torch.no_grad()
    def fit_outputs(self, fields: Tensor) -> None:
        """Set the scale of the outputs from training fields (samples, outputs, height, width)."""
        flat = fields.double().transpose(0, 1).flatten(1)
        self.output_mean.copy_(flat.mean(1)[:, None, None])
        self.output_std.copy_(flat.std(1, correction=0).clamp(min=1e-12)[:, None, None])

    def forward_features(self, fields: Tensor) -> Tensor:
        """Compute the features that the last layer reads."""
        raise NotImplementedError

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute fields in physical units of features."""
        if pre_logits:
            return features
        found: Tensor = self.head(features) * self.output_std + self.output_mean
        return found

    def forward(self, fields: Tensor) -> Tensor:
        """Compute fields (batch, outputs, height, width) of fields (batch, in_chans, …)."""
        return self.forward_head(self.forward_features(fields))

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    def _replace_head(self, head: nn.Module, num_classes: int) -> None:
        """Take another last layer, whose outputs have no scale yet."""
        self.num_classes, self.head = num_classes, head.to(self.output_mean)
        self.output_mean = self.output_mean.new_zeros(num_classes, 1, 1)
        self.output_std = self.output_std.new_ones(num_classes, 1, 1)


class MgNO(Operator):
    """Multigrid neural operator.

    Args:
        img_size: Height and width of the grid.
        in_chans: Fields given.
        num_classes: Fields wanted.
        layers: Multigrid layers.
        channels: Channels, U.
        iterations: Of every layer; see ``MultigridConv2d``.
        activation: By timm's name; GELU is the exact one.
        padding_mode: Of smoothing and restriction.
        bias: Of smoothing.
        norm: LayerNorm of each level.
        skip: Add a 1×1 convolution to each layer.
        add_input: Predict the change of the input, in its units.
        transfer_periodic: See ``MultigridConv2d``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 1,
        num_classes: int = 1,
        layers: int = 3,
        channels: int = 12,
        iterations: Sequence[tuple[int, int]] = ((1, 0), (1, 0), (1, 0), (2, 0)),
        activation: str = "gelu",
        padding_mode: PaddingMode = "zeros",
        bias: bool = False,
        norm: bool = False,
        skip: bool = True,
        add_input: bool = False,
        transfer_periodic: bool = True,
    ) -> None:
        super().__init__(img_size, in_chans, num_classes)
        if layers < 1:
            raise UsageError(f"an operator has at least one layer, not {layers}")
        if add_input:
            _require_as_many(in_chans, num_classes)
        self.num_features = self.head_hidden_size = channels
        self.add_input = add_input
        widths = [in_chans, *[channels] * (layers - 1)]
        pairs = [(int(before), int(after)) for before, after in iterations]
        self.layers = nn.ModuleList(
            MultigridConv2d(
                width,
                channels,
                pairs,
                self.img_size,
                padding_mode,
                bias=bias,
                norm=norm,
                transfer_periodic=transfer_periodic,
            )
            for width in widths
        )
        self.skips = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths if skip)
        try:
            self.act = cast(nn.Module, cast(Any, get_act_layer(activation))())
        except KeyError:
            raise UsageError(f"timm has no activation '{activation}'; one is gelu") from None
        self.head = nn.Conv2d(channels, num_classes, 1, bias=False)

    def forward_features(self, fields: Tensor) -> Tensor:
        """Compute (batch, channels, height, width)."""
        u = fields
        for number, layer in enumerate(self.layers):
            straight = self.skips[number](u) if self.skips else 0.0
            u = self.act(layer(u) + straight)
        return u

    def forward(self, fields: Tensor) -> Tensor:
        """Compute fields (batch, outputs, height, width) of fields (batch, in_chans, …)."""
        found = super().forward(fields)
        return found + fields if self.add_input else found

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by one of other fields.

        Raises:
            UsageError: Another number of fields, where the input is added to them.
        """
        if self.add_input:
            _require_as_many(self.in_chans, num_classes)
        head = nn.Conv2d(self.num_features, num_classes, 1, bias=False)
        self._replace_head(head, num_classes)


def _require_as_many(given: int, wanted: int) -> None:
    if given != wanted:
        raise UsageError(f"add_input needs as many fields out as in, not {wanted} of {given}")


class SpectralConv2d(nn.Module):
    """Product with complex weights of the lowest frequencies.

    Args:
        in_channels: Channels given.
        out_channels: Channels wanted.
        modes: Frequencies kept of each sign along the rows, and along the columns from 0.

    Example:
        >>> SpectralConv2d(2, 3, 4)(torch.zeros(1, 2, 16, 16)).shape
        torch.Size([1, 3, 16, 16])
    """

    def __init__(self, in_channels: int, out_channels: int, modes: int) -> None:
        super().__init__()
        self.modes, self.out_channels = modes, out_channels
        scale = (2 / (in_channels + out_channels)) ** 0.5
        shape = (2, in_channels, out_channels, modes, modes, 2)  # both signs; real, imaginary
        self.weight = nn.Parameter(scale * torch.randn(shape) / 2**0.5)

    def forward(self, v: Tensor) -> Tensor:
        """Return (batch, out_channels, height, width)."""
        height, width, modes = v.shape[-2], v.shape[-1], self.modes
        if 2 * modes > height or modes > width // 2 + 1:
            raise UsageError(
                f"{modes} modes need a grid of {2 * modes} points per side, not {height}×{width}"
            )
        seen = torch.fft.rfft2(v.float() if v.dtype == torch.bfloat16 else v, norm="forward")
        low = torch.stack([seen[..., :modes, :modes], seen[..., -modes:, :modes]])
        weight = torch.view_as_complex(self.weight)
        mixed = torch.einsum("sbikl,siokl->sbokl", low, weight.to(low.dtype))
        wide = seen.new_zeros(len(v), self.out_channels, height, width // 2 + 1)
        wide[..., :modes, :modes] = mixed[0]
        wide[..., -modes:, :modes] = mixed[1]
        found: Tensor = torch.fft.irfft2(wide, s=(height, width), norm="forward").to(v)
        return found


class FNO2d(Operator):
    """Fourier neural operator, the peer of MgNO at equal parameters.

    Coordinates of the grid are given as two more fields.

    Args:
        img_size: Height and width of the grid.
        in_chans: Fields given.
        num_classes: Fields wanted.
        layers: Spectral layers.
        width: Channels.
        modes: See ``SpectralConv2d``.
        hidden: Channels before the last layer.

    Raises:
        UsageError: No layers, or fields of another grid.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 1,
        num_classes: int = 1,
        layers: int = 3,
        width: int = 18,
        modes: int = 4,
        hidden: int = 32,
    ) -> None:
        super().__init__(img_size, in_chans, num_classes)
        if layers < 1:
            raise UsageError(f"an operator has at least one layer, not {layers}")
        self.num_features = self.head_hidden_size = hidden
        self.lift = nn.Conv2d(in_chans + 2, width, 1)
        self.spectral = nn.ModuleList(SpectralConv2d(width, width, modes) for _ in range(layers))
        self.skips = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers))
        self.act = nn.GELU()
        self.project = nn.Conv2d(width, hidden, 1)
        self.head = nn.Conv2d(hidden, num_classes, 1)
        rows, columns = (torch.linspace(0, 1, n) for n in self.img_size)
        self.register_buffer("grid", torch.stack(torch.meshgrid(rows, columns, indexing="ij")))

    def forward_features(self, fields: Tensor) -> Tensor:
        """Compute (batch, hidden, height, width)."""
        if fields.shape[-2:] != self.img_size:
            sizes = ("×".join(map(str, each)) for each in (self.img_size, fields.shape[-2:]))
            raise UsageError("the network was built for grids of {}, not {}".format(*sizes))
        grid = cast(Tensor, self.grid).to(fields).expand(len(fields), -1, -1, -1)
        v = self.lift(torch.cat([fields, grid], dim=1))
        last = len(self.spectral) - 1
        for number, (spectral, skip) in enumerate(zip(self.spectral, self.skips, strict=True)):
            v = spectral(v) + skip(v)
            v = self.act(v) if number < last else v
        return cast(Tensor, self.act(self.project(v)))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by one of other fields."""
        self._replace_head(nn.Conv2d(self.num_features, num_classes, 1), num_classes)


DOWN = (1, 0)
MGNO: Mapping[str, Mapping[str, Any]] = {  # parameters for one field in, one out
    # 64,851
    "mgno_tiny": {"layers": 3, "channels": 12, "iterations": (DOWN, DOWN, DOWN, (2, 0))},
    # 467,964
    "mgno_darcy_5": {"layers": 4, "channels": 24, "iterations": (*(DOWN,) * 4, (2, 0))},
    # 572,661
    "mgno_darcy": {"layers": 4, "channels": 24, "iterations": (*(DOWN,) * 5, (2, 0))},
    # 678,093 on 211×211
    "mgno_darcy_smooth": {"layers": 5, "channels": 24, "iterations": (*(DOWN,) * 5, (2, 0))},
    # 783,876 of two fields
    "mgno_pipe": {"layers": 5, "channels": 24, "iterations": (*(DOWN,) * 4, (1, 1), (2, 0))},
    # 2,885,194 on 64×64
    "mgno_ns": {
        "layers": 5,
        "channels": 32,
        "iterations": (DOWN, DOWN, DOWN, (2, 0), (2, 0)),
        "padding_mode": "circular",
        "bias": True,
        "norm": True,
        "skip": False,
        "add_input": True,
    },
}
FNO: Mapping[str, Mapping[str, Any]] = {
    "fno_tiny": {"layers": 3, "width": 18, "modes": 4, "hidden": 32},  # 63,947
}
SIDES = {"mgno_darcy": 256, "mgno_darcy_5": 64, "mgno_darcy_smooth": 211, "mgno_pipe": 128}
SIDES |= {"mgno_ns": 64}


def checkpoint_filter_fn(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the weights of the authors' networks, and of their single layers."""
    found = {}
    for name, value in weights.items():
        name = re.sub(r"(^|\.)conv_list\.", r"\1layers.", name)
        name = re.sub(r"(^|\.)linear_list\.", r"\1skips.", name)
        name = re.sub(r"^linear\.", "head.", name)
        name = re.sub(r"RTlayers\.(\d+)\.", r"up.\1.transfer.", name)
        name = re.sub(r"post_smooth_layer(\d+)\.", r"post.\1.", name)
        name = re.sub(r"(^|\.)layer0\.", r"\1pre.0.", name)
        name = re.sub(r"(^|\.)layer(\d+)\.(\d+)\.", _of_coarser, name)
        found[name] = value
    return found


def _of_coarser(match: re.Match[str]) -> str:
    before, level, place = match[1], int(match[2]), int(match[3])
    if place == 0:
        return f"{before}down.{level - 1}."
    return f"{before}pre.{level}.{place - 1}."


def _cfg(side: int, first_conv: str) -> dict[str, Any]:
    return {
        "num_classes": 1,
        "input_size": (1, side, side),
        "fixed_input_size": True,
        "mean": (0.0,),
        "std": (1.0,),
        "first_conv": first_conv,
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {
        **{name: _cfg(SIDES.get(name, 32), "layers.0.pre.0.0.S") for name in MGNO},
        **{name: _cfg(32, "lift") for name in FNO},
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    kind: type[Operator] = MgNO if name in MGNO else FNO2d
    sizes = MGNO[name] if name in MGNO else FNO[name]
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    settings = {"img_size": SIDES.get(name, 32), **sizes, **kwargs}
    return build(kind, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **settings)


register_sizes(__name__, (*MGNO, *FNO), _create)
