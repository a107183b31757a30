"""Spiking modules as a network of the core, so that its runs, scores and benchmarks take them.

    modular_snn    as many modules as the route needs, of 256 inputs and 64 neurons each

It has no gradients: its task fits it. Its weights are in float64, in which it was simulated, and
its answer to an image depends on no other image.
"""

from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from smallfry._torch import disable_dynamo
from smallfry.errors import UsageError
from smallfry.kits.places.modules import Calibration, ModularSNN, Settings
from smallfry.models.sources import Source, register_sizes

__all__ = ["SpikingPlaces"]

SOURCE = Source("Hussaini et al. 2023, ICRA", "QVPR/VPRSNN", "MIT")
SIDE = 16


class SpikingPlaces(nn.Module):
    """Scores (images, places) of grey images (images, 1, side, side) in [0, 1].

    Args:
        img_size: Side of the images.
        in_chans: 1.
        num_classes: Places.
        places_per_module: See ``Settings``, as all that follow.
        neurons: Excitatory neurons of a module.
        presentations: Images that a module is shown in training.
        theta_step: Rise of θ with a spike; 0 for automatic.
        dt: Step in ms.
        delays: Delays of synapses.
        regions: contiguous or shuffled.
        members: Modules of a region.
        seed: Seed of weights and spikes; -1 draws one from PyTorch's random state.

    Raises:
        UsageError: Images that are not square or not grey, or a setting out of range.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = SIDE,
        in_chans: int = 1,
        num_classes: int = 2,
        places_per_module: int = 10,
        neurons: int = 64,
        presentations: int = 280,
        theta_step: float = 0.0,
        dt: float = 0.5,
        delays: bool = False,
        regions: Literal["contiguous", "shuffled"] = "contiguous",
        members: int = 1,
        seed: int = -1,
    ) -> None:
        super().__init__()
        own = int(torch.randint(2**31, ())) if seed < 0 else seed
        sides = {img_size} if isinstance(img_size, int) else {*img_size}
        if in_chans != 1 or len(sides) != 1:
            raise UsageError("places have square grey images: leave out channels, and give a side")
        self.settings = Settings(
            places_per_module=places_per_module,
            neurons=neurons,
            side=sides.pop(),
            presentations=presentations,
            theta_step=theta_step,
            dt=dt,
            delays=delays,
            regions=regions,
            members=members,
            seed=own,
        )
        self.num_classes = num_classes
        modules, inputs = len(ModularSNN(self.settings).regions(num_classes)), self.settings.side**2
        numbers = torch.zeros(modules, inputs, neurons, dtype=torch.float64)
        self.weights = nn.Parameter(numbers, requires_grad=False)
        empty = torch.zeros(modules, neurons, dtype=torch.float64)
        self.register_buffer("theta", empty)
        self.register_buffer("assignment", torch.full(empty.shape, -1))
        self.register_buffer("activity", torch.zeros(empty.shape, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed", torch.tensor(own))
        late = (modules, inputs, neurons) if delays else (0, inputs, neurons)
        self.register_buffer("delays", torch.zeros(late, dtype=torch.int64))

    @property
    def modules_of_places(self) -> ModularSNN:
        """Modules, with copies of the weights."""
        found = ModularSNN(replace(self.settings, seed=int(_array(self.seed))))
        found.places = self.num_classes
        found.weights = self.weights.detach().double().cpu().numpy().copy()
        found.theta = _array(self.theta).astype(np.float64)
        found.assignment, found.activity = _array(self.assignment), _array(self.activity)
        found.delays, found.threshold = _array(self.delays), int(_array(self.threshold))
        return found

    def take(self, modules: ModularSNN) -> None:
        """Take over fitted modules."""
        with torch.no_grad():
            self.weights.copy_(torch.from_numpy(modules.weights))
            for name in ("theta", "assignment", "activity", "delays"):
                cast(Tensor, getattr(self, name)).copy_(torch.from_numpy(getattr(modules, name)))
            cast(Tensor, self.threshold).fill_(modules.threshold)

    def fit(
        self, references: Tensor, queries: Tensor, truth: Tensor
    ) -> tuple[ModularSNN, Calibration | None]:
        """Fit the modules to traverses, and calibrate them, if there are queries.

        Args:
            references: (traverses, places, side, side), 0 to 255.
            queries: Calibration images (queries, side, side), 0 to 255.
            truth: Their places.
        """
        modules = ModularSNN(self.modules_of_places.settings).fit(references.numpy())
        found = None
        if len(queries):
            places = truth.numpy()
            found = modules.calibrate(queries.numpy(), places, np.unique(places))
        self.take(modules)
        return modules, found

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores of places; 0 for none.

        Raises:
            UsageError: An export, for which there are no operators.
        """
        if torch.compiler.is_exporting():
            raise UsageError(
                "spiking modules are simulated step by step, and have no graph to be exported"
            )
        return self._simulated(images)

    @disable_dynamo  # which would trace every step
    def _simulated(self, images: Tensor) -> Tensor:
        grey = np.rint(255 * images.detach().double().cpu().numpy()[:, 0])
        modules = self.modules_of_places
        scores = modules.scores(modules.respond(grey))
        return torch.from_numpy(scores).to(images.device, images.dtype)


def _array(buffer: Any) -> Any:
    return cast(Tensor, buffer).cpu().numpy().copy()


default_cfgs = generate_default_cfgs(
    {
        "modular_snn": {
            "num_classes": 2,
            "input_size": (1, SIDE, SIDE),
            "fixed_input_size": True,
            "mean": (0.0,),
            "std": (1.0,),
            "first_conv": None,
            "classifier": None,
        }
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    return cast(nn.Module, build_model_with_cfg(SpikingPlaces, name, pretrained, **kwargs))


register_sizes(__name__, ("modular_snn",), _create)
