"""CheckerPose: where keypoints of an object are in a picture, bit after bit.

A keypoint's place is the cell of a grid. First bits come from a coarse map of features, each
following bit of x and y from a map twice as fine, read where the bits before point to; graph
convolutions over the nearest keypoints on the object join them (Lian & Ling, ICCV 2023, section 3).

Ours is the mean place of a keypoint by its map of first features, which training draws to the true
place: the compact network reads bits from its sines, too, whose signs they are.

    checkerpose_s          compact, ours: 128 keypoints, 5 bits, images of 128×128
    checkerpose_resnet34   the paper's on timm's ResNet-34: 512 keypoints, 6 bits, 256×256
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.kits.pose.mesh import generated_mesh, keypoints, nearest_neighbours, normalised
from smallfry.models.pooling import largest
from smallfry.models.sources import Source, register_sizes

__all__ = ["CheckerPose", "EdgeConvolution", "PoseCodes", "RefineStep"]

SOURCE = Source("Lian & Ling 2023, ICCV, arXiv 2303.16874", "RuyiLian/CheckerPose", "none")
FIRST = 3  # bits of the first codes: 8 cells a side
LOCAL = 2  # side of the kernel of local features, and of the square that they are read at
FILTERS = 64  # of the first graph convolutions
WIDTHS = (16, 32, 64, 96)  # of the compact backbone
BLOCKS = (1, 2, 3)  # residual blocks at strides 4, 8 and 16
WIDE = 32  # channels above which their kernels are of 5×5 pixels: the last see the whole crop
SIZES: Mapping[str, Mapping[str, Any]] = {
    "checkerpose_s": {
        "points": 128,
        "neighbours": 12,
        "bits": 5,
        "filters": 64,
        "query": (64, 32),
        "graph_layers": 2,
        "waves": True,
    },
    "checkerpose_resnet34": {
        "backbone": "resnet34",
        "points": 512,
        "neighbours": 20,
        "bits": 6,
        "filters": 256,
        "query": (256, 64),
        "graph_layers": 3,
    },
}


class PoseCodes(NamedTuple):
    """Outputs: logits of a keypoint's bits, most significant first, and masks of the object."""

    in_roi: Tensor  # (batch, 1, points): the keypoint is in the crop, seen or hidden
    x: Tensor  # (batch, bits, points)
    y: Tensor  # (batch, bits, points)
    masks: Tensor  # (batch, 2, cells, cells): what is seen of the object, and all of it
    points: Tensor  # (batch, points, 3), metres: the keypoints, which are no prediction
    places: Tensor  # (batch, 2, points): mean column and row, as shares of the crop's side


class EdgeConvolution(nn.Module):
    """Convolution over the neighbours of points in a fixed graph: max of f(x_j − x_i, x_i).

    The 1×1 convolution of pairs is linear, so that it runs on points and not on pairs, which gives
    the same values in fewer operations.

    Args:
        inputs: Channels.
        outputs: Channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * inputs, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, features: Tensor, neighbours: Tensor) -> Tensor:
        """Return (batch, outputs, points) of features (batch, inputs, points)."""
        points, count = neighbours.shape
        nothing = torch.zeros_like(features)
        pairs = torch.cat(
            [torch.cat([features, nothing], 1), torch.cat([-features, features], 1)], 2
        )
        mapped = self.conv(pairs[..., None])[..., 0]
        others = mapped[..., :points].index_select(2, neighbours.reshape(-1))
        edges = others.unflatten(2, (points, count)) + mapped[..., points:, None]
        return largest(self.act(self.norm(edges)), dims=(3,))


class LocalFeature(nn.Module):
    """Features of four places of a map around a cell twice as large as its own.

    Args:
        inputs: Channels of the map.
        outputs: Channels, a quarter from each place.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.patch_generator = nn.Conv2d(inputs, outputs // 4, LOCAL, padding=LOCAL - 1)

    def forward(self, features: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Read a map (batch, channels, side, side) at cells (batch, points) of half its side."""
        patches = self.patch_generator(features)
        width = patches.shape[-1]
        flat = patches.flatten(2)
        read = []
        for right, down in ((0, 0), (0, LOCAL), (LOCAL, 0), (LOCAL, LOCAL)):
            place = (2 * y + down) * width + 2 * x + right
            read.append(flat.gather(2, place[:, None].expand(-1, flat.shape[1], -1)))
        return torch.cat(read, dim=1)


class RefineStep(nn.Module):
    """Next bit of x and of y of every keypoint.

    Args:
        image: Channels of the map of features.
        graph: Channels of the keypoints' features before.
        filters: Channels of the keypoints' features after.
        query: Hidden units of the last layers.
        graph_layers: Edge convolutions.
    """

    def __init__(
        self, image: int, graph: int, filters: int, query: Sequence[int], graph_layers: int
    ) -> None:
        super().__init__()
        self.local = LocalFeature(image, filters)
        self.before = nn.Sequential(
            nn.Linear(filters + graph, filters),
            nn.LeakyReLU(0.01),
            nn.Linear(filters, filters),
            nn.LeakyReLU(0.01),
        )
        self.graph = nn.ModuleList(EdgeConvolution(filters, filters) for _ in range(graph_layers))
        layers: list[nn.Module] = []
        width = filters
        for hidden in query:
            layers += [nn.Linear(width, hidden), nn.LeakyReLU(0.01)]
            width = hidden
        self.query = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(
        self, image: Tensor, graph: Tensor, inside: Tensor, cells: Tensor, neighbours: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute logits (batch, 2, points), and features (batch, filters, points).

        Args:
            image: Map (batch, channels, side, side), twice as fine as the cells.
            graph: (batch, features, points).
            inside: (batch, points), 0 or 1: the keypoint is in the crop.
            cells: x and y (2, batch, points), int64.
            neighbours: (points, neighbours), int64.
        """
        read = self.local(image, cells[0], cells[1]) * inside[:, None]
        mixed = self.before(torch.cat([read, graph], dim=1).transpose(1, 2)).transpose(1, 2)
        for layer in self.graph:
            mixed = layer(mixed, neighbours)
        return self.query(mixed.transpose(1, 2)).transpose(1, 2), mixed


class Upsample(nn.Module):
    """Map of features twice as fine.

    Args:
        inputs: Channels.
        outputs: Channels.
        first: Learned up-sampling, of the coarsest map; else a bilinear one.
        early: The first convolution runs before the bilinear up-sampling, at a quarter of the cost.
    """

    def __init__(self, inputs: int, outputs: int, first: bool, early: bool) -> None:
        super().__init__()
        if first:
            larger = nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, 1, bias=False)
            self.larger = nn.Sequential(larger, nn.BatchNorm2d(outputs), nn.ReLU())
        else:
            self.larger = nn.Sequential(nn.UpsamplingBilinear2d(scale_factor=2))
        self.one = _conv(outputs if first else inputs, outputs)
        self.other = _conv(outputs, outputs)
        self.early = early and not first

    def forward(self, features: Tensor) -> Tensor:
        """Return (batch, outputs, 2 side, 2 side)."""
        if self.early:
            return cast(Tensor, self.other(self.larger(self.one(features))))
        return cast(Tensor, self.other(self.one(self.larger(features))))


class CheckerPose(nn.Module):
    """Codes of the keypoints of one object.

    Args:
        in_chans: Channels of images.
        num_classes: Objects: one a network.
        img_size: Side of images, 16 times 8 pixels with the compact backbone, else 32 times 8.
        keypoints: (points, 3), metres, as nested lists; empty takes those of ``shape``.
        shape: Number of the generated object that the keypoints are of.
        points: Keypoints, where none are given.
        neighbours: Nearest keypoints, itself included, in graph convolutions.
        bits: Of x and of y: 2^bits cells a side.
        filters: Channels of refined features.
        query: Hidden units of the last layers of a step.
        graph_layers: Edge convolutions of a step.
        backbone: timm's name of a network with features; "" for the compact one.
        waves: Bits are read from waves of the mean places, too; ours.
        coarse: Pictures of training during which first bits and places are computed alone, at a
            third of the cost; the others' logits are 0 meanwhile. The published network is trained
            so for 50,000 steps. Each of several processes counts its own pictures.

    Raises:
        UsageError: Several classes, another size of images, or keypoints of another form.
    """

    neighbours: Tensor
    keypoints: Tensor
    trained: Tensor

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        img_size: int | tuple[int, int] = 128,
        keypoints: Sequence[Sequence[float]] = (),
        shape: int = 0,
        points: int = 128,
        neighbours: int = 12,
        bits: int = 5,
        filters: int = 64,
        query: Sequence[int] = (64, 32),
        graph_layers: int = 2,
        backbone: str = "",
        waves: bool = False,
        coarse: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.bits = num_classes, in_chans, bits
        chosen = torch.tensor(list(keypoints) or _of_shape(shape, points), dtype=torch.float64)
        stride = 32 if backbone else 16
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if num_classes != 1:
            raise UsageError(f"a pose network serves one object, not {num_classes}: train one each")
        if height != width or height != stride << FIRST:
            raise UsageError(
                f"this pose network reads crops of {stride << FIRST}×{stride << FIRST} pixels, not "
                f"{height}×{width}: set data.image_size {stride << FIRST}"
            )
        if chosen.ndim != 2 or chosen.shape[1] != 3 or not neighbours <= len(chosen) <= 4096:
            raise UsageError(
                f"model.options.keypoints is a list of {neighbours} to 4,096 points [x, y, z] in "
                f"metres, got shape {tuple(chosen.shape)}"
            )
        graph = nearest_neighbours(normalised(chosen.numpy()), neighbours)
        self.register_buffer("neighbours", torch.from_numpy(graph))
        self.register_buffer("keypoints", chosen.float())
        self.coarse = coarse
        self.register_buffer("trained", torch.zeros((), dtype=torch.int64))  # pictures
        self.backbone, widths = _backbone(backbone, in_chans, bits - FIRST)
        self.first = nn.Conv2d(widths[-1], len(chosen), 1)
        self.graph = nn.ModuleList(EdgeConvolution(FILTERS, FILTERS) for _ in range(2))
        self.waves = waves
        more = 4 * bits if waves else 0  # a sine and a cosine of x and of y for each bit
        self.codes = nn.Linear(FILTERS + more, 1 + 2 * FIRST)
        steps = range(bits - FIRST)
        self.larger = nn.ModuleList(
            Upsample(filters + widths[-1 - i] if i else widths[-1], filters, i == 0, not backbone)
            for i in steps
        )
        self.steps = nn.ModuleList(
            RefineStep(filters, (filters if i else FILTERS) + more, filters, query, graph_layers)
            for i in steps
        )
        self.masks = nn.Conv2d(filters, 2, 1)

    def forward(self, images: Tensor) -> PoseCodes:
        """Compute the codes of images (batch, channels, side, side)."""
        maps = self.backbone(images)
        heat = self.first(maps[-1])
        places = mean_places(heat)
        waves = waves_of(places, self.bits) if self.waves else places[:, :0]
        features = heat.flatten(2).transpose(1, 2)
        for layer in self.graph:
            features = layer(features, self.neighbours)
        first = self.codes(torch.cat([features, waves], dim=1).transpose(1, 2)).transpose(1, 2)
        bits = [*first[:, 1:].unflatten(1, (2, FIRST)).transpose(0, 1).unbind(2)]  # (2, batch, n)
        inside = (first[:, 0] > 0).to(first.dtype)
        cells = torch.zeros_like(bits[0], dtype=torch.int64)
        for bit in bits:
            cells = 2 * cells + (bit > 0)
        points = self.keypoints.to(first.dtype).expand(images.shape[0], -1, -1)
        if self.training and self.trained < self.coarse:
            self.trained += len(images)
            nothing = torch.zeros_like(bits[0])
            x, y = torch.stack([*bits, *[nothing] * len(self.steps)], dim=2).unbind(0)
            side = maps[-1].shape[-1] << len(self.steps)
            return PoseCodes(
                first[:, :1], x, y, first.new_zeros(len(x), 2, side, side), points, places
            )
        image = maps[-1]
        for i, (larger, step) in enumerate(zip(self.larger, self.steps, strict=True)):
            image = larger(torch.cat([image, maps[-1 - i]], dim=1) if i else image)
            features = torch.cat([features, waves], dim=1)
            found, features = step(image, features, inside, cells, self.neighbours)
            bits.append(found.transpose(0, 1))
            cells = 2 * cells + (bits[-1] > 0)
        x, y = torch.stack(bits, dim=2).unbind(0)
        return PoseCodes(first[:, :1], x, y, self.masks(image), points, places)


def mean_places(heat: Tensor) -> Tensor:
    """Compute the mean column and row of a softmax over each map, as shares of its side.

    Args:
        heat: (batch, points, side, side).

    Returns:
        (batch, 2, points), from half a cell to the side less half a cell.
    """
    side = heat.shape[-1]
    shares = heat.flatten(2).softmax(dim=2).reshape(heat.shape)
    middles = (torch.arange(side, device=heat.device, dtype=heat.dtype) + 0.5) / side
    return torch.stack([shares.sum(dim=over) @ middles for over in (2, 3)], dim=1)


def waves_of(places: Tensor, bits: int) -> Tensor:
    """Compute sines and cosines of places; bit k of a place is 1 where its sine is below 0.

    Args:
        places: (batch, 2, points), shares of the crop's side.
        bits: Waves, of which each is half as long as the one before.

    Returns:
        (batch, 4 bits, points).
    """
    angles = [2 * math.pi * 2**bit * places for bit in range(bits)]
    return torch.cat([wave for a in angles for wave in (a.sin(), a.cos())], dim=1)


class Block(nn.Module):
    """Inverted residual block: a depthwise convolution, twice as many channels, and back.

    Args:
        width: Channels.
        kernel: Side of the depthwise convolution.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, 2 * width, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return a map of the same form."""
        return features + cast(Tensor, self.body(features))


class CompactBackbone(nn.Module):
    """Inverted residual blocks, with maps of strides 4, 8 and 16.

    Args:
        in_chans: Channels of images.
        widths: Channels of the maps at strides 2, 4, 8 and 16.
    """

    def __init__(self, in_chans: int, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, widths[0], 3, 2, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, 3, 2, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                *(Block(width, 5 if width > WIDE else 3) for _ in range(blocks)),
            )
            for (before, width), blocks in zip(pairwise(widths), BLOCKS, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps, fine to coarse."""
        features = self.stem(images)
        maps = []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        return maps


def _backbone(name: str, in_chans: int, steps: int) -> tuple[nn.Module, Sequence[int]]:
    if not name:
        return CompactBackbone(in_chans), WIDTHS[1:]
    last = range(5 - max(1, steps), 5)
    made = timm.create_model(name, features_only=True, in_chans=in_chans, out_indices=tuple(last))
    return made, made.feature_info.channels()


def _of_shape(shape: int, points: int) -> list[list[float]]:
    found: list[list[float]] = keypoints(generated_mesh(shape), points).tolist()
    return found


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _cfg(first_conv: str, side: int) -> dict[str, Any]:
    return {
        "num_classes": 1,
        "input_size": (3, side, side),
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "first_conv": first_conv,
        "classifier": "codes",
    }


default_cfgs = generate_default_cfgs(
    {
        "checkerpose_s": _cfg("backbone.stem.0", 128),
        "checkerpose_resnet34": _cfg("backbone.conv1", 256),
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    settings = {**SIZES[name], **kwargs}
    return cast(nn.Module, build_model_with_cfg(CheckerPose, name, pretrained, **settings))


register_sizes(__name__, SIZES, _create)
