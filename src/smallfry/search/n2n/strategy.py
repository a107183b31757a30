"""Compression of a teacher by policy gradient, in two stages (N2N; Ashok et al., ICLR 2018).

1. A policy of removal learns which layers a student can do without.
2. From the best student so far, a policy of shrinkage learns the widths of the layers left. Where
   it finds no new student any more, it begins again from the next best one of the first stage.

Of the paper are the policies, the reward, the rollouts of an iteration and the rates; the students'
own advantages, the exponential baseline, the entropy bonus and the bias towards keeping layers are
our choice, which costs nothing and varies less.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smallfry.errors import RunError, UsageError
from smallfry.search.n2n.layer import REMOVED, Layer, choices_of
from smallfry.search.n2n.policy import Policy, Removal, Shrinkage, reinforce
from smallfry.search.n2n.reward import INVALID, constrained_reward
from smallfry.search.proposals import Proposals
from smallfry.search.sampling import Allowed
from smallfry.search.space import Candidate, Trial, key_of

__all__ = ["N2N"]

RATES = {"removal": 3e-3, "shrinkage": 0.1}
BASELINE = 0.9  # memory of the mean reward
MOST_IDLE = 20  # iterations in a row without a new student, after which a stage ends


class N2N:
    """Search for the best students of a teacher; no student is asked for twice.

    Args:
        layers: Layers of the teacher.
        count: Students to ask for.
        reward: Reward of a trial, about 0 to 1.
        seed: Random seed.
        allowed: Whether a student can be built at all; the reward of others is −1.
        within: Whether it keeps the limits; others are trained only while the penalty is mild,
            in the first 15 iterations of a stage.
        rollouts: Students of an iteration.
        removal: Share of the students for the first stage.
        advantage: ``rollout`` for each student's own reward, less an exponential mean; ``batch``
            for the mean of the iteration less that of the earlier ones, as published.
        policies: Weights of policies of another search, as ``load_policies`` reads them.

    Raises:
        UsageError: No students, no layers, or policies of other sizes.

    Example:
        >>> layers = [Layer(name, (0.0, 0.5, 1.0)) for name in "abc"]
        >>> search = N2N(layers, count=9, reward=lambda trial: trial.value)
        >>> while asked := search.ask(9):
        ...     search.tell([Trial(each, value=1 - sum(each.values()) / 3) for each in asked])
        >>> search.state_dict()["asked"] <= 9
        True
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        count: int,
        reward: Callable[[Trial], float],
        seed: int = 0,
        allowed: Allowed = lambda student: True,
        within: Allowed = lambda student: True,
        rollouts: int = 5,
        removal: float = 0.25,
        advantage: Literal["rollout", "batch"] = "rollout",
        policies: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        if rollouts < 1 or not 0 <= removal <= 1 or advantage not in ("rollout", "batch"):
            raise UsageError(
                "n2n needs rollouts of 1 or more, removal of 0 to 1, and advantage rollout or "
                f"batch, not {rollouts}, {removal} and {advantage}"
            )
        self._proposals = Proposals("n2n", choices_of(layers), count, seed)
        self._layers, self._reward = tuple(layers), reward
        self._allowed, self._within = allowed, within
        self._rollouts, self._batch = rollouts, advantage == "batch"
        last = max(1, len(layers) - 1)
        self._numbers = torch.tensor(
            [layer.descriptor(place / last) for place, layer in enumerate(layers)]
        )
        self._shares = sorted({share for layer in layers for share in layer.widths})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policies: dict[str, Policy] = {
                "removal": Removal(),
                "shrinkage": Shrinkage(self._shares),
            }
        for name, weights in (policies or {}).items():
            self._load(name, weights)
        self._begun = deepcopy(self.policies)
        self._optimizers = {name: self._optimizer(name) for name in self.policies}
        self._generator = torch.Generator().manual_seed(seed)
        self._removals = round(removal * count)  # students of the first stage, at most
        removes = self._removals > 0 and any(layer.is_removable for layer in layers)
        self._stage = "removal" if removes else "shrinkage"
        self._base = {layer.name: 1.0 for layer in self._layers}
        # bases of the second stage
        self._shrunk = set() if self._stage == "removal" else {key_of(self._base)}
        self._rewards: dict[Any, float] = {}
        self._actions = torch.zeros(0)
        self._rolled: list[dict[str, Any]] = []  # students of the iteration
        self._planned: list[dict[str, Any]] = []
        self._iteration = self._idle = self._found = 0
        self._means: list[float] = []  # of the stage's iterations
        self._baseline = 0.0

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Return students of this iteration; of the next one when all of this are told."""
        while not self._planned and not self._proposals.is_waiting and self._proposals.left:
            if self._rolled:
                self._learn()
            if self._is_over() and not self._shrink():
                self._proposals.end()
                break
            self._roll()
        return self._proposals.hand_out(self._planned, count)

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take trials; one that failed is worth −1."""
        self._proposals.tell(trials)
        for trial in trials:
            value = INVALID if trial.value is None else self._reward(trial)
            self._rewards[key_of(trial.candidate)] = value

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, the stage, the number of proposals, and the trials."""
        return {
            **self._proposals.state_dict(),
            "stage": self._stage,
            "iteration": self._iteration,
        }

    def save_policies(self, file: Path) -> None:
        """Write the policies' weights, for the search of another teacher."""
        save_file(
            {
                f"{name}.{key}": value.contiguous()
                for name, policy in self.policies.items()
                for key, value in policy.state_dict().items()
            },
            file,
        )

    # One iteration

    def _roll(self) -> None:
        """Draw the students of an iteration, and plan those that have to be trained."""
        policy, possible = self.policies[self._stage], self._possible()
        self._actions = policy.sample(self._numbers, possible, self._rollouts, self._generator)
        self._rolled = [self._student(row) for row in self._actions.tolist()]
        new: dict[Any, dict[str, Any]] = {}
        for student in self._rolled:
            if not self._is_decided(student):
                new[key_of(student)] = student
        self._planned = list(new.values())[: self._proposals.left]
        self._idle = 0 if new else self._idle + 1
        self._found += len(new)

    def _is_decided(self, student: Candidate) -> bool:
        """Return whether a student's reward needs no training."""
        return (
            key_of(student) in self._rewards
            or not self._is_whole(student)
            or (not self._within(student) and constrained_reward(0, self._iteration, False) <= -1)
        )

    def _is_whole(self, student: Candidate) -> bool:
        """Return whether anything is left of a student, and it can be built."""
        return any(student.values()) and self._allowed(student)

    def _value(self, student: Candidate) -> float:
        """Return the reward of a student of this iteration."""
        found = self._rewards.get(key_of(student), INVALID)
        if not self._is_whole(student):
            return INVALID
        return constrained_reward(found, self._iteration, self._within(student))

    def _learn(self) -> None:
        """Take the policy's step, from the rewards of the iteration."""
        values = torch.tensor([self._value(each) for each in self._rolled])
        mean = float(values.mean())
        if self._batch:
            advantages = torch.full_like(values, mean - sum(self._means) / (len(self._means) + 1))
        else:
            if not self._means:
                self._baseline = mean
            advantages = values - self._baseline
            self._baseline = BASELINE * self._baseline + (1 - BASELINE) * mean
        self._means.append(mean)
        reinforce(
            self.policies[self._stage],
            self._optimizers[self._stage],
            self._numbers,
            self._possible(),
            self._actions,
            advantages,
        )
        self._rolled, self._iteration = [], self._iteration + 1

    # Stages

    def _is_over(self) -> bool:
        """Return whether the stage has had its students, or finds no new ones."""
        spent = self._stage == "removal" and self._proposals.asked >= self._removals
        return spent or self._idle >= MOST_IDLE or self._found >= self._students()

    def _students(self) -> int:
        """Count the students that the stage can find."""
        return math.prod(self._possible().sum(1).tolist())  # of any size

    def _shrink(self) -> bool:
        """Begin the second stage with the best student of the first one that has not had it yet.

        Returns:
            False if all had it.
        """
        bases = [
            trial.candidate
            for trial in self._proposals.valued
            if {*trial.candidate.values()} <= {REMOVED, 1.0}
            and key_of(trial.candidate) not in self._shrunk
        ]
        if not bases:
            return False
        best: Candidate = max(bases, key=self._value)
        self._base = dict(best)
        self._shrunk.add(key_of(self._base))
        self._stage, self._iteration, self._idle = "shrinkage", 0, 0
        self._found = 1  # the base itself
        self._means, self._rolled = [], []
        self.policies["shrinkage"] = deepcopy(self._begun["shrinkage"])
        self._optimizers["shrinkage"] = self._optimizer("shrinkage")
        return True

    def _possible(self) -> Tensor:
        """Mark the actions of each layer, (layers, actions)."""
        if self._stage == "removal":
            rows = [[layer.is_removable, True] for layer in self._layers]
        else:
            rows = [
                [
                    share in layer.widths if self._base[layer.name] else share == 1.0
                    for share in self._shares
                ]
                for layer in self._layers
            ]
        return torch.tensor(rows)

    def _student(self, actions: Sequence[int]) -> dict[str, Any]:
        """Return the student of a sequence of actions."""
        named = zip(self._layers, actions, strict=True)
        if self._stage == "removal":
            return {layer.name: 1.0 if action else REMOVED for layer, action in named}
        return {
            layer.name: self._shares[action] if self._base[layer.name] else REMOVED
            for layer, action in named
        }

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.policies[name].parameters(), RATES[name])

    def _load(self, name: str, weights: Mapping[str, Tensor]) -> None:
        if name not in self.policies:
            raise UsageError(f"n2n has the policies {', '.join(self.policies)}, not '{name}'")
        try:
            self.policies[name].load_state_dict(dict(weights))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise UsageError(
                f"n2n: the policy of {name} has other sizes ({reason}); "
                "use policies of a search with the same shares"
            ) from error


def load_policies(file: Path) -> dict[str, dict[str, Tensor]]:
    """Read policies that ``N2N.save_policies`` wrote.

    Raises:
        RunError: It is no such file.
    """
    try:
        tensors = load_file(file)
    except Exception as error:  # of the file or its format
        raise RunError(f"{file}: no policies of a search by n2n ({error})") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, rest = key.partition(".")
        found.setdefault(name, {})[rest] = value
    return found
