"""Statistics of a study's training runs, as pure functions of their outcomes."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from markupsafe import Markup

from smallfry.report.table import NONE, number, table

OUT_OF_MEMORY = "out of memory"


class Outcome(NamedTuple):
    """Outcome of one run of a study.

    ``facts`` are what the study varies, with the seed; ``summary`` and ``history`` are those of
    the run's folder. A run that failed has no summary, but a ``failure``.
    """

    name: str
    facts: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    history: Sequence[Mapping[str, float]]
    failure: str | None = None

    def measured(self, name: str) -> Any:
        """Return a figure of the summary; None if the run failed."""
        return None if self.summary is None else self.summary["measured"].get(name)

    @property
    def test(self) -> float | None:
        """Test accuracy in percent, from a single evaluation of the test split."""
        scores = self.measured("test")
        return None if scores is None else 100 * float(scores["accuracy"])

    @property
    def selected(self) -> float | None:
        """Accuracy in percent of the best epoch, on the split that chose it."""
        best = self.measured("best_epoch")
        if best is None or not 0 < best <= len(self.history):
            return None
        value = self.history[best - 1].get(f"{self.measured('select_on')}_accuracy")
        return None if value is None else 100 * value

    @property
    def minutes(self) -> float | None:
        """Training time in minutes."""
        seconds = self.measured("training_seconds")
        return None if seconds is None else float(seconds) / 60


def where(outcomes: Sequence[Outcome], **facts: Any) -> list[Outcome]:
    """Select the runs with all these facts."""
    return [o for o in outcomes if all(o.facts.get(key) == v for key, v in facts.items())]


def mean(outcomes: Sequence[Outcome], value: Callable[[Outcome], float | None]) -> float | None:
    """Compute the mean over the runs that have this value; None if none has."""
    known = [found for o in outcomes if (found := value(o)) is not None and math.isfinite(found)]
    return fmean(known) if known else None


def deviation(
    outcomes: Sequence[Outcome], value: Callable[[Outcome], float | None]
) -> float | None:
    """Compute the standard deviation over the runs; None with fewer than two."""
    known = [found for o in outcomes if (found := value(o)) is not None and math.isfinite(found)]
    return stdev(known) if len(known) > 1 else None


def accuracy_cell(outcomes: Sequence[Outcome]) -> str:
    """Format test accuracy over seeds, mean ± deviation, or the reason for its absence."""
    if not outcomes:
        return NONE
    middle = mean(outcomes, lambda o: o.test)
    failed = [o for o in outcomes if o.failure is not None]
    if middle is None and not failed:
        return NONE
    if middle is None:
        return "out of memory" if OUT_OF_MEMORY in str(failed[0].failure) else "failed"
    spread = deviation(outcomes, lambda o: o.test)
    text = f"{middle:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
    if not failed:
        return text
    cell = Markup("{} <span class=range>({} of {} failed)</span>")
    return cell.format(text, len(failed), len(outcomes))


def best_of(groups: Mapping[Any, Sequence[Outcome]]) -> Any:
    """Return the key with the best accuracy on the selecting split; None if no run has ended.

    A kind of which runs failed, such as seeds that diverged, is taken only if all kinds have such.
    Of equals it is the first.
    """
    scores = {key: mean(group, lambda o: o.selected) for key, group in groups.items()}
    known = {
        key: (all(o.failure is None for o in groups[key]), score)
        for key, score in scores.items()
        if score is not None
    }
    return max(known, key=lambda key: known[key]) if known else None


def strong(cell: str) -> Markup:
    """Highlight a cell."""
    return Markup("<b>{}</b>").format(cell)


def protocol(outcomes: Sequence[Outcome]) -> str:
    """Describe the choice of the epoch."""
    splits = {o.measured("select_on") for o in outcomes if o.summary is not None}
    words = {
        "validation": "best epoch by held-out validation, test read once",
        "test": "best epoch by test (the paper's protocol, which flatters)",
    }
    return " and ".join(words[split] for split in sorted(splits)) or "nothing has ended yet"


def _percent(value: float | None) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:.2f}"


def runs_table(outcomes: Sequence[Outcome]) -> Markup:
    """Tabulate every run, with everything needed to reproduce it."""
    head = ["run", "test %", "chosen at %", "chosen on", "best epoch", "seed", "minutes"]
    head += ["parameters", "MMAC", "device", "commit", "data"]
    cells = []
    for o in outcomes:
        if o.summary is None:
            cells.append([o.name, "failed", *[NONE] * 3, o.facts.get("seed"), *[NONE] * 6])
            continue
        origin, data = o.summary.get("provenance", {}), o.summary.get("data", {})
        cells.append(
            [
                o.name,
                *(_percent(v) for v in (o.test, o.selected)),
                o.measured("select_on"),
                f"{o.measured('best_epoch')} of {o.measured('epochs')}",
                o.measured("seed"),
                number(o.minutes),
                f"{o.measured('parameters'):,}",
                number(o.measured("macs") / 1e6),
                origin.get("device", NONE),
                origin.get("commit") or NONE,
                f"{data.get('name')} {data.get('fingerprint')}",
            ]
        )
    return table(head, cells, text=(0, 3, 9, 10, 11))
