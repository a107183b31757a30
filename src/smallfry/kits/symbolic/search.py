"""Search for programs: the space of the core, and the evolution of a population with a library.

round     enumerate programs until the population is full, train those that are new, keep the better
          half, and learn a library and weights of the grammar from what is kept

Selection is by the value of a trial, which is the validation accuracy; the authors take that on
training images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from smallfry.errors import UsageError
from smallfry.io.replace import write_whole
from smallfry.kits.symbolic.grammar import Grammar, enumerate_programs
from smallfry.kits.symbolic.interpreter import run
from smallfry.kits.symbolic.library import learn_library
from smallfry.kits.symbolic.population import FRONTIER, Frontiers
from smallfry.kits.symbolic.programs import ARITIES, parse
from smallfry.search.evaluation import train_candidate
from smallfry.search.ledger import Ledger
from smallfry.search.ledger import run as run_search
from smallfry.search.proposals import Proposals
from smallfry.search.settings_space import SettingsSpace
from smallfry.search.space import Candidate, Choice, Trial
from smallfry.training.config import TrainConfig
from smallfry.training.progress import QuietReporter
from smallfry.transforms.spec import ModelSpec

__all__ = ["PROGRAM", "SETTINGS", "GraphProgramSpace", "ProgramEvolution", "evolve_programs"]

PROGRAM = "program"
OPTION = "model.options.program"  # the same in a file of ``smallfry search``
SETTINGS: Mapping[str, Any] = {
    "data": {"name": "symbolic-panels"},
    "model": {"name": "gssnn_tiny"},
    "augment": {"flip": False, "crop_padding": 0, "mixup": 0.0, "cutmix": 0.0},
    "optimizer": {"name": "muon", "lr": 5e-3, "weight_decay": 0.01},
    "ema": {"decay": 0.0},
    "epochs": 12,
    "batch_size": 32,
}


class GraphProgramSpace:
    """Space of programs: a candidate is ``{"program": "(push …)"}``, the structure of one model.

    Args:
        programs: Values of its one choice, which strategies of the core choose from; evolution goes
            beyond them.
        settings: Settings of ``TrainConfig`` that all candidates share; default those of the kit's
            recipe.

    Raises:
        UsageError: No programs, one that is none, or settings that a search can't have.
        RunError: Settings that are not of this version.

    Example:
        >>> space = GraphProgramSpace(["(push (add (connect identity)))"])
        >>> space.encode({"program": "(push (add (connect identity)))"})[:2].tolist()
        [2.0, 1.0]
    """

    def __init__(self, programs: Sequence[str], settings: Mapping[str, Any] | None = None) -> None:
        written = tuple(str(parse(program)) for program in programs)
        self._inner = SettingsSpace(settings or SETTINGS, [Choice(OPTION, written)])
        self.choices: tuple[Choice, ...] = (Choice(PROGRAM, written),)

    def spec(self, candidate: Candidate) -> ModelSpec:
        """Return the model of a candidate, with the data's classes and size."""
        return self._inner.spec(_option(candidate))

    def train(self, candidate: Candidate) -> TrainConfig:
        """Return the training of a candidate."""
        return self._inner.train(_option(candidate))

    def costs(self, candidate: Candidate) -> Mapping[str, float]:
        """Return the multiply-accumulates for one image, and the parameters."""
        return self._inner.costs(_option(candidate))

    def encode(self, candidate: Candidate) -> NDArray[np.float32]:
        """Encode a candidate for a predictor.

        Returns:
            Nodes, edges, the least, mean and greatest degree, triangles, and the number of each
            primitive, float32.
        """
        import networkx

        program = parse(candidate[PROGRAM])
        graph = run(program)
        degrees = graph.signature
        plain = networkx.Graph((edge.one, edge.other) for edge in graph.edges)
        triangles = sum(networkx.triangles(plain).values()) / 3
        names = [node.name for node in program.nodes()]
        return np.array(
            [
                len(graph.nodes),
                len(graph.edges),
                min(degrees),
                sum(degrees) / len(degrees),
                max(degrees),
                triangles,
                *(names.count(name) for name in ARITIES),
            ],
            np.float32,
        )

    def write(self, file: Path) -> None:
        """Write the space as a file of ``smallfry search --space``, without the data."""
        settings = {name: v for name, v in self._inner.settings.items() if name != "data"}
        content = {"settings": settings, "choices": {OPTION: list(self.choices[0].values)}}
        text = yaml.safe_dump(content, sort_keys=False, width=10_000)
        write_whole(file, text.encode())


class ProgramEvolution:
    """Search by a population of programs whose common parts become primitives.

    It proposes the first program of each graph, so no two candidates have isomorphic graphs. With
    the same trials it proposes the same candidates.

    Args:
        population: Programs at most.
        rounds: Of enumeration, training and selection.
        limit: Programs to enumerate in a round.
        keep: Share of the population that survives a round.
        frontier: Shortest programs of each surviving graph that the library is learned from.
        learner: Of the library, ``own`` or ``stitch``.
        seed: Seed of the trials; the search has no random numbers.

    Raises:
        UsageError: A setting out of range.

    Example:
        >>> search = ProgramEvolution(population=4, rounds=2, limit=500)
        >>> search.ask(3)
        [{'program': '(push (add (connect identity)))'}]
    """

    def __init__(
        self,
        population: int = 50,
        rounds: int = 5,
        limit: int = 20_000,
        keep: float = 0.5,
        frontier: int = FRONTIER,
        learner: Literal["own", "stitch"] = "own",
        seed: int = 0,
    ) -> None:
        for name, value in {"rounds": rounds, "limit": limit, "frontier": frontier}.items():
            if value < 1:
                raise UsageError(f"{name} is at least 1, not {value}")
        if not 0 < keep < 1 or population * keep < 1:
            raise UsageError(
                f"keep is above 0 and below 1, and keeps a program of {population} at least, not "
                f"{keep}"
            )
        self._settings = {
            "population": population,
            "rounds": rounds,
            "limit": limit,
            "keep": keep,
            "frontier": frontier,
            "learner": learner,
        }
        self._proposals = Proposals("evolution of programs", (PROGRAM,), population * rounds, seed)
        self._found = Frontiers(frontier)
        self._places: dict[str, int] = {}  # of the graph, by candidate
        self._values: dict[str, float] = {}
        self._population: list[str] = []
        self._planned: list[dict[str, Any]] = []
        self._round = 0
        self.grammar = Grammar.uniform()
        self.history: list[dict[str, Any]] = []  # of each round that has ended

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Return programs of the round that are not trained yet; none while some are awaited."""
        while not self._planned and not self._proposals.is_waiting:
            if self._round:
                self._select()
            if self._round == self._settings["rounds"]:
                return []
            self._fill()
            self._round += 1
        return self._proposals.hand_out(self._planned, count)

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take trials; one that failed is worse than any other."""
        self._proposals.tell(trials)
        for trial in trials:
            value = -np.inf if trial.value is None else trial.value
            self._values[trial.candidate[PROGRAM]] = float(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, the progress, the grammar and the trials as plain data."""
        return {
            **self._proposals.state_dict(),
            **self._settings,
            "round": self._round,
            "population": list(self._population),
            "grammar": self.grammar.to_dict(),
        }

    def _fill(self) -> None:
        """Enumerate programs, and take those of new graphs until the population is full."""
        room = int(self._settings["population"]) - len(self._population)
        known = len(self._found.graphs)
        for each in enumerate_programs(self.grammar, int(self._settings["limit"])):
            self._found.add(each.program)
        for place in range(known, len(self._found.graphs)):
            program = str(self._found.programs[place][0])
            if room > 0 and program not in self._places:
                self._places[program] = place
                self._population.append(program)
                self._planned.append({PROGRAM: program})
                room -= 1

    def _select(self) -> None:
        """Keep the better part of the population, and learn from it."""
        if not self._population or len(self.history) == self._round:
            return
        ranked = sorted(self._population, key=lambda program: -self._values[program])
        values = [self._values[program] for program in ranked]
        kept = max(1, round(float(self._settings["keep"]) * len(ranked)))
        self._population = ranked[:kept]
        corpus = self._found.corpus(self._places[program] for program in self._population)
        self.grammar = learn_library(corpus, learner=self._settings["learner"])  # type: ignore[arg-type]
        self.history.append(
            {
                "round": self._round,
                "programs": ranked,
                "values": values,
                "library": {k: str(v) for k, v in self.grammar.library.items()},
            }
        )


def evolve_programs(
    search: ProgramEvolution,
    space: GraphProgramSpace,
    folder: Path,
    seed: int = 0,
    told: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Train what a search asks for, or go on where this was stopped.

    Args:
        search: A new one.
        space: Gives the training of a program.
        folder: For the ledger and the runs.
        seed: Of all trainings, together with the program.
        told: Receiver of each new trial.

    Returns:
        All trials in the order of asking.

    Raises:
        RunError: The ledger is damaged, or of another search.
        Stopped: A signal came; the same call continues.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def evaluate(candidate: Candidate) -> Trial:
        began = monotonic()
        name = sha256(str(candidate[PROGRAM]).encode()).hexdigest()[:10]
        config = space.train(candidate)
        place, seeded = folder / "runs" / name, (seed + int(name, 16)) % 2**31
        config = replace(config, run=place, seed=seeded)
        try:
            costs = space.costs(candidate)
        except UsageError as error:  # such as a graph with more elements than numbers
            return Trial(candidate, None, seeded, failure=str(error))
        trial = train_candidate(candidate, config, costs, QuietReporter())
        trial = replace(trial, seconds=monotonic() - began)
        told(trial)
        return trial

    return run_search(search, evaluate, Ledger(folder / "ledger.jsonl"))


def _option(candidate: Candidate) -> dict[str, Any]:
    return {OPTION: candidate[PROGRAM]}
