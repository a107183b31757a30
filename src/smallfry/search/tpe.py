"""Tree-structured Parzen estimators, by Optuna (Bergstra et al., NeurIPS 2011)."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smallfry.errors import UsageError
from smallfry.search.sampling import Allowed, new_candidate, sample
from smallfry.search.space import Candidate, Choice, Trial, key_of, require_count, require_trials

if TYPE_CHECKING:
    import optuna

REPEATS = 64  # proposals in a row that are known or not allowed, after which one is random
LIMITS = "limits"  # constraint, above 0 for candidates that are not allowed


class TPE:
    """Search by Optuna's TPE sampler; no candidate is asked for twice.

    A proposal that is known already is answered by its value, without an evaluation.

    Args:
        choices: The space's, each after those in its condition.
        count: Candidates to ask for.
        seed: Seed of the sampler.
        allowed: Whether a candidate may be proposed; default every one.

    Raises:
        UsageError: No candidates, or no choices.
        ModuleNotFoundError: Optuna is not installed.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        count: int,
        seed: int = 0,
        allowed: Allowed = lambda candidate: True,
    ) -> None:
        import optuna

        if count < 1 or not choices:
            raise UsageError(f"tpe needs choices, and at least one candidate, not {count}")
        self._choices, self._count, self._seed = tuple(choices), count, seed
        self._allowed = allowed
        self._startup = min(10, -(-count // 3))  # random ones before the estimators begin
        logging.getLogger("optuna").setLevel(logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=self._startup)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._asked: dict[tuple[Any, ...], optuna.Trial] = {}
        self._told: list[Trial] = []
        self._ended: set[tuple[Any, ...]] = set()

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Return proposals of the sampler."""
        found: list[dict[str, Any]] = []
        count = require_count(count)
        while len(found) < count and len(self._asked) < self._count:
            proposal = self._new()
            if proposal is None:
                self._count = len(self._asked)  # nothing new is left
                break
            found.append(proposal)
        return found

    def tell(self, trials: Sequence[Trial]) -> None:
        """Pass trials on to the sampler."""
        for trial in require_trials(trials):
            key = key_of(trial.candidate)
            if key not in self._asked or key in self._ended:
                raise UsageError(f"{dict(trial.candidate)} was not asked for")
            self._answer(self._asked[key], trial.value)
            self._told.append(trial)
            self._ended.add(key)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, the number of proposals, and the trials."""
        return {
            "count": self._count,
            "seed": self._seed,
            "startup": self._startup,
            "asked": len(self._asked),
            "told": [trial.to_dict() for trial in self._told],
        }

    def _new(self) -> dict[str, Any] | None:
        """Return a proposal that is allowed and new; a random one if the sampler has none."""
        import optuna

        for _ in range(REPEATS):
            trial, proposal = self._propose()
            key = key_of(proposal)
            if key in self._asked:
                known = [t.value for t in self._told if key_of(t.candidate) == key]
                self._answer(trial, known[0] if known else None)
            elif not self._allowed(proposal):
                self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                self._asked[key] = trial
                return proposal
        generator = np.random.default_rng([self._seed, len(self._asked)])
        candidate = new_candidate(
            lambda: sample(self._choices, generator),
            lambda each: key_of(each) in self._asked,
            self._allowed,
        )
        if candidate is None:
            return None
        self._study.enqueue_trial(_parameters(self._choices, candidate))
        self._asked[key_of(candidate)], proposal = self._propose()
        return proposal

    def _propose(self) -> tuple["optuna.Trial", dict[str, Any]]:
        trial = self._study.ask()
        return trial, suggest_candidate(trial, self._choices, self._allowed)

    def _answer(self, trial: "optuna.Trial", value: float | None) -> None:
        import optuna

        if value is None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, value)


def suggest_candidate(
    trial: "optuna.Trial", choices: Sequence[Choice], allowed: Allowed
) -> dict[str, Any]:
    """Propose a candidate by Optuna's sampler, away from those not allowed."""
    candidate: dict[str, Any] = {}
    for choice in choices:
        if choice.is_active(candidate):
            candidate[choice.name] = _suggest(trial, choice)
    trial.set_constraint(LIMITS, 0.0 if allowed(candidate) else 1.0)
    return candidate


def _suggest(trial: "optuna.Trial", choice: Choice) -> Any:
    if choice.values:  # by position, as values can be lists
        return choice.values[trial.suggest_categorical(choice.name, range(len(choice.values)))]
    assert choice.low is not None
    assert choice.high is not None
    if choice.whole:
        return trial.suggest_int(choice.name, int(choice.low), int(choice.high), log=choice.log)
    return trial.suggest_float(choice.name, choice.low, choice.high, log=choice.log)


def _parameters(choices: Sequence[Choice], candidate: Candidate) -> dict[str, Any]:
    """Return a candidate's values as Optuna has them."""
    having = [choice for choice in choices if choice.name in candidate]
    return {
        choice.name: choice.values.index(candidate[choice.name])
        if choice.values
        else candidate[choice.name]
        for choice in having
    }
