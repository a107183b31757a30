"""Rounds of a search: several candidates are evaluated at once, and told in the order of asking.

So that a search resumes whichever candidate of a round ends first, trials are told when the whole
round has ended; the ledger's trials answer what was evaluated before.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from smallfry.errors import RunError
from smallfry.search.ledger import Ledger
from smallfry.search.space import Candidate, Search, Trial, key_of

__all__ = ["run_rounds"]

Evaluate = Callable[[Sequence[Candidate]], Iterable[Trial]]


def run_rounds(
    search: Search, evaluate: Evaluate, ledger: Ledger, together: int = 1
) -> list[Trial]:
    """Evaluate the candidates of a search, in rounds, until it proposes no more.

    Args:
        search: A new one.
        evaluate: Yields the trials of candidates as they end; what it raises ends the search, which
            can be resumed.
        ledger: Trials of earlier processes, and receiver of new ones.
        together: Candidates of a round at most; the same when a search is resumed.

    Returns:
        All trials in the order of asking.

    Raises:
        RunError: The search did not ask for a trial of the ledger, or ``evaluate`` yields none of a
            candidate.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from smallfry.search import Listed
        >>> def evaluate(candidates):
        ...     return [Trial(each, float(each["depth"])) for each in candidates]
        >>> with TemporaryDirectory() as folder:
        ...     ledger = Ledger(Path(folder) / "ledger.jsonl")
        ...     trials = run_rounds(Listed([{"depth": 2}, {"depth": 4}]), evaluate, ledger, 2)
        >>> [trial.value for trial in trials]
        [2.0, 4.0]
    """
    known: dict[Any, Trial] = {key_of(trial.candidate): trial for trial in ledger.read()}
    trials: list[Trial] = []
    while asked := search.ask(together):
        missing = [each for each in asked if key_of(each) not in known]
        for trial in evaluate(missing) if missing else ():
            ledger.append(trial)
        known = {key_of(trial.candidate): trial for trial in ledger.read()}
        if lacking := [each for each in asked if key_of(each) not in known]:
            raise RunError(
                f"{ledger.file} has no trial of {dict(lacking[0])} after its evaluation, which is "
                "to yield one of each candidate"
            )
        round_ = [known[key_of(each)] for each in asked]
        search.tell(round_)
        trials += round_
    if foreign := {*known} - {key_of(trial.candidate) for trial in trials}:
        raise RunError(
            f"{ledger.file} has {len(foreign)} trials of another search: use the settings that it "
            "was made with, or another folder"
        )
    return trials
