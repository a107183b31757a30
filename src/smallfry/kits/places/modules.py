"""ModularSNN: many small spiking modules, each with a region of its own, trained independently.

A module is shown its places again and again, with silence between. Its neurons then take the place
they answer most to. A query is shown to all modules, and the place with the greatest mean count of
spikes of its neurons is its match. Neurons that answer to many places of the whole route are
hyperactive; which of them are silenced is chosen on a calibration part of a query traverse.
Hussaini et al., ICRA 2023.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.data.philox import generator
from smallfry.errors import DataError, UsageError
from smallfry.kits.places.images import firing_rates
from smallfry.kits.places.neurons import DRIVE, Layer, Plasticity, normalise_weights
from smallfry.kits.places.presentation import AFTER, BEFORE, SHOWN, image_spikes, present
from smallfry.kits.places.scores import NOWHERE, place_scores, recall_at

__all__ = ["THRESHOLDS", "Calibration", "Matches", "ModularSNN", "Settings"]

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
THRESHOLDS = (0, 3, 5, 8, 10, 15, 20, 30, 40, 60, 80, 100, 120, 140, 160, 180, 200)  # 0 is off
LATEST = 250  # presentations of training that neurons are assigned by
CACHED = 2**14  # neurons at a time, whose state fits a core's cache
FEWEST = 50  # calibration places below which a threshold is chosen by chance


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of modules.

    Args:
        places_per_module: Places of a region; the last module may have fewer.
        neurons: Excitatory neurons of a module.
        side: Side of the images in pixels.
        presentations: Images that a module is shown in training, all of its region in turn.
        theta_step: Rise of θ with a spike in mV; 0 takes 20 / (60 + 17 presentations / neurons).
        dt: Step in ms.
        delays: Delays of 0 to 10 ms, each synapse its own, as published; slower by far.
        regions: ``contiguous``, or ``shuffled``, random sets of places.
        members: Modules of each region, whose scores are added.
        seed: Seed of everything.

    Raises:
        UsageError: A value out of range.
    """

    places_per_module: int = 10
    neurons: int = 64
    side: int = 16
    presentations: int = 280
    theta_step: float = 0.0
    dt: float = 0.5
    delays: bool = False
    regions: Literal["contiguous", "shuffled"] = "contiguous"
    members: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("places_per_module", 1, 1000),
            ("neurons", 2, 2000),
            ("side", 4, 64),
            ("presentations", 1, 1_000_000),
            ("members", 1, 100),
        ):
            if not least <= getattr(self, name) <= most:
                raise UsageError(f"{name} is {least} to {most:,}, got {getattr(self, name)}")
        if self.theta_step < 0:
            raise UsageError(f"theta_step is 0 for automatic, or more, got {self.theta_step}")
        if not 0.05 <= self.dt <= 0.5:
            raise UsageError(f"dt is 0.05 to 0.5 ms, half of the shortest decay, got {self.dt}")
        if self.regions not in ("contiguous", "shuffled"):
            raise UsageError(f"regions is contiguous or shuffled, got '{self.regions}'")

    @property
    def rise(self) -> float:
        """Rise of θ with a spike, in mV."""
        return self.theta_step or 20 / (60 + 17 * self.presentations / self.neurons)

    @property
    def most(self) -> float:
        """Greatest weight: 1, or more where few inputs give the drive."""
        return max(1.0, 4 * DRIVE / self.side**2)


class Matches(NamedTuple):
    """Places of queries."""

    scores: Floats  # (queries, places)
    best: Counts  # (queries,); -1 without a match
    confidence: Floats  # (queries,), the best score


class Calibration(NamedTuple):
    """Choice of the threshold of hyperactive neurons."""

    threshold: int  # images; 0 silences none
    recalls: dict[int, float]  # recall@1 on the calibration part, by threshold
    queries: int


@dataclass
class ModularSNN:
    """Spiking modules of a route.

    Example:
        >>> route = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8))
        >>> small = Settings(places_per_module=2, neurons=8, side=8, presentations=8)
        >>> ModularSNN(small).fit(route).match(route[0]).scores.shape
        (4, 4)
    """

    settings: Settings

    def __post_init__(self) -> None:
        self.places = 0
        self.weights: Floats = np.empty((0, 0, 0))  # (modules, inputs, neurons)
        self.theta: Floats = np.empty((0, 0))  # (modules, neurons)
        self.delays: Counts = np.empty((0, 0, 0), np.int64)  # steps; empty for none
        self.assignment: Counts = np.empty((0, 0), np.int64)  # (modules, neurons)
        self.activity: Counts = np.empty((0, 0), np.int64)  # images that a neuron answers to
        self.recorded: Counts = np.empty((0, 0, 0), np.int64)  # responses to the first reference
        self.threshold = 0

    @property
    def silenced(self) -> NDArray[np.bool_]:
        """Neurons that are hyperactive, (modules, neurons)."""
        if self.threshold == 0:
            return np.zeros(self.activity.shape, np.bool_)
        found: NDArray[np.bool_] = self.activity >= self.threshold
        return found

    @property
    def unreachable(self) -> list[int]:
        """Places that can't be matched: without a neuron, or all of theirs silenced."""
        awake = {*self.assignment[~self.silenced].tolist()}
        return [place for place in range(self.places) if place not in awake]

    def regions(self, places: int) -> list[Counts]:
        """Divide places into regions; each is that of ``members`` modules in turn."""
        order = np.arange(places)
        if self.settings.regions == "shuffled":
            order = _random(self.settings.seed, 2).permutation(places)
        size = self.settings.places_per_module
        parts = [np.sort(order[start : start + size]) for start in range(0, places, size)]
        return [part for part in parts for _ in range(self.settings.members)]

    def fit(
        self, references: NDArray[Any] | Sequence[NDArray[Any]], chosen: Iterable[int] | None = None
    ) -> "ModularSNN":
        """Train all modules, assign their neurons, and record what they answer to.

        Args:
            references: Grey images (traverses, places, side, side), place by place the same.
            chosen: Numbers of the modules to train, which are then the only ones; for a machine
                with several cores. A module is the same whichever others are trained with it.

        Raises:
            DataError: Traverses of unequal length, or images of another size.
        """
        images = require_traverses(references, self.settings.side)
        self.places = images.shape[1]
        regions = self.regions(self.places)
        numbers = [*range(len(regions))] if chosen is None else [*chosen]
        rates = firing_rates(images)
        shown = [rates[:, regions[number]] for number in numbers]
        self._begin(numbers)
        counts = self._train(shown, numbers)
        self._assign(counts, [regions[number] for number in numbers])
        self.threshold = 0
        self.recorded = self.respond(images[0])
        self.activity = (self.recorded > 0).sum(axis=0)
        return self

    def calibrate(
        self,
        queries: NDArray[Any],
        truth: Counts,
        candidates: Counts | None = None,
        thresholds: Sequence[int] = THRESHOLDS,
    ) -> Calibration:
        """Choose the threshold with the best recall on a calibration part of a query traverse.

        Of equal recalls, that which silences fewest.

        Args:
            queries: Images (queries, side, side), of at least 50 places to mean something.
            truth: Their places.
            candidates: Places that may be matched; default all.
            thresholds: Those that are tried; 0 is off.
        """
        return self.choose_threshold(self.respond(queries), truth, candidates, thresholds)

    def choose_threshold(
        self,
        responses: Counts,
        truth: Counts,
        candidates: Counts | None = None,
        thresholds: Sequence[int] = THRESHOLDS,
    ) -> Calibration:
        """Choose the threshold by responses (queries, modules, neurons); see ``calibrate``."""
        found = dict[int, float]()
        for threshold in thresholds:
            self.threshold = threshold
            found[threshold] = recall_at(self.scores(responses, candidates), truth)
        self.threshold = max(found, key=lambda t: (found[t], t == 0, t))
        return Calibration(self.threshold, found, len(responses))

    def match(self, queries: NDArray[Any], candidates: Counts | None = None) -> Matches:
        """Match queries (queries, side, side) to places, of those that may be matched."""
        scores = self.scores(self.respond(queries), candidates)
        confidence = scores.max(axis=1)
        return Matches(scores, np.where(confidence > 0, scores.argmax(axis=1), -1), confidence)

    def scores(self, responses: Counts, candidates: Counts | None = None) -> Floats:
        """Compute the scores (queries, places) of responses; 0 of places that are no candidates."""
        members, total = self.settings.members, np.zeros((len(responses), self.places))
        for member in range(members):  # each has its own mean, and they are added
            own = slice(member, None, members)
            chosen = responses[:, own]
            flat = chosen.reshape(len(chosen), chosen.shape[1] * chosen.shape[2])
            whose = self.assignment[own].ravel(), self.places, self.silenced[own].ravel()
            total += place_scores(flat, *whose)
        if candidates is not None:
            others = np.setdiff1d(np.arange(self.places), candidates)
            total[:, others] = 0.0
        return total

    def respond(self, images: NDArray[Any]) -> Counts:
        """Count the spikes that images (images, side, side) cause, (images, modules, neurons).

        Learning is off, and each image is shown to neurons at their start, so that a response
        depends on no other image. The spikes of the inputs are a function of seed and image.

        Raises:
            UsageError: The modules are not fitted.
            DataError: Images of another size.
        """
        if not self.weights.size:
            raise UsageError("the modules have learned nothing yet: fit them to traverses first")
        images = require_images(images, self.settings.side)
        dt, found = self.settings.dt, []
        size = max(1, CACHED // max(1, self.theta.size))
        for part in np.array_split(images, max(1, -(-len(images) // size))):
            spikes = image_spikes(part, self.settings.seed, dt)
            found.append(present(spikes, self.weights, self.theta, dt, self.delays))
        return np.concatenate(found)

    def _begin(self, numbers: Sequence[int]) -> None:
        settings = self.settings
        inputs, neurons = settings.side**2, settings.neurons
        weights, delays = [], []
        for number in numbers:
            random = _random(settings.seed, 0, number)
            weights.append((random.random((inputs, neurons)) + 0.01) * 0.3)
            if settings.delays:
                delays.append(np.rint(random.random((inputs, neurons)) * 10 / settings.dt))
        self.weights = np.array(weights)
        self.delays = np.array(delays, np.int64).reshape(-1, inputs, neurons)
        self.theta = np.empty((len(numbers), neurons))

    def _train(self, shown: Sequence[Floats], numbers: Sequence[int]) -> list[list[Any]]:
        """Show each module its images; return the last presentations: places and counts."""
        settings, dt, modules = self.settings, self.settings.dt, len(numbers)
        layer = Layer((modules, settings.neurons), dt, theta_step=settings.rise)
        delays = self.delays if settings.delays else None
        synapses = Plasticity(self.weights, dt, settings.most, delays)
        randoms = [_random(settings.seed, 1, number) for number in numbers]
        nothing = np.zeros((modules, self.weights.shape[1]), np.bool_)
        for _ in range(round(BEFORE / dt)):
            _advance(layer, synapses, nothing)
        steps, silent = round(SHOWN / dt), round(AFTER / dt)
        latest: list[list[Any]] = [[] for _ in numbers]
        for turn in range(settings.presentations):
            normalise_weights(self.weights)
            spikes = np.empty((steps, *nothing.shape), np.bool_)
            for m, (rates, random) in enumerate(zip(shown, randoms, strict=True)):
                each = rates.reshape(-1, rates.shape[-1])[turn % (rates.shape[0] * rates.shape[1])]
                spikes[:, m] = random.random((steps, len(each))) < each * (dt / 1000)
            counts = np.zeros(layer.shape, np.int64)
            for step in range(steps + silent):
                counts += _advance(layer, synapses, spikes[step] if step < steps else nothing)
            if turn >= settings.presentations - LATEST:
                for m, rates in enumerate(shown):
                    latest[m].append((turn % rates.shape[1], counts[m]))
        self.theta = layer.thresholds
        return latest

    def _assign(self, latest: Sequence[list[Any]], regions: Sequence[Counts]) -> None:
        """Give each neuron the place of its region with the greatest mean count."""
        found = np.full(self.theta.shape, NOWHERE, np.int64)
        for m, (each, region) in enumerate(zip(latest, regions, strict=True)):
            places = np.array([place for place, _ in each])
            counts = np.array([count for _, count in each])
            means = np.array(
                [
                    counts[places == p].mean(axis=0) if (places == p).any() else 0 * counts[0]
                    for p in range(len(region))
                ]
            )
            fired = means.max(axis=0) > 0
            found[m, fired] = region[means.argmax(axis=0)[fired]]
        self.assignment = found


def require_traverses(
    references: NDArray[Any] | Sequence[NDArray[Any]], side: int
) -> NDArray[np.float64]:
    """Return traverses as one array (traverses, places, side, side).

    Raises:
        DataError: They have different numbers of images, or images of another size.
    """
    lengths = [len(each) for each in references]
    if not lengths or len({*lengths}) != 1 or not lengths[0]:
        raise DataError(
            f"traverses have {', '.join(map(str, lengths)) or 'no'} images: each place needs one "
            "in every traverse, in the same order"
        )
    return np.stack([require_images(each, side) for each in references])


def require_images(images: NDArray[Any], side: int) -> NDArray[np.float64]:
    """Return images as (images, side, side); a DataError of another shape."""
    found = np.asarray(images, np.float64)
    if found.ndim != 3 or found.shape[1:] != (side, side):
        raise DataError(
            f"images have the shape {found.shape}, expected (images, {side}, {side}), grey: "
            "resize them, or set the side of the modules"
        )
    return found


def _advance(layer: Layer, synapses: Plasticity, spikes: NDArray[np.bool_]) -> Any:
    fired, inhibitory = layer.advance()
    layer.ge_e += synapses.arrive(layer.step, spikes)
    synapses.fire(layer.step, fired)
    layer.reset(fired, inhibitory)
    return fired


def _random(seed: int, *index: int) -> np.random.Generator:
    return generator(0x706C616365, seed, *index)
